"""Selection by scores, and the sources that need only parameters."""

import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax import distributions, masking, scores
from granet_jax import mask_sources as ms
from tests.helpers import trees
from tests.mask_sources.helpers import draw, largest, largest_by_leaf

PARAMS = draw({"a": (20, 15), "bias": (15,), "c": (3, 3, 10, 8)})
KERNELS = {k: np.asarray(PARAMS[k]) for k in ("a", "c")}
SHAPES = [x.shape for x in KERNELS.values()]
SIZE = 20 * 15 + 3 * 3 * 10 * 8


def assert_masks(masks: Any, expected: list[np.ndarray]) -> None:
    assert masking.is_masked_node(masks["bias"])
    for k, mask in zip(KERNELS, expected, strict=True):
        np.testing.assert_array_equal(masks[k], mask)


@hypothesis.given(
    st.integers(0, 1000),
    st.sampled_from([1, 2, 5, 1000]),
    st.sampled_from([0.0, 0.9, 0.95, 0.98, 0.99, 0.999]) | st.floats(0.0, 0.999),
)
@hypothesis.settings(max_examples=30)
def test_select_is_a_stable_sort(seed: int, levels: int, sparsity: float) -> None:
    """Scores have few levels, so many are equal."""
    rng = np.random.default_rng(seed)
    values = [rng.integers(-levels, levels, size=s) for s in SHAPES]
    first, second = (jnp.asarray(x, jnp.float32) for x in values)
    tree = {"a": first, "bias": optax.MaskedNode(), "c": second}
    count = math.floor((1.0 - sparsity) * SIZE + 0.5)
    assert_masks(ms.select(tree, sparsity), largest(values, count))
    counts = distributions.counts(SHAPES, sparsity, "uniform")
    by_layer = ms.select(tree, sparsity, scope="layer")
    assert_masks(by_layer, largest_by_leaf(values, counts))


def test_select_compares_float64_exactly() -> None:
    # These values are equal in float32, and exceed its range.
    values = 1e200 * (1 + np.arange(8) * 2.0**-50)
    with jax.enable_x64(True):
        on_device = jnp.asarray(values)
    for x in (values, on_device):
        masks = ms.select({"w": x.reshape(2, 4)}, 0.5)
        np.testing.assert_array_equal(masks["w"], [[False] * 4, [True] * 4])


def test_select_refuses_scores_that_are_not_finite() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        tree = {"a": np.ones(3), "b": {"kernel": np.asarray([1.0, bad])}}
        with pytest.raises(ValueError, match=r"scores must be finite.*at 'b/kernel':"):
            ms.select(tree, 0.5)


def test_magnitude_keeps_the_largest_weights_traced_or_not() -> None:
    sizes = [np.abs(x) for x in KERNELS.values()]
    for sparsity in (0.0, 0.95, 0.999):
        masks = ms.magnitude(PARAMS, sparsity, on_collapse="ignore")
        assert_masks(masks, largest(sizes, distributions.total_count(SIZE, sparsity)))
    counts = distributions.counts(SHAPES, 0.9, "uniform")
    traced = jax.jit(lambda p: ms.magnitude(p, 0.9, scope="layer"))(PARAMS)
    assert_masks(traced, largest_by_leaf(sizes, counts))


def test_random_masks_have_the_counts_of_the_distribution() -> None:
    for distribution, sparsity in (("erk", 0.97), ("uniform", 0.0), ("er", 0.5)):
        key = jax.random.key(1)
        masks = ms.random(PARAMS, sparsity, key=key, distribution=distribution)
        counts = [int(m.sum()) for m in jax.tree.leaves(masks)]
        assert counts == distributions.counts(SHAPES, sparsity, distribution)


def test_random_masks_are_uniform_over_positions() -> None:
    # In 600 draws of half the weights, each is active about half the time, with a
    # standard deviation of 0.02.
    def one(key: Any) -> Any:
        return ms.random({"w": jnp.zeros((4, 5))}, 0.5, key=key)["w"]

    masks = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 600))
    assert np.all(masks.sum((1, 2)) == 10)
    assert np.all(np.abs(masks.mean(0) - 0.5) < 0.1)


def test_a_random_mask_depends_on_the_key_and_the_name_only() -> None:
    zeros, shape = jnp.zeros((30, 10)), jax.ShapeDtypeStruct((30, 10), jnp.float32)

    def masks(seed: int, **params: Any) -> Any:
        key = jax.random.key(seed)
        return ms.random(params, 0.5, key=key, distribution="uniform")

    alone, both = masks(1, b=zeros)["b"], masks(1, a=zeros, b=shape)
    np.testing.assert_array_equal(alone, both["b"])
    assert not np.array_equal(both["a"], both["b"])
    assert not np.array_equal(alone, masks(2, b=zeros)["b"])


def test_shuffle_keeps_only_the_counts() -> None:
    masks = ms.magnitude(PARAMS, 0.5)
    shuffled = ms.shuffle(masks, jax.random.key(0))
    assert jax.tree.structure(shuffled) == jax.tree.structure(masks)
    assert granet_jax.sparsity(shuffled) == granet_jax.sparsity(masks)
    for k in KERNELS:
        # Two independent masks of density 1/2 agree at about half of the weights.
        assert 0.3 < np.mean(masks[k] == shuffled[k]) < 0.7


def test_from_score_passes_all_that_a_score_may_read() -> None:
    seen = {}

    def score(inputs: granet_jax.ScoreInputs) -> Any:
        seen[inputs.name] = inputs
        return jax.random.uniform(inputs.key, inputs.param.shape)

    def masks(seed: int) -> Any:
        return ms.from_score(score, PARAMS, 0.5, key=jax.random.key(seed))

    first = masks(3)
    assert granet_jax.sparsity(first).active == SIZE // 2
    assert list(seen) == list(KERNELS)
    for name, inputs in seen.items():
        assert inputs.grad is None
        assert bool(inputs.mask.all())
        np.testing.assert_array_equal(inputs.param, KERNELS[name])
        trees.assert_same(dict(inputs.weights), KERNELS)
    trees.assert_same(masks(3), first)
    assert not np.array_equal(masks(4)["a"], first["a"])
    with pytest.raises(ValueError, match="needs the dense gradient"):
        ms.from_score(scores.gradient, PARAMS, 0.5)
