"""What a sparse training costs, beside a dense one of as many steps."""

import bisect
import itertools
from collections.abc import Callable, Mapping

from granet_jax import structures
from granet_jax.analysis.network_flops import Flops
from granet_jax.checks import check_steps, check_type
from granet_jax.distributions import Distribution
from granet_jax.masking import Sparsity
from granet_jax.methods import Method, check_method

Densities = Mapping[str, float]


def training_flops(
    method: Method,
    total_steps: int,
    flops: Flops,
    *,
    distribution: Distribution | None = None,
    history: Mapping[int, Sparsity] | None = None,
) -> float:
    """FLOPs of a training with `method`, relative to a dense one of as many steps.

    By the rules of the RigL paper's appendix. A backward pass costs two forward passes,
    one by activations and one by weights, and a dense gradient makes the latter dense.
    With f_S and f_D the FLOPs of the sparse and the dense forward pass, a step costs::

        3 f_S                                     static, SET, GMP
        (3 f_S dT + 2 f_S + f_D) / (dT + 1)       RigL, GraNet: a dense gradient at
                                                  updates, dT steps apart
        2 f_S + f_D                               SNFS: a dense gradient always

    where f_S follows the sparsity from update to update, over 3 f_D for dense training.
    The same accounts give the others, on which the paper says nothing: methods whose
    pruned weights take no part (`cyclical` with "hard" recovery, `acdc`, `sculpt`,
    `greg1`, `greg2`) cost 3 f_S; those that move all weights in every step
    (`straight_through`, `cyclical` with the other recoveries) 2 f_S + f_D; and
    `top_kast`, which moves those of its backward sparsity, 2 f_S + f_B.

    Neither the choice of masks nor the optimizer is counted, nor what came before: the
    training that `greg1` starts from, or scores at initialization.

    Args:
      method: the record. What it reads, and when, says which rule holds.
      total_steps: optimizer steps of the training.
      flops: of the forward pass, from `flops`, with masks at the leaves that are to
        carry one (only where they are matters, not their density).
      distribution: how active weights are taken to be split over leaves; None for the
        method's own. The result is exact where each leaf keeps the number that this
        gives it (static, SET, RigL, all with scope "layer"), and else an estimate.
      history: measured instead, `granet_jax.sparsity(masks)` by step, from step 0 on;
        at each update the last one counts.

    Returns:
      1 for dense training.

    Raises:
      TypeError: `method` is no record of a method.
      ValueError: no masked leaf; nothing computed; a history that begins too late or
        is of other leaves; `distribution` and `history` both.

    References:
      Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020, appendix
      on FLOPs.
    """
    check_method(method)
    check_steps("total_steps", total_steps)
    check_type("flops", flops, Flops, "from granet_jax.analysis.flops")
    if history is not None:
        check_type("history", history, Mapping, "granet_jax.sparsity(masks) by step")
    masked = {name: leaf.shape for name, leaf in flops.leaves.items() if leaf.masked}
    if not masked or not flops.dense:
        raise ValueError(
            "flops must have masked leaves, and FLOPs, got "
            f"{len(masked)} masked leaves and {flops.dense} FLOPs: pass masks to flops."
        )
    if distribution is not None and history is not None:
        raise ValueError("distribution must be None with history: it is measured.")
    split = _split(method, masked, method.distribution)
    at = split if history is None else _measured(history, masked)
    if distribution is not None:
        split = at = _split(method, masked, distribution)
    updates = [t for t in method.updates.steps() if t <= total_steps]
    at_update = frozenset(updates)
    cost = 0.0
    for before, after in itertools.pairwise((0, *updates, total_steps)):
        sparsity = method.sparsity(before)
        sparse = flops.at(at(before, sparsity))
        gradient = sparse  # By weights, on average.
        if method.weights == "dense" and method.marked_sparsity is not None:
            gradient = flops.at(split(before, method.marked_sparsity))
        elif method.weights != "sparse" or method.accumulator_decay is not None:
            gradient = float(flops.dense)
        elif after in at_update and _reads_gradient(
            method, sparsity, method.sparsity(after)
        ):
            gradient += (flops.dense - sparse) / (after - before + 1)
        cost += (after - before) * (2 * sparse + gradient)
    return cost / (3 * flops.dense * total_steps)


def _reads_gradient(method: Method, before: float, after: float) -> bool:
    """Whether an update, from one sparsity to another, needs the dense gradient."""
    only_to_revive = method.grow is None and method.revive is not None
    return method.needs_gradient and (not only_to_revive or after < before)


def _split(
    method: Method, shapes: Mapping[str, tuple[int, ...]], distribution: Distribution
) -> Callable[[int, float], Densities]:
    """Densities of leaves at a sparsity, by a rule."""
    sizes = structures.parts(method.structure, [*shapes.values()])
    known: dict[float, Densities] = {}

    def at(step: int, sparsity: float) -> Densities:
        del step
        if sparsity not in known:
            counts = structures.counts(
                method.structure, [*shapes.values()], sparsity, distribution
            )
            known[sparsity] = {
                name: n / size if size else 0.0
                for name, n, size in zip(shapes, counts, sizes, strict=True)
            }
        return known[sparsity]

    return at


def _measured(
    history: Mapping[int, Sparsity], shapes: Mapping[str, tuple[int, ...]]
) -> Callable[[int, float], Densities]:
    """Densities of leaves at a step, as they were measured last."""
    steps = sorted(history)
    if not steps or steps[0] > 0:
        raise ValueError(
            f"history must begin at step 0, got {steps[:1]}: add granet_jax.sparsity "
            "of the initial masks."
        )
    for step in steps:
        check_type(f"history[{step}]", history[step], Sparsity, "a granet_jax.sparsity")
        if set(history[step].leaves) != set(shapes):
            raise ValueError(
                f"history must be of the masked leaves {sorted(shapes)}, got "
                f"{sorted(history[step].leaves)} at step {step}."
            )

    def at(step: int, sparsity: float) -> Densities:
        del sparsity
        last = steps[bisect.bisect(steps, step) - 1]
        return {name: 1.0 - s for name, s in history[last].leaves.items()}

    return at
