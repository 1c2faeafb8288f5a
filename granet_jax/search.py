"""The search for the k-th largest of integer keys, of all leaves in lockstep.

It goes over seven bits of the keys at a time, in stages that reduce each key to a code
of one byte; every pass over those bytes counts the codes above three thresholds at
once, in one fused compare-and-sum, and leaves a quarter of the range (5 stages and 19
passes for float32). A global threshold is the same loop with the counts summed over the
leaves.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from granet_jax.counting import Places, count_leaves, places, sum_before
from granet_jax.stacks import Stack, blank, unknown


def search(
    value: Any,
    makers: Sequence[Callable[[Any], Sequence[Array]]],
    phase: Callable[[Array, Any], "PhaseOfSearch"],
    *,
    phases: tuple[Array | int, int],
    stacks: list[Stack],
    key_type: jnp.dtype,
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
      makers: from the value to the keys of all stacks, by `sort_keys`.
      phase: from the number of a phase (int32 scalar) and the value to the selection.
      phases: the first, which may be traced, and the one to stop before.
      stacks: the leaves.
      key_type: dtype of the keys.
      counter: from `counter_dtype`.

    Returns:
      The value after the last phase.
    """
    rows = _rows_of(stacks)
    leaves = len(rows.leaves)
    unsigned = jnp.dtype(f"uint{8 * key_type.itemsize}")
    lowest = jnp.asarray(jnp.iinfo(key_type).min, key_type)
    lengths = [len(stack.leaves) for stack in stacks]
    sizes = jnp.asarray(np.repeat([x.like.size for x in stacks], lengths), counter)
    bits = 8 * key_type.itemsize

    def stage(carry: tuple[Array, Array, Any, _Search]) -> Any:
        more, index, value, s = carry
        now = phase(index, value)

        def codes(maker: Callable[[Any], Sequence[Array]]) -> list[Array]:
            keys = zip(maker(value), rows.starts, strict=True)
            return [_codes(key, s.base, start, s.shift) for key, start in keys]

        s = _next_stage(_restarted(s, start), now.across)
        branches: list[Callable[[], list[Array]]]
        branches = [functools.partial(codes, maker) for maker in makers]
        which = now.maker
        if len(branches) == 1:
            # Without a branch XLA would make the keys before the loop, to keep them.
            which = 1 - more.astype(jnp.int32)
            branches.append(lambda: [blank(stack, jnp.int8) for stack in stacks])
        made = lax.switch(which, branches)
        s = lax.while_loop(
            lambda s: ~s.settled & ~s.done,
            lambda s: _advance(s, made, rows, now, counter),
            _probed(s._replace(settled=jnp.zeros((), bool))),
        )

        def finish(value: Any) -> Any:
            chosen = [
                _chosen(x, at, [s.result.rows(start, len(x))])[0]
                for x, at, start in zip(made, rows.places, rows.starts, strict=True)
            ]
            return now.finish(value, chosen, rows.by_leaf(s.candidates))

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
      finish: from the value, the selected entries of every stack and the number of
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

    def rows(self, start: Array, number: int) -> "_Probe":
        part = functools.partial(
            lax.dynamic_slice_in_dim, start_index=start, slice_size=number
        )
        return _Probe(part(self.code), part(self.position))


class _Rows(NamedTuple):
    """The leaves in the order of a search, which is that of their stacks.

    Attributes:
      starts: for every stack, the row of its first leaf; unknown to the compiler.
      places: for every stack, those in a leaf, as a stack of one.
      leaves: for every row, the number of the leaf.
    """

    starts: Sequence[Array]
    places: list[Places]
    leaves: np.ndarray

    def by_leaf(self, vector: Array) -> Array:
        return vector[np.argsort(self.leaves)]

    def by_row(self, vector: Array) -> Array:
        return vector[self.leaves]


def _rows_of(stacks: list[Stack]) -> _Rows:
    lengths = [len(stack.leaves) for stack in stacks]
    starts = [0, *itertools.accumulate(lengths[:-1])]

    @functools.cache  # One a shape: what loops carry takes time to compile.
    def of_shape(like: Any) -> Places:
        return jax.tree.map(lambda x: x[None], places(like))

    return _Rows(
        unknown(starts),
        [of_shape(stack.like) for stack in stacks],
        np.concatenate([stack.leaves for stack in stacks]),
    )


class _Search(NamedTuple):
    """State of the search: scalars, and vectors with a row per leaf (`_Rows`).

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


@jax.jit
def _codes(keys: Array, bases: Array, start: Array, shift: Array) -> Array:
    """The codes of a stack's keys, see `search`."""
    base = lax.dynamic_slice_in_dim(bases, start, len(keys))
    base = base.reshape((-1, *(1,) * (keys.ndim - 1)))
    part = _width(base, keys) >> shift
    part = jnp.minimum(part, jnp.asarray(_ABOVE - _FIRST, part.dtype))
    code = part.astype(jnp.int32) + _FIRST
    return jnp.where(keys < base, _BELOW, code).astype(jnp.int8)


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
    rows: _Rows,
    phase: PhaseOfSearch,
    counter: jnp.dtype,
) -> _Search:
    """One pass over memory, and what the next one compares with."""
    # (Positions, other than codes, make faster kernels if they are computed there.)
    starts = [jnp.where(s.found, place, 0) for place in _places(s)]
    probes = list(map(_Probe, s.middles, starts))
    counts = count_leaves(
        [
            _chosen(x, at, [p.rows(start, len(x)) for p in probes])
            for x, at, start in zip(codes, rows.places, rows.starts, strict=True)
        ],
        counter,
    )

    def count_candidates(s: _Search, counts: list[Array]) -> _Search:
        count = counts[0]
        wanted = rows.by_row(phase.number(rows.by_leaf(count)))
        wanted = jnp.minimum(wanted, _of_group(count, phase.across))
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
    return _probed(_judged(s, phase.across, rows.leaves))


def _judged(s: _Search, across: Array | bool, leaves: np.ndarray) -> _Search:
    """With what follows from the bounds and their counts."""
    found = _of_group(s.count_low, across) == s.wanted
    found |= _of_group(s.count_high, across) == s.wanted
    found |= _width(s.low, s.high) <= 1
    ties = s.count_low - s.count_high
    remaining = s.wanted - _of_group(s.count_high, across)
    before = jnp.where(across, sum_before(ties, leaves), 0)
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


@jax.jit
def _chosen(x: Array, places: Places, probes: Sequence[_Probe]) -> list[Array]:
    """Of each probe, the entries of a stack above it.

    Those are the ones above its code, and of those equal to it the ones before its
    position. (How many of each row are before it is computed first, and compared with
    the place within the row: an index of every entry would be an array that XLA hoists
    out of the loop and reads in every pass.)
    """
    chosen = []
    for probe in probes:
        of_leaf = (-1, *(1,) * (x.ndim - 1))
        key, position = (v.reshape(of_leaf) for v in probe)
        length = jnp.asarray(x.shape[-1], places.start.dtype)
        position = position.astype(places.start.dtype)
        left = position - jnp.minimum(places.start, position)
        left = jnp.minimum(left, length).astype(places.column.dtype)
        chosen.append(x > key - (places.column < left).astype(x.dtype))
    return chosen


def _quarters(width: Array) -> list[Array]:
    """A quarter, a half and three quarters of unsigned integers, rounded down."""
    quarter, rest = width >> 2, width & 3
    return [quarter * m + ((rest * m) >> 2) for m in (1, 2, 3)]


def _width(low: Array, high: Array) -> Array:
    """Distance from low to high, unsigned, so that it cannot overflow."""
    return (high - low).astype(jnp.dtype(f"uint{8 * low.dtype.itemsize}"))
