"""Exact selection of the k largest scores, without sorting.

Every score becomes an unsigned integer, its key, that orders as the score does. A radix
search finds the k-th largest key two bits at a time, the most significant first: a pass
over memory counts, in every layer, the keys at or above each value that the next two
bits can start. Where several entries share the k-th largest key, each of them gets a
new key, from its position, and the same search runs a second time. Nothing is sorted,
gathered or reshaped: under any sharding, a pass is a local reduction and an all-reduce
of three integers a layer.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from granet_jax.dtypes import wider
from granet_jax.layers import (
    Axes,
    divide,
    join,
    layer_axes,
    layer_shapes,
    no_stacks,
)
from granet_jax.positions import from_end

Scope = Literal["layer", "global"]

SCOPES: tuple[str, ...] = ("layer", "global")
_BITS = 2  # found by each pass


@functools.partial(jax.jit, static_argnames=("scope", "stacks"), inline=True)
def top_k(
    scores: Sequence[Array],
    k: Array | int | Sequence[int] | np.ndarray,
    *,
    among: Sequence[Array] | None = None,
    scope: Scope = "layer",
    key: Array | None = None,
    stacks: tuple[Axes, ...] | None = None,
) -> list[Array]:
    """Select exactly the `k` largest scores.

    Larger scores rank first. Equal scores rank by lowest row-major index first; with
    scope "global", by the order of layers and then by index. With a `key` they rank in
    a random order instead. -0.0 equals 0.0. NaN ranks below every number, -inf
    included.

    Args:
      scores: Arrays of any shapes. Either all are floating, and are compared exactly in
        the widest of their dtypes; or all have the same signed integer dtype (where it
        has more than 8 bits, its two lowest values and its highest one count as their
        neighbours).
      k: The number of entries to select. With scope "layer", one integer per layer or
        one for all layers; with scope "global", a single integer. It may be traced.
        Where there are fewer candidates than k, all of them are selected.
      among: Boolean arrays of the shapes of `scores`. Only True entries are candidates.
        By default all entries are.
      scope: "layer" ranks within each layer, "global" across all layers together.
      key: A random key, which decides the order of equal scores; None for the lowest
        index first.
      stacks: The axes of every leaf that count layers; None if each leaf is one layer.

    Returns:
      Boolean arrays of the shapes of `scores`, True where selected.

    Raises:
      ValueError: Unknown scope, or more than 2**32 - 2 scores to be counted while
        64-bit types are disabled.
      TypeError: Scores of mixed kinds.
    """
    check_scope(scope)
    if not scores:
        return []
    stacks = no_stacks(scores) if stacks is None else stacks
    shapes = [jnp.shape(x) for x in scores]
    sizes = [math.prod(shape) for shape in layer_shapes(shapes, stacks)]
    counter = counter_dtype(sizes, scope)
    keys = sort_keys(scores, among)
    bits = jnp.asarray(8 * keys[0].dtype.itemsize, jnp.int32)
    dtype = wider(keys[0].dtype, counter)
    keys = [x.astype(dtype) for x in keys]
    wanted = jnp.broadcast_to(jnp.asarray(k).astype(counter), (len(sizes),))
    # With scope "global", the positions of later layers follow those of earlier ones.
    ends = np.cumsum(sizes[::-1])[::-1] if scope == "global" else np.asarray(sizes)
    factors = None
    if key is not None:
        drawn = odd_factors(key, len(sizes), scope, counter)
        factors = [divide(column, shapes, stacks) for column in drawn.T]

    def count(keys: list[Array], bounds: list[Array]) -> list[Array]:
        per_leaf = [divide(bound, shapes, stacks) for bound in bounds]
        flags = [[x >= bound[i] for bound in per_leaf] for i, x in enumerate(keys)]
        counts = count_layers(flags, stacks, counter)
        if scope == "layer":
            return list(counts)
        return [jnp.broadcast_to(jnp.sum(n, dtype=counter), n.shape) for n in counts]

    def search(s: _Search) -> _Search:
        threshold, number = find_threshold(
            lambda bounds: count(s.keys, bounds), wanted, s.bits, dtype
        )
        too_many = jnp.any(number > wanted)
        # The choice makes the ranks depend on the loop. Otherwise, XLA would compute
        # them before it and keep them in memory.
        end = jnp.where(too_many, ends.astype(counter), highest(counter))
        end, bound = (divide(x, shapes, stacks) for x in (end, threshold))

        def rank(i: int, x: Array) -> Array:
            place = from_end(end[i], x, layer_axes(x.ndim, stacks[i]))
            if factors is not None:
                place = shuffled(place, [column[i] for column in factors])
            return place.astype(dtype)

        ties = [ties_by_rank(x, bound[i], rank(i, x)) for i, x in enumerate(s.keys)]
        return _Search(ties, jnp.full_like(s.bits, 8 * counter.itemsize), too_many)

    start = _Search(keys, bits, jnp.asarray(True))
    end = lax.while_loop(lambda s: s.too_many, search, start)
    return [x > 0 for x in end.keys]


class _Search(NamedTuple):
    """The state of `top_k` between its searches.

    Attributes:
      keys: The keys of all entries; after a search, those of the chosen entries, by
        their positions where they are tied, and 0 elsewhere.
      bits: int32 scalar, how many bits the keys have.
      too_many: Whether more entries are chosen than wanted, because of ties.
    """

    keys: list[Array]
    bits: Array
    too_many: Array


def find_threshold(
    count: Callable[[list[Array]], list[Array]],
    wanted: Array,
    bits: Array,
    dtype: jnp.dtype,
) -> tuple[Array, Array]:
    """Find the largest threshold that at least the wanted number of keys reaches.

    The search stops early once exactly the wanted number reaches it: a larger threshold
    would select the same keys.

    Args:
      count: From bounds (arrays like `wanted`) to the number of keys that reach each.
      wanted: Array of unsigned integers, the numbers to select.
      bits: int32 scalar, how many bits the keys have.
      dtype: The dtype of the keys.

    Returns:
      Two arrays like `wanted`: the threshold, and how many keys reach it. Where fewer
      keys than wanted are larger than 0, they are 1 and 0.
    """

    def next_digit(
        state: tuple[Array, Array, Array],
    ) -> tuple[Array, Array, Array]:
        shift, threshold, reached = state
        shift -= _BITS
        unit = jnp.ones((), dtype) << shift.astype(dtype)
        bounds = [threshold + jnp.asarray(d, dtype) * unit for d in range(1, 2**_BITS)]
        for bound, number in zip(bounds, count(bounds), strict=True):
            suffices = number >= wanted
            threshold = jnp.where(suffices, bound, threshold)
            reached = jnp.where(suffices, number, reached)
        return shift, threshold, reached

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        shift, _, reached = state
        return (shift > 0) & jnp.any(reached > wanted)

    unknown = jnp.full_like(wanted, jnp.iinfo(wanted.dtype).max)
    start = (bits, jnp.zeros_like(wanted, dtype), unknown)
    _, threshold, reached = lax.while_loop(unfinished, next_digit, start)
    # Where no bound sufficed, there are fewer keys than wanted, and all are selected.
    return jnp.maximum(threshold, 1), jnp.where(threshold > 0, reached, 0)


def ties_by_rank(keys: Array, threshold: Array, rank: Array) -> Array:
    """New keys, which put those entries in order whose keys equal the threshold.

    Larger keys become the highest key, smaller ones become 0.

    Args:
      keys: Keys of one leaf.
      threshold: The threshold, of a shape that broadcasts to that of `keys`.
      rank: The new key of every entry that equals the threshold, of such a shape too.
    """
    zeros = jnp.zeros_like(keys)
    # On Explicit mesh axes, the zeros give the ranks the sharding of the keys.
    tied = jnp.where(keys == threshold, rank | zeros, zeros)
    return jnp.where(keys > threshold, highest(keys.dtype), tied)


def odd_factors(key: Array, layers: int, scope: Scope, dtype: jnp.dtype) -> Array:
    """Random odd numbers for `shuffled`, three a layer, all alike with global scope."""
    shape = (1 if scope == "global" else layers, 3)
    drawn = jax.random.bits(key, shape, dtype) | jnp.ones((), dtype)
    return jnp.broadcast_to(drawn, (layers, 3))


def shuffled(rank: Array, factors: Sequence[Array]) -> Array:
    """Put ranks in a random order: distinct ranks become other distinct ranks.

    A product with an odd number can be undone, and so can an exclusive or with the
    upper half of the bits. So no two unsigned integers become the same one. 0 stays 0.
    No rank becomes the highest number, which is the key of entries above the ties.
    """

    def mix(x: Array) -> Array:
        for factor in factors:
            x = x * factor
            x = x ^ (x >> jnp.asarray(4 * x.dtype.itemsize, x.dtype))
        return x

    # `mix` turns one rank into the highest number. That rank takes the place that is
    # free: the one of the highest number itself, which is no rank.
    top = highest(rank.dtype)
    mixed = mix(rank)
    return jnp.where(mixed == top, mix(top), mixed)


def highest(dtype: jnp.dtype) -> Array:
    """The highest key of a dtype, which no score has."""
    return jnp.asarray(jnp.iinfo(dtype).max, dtype)


def count_layers(
    flags: Sequence[Sequence[Array]], stacks: Sequence[Axes], counter: jnp.dtype
) -> tuple[Array, ...]:
    """Count the True entries of several boolean arrays per leaf, in one pass each.

    Args:
      flags: For every leaf, as many boolean arrays of its shape.
      stacks: The axes of every leaf that count layers.
      counter: The dtype to count in.

    Returns:
      One vector for the first arrays of all leaves, one for the second ones, and so on.
      It has one number per layer.
    """
    # XLA fuses several sums of one array into one pass on accelerators. On CPU it does
    # so only if they are a single reduction (and sums one array alone ten times more
    # slowly); but it divides such a reduction over devices by gathering all counts.
    apart = any(_may_be_sharded(leaf[0]) for leaf in flags)
    axes = [layer_axes(leaf[0].ndim, a) for leaf, a in zip(flags, stacks, strict=True)]
    sums_apart = functools.partial(_sum_apart, axes=axes, counter=counter)
    sums_together = functools.partial(_sum_together, axes=axes, counter=counter)
    rows = lax.platform_dependent(
        [list(leaf) for leaf in flags],
        cpu=sums_apart if apart else sums_together,
        default=sums_apart,
    )
    return tuple(join(column) for column in zip(*rows, strict=True))


def _may_be_sharded(x: Array) -> bool:
    meshes = (jax.typeof(x).sharding.mesh, jax.sharding.get_abstract_mesh())
    return any(size > 1 for mesh in meshes for size in mesh.axis_sizes)


def _sum_apart(
    leaves: list[list[Array]], axes: Sequence[Axes], counter: jnp.dtype
) -> list[list[Array]]:
    return [
        [_sum_layers(x, a, counter) for x in leaf]
        for leaf, a in zip(leaves, axes, strict=True)
    ]


def _sum_layers(x: Array, axes: Axes, counter: jnp.dtype) -> Array:
    """Count the True entries of every layer, in 32 bits as far as they suffice.

    Where XLA emulates 64-bit integers, devices would send whole vectors of them.
    """
    sizes = [x.shape[axis] for axis in axes]
    if math.prod(sizes) < 2**32:
        return jnp.sum(x, axis=axes, dtype=jnp.uint32).astype(counter)
    if math.prod(sizes[1:]) < 2**32:
        rows = jnp.sum(x, axis=axes[1:], dtype=jnp.uint32)
        return jnp.sum(rows, axis=axes[0], dtype=counter)
    return jnp.sum(x, axis=axes, dtype=counter)


def _sum_together(
    leaves: list[list[Array]], axes: Sequence[Axes], counter: jnp.dtype
) -> list[list[Array]]:
    def add(a: Sequence[Array], b: Sequence[Array]) -> Sequence[Array]:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    def total(leaf: list[Array], axes: Axes) -> list[Array]:
        numbers = tuple(x.astype(counter) for x in leaf)
        zeros = tuple(jnp.zeros((), counter) for _ in leaf)
        return list(lax.reduce(numbers, zeros, add, axes))

    return [total(leaf, a) for leaf, a in zip(leaves, axes, strict=True)]


def sort_keys(
    scores: Sequence[Array], among: Sequence[Array] | None = None
) -> list[Array]:
    """Unsigned integers that order as the scores do.

    Key 0 is for entries that are not candidates, and key 1 for NaN. The highest key is
    never used. See `top_k` for the arguments and the errors.
    """
    scores = [jnp.asarray(x) for x in scores]
    common = _common_dtype([x.dtype for x in scores])
    of = _float_key if jnp.issubdtype(common, jnp.floating) else _integer_key
    keys = [of(x.astype(common)) for x in scores]
    if among is None:
        return keys
    none = jnp.zeros((), keys[0].dtype)
    return [jnp.where(m, x, none) for m, x in zip(among, keys, strict=True)]


def _common_dtype(dtypes: Sequence[Any]) -> jnp.dtype:
    """The dtype to compare scores in: the widest of theirs, 16 bits at least."""
    distinct = {jnp.dtype(x) for x in dtypes}
    if all(jnp.issubdtype(x, jnp.floating) for x in distinct):
        common = wider(*distinct)
        return common if common.itemsize > 1 else jnp.dtype(jnp.float16)
    (first, *others) = distinct
    if not others and jnp.issubdtype(first, jnp.signedinteger):
        return wider(first, jnp.int16)
    raise TypeError(
        "scores must all be floating, or all of one signed integer dtype; got "
        f"{sorted(map(str, distinct))}."
    )


def _float_key(x: Array) -> Array:
    dtype = _unsigned(x)
    sign = jnp.asarray(1 << (8 * dtype.itemsize - 1), dtype)
    bits = lax.bitcast_convert_type(x, dtype)
    # Sign and magnitude become an order; -0.0, whose bits are `sign`, becomes 0.0.
    # (The bits are compared, because processors may take subnormal numbers for zero.)
    key = jnp.where(bits > sign, ~bits, bits | sign)
    return jnp.where(jnp.isnan(x), jnp.ones((), dtype), key)


def _integer_key(x: Array) -> Array:
    dtype, ends = _unsigned(x), jnp.iinfo(x.dtype)
    sign = jnp.asarray(1 << (8 * dtype.itemsize - 1), dtype)
    x = jnp.clip(x, ends.min + 2, ends.max - 1)
    return lax.bitcast_convert_type(x, dtype) ^ sign


def _unsigned(x: Array) -> jnp.dtype:
    return jnp.dtype(f"uint{8 * x.dtype.itemsize}")


def check_scope(scope: str) -> None:
    """Raises ValueError unless `scope` is "layer" or "global"."""
    if scope not in SCOPES:
        raise ValueError(f'scope must be "layer" or "global", got {scope!r}.')


def counter_dtype(sizes: Sequence[int], scope: Scope) -> jnp.dtype:
    """The unsigned integer dtype that can count all scores that are ranked together.

    Args:
      sizes: The sizes of all layers.
      scope: Whether they are ranked within each layer or across all.

    Raises:
      ValueError: This takes 64 bits, and 64-bit types are disabled.
    """
    largest = sum(sizes) if scope == "global" else max(sizes)
    if largest < 2**32 - 1:  # The highest number is used as a key.
        return jnp.dtype(jnp.uint32)
    if jax.dtypes.canonicalize_dtype(jnp.uint64) == jnp.uint64:
        return jnp.dtype(jnp.uint64)
    raise ValueError(
        f"{largest} scores to rank together are too many for 32-bit integers "
        '(2**32 - 2): use scope="layer", or enable 64-bit types with '
        'jax.config.update("jax_enable_x64", True).'
    )
