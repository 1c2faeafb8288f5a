"""Exact selection of the k largest scores, without sorting.

Every score becomes an unsigned integer, its key, that orders as the score does. The
k-th largest key is found one hexadecimal digit at a time, the most significant first:
a pass over memory counts, in every leaf, the keys at or above each value that the next
digit can start. Where several entries share the k-th largest key, the same search over
their positions selects the first of them. Nothing is sorted, gathered or reshaped:
under any sharding, a pass is a local reduction and an all-reduce of 16 integers a leaf.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from granet_jax.positions import Positions, positions

Scope = Literal["layer", "global"]
# From some bounds, arrays of one shape, to the numbers of entries at or above each.
Count = Callable[[list[Array]], list[Array]]

SCOPES: tuple[str, ...] = ("layer", "global")
_BITS = 2  # of a digit


@functools.partial(jax.jit, static_argnames="scope", inline=True)
def top_k(
    scores: Sequence[Array],
    k: Array | int | Sequence[int] | np.ndarray,
    *,
    among: Sequence[Array] | None = None,
    scope: Scope = "layer",
) -> list[Array]:
    """Select exactly the `k` largest scores.

    Larger scores rank first. Equal scores rank by lowest row-major index first; with
    scope "global", by leaf order and then by index. -0.0 equals 0.0. NaN ranks below
    every number, -inf included.

    Args:
      scores: Arrays of any shapes. Either all are floating, and are compared exactly in
        the widest of their dtypes; or all have the same signed integer dtype (where it
        has more than 8 bits, its two lowest values and its highest one count as their
        neighbours).
      k: The number of entries to select. With scope "layer", one integer per leaf or
        one for all leaves; with scope "global", a single integer. It may be traced.
        Where there are fewer candidates than k, all of them are selected.
      among: Boolean arrays of the shapes of `scores`. Only True entries are candidates.
        By default all entries are.
      scope: "layer" ranks within each leaf, "global" across all leaves together.

    Returns:
      Boolean arrays of the shapes of `scores`, True where selected.

    Raises:
      ValueError: Unknown scope, or more than 2**32 - 1 scores to be counted while
        64-bit types are disabled.
      TypeError: Scores of mixed kinds.
    """
    check_scope(scope)
    if not scores:
        return []
    counter = counter_dtype([jnp.size(x) for x in scores], scope)
    keys = sort_keys(scores, among)
    shape = (len(keys),)
    wanted = jnp.broadcast_to(jnp.asarray(k).astype(counter), shape)

    def total(counts: Array) -> Array:
        """The count that decides for a leaf: its own, or that of all leaves."""
        if scope == "layer":
            return counts
        return jnp.broadcast_to(jnp.sum(counts, dtype=counter), shape)

    def count_keys(bounds: list[Array]) -> list[Array]:
        flags = [[x >= bound[i] for bound in bounds] for i, x in enumerate(keys)]
        return [total(counts) for counts in count_leaves(flags, counter)]

    most = jnp.full(shape, jnp.iinfo(counter).max, counter)
    key = largest_bound(count_keys, wanted, most, keys[0].dtype)

    # Of the entries whose key is the threshold, the first leaves are served first.
    flags = [[x > key[i], x == key[i]] for i, x in enumerate(keys)]
    above, tied = count_leaves(flags, counter)
    missing = wanted - jnp.minimum(total(above), wanted)
    if scope == "global":
        missing -= jnp.minimum(sum_before(tied), missing)
    missing = jnp.minimum(missing, tied)

    def all_tied() -> list[Array]:
        return [x >= key[i] for i, x in enumerate(keys)]

    def first_tied() -> list[Array]:
        ties = [x == key[i] for i, x in enumerate(keys)]
        first = _first(ties, missing, tied)
        return [(x > key[i]) | first[i] for i, x in enumerate(keys)]

    return lax.cond(jnp.any(missing < tied), first_tied, all_tied)


def _first(flags: Sequence[Array], wanted: Array, present: Array) -> list[Array]:
    """The first `wanted` of the `present` True entries of every array."""
    # One `Positions` for all arrays of a type, so that XLA builds it once.
    kinds = {jax.typeof(x): positions(jax.typeof(x)) for x in flags}
    places = [kinds[jax.typeof(x)] for x in flags]

    def is_before(i: int, bound: Array) -> Array:
        return flags[i] & places[i].at_least_from_end(bound[i])

    def count(bounds: list[Array]) -> list[Array]:
        rows = [[is_before(i, b) for b in bounds] for i in range(len(flags))]
        return list(count_leaves(rows, wanted.dtype))

    bound = largest_bound(count, wanted, present, Positions.dtype(places))
    return [is_before(i, bound) & (wanted[i] > 0) for i in range(len(flags))]


def largest_bound(
    count: Count, wanted: Array, reached: Array, dtype: jnp.dtype
) -> Array:
    """The largest bound that at least `wanted` entries reach; 1 if fewer do.

    The search stops early once every bound is reached by no more than `wanted` entries:
    further digits would select the same ones.

    Args:
      count: The function that counts entries at or above each of some bounds.
      wanted: Unsigned array, one number per bound that is searched.
      reached: Array like `wanted`: the number of entries at or above bound 1, or the
        largest number of its dtype if that is not known yet.
      dtype: The unsigned integer dtype of the bounds.

    Returns:
      Array of the shape of `wanted` and of dtype `dtype`.
    """
    one = jnp.ones((), dtype)

    def unfinished(search: tuple[Array, Array, Array]) -> Array:
        shift, _, reached = search
        return (shift >= 0) & jnp.any(reached > wanted)

    def next_digit(search: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        shift, low, reached = search
        unit = one << shift.astype(dtype)
        bounds = [low + unit * jnp.asarray(d, dtype) for d in range(2**_BITS)]
        counts = count([jnp.maximum(bounds[0], one), *bounds[1:]])
        reached = counts[0]
        digit = jnp.zeros_like(low)
        # Counts fall as bounds rise.
        for higher in counts[1:]:
            reached = jnp.where(higher >= wanted, higher, reached)
            digit += (higher >= wanted).astype(dtype)
        return shift - _BITS, low + unit * digit, reached

    first = jnp.asarray(8 * dtype.itemsize - _BITS, jnp.int32)
    low = jnp.zeros(wanted.shape, dtype)
    _, low, _ = lax.while_loop(unfinished, next_digit, (first, low, reached))
    return jnp.maximum(low, one)


def count_leaves(
    flags: Sequence[Sequence[Array]], counter: jnp.dtype
) -> tuple[Array, ...]:
    """Count the True entries of several boolean arrays per leaf, in one pass each.

    Args:
      flags: For every leaf, as many boolean arrays of its shape.
      counter: The dtype to count in.

    Returns:
      One vector for the first arrays of all leaves, one for the second ones, and so on.
    """
    # XLA fuses several sums of one array into one pass on accelerators. On CPU it does
    # so only if they are a single reduction, and it is slow to sum one array alone.
    rows = lax.platform_dependent(
        [list(leaf) for leaf in flags],
        cpu=lambda leaves: [_sum_together(leaf, counter) for leaf in leaves],
        default=lambda leaves: [
            [jnp.sum(x, dtype=counter) for x in leaf] for leaf in leaves
        ],
    )
    return tuple(jnp.stack(column) for column in zip(*rows, strict=True))


def _sum_together(arrays: Sequence[Array], counter: jnp.dtype) -> list[Array]:
    def add(a: Sequence[Array], b: Sequence[Array]) -> Sequence[Array]:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    numbers = tuple(x.astype(counter) for x in arrays)
    zeros = tuple(jnp.zeros((), counter) for _ in arrays)
    return list(lax.reduce(numbers, zeros, add, tuple(range(arrays[0].ndim))))


def sum_before(counts: Array) -> Array:
    """The exclusive cumulative sum of a short vector, in its dtype."""
    # `jnp.cumsum` takes ten times as long to compile.
    place = np.arange(counts.size)
    earlier = jnp.asarray(place[None, :] < place[:, None])
    return jnp.sum(jnp.where(earlier, counts, 0), axis=1, dtype=counts.dtype)


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
        common = jnp.result_type(*distinct)
        return common if common.itemsize > 1 else jnp.dtype(jnp.float16)
    (first, *others) = distinct
    if not others and jnp.issubdtype(first, jnp.signedinteger):
        return jnp.promote_types(first, jnp.int16)
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

    Raises:
      ValueError: This takes 64 bits, and 64-bit types are disabled.
    """
    largest = sum(sizes) if scope == "global" else max(sizes)
    if largest < 2**32:
        return jnp.dtype(jnp.uint32)
    if jax.dtypes.canonicalize_dtype(jnp.uint64) == jnp.uint64:
        return jnp.dtype(jnp.uint64)
    raise ValueError(
        f"{largest} scores to rank together are more than a 32-bit counter holds "
        '(2**32 - 1): use scope="layer", or enable 64-bit types with '
        'jax.config.update("jax_enable_x64", True).'
    )
