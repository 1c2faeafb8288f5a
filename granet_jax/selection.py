"""Exact selection of the k largest scores, without sorting.

Every score becomes an unsigned integer, its key, that orders as the score does. The
k-th largest key is found two bits at a time, the most significant first: a pass over
memory counts, in every leaf, the keys at or above each value that the next two bits can
start. Where several entries share the k-th largest key, the same search over their
positions selects the first of them. Nothing is sorted, gathered or reshaped: under any
sharding, a pass is a local reduction and an all-reduce of four integers a leaf.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from granet_jax.positions import Positions, index_dtype, split_positions

Scope = Literal["layer", "global"]

SCOPES: tuple[str, ...] = ("layer", "global")
_BITS = 2  # that a pass finds


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
    sizes = [jnp.size(x) for x in scores]
    counter = counter_dtype(sizes, scope)
    keys = sort_keys(scores, among)
    kinds = {jax.typeof(x): Positions.of(jax.typeof(x)) for x in keys}
    places = [kinds[jax.typeof(x)] for x in keys]
    wanted = jnp.broadcast_to(jnp.asarray(k).astype(counter), (len(keys),))

    shapes = [x.shape for x in keys]

    def ties_from(key: Array, place: Array) -> list[Array]:
        """The entries of some keys, at least so far from the end of their leaves."""
        rows, columns = split_positions(place, shapes)
        return [
            (x == key[i].astype(x.dtype)) & places[i].before(rows[i], columns[i])
            for i, x in enumerate(keys)
        ]

    def count(over_keys: Array, key: Array, bounds: list[Array]) -> list[Array]:
        def of_keys() -> tuple[Array, ...]:
            ends = [bound.astype(keys[0].dtype) for bound in bounds]
            flags = [[x >= end[i] for end in ends] for i, x in enumerate(keys)]
            return count_leaves(flags, counter)

        def of_ties() -> tuple[Array, ...]:
            flags = [ties_from(key, bound) for bound in bounds]
            return count_leaves(list(zip(*flags, strict=True)), counter)

        return list(lax.cond(over_keys, of_keys, of_ties))

    def total(counts: Array) -> Array:
        whole = jnp.sum(counts, dtype=counter)
        return jnp.broadcast_to(whole, counts.shape) if scope == "global" else counts

    def share(missing: Array, tied: Array) -> Array:
        """How many of the tied entries of each leaf are selected: the first leaves'."""
        if scope == "global":
            missing -= jnp.minimum(sum_before(tied), missing)
        return jnp.minimum(missing, tied)

    key, place = find_threshold(count, wanted, keys[0].dtype, max(sizes), total, share)

    def all_tied() -> list[Array]:
        return [x >= key[i] for i, x in enumerate(keys)]

    def first_tied() -> list[Array]:
        ties = ties_from(key, place)
        return [(x > key[i]) | ties[i] for i, x in enumerate(keys)]

    # A condition, so that XLA keeps the masks, of one byte, and not the keys.
    return lax.cond(jnp.any(place > 1), first_tied, all_tied)


class _Search(NamedTuple):
    """The state of `find_threshold`: arrays with one entry per threshold.

    Attributes:
      shift: int32 scalar, the place in the number of the digit that is searched next.
      over_keys: Whether keys are searched, or the positions of tied entries.
      key: The threshold of the keys, as far as it is known.
      place: The threshold of the positions, as far as it is known.
      wanted: How many entries are to be selected; of those tied, in the second part.
      least: How many entries reach the threshold.
      above: How many entries reach what is above all it can still become.
    """

    shift: Array
    over_keys: Array
    key: Array
    place: Array
    wanted: Array
    least: Array
    above: Array


def find_threshold(
    count: Callable[[Array, Array, list[Array]], list[Array]],
    wanted: Array,
    dtype: jnp.dtype,
    size: int,
    total: Callable[[Array], Array] = lambda counts: counts,
    share: Callable[[Array, Array], Array] = jnp.minimum,
) -> tuple[Array, Array]:
    """Find the keys, and the positions of ties, from which entries are selected.

    The search stops early once thresholds are reached by exactly the wanted number of
    entries: further digits would select the same ones.

    Args:
      count: From (over_keys, key, bounds) to the numbers of entries that reach each of
        the bounds: with their keys, or, of the entries that equal `key`, with their
        distances from the end.
      wanted: Unsigned array of the numbers to select.
      dtype: The dtype of the keys.
      size: The largest distance from the end.
      total: From counts to those that decide.
      share: From (missing, tied) to how many of the tied entries are selected.

    Returns:
      Arrays like `wanted`: a key, and the distance from the end that entries of this
      key must have; larger keys are selected anyway. The distance is 1 where all are.
    """
    wide = jnp.promote_types(dtype, index_dtype(size))
    key_shift = 8 * dtype.itemsize - _BITS
    place_shift = -(-(size + 1).bit_length() // _BITS - 1) * _BITS

    def begin_places(s: _Search) -> _Search:
        tied = s.least - s.above
        missing = s.wanted - jnp.minimum(total(s.above), s.wanted)
        return s._replace(
            shift=jnp.full_like(s.shift, place_shift),
            over_keys=jnp.zeros_like(s.over_keys),
            wanted=share(missing, tied),
            least=tied,
            above=jnp.zeros_like(s.above),
        )

    def decisive(s: _Search, counts: Array) -> Array:
        return jnp.where(s.over_keys, total(counts), counts)

    def next_digit(s: _Search) -> _Search:
        low = jnp.where(s.over_keys, s.key, s.place)
        unit = jnp.ones((), wide) << s.shift.astype(wide)
        bounds = [low + unit * jnp.asarray(d, wide) for d in range(2**_BITS)]
        # Key 0 means "no candidate", and no position is 0 from the end.
        counts = count(s.over_keys, s.key, [jnp.maximum(bounds[0], 1), *bounds[1:]])
        least, above = counts[:2]
        # Where there are fewer candidates than wanted, all of them are.
        most = jnp.where(s.over_keys, total(least), s.wanted)
        wanted = jnp.minimum(s.wanted, most)
        for bound, here, next_one in zip(
            bounds[1:], counts[1:], [*counts[2:], s.above], strict=True
        ):
            # Counts fall as bounds rise: of those that suffice, the last one remains.
            suffices = decisive(s, here) >= wanted
            low = jnp.where(suffices, bound, low)
            least = jnp.where(suffices, here, least)
            above = jnp.where(suffices, next_one, above)
        s = s._replace(
            shift=s.shift - _BITS,
            key=jnp.where(s.over_keys, low, s.key),
            place=jnp.where(s.over_keys, s.place, low),
            wanted=wanted,
            least=least,
            above=above,
        )
        ends = s.over_keys & (s.shift < 0)
        return jax.tree.map(
            lambda after, now: jnp.where(ends, after, now), begin_places(s), s
        )

    def unfinished(s: _Search) -> Array:
        return (s.shift >= 0) & jnp.any(decisive(s, s.least) > s.wanted)

    zeros = jnp.zeros(wanted.shape, wide)
    s = _Search(
        shift=jnp.asarray(key_shift, jnp.int32),
        over_keys=jnp.asarray(True),
        key=zeros,
        place=zeros,
        wanted=wanted,
        least=jnp.full_like(wanted, jnp.iinfo(wanted.dtype).max),
        above=jnp.zeros_like(wanted),
    )
    s = lax.while_loop(unfinished, next_digit, s)
    one = jnp.ones((), wide)
    return jnp.maximum(s.key, one).astype(dtype), jnp.maximum(s.place, one)


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
    # so only if they are a single reduction (and sums one array alone ten times more
    # slowly); but it divides such a reduction over devices by gathering all counts.
    apart = any(_may_be_sharded(leaf[0]) for leaf in flags)
    rows = lax.platform_dependent(
        [list(leaf) for leaf in flags],
        cpu=functools.partial(_sum_apart if apart else _sum_together, counter=counter),
        default=functools.partial(_sum_apart, counter=counter),
    )
    return tuple(jnp.stack(column) for column in zip(*rows, strict=True))


def _may_be_sharded(x: Array) -> bool:
    meshes = (jax.typeof(x).sharding.mesh, jax.sharding.get_abstract_mesh())
    return any(size > 1 for mesh in meshes for size in mesh.axis_sizes)


def _sum_apart(leaves: list[list[Array]], counter: jnp.dtype) -> list[list[Array]]:
    return [[jnp.sum(x, dtype=counter) for x in leaf] for leaf in leaves]


def _sum_together(leaves: list[list[Array]], counter: jnp.dtype) -> list[list[Array]]:
    def add(a: Sequence[Array], b: Sequence[Array]) -> Sequence[Array]:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    def total(leaf: list[Array]) -> list[Array]:
        numbers = tuple(x.astype(counter) for x in leaf)
        zeros = tuple(jnp.zeros((), counter) for _ in leaf)
        return list(lax.reduce(numbers, zeros, add, tuple(range(leaf[0].ndim))))

    return [total(leaf) for leaf in leaves]


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
