"""Exact selection of the k largest scores, without sorting.

Floats order like their bit patterns, read as sign and magnitude, so the exact k-th
largest score is found by bisection on integer keys: at most one counting pass per bit
(31 for float32), each a fused compare-and-sum over memory. All leaves bisect in
lockstep, in one loop; a global threshold is the same loop with the counts summed over
the leaves. Nothing is sorted, concatenated, gathered or reshaped: under any sharding a
pass is a local reduction and an all-reduce of one small vector of integers.
"""

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Scope = Literal["layer", "global"]
SCOPES: tuple[str, ...] = ("layer", "global")


def top_k(
    scores: Sequence[Array],
    k: Array | int | Sequence[int] | np.ndarray,
    *,
    among: Sequence[Array] | None = None,
    scope: Scope = "layer",
) -> list[Array]:
    """Selects exactly the `k` largest scores.

    Ranking: larger scores first; equal scores by lowest row-major index first (in
    global scope: by leaf order, then index). -0.0 equals 0.0. NaN ranks below every
    number, -inf included.

    Args:
      scores: arrays of any shape, all floating (they are compared exactly, in the
        widest of their dtypes) or all of one signed integer dtype.
      k: how many to select: with scope "layer" one integer per leaf (or one for all),
        with scope "global" a single integer. May be traced. Where fewer candidates
        than k exist, all of them are selected.
      among: boolean arrays of the shapes of `scores`; only True entries are
        candidates. Default: all are.
      scope: "layer" ranks within each leaf, "global" across all leaves together.

    Returns:
      Boolean arrays of the shapes of `scores`, True where selected.

    Raises:
      ValueError: unknown scope, or more than 2**32 - 1 scores to be counted without
        64-bit types enabled.
      TypeError: scores of mixed kinds.
    """
    check_scope(scope)
    if not scores:
        return []
    keys = _keys(scores, among)
    leaves = len(keys)
    groups = 1 if scope == "global" else leaves
    total = sum(x.size for x in keys)
    largest = total if scope == "global" else max(x.size for x in keys)
    counter = _counter_dtype(largest)
    key_info = jnp.iinfo(keys[0].dtype)

    def count_at_least(threshold: Array) -> Array:
        per_leaf = jnp.broadcast_to(threshold, (leaves,))
        return jnp.stack(
            [jnp.sum(x >= per_leaf[i], dtype=counter) for i, x in enumerate(keys)]
        )

    def of_group(per_leaf: Array) -> Array:
        if scope == "layer":
            return per_leaf
        return jnp.sum(per_leaf, keepdims=True, dtype=counter)

    # Invariant: count(low) >= k >= count(high). The lowest key marks what is no
    # candidate and is never counted.
    low = jnp.full((groups,), key_info.min + 1, keys[0].dtype)
    high = jnp.full((groups,), key_info.max, keys[0].dtype)
    count_low = count_at_least(low)
    count_high = jnp.zeros_like(count_low)
    wanted = jnp.broadcast_to(jnp.asarray(k), (groups,))
    wanted = jnp.minimum(wanted.astype(counter), of_group(count_low))

    def unfinished(bracket: tuple[Array, ...]) -> Array:
        low, high, count_low, count_high = bracket
        exact = (of_group(count_low) == wanted) | (of_group(count_high) == wanted)
        return jnp.any(~exact & (_width(low, high) > 1))

    def halve(bracket: tuple[Array, ...]) -> tuple[Array, ...]:
        low, high, count_low, count_high = bracket
        middle = low + (_width(low, high) >> 1).astype(low.dtype)
        count = count_at_least(middle)
        enough = of_group(count) >= wanted
        enough_leaf = jnp.broadcast_to(enough, (leaves,))
        return (
            jnp.where(enough, middle, low),
            jnp.where(enough, high, middle),
            jnp.where(enough_leaf, count, count_low),
            jnp.where(enough_leaf, count_high, count),
        )

    low, high, count_low, count_high = lax.while_loop(
        unfinished, halve, (low, high, count_low, count_high)
    )

    # Everything at or above `high` is selected; of what lies in [low, high), which are
    # ties unless all or none of it is wanted, each leaf selects its quota.
    between = count_low - count_high
    if scope == "layer":
        quota = wanted - count_high
    else:
        remaining = wanted[0] - of_group(count_high)[0]
        before = jnp.cumsum(between, dtype=counter) - between
        quota = jnp.minimum(
            jnp.where(remaining > before, remaining - before, 0), between
        )
    low = jnp.broadcast_to(low, (leaves,))
    high = jnp.broadcast_to(high, (leaves,))
    ends = _first_ties(keys, low, high, between, quota)
    return [
        (x >= high[i]) | ((x >= low[i]) & (flat_index(x) < ends[i]))
        for i, x in enumerate(keys)
    ]


def check_scope(scope: str) -> None:
    """Raises ValueError unless `scope` is "layer" or "global"."""
    if scope not in SCOPES:
        raise ValueError(f'scope must be "layer" or "global", got {scope!r}.')


def flat_index(x: Array) -> Array:
    """Row-major index of every entry, in the shape and the sharding of `x`."""
    dtype = jnp.uint32 if x.size < 2**32 else jnp.uint64
    index = jnp.zeros_like(x, dtype)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :])
        index += _iota_like(x, dtype, axis) * jnp.asarray(stride, dtype)
    return index


def _iota_like(x: Array, dtype: jnp.dtype, axis: int) -> Array:
    sharding = jax.typeof(x).sharding
    # On Explicit mesh axes an array's sharding is part of its type, and an iota has
    # none to inherit.
    explicit = any(
        kind == jax.sharding.AxisType.Explicit
        for kind in getattr(sharding.mesh, "axis_types", ())
    )
    return lax.broadcasted_iota(
        dtype, x.shape, axis, out_sharding=sharding if explicit else None
    )


def _first_ties(
    keys: Sequence[Array], low: Array, high: Array, between: Array, quota: Array
) -> Array:
    """Per leaf, the index below which exactly `quota` keys lie in [low, high).

    A second bisection, over positions; it makes no pass where every leaf takes all or
    none of its ties.
    """
    index_dtype = jnp.result_type(*[flat_index(x).dtype for x in keys])

    def count_before(end: Array) -> Array:
        return jnp.stack(
            [
                jnp.sum(
                    (x >= low[i]) & (x < high[i]) & (flat_index(x) < end[i]),
                    dtype=quota.dtype,
                )
                for i, x in enumerate(keys)
            ]
        )

    def unfinished(bracket: tuple[Array, ...]) -> Array:
        _, _, count_first, count_last = bracket
        return jnp.any((count_first != quota) & (count_last != quota))

    def halve(bracket: tuple[Array, ...]) -> tuple[Array, ...]:
        first, last, count_first, count_last = bracket
        middle = first + ((last - first) >> 1)
        count = count_before(middle)
        within = count <= quota
        return (
            jnp.where(within, middle, first),
            jnp.where(within, last, middle),
            jnp.where(within, count, count_first),
            jnp.where(within, count_last, count),
        )

    first = jnp.zeros(len(keys), index_dtype)
    last = jnp.asarray([x.size for x in keys], index_dtype)
    first, last, _, count_last = lax.while_loop(
        unfinished, halve, (first, last, jnp.zeros_like(quota), between)
    )
    return jnp.where(count_last == quota, last, first)


def _keys(scores: Sequence[Array], among: Sequence[Array] | None) -> list[Array]:
    """Signed integers that order as the scores do; the lowest two are reserved.

    The lowest is for entries that are no candidates, the next for NaN.
    """
    scores = [jnp.asarray(x) for x in scores]
    floating = all(jnp.issubdtype(x.dtype, jnp.floating) for x in scores)
    integer = len({x.dtype for x in scores}) == 1 and jnp.issubdtype(
        scores[0].dtype, jnp.signedinteger
    )
    if not (floating or integer):
        raise TypeError(
            "scores must all be floating, or all of one signed integer dtype; got "
            f"{sorted({str(x.dtype) for x in scores})}."
        )
    if floating:
        common = jnp.result_type(*[x.dtype for x in scores])
        keys = [_float_key(x.astype(common)) for x in scores]
    else:
        reserved = jnp.asarray(jnp.iinfo(scores[0].dtype).min + 2, scores[0].dtype)
        keys = [jnp.maximum(x, reserved) for x in scores]
    if among is None:
        return keys
    lowest = jnp.asarray(jnp.iinfo(keys[0].dtype).min, keys[0].dtype)
    return [
        jnp.where(candidate, key, lowest)
        for key, candidate in zip(keys, among, strict=True)
    ]


def _float_key(x: Array) -> Array:
    dtype = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    lowest = jnp.asarray(jnp.iinfo(dtype).min, dtype)
    bits = lax.bitcast_convert_type(x, dtype)
    # Sign and magnitude to two's complement; both zeros become 0.
    key = jnp.where(bits < 0, lowest - bits, bits)
    return jnp.where(jnp.isnan(x), lowest + jnp.ones((), dtype), key)


def _width(low: Array, high: Array) -> Array:
    """high - low, unsigned, so that it cannot overflow."""
    return (high - low).astype(jnp.dtype(f"uint{8 * low.dtype.itemsize}"))


def _counter_dtype(largest: int) -> jnp.dtype:
    if largest < 2**32:
        return jnp.dtype(jnp.uint32)
    if jax.dtypes.canonicalize_dtype(jnp.uint64) == jnp.uint64:
        return jnp.dtype(jnp.uint64)
    raise ValueError(
        f"{largest} scores to rank together are more than a 32-bit counter holds "
        '(2**32 - 1): use scope="layer", or enable 64-bit types with '
        'jax.config.update("jax_enable_x64", True).'
    )
