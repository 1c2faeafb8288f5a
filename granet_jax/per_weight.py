"""Whether an optimizer treats every weight by itself.

SGD, Adam and Lion do: the step of a weight depends on its own gradient and moments
only. Optimizers with norms or matrix products over a leaf, such as LAMB, Muon or
Adafactor, do not. `transform` computes the same results for both kinds; for the first
kind it can mask what goes into the optimizer instead of what comes out of it, which
saves copies of the parameters and the moments in every step.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer

from granet_jax import masking
from granet_jax.masking import PyTree, is_masked_node
from granet_jax.moments import matching_masks

_GRADIENT, _WEIGHT, _MOMENT = 0.5, 0.75, 0.25


def is_per_weight(
    optimizer: optax.GradientTransformationExtraArgs,
    params: PyTree,
    masks: PyTree,
    extra: dict[str, Any],
) -> bool:
    """Whether an optimizer treats every weight by itself, by trying it.

    The optimizer takes one step on a small example: a tree like the parameters, whose
    leaves have no more than two entries along an axis. Every second weight counts as
    pruned. The optimizer is per-weight if filling the pruned weights with NaN leaves
    the results of the others as they are, to the bit, and if zeros at pruned weights
    give zero moments. If the example cannot be run, the answer is no.

    Args:
      optimizer: The optimizer.
      params: Pytree of parameters, of which shapes and dtypes are read.
      masks: Pytree of masks, of which the structure is read.
      extra: Extra arguments of the optimizer's update.
    """
    if not isinstance(jax.tree.leaves(masks)[0], Tracer):
        return False  # Outside jit nothing is compiled, so nothing would be saved.
    try:
        with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
            zeros = _one_step(optimizer, params, masks, extra, 0.0)
            nans = _one_step(optimizer, params, masks, extra, math.nan)
    except Exception:  # noqa: BLE001 - optimizers raise what they like on other shapes
        return False
    return all(map(_is_kept, zeros, nans))


def _one_step(
    optimizer: optax.GradientTransformationExtraArgs,
    params: PyTree,
    masks: PyTree,
    extra: dict[str, Any],
    fill: float,
) -> list[tuple[np.ndarray, np.ndarray | None, bool]]:
    """The results of one step: an array, its mask or None, and if it is a moment."""

    def filled(keep: Array, x: Any, value: float) -> Array:
        return jnp.where(keep, value, fill).astype(x.dtype)

    def tree(value: float) -> PyTree:
        dense = jax.tree.map(lambda p: jnp.full(_small(p), value, p.dtype), params)
        return masking.map_masked(lambda m, p: filled(m, p, value), keep, dense)

    keep = masking.map_masked(lambda m, _, p: _every_second(p), masks, masks, params)
    weights, grads = tree(_WEIGHT), tree(_GRADIENT)
    state = optimizer.init(weights)
    state = jax.tree.map(
        lambda x, m: x if is_masked_node(m) else filled(m, x, _MOMENT),
        state,
        matching_masks(state, keep),
    )
    extra = jax.tree.map(
        lambda x: jnp.ones(x.shape, x.dtype) if isinstance(x, Array) else x, extra
    )
    updates, state = optimizer.update(grads, state, weights, **extra)
    results: list[tuple[np.ndarray, np.ndarray | None, bool]] = []
    for result, is_moment in ((updates, False), (state, True)):
        found = keep if result is updates else matching_masks(state, keep)
        pairs = zip(
            jax.tree.leaves(result, is_leaf=is_masked_node),
            jax.tree.leaves(found, is_leaf=is_masked_node),
            strict=True,
        )
        for x, m in pairs:
            if is_masked_node(x):
                continue
            mask = None if is_masked_node(m) else np.asarray(m)
            results.append((np.asarray(x), mask, is_moment))
    return results


def _is_kept(
    zeros: tuple[np.ndarray, np.ndarray | None, bool],
    nans: tuple[np.ndarray, np.ndarray | None, bool],
) -> bool:
    (a, keep, is_moment), (b, _, _) = zeros, nans
    if keep is None:
        return a.tobytes() == b.tobytes()
    if is_moment and np.any(a[~keep] != 0):
        return False
    return a[keep].tobytes() == b[keep].tobytes()


def _small(leaf: Any) -> tuple[int, ...]:
    return tuple(min(n, 2) for n in leaf.shape)


def _every_second(leaf: Any) -> Array:
    shape = _small(leaf)
    return (jnp.arange(math.prod(shape)) % 2 == 0).reshape(shape)
