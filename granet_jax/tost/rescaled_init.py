"""LRsI: layer-wise rescaled initialization of a sparse network.

LRsI is GradInit on the masked network. It finds one scale for each parameter tensor by
gradient descent, such that one optimizer step of prescribed length makes the loss small
while the norm of the gradient stays at most gamma.

With m the masks, theta0 the parameters, and theta = alpha m theta0, an iteration is

1. Compute g, the gradient of the loss at theta on a double batch (two batches
   concatenated) over unmasked coordinates, and n, its norm over all tensors together.
2. If n > gamma, take a constraint step: the objective is n.
3. Otherwise take an objective step: the objective is loss(theta - eta g / n) / eta with
   g / n constant, on another double batch (the first of the two, and a third).
4. Adam moves the scales down the gradient of the objective, with each entry clipped.
   Each kind of step has its own first moment; both share the second moment.

References:
  Zhu et al., GradInit: Learning to Initialize Neural Networks for Stable and Efficient
  Training, NeurIPS 2021. Jaiswal et al., Training Your Sparse Neural Network Better
  with Any Mask, ICML 2022.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer

from granet_jax.checks import check_axis_name, check_function
from granet_jax.tost.scale_descent import (
    AdamState,
    Loss,
    LRsI,
    Problem,
    PyTree,
    ScaleDescent,
    scale_leaves,
    start,
    vary_over_axis,
)


class Info(NamedTuple):
    """Course of `rescale_init`: arrays of shape (iterations,).

    Attributes:
      norm: Norm n of the gradient before the step.
      objective: n in a constraint step, loss(theta') / eta in an objective step.
      constrained: Boolean, whether it was a constraint step.
    """

    norm: Array
    objective: Array
    constrained: Array


class Rescaled(NamedTuple):
    """Result of `rescale_init`.

    Attributes:
      params: Scaled parameters in their original dtypes; zero where pruned.
      scales: Pytree with the structure of params and a floating scalar at every leaf.
      info: Course of the norms and objectives, see `Info`.
    """

    params: PyTree
    scales: PyTree
    info: Info


def rescale_init(
    loss_fn: Loss,
    params: PyTree,
    masks: PyTree | None,
    batches: Iterable[Any],
    config: LRsI | None = None,
    *,
    axis_name: str | None = None,
) -> Rescaled:
    """Scale every tensor of the initial parameters by LRsI.

    Outside of traced functions, a loop on the host calls three compiled functions and
    draws batches one by one. (On CPU, convolutions are several times slower inside a
    compiled loop.) Inside a traced function, it is one `lax.scan` over the stacked
    batches, which must have equal shapes.

    An objective step draws three batches, a constraint step two. When the batches run
    out, they start again from the first.

    Args:
      loss_fn: Function from (params, batch) to the mean loss over the batch, a scalar.
        As in the authors' code, norms should use batch statistics without updating
        running ones, and there should be no dropout and no label smoothing.
      params: Pytree of floating arrays, initial or rewound. Not donated.
      masks: Pytree of masks, with None or `optax.MaskedNode()` at dense leaves; None
        for a dense network (the authors' `type1`, which masks afterwards).
      batches: Batches, pytrees of arrays whose first axis counts examples: a list, a
        loader or any other iterable that can restart, or an iterator of at least
        3 * iterations batches.
      config: Settings; None for `LRsI()`.
      axis_name: Mapped axis (of pmap, shard_map or vmap) over which batches are split
        and gradients averaged. Parameters and masks are equal along it.

    Returns:
      The scaled parameters, the scales, and the course of the norms, see `Rescaled`.
      Tensors that are zero or completely pruned have scale 1.

    Raises:
      TypeError: A config of another type.
      ValueError: Masks of another structure or shape; no batches, or too few. Outside
        of traced functions, also a norm or loss that is not finite.
    """
    config = LRsI() if config is None else config
    if not isinstance(config, LRsI):
        raise TypeError(f"config must be an LRsI, got {config!r}.")
    check_function("loss_fn", loss_fn, "a function (params, batch) -> scalar")
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be iterable, got {batches!r}.")
    check_axis_name(axis_name)
    problem, state = start(params, masks, config)
    descent = ScaleDescent(loss_fn, config, axis_name)
    # Only sequences are searched for traced batches: an iterator would be used up.
    sequence = batches if isinstance(batches, Sequence) else ()
    inputs = jax.tree.leaves((problem, state, sequence))
    if axis_name is not None or any(isinstance(x, Tracer) for x in inputs):
        state, info = _run_traced(descent, problem, state, batches)
    else:
        state, info = _run_on_host(descent, problem, state, batches)
    scales = jax.tree.structure(params).unflatten(list(state.scales))
    return Rescaled(scale_leaves(problem.base, state.scales), scales, info)


def _run_on_host(
    descent: ScaleDescent, problem: Problem, state: AdamState, batches: Iterable[Any]
) -> tuple[AdamState, Info]:
    @jax.jit
    def find_direction(
        problem: Problem, state: AdamState, batch: Any
    ) -> tuple[PyTree, Array]:
        return descent.direction(problem, state.scales, batch)

    @jax.jit
    def constraint_step(
        problem: Problem, state: AdamState, direction: PyTree, batch: Any
    ) -> AdamState:
        gradient = descent.constraint_gradient(problem, state.scales, direction, batch)
        return descent.adam_step(problem, state, gradient, True)

    @jax.jit
    def objective_step(
        problem: Problem, state: AdamState, direction: PyTree, batch: Any
    ) -> tuple[AdamState, Array]:
        value, gradient = descent.objective_gradient(
            problem, state.scales, direction, batch
        )
        return descent.adam_step(problem, state, gradient, False), value

    source = _repeated(batches)
    history: list[tuple[Array, Array, bool]] = []
    for iteration in range(descent.config.iterations):
        first = next(source)
        batch = _concatenated(first, next(source))
        direction, norm = find_direction(problem, state, batch)
        constrained = float(norm) > descent.config.gamma
        if constrained:
            state = constraint_step(problem, state, direction, batch)
            value = norm
        else:
            batch = _concatenated(first, next(source))
            state, value = objective_step(problem, state, direction, batch)
        if not (math.isfinite(norm) and math.isfinite(value)):
            raise ValueError(
                f"loss_fn gives a gradient of norm {float(norm)} and an objective of "
                f"{float(value)} at iteration {iteration} of LRsI: they must be "
                "finite. Look for an overflow in the loss at the initial parameters; "
                "in float16, compute the loss in float32."
            )
        history.append((norm, value, constrained))
    norms, values, constrained = zip(*history, strict=True)
    return state, Info(jnp.stack(norms), jnp.stack(values), jnp.asarray(constrained))


def _run_traced(
    descent: ScaleDescent, problem: Problem, state: AdamState, batches: Iterable[Any]
) -> tuple[AdamState, Info]:
    config, axis_name = descent.config, descent.axis_name
    drawn = list(itertools.islice(batches, 3 * config.iterations))
    if not drawn:
        raise ValueError("batches is empty: LRsI needs at least one batch.")
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *drawn)

    def batch_at(cursor: Array) -> Any:
        return jax.tree.map(lambda x: x[cursor % len(drawn)], stacked)

    def iteration(carry: tuple[AdamState, Array], _: None) -> Any:
        state, cursor = carry
        first = batch_at(cursor)
        batch = _concatenated(first, batch_at(cursor + 1))
        direction, norm = descent.direction(problem, state.scales, batch)
        constrained = norm > config.gamma

        # The branches do not communicate; the results are averaged after the cond.
        def constraint() -> tuple[Array, Array]:
            gradient = descent.constraint_gradient(
                problem, state.scales, direction, batch
            )
            return vary_over_axis(norm, axis_name), gradient

        def objective() -> tuple[Array, Array]:
            other = _concatenated(first, batch_at(cursor + 2))
            return descent.objective_gradient(problem, state.scales, direction, other)

        value, gradient = lax.cond(constrained, constraint, objective)
        if axis_name is not None:
            value, gradient = lax.pmean((value, gradient), axis_name)
        state = descent.adam_step(problem, state, gradient, constrained)
        cursor = cursor + jnp.where(constrained, 2, 3)
        return (state, cursor), Info(norm, value, constrained)

    (state, _), info = lax.scan(
        iteration, (state, jnp.int32(0)), length=config.iterations
    )
    return state, info


def _repeated(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches, starting again from the first when they run out."""
    count = 0
    while True:
        before = count
        for batch in batches:
            count += 1
            yield batch
        if count == before:
            raise ValueError(
                f"batches ran out after {count}, and cannot be iterated over "
                "again: pass a list or a loader instead of an iterator, or one of "
                "3 * iterations batches."
                if count
                else "batches is empty: LRsI needs at least one batch."
            )


def _concatenated(first: Any, second: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), first, second)
