"""The search for the k-th largest of integer keys, of all leaves in lockstep.

It goes over eight bits of the keys at a time, in stages that reduce each key to a code
of one byte; every pass over those bytes counts the codes above three thresholds at
once, in one fused compare-and-sum. They leave a quarter of the range; or, once entries
lie evenly in it, are where the k-th is to be expected, and leave less (4 stages and
about 12 passes for float32, at most 21). Where keys tie, further stages go over the
positions of the tied. A global threshold is the same loop with the counts summed over
the leaves.
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
    threshold. Keys are never kept. A search goes from stage to stage, over eight bits
    of the keys in each; a stage makes them anew, where they fuse with what reduces them
    to codes of one byte: which of 256 equal parts of what is left of the row's range a
    key lies in. What is below counts to the first part and what is above to the last:
    how many are above either end is known. The passes of a stage read the codes. (One
    function makes the keys in all stages, in one loop: two kernels might round the same
    score differently, one with a fused multiply-add, and what one counts the other
    would not select.)

    Where one key is left of a row's range, and some but not all of its entries are to
    be selected, the row's range becomes one of positions: of entries with that key by
    where they are, earlier ones first, in parts as those of keys.

    The first pass counts the candidates, by one of its thresholds. (One counting
    expression in one loop for all selections: compiling it for every leaf is what the
    compile time of an update is.)

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
    lowest = jnp.asarray(jnp.iinfo(key_type).min, key_type)
    lengths = [len(stack.leaves) for stack in stacks]
    sizes = jnp.asarray(np.repeat([x.like.size for x in stacks], lengths), counter)
    # Keys that have more than 16 of their bits in common, of float32 at least half of
    # the fraction's, have about the same number of entries each.
    even = 8 * key_type.itemsize - 16
    # Bounds are keys, counted from the lowest, or positions.
    wide = jnp.dtype(f"uint{8 * max(key_type.itemsize, counter.itemsize)}")

    def stage(carry: tuple[Array, Array, Any, _Search]) -> Any:
        more, index, value, s = carry
        now = phase(index, value)

        def codes(maker: Callable[[Any], Sequence[Array]]) -> list[Array]:
            made = zip(maker(value), rows.places, rows.starts, strict=True)
            return [
                _codes(keys, at, ranges.rows(start, len(keys)))
                for keys, at, start in made
            ]

        s = _next_stage(_restarted(s, start), now.across, sizes, even, rows.leaves)
        ranges = _Range.of(s, lowest, sizes)
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
            s,
        )

        def finish(value: Any) -> Any:
            chosen = [
                _above(x, [s.result], start)[0]
                for x, start in zip(made, rows.starts, strict=True)
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

    # Entries that are no candidates have the lowest key, and are never selected. Only
    # when the first pass has counted the others is known how many are wanted.
    start = _Search(
        shift=jnp.zeros((leaves,), wide),
        base=jnp.zeros((leaves,), wide),
        offset=jnp.zeros((leaves,), jnp.int32),
        started=jnp.zeros((), bool),
        settled=jnp.zeros((), bool),
        done=jnp.zeros((), bool),
        candidates=jnp.zeros_like(sizes),
        wanted=jnp.zeros_like(sizes),
        alone=jnp.zeros((leaves,), bool),
        tied=jnp.zeros((leaves,), bool),
        key=jnp.zeros((leaves,), wide),
        low=jnp.ones((leaves,), wide),
        high=jnp.full((leaves,), 2 ** (8 * key_type.itemsize) - 1, wide),
        count_low=sizes,
        count_high=jnp.zeros_like(sizes),
        guesses=jnp.zeros((leaves,), jnp.int32),
        middles=[jnp.zeros((leaves,), jnp.int8)] * 3,
        result=jnp.zeros((leaves,), jnp.int8),
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

    A bound is a key, counted from the lowest; in rows that are `tied` a position,
    counted from behind, of entries with the key `key`. At or above `low` there are
    `count_low` entries, no fewer than wanted; at or above `high`, `count_high`, no more
    than wanted. (Rows that are `alone` are not ranked across leaves any more: of the
    one key that is left it is known how many are wanted of each.) Codes stand for
    2**shift bounds each, from `base` on; where `offset` is 1 the lowest is for what is
    below. `settled` says that the next stage can begin, and `done` that none need.
    `guesses` is how many more passes of the stage compare with codes near to where the
    last wanted is to be expected. `middles` are the codes that the next pass compares
    with, one less each, and `result` what selects once all is done: they are of the
    state since XLA would compute them in the kernel of every leaf again (and might
    round what is expected another way).
    """

    shift: Array
    base: Array
    offset: Array
    started: Array
    settled: Array
    done: Array
    candidates: Array
    wanted: Array
    alone: Array
    tied: Array
    key: Array
    low: Array
    high: Array
    count_low: Array
    count_high: Array
    guesses: Array
    middles: list[Array]
    result: Array


class _Range(NamedTuple):
    """What a stage makes codes of, a row per leaf.

    Attributes:
      key: the first, or, where tied, the only one.
      shift: codes stand for 2**shift keys or positions each.
      offset: the code of the first, from the lowest code on.
      tied: whether they are positions.
      limit: where tied, that entries of a leaf up to this number lie in or above.
    """

    key: Array
    shift: Array
    offset: Array
    tied: Array
    limit: Array

    @classmethod
    def of(cls, s: _Search, lowest: Array, sizes: Array) -> "_Range":
        # (Unsigned numbers to signed keys of as many bits, which wraps around.)
        key = jnp.where(s.tied, s.key, s.base).astype(f"uint{8 * lowest.itemsize}")
        key = lax.bitcast_convert_type(key, lowest.dtype) + lowest
        limit = sizes.astype(s.base.dtype) - jnp.where(s.tied, s.base, 0)
        return cls(key, s.shift, s.offset, s.tied, limit)

    def rows(self, start: Array, number: int) -> "_Range":
        return _Range(*(lax.dynamic_slice_in_dim(x, start, number) for x in self))


# The codes, int8: that of part 0, and one more than that of part 255.
_STAGE_BITS = 8
_FIRST, _END = -128, 128
# In a stage. One that fails is a pass more; the second is of what the first leaves.
_GUESSES = 2


@jax.jit
def _codes(keys: Array, at: Places, ranges: _Range) -> Array:
    """The codes of a stack's keys, see `search`.

    (How far each row of entries is from the end of the range is computed first, and
    compared with the place within the row: an index of every entry would be an array
    that XLA hoists out of the loop and reads in every stage.)
    """
    of_leaf = (-1, *(1,) * (keys.ndim - 1))
    key, shift, offset, tied, limit = (x.reshape(of_leaf) for x in ranges)
    left = limit - jnp.minimum(at.start.astype(limit.dtype), limit)
    column = at.column.astype(limit.dtype)
    within = tied & (keys == key)
    part = jnp.where(within, left - 1 - column, _width(key, keys).astype(limit.dtype))
    part = jnp.where(tied & (keys > key), _END - _FIRST, part >> shift)
    below = (keys < key) | (within & (column >= left))
    last = _END - 1 - _FIRST - offset
    part = jnp.minimum(part, last.astype(part.dtype)).astype(jnp.int32) + offset
    return (jnp.where(below, 0, part) + _FIRST).astype(jnp.int8)


def _restarted(s: _Search, start: _Search) -> _Search:
    """The start of another search where the last one is done."""
    return jax.tree.map(lambda new, old: jnp.where(s.done, new, old), start, s)


def _next_stage(
    s: _Search, across: Array | bool, sizes: Array, even: int, leaves: np.ndarray
) -> _Search:
    # Where a bound is exact, it is all that is left of the range.
    exact_low, exact_high = _exact(s, across)
    exact = exact_low | exact_high
    bound = jnp.where(exact_high, s.high, s.low)
    count = jnp.where(exact_high, s.count_high, s.count_low)
    tied = s.alone & ~s.tied & ~exact
    s = s._replace(
        tied=s.tied | tied,
        key=jnp.where(tied, s.low, s.key),
        low=jnp.where(tied, 0, bound),
        high=jnp.where(
            tied, sizes.astype(bound.dtype), jnp.where(exact, bound, s.high)
        ),
        count_low=count,
        count_high=jnp.where(exact, count, s.count_high),
    )
    # As few bounds a code as cover the range. (The first part cannot be told from what
    # is below it. So where its lower bound is what selects, or, at the start, what
    # candidates are counted by, it begins one code later.)
    width = jnp.maximum(s.high - s.low, 1) - 1
    bits = (8 * width.dtype.itemsize - lax.clz(width)).astype(jnp.int32)
    shift = jnp.maximum(bits, _STAGE_BITS) - _STAGE_BITS
    return _judged(
        s._replace(
            base=s.low,
            shift=shift.astype(width.dtype),
            guesses=_GUESSES * (~s.tied & (shift < even)).astype(jnp.int32),
            offset=(exact | ~s.started).astype(jnp.int32),
        ),
        across,
        leaves,
    )


def _advance(
    s: _Search,
    codes: Sequence[Array],
    rows: _Rows,
    phase: PhaseOfSearch,
    counter: jnp.dtype,
) -> _Search:
    """One pass over memory, and what the next one compares with."""
    counts = count_leaves(
        [
            _above(x, s.middles, start)
            for x, start in zip(codes, rows.starts, strict=True)
        ],
        counter,
    )

    def count_candidates(s: _Search, count: Array) -> _Search:
        wanted = rows.by_row(phase.number(rows.by_leaf(count)))
        wanted = jnp.minimum(wanted, _of_group(s, count, phase.across))
        return s._replace(
            started=jnp.ones((), bool), candidates=count, wanted=wanted, count_low=count
        )

    s = lax.cond(s.started, lambda s, _: s, count_candidates, s, counts[0])
    new = s._replace(guesses=s.guesses - 1)
    probes = [
        (_bound_of(s, code), _of_group(s, count, phase.across), count)
        for code, count in zip(s.middles, counts, strict=True)
    ]
    # (Of a range of few parts it may be an end of it that is found again.)
    for bound, found, count in probes:
        up = found >= s.wanted
        new = new._replace(
            low=jnp.where(up, bound, new.low),
            count_low=jnp.where(up, count, new.count_low),
        )
    for bound, found, count in probes[::-1]:
        down = found < s.wanted
        new = new._replace(
            high=jnp.where(down, bound, new.high),
            count_high=jnp.where(down, count, new.count_high),
        )
    return _judged(new, phase.across, rows.leaves)


def _judged(s: _Search, across: Array | bool, leaves: np.ndarray) -> _Search:
    """With what follows from the bounds and their counts."""
    # Of the entries with one key as many as are wanted: across leaves, of the first.
    ties = s.count_low - s.count_high
    remaining = s.wanted - _of_group(s, s.count_high, across)
    before = jnp.where(across, sum_before(ties, leaves), 0)
    share = jnp.where(remaining > before, remaining - before, 0)
    share = jnp.minimum(share, ties)
    exact_low, exact_high = _exact(s, across)
    one = s.started & ~s.alone & ~exact_low & ~exact_high & (s.high - s.low <= 1)
    s = s._replace(
        wanted=jnp.where(one, s.count_high + share, s.wanted), alone=s.alone | one
    )

    exact_low, exact_high = _exact(s, across)
    exact = exact_low | exact_high
    low, high = _code_of(s, s.low), _code_of(s, s.high)
    # What selects must be told by its code from what is below, and from what is above.
    code = jnp.where(exact_high, high, low)
    told = (code > _FIRST) & ((code < _END) | (s.count_high == 0))
    quarters = [low + part for part in _quarters(high - low)]
    guess = (s.guesses > 0) & (high - low > len(quarters) + 1)
    middles = [
        _below(jnp.where(guess, expected, quarter))
        for expected, quarter in zip(_expected(s, across), quarters, strict=True)
    ]
    # The first pass counts the candidates, too.
    middles[0] = jnp.where(s.started, middles[0], jnp.asarray(_FIRST, jnp.int8))
    return s._replace(
        done=jnp.all(exact & told),
        settled=s.started & jnp.all(exact | (high - low <= 1)),
        middles=middles,
        result=_below(code),
    )


def _exact(s: _Search, across: Array | bool) -> tuple[Array, Array]:
    """Whether the lower bound, and the upper one, selects what is wanted."""
    low, high = (_of_group(s, x, across) for x in (s.count_low, s.count_high))
    return s.started & (low == s.wanted), s.started & (high == s.wanted)


def _expected(s: _Search, across: Array | bool) -> list[Array]:
    """The code of the last wanted if entries lie evenly, and one to each side of it.

    They are 1.25 standard deviations away, the largest that the place of the last
    wanted has among as many entries drawn at random: four times in five,
    or more often, it lies between them.
    """
    low, high = _code_of(s, s.low), _code_of(s, s.high)
    count_low, count_high = (
        _of_group(s, x, across) for x in (s.count_low, s.count_high)
    )
    entries = jnp.maximum(count_low - count_high, 1).astype(jnp.float32)
    width = high - low
    place = width * ((count_low - s.wanted).astype(jnp.float32) / entries)
    deviation = width / (2 * jnp.sqrt(entries))
    aside = jnp.clip((1.25 * deviation).astype(jnp.int32), 1, width >> 2)
    middle = low + jnp.round(place).astype(jnp.int32)
    return [jnp.clip(middle + x, low + 1, high - 1) for x in (-aside, 0, aside)]


def _code_of(s: _Search, bound: Array) -> Array:
    """The lowest code, as int32, of which all entries are at or above a bound."""
    width = bound - s.base
    whole = width >> s.shift
    parts = whole + (whole << s.shift != width)
    return jnp.minimum(parts.astype(jnp.int32) + s.offset + _FIRST, _END)


def _bound_of(s: _Search, below: Array) -> Array:
    """The lowest bound with a code above one that is compared with."""
    code = below.astype(jnp.int32) + 1
    return s.base + ((code - _FIRST - s.offset).astype(s.base.dtype) << s.shift)


def _below(code: Array) -> Array:
    """What is compared with: one code less, as int8."""
    return jnp.maximum(code - 1, _FIRST).astype(jnp.int8)


def _of_group(s: _Search, per_leaf: Array, across: Array | bool) -> Array:
    """The count of what is ranked together, in every row."""
    total = jnp.sum(per_leaf, dtype=per_leaf.dtype)
    return jnp.where(across & ~s.alone, total, per_leaf)


@jax.jit
def _above(x: Array, codes: Sequence[Array], start: Array) -> list[Array]:
    """Of each row of codes, the entries of a stack above them."""
    of_leaf = (-1, *(1,) * (x.ndim - 1))
    mine = [lax.dynamic_slice_in_dim(code, start, len(x)) for code in codes]
    return [x > code.reshape(of_leaf) for code in mine]


def _quarters(width: Array) -> list[Array]:
    """A quarter, a half and three quarters of unsigned integers, rounded down."""
    quarter, rest = width >> 2, width & 3
    return [quarter * m + ((rest * m) >> 2) for m in (1, 2, 3)]


def _width(low: Array, high: Array) -> Array:
    """Distance from low to high, unsigned, so that it cannot overflow."""
    return (high - low).astype(jnp.dtype(f"uint{8 * low.dtype.itemsize}"))
