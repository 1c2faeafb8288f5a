"""Whether an optimizer treats every weight by itself.

SGD, Adam and Lion do: the step of a weight depends on its own gradient and moments
only. Optimizers with norms or matrix products over a leaf, such as LAMB, Muon or
Adafactor, do not. `transform` computes the same results for both kinds; for the first
kind it can mask what goes into the optimizer instead of what comes out of it, which
saves copies of the parameters and the moments in every step.
"""

import concurrent.futures
import math
from typing import Any, NamedTuple

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
    pruned: it is zero, as its gradient is, and its moments are fresh. The optimizer is
    per-weight if these moments come out of the step as they went in, and if filling the
    pruned weights with NaN leaves the results of the others as they are, to the bit.
    If the example cannot be run, the answer is no.

    Args:
      optimizer: The optimizer.
      params: Pytree of parameters, of which shapes and dtypes are read.
      masks: Pytree of masks, of which the structure is read.
      extra: Extra arguments of the optimizer's update.
    """
    if not isinstance(jax.tree.leaves(masks)[0], Tracer):
        return False  # Outside jit nothing is compiled, so nothing would be saved.
    wide = jax.config.read("jax_enable_x64")

    def try_it() -> bool:
        with jax.enable_x64(wide), jax.transfer_guard("allow"):
            clean = _one_step(optimizer, params, masks, extra, 0.0)
            noisy = _one_step(optimizer, params, masks, extra, math.nan)
        return all(map(_is_kept, clean, noisy))

    # A new thread has neither the trace nor the mesh of the caller. In the mesh, the
    # example would run on all devices, also where this process cannot use them.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(try_it).result()
        except Exception:  # noqa: BLE001 - optimizers raise what they like here
            return False


class _Result(NamedTuple):
    """A result of one step.

    Attributes:
      array: The result.
      keep: The mask of its weights; None for a result that many weights share.
      before: A moment's value before the step.
    """

    array: np.ndarray
    keep: np.ndarray | None
    before: np.ndarray


def _one_step(
    optimizer: optax.GradientTransformationExtraArgs,
    params: PyTree,
    masks: PyTree,
    extra: dict[str, Any],
    noise: float,
) -> list[_Result]:
    """The results of one step of the example, with `noise` added at pruned weights.

    Without noise, a pruned weight and its gradient are zero, and its moments are fresh.
    """

    def filled(keep: Array, value: float, pruned: Array) -> Array:
        return jnp.where(keep, value, pruned + noise).astype(pruned.dtype)

    def tree(value: float) -> PyTree:
        dense = jax.tree.map(lambda p: jnp.full(_small(p), value, p.dtype), params)
        return masking.map_masked(
            lambda m, p: filled(m, value, jnp.zeros_like(p)), keep, dense
        )

    keep = masking.map_masked(lambda m, _, p: _every_second(p), masks, masks, params)
    weights, grads = tree(_WEIGHT), tree(_GRADIENT)
    before = optimizer.init(weights)
    before = jax.tree.map(
        lambda x, m: x if is_masked_node(m) else filled(m, _MOMENT, x),
        before,
        matching_masks(before, keep),
    )
    extra = jax.tree.map(
        lambda x: jnp.ones(x.shape, x.dtype) if isinstance(x, Array) else x, extra
    )
    updates, after = optimizer.update(grads, before, weights, **extra)
    found = jax.tree.structure((updates, after)).flatten_up_to(
        (keep, matching_masks(after, keep))
    )
    # An update is compared with itself: only moments must stay as they are.
    results = zip(
        jax.tree.leaves((updates, after)),
        found,
        jax.tree.leaves((updates, before)),
        strict=True,
    )
    return [
        _Result(
            np.asarray(x), None if is_masked_node(m) else np.asarray(m), np.asarray(old)
        )
        for x, m, old in results
    ]


def _is_kept(clean: _Result, noisy: _Result) -> bool:
    keep, before = clean.keep, clean.before
    if keep is None:
        return clean.array.tobytes() == noisy.array.tobytes()
    if not np.array_equal(clean.array[~keep], before[~keep], equal_nan=True):
        return False
    return clean.array[keep].tobytes() == noisy.array[keep].tobytes()


def _small(leaf: Any) -> tuple[int, ...]:
    return tuple(min(n, 2) for n in leaf.shape)


def _every_second(leaf: Any) -> Array:
    shape = _small(leaf)
    return (jnp.arange(math.prod(shape)) % 2 == 0).reshape(shape)
