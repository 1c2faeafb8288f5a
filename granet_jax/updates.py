"""Prune, drop and regrow: pure functions from masks and scores to masks.

Every function takes pytrees of masks (`optax.MaskedNode()` at dense leaves), and
scores as trees of the same structure, or as anything whose leaves line up with the
masks' leaves. Numbers of weights are integers and are met exactly.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from granet_jax import masking, schedules
from granet_jax.selection import Scope, top_k

PyTree = Any


def prune(
    masks: PyTree, scores: PyTree, keep: Array | int | Sequence[int], *, scope: Scope
) -> PyTree:
    """Keeps the `keep` best-scored of the active weights, and prunes the others.

    Args:
      masks: pytree of masks.
      scores: one array per mask, of its shape; larger is kept.
      keep: number of weights to keep: one integer with scope "global", one per leaf
        with scope "layer". Where fewer are active, all of them stay.
      scope: whether weights compete across leaves ("global") or within ("layer").

    Returns:
      Masks; a subset of `masks`.
    """
    leaves, treedef = jax.tree.flatten(masks)
    kept = top_k(jax.tree.leaves(scores), keep, among=leaves, scope=scope)
    return treedef.unflatten(kept)


def regrow(masks: PyTree, scores: PyTree, number: Array | Sequence[int]) -> PyTree:
    """Activates, in every leaf, the `number` best-scored of the inactive weights.

    Args:
      masks: pytree of masks.
      scores: one array per mask, of its shape; larger is activated.
      number: integers, one per leaf.

    Returns:
      Masks; a superset of `masks`.
    """
    leaves, treedef = jax.tree.flatten(masks)
    grown = top_k(jax.tree.leaves(scores), number, among=[~m for m in leaves])
    return treedef.unflatten([m | g for m, g in zip(leaves, grown, strict=True)])


def prune_and_regrow(
    masks: PyTree,
    drop_scores: PyTree,
    grow_scores: PyTree,
    fraction: Array,
    *,
    layer_weights: Array | None = None,
) -> PyTree:
    """Exchanges a fraction of every leaf's active weights (neuroregeneration).

    In a leaf with a active weights, the ceil(fraction * a) of lowest drop score are
    dropped and as many of highest grow score are activated, among all that are then
    inactive, those just dropped included (the GraNet and ITOP code).

    Args:
      masks: pytree of masks.
      drop_scores: one array per mask; the lowest are dropped.
      grow_scores: one array per mask; the highest are activated.
      fraction: prune fraction as uint32 fixed point, see `schedules.fixed_point`.
      layer_weights: optional float32 vector, one per leaf: the freed weights of all
        leaves together are redistributed in proportion to it (SNFS), see
        `redistribute`. Default: every leaf regrows what it dropped.

    Returns:
      Masks with as many active weights as `masks`; in every leaf, unless
      `layer_weights` is given, else in total.
    """
    leaves = jax.tree.leaves(masks)
    active = _stack_counts(masking.active_counts(masks))
    dropped = schedules.ceil_of(fraction, active)
    pruned = prune(masks, drop_scores, active - dropped, scope="layer")
    if layer_weights is not None:
        sizes = jnp.asarray([m.size for m in leaves], active.dtype)
        room = sizes - (active - dropped)
        dropped = redistribute(jnp.sum(dropped, dtype=active.dtype), layer_weights, room)
    return regrow(pruned, grow_scores, dropped)


def redistribute(number: Array, weights: Array, room: Array) -> Array:
    """Splits `number` over leaves in proportion to `weights`, within their `room`.

    What a full leaf cannot take goes to the others, again in proportion; what is left
    by rounding down, fewer than one per leaf, goes to the first leaves with room.
    Leaves without weight are served only when the others are full.

    Args:
      number: unsigned integer, at most the sum of `room`.
      weights: float32, non-negative, one per leaf; what is not finite counts as 0.
      room: unsigned integers, most that each leaf can take.

    Returns:
      Integers of the dtype and shape of `room` that sum to `number` exactly.
    """
    weights = jnp.where(jnp.isfinite(weights), weights, 0.0)
    count_type = room.dtype

    def total(x: Array) -> Array:
        return jnp.sum(x, dtype=count_type)

    def pour(_: int, given: Array) -> Array:
        left = number - total(given)
        space = room - given
        open_weights = jnp.where(space > 0, weights, 0.0)
        mass = jnp.sum(open_weights)
        # Without any weight left, by room.
        open_weights = jnp.where(mass > 0, open_weights, space.astype(jnp.float32))
        mass = jnp.maximum(jnp.sum(open_weights), jnp.finfo(jnp.float32).tiny)
        share = open_weights / mass * left.astype(jnp.float32)
        # In float32 a share may round above what is left: serve in order, within it.
        poured = jnp.minimum(share.astype(count_type), space)
        before = jnp.cumsum(poured, dtype=count_type) - poured
        allowed = jnp.where(left > before, left - before, 0)
        return given + jnp.minimum(poured, allowed)

    # Each round fills at least one leaf or leaves less than one weight per leaf.
    given = lax.fori_loop(0, room.shape[0] + 1, pour, jnp.zeros_like(room))

    def unfinished(given: Array) -> Array:
        return total(given) < number

    def top_up(given: Array) -> Array:
        open_leaf = (given < room).astype(count_type)
        order = jnp.cumsum(open_leaf, dtype=count_type)
        return given + jnp.where(order <= number - total(given), open_leaf, 0)

    return lax.while_loop(unfinished, top_up, given)


def mean_score(masks: PyTree, scores: PyTree) -> Array:
    """Mean score of the active weights of every leaf, the same under any sharding.

    Sums of floats depend on their order, and so on the number of devices; here every
    score is rounded down to a fraction of the power of two above the largest of all,
    and those integers are summed, in limbs that cannot overflow 32 bits.

    Args:
      masks: pytree of masks.
      scores: one array per mask, non-negative. NaN and infinite ones count as 0.

    Returns:
      float32 vector, one per leaf, up to a common positive factor; 0 for a leaf
      without active weights.
    """
    leaves = jax.tree.leaves(masks)
    values = [
        jnp.where(m & jnp.isfinite(s), s, 0).astype(jnp.float32)
        for m, s in zip(leaves, jax.tree.leaves(scores), strict=True)
    ]
    largest = jnp.max(jnp.stack([jnp.max(v, initial=0.0) for v in values]))
    _, exponent = jnp.frexp(largest)
    means = []
    for mask, value in zip(leaves, values, strict=True):
        bits = max(32 - max(mask.size, 1).bit_length(), 1)
        limbs = -(-24 // bits)
        fraction = jnp.ldexp(value, -exponent)  # in [0, 1]
        mean = jnp.zeros((), jnp.float32)
        for limb in range(1, limbs + 1):
            fraction = jnp.ldexp(fraction, bits)
            digit = jnp.floor(fraction)
            fraction -= digit
            summed = jnp.sum(digit.astype(jnp.uint32), dtype=jnp.uint32)
            mean += jnp.ldexp(summed.astype(jnp.float32), -bits * limb)
        active = jnp.sum(mask, dtype=jnp.uint32).astype(jnp.float32)
        means.append(mean / jnp.maximum(active, 1.0))
    return jnp.stack(means)


def _stack_counts(counts: Sequence[Array]) -> Array:
    return jnp.stack([c.astype(jnp.result_type(*counts)) for c in counts])
