"""Gradients of LRsI with respect to the scales, and Adam on the scales.

`rescaled_init` describes the algorithm and its symbols. The scales are one vector with
an entry for each parameter tensor. Their gradients are inner products with m theta0,
and that of the norm n takes a Hessian-vector product::

    dn / d alpha_i           = <H g / n, m theta0>_i
    d objective / d alpha_i  = <grad loss(theta'), m theta0>_i / eta
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from granet_jax import masking
from granet_jax.checks import check_flag, check_number, check_steps
from granet_jax.dtypes import wider

PyTree = Any
Loss = Callable[[PyTree, Any], Array]

_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class LRsI:
    """Settings of `rescale_init`. The defaults are those of the authors' command.

    Attributes:
      eta: Length of the look-ahead step, above 0.
      gamma: Largest allowed norm of the gradient, above 0; infinity for no constraint.
      learning_rate: Learning rate of Adam on the scales, above 0.
      min_scale: Smallest scale, in [0, 1]. As in the authors' code, the smallest scale
        is 0 for tensors with "bias" in the last part of their name, and a scale that
        reaches 0 stays there.
      iterations: Number of Adam steps.
      clip: Bound on each entry of the gradient, above 0; infinity for no bound.
      mask_lookahead: Whether gradient, norm and look-ahead step leave out pruned
        weights. False reproduces the authors' code (its `type2`), in which the network
        after the look-ahead step is dense.
    """

    eta: float = 0.1
    gamma: float = 1.0
    learning_rate: float = 1e-2
    min_scale: float = 0.01
    iterations: int = 180
    clip: float = 1.0
    mask_lookahead: bool = True

    def __post_init__(self) -> None:
        """Raise TypeError or ValueError for an invalid setting."""
        check_number("eta", self.eta, above=0.0)
        check_number("gamma", self.gamma, above=0.0, finite=False)
        check_number("learning_rate", self.learning_rate, above=0.0)
        check_number("min_scale", self.min_scale, least=0.0, most=1.0)
        check_steps("iterations", self.iterations)
        check_number("clip", self.clip, above=0.0, finite=False)
        check_flag("mask_lookahead", self.mask_lookahead)


class Problem(NamedTuple):
    """The parameters to scale.

    Attributes:
      base: Pytree of the masked parameters, m theta0.
      masks: Pytree of masks, or None for a dense network.
      min_scales: Floating (tensors,), the smallest scale of each tensor.
    """

    base: PyTree
    masks: PyTree | None
    min_scales: Array


class AdamState(NamedTuple):
    """State of the descent on the scales.

    Attributes:
      scales: Floating (tensors,).
      first: (2, tensors), first moments of objective steps and of constraint steps.
      second: (tensors,), second moment over both kinds of steps.
      counts: int32 (2,), number of objective steps and of constraint steps so far.
    """

    scales: Array
    first: Array
    second: Array
    counts: Array


def start(
    params: PyTree, masks: PyTree | None, config: LRsI
) -> tuple[Problem, AdamState]:
    """Return the masked parameters, and the state before the first iteration."""
    masking.check_arrays("params", params)
    if not jax.tree.leaves(params):
        raise ValueError(f"params has no leaves, got {params!r}: nothing to scale.")
    if masks is not None:
        masks = masking.check_masks(masks, params)
        params = masking.apply_masks(params, masks)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    dtype = wider("float32", *(x.dtype for _, x in leaves))
    last_names = [masking.leaf_name(path).rsplit("/", 1)[-1] for path, _ in leaves]
    min_scales = [0.0 if "bias" in name else config.min_scale for name in last_names]
    zeros = jnp.zeros(len(leaves), dtype)
    return Problem(params, masks, jnp.asarray(min_scales, dtype)), AdamState(
        scales=jnp.ones_like(zeros),
        first=jnp.stack([zeros, zeros]),
        second=zeros,
        counts=jnp.zeros(2, jnp.int32),
    )


def scale_leaves(base: PyTree, scales: Array) -> PyTree:
    """Multiply every leaf by its scale, in the leaf's dtype."""
    leaves, treedef = jax.tree.flatten(base)
    return treedef.unflatten(
        [(scales[i] * x).astype(x.dtype) for i, x in enumerate(leaves)]
    )


@dataclasses.dataclass(frozen=True)
class ScaleDescent:
    """The computations of one iteration.

    Gradients with respect to the scales, and the objective, are those of the batch on
    this device; with an axis name, the caller averages them over the axis.

    Attributes:
      loss_fn: Function (params, batch) -> scalar.
      config: Settings.
      axis_name: Mapped axis over which batches are split, or None.
    """

    loss_fn: Loss
    config: LRsI
    axis_name: str | None = None

    def direction(
        self, problem: Problem, scales: Array, batch: Any
    ) -> tuple[PyTree, Array]:
        """Return the direction g / n of the look-ahead step, and the norm n.

        They cover unmasked coordinates, or all if `config.mask_lookahead` is False.
        """
        theta = scale_leaves(problem.base, scales)
        grads = jax.grad(self.loss_fn)(vary_over_axis(theta, self.axis_name), batch)
        if self.axis_name is not None:
            grads = lax.pmean(grads, self.axis_name)
        if problem.masks is not None and self.config.mask_lookahead:
            grads = masking.apply_masks(grads, problem.masks)
        squares = [
            jnp.sum(jnp.square(g.astype(scales.dtype))) for g in jax.tree.leaves(grads)
        ]
        norm = jnp.sqrt(sum(squares, jnp.zeros((), scales.dtype)))
        divisor = jnp.where(norm > 0, norm, 1.0)
        return jax.tree.map(lambda g: (g / divisor).astype(g.dtype), grads), norm

    def constraint_gradient(
        self, problem: Problem, scales: Array, direction: PyTree, batch: Any
    ) -> Array:
        """Return the gradient of the norm n with respect to the scales, (tensors,).

        Args:
          problem: The parameters to scale.
          scales: Floating (tensors,).
          direction: g / n at these scales, from `direction`.
          batch: The batch on which `direction` was computed.
        """
        theta = vary_over_axis(scale_leaves(problem.base, scales), self.axis_name)
        tangent = vary_over_axis(direction, self.axis_name)
        gradient = jax.grad(self.loss_fn)
        _, product = jax.jvp(lambda p: gradient(p, batch), (theta,), (tangent,))
        return _leaf_inner_products(product, problem.base, scales.dtype)

    def objective_gradient(
        self, problem: Problem, scales: Array, direction: PyTree, batch: Any
    ) -> tuple[Array, Array]:
        """Return the loss after the look-ahead step and its gradient, both over eta.

        Args:
          problem: The parameters to scale.
          scales: Floating (tensors,).
          direction: g / n, from `direction`; it counts as constant.
          batch: The batch on which to evaluate the loss.

        Returns:
          The objective, a scalar, and its gradient with respect to the scales,
          (tensors,).
        """
        eta = self.config.eta
        ahead = jax.tree.map(
            lambda x, d: x - jnp.asarray(eta, x.dtype) * d,
            scale_leaves(problem.base, scales),
            direction,
        )
        loss, grads = jax.value_and_grad(self.loss_fn)(
            vary_over_axis(ahead, self.axis_name), batch
        )
        products = _leaf_inner_products(grads, problem.base, scales.dtype)
        return loss.astype(scales.dtype) / eta, products / eta

    def adam_step(
        self,
        problem: Problem,
        state: AdamState,
        gradient: Array,
        is_constraint: Array | bool,
    ) -> AdamState:
        """Take one Adam step down the gradient of the objective or the constraint."""
        config = self.config
        kind = jnp.asarray(is_constraint).astype(jnp.int32)
        gradient = jnp.clip(gradient, -config.clip, config.clip)
        increment = (1.0 - _BETA_1) * gradient
        first = state.first.at[kind].mul(_BETA_1).at[kind].add(increment)
        second = _BETA_2 * state.second + (1.0 - _BETA_2) * gradient**2
        counts = state.counts.at[kind].add(1)
        mean = first[kind] / (1.0 - _BETA_1 ** counts[kind].astype(gradient.dtype))
        square = second / (1.0 - _BETA_2 ** jnp.sum(counts).astype(gradient.dtype))
        step = config.learning_rate * mean / (jnp.sqrt(square) + _EPSILON)
        lowered = jnp.maximum(state.scales - step, problem.min_scales)
        scales = jnp.where(state.scales > 0, lowered, state.scales)
        return AdamState(scales, first, second, counts)


def vary_over_axis(tree: PyTree, axis_name: str | None) -> PyTree:
    """Mark values as different along the axis, so that their gradients stay local.

    In `shard_map`, the gradient with respect to a value that is equal on all devices is
    summed over the devices. Adding a zero that depends on the axis only changes types.
    It also works in pmap and vmap, which reject `lax.pcast`.
    """
    if axis_name is None:
        return tree
    zero = 0 * lax.axis_index(axis_name)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


def _leaf_inner_products(tree: PyTree, base: PyTree, dtype: Any) -> Array:
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(base), strict=True)
    return jnp.stack([jnp.sum(x.astype(dtype) * y.astype(dtype)) for x, y in pairs])
