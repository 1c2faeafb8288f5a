"""How SNFS shares freed weights among leaves.

Whole mask updates are compared with an oracle in `tests/methods`.
"""

import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from granet_jax import redistribution

# Uncompiled, their loops would compile again at every call.
redistribute = jax.jit(redistribution.redistribute)
mean_score = jax.jit(redistribution.mean_score, static_argnums=2)


def shared(number: int, weights: list[Any], room: list[int]) -> np.ndarray:
    """`redistribute` among leaves of these weights, with room for so many each."""
    found = redistribute(
        jnp.uint32(number),
        jnp.asarray(weights, jnp.float32),
        jnp.asarray(room, jnp.uint32),
    )
    assert found.dtype == jnp.uint32
    return np.asarray(found)


@st.composite
def four_leaves(draw: Any) -> tuple[int, list[float], list[int]]:
    """A number, and weights and room for four leaves that can hold it together."""
    room = draw(st.lists(st.integers(0, 2000), min_size=4, max_size=4))
    weight = st.floats(0, 1e6, width=32) | st.sampled_from(
        [0.0, 1e-45, 3e38, math.inf, math.nan]
    )
    weights = draw(st.lists(weight, min_size=4, max_size=4))
    return draw(st.integers(0, sum(room))), weights, room


@hypothesis.given(four_leaves())
@hypothesis.example((3, [0.0, 0.0, 0.0, 0.0], [1, 0, 1, 1]))
@hypothesis.example((2000, [math.inf, math.nan, 3e38, 3e38], [900, 900, 900, 900]))
def test_shares_add_up_and_fit(case: tuple[int, list[float], list[int]]) -> None:
    number, weights, room = case
    found = shared(number, weights, room)
    assert found.sum() == number
    assert (found <= room).all()


@hypothesis.given(
    st.lists(st.integers(1, 2**10), min_size=4, max_size=4), st.integers(0, 2**12)
)
def test_shares_are_proportional_where_there_is_room(
    weights: list[int], number: int
) -> None:
    found = shared(number, weights, [2**20] * 4).astype(float)
    expected = number * np.asarray(weights) / sum(weights)
    # Rounding down leaves fewer than four, and each leaf gets one of them at most.
    assert (np.abs(found - expected) < 4).all()


@pytest.mark.parametrize(
    ("number", "weights", "room", "expected"),
    [
        (10, [1, 3, 1], [9, 9, 9], [2, 6, 2]),
        # The second leaf is full at 20, and the others divide the rest by 1 to 3.
        (120, [1 / 8, 1, 3 / 8], [120, 20, 120], [25, 20, 75]),
        # A leaf of weight zero gets something only when the others are full.
        (4, [0, 1, 1], [9, 1, 1], [2, 1, 1]),
        (9, [0, 0, 0], [6, 3, 9], [4, 1, 4]),
        # The last leaf gets one of three and one of the two that remain, and the first
        # leaf what is left.
        (3, [1, 1, 1, 1, 1, 5], [9] * 6, [1, 0, 0, 0, 0, 2]),
        # Only the ratios of weights matter.
        (8, [0.375, 0.125, 0], [9, 9, 9], [6, 2, 0]),
        (5, [math.inf, 1, math.nan], [9, 9, 9], [0, 5, 0]),
        # In float32 the shares of the first two round up to seven more than there are
        # in all, and the last one's share, which is one, is used up.
        (2**27 + 9, [1, 1, 2**-26], [2**28] * 3, [2**26 + 8, 2**26 + 1, 0]),
        # Under vmap a lane may ask for more than there is room for: the loop must end.
        (5, [1, 1, 0], [1, 1, 0], [1, 1, 0]),
    ],
)
def test_shares_by_hand(
    number: int, weights: list[Any], room: list[int], expected: list[int]
) -> None:
    assert shared(number, weights, room).tolist() == expected


def test_mean_scores_are_means_up_to_a_common_factor() -> None:
    rng = np.random.default_rng(0)
    masks = [*(rng.random(n) < 0.3 for n in (5000, 70)), np.ones(1, bool)]
    values = [
        np.abs(rng.normal(size=m.shape)).astype(np.float32) * 10.0**-i
        for i, m in enumerate([*masks, np.zeros(3, bool)])
    ]
    stacks = ((),) * 4
    means = np.asarray(mean_score([*masks, np.zeros(3, bool)], values, stacks))
    expected = [
        v[m].mean(dtype=np.float64) for v, m in zip(values, masks, strict=False)
    ]
    np.testing.assert_allclose(
        means[:3] / np.float64(means[0]), expected / expected[0], rtol=1e-5, atol=0
    )
    # A leaf without active weights has the mean zero.
    assert means[3] == 0.0


def test_mean_scores_ignore_values_that_are_not_finite() -> None:
    mask = np.ones(4, bool)
    clean = mean_score([mask, mask], [np.float32([1, 0, 2, 0]), np.ones(4)], ((), ()))
    dirty = mean_score(
        [mask, mask], [np.float32([1, np.inf, 2, np.nan]), np.ones(4)], ((), ())
    )
    np.testing.assert_array_equal(clean, dirty)
    assert clean[0] / clean[1] == 0.75


@pytest.mark.parametrize("exponent", [-100, 60])
def test_mean_scores_are_relative_to_the_largest(exponent: int) -> None:
    rng = np.random.default_rng(0)
    masks = [np.ones(7, bool), rng.random((20, 30)) < 0.5]
    scores = [rng.random(m.shape, np.float32) for m in masks]
    scaled = [np.ldexp(s, exponent) for s in scores]
    np.testing.assert_array_equal(
        *(mean_score(masks, x, ((),) * len(masks)) for x in (scaled, scores))
    )


@pytest.mark.parametrize("size", [1, 255, 300, 5000])
def test_mean_scores_are_precise_and_do_not_overflow(size: int) -> None:
    mask, single = np.ones(size, bool), np.ones(1, bool)
    # 24 bits below the largest score still count, in a leaf of any size.
    small = np.full(size, 2.0**-23, np.float32)
    means = mean_score([mask, single], [small, np.ones(1, np.float32)], ((), ()))
    assert means[0] / means[1] == 2.0**-23
    # The largest scores of a leaf sum up without overflow.
    almost = np.full(size, np.nextafter(np.float32(2), np.float32(0)))
    means = mean_score([mask, single], [almost, almost[:1]], ((), ()))
    np.testing.assert_allclose(means[0], means[1], rtol=1e-6)


def test_mean_scores_of_a_leaf_of_more_than_2_31_weights_compile() -> None:
    mask, scores = (
        jax.ShapeDtypeStruct((2**16, 2**15 + 1), dtype) for dtype in (bool, jnp.float32)
    )
    assert jax.eval_shape(mean_score, [mask], [scores], ((),)).shape == (1,)
