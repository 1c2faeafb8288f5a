"""FLOPs of a whole sparse training run, relative to dense training."""

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from granet_jax import structures
from granet_jax.analysis.network_flops import Flops
from granet_jax.checks import check_steps, check_type
from granet_jax.distributions import Distribution
from granet_jax.layers import Axes, Stacked, divide, layer_shapes, stack_axes
from granet_jax.masking import Sparsity
from granet_jax.methods import Method, check_method
from granet_jax.phases import Revive

Shapes = Mapping[str, tuple[int, ...]]
# Density of each leaf at a step, given the step and the overall sparsity there.
DensityRule = Callable[[int, float], Mapping[str, float]]


def training_flops(
    method: Method,
    total_steps: int,
    flops: Flops,
    *,
    distribution: Distribution | None = None,
    history: Mapping[int, Sparsity] | None = None,
    stacked: Stacked = None,
) -> float:
    """Return the FLOPs of a training run, relative to a dense run of equal length.

    The rules are those of the RigL paper's appendix. A backward pass costs two forward
    passes: one for the gradient of the activations and one for the gradient of the
    weights, which costs a dense pass where a dense gradient is needed. With f_S and f_D
    the FLOPs of the sparse and the dense forward pass, one step costs::

        3 f_S                                     static, SET, DSR, GMP
        (3 f_S dT + 2 f_S + f_D) / (dT + 1)       RigL, GraNet, MEST: a dense gradient
                                                  at updates, dT steps apart
        2 f_S + f_D                               SNFS: a dense gradient in every step

    Here f_S follows the sparsity from update to update, and the sum is divided by 3 f_D
    for each step. The paper does not cover all of these methods, but the same reasoning
    applies. It also gives 3 f_S for methods whose pruned weights take no part
    (`cyclical` with "hard" recovery, `acdc`, `sculpt`, `greg1`, `greg2`), 2 f_S + f_D
    for methods that move all weights in every step (`straight_through`, `cyclical` with
    other recoveries), and 2 f_S + f_B for `top_kast`, with f_B the FLOPs at its
    backward sparsity.

    Neither the choice of masks nor the optimizer counts, nor do computations before the
    run: the dense training that `greg1` starts from, or scores at initialization.

    Args:
      method: Record of the method. Its fields decide which rule applies.
      total_steps: Number of optimizer steps.
      flops: FLOPs of the forward pass, from `flops`. Its masks only decide which leaves
        are sparse; their density does not matter.
      distribution: Assumed distribution of active weights over the leaves; None for the
        method's own. The result is exact if each leaf keeps the number of weights that
        the distribution gives it (static, SET, RigL, any method with scope "layer"),
        and an estimate otherwise.
      history: Measured sparsities to use instead of a distribution:
        `granet_jax.sparsity(masks)` by step, starting at step 0. At each update the
        latest entry counts.
      stacked: Which axes of a leaf count layers, as in `granet_jax.transform`.

    Returns:
      The ratio of FLOPs; 1 for dense training.

    Raises:
      TypeError: `method` is not a record of a method.
      ValueError: No masked leaf or no FLOPs; a history that starts after step 0 or
        covers other leaves; both `distribution` and `history`.

    References:
      Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020, appendix
      on FLOPs.
    """
    check_method(method)
    check_steps("total_steps", total_steps)
    check_type("flops", flops, Flops, "from granet_jax.analysis.flops")
    leaves = {name: leaf for name, leaf in flops.leaves.items() if leaf.masked}
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    stacks = [stack_axes(stacked, name, leaf) for name, leaf in leaves.items()]
    if not shapes or not flops.dense:
        raise ValueError(
            "flops must have masked leaves, and FLOPs, got "
            f"{len(shapes)} masked leaves and {flops.dense} FLOPs: pass masks to flops."
        )
    if distribution is not None and history is not None:
        raise ValueError(
            "distribution must be None with history, which already says how dense each "
            "leaf is."
        )
    rule = method.distribution if distribution is None else distribution
    prescribed = _prescribed_densities(method, shapes, stacks, rule)
    densities = prescribed if history is None else _measured_densities(history, shapes)
    updates = [t for t in method.updates.steps() if t <= total_steps]
    cost = 0.0
    for start, stop in itertools.pairwise((0, *updates, total_steps)):
        sparse = flops.at(densities(start, method.sparsity(start)))
        ends_with_update = stop in updates
        gradient = _weight_gradient_flops(
            method, start, stop, ends_with_update, sparse, flops, prescribed
        )
        cost += (stop - start) * (2 * sparse + gradient)
    return cost / (3 * flops.dense * total_steps)


def _weight_gradient_flops(
    method: Method,
    start: int,
    stop: int,
    ends_with_update: bool,
    sparse: float,
    flops: Flops,
    prescribed: DensityRule,
) -> float:
    """Return the mean FLOPs of the weights' gradient in steps `start` to `stop`."""
    if method.weights == "dense" and method.marked_sparsity is not None:
        return flops.at(prescribed(start, method.marked_sparsity))
    if method.weights != "sparse" or method.average_decay is not None:
        return float(flops.dense)
    if ends_with_update and _update_reads_gradient(method, start, stop):
        return sparse + (flops.dense - sparse) / (stop - start + 1)
    return sparse


def _update_reads_gradient(method: Method, start: int, stop: int) -> bool:
    """Whether the update at `stop` needs the dense gradient."""
    growing = [phase for phase in method.phases if phase.grows]
    only_revives = method.revives and all(isinstance(p, Revive) for p in growing)
    revives = method.sparsity(stop) < method.sparsity(start)
    return method.needs_gradient and (revives or not only_revives)


def _prescribed_densities(
    method: Method,
    shapes: Shapes,
    stacks: Sequence[Axes],
    distribution: Distribution,
) -> DensityRule:
    layers = layer_shapes(shapes.values(), stacks)
    sizes = np.asarray(structures.parts(method.structure, layers))
    by_sparsity: dict[float, Mapping[str, float]] = {}

    def densities(step: int, sparsity: float) -> Mapping[str, float]:
        del step
        if sparsity not in by_sparsity:
            counts = structures.counts(method.structure, layers, sparsity, distribution)
            # The layers of a leaf have the same size.
            shares = divide(counts / np.maximum(sizes, 1), shapes.values(), stacks)
            by_sparsity[sparsity] = {
                name: float(np.mean(share))
                for name, share in zip(shapes, shares, strict=True)
            }
        return by_sparsity[sparsity]

    return densities


def _measured_densities(history: Mapping[int, Sparsity], shapes: Shapes) -> DensityRule:
    check_type("history", history, Mapping, "granet_jax.sparsity(masks) by step")
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

    def densities(step: int, sparsity: float) -> Mapping[str, float]:
        del sparsity
        latest = steps[bisect.bisect(steps, step) - 1]
        return {name: 1.0 - s for name, s in history[latest].leaves.items()}

    return densities
