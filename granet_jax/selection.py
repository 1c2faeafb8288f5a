"""Exact selection of the k largest scores, without sorting.

Floats order like their bit patterns, read as sign and magnitude, so the exact k-th
largest score is found by a search over integer keys. Keys are never kept: the search
goes over seven bits of them at a time, in stages that reduce each key to a code of one
byte; every pass over those bytes counts the codes above three thresholds at once, in
one fused compare-and-sum, and leaves a quarter of the range (5 stages and 19 passes for
float32). All leaves search in lockstep, in one loop; a global threshold is the same
loop with the counts summed over the leaves. Nothing is sorted, concatenated, gathered
or reshaped: under any sharding a pass is a local reduction and an exchange of a few
small vectors of integers.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from granet_jax.masking import is_explicit

Scope = Literal["layer", "global"]
SCOPES: tuple[str, ...] = ("layer", "global")


@functools.partial(jax.jit, static_argnames="scope")
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
        widest of their dtypes) or all of one signed integer dtype (the two lowest and
        the highest value of which count as their neighbours).
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
    counter = counter_dtype([jnp.size(x) for x in scores], scope)
    wanted = jnp.broadcast_to(jnp.asarray(k).astype(counter), (len(scores),))
    like = jax.eval_shape(sort_keys, scores, among)
    only = PhaseOfSearch(
        maker=0,
        across=scope == "global",
        number=lambda _: wanted,
        finish=lambda _, chosen, *rest: chosen,
    )
    return search(
        [jnp.zeros(x.shape, bool, device=x.sharding) for x in like],
        [lambda _: sort_keys(scores, among)],
        lambda *_: only,
        phases=(0, 1),
        like=like,
        counter=counter,
    )


def sort_keys(
    scores: Sequence[Array],
    among: Sequence[Array] | None = None,
    *,
    width: int = 2,
) -> list[Array]:
    """Signed integers that order as the scores do; the lowest two are reserved.

    The lowest is for entries that are no candidates, the next for NaN. The keys have
    the width in bytes of the scores, or `width` where that is more. See `top_k` for
    the arguments and the errors.
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
        if width > common.itemsize:
            common = jnp.promote_types(common, f"float{8 * width}")
        keys = [_float_key(x.astype(common)) for x in scores]
    else:
        common = jnp.promote_types(scores[0].dtype, f"int{8 * width}")
        ends = jnp.iinfo(common)
        keys = [jnp.clip(x.astype(common), ends.min + 2, ends.max - 1) for x in scores]
    if among is None:
        return keys
    lowest = jnp.asarray(jnp.iinfo(keys[0].dtype).min, keys[0].dtype)
    return [
        jnp.where(candidate, key, lowest)
        for key, candidate in zip(keys, among, strict=True)
    ]


def search(
    value: Any,
    makers: Sequence[Callable[[Any], Sequence[Array]]],
    phase: Callable[[Array, Any], "PhaseOfSearch"],
    *,
    phases: tuple[Array | int, int],
    like: Sequence[jax.ShapeDtypeStruct],
    counter: jnp.dtype,
) -> Any:
    """Selections one after the other, each as `top_k` on keys, in one loop.

    The lockstep search: a row is a leaf, or, across leaves, all rows share one
    threshold. Keys are never kept. A search goes from stage to stage, over seven bits
    of the keys in each; a stage makes them anew, where they fuse with what reduces them
    to codes of one byte: which of 128 equal parts of what is left of the row's range a
    key lies in, or below or above it. The passes of a stage read the codes. (One
    function makes the keys in all stages, in one loop: two kernels might round the same
    score differently, one with a fused multiply-add, and what one counts the other
    would not select.)

    The count of candidates, the search over codes and the one over positions of ties
    are one loop with one counting expression: entries above a code, and of those equal
    to it the ones before a position. (One expression, and one loop for all selections,
    because compiling them for every leaf is what the compile time of an update is.)

    Args:
      value: pytree, what selections read and change.
      makers: from the value to the keys of all leaves, by `sort_keys`.
      phase: from the number of a phase (int32 scalar) and the value to the selection.
      phases: the first, which may be traced, and the one to stop before.
      like: shapes, dtypes and shardings of the keys.
      counter: from `counter_dtype`.

    Returns:
      The value after the last phase.
    """
    leaves = len(like)
    key_type = like[0].dtype
    unsigned = jnp.dtype(f"uint{8 * key_type.itemsize}")
    lowest = jnp.asarray(jnp.iinfo(key_type).min, key_type)
    sizes = jnp.asarray([x.size for x in like], counter)
    rows = _unknown_range(leaves)
    bits = 8 * key_type.itemsize

    def stage(carry: tuple[Array, Array, Any, _Search]) -> Any:
        more, index, value, s = carry
        now = phase(index, value)

        def codes(maker: Callable[[Any], Sequence[Array]]) -> list[Array]:
            return [
                _code(x, _at(s.base, i), s.shift)
                for i, x in zip(rows, maker(value), strict=True)
            ]

        s = _next_stage(_restarted(s, start), now.across)
        branches: list[Callable[[], list[Array]]]
        branches = [functools.partial(codes, maker) for maker in makers]
        which = now.maker
        if len(branches) == 1:
            # Without a branch XLA would make the keys before the loop, to keep them.
            which = 1 - more.astype(jnp.int32)
            branches.append(lambda: _blank(like))
        made = lax.switch(which, branches)
        s = lax.while_loop(
            lambda s: ~s.settled & ~s.done,
            lambda s: _advance(s, made, rows, now, counter),
            _probed(s._replace(settled=jnp.zeros((), bool))),
        )

        def finish(value: Any) -> Any:
            pairs = zip(rows, made, strict=True)
            chosen = [_chosen(x, [s.result.of(i)])[0] for i, x in pairs]
            return now.finish(value, chosen, s.candidates)

        # (In a loop of one trip or none, which passes its value through in place.)
        _, value = lax.while_loop(
            lambda carry: carry[0],
            lambda carry: (jnp.zeros((), bool), finish(carry[1])),
            (s.done, value),
        )
        index += s.done
        return index < phases[1], index, value, s

    nowhere = _Probe(jnp.zeros((leaves,), jnp.int8), jnp.zeros_like(sizes))
    # Entries that are no candidates have the lowest key, and are never selected. The
    # first pass counts the others; only then is known how many are wanted.
    start = _Search(
        shift=jnp.asarray(-(-bits // _STAGE_BITS) * _STAGE_BITS, unsigned),
        base=jnp.full((leaves,), lowest + 1),
        started=jnp.zeros((), bool),
        settled=jnp.zeros((), bool),
        done=jnp.zeros((), bool),
        candidates=jnp.zeros_like(sizes),
        wanted=jnp.zeros_like(sizes),
        low=jnp.full((leaves,), lowest + 1),
        high=jnp.full((leaves,), jnp.iinfo(key_type).max, key_type),
        count_low=sizes,
        count_high=jnp.zeros_like(sizes),
        found=jnp.zeros((leaves,), bool),
        share=jnp.zeros_like(sizes),
        first=jnp.zeros_like(sizes),
        last=sizes,
        count_first=jnp.zeros_like(sizes),
        count_last=sizes,
        middles=[nowhere.code] * 3,
        result=nowhere,
    )
    first = jnp.asarray(phases[0], jnp.int32)
    # (Loops that look at one value to end make XLA search all that it comes from for a
    # number of trips. So they look at two.)
    carry = (first < phases[1], first, value, start)
    end = phases[1]
    return lax.while_loop(lambda c: c[0] & (c[1] < end), stage, carry)[2]


class PhaseOfSearch(NamedTuple):
    """One of the selections of `search`.

    Attributes:
      maker: which of the makers makes the keys; may be traced.
      across: whether to rank across leaves; may be traced.
      number: from the number of candidates per leaf to how many to select per leaf
        (where `across`, of all leaves, the same in every row).
      finish: from the value, the selected entries of every leaf and the number of
        candidates per leaf to the new value.
    """

    maker: Array | int
    across: Array | bool
    number: Callable[[Array], Array]
    finish: Callable[[Any, list[Array], Array], Any]


class _Probe(NamedTuple):
    """What entries are compared with: a code and a position for every row."""

    code: Array
    position: Array

    def of(self, row: Array) -> tuple[Array, Array]:
        return _at(self.code, row), _at(self.position, row)


class _Search(NamedTuple):
    """State of the search: scalars, and vectors with a row per leaf.

    count(key >= low) >= wanted >= count(key >= high); and, once low and high are one
    apart or one of them is exact (`found`), the leaf selects `share` of its keys in
    [low, high), of which at most `share` lie before `first`, and at least `share`
    before `last`. Codes stand for 2**shift keys each, from `base` on; `settled` says
    that the next stage can begin, and `done` that none need. `middles` are the codes
    that the next pass compares with, and `result` what selects once all is done: they
    are of the state since XLA would compute them in the kernel of every leaf again.
    """

    shift: Array
    base: Array
    started: Array
    settled: Array
    done: Array
    candidates: Array
    wanted: Array
    low: Array
    high: Array
    count_low: Array
    count_high: Array
    found: Array
    share: Array
    first: Array
    last: Array
    count_first: Array
    count_last: Array
    middles: list[Array]
    result: _Probe


# Codes, int8: below the range of the stage (or no candidate), the first part of it, and
# above.
_STAGE_BITS = 7
_BELOW, _FIRST, _ABOVE = -128, -127, 1


def _code(key: Array, base: Array, shift: Array) -> Array:
    """The codes of a leaf's keys, see `search`."""
    part = _width(base, key) >> shift
    part = jnp.minimum(part, jnp.asarray(_ABOVE - _FIRST, part.dtype))
    code = part.astype(jnp.int32) + _FIRST
    return jnp.where(key < base, _BELOW, code).astype(jnp.int8)


def _restarted(s: _Search, start: _Search) -> _Search:
    """The start of another search where the last one is done."""
    return jax.tree.map(lambda new, old: jnp.where(s.done, new, old), start, s)


def _next_stage(s: _Search, across: Array | bool) -> _Search:
    # Where the upper bound is exact the range is empty, and lies above it.
    above = s.started & (_of_group(s.count_high, across) == s.wanted)
    low = jnp.where(above, s.high, s.low)
    return s._replace(
        base=low,
        low=low,
        count_low=jnp.where(above, s.count_high, s.count_low),
        shift=s.shift - jnp.asarray(_STAGE_BITS, s.shift.dtype),
    )


def _advance(
    s: _Search,
    codes: Sequence[Array],
    rows: Sequence[Array],
    phase: PhaseOfSearch,
    counter: jnp.dtype,
) -> _Search:
    """One pass over memory, and what the next one compares with."""
    # (Positions, other than codes, make faster kernels if they are computed there.)
    starts = [jnp.where(s.found, place, 0) for place in _places(s)]
    probes = list(map(_Probe, s.middles, starts))
    counts = _count_leaves(
        [
            _chosen(x, [probe.of(i) for probe in probes])
            for i, x in zip(rows, codes, strict=True)
        ],
        counter,
    )

    def count_candidates(s: _Search, counts: list[Array]) -> _Search:
        count = counts[0]
        wanted = jnp.minimum(phase.number(count), _of_group(count, phase.across))
        return s._replace(
            started=jnp.ones((), bool), candidates=count, wanted=wanted, count_low=count
        )

    def narrow(s: _Search, counts: list[Array]) -> _Search:
        new, in_keys = s, ~s.found
        ties = [count - s.count_high for count in counts]
        probes = list(zip(_middles(s), _places(s), counts, ties, strict=True))
        for middle, place, count, tied in probes:
            up = in_keys & (_of_group(count, phase.across) >= s.wanted)
            within = ~in_keys & (tied <= s.share)
            new = new._replace(
                low=jnp.where(up, middle, new.low),
                count_low=jnp.where(up, count, new.count_low),
                first=jnp.where(within, place, new.first),
                count_first=jnp.where(within, tied, new.count_first),
            )
        for middle, place, count, tied in probes[::-1]:
            down = in_keys & (_of_group(count, phase.across) < s.wanted)
            beyond = ~in_keys & (tied > s.share)
            new = new._replace(
                high=jnp.where(down, middle, new.high),
                count_high=jnp.where(down, count, new.count_high),
                last=jnp.where(beyond, place, new.last),
                count_last=jnp.where(beyond, tied, new.count_last),
            )
        return new

    s = lax.cond(s.started, narrow, count_candidates, s, counts)
    return _probed(_judged(s, phase.across))


def _judged(s: _Search, across: Array | bool) -> _Search:
    """With what follows from the bounds and their counts."""
    found = _of_group(s.count_low, across) == s.wanted
    found |= _of_group(s.count_high, across) == s.wanted
    found |= _width(s.low, s.high) <= 1
    ties = s.count_low - s.count_high
    remaining = s.wanted - _of_group(s.count_high, across)
    before = jnp.where(across, sum_before(ties), 0)
    share = jnp.where(remaining > before, remaining - before, 0)
    share = jnp.minimum(share, ties)
    # All or none of the ties: no position to be found.
    all_or_none = (share == 0) | (share == ties)
    placed = all_or_none | (s.count_first == share) | (s.count_last == share)
    done = jnp.all(found & placed)
    settled = (s.shift > 0) & jnp.all(found | (_parts_of(s, s.low, s.high) <= 1))
    # All keys from `low` on, or those from `high` on, or the ties before a position.
    low, high = _code_of(s, s.low), _code_of(s, s.high)
    key = jnp.where(share == ties, low - 1, jnp.where(share == 0, high - 1, low))
    place = jnp.where(s.count_last == share, s.last, s.first)
    return s._replace(
        found=found,
        share=share,
        done=done,
        settled=settled,
        result=_Probe(key, jnp.where(all_or_none, 0, place)),
    )


def _probed(s: _Search) -> _Search:
    """With the codes that the next pass compares with."""
    # With the key of a group found, it searches the positions of its ties.
    low = _code_of(s, s.low)
    middles = [
        jnp.where(s.found, low, jnp.where(s.started, _code_of(s, key) - 1, _BELOW))
        for key in _middles(s)
    ]
    return s._replace(middles=middles)


def _middles(s: _Search) -> list[Array]:
    between = _quarters(_parts_of(s, s.low, s.high))
    return [s.low + (part << s.shift).astype(s.low.dtype) for part in between]


def _places(s: _Search) -> list[Array]:
    return [s.first + part for part in _quarters(s.last - s.first)]


def _parts_of(s: _Search, low: Array, high: Array) -> Array:
    """How many parts, of the size that a code stands for, a range reaches into."""
    width = _width(low, high)
    whole = width >> s.shift
    return whole + (whole << s.shift != width)


def _code_of(s: _Search, key: Array) -> Array:
    """The lowest code of which all keys are at or above a bound of the stage."""
    return _parts_of(s, s.base, key).astype(jnp.int8) + jnp.int8(_FIRST)


def _of_group(per_leaf: Array, across: Array | bool) -> Array:
    """The count of what is ranked together, in every row."""
    return jnp.where(across, jnp.sum(per_leaf, dtype=per_leaf.dtype), per_leaf)


def _blank(like: Sequence[jax.ShapeDtypeStruct]) -> list[Array]:
    return [jnp.zeros(x.shape, jnp.int8, device=x.sharding) for x in like]


def check_scope(scope: str) -> None:
    """Raises ValueError unless `scope` is "layer" or "global"."""
    if scope not in SCOPES:
        raise ValueError(f'scope must be "layer" or "global", got {scope!r}.')


def _unknown_range(stop: int) -> Sequence[Array]:
    """The numbers below `stop`, as scalars whose values the compiler does not know.

    XLA compiles kernels that compute the same once (on CPU), and those of leaves of one
    shape differ in nothing but their row of the vectors of a search. As a constant the
    row would be part of the code; so it is made an argument, the result of a choice
    that nothing can foresee. (Where the barrier is no obstacle to constant folding,
    there are as many kernels as leaves, and all else is the same.)
    """
    known = tuple(jnp.asarray(i, jnp.uint32) for i in range(stop))
    always = lax.optimization_barrier(jnp.ones((), bool))
    return lax.cond(always, lambda: known, lambda: (jnp.zeros((), jnp.uint32),) * stop)


def _at(vector: Array, row: Array) -> Array:
    return lax.dynamic_index_in_dim(vector, row, keepdims=False)


def _chosen(x: Array, probes: Sequence[tuple[Array, Array]]) -> list[Array]:
    """Of each probe (key, position), the entries above it.

    Those are the ones above the key, and of those equal to it the ones before the
    position. (The start of each row is compared first, and then the place within the
    row: an index of every entry would be an array that XLA hoists out of the loop and
    reads in every pass.)
    """
    if x.ndim == 0:
        return [x > key - (position > 0).astype(x.dtype) for key, position in probes]
    dtype = jnp.dtype(jnp.uint32 if x.size < 2**32 else jnp.uint64)
    start, column = _row_starts(x, dtype), iota(x, dtype, x.ndim - 1)
    chosen = []
    for key, position in probes:
        position = position.astype(dtype)
        left = position - jnp.minimum(start, position)
        chosen.append(x > key - (column < left).astype(x.dtype))
    return chosen


def _count(
    flags: Sequence[Sequence[Array]], counter: jnp.dtype
) -> Sequence[Sequence[Array]]:
    """How many entries of every array of every leaf are True, one pass over memory.

    On accelerators XLA fuses the sums of a leaf with each other and with what makes
    them; and divides each over the devices of Auto mesh axes, which ends in all-reduces
    of one number, combined. On CPU it splits such a sum in two, to round better, and
    writes the array out as integers in between: there it gets one reduction of several
    arrays, five times as fast. But that it divides with gathers of the counts of every
    device, so not where a mesh of Auto axes is set (`jax.set_mesh`): virtual devices
    then show what accelerators do.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    if any(kind == jax.sharding.AxisType.Auto and size > 1 for kind, size in kinds):
        return _count_singly(flags, counter)
    return lax.platform_dependent(
        flags,
        cpu=functools.partial(_count_together, counter=counter),
        default=functools.partial(_count_singly, counter=counter),
    )


def _count_singly(flags: Any, counter: jnp.dtype) -> list[list[Array]]:
    return [[jnp.sum(x, dtype=counter) for x in leaf] for leaf in flags]


def _count_together(flags: Any, counter: jnp.dtype) -> list[list[Array]]:
    def add(a: Sequence[Array], b: Sequence[Array]) -> Sequence[Array]:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    def count(leaf: Sequence[Array]) -> list[Array]:
        operands = tuple(x.astype(counter) for x in leaf)
        zeros = tuple(jnp.zeros((), counter) for _ in leaf)
        return list(lax.reduce(operands, zeros, add, tuple(range(leaf[0].ndim))))

    return list(map(count, flags))


def _count_leaves(flags: Sequence[Sequence[Array]], counter: jnp.dtype) -> list[Array]:
    """`_count` of every leaf: of each of its arrays, a vector with a row per leaf.

    On Explicit mesh axes it is known how a leaf is sharded: every device counts its
    shards, and one all-reduce adds the counts of all leaves.
    """
    meshes = {jax.typeof(f[0]).sharding.mesh for f in flags}
    kinds = {kind for mesh in meshes for kind in getattr(mesh, "axis_types", ())}
    if len(meshes) > 1 or kinds != {jax.sharding.AxisType.Explicit}:
        per_leaf = _count(flags, counter)
        return [jnp.stack(count) for count in zip(*per_leaf, strict=True)]
    specs = [jax.typeof(f[0]).sharding.spec for f in flags]
    axes = [_mesh_axes(spec) for spec in specs]
    names = tuple(dict.fromkeys(name for mine in axes for name in mine))

    def count_shards(flags: list[list[Array]]) -> Array:
        rows = [jnp.stack(list(counts)) for counts in _count(flags, counter)]
        for i, mine in enumerate(axes):
            # Of devices that hold the same shard of a leaf, the first counts it.
            for name in names:
                if name not in mine:
                    first = lax.axis_index(name) == 0
                    rows[i] = jnp.where(first, rows[i], jnp.zeros_like(rows[i]))
        counts = jnp.stack(rows, axis=1)
        return lax.psum(counts, names) if names else counts

    count = jax.shard_map(
        count_shards,
        mesh=meshes.pop(),
        in_specs=([[spec] * len(f) for spec, f in zip(specs, flags, strict=True)],),
        out_specs=jax.sharding.PartitionSpec(),
    )
    return list(count([list(f) for f in flags]))


def _mesh_axes(spec: jax.sharding.PartitionSpec) -> list[str]:
    """The mesh axes over which an array is sharded."""
    names = [name if isinstance(name, tuple) else (name,) for name in spec]
    return [name for group in names for name in group if name is not None]


def _quarters(width: Array) -> list[Array]:
    """A quarter, a half and three quarters of unsigned integers, rounded down."""
    quarter, rest = width >> 2, width & 3
    return [quarter * m + ((rest * m) >> 2) for m in (1, 2, 3)]


def _row_starts(x: Array, dtype: jnp.dtype) -> Array:
    """Row-major index of the first entry of every row, of shape (..., 1)."""
    index = jnp.zeros((), dtype)
    for axis in range(x.ndim - 1):
        stride = math.prod(x.shape[axis + 1 :])
        index += iota(x, dtype, axis, row=True) * jnp.asarray(stride, dtype)
    return index


def iota(x: Array, dtype: jnp.dtype, axis: int, *, row: bool = False) -> Array:
    """The index along `axis` of every entry of `x`, or of every first of a row."""
    shape = (*x.shape[:-1], 1) if row else x.shape
    sharding = jax.typeof(x).sharding
    if not is_explicit(sharding):
        return lax.broadcasted_iota(dtype, shape, axis)
    # On Explicit mesh axes an array's sharding is part of its type, and an iota has
    # none to inherit.
    if row:
        spec = jax.sharding.PartitionSpec(*sharding.spec[: x.ndim - 1], None)
        sharding = sharding.update(spec=spec)
    return lax.broadcasted_iota(dtype, shape, axis, out_sharding=sharding)


def sum_before(counts: Array) -> Array:
    """Exclusive cumulative sum of a short vector, in its dtype.

    As one masked sum: `cumsum` takes ten times as long to compile.
    """
    position = jnp.arange(counts.size)
    earlier = position[None, :] < position[:, None]
    return jnp.sum(jnp.where(earlier, counts, 0), axis=1, dtype=counts.dtype)


def _float_key(x: Array) -> Array:
    dtype = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    lowest = jnp.asarray(jnp.iinfo(dtype).min, dtype)
    bits = lax.bitcast_convert_type(x, dtype)
    # Sign and magnitude to two's complement; both zeros become 0.
    key = jnp.where(bits < 0, lowest - bits, bits)
    return jnp.where(jnp.isnan(x), lowest + jnp.ones((), dtype), key)


def _width(low: Array, high: Array) -> Array:
    """Distance from low to high, unsigned, so that it cannot overflow."""
    return (high - low).astype(jnp.dtype(f"uint{8 * low.dtype.itemsize}"))


def counter_dtype(sizes: Sequence[int], scope: Scope) -> jnp.dtype:
    """Unsigned integer type that can count what is ranked together.

    Raises:
      ValueError: that takes 64 bits, and they are not enabled.
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
