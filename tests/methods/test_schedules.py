"""Schedules against their formulas in exact arithmetic.

`test_arguments` checks that bad values are refused.
"""

import itertools
import math
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from granet_jax import schedules

uint32 = st.integers(0, 2**32 - 1)


@hypothesis.given(st.integers(1, 40), st.integers(0, 60), st.integers(0, 200))
@hypothesis.example(1, 0, 0)
def test_update_steps(interval: int, begin: int, last: int) -> None:
    updates = schedules.every(interval, begin=begin, last=last)
    expected = [t for t in range(1, last + 1) if (t - begin) % interval == 0]
    assert list(updates.steps()) == expected


@pytest.mark.parametrize(
    "updates",
    [
        schedules.UpdateSteps(4, 20, 4),
        schedules.UpdateSteps(3, 21, 7),
        schedules.UpdateSteps(9, 21, 4),
        schedules.UpdateSteps(1, 5, 1),
        schedules.NEVER,
        schedules.listed([1]),
        schedules.listed([3, 4, 9, 17]),
    ],
)
def test_traced_steps_agree_with_the_list(updates: schedules.Steps) -> None:
    contains = jax.jit(updates.contains)
    index = jax.jit(updates.update_index)
    done = jax.jit(updates.done)
    steps = list(updates.steps())
    for t in range(30):
        step = jnp.int32(t)
        until = sum(s <= t for s in steps)
        assert bool(contains(step)) == (t in steps)
        assert int(done(step)) == until
        assert int(index(step)) == max(until - 1, 0)


def test_listed_steps() -> None:
    steps = schedules.listed([3, 8, 10, 17])
    assert (steps.first, steps.last, steps.interval) == (3, 17, 2)
    assert schedules.listed([5]).interval == 5
    for wrong in ([4, 3], [2, 2], [1, 5, 4]):
        with pytest.raises(ValueError, match="steps must increase from one to the"):
            schedules.listed(wrong)


def test_cubic_is_the_formula_in_whole_intervals() -> None:
    schedule = schedules.cubic(0.5, 0.9, begin=10, end=53, interval=10)  # n = 4
    for t in range(80):
        j = min(max((t - 10) // 10, 0), 4)
        exact = (
            Fraction(0.9) + (Fraction(0.5) - Fraction(0.9)) * (1 - Fraction(j, 4)) ** 3
        )
        assert math.isclose(schedule(t), exact, rel_tol=1e-15)
    assert schedule(0) == schedule(10) == 0.5
    # From the last update of the phase on, to the bit.
    assert schedule(49) != 0.9
    assert schedule(50) == schedule(53) == schedule(10**6) == 0.9


def test_an_interval_of_cubic_fits_between_its_ends() -> None:
    fits = schedules.cubic(0.0, 0.9, begin=10, end=15, interval=5)
    assert [fits(t) for t in (14, 15)] == [0.0, 0.9]
    with pytest.raises(ValueError, match="got interval=6 with begin=10 and end=15"):
        schedules.cubic(0.0, 0.9, begin=10, end=15, interval=6)


@hypothesis.given(
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 50),
    st.integers(1, 9),
)
def test_cubic_is_monotone(a: float, b: float, begin: int, interval: int) -> None:
    low, high = sorted((a, b))
    schedule = schedules.cubic(
        low, high, begin=begin, end=begin + 60, interval=interval
    )
    values = [schedule(t) for t in range(begin, begin + 70)]
    assert all(x <= y + 1e-15 for x, y in itertools.pairwise(values))
    assert values[-1] == high


def test_cosine() -> None:
    schedule = schedules.cosine(0.5, 0.005, steps=100)
    assert schedule(0) == 0.5
    assert math.isclose(schedule(50), 0.2525)
    assert schedule(100) == schedule(10_000) == 0.005
    # A quarter: cos(pi/4) = sqrt(1/2).
    assert math.isclose(schedule(25), 0.005 + 0.495 * (1 + math.sqrt(0.5)) / 2)


def test_cosine_of_less_than_a_step() -> None:
    schedule = schedules.cosine(1.0, 0.25, steps=0.5)
    assert [schedule(t) for t in (0, 1)] == [1.0, 0.25]


def test_repeated_starts_anew_but_not_at_its_end() -> None:
    schedule = schedules.repeated(float, period=4, cycles=3)
    assert [schedule(t) for t in range(14)] == [*range(4), *range(4), *range(6)]
    once = schedules.repeated(float, period=2, cycles=1)
    assert [once(t) for t in range(4)] == [0, 1, 2, 3]


def test_restarted_starts_anew_for_ever() -> None:
    schedule = schedules.restarted(lambda count: 2 * count, period=3)
    assert [int(schedule(t)) for t in range(8)] == [0, 2, 4, 0, 2, 4, 0, 2]
    # The first step of a cycle has the first learning rate again.
    cosine = optax.cosine_decay_schedule(0.4, decay_steps=8, alpha=0.25)
    tx = optax.sgd(schedules.restarted(cosine, period=2))
    state = tx.init(jnp.zeros(()))
    rates = []
    for _ in range(4):
        update, state = tx.update(jnp.ones(()), state)
        rates.append(-float(update))
    assert rates[:2] == rates[2:]
    assert math.isclose(
        rates[1], 0.1 + 0.3 * (1 + math.cos(math.pi / 8)) / 2, rel_tol=1e-6
    )


@hypothesis.given(uint32, uint32)
@hypothesis.example(2**32 - 1, 2**32 - 1)
@hypothesis.example(0, 2**32 - 1)
@hypothesis.example(2**31, 3)
@hypothesis.example(2**8, 2**24)
@hypothesis.settings(max_examples=500)
def test_ceil_of_is_exact(fraction: int, count: int) -> None:
    actual = schedules.ceil_of(np.uint32(fraction), jnp.asarray(count, jnp.uint32))
    assert actual.dtype == jnp.uint32
    assert int(actual) == -(-fraction * count // 2**32)


@hypothesis.given(uint32, st.integers(0, 2**40))
@hypothesis.example(1, 1)
def test_ceil_of_in_64_bits(fraction: int, count: int) -> None:
    with jax.enable_x64(True):
        actual = schedules.ceil_of(
            jnp.asarray(fraction, jnp.uint32), jnp.asarray(count, jnp.uint64)
        )
        assert actual.dtype == jnp.uint64
        assert int(actual) == -(-fraction * count // 2**32)


@hypothesis.given(st.integers(1, 99), st.integers(0, 10**6))
def test_fixed_point_of_a_decimal_gives_the_ceiling_of_the_decimal(
    percent: int, count: int
) -> None:
    # ceil(0.07 * 100) is 7, though the double nearest to 0.07 lies above it. The fixed
    # point lies a little below, so this holds for counts far from 2**32.
    meant = Fraction(percent, 100)
    fixed = schedules.fixed_point(percent / 100)
    assert -(-fixed * count // 2**32) == math.ceil(meant * count)


def test_fixed_point_ends() -> None:
    assert schedules.fixed_point(0.0) == 0
    assert schedules.fixed_point(0.5) == 2**31
    assert schedules.fixed_point(1.0) == 2**32 - 1
    # A fraction of 1 means all of up to 2**32.
    assert -(-schedules.fixed_point(1.0) * 10**9 // 2**32) == 10**9
