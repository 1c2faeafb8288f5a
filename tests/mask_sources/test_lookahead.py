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
from granet_jax import schedules, scores
from granet_jax.phases import Exchange, Prune
from tests.helpers import trees
from tests.helpers.training import make_step
from tests.mask_sources.helpers import draw, largest


def evaluate(score: Any, params: dict[str, Any]) -> tuple[Any, Any]:
    """The score of every leaf, and the weights in float64."""
    inputs = granet_jax.ScoreInputs(
        param=jnp.zeros(0),
        grad=None,
        mask=jnp.ones(0, bool),
        average=None,
        key=jax.random.key(0),
        weights=params,
    )
    found = {
        name: np.asarray(score(inputs._replace(name=name, param=p)))
        for name, p in params.items()
    }
    return found, {k: np.asarray(p, np.float64) for k, p in params.items()}


def test_it_is_the_distortion_of_the_product() -> None:
    params = draw({"b": (5, 6), "a": (4, 5), "c": (6, 3), "side": (7, 7)})
    found, weights = evaluate(scores.lookahead(["a", "b", "c"]), params)
    a, b, c = (weights[k] for k in "abc")
    for i, j in np.ndindex(b.shape):
        without = b.copy()
        without[i, j] = 0.0
        change = np.linalg.norm(a @ (b - without) @ c)
        np.testing.assert_allclose(found["b"][i, j], change, rtol=1e-5)
    # The ends of the chain have one neighbour, and other leaves have none.
    out, into = np.linalg.norm(b, axis=1), np.linalg.norm(b, axis=0)
    np.testing.assert_allclose(found["a"], np.abs(a) * out, rtol=1e-5)
    np.testing.assert_allclose(found["c"], np.abs(c) * into[:, None], rtol=1e-5)
    np.testing.assert_array_equal(found["side"], np.abs(params["side"]))


def test_convolutions_and_a_flattened_one() -> None:
    # 2 positions of 4 channels go into the last layer, the channels fastest.
    shapes = {"conv_1": (3, 3, 2, 5), "conv_2": (3, 1, 5, 4), "dense": (8, 6)}
    found, weights = evaluate(scores.lookahead(tuple(shapes)), draw(shapes))
    first, second, last = (weights[k] for k in shapes)
    into = np.sqrt(np.sum(first**2, axis=(0, 1, 2)))[:, None]
    out = np.sqrt(np.sum(last.reshape(2, 4, 6) ** 2, axis=(0, 2)))
    expected = np.abs(second) * into * out
    np.testing.assert_allclose(found["conv_2"], expected, rtol=1e-5)
    into = np.tile(np.sqrt(np.sum(second**2, axis=(0, 1, 2))), 2)[:, None]
    np.testing.assert_allclose(found["dense"], np.abs(last) * into, rtol=1e-5)
    out = np.sqrt(np.sum(second**2, axis=(0, 1, 3)))
    np.testing.assert_allclose(found["conv_1"], np.abs(first) * out, rtol=1e-5)


SHAPES = {"0": (4, 8), "1": (8, 16), "2": (16, 4)}
SCORE = scores.lookahead(["0", "1", "2"])


def whole_numbers() -> dict[str, Any]:
    """Weights whose sums of squares are exact in any order, on any devices."""
    rng = np.random.default_rng(0)
    return {
        k: jnp.asarray(rng.choice([-2.0, -1.0, 1.0, 2.0], size=s), jnp.float32)
        for k, s in SHAPES.items()
    }


def pruned(params: dict[str, Any], masks: dict[str, Any], keep: int) -> Any:
    """The masks after pruning by the same score, in float32 by NumPy."""
    left = {k: np.where(masks[k], params[k], 0).astype(np.float32) for k in SHAPES}
    one, two, three = left.values()

    def norm(x: np.ndarray, axis: int) -> np.ndarray:
        return np.sqrt(np.sum(x * x, axis=axis, dtype=np.float32))

    found = [
        np.abs(one) * norm(two, 1)[None],
        np.abs(two) * norm(one, 0)[:, None] * norm(three, 1)[None],
        np.abs(three) * norm(two, 0)[:, None],
    ]
    ranks = [np.where(masks[k], x, -1.0) for k, x in zip(SHAPES, found, strict=True)]
    return dict(zip(SHAPES, largest(ranks, keep), strict=True))


def test_as_a_source_and_as_the_pruning_score_on_four_devices() -> None:
    everywhere = {k: np.ones(s, bool) for k, s in SHAPES.items()}
    masks = ms.from_score(SCORE, whole_numbers(), 0.6, on_collapse="ignore")
    trees.assert_same(masks, pruned(whole_numbers(), everywhere, 90))
    method = dataclasses.replace(
        granet_jax.gmp(0.6, 2, interval=1), phases=(Prune(by=SCORE),)
    )
    tx = granet_jax.transform(method, optax.sgd(0.0))
    step = jax.jit(make_step(tx))
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=2 * (AxisType.Auto,))
    params = jax.device_put(whole_numbers(), NamedSharding(mesh, P("x", "y")))
    state, grads = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    present, keep = everywhere, 0
    for _ in range(2):
        before = params
        params, state = step(params, state, grads)
        masks = granet_jax.get_masks(state)
        keep = granet_jax.sparsity(masks).active
        # Weights pruned in the first step no longer count for their neighbours.
        present = pruned(before, present, keep)
        trees.assert_same(masks, present)
    assert keep == 90


def test_a_drop_score_sees_the_weights_that_pruning_has_left() -> None:
    """An exchange after pruning in the same update."""
    seen = []

    def spy(inputs: granet_jax.ScoreInputs) -> Any:
        assert set(inputs.weights) == set(SHAPES)
        left = sum(jnp.count_nonzero(w) for w in inputs.weights.values())
        jax.debug.callback(lambda n: seen.append(int(n)), left)
        return jnp.abs(inputs.param)

    method = granet_jax.granet(0.5, 4, interval=2, end_step=2)
    exchange = Exchange(schedules.constant(0.5), drop=spy)
    method = dataclasses.replace(method, phases=(Prune(), exchange))
    params = whole_numbers()
    tx = granet_jax.transform(method, optax.sgd(0.0))
    state = tx.init(params)._replace(count=jnp.int32(1))
    jax.jit(tx.update)(params, state, params)
    jax.effects_barrier()
    assert set(seen) == {112}


@pytest.mark.parametrize(
    ("order", "match"),
    [
        (["a", "x"], "order names 'x', which is no maskable leaf: there are 'a', 'b'"),
        (["b", "a"], r"'a' of shape \(4, 5\) after 'b' of 6 outputs"),
        (["a", "v"], "order names 'v' of shape"),
        (["v", "a"], "order names 'v' of shape"),
    ],
)
def test_leaves_that_are_not_a_chain_are_refused(order: Any, match: str) -> None:
    params = draw({"a": (4, 5), "b": (5, 6), "v": (5,)})
    with pytest.raises(ValueError, match=match):
        ms.from_score(scores.lookahead(order), params, 0.5, where=lambda *_: True)
