"""Sharpness: how curved the loss is in the directions that a sparse network can go."""

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
    """Largest eigenvalue of the Hessian over what is trained, by power iteration.

    The Hessian of the loss with the rows and columns of pruned weights left out; those
    of leaves without a mask stay. It is never formed: each iteration takes a product of
    it and a direction, at about the cost of two gradients. Gradient descent with a rate
    eta is stable where this is below 2 / eta.

    Runs under jit.

    Args:
      loss_fn: (params, batch) -> scalar; of the parameters and the batch alone.
      params: pytree of floating arrays, sparse or dense; the loss is taken of them as
        they are.
      masks: pytree of masks of the same structure, packed or not.
      batch: what `loss_fn` takes: the sharpness is that of its examples.
      iterations: of the power iteration. The error falls with (b / a)^(2 iterations),
        a and b the largest two eigenvalues by size.
      seed: of the direction it starts from.

    Returns:
      float32 scalar: the eigenvalue of largest size, with its sign, from below in size.
      Zero if nothing is trained.

    Raises:
      TypeError, ValueError: masks that do not fit; iterations below 1.

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
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    start = [
        jax.random.normal(k, p.shape, p.dtype)
        for k, p in zip(keys, leaves, strict=True)
    ]

    def product(direction: PyTree) -> PyTree:
        gradient = jax.grad(lambda p: loss_fn(p, batch))
        _, found = jax.jvp(gradient, (params,), (direction,))
        return masking.apply_masks(found, masks)

    def iterate(_: Any, found: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
        direction, _ = found
        image = product(direction)
        return _normalised(image), _inner(direction, image)

    direction = _normalised(masking.apply_masks(treedef.unflatten(start), masks))
    _, eigenvalue = lax.fori_loop(0, iterations, iterate, (direction, jnp.float32(0.0)))
    return eigenvalue


def _inner(a: PyTree, b: PyTree) -> Array:
    total = jnp.float32(0.0)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        total += jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32))
    return total


def _normalised(direction: PyTree) -> PyTree:
    size = jnp.sqrt(_inner(direction, direction))
    # Zero stays zero: where nothing is trained, or the loss is flat.
    scale = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1.0), 0.0)
    return jax.tree.map(
        lambda x: (x.astype(jnp.float32) * scale).astype(x.dtype), direction
    )
