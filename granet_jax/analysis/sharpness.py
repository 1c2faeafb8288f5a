"""Sharpness: curvature of the loss in directions that a sparse network can move."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from granet_jax import masking
from granet_jax.checks import check_function, check_seed, check_steps
from granet_jax.masking import PyTree

LossFn = Callable[[PyTree, Any], Array]


def sharpness(
    loss_fn: LossFn,
    params: PyTree,
    masks: PyTree,
    batch: Any,
    *,
    iterations: int = 50,
    seed: int | Array = 0,
) -> Array:
    """Return the largest eigenvalue of the Hessian over the trained weights.

    The Hessian of the loss covers active weights and leaves without a mask; the rows
    and columns of pruned weights are left out. Power iteration never forms it: each
    iteration computes one Hessian-vector product, at about the cost of two gradients.
    Gradient descent with learning rate eta is stable where the sharpness is below
    2 / eta.

    Runs under jit.

    Args:
      loss_fn: Function (params, batch) -> scalar of the parameters and the batch alone.
      params: Pytree of floating arrays, sparse or dense. The loss is evaluated at these
        values, without applying the masks.
      masks: Pytree of masks of the same structure, packed or not.
      batch: Second argument of `loss_fn`. The sharpness is that of its examples.
      iterations: Number of power iterations. The error falls with
        (b / a)^(2 iterations), for a and b the two eigenvalues of largest magnitude.
      seed: Seed of the initial direction.

    Returns:
      float32 scalar: the eigenvalue of largest magnitude, with its sign. The estimate
      approaches it from below in magnitude. Zero if no weight is trained.

    Raises:
      TypeError, ValueError: Masks that do not match, or iterations below 1.

    References:
      Cohen et al., Gradient Descent on Neural Networks Typically Occurs at the Edge of
      Stability, ICLR 2021.
    """
    check_function("loss_fn", loss_fn, "the loss, of parameters and a batch")
    check_steps("iterations", iterations)
    check_seed(seed)
    masking.check_arrays("params", params)
    if not jax.tree.leaves(params):
        raise ValueError(f"params has no leaves, got {params!r}: nothing is trained.")
    masks = masking.check_masks(masking.unpack_masks(masks), params)

    def hessian_product(direction: PyTree) -> PyTree:
        gradient = jax.grad(lambda p: loss_fn(p, batch))
        _, product = jax.jvp(gradient, (params,), (direction,))
        return masking.apply_masks(product, masks)

    def iterate(_: Any, carry: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
        direction, _ = carry
        product = hessian_product(direction)
        return _normalized(product), _inner_product(direction, product)

    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    random = treedef.unflatten(
        [
            jax.random.normal(key, p.shape, p.dtype)
            for key, p in zip(keys, leaves, strict=True)
        ]
    )
    start = _normalized(masking.apply_masks(random, masks))
    _, eigenvalue = lax.fori_loop(0, iterations, iterate, (start, jnp.float32(0.0)))
    return eigenvalue


def _inner_product(a: PyTree, b: PyTree) -> Array:
    total = jnp.float32(0.0)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        total += jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32))
    return total


def _normalized(direction: PyTree) -> PyTree:
    norm = jnp.sqrt(_inner_product(direction, direction))
    # A zero direction stays zero: no weight is trained, or the loss is flat.
    scale = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1.0), 0.0)
    return jax.tree.map(
        lambda x: (x.astype(jnp.float32) * scale).astype(x.dtype), direction
    )
