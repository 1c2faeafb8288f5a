"""The lookahead score: the distortion it measures, as a source and in training."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import granet_jax
from granet_jax import mask_sources as ms
from granet_jax import scores
from tests.helpers import trees


def inputs_of(params: dict[str, Any], name: str) -> granet_jax.ScoreInputs:
    return granet_jax.ScoreInputs(
        param=params[name],
        grad=None,
        mask=jnp.ones(params[name].shape, bool),
        accumulator=None,
        key=jax.random.key(0),
        name=name,
        weights=params,
    )


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def test_it_is_the_distortion_of_the_product() -> None:
    params = draw({"b": (5, 6), "a": (4, 5), "c": (6, 3), "side": (7, 7)})
    score = scores.lookahead(["a", "b", "c"])
    a, b, c = (np.asarray(params[k], np.float64) for k in "abc")
    found = {k: np.asarray(score(inputs_of(params, k))) for k in params}
    for i, j in np.ndindex(b.shape):
        without = b.copy()
        without[i, j] = 0.0
        change = np.linalg.norm(a @ (b - without) @ c)
        np.testing.assert_allclose(found["b"][i, j], change, rtol=1e-5)
    # At the ends, of the product of two; beside the chain, plain magnitude.
    for i, j in np.ndindex(a.shape):
        np.testing.assert_allclose(
            found["a"][i, j], abs(a[i, j]) * np.linalg.norm(b[j]), rtol=1e-5
        )
    for i, j in np.ndindex(c.shape):
        np.testing.assert_allclose(
            found["c"][i, j], abs(c[i, j]) * np.linalg.norm(b[:, i]), rtol=1e-5
        )
    np.testing.assert_array_equal(found["side"], np.abs(params["side"]))


def test_convolutions_and_a_flattened_one() -> None:
    # 2 positions of 4 channels go into the last layer, the channels fastest.
    shapes = {"conv_1": (3, 3, 2, 5), "conv_2": (3, 1, 5, 4), "dense": (8, 6)}
    params = draw(shapes)
    score = scores.lookahead(tuple(shapes))
    first, second, last = (np.asarray(params[k], np.float64) for k in shapes)
    found = {k: np.asarray(score(inputs_of(params, k))) for k in shapes}
    for at in np.ndindex(second.shape):
        into = np.linalg.norm(first[:, :, :, at[2]])
        out = np.linalg.norm(last.reshape(2, 4, 6)[:, at[3]])
        np.testing.assert_allclose(
            found["conv_2"][at], abs(second[at]) * into * out, rtol=1e-5
        )
    for i, j in np.ndindex(last.shape):
        into = np.linalg.norm(second[..., i % 4])
        np.testing.assert_allclose(
            found["dense"][i, j], abs(last[i, j]) * into, rtol=1e-5
        )
    np.testing.assert_allclose(
        found["conv_1"],
        np.abs(first) * np.sqrt(np.sum(second**2, axis=(0, 1, 3))),
        rtol=1e-5,
    )


# Squares that sum to squares of whole numbers: exact in any order, on any device.
SHAPES = {"one": (4, 8), "two": (8, 16), "three": (16, 4)}
ORDER = ("one", "two", "three")


def whole_numbers(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        k: jnp.asarray(rng.choice([-2.0, -1.0, 1.0, 2.0], size=s), jnp.float32)
        for k, s in SHAPES.items()
    }


def reference(params: dict[str, Any], masks: dict[str, Any], keep: int) -> Any:
    """The masks after pruning: the same score by NumPy in float32, stably sorted."""
    left = {k: np.where(masks[k], params[k], 0).astype(np.float32) for k in ORDER}
    one, two, three = left.values()

    def norm(x: np.ndarray, axis: int) -> np.ndarray:
        return np.sqrt(np.sum(x * x, axis=axis, dtype=np.float32))

    found = [
        np.abs(one) * norm(two, 1)[None],
        np.abs(two) * norm(one, 0)[:, None] * norm(three, 1)[None],
        np.abs(three) * norm(two, 0)[:, None],
    ]
    flat = np.concatenate([x.ravel() for x in found])
    flat[~np.concatenate([np.ravel(masks[k]) for k in ORDER])] = -1.0
    chosen = np.zeros(flat.size, bool)
    chosen[np.argsort(-flat, kind="stable")[:keep]] = True
    parts = np.split(chosen, np.cumsum([x.size for x in found])[:-1])
    return {k: p.reshape(SHAPES[k]) for k, p in zip(ORDER, parts, strict=True)}


def test_as_a_source() -> None:
    params = whole_numbers(0)
    # Leaves of a dictionary come by name: given in that order, ties fall alike.
    renamed = {str(i): params[k] for i, k in enumerate(ORDER)}
    masks = ms.from_score(
        scores.lookahead(["0", "1", "2"]), renamed, 0.6, on_collapse="ignore"
    )
    everything = {k: np.ones(s, bool) for k, s in SHAPES.items()}
    expected = reference(params, everything, 90)
    for i, k in enumerate(ORDER):
        np.testing.assert_array_equal(masks[str(i)], expected[k])


@pytest.mark.parametrize("sharded", [False, True])
def test_as_the_pruning_score_of_a_method(sharded: bool) -> None:
    params = {str(i): whole_numbers(0)[k] for i, k in enumerate(ORDER)}
    method = dataclasses.replace(
        granet_jax.gmp(0.6, 2, interval=1), prune=scores.lookahead(["0", "1", "2"])
    )
    tx = granet_jax.transform(method, optax.sgd(0.0))
    if sharded:
        mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=2 * (AxisType.Auto,))
        params = jax.device_put(params, NamedSharding(mesh, P("x", "y")))
    state = tx.init(params)
    step = jax.jit(tx.update)
    present = {k: np.ones(s, bool) for k, s in SHAPES.items()}
    for _ in range(2):
        grads = jax.tree.map(jnp.zeros_like, params)
        updates, state = step(grads, state, params)
        # The weights that were pruned no longer count for their neighbours.
        current = {k: np.asarray(params[str(i)]) for i, k in enumerate(ORDER)}
        keep = granet_jax.sparsity(state.masks).active
        expected = reference(current, present, keep)
        params = optax.apply_updates(params, updates)
        present = {k: np.asarray(state.masks[str(i)]) for i, k in enumerate(ORDER)}
        trees.assert_same(present, expected)
    assert keep == 90


def test_neighbours_are_those_left_by_the_pruning_before() -> None:
    # An exchange after pruning in the same update: the drop score sees what is left.
    seen = []

    def spy(inputs: granet_jax.ScoreInputs) -> Any:
        assert set(inputs.weights) == set(SHAPES)
        left = sum(jnp.count_nonzero(w) for w in inputs.weights.values())
        jax.debug.callback(lambda n: seen.append(int(n)), left)
        return jnp.abs(inputs.param)

    method = dataclasses.replace(
        granet_jax.granet(0.5, 4, interval=2, end_step=2), drop=spy
    )
    params = whole_numbers(1)
    tx = granet_jax.transform(method, optax.sgd(0.0))
    state = tx.init(params)._replace(count=jnp.int32(1))
    tx.update(params, state, params)
    jax.effects_barrier()
    assert set(seen) == {112}


@pytest.mark.parametrize(
    ("order", "error", "match"),
    [
        ("ab", TypeError, "sequence of leaf names"),
        (["a", 1], TypeError, "sequence of leaf names"),
        (["a"], ValueError, "two or more"),
        (["a", "b", "a"], ValueError, "none twice"),
    ],
)
def test_bad_orders(order: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        scores.lookahead(order)


@pytest.mark.parametrize(
    ("order", "match"),
    [
        (["a", "x"], "order names 'x', which is no maskable leaf: there are 'a', 'b'"),
        (["b", "a"], r"'a' of shape \(4, 5\) after 'b' of 6 outputs"),
        (["a", "v"], "order names 'v' of shape"),
        (["v", "a"], "order names 'v' of shape"),
    ],
)
def test_leaves_that_do_not_chain(order: Any, match: str) -> None:
    params = draw({"a": (4, 5), "b": (5, 6), "v": (5,)})
    with pytest.raises(ValueError, match=match):
        ms.from_score(scores.lookahead(order), params, 0.5, where=lambda *_: True)
