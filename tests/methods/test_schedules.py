"""Schedules against their formulas in exact arithmetic.

`test_arguments` checks that bad values are refused.
"""

import itertools
import math
from fractions import Fraction
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from granet_jax import schedules


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
    @jax.jit
    @jax.vmap
    def traced(step: jax.Array) -> Any:
        return updates.contains(step), updates.done(step), updates.update_index(step)

    steps = list(updates.steps())
    for t, row in enumerate(zip(*traced(jnp.arange(30)), strict=True)):
        done = sum(s <= t for s in steps)
        assert [int(x) for x in row] == [t in steps, done, max(done - 1, 0)]


def test_listed_steps() -> None:
    steps = schedules.listed([3, 8, 10, 17])
    assert (steps.first, steps.last, steps.interval) == (3, 17, 2)
    assert schedules.listed([5]).interval == 5
    for wrong in ([4, 3], [2, 2], [1, 5, 4]):
        with pytest.raises(ValueError, match="steps must increase from one to the"):
            schedules.listed(wrong)


@hypothesis.given(
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 50),
    st.integers(1, 9),
    st.integers(9, 60),
)
@hypothesis.example(0.5, 0.9, 10, 10, 43)
@hypothesis.example(0.0, 0.9, 10, 5, 5)
def test_cubic_is_the_formula_in_whole_intervals(
    a: float, b: float, begin: int, interval: int, length: int
) -> None:
    end, n = begin + length, length // interval
    schedule = schedules.cubic(a, b, begin=begin, end=end, interval=interval)
    last = begin + n * interval
    for t in range(end + 10):
        j = min(max((t - begin) // interval, 0), n)
        exact = Fraction(b) + (Fraction(a) - Fraction(b)) * (1 - Fraction(j, n)) ** 3
        assert math.isclose(schedule(t), exact, rel_tol=1e-15, abs_tol=1e-15)
        # From the last update of the phase on, to the bit.
        assert t < last or schedule(t) == b
    assert schedule(0) == schedule(begin) == pytest.approx(a, rel=1e-15, abs=1e-15)
    assert schedule(10**6) == b


def test_an_interval_of_cubic_fits_between_its_ends() -> None:
    with pytest.raises(ValueError, match="got interval=6 with begin=10 and end=15"):
        schedules.cubic(0.0, 0.9, begin=10, end=15, interval=6)


def test_cosine() -> None:
    schedule = schedules.cosine(0.5, 0.005, steps=100)
    assert schedule(0) == 0.5
    assert math.isclose(schedule(50), 0.2525)
    assert schedule(100) == schedule(10_000) == 0.005
    # A quarter: cos(pi/4) = sqrt(1/2).
    assert math.isclose(schedule(25), 0.005 + 0.495 * (1 + math.sqrt(0.5)) / 2)
    short = schedules.cosine(1.0, 0.25, steps=0.5)
    assert [short(t) for t in (0, 1)] == [1.0, 0.25]


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


@pytest.mark.parametrize(("dtype", "bits"), [("uint32", 32), ("uint64", 40)])
def test_ceil_of_is_exact(dtype: str, bits: int) -> None:
    rng = np.random.default_rng(0)
    edges = [0, 1, 3, 2**8, 2**24, 2**31, 2**32 - 1, 2**bits - 1]

    def drawn(bits: int) -> list[int]:
        small = np.int64(2 ** rng.uniform(0, bits, 90))
        values = [*edges, *small.tolist(), *rng.integers(2**bits, size=90).tolist()]
        return [x for x in values if x < 2**bits]

    rows = list(itertools.product(drawn(32), drawn(bits)))
    with jax.enable_x64(dtype == "uint64"):
        actual = schedules.ceil_of(
            jnp.asarray([f for f, _ in rows], jnp.uint32),
            jnp.asarray([c for _, c in rows], dtype),
        )
        assert actual.dtype == dtype
        assert actual.tolist() == [-(-f * c // 2**32) for f, c in rows]


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
    ends = [schedules.fixed_point(x) for x in (0.0, 0.5, 1.0)]
    assert ends == [0, 2**31, 2**32 - 1]
    # A fraction of 1 means all of up to 2**32.
    assert -(-ends[2] * 10**9 // 2**32) == 10**9
