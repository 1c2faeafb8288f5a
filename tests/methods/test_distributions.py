"""Uniform, ER and ERK: exact sums, the papers' proportions, and published figures."""

import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import pytest

from benchmarks.tools import parameter_trees
from granet_jax import distributions
from tests.helpers import numpy_reference

shapes = st.lists(
    st.lists(st.integers(0, 12), min_size=1, max_size=4).map(tuple),
    min_size=1,
    max_size=8,
).filter(lambda s: sum(map(math.prod, s)) > 0)
sparsities = st.floats(0.0, 1.0) | st.sampled_from([0.0, 0.5, 0.8, 0.9, 0.98, 1.0])
names = st.sampled_from(distributions.DISTRIBUTIONS)


@hypothesis.given(shapes, sparsities, names)
@hypothesis.settings(max_examples=200)
def test_counts_sum_to_the_total_exactly(
    shapes: Any, sparsity: float, distribution: str
) -> None:
    sizes = [math.prod(s) for s in shapes]
    actual = distributions.counts(shapes, sparsity, distribution)
    assert sum(actual) == math.floor((1.0 - sparsity) * sum(sizes) + 0.5)
    assert all(0 <= n <= size for n, size in zip(actual, sizes, strict=True))
    assert all(isinstance(n, int) for n in actual)
    # Each is within one weight of the distribution's own real number.
    densities = distributions.densities(shapes, sparsity, distribution)
    for n, density, size in zip(actual, densities, sizes, strict=True):
        assert abs(n - density * size) < 1 + 1e-6 * size


@hypothesis.given(shapes, st.floats(0.01, 0.99), names)
@hypothesis.settings(max_examples=200)
def test_densities_satisfy_their_definition(
    shapes: Any, sparsity: float, distribution: str
) -> None:
    shapes = [s for s in shapes if math.prod(s)]
    sizes = [math.prod(s) for s in shapes]
    actual = distributions.densities(shapes, sparsity, distribution)
    active = sum(d * n for d, n in zip(actual, sizes, strict=True))
    assert math.isclose(active, (1 - sparsity) * sum(sizes), rel_tol=1e-9)
    # Densities are proportional to the rule, or 1 where it asks for more.
    dims = [s[-2:] if distribution == "er" else s for s in shapes]
    raw = [1.0 if distribution == "uniform" else sum(d) / math.prod(d) for d in dims]
    epsilon = max(d / p for d, p in zip(actual, raw, strict=True))
    for density, p in zip(actual, raw, strict=True):
        assert math.isclose(density, min(1.0, epsilon * p), rel_tol=1e-9)


def test_erk_by_hand() -> None:
    # Raw 6/9 and 40/300: epsilon (6/9 * 9 + 40/300 * 300) = 0.1 * 309.
    epsilon = 30.9 / 46
    densities = distributions.densities([(3, 3), (10, 30)], 0.9, "erk")
    assert densities == pytest.approx([epsilon * 6 / 9, epsilon * 40 / 300], rel=1e-9)
    # At 0.5 the small layer would exceed density 1. So it is dense, and the other has
    # 0.5 * 309 - 9 = 145.5 of 300.
    densities = distributions.densities([(3, 3), (10, 30)], 0.5, "erk")
    assert densities == [1.0, pytest.approx(145.5 / 300, rel=1e-9)]
    # Of two weights, the one in two dimensions is dense: 0.875 * 2 - 1 is left.
    assert distributions.densities([(1, 1), (1,)], 0.125, "erk") == [1.0, 0.75]


def test_a_scalar_is_a_vector_of_one_weight() -> None:
    for rule in ("er", "erk"):
        scalar, vector = (
            distributions.densities([shape, (10, 30)], 0.9, rule)
            for shape in ((), (1,))
        )
        assert scalar == vector
    assert distributions.counts([(0, 3), (2, 0)], 0.5) == [0, 0]


def test_largest_remainder_serves_the_first_of_equals() -> None:
    # Half a weight each: the first two of four leaves have one.
    assert distributions.counts([(1,)] * 4, 0.5, "uniform") == [1, 1, 0, 0]
    # 0.5 of 1 and 0.5 of 4: the remainders are 0.5 and 0, the total 2.5 rounds to 3.
    assert distributions.counts([(4,), (1,)], 0.5, "uniform") == [2, 1]


def test_caps_and_floors_are_kept_and_the_others_share_the_rest() -> None:
    for bounds, expected in (
        ({"caps": [2, 10, 10]}, [2, 7, 6]),
        ({"floors": [8, 0, 0]}, [8, 4, 3]),
    ):
        actual = distributions.counts([(10,)] * 3, 0.5, "uniform", **bounds)
        assert actual == expected


@hypothesis.given(
    st.lists(st.integers(1, 30), min_size=1, max_size=5), st.floats(0, 1), st.data()
)
def test_counts_above_floors(sizes: Any, sparsity: float, data: Any) -> None:
    floors = [data.draw(st.integers(0, n)) for n in sizes]
    shapes = [(n, 1) for n in sizes]
    total = distributions.total_count(sum(sizes), sparsity)
    if sum(floors) > total:
        with pytest.raises(ValueError, match=r"keep .* at least"):
            distributions.counts(shapes, sparsity, floors=floors)
        return
    actual = distributions.counts(shapes, sparsity, floors=floors)
    assert sum(actual) == total
    assert all(f <= c <= n for f, c, n in zip(floors, actual, sizes, strict=True))


def test_a_function_as_distribution() -> None:
    def last_dense(shapes: Any, sparsity: float) -> list[float]:
        return [0.0] * (len(shapes) - 1) + [1.0]

    assert distributions.counts([(6,), (6,)], 0.5, last_dense) == [0, 6]
    # The total is met even if the densities ask for too much or too little.
    assert sum(distributions.counts([(6,), (6,)], 0.5, lambda s, _: [1, 1])) == 6
    assert sum(distributions.counts([(6,), (6,)], 0.5, lambda s, _: [0, 0])) == 6
    assert distributions.counts([(6,), (1,)], 0.9, lambda s, _: [1, 1]) == [1, 0]
    for wrong in ([0.5], [0.5] * 3, [0.5, 1.5], [0.5, -0.1], [0.5, math.nan]):
        with pytest.raises(ValueError, match=r"one density in \[0, 1\] for each of"):
            distributions.counts([(6,), (6,)], 0.5, lambda s, _, w=wrong: w)


def test_total_count_rounds_half_up() -> None:
    assert distributions.total_count(10, 0.75) == 3  # 2.5
    assert distributions.total_count(10, 0.0) == 10
    assert distributions.total_count(10, 1.0) == 0
    assert distributions.total_count(25_502_912, 0.9) == 2_550_291


def test_erk_on_resnet50() -> None:
    tree = parameter_trees.resnet50()
    assert parameter_trees.size(tree) == 25_557_032
    assert parameter_trees.RESNET50_PARAMETERS == 25_557_032
    shapes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, tuple))
    kernels = [s for s in shapes if len(s) >= 2]
    assert len(kernels) == parameter_trees.RESNET50_KERNELS
    actual = distributions.counts(kernels, 0.8, "erk")
    assert actual == numpy_reference.counts(kernels, 0.8, "erk")
    # Each 3x3 convolution is sparser than the 1x1 ones around it, as ERK intends.
    density = {s: n / math.prod(s) for s, n in zip(kernels, actual, strict=True)}
    assert density[(3, 3, 512, 512)] < density[(1, 1, 512, 2048)] < 0.5
    assert density[(1, 1, 64, 64)] == 1.0
