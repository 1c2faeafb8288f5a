"""Sources that need only parameters; exact selection; shuffling; collapse."""

import functools
import math
import warnings
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

SPARSITIES = (0.0, 0.9, 0.95, 0.98, 0.99, 0.999)
SHAPES = {"a": {"kernel": (20, 15), "bias": (15,)}, "b": {"kernel": (3, 3, 10, 8)}}


def make_params(seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32),
        SHAPES,
        is_leaf=trees.is_shape,
    )


def make_scores(seed: int, levels: int) -> Any:
    """Integer-valued scores of few levels, so that many tie."""
    rng = np.random.default_rng(seed)
    tree = {
        "a": {"bias": optax.MaskedNode(), "kernel": rng.integers(levels, size=(6, 5))},
        "b": {"kernel": rng.integers(levels, size=(2, 2, 3, 4))},
    }
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def ranked(values: list[np.ndarray], k: int) -> list[np.ndarray]:
    """The k largest over all arrays, ties by position: by a stable sort."""
    flat = np.concatenate([v.ravel() for v in values])
    chosen = np.zeros(flat.size, bool)
    chosen[np.argsort(-flat, kind="stable")[:k]] = True
    cuts = np.cumsum([v.size for v in values])[:-1]
    return [
        part.reshape(v.shape)
        for part, v in zip(np.split(chosen, cuts), values, strict=True)
    ]


@hypothesis.given(
    st.integers(0, 1000), st.sampled_from([1, 2, 5, 1000]), st.floats(0.0, 0.999)
)
@hypothesis.settings(max_examples=15)
def test_select_globally_is_a_stable_sort(seed: int, levels: int, s: float) -> None:
    tree = make_scores(seed, levels)
    leaves = [np.asarray(x) for x in jax.tree.leaves(tree)]
    keep = math.floor((1.0 - s) * 78 + 0.5)
    masks = ms.select(tree, s)
    assert masking.is_masked_node(masks["a"]["bias"])
    for found, expected in zip(
        jax.tree.leaves(masks), ranked(leaves, keep), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("levels", [1, 1000])
def test_select_by_layer_counts_by_largest_remainder(
    sparsity: float, levels: int
) -> None:
    tree = make_scores(3, levels)
    counts = distributions.counts([(6, 5), (2, 2, 3, 4)], sparsity, "uniform")
    masks = ms.select(tree, sparsity, scope="layer")
    for score, mask, n in zip(
        jax.tree.leaves(tree), jax.tree.leaves(masks), counts, strict=True
    ):
        np.testing.assert_array_equal(mask, ranked([np.asarray(score)], n)[0])


def test_select_ranks_float64_exactly() -> None:
    # Equal in float32, and beyond it.
    values = 1e200 * (1 + np.arange(8) * 2.0**-50)
    with jax.enable_x64(True):
        wide = jnp.asarray(values)
    for given in (values, wide):
        found = ms.select({"w": given.reshape(2, 4)}, 0.5)["w"]
        np.testing.assert_array_equal(found, [[False] * 4, [True] * 4])


def test_inverted_scores_keep_the_smallest() -> None:
    tree = make_scores(0, 1000)
    inverted = ms.select(jax.tree.map(jnp.negative, tree), 0.75)
    leaves = [-np.asarray(x) for x in jax.tree.leaves(tree)]
    for found, expected in zip(
        jax.tree.leaves(inverted), ranked(leaves, 20), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_select_refuses_what_is_not_finite(bad: float) -> None:
    tree = make_scores(0, 10)
    tree["b"]["kernel"] = tree["b"]["kernel"].at[0, 0, 0, 0].set(bad)
    with pytest.raises(ValueError, match=r"scores must be finite.*'b/kernel'"):
        ms.select(tree, 0.5)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_magnitude_counts_and_ranks(sparsity: float) -> None:
    params = make_params()
    masks = ms.magnitude(params, sparsity, on_collapse="ignore")
    assert masking.is_masked_node(masks["a"]["bias"])
    kernels = [np.abs(params[k]["kernel"]) for k in "ab"]
    expected = ranked(kernels, distributions.total_count(1020, sparsity))
    for k, mask in zip("ab", expected, strict=True):
        np.testing.assert_array_equal(masks[k]["kernel"], mask)


def test_magnitude_traced_is_the_same() -> None:
    params = make_params()
    found = jax.jit(lambda p: ms.magnitude(p, 0.9, scope="layer"))(params)
    trees.assert_same(found, ms.magnitude(params, 0.9, scope="layer"))


@pytest.mark.parametrize("distribution", distributions.DISTRIBUTIONS)
def test_random_counts(distribution: str) -> None:
    params = make_params()
    shapes = [(20, 15), (3, 3, 10, 8)]
    for sparsity in (0.0, 0.97):
        masks = ms.random(
            params, sparsity, key=jax.random.key(1), distribution=distribution
        )
        found = [int(m.sum()) for m in jax.tree.leaves(masks)]
        assert found == distributions.counts(shapes, sparsity, distribution)


def test_random_is_uniform_over_positions() -> None:
    # 600 draws of half the weights: each is active about half the time, with standard
    # deviation 0.02.
    draw = jax.jit(
        jax.vmap(lambda key: ms.random({"w": jnp.zeros((4, 5))}, 0.5, key=key)["w"])
    )
    masks = draw(jax.random.split(jax.random.key(0), 600))
    assert np.all(masks.sum((1, 2)) == 10)
    assert np.all(np.abs(masks.mean(0) - 0.5) < 0.1)


def test_random_follows_from_the_name_and_the_key() -> None:
    key = jax.random.key(1)
    half = {"distribution": "uniform", "key": key}
    zeros = jnp.zeros((30, 10))
    alone = ms.random({"b": zeros}, 0.5, **half)
    shape = jax.ShapeDtypeStruct((30, 10), jnp.float32)
    among = ms.random({"a": zeros, "b": shape}, 0.5, **half)
    np.testing.assert_array_equal(alone["b"], among["b"])
    assert not np.array_equal(among["a"], among["b"])
    other = ms.random({"b": zeros}, 0.5, key=jax.random.key(2))
    assert not np.array_equal(alone["b"], other["b"])


def test_shuffle_keeps_the_counts_only() -> None:
    masks = ms.magnitude(make_params(), 0.5)
    shuffled = ms.shuffle(masks, jax.random.key(0))
    assert granet_jax.sparsity(shuffled) == granet_jax.sparsity(masks)
    assert jax.tree.structure(shuffled) == jax.tree.structure(masks)
    for before, after in zip(
        jax.tree.leaves(masks), jax.tree.leaves(shuffled), strict=True
    ):
        # Of two independent masks of density about a half, about half agrees.
        assert 0.3 < np.mean(before == after) < 0.7


def test_from_score_hands_over_what_a_score_may_look_at() -> None:
    params = make_params()
    seen = {}

    def score(inputs: granet_jax.ScoreInputs) -> Any:
        seen[inputs.name] = inputs
        return jax.random.uniform(inputs.key, inputs.param.shape)

    masks = ms.from_score(score, params, 0.5, key=jax.random.key(3))
    assert list(seen) == ["a/kernel", "b/kernel"]
    for name, inputs in seen.items():
        assert inputs.grad is None
        assert bool(inputs.mask.all())
        assert set(inputs.weights) == set(seen)
        np.testing.assert_array_equal(inputs.param, params[name[0]]["kernel"])
        np.testing.assert_array_equal(inputs.weights[name], inputs.param)
    assert granet_jax.sparsity(masks).active == 510
    again = ms.from_score(score, params, 0.5, key=jax.random.key(3))
    trees.assert_same(again, masks)
    other = ms.from_score(score, params, 0.5, key=jax.random.key(4))
    assert not np.array_equal(other["a"]["kernel"], masks["a"]["kernel"])


def test_where() -> None:
    masks = ms.magnitude(make_params(), 0.5, where=lambda name, _: "bias" in name)
    assert masking.is_masked_node(masks["b"]["kernel"])
    assert int(masks["a"]["bias"].sum()) == 8


def test_masks_go_into_transform() -> None:
    params = make_params()
    masks = ms.magnitude(params, 0.9)
    tx = granet_jax.transform(granet_jax.static(0.0), optax.sgd(0.1), masks=masks)
    trees.assert_same(granet_jax.get_masks(tx.init(params)), masks)


def chain(params: Any, x: Any) -> Any:
    """Two layers with biases, norms as they are at the start, and pooling."""
    x = jax.nn.relu(x @ params["first"] + params["bias"][None])
    x = jnp.max(x.reshape(-1, 3, 2), axis=-1)
    return x @ params["last"]


CHAIN = {
    "first": jax.ShapeDtypeStruct((4, 6), jnp.float32),
    "bias": jax.ShapeDtypeStruct((6,), jnp.float32),
    "last": jax.ShapeDtypeStruct((3, 2), jnp.float32),
}
POINT = jax.ShapeDtypeStruct((1, 4), jnp.float32)


@hypothesis.given(st.integers(0, 2**24 - 1), st.integers(0, 2**6 - 1))
@hypothesis.settings(max_examples=3)
@hypothesis.example(0, 63)
@hypothesis.example(2**24 - 1, 1)
@hypothesis.example(0b001100, 0b110000)
def test_connected_counts_paths(first: int, last: int) -> None:
    def bits(number: int, *shape: int) -> np.ndarray:
        flat = [number >> i & 1 for i in range(math.prod(shape))]
        return np.asarray(flat, bool).reshape(shape)

    masks = {"first": bits(first, 4, 6), "bias": None, "last": bits(last, 3, 2)}
    pooled = masks["first"].any(0).reshape(3, 2).any(1)
    expected = bool((pooled[:, None] & masks["last"]).any())
    assert ms.connected(chain, CHAIN, masks, POINT) == expected
    found = ms.collapse(masks, apply_fn=chain, params=CHAIN, inputs=POINT)
    empty = tuple(k for k in ("first", "last") if not masks[k].any())
    assert found == ms.Collapse(empty, expected)
    assert ms.collapse(masks) == ms.Collapse(empty, None)


def test_connected_neither_overflows_nor_vanishes() -> None:
    # 512^15 paths, and more of them with shortcuts: too many for float32, in which this
    # network insists on computing.
    params = {f"{i:02}": jnp.zeros((512, 512)) for i in range(15)}
    masks = {k: np.ones((512, 512), bool) for k in params}

    def apply(params: Any, x: Any, shortcut: bool = False) -> Any:
        for w in params.values():
            x = x.astype(jnp.float32)
            y = jax.nn.relu(x @ w.astype(jnp.float32))
            x = x + y if shortcut else y
        return x

    point = jax.ShapeDtypeStruct((1, 512), jnp.float32)
    assert ms.connected(apply, params, masks, point)
    # A path of single weights.
    for w in masks.values():
        w[:] = False
        w[3, 3] = True
    assert ms.connected(apply, params, masks, point)
    masks["07"][3] = False
    assert not ms.connected(apply, params, masks, point)
    residual = functools.partial(apply, shortcut=True)
    assert ms.connected(residual, params, masks, point)


def test_connected_refuses_what_it_cannot_follow() -> None:
    def normed(params: Any, x: Any) -> Any:
        return jax.nn.standardize(x) @ params["w"]

    params = {"w": jnp.ones((4, 3))}
    with pytest.raises(ValueError, match="even with nothing pruned"):
        ms.connected(normed, params, {"w": np.zeros((4, 3), bool)}, POINT)


def test_collapse_is_warned_of_refused_or_ignored() -> None:
    # The second leaf is a thousand times smaller, and goes first.
    params = {"a": jnp.ones((4, 4)), "b": jnp.full((4, 4), 1e-3)}
    with pytest.warns(UserWarning, match=r"no active weight is left at 'b'.*connected"):
        masks = ms.magnitude(params, 0.5)
    assert ms.collapse(masks).empty == ("b",)
    with pytest.raises(ValueError, match="no active weight is left at 'b'"):
        ms.magnitude(params, 0.5, on_collapse="error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trees.assert_same(ms.magnitude(params, 0.5, on_collapse="ignore"), masks)
        ms.magnitude(params, 0.4, on_collapse="error")


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda p: ms.magnitude(p, 1.0), ValueError, r"sparsity must be in \[0, 1\)"),
        (lambda p: ms.magnitude(p, "0.9"), TypeError, "sparsity must be a number"),
        (lambda p: ms.magnitude(p, 0.9, scope="all"), ValueError, "scope must be"),
        (
            lambda p: ms.magnitude(p, 0.9, on_collapse="raise"),
            ValueError,
            "on_collapse must be",
        ),
        (lambda p: ms.magnitude({}, 0.9), ValueError, "params has no leaves"),
        (lambda p: ms.random(p, 0.9, key=0), TypeError, "key must be one jax.random"),
        (
            lambda p: ms.random(p, 0.9, key=jax.random.key(0), distribution="x"),
            ValueError,
            "distribution must be",
        ),
        (lambda p: ms.select({"a": None}, 0.5), ValueError, "scores holds no array"),
        (
            lambda p: ms.shuffle(p, jax.random.split(jax.random.key(0))),
            TypeError,
            "key",
        ),
        (
            lambda p: ms.from_score(scores.gradient, p, 0.5),
            ValueError,
            "needs the dense gradient",
        ),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call(make_params())
