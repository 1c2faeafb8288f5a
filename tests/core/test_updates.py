"""The parts of a mask update by themselves, against the plain NumPy oracle."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from granet_jax import schedules, updates
from granet_jax.selection import SCOPES, Scope
from tests.helpers import oracle

# A leaf without weights, and one of a single weight, beside others.
SHAPES = ((5, 7), (3, 3, 4), (0, 2), (11,), (1,))
SIZES = [math.prod(shape) for shape in SHAPES]
SEEDS = st.integers(0, 2**32 - 1)


class Drawn(NamedTuple):
    """Masks, and scores that often tie, each a list with an array per leaf."""

    masks: list[np.ndarray]
    drop: list[np.ndarray]
    grow: list[np.ndarray]

    @property
    def active(self) -> list[int]:
        return [int(m.sum()) for m in self.masks]

    def best(self, scores: list, among: list, number: Any, scope: Scope) -> list:
        if scope == "global":
            return oracle.best_across(scores, among, number)
        return oracle.best_per_leaf(scores, among, number)


def draw(seed: int) -> Drawn:
    rng = np.random.default_rng(seed)
    density = rng.random()

    def scores() -> list[np.ndarray]:
        kinds = (np.float32([-1, -0.0, 0.0, 0.5, 2, np.nan]), rng.normal(size=9))
        values = kinds[rng.integers(2)].astype(np.float32)
        return [rng.choice(values, shape) for shape in SHAPES]

    masks = [rng.random(shape) < density for shape in SHAPES]
    return Drawn(masks, scores(), scores())


def numbers(seed: int, scope: Scope) -> Any:
    """How many to select: more than there are, too."""
    rng = np.random.default_rng(seed + 1)
    if scope == "global":
        return int(rng.integers(sum(SIZES) + 9))
    return [int(rng.integers(size + 3)) for size in SIZES]


def assert_masks(found: Sequence[Any], expected: Sequence[np.ndarray]) -> None:
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("scope", SCOPES)
@hypothesis.given(SEEDS)
def test_prune(scope: Scope, seed: int) -> None:
    drawn, keep = draw(seed), numbers(seed, scope)
    found = updates.prune(
        drawn.masks, drawn.drop, jnp.asarray(keep, jnp.uint32), scope=scope
    )
    assert_masks(found, drawn.best(drawn.drop, drawn.masks, keep, scope))


@hypothesis.given(SEEDS)
def test_regrow(seed: int) -> None:
    drawn, number = draw(seed), numbers(seed, "layer")
    found = updates.regrow(drawn.masks, drawn.grow, jnp.asarray(number, jnp.uint32))
    grown = oracle.best_per_leaf(drawn.grow, [~m for m in drawn.masks], number)
    assert_masks(found, [m | g for m, g in zip(drawn.masks, grown, strict=True)])


def exchanged(
    drawn: Drawn, masks: list[np.ndarray], fraction: float, weights: Any = None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The masks of the oracle after an exchange, and between its phases."""
    active = [int(m.sum()) for m in masks]
    dropped = [oracle.number_dropped(fraction, n) for n in active]
    kept = [n - d for n, d in zip(active, dropped, strict=True)]
    left = oracle.best_per_leaf(drawn.drop, masks, kept)
    if weights is not None:
        room = [int((~m).sum()) for m in left]
        dropped = oracle.redistributed(sum(dropped), weights, room)
    grown = oracle.best_per_leaf(drawn.grow, [~m for m in left], dropped)
    return [m | g for m, g in zip(left, grown, strict=True)], left


FRACTIONS = st.sampled_from([0.0, 1e-9, 0.3, 0.5, 0.999])


@hypothesis.given(SEEDS, FRACTIONS)
def test_exchange(seed: int, fraction: float) -> None:
    drawn = draw(seed)
    fixed = jnp.uint32(schedules.fixed_point(fraction))
    found = updates.prune_and_regrow(drawn.masks, drawn.drop, drawn.grow, fixed)
    assert_masks(found, exchanged(drawn, drawn.masks, fraction)[0])


@hypothesis.given(SEEDS, FRACTIONS)
def test_exchange_between_leaves(seed: int, fraction: float) -> None:
    drawn = draw(seed)
    # Quotients of these are exact in float32.
    weights = [1.0, 0.5, 4.0, 2.0, 0.5]
    fixed = jnp.uint32(schedules.fixed_point(fraction))
    found = updates.prune_and_regrow(
        drawn.masks,
        drawn.drop,
        drawn.grow,
        fixed,
        layer_weights=jnp.asarray(weights, jnp.float32),
    )
    assert_masks(found, exchanged(drawn, drawn.masks, fraction, weights)[0])


def decoded(codes: Sequence[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    """Masks, and which weights continue; no code stands for anything else."""
    for x in codes:
        assert x.dtype == jnp.int8
        assert np.isin(x, (0, 1, 2)).all()
    return [x > 0 for x in codes], [x == 2 for x in codes]


@functools.partial(jax.jit, static_argnames=("kept", "scope"))
def three_phases(
    drawn: Drawn, keep: Any, fraction: Any, first: Any, *, kept: bool, scope: Scope
) -> Any:
    """GraNet's update, by scores that are made in every stage or once."""

    def of(scores: list[jax.Array]) -> Any:
        # A sort is nothing to be done again: those scores are kept.
        return lambda _: [jnp.sort(x[None], axis=0)[0] for x in scores]

    drop, grow = drawn.drop, drawn.grow
    first_by = of(drop) if kept else (lambda _: drop)
    then_by = of(grow) if kept else (lambda _: grow)
    phases = [
        updates.prune_phase(first_by, keep, scope=scope),
        *updates.exchange_phases(first_by, then_by, fraction),
    ]
    return updates.run_phases(drawn.masks, phases, first=first)


@pytest.mark.parametrize("kept", [False, True], ids=["made again", "kept"])
@pytest.mark.parametrize("scope", SCOPES)
@hypothesis.given(SEEDS, FRACTIONS, st.integers(0, 1))
def test_gradual_pruning_and_exchange(
    kept: bool, scope: Scope, seed: int, fraction: float, first: int
) -> None:
    drawn, keep = draw(seed), numbers(seed, scope)
    arrays = jax.tree.map(jnp.asarray, drawn)
    fixed = jnp.uint32(schedules.fixed_point(fraction))
    count = jnp.asarray(keep, jnp.uint32)
    codes = three_phases(arrays, count, fixed, first, kept=kept, scope=scope)
    new, continuing = decoded(codes)
    pruned = drawn.masks
    if first == 0:
        pruned = drawn.best(drawn.drop, drawn.masks, keep, scope)
    expected, _ = exchanged(drawn, pruned, fraction)
    assert_masks(new, expected)
    # What the exchange drops and takes back continues; what was pruned before does not.
    pairs = zip(pruned, expected, strict=True)
    assert_masks(continuing, [p & e for p, e in pairs])


@functools.partial(jax.jit, static_argnames="scope")
def revived(drawn: Drawn, keep: Any, *, scope: Scope) -> Any:
    phase = updates.revive_phase(lambda _: drawn.grow, keep, sizes=SIZES, scope=scope)
    return updates.run_phases(drawn.masks, [phase])


@pytest.mark.parametrize("scope", SCOPES)
@hypothesis.given(SEEDS)
def test_revival(scope: Scope, seed: int) -> None:
    drawn, keep = draw(seed), numbers(seed, scope)
    count = jnp.asarray(keep, jnp.uint32)
    codes = revived(jax.tree.map(jnp.asarray, drawn), count, scope=scope)
    new, continuing = decoded(codes)
    missing: Any
    if scope == "global":
        missing = max(0, keep - sum(drawn.active))
    else:
        missing = [max(0, k - n) for k, n in zip(keep, drawn.active, strict=True)]
    inactive = [~m for m in drawn.masks]
    grown = drawn.best(drawn.grow, inactive, missing, scope)
    assert_masks(new, [m | g for m, g in zip(drawn.masks, grown, strict=True)])
    assert_masks(continuing, drawn.masks)


# --- Redistribution -----------------------------------------------------------------

# Op by op, its loops would be compiled anew at every call.
redistribute = jax.jit(updates.redistribute)
mean_score = jax.jit(updates.mean_score)


@st.composite
def pouring(draw):
    """Weights, room and a number that fits, for four leaves."""
    room = draw(st.lists(st.integers(0, 2000), min_size=4, max_size=4))
    weight = st.floats(0, 1e6, width=32) | st.sampled_from(
        [0.0, 1e-45, 3e38, math.inf, math.nan]
    )
    weights = draw(st.lists(weight, min_size=4, max_size=4))
    number = draw(st.integers(0, sum(room)))
    return number, weights, room


@hypothesis.given(pouring())
@hypothesis.example((3, [0.0, 0.0, 0.0, 0.0], [1, 0, 1, 1]))
@hypothesis.example((2000, [math.inf, math.nan, 3e38, 3e38], [900, 900, 900, 900]))
def test_redistribution_fills_exactly_and_within_room(case):
    number, weights, room = case
    given = np.asarray(
        redistribute(
            jnp.uint32(number),
            jnp.asarray(weights, jnp.float32),
            jnp.asarray(room, jnp.uint32),
        )
    )
    assert given.dtype == np.uint32
    assert given.sum() == number
    assert (given <= room).all()


@hypothesis.given(
    st.lists(st.integers(1, 2**10), min_size=4, max_size=4), st.integers(0, 2**12)
)
def test_redistribution_is_proportional_where_there_is_room(weights, number):
    given = np.asarray(
        redistribute(
            jnp.uint32(number),
            jnp.asarray(weights, jnp.float32),
            jnp.full(4, 2**20, jnp.uint32),
        )
    ).astype(float)
    share = number * np.asarray(weights) / sum(weights)
    # Rounding leaves fewer than four over, of which each leaf gets one at most, and
    # more only in proportion.
    assert (np.abs(given - share) < 4).all()


def test_redistribution_by_hand():
    def pour(number, weights, room):
        given = redistribute(
            jnp.uint32(number),
            jnp.asarray(weights, jnp.float32),
            jnp.asarray(room, jnp.uint32),
        )
        assert oracle.redistributed(number, weights, room) == given.tolist()
        return given.tolist()

    assert pour(10, [1, 3, 1], [9, 9, 9]) == [2, 6, 2]
    # The second is full at 4: what it cannot take is halved between the others.
    assert pour(10, [1, 3, 1], [9, 4, 9]) == [3, 4, 3]
    # A leaf without weight is served only when the others are full.
    assert pour(10, [0, 1, 1], [9, 3, 3]) == [4, 3, 3]
    assert pour(9, [0, 0, 0], [6, 3, 9]) == [4, 1, 4]
    # Weights are relative, however small.
    assert pour(8, [0.375, 0.125, 0], [9, 9, 9]) == [6, 2, 0]


def test_redistribution_to_what_is_not_finite_or_rounds_up():
    def pour(number, weights, room):
        weights = jnp.asarray(weights, jnp.float32)
        room = jnp.full(weights.shape, room, jnp.uint32)
        return redistribute(jnp.uint32(number), weights, room).tolist()

    assert pour(5, [math.inf, 1, math.nan], 9) == [0, 5, 0]
    # In float32 the first share is one more than all there is; the second is one.
    number = 2**25 + 3
    assert np.float32(number) == number + 1
    assert pour(number, [1, 5e-8], 2**26) == [number, 0]
    # Under `vmap` lanes may ask for what no room can take: that must end.
    assert pour(5, [1, 1], 1) == [1, 1]


def test_mean_score_is_the_mean_up_to_a_common_factor():
    rng = np.random.default_rng(0)
    masks = [rng.random(n) < 0.3 for n in (5000, 70, 1)] + [np.zeros(3, bool)]
    values = [
        np.abs(rng.normal(size=m.shape)).astype(np.float32) * 10.0**-i
        for i, m in enumerate(masks)
    ]
    masks[2][:] = True
    means = np.asarray(mean_score(masks, values), np.float64)
    expected = np.asarray(
        [v[m].mean() if m.any() else 0.0 for v, m in zip(values, masks, strict=False)]
    )
    np.testing.assert_allclose(
        means / means[0], expected / expected[0], rtol=1e-5, atol=0
    )
    assert means[3] == 0.0


def test_mean_score_ignores_what_is_not_finite():
    mask = np.ones(4, bool)
    clean = mean_score([mask, mask], [np.float32([1, 0, 2, 0]), np.ones(4)])
    dirty = mean_score([mask, mask], [np.float32([1, np.inf, 2, np.nan]), np.ones(4)])
    np.testing.assert_array_equal(clean, dirty)
    assert clean[0] / clean[1] == 0.75


@pytest.mark.parametrize("exponent", [-100, -1, 60])
def test_mean_score_is_relative_to_the_largest(exponent):
    rng = np.random.default_rng(0)
    masks = [np.ones(7, bool), np.ones((4, 5), bool)]
    scores = [rng.random(m.shape, np.float32) for m in masks]
    scaled = [np.ldexp(s, exponent) for s in scores]
    np.testing.assert_array_equal(mean_score(masks, scaled), mean_score(masks, scores))


@pytest.mark.parametrize("size", [1, 7, 200, 300, 5000])
def test_mean_score_has_24_bits_of_the_largest_score(size):
    """However few of them a leaf's limbs hold."""
    small = np.full(size, 2.0**-23, np.float32)
    means = mean_score([np.ones(size, bool), np.ones(1, bool)], [small, np.ones(1)])
    assert means[0] / means[1] == 2.0**-23


@pytest.mark.parametrize("size", [1, 7, 255, 4095])
def test_mean_score_does_not_overflow(size):
    """As many as are counted in so many bits, of the largest digits."""
    almost = np.full(size, np.nextafter(np.float32(2), np.float32(0)))
    means = mean_score([np.ones(size, bool), np.ones(1, bool)], [almost, almost[:1]])
    np.testing.assert_allclose(means[0], means[1], rtol=1e-6)


def test_a_global_phase_counts_all_leaves_together():
    leaf = jax.ShapeDtypeStruct((2**16, 2**15), jnp.bool_)
    scores = jax.ShapeDtypeStruct(leaf.shape, jnp.int8)

    def pruned(scope: Scope) -> Any:
        prune = functools.partial(updates.prune, scope=scope)
        keep = jax.ShapeDtypeStruct((), jnp.uint32)
        return jax.eval_shape(prune, [leaf] * 2, [scores] * 2, keep)

    assert pruned("layer") == [leaf] * 2
    with pytest.raises(ValueError, match="4294967296 scores"):
        pruned("global")
