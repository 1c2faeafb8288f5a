"""Select weights in a structure: whole boxes, the best of every box, or a floor a box.

Nothing is sorted: `selection` finds thresholds by counting, for layers and for boxes.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from granet_jax import selection
from granet_jax.boxes import (
    Boxes,
    boxed,
    merge,
    merge_masks,
    spread,
    unboxed,
    with_axes,
)
from granet_jax.dtypes import wider
from granet_jax.layers import Axes, divide, layer_shapes, no_stacks
from granet_jax.positions import from_end
from granet_jax.selection import (
    Scope,
    count_layers,
    counter_dtype,
    find_threshold,
    highest,
    odd_factors,
    shuffled,
    sort_keys,
    ties_by_rank,
)
from granet_jax.shardings import whole_along
from granet_jax.structures import Structure


def select(
    structure: Structure | None,
    scores: Sequence[Array],
    number: Any,
    *,
    among: Sequence[Array] | None = None,
    scope: Scope,
    stacks: tuple[Axes, ...] | None = None,
    key: Array | None = None,
) -> list[Array]:
    """Select the weights of largest score, as `selection.top_k`, in a structure.

    Args:
      structure: Structure of the selection; None for single weights.
      scores: One array of scores per leaf.
      number: Number of parts to select, see `parts`: one number per layer, or a single
        number for all layers with scope "global".
      among: One boolean array of candidates per leaf; None for all weights.
      scope: "global" if weights or whole boxes compete across layers, "layer" if they
        compete within each layer.
      stacks: The axes of every leaf that count layers; None if each leaf is one layer.
      key: A random key, which decides the order of equal scores of single weights; None
        for the lowest index first.

    Returns:
      One boolean array per leaf, of the shapes of `scores`.
    """
    if structure is None:
        return selection.top_k(
            scores, number, among=among, scope=scope, stacks=stacks, key=key
        )
    stacks = no_stacks(scores) if stacks is None else stacks
    if structure.least:
        return _select_with_least(structure, scores, number, among, scope, stacks, key)
    if structure.whole:
        ranked = merge(structure, scores, stacks)
        candidates = among and merge_masks(structure, among, stacks)
        chosen = selection.top_k(
            ranked, number, among=candidates, scope=scope, stacks=stacks
        )
        return spread(structure, chosen, scores, stacks)
    numbers = divide(jnp.asarray(number), [x.shape for x in scores], stacks)
    chosen = [
        _best_of_boxes(structure, k, n, axes)
        for k, n, axes in zip(sort_keys(scores, among), numbers, stacks, strict=True)
    ]
    if among is None:
        return chosen
    return [c & m for c, m in zip(chosen, among, strict=True)]


def _select_with_least(
    structure: Structure,
    scores: Sequence[Array],
    number: Any,
    among: Sequence[Array] | None,
    scope: Scope,
    stacks: tuple[Axes, ...],
    key: Array | None,
) -> list[Array]:
    """Select the best weights of every unit first, then the best of the others."""
    among = [jnp.ones_like(x, bool) for x in scores] if among is None else among
    least = jnp.asarray(structure.least, jnp.uint32)
    keys = zip(sort_keys(scores, among), among, stacks, strict=True)
    first = [_best_of_boxes(structure, k, least, axes) & m for k, m, axes in keys]
    others = [m & ~f for m, f in zip(among, first, strict=True)]
    sizes = [math.prod(s) for s in layer_shapes([f.shape for f in first], stacks)]
    (taken,) = count_layers([[f] for f in first], stacks, counter_dtype(sizes, scope))
    if scope == "global":
        taken = jnp.sum(taken, dtype=taken.dtype)
    number = jnp.asarray(number).astype(taken.dtype)
    chosen = selection.top_k(
        scores,
        number - jnp.minimum(number, taken),
        among=others,
        scope=scope,
        stacks=stacks,
        key=key,
    )
    return [f | c for f, c in zip(first, chosen, strict=True)]


def fill(
    structure: Structure,
    masks: Sequence[Array],
    scores: Sequence[Array],
    numbers: Sequence[Array],
    stacks: tuple[Axes, ...],
    *,
    key: Array | None = None,
) -> list[Array]:
    """Activate the best inactive weights of every box, up to a number of active ones.

    Args:
      structure: Structure whose boxes are not kept or pruned as a whole.
      masks: One boolean array per leaf.
      scores: One array of scores per leaf. Weights of larger score come first.
      numbers: Number of active weights per box after the call, at least: for every leaf
        a scalar, or an array as from `box_counts` or `layers.divide`.
      stacks: The axes of every leaf that count layers.
      key: A random key, which decides the order of equal scores; None for the lowest
        index first.

    Returns:
      One boolean array per leaf, which contains the weights of `masks`.
    """
    shapes = [m.shape for m in masks]
    factors: Any = [None] * len(masks)
    if key is not None:
        layers = len(layer_shapes(shapes, stacks))
        drawn = odd_factors(key, layers, "layer", jnp.dtype(jnp.uint32))
        columns = [divide(column, shapes, stacks) for column in drawn.T]
        factors = list(zip(*columns, strict=True))
    filled = []
    for i, (x, mask) in enumerate(zip(sort_keys(scores), masks, strict=True)):
        # No score has the highest key, so the active weights come first.
        ranked = jnp.where(mask, highest(x.dtype), x)
        best = _best_of_boxes(structure, ranked, numbers[i], stacks[i], factors[i])
        filled.append(best | mask)
    return filled


def _best_of_boxes(
    structure: Structure,
    keys: Array,
    number: Array,
    axes: Axes,
    factors: Sequence[Array] | None = None,
) -> Array:
    """Select the `number` largest keys of every box.

    Args:
      structure: Structure whose boxes all keep the same number of weights.
      keys: Keys of one leaf from `sort_keys`.
      number: An unsigned integer, or an array as from `box_counts` or `layers.divide`.
      axes: The axes of the leaf that count layers.
      factors: Three odd numbers, which put equal keys in a random order, another one in
        every box; None for the lowest index first.

    Returns:
      Boolean array of the shape of `keys`.
    """
    boxes, values = boxed(structure, keys, axes)
    number = with_axes(number.astype(jnp.uint32), boxes)
    factors = factors and [with_axes(factor, boxes) for factor in factors]
    if len(boxes.inside) == 1 and values.shape[boxes.inside[0]] <= _FEW:
        values = whole_along(values, boxes.inside[0])
        best = _best_by_comparison(values, number, boxes, factors)
    else:
        best = _best_by_digits(values, number, boxes, factors)
    return unboxed(best, keys)


# In boxes of at most this size, every weight is compared with all the others, which
# takes a single pass over memory.
_FEW = 16


def _best_by_comparison(
    keys: Array, number: Array, boxes: Boxes, factors: Sequence[Array] | None
) -> Array:
    (axis,) = boxes.inside
    rank = _rank_in_box(keys, boxes, factors)
    better = jnp.zeros_like(keys, jnp.uint32)
    for j in range(keys.shape[axis]):
        other, other_rank = (
            lax.slice_in_dim(x, j, j + 1, axis=axis) for x in (keys, rank)
        )
        ahead = (other > keys) | ((other == keys) & (other_rank > rank))
        better += ahead.astype(jnp.uint32)
    return better < number


def _rank_in_box(keys: Array, boxes: Boxes, factors: Sequence[Array] | None) -> Array:
    """The rank of every entry of a box among equal keys, uint32, higher first."""
    size = jnp.asarray(math.prod(keys.shape[i] for i in boxes.inside), jnp.uint32)
    rank = from_end(size, keys, boxes.inside)
    if factors is None:
        return rank
    # An odd number for every box of a layer gives each another order.
    other = {*boxes.inside, *boxes.stack}
    grid = [axis for axis in range(keys.ndim) if axis not in other]
    box = from_end(jnp.zeros_like(size), keys, grid)
    return shuffled(rank * (2 * box + 1), factors)


def _best_by_digits(
    keys: Array, number: Array, boxes: Boxes, factors: Sequence[Array] | None
) -> Array:
    """Select by a threshold for each box, as `selection.top_k` does for each layer."""
    bits = jnp.asarray(8 * keys.dtype.itemsize, jnp.int32)
    keys = keys.astype(wider(keys.dtype, jnp.uint32))

    def sums(flags: Array) -> Array:
        return jnp.sum(flags, axis=boxes.inside, keepdims=True, dtype=jnp.uint32)

    numbers = jnp.zeros_like(sums(keys > 0)) + number

    def threshold(keys: Array, bits: Array) -> Array:
        def count(bounds: list[Array]) -> list[Array]:
            return [sums(keys >= bound) for bound in bounds]

        return find_threshold(count, numbers, bits, keys.dtype)[0]

    rank = _rank_in_box(keys, boxes, factors).astype(keys.dtype)
    ties = ties_by_rank(keys, threshold(keys, bits), rank)
    return ties >= threshold(ties, jnp.full_like(bits, 32))
