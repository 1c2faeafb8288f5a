"""LRsI: layer-wise re-scaled initialisation of a sparse network.

One scale for every parameter tensor, found by gradient descent: that of GradInit, on
the masked network. The scales are to make the loss after one optimizer step of
prescribed length small, with the gradient norm at most gamma.

With m the masks, theta0 the parameters, and theta = alpha m theta0, an iteration is

1. g = the gradient of the loss at theta on a double batch (two batches concatenated),
   over unmasked coordinates; n = its norm over all tensors together.
2. If n > gamma, a constraint step: the objective is n.
3. Else an objective step: the objective is loss(theta - eta g / n) / eta with g / n
   constant, on another double batch (the first of the two, and a third).
4. Adam steps the scales by the objective's gradient, each entry clipped; a first moment
   for either kind of step, one second moment.

The gradient of n is an inner product with a Hessian-vector product, and the scale's
gradient in both cases one with theta0::

    dn / d alpha_i         = <H g / n, m theta0>_i
    d objective/d alpha_i  = <grad loss(theta'), m theta0>_i / eta

References:
  Zhu et al., GradInit: Learning to Initialize Neural Networks for Stable and Efficient
  Training, NeurIPS 2021. Jaiswal et al., Training Your Sparse Neural Network Better
  with Any Mask, ICML 2022.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer

from granet_jax import masking
from granet_jax.checks import (
    check_axis_name,
    check_flag,
    check_function,
    check_number,
    check_steps,
)

PyTree = Any
Loss = Callable[[PyTree, Any], Array]

_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class LRsI:
    """Settings of `rescale_init`; the defaults are those of the authors' command.

    Attributes:
      eta: length of the look-ahead step, above 0.
      gamma: largest norm of the gradient, above 0; infinity for no constraint.
      learning_rate: of Adam on the scales, above 0.
      min_scale: smallest scale, in [0, 1]. For tensors with "bias" in the last part of
        their name it is 0, as in the authors' code; a scale that gets there stays.
      iterations: number of Adam steps.
      clip: bound on every entry of the scales' gradient, above 0; infinity for none.
      mask_lookahead: whether gradient, norm and look-ahead step leave out pruned
        weights; False reproduces the authors' code (its `type2`), in which the
        looked-ahead network is dense.
    """

    eta: float = 0.1
    gamma: float = 1.0
    learning_rate: float = 1e-2
    min_scale: float = 0.01
    iterations: int = 180
    clip: float = 1.0
    mask_lookahead: bool = True

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for a setting that cannot be used."""
        check_number("eta", self.eta, above=0.0)
        check_number("gamma", self.gamma, above=0.0, finite=False)
        check_number("learning_rate", self.learning_rate, above=0.0)
        check_number("min_scale", self.min_scale, least=0.0, most=1.0)
        check_steps("iterations", self.iterations)
        check_number("clip", self.clip, above=0.0, finite=False)
        check_flag("mask_lookahead", self.mask_lookahead)


class Info(NamedTuple):
    """How `rescale_init` went: arrays of shape (iterations,).

    Attributes:
      norm: n, the norm of the gradient before the step.
      objective: n in a constraint step, loss(theta') / eta in an objective step.
      constrained: bool, whether it was a constraint step.
    """

    norm: Array
    objective: Array
    constrained: Array


class Rescaled(NamedTuple):
    """What `rescale_init` returns.

    Attributes:
      params: the scaled parameters, of the types of those given; zero where pruned.
      scales: pytree of the structure of params, a floating scalar at every leaf.
      info: see `Info`.
    """

    params: PyTree
    scales: PyTree
    info: Info


class Adam(NamedTuple):
    """State of the descent on the scales, all vectors with an entry for every tensor.

    Attributes:
      scales: floating (tensors,).
      first: (2, tensors), first moments of objective and of constraint steps.
      second: (tensors,), second moment of both.
      counts: int32 (2,), how many steps there were of either kind.
    """

    scales: Array
    first: Array
    second: Array
    counts: Array


class Problem(NamedTuple):
    """The parameters to scale.

    Attributes:
      base: the masked parameters that the scales multiply, m theta0.
      masks: pytree of masks, or None for a dense network.
      least: floating (tensors,), smallest scale of every tensor.
    """

    base: PyTree
    masks: PyTree | None
    least: Array


def rescale_init(
    loss_fn: Loss,
    params: PyTree,
    masks: PyTree | None,
    batches: Iterable[Any],
    config: LRsI | None = None,
    *,
    axis_name: str | None = None,
) -> Rescaled:
    """Scales every tensor of the initial parameters, see the module's text.

    Outside of traced functions, the iterations are a loop on the host around three
    compiled functions (a convolution inside a compiled loop is several times slower on
    CPU), and batches are drawn one by one. Inside a traced function it is one
    `lax.scan` over the batches, stacked, which must then have equal shapes.

    An objective step draws three batches, a constraint step two. Where they run out,
    they are gone through again from the start.

    Args:
      loss_fn: from (params, batch) to the mean loss over the batch, a scalar. Norms in
        it use the statistics of the batch and change none; no dropout; labels are not
        smoothed (the authors' code).
      params: pytree of floating arrays, initial or rewound. Not donated.
      masks: pytree of masks, None or `optax.MaskedNode()` at dense leaves; None for a
        dense network (the authors' `type1`, which masks afterwards).
      batches: batches, pytrees of arrays whose first axis counts examples: something
        to iterate over again and again (a list, a loader), or an iterator that is long
        enough for 3 * iterations.
      config: settings; None for `LRsI()`.
      axis_name: mapped axis (of pmap, shard_map, vmap) over which batches are split
        and gradients are averaged; parameters and masks are the same along it.

    Returns:
      `Rescaled`: the new parameters, the scales, and the course of the norms. Tensors
      that are zero (or pruned as a whole) have the scale 1.

    Raises:
      TypeError: a config of another type.
      ValueError: masks of another structure or shape; batches that are empty or run
        out; and outside of traced functions, a norm or loss that is not finite.
    """
    config = LRsI() if config is None else config
    if not isinstance(config, LRsI):
        raise TypeError(f"config must be an LRsI, got {config!r}.")
    check_function("loss_fn", loss_fn, "a function (params, batch) -> scalar")
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be iterable, got {batches!r}.")
    check_axis_name(axis_name)
    problem, state = start(params, masks, config)
    # A loader or an iterator gives concrete arrays.
    held = batches if isinstance(batches, Sequence) else ()
    inputs = jax.tree.leaves((problem, state, held))
    if axis_name is not None or any(isinstance(x, Tracer) for x in inputs):
        state, info = _scan(loss_fn, problem, state, batches, config, axis_name)
    else:
        state, info = _loop(loss_fn, problem, state, batches, config)
    treedef = jax.tree.structure(params)
    scales = treedef.unflatten(list(state.scales))
    return Rescaled(scaled(problem.base, state.scales), scales, info)


def start(params: PyTree, masks: PyTree | None, config: LRsI) -> tuple[Problem, Adam]:
    """The masked parameters, and the state before the first iteration."""
    masking.check_arrays("params", params)
    if not jax.tree.leaves(params):
        raise ValueError(f"params has no leaves, got {params!r}: nothing to scale.")
    if masks is not None:
        masks = masking.check_masks(masks, params)
        params = masking.apply_masks(params, masks)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    dtype = functools.reduce(jnp.promote_types, [x.dtype for _, x in leaves], "float32")
    last_names = [masking.leaf_name(path).rsplit("/", 1)[-1] for path, _ in leaves]
    least = [0.0 if "bias" in name else config.min_scale for name in last_names]
    zeros = jnp.zeros(len(leaves), dtype)
    return Problem(params, masks, jnp.asarray(least, dtype)), Adam(
        scales=jnp.ones_like(zeros),
        first=jnp.stack([zeros, zeros]),
        second=zeros,
        counts=jnp.zeros(2, jnp.int32),
    )


def scaled(base: PyTree, scales: Array) -> PyTree:
    """Every leaf times its scale, in the leaf's dtype."""
    leaves, treedef = jax.tree.flatten(base)
    return treedef.unflatten(
        [(scales[i] * x).astype(x.dtype) for i, x in enumerate(leaves)]
    )


def gradient(
    loss_fn: Loss,
    problem: Problem,
    scales: Array,
    batch: Any,
    config: LRsI,
    axis_name: str | None = None,
) -> tuple[PyTree, Array]:
    """Direction of the look-ahead step, and norm: (g / n, n).

    Over unmasked coordinates, or all if `config.mask_lookahead` is False.
    """
    theta = scaled(problem.base, scales)
    grads = jax.grad(loss_fn)(_varying(theta, axis_name), batch)
    if axis_name is not None:
        grads = lax.pmean(grads, axis_name)
    if problem.masks is not None and config.mask_lookahead:
        grads = masking.apply_masks(grads, problem.masks)
    squares = [
        jnp.sum(jnp.square(g.astype(scales.dtype))) for g in jax.tree.leaves(grads)
    ]
    norm = jnp.sqrt(sum(squares, jnp.zeros((), scales.dtype)))
    divisor = jnp.where(norm > 0, norm, 1.0)
    return jax.tree.map(lambda g: (g / divisor).astype(g.dtype), grads), norm


def constraint_gradient(
    loss_fn: Loss,
    problem: Problem,
    scales: Array,
    direction: PyTree,
    batch: Any,
    axis_name: str | None = None,
) -> Array:
    """Gradient of n with respect to the scales, on this device's batch: (tensors,).

    Args:
      loss_fn: see `rescale_init`.
      problem: from `start`.
      scales: (tensors,).
      direction: g / n at these scales, from `gradient`.
      batch: the one that g is of.
      axis_name: see `rescale_init`; the mean along it is left to the caller.
    """
    theta = _varying(scaled(problem.base, scales), axis_name)
    tangent = _varying(direction, axis_name)
    _, product = jax.jvp(lambda p: jax.grad(loss_fn)(p, batch), (theta,), (tangent,))
    return _inner_products(product, problem.base, scales.dtype)


def objective_gradient(
    loss_fn: Loss,
    problem: Problem,
    scales: Array,
    direction: PyTree,
    batch: Any,
    config: LRsI,
    axis_name: str | None = None,
) -> tuple[Array, Array]:
    """Loss after the look-ahead step, and its gradient, both over eta.

    Args:
      loss_fn: see `rescale_init`.
      problem: from `start`.
      scales: (tensors,).
      direction: g / n, from `gradient`; a constant.
      batch: the one to look ahead with.
      config: settings.
      axis_name: see `rescale_init`; the mean along it is left to the caller.

    Returns:
      The objective, a scalar, and its gradient with respect to the scales, (tensors,).
    """
    ahead = jax.tree.map(
        lambda x, d: x - jnp.asarray(config.eta, x.dtype) * d,
        scaled(problem.base, scales),
        direction,
    )
    loss, grads = jax.value_and_grad(loss_fn)(_varying(ahead, axis_name), batch)
    products = _inner_products(grads, problem.base, scales.dtype)
    return loss.astype(scales.dtype) / config.eta, products / config.eta


def adam_step(
    state: Adam, slope: Array, constrained: Array | bool, problem: Problem, config: LRsI
) -> Adam:
    """One step of the scales down the gradient `slope` of either objective."""
    kind = jnp.asarray(constrained).astype(jnp.int32)
    slope = jnp.clip(slope, -config.clip, config.clip)
    first = state.first.at[kind].mul(_BETA_1).at[kind].add((1.0 - _BETA_1) * slope)
    second = _BETA_2 * state.second + (1.0 - _BETA_2) * slope**2
    counts = state.counts.at[kind].add(1)
    mean = first[kind] / (1.0 - _BETA_1 ** counts[kind].astype(slope.dtype))
    square = second / (1.0 - _BETA_2 ** jnp.sum(counts).astype(slope.dtype))
    step = config.learning_rate * mean / (jnp.sqrt(square) + _EPSILON)
    # The scale of a tensor that is zero has slope 0, and so stays 1.
    lowered = jnp.maximum(state.scales - step, problem.least)
    scales = jnp.where(state.scales > 0, lowered, state.scales)
    return Adam(scales, first, second, counts)


def _loop(
    loss_fn: Loss,
    problem: Problem,
    state: Adam,
    batches: Iterable[Any],
    config: LRsI,
) -> tuple[Adam, Info]:
    """All iterations, in a loop on the host."""

    @jax.jit
    def measure(problem: Problem, state: Adam, batch: Any) -> tuple[PyTree, Array]:
        return gradient(loss_fn, problem, state.scales, batch, config)

    @jax.jit
    def constrain(problem: Problem, state: Adam, direction: PyTree, batch: Any) -> Adam:
        slope = constraint_gradient(loss_fn, problem, state.scales, direction, batch)
        return adam_step(state, slope, True, problem, config)

    @jax.jit
    def descend(
        problem: Problem, state: Adam, direction: PyTree, batch: Any
    ) -> tuple[Adam, Array]:
        value, slope = objective_gradient(
            loss_fn, problem, state.scales, direction, batch, config
        )
        return adam_step(state, slope, False, problem, config), value

    drawn = _again(batches)
    norms, objectives, kinds = [], [], []
    for iteration in range(config.iterations):
        half = next(drawn)
        batch = _joined(half, next(drawn))
        direction, norm = measure(problem, state, batch)
        constrained = float(norm) > config.gamma
        if constrained:
            state = constrain(problem, state, direction, batch)
            value = norm
        else:
            batch = _joined(half, next(drawn))
            state, value = descend(problem, state, direction, batch)
        if not (math.isfinite(norm) and math.isfinite(value)):
            raise ValueError(
                f"loss_fn gives a gradient of norm {float(norm)} and an objective of "
                f"{float(value)} at iteration {iteration} of LRsI: they must be "
                "finite. Look for an overflow in the loss at the initial parameters; "
                "in float16, compute the loss in float32."
            )
        norms.append(norm)
        objectives.append(value)
        kinds.append(constrained)
    return state, Info(jnp.stack(norms), jnp.stack(objectives), jnp.asarray(kinds))


def _scan(
    loss_fn: Loss,
    problem: Problem,
    state: Adam,
    batches: Iterable[Any],
    config: LRsI,
    axis_name: str | None,
) -> tuple[Adam, Info]:
    """All iterations, in one compiled loop."""
    held = list(itertools.islice(batches, 3 * config.iterations))
    if not held:
        raise ValueError("batches is empty: LRsI needs at least one batch.")
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *held)

    def batch_at(cursor: Array) -> Any:
        return jax.tree.map(lambda x: x[cursor % len(held)], stacked)

    def iteration(carry: tuple[Adam, Array], _: None) -> Any:
        state, cursor = carry
        half = batch_at(cursor)
        batch = _joined(half, batch_at(cursor + 1))
        direction, norm = gradient(
            loss_fn, problem, state.scales, batch, config, axis_name
        )
        constrained = norm > config.gamma

        # Without communication: the mean over devices is taken of their results.
        def constrain() -> tuple[Array, Array]:
            slope = constraint_gradient(
                loss_fn, problem, state.scales, direction, batch, axis_name
            )
            return _varying(norm, axis_name), slope

        def descend() -> tuple[Array, Array]:
            other = _joined(half, batch_at(cursor + 2))
            return objective_gradient(
                loss_fn, problem, state.scales, direction, other, config, axis_name
            )

        value, slope = lax.cond(constrained, constrain, descend)
        if axis_name is not None:
            value, slope = lax.pmean((value, slope), axis_name)
        state = adam_step(state, slope, constrained, problem, config)
        cursor = cursor + jnp.where(constrained, 2, 3)
        return (state, cursor), Info(norm, value, constrained)

    (state, _), info = lax.scan(
        iteration, (state, jnp.int32(0)), length=config.iterations
    )
    return state, info


def _again(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, and when they run out, from the start."""
    drawn = 0
    while True:
        before = drawn
        for batch in batches:
            drawn += 1
            yield batch
        if drawn == before:
            raise ValueError(
                "batches is empty: LRsI needs at least one batch."
                if not drawn
                else f"batches ran out after {drawn}, and cannot be iterated over "
                "again: give a list or a loader instead of an iterator, or one of "
                "3 * iterations batches."
            )


def _joined(first: Any, second: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), first, second)


def _inner_products(tree: PyTree, base: PyTree, dtype: Any) -> Array:
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(base), strict=True)
    return jnp.stack([jnp.sum(x.astype(dtype) * y.astype(dtype)) for x, y in pairs])


def _varying(tree: PyTree, axis_name: str | None) -> PyTree:
    """The tree as values that may differ along the axis, so that gradients are local.

    In `shard_map`, the gradient with respect to a value that is the same on all devices
    is summed over them. Adding a zero that comes from the axis has an effect on types
    only, and works in pmap and vmap too, where `lax.pcast` is refused.
    """
    if axis_name is None:
        return tree
    zero = 0 * lax.axis_index(axis_name)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)
