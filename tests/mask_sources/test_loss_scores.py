"""SNIP, iterative SNIP, FORCE and GraSP against derivatives by NumPy.

The oracle knows only the loss. It takes first derivatives by the complex step, which is
exact to rounding, and second ones by central differences of those.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import granet_jax
from granet_jax import distributions, masking
from granet_jax import mask_sources as ms
from tests.helpers import trees
from tests.mask_sources.helpers import largest

TEMPERATURE = 4.0
SIZE = 3 * 5 + 5 * 4


def example(seed: int) -> tuple[Any, tuple[np.ndarray, np.ndarray]]:
    """Parameters of a network with 3, 5 and 4 units, and 8 examples with labels."""
    rng = np.random.default_rng(seed)
    params = {
        "a": rng.normal(size=(3, 5)),
        "bias": rng.normal(size=5),
        "b": rng.normal(size=(5, 4)),
    }
    return params, (rng.normal(size=(8, 3)), rng.integers(4, size=8))


def apply(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["a"] + params["bias"][None]) @ params["b"]


LOSS = ms.cross_entropy(apply, temperature=TEMPERATURE)


def loss(params: Any, weights: np.ndarray, batch: Any) -> Any:
    """The same loss by NumPy, of the weights of both kernels in one complex vector."""
    x, labels = batch
    a, b = weights[:15].reshape(3, 5), weights[15:].reshape(5, 4)
    logits = np.tanh(x @ a + params["bias"]) @ b / TEMPERATURE
    true = logits[np.arange(len(labels)), labels]
    return np.mean(np.log(np.sum(np.exp(logits), axis=1)) - true)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(tree[k]).ravel() for k in "ab"])


def derivative(f: Callable[[np.ndarray], Any], at: np.ndarray) -> np.ndarray:
    steps = 1e-30j * np.eye(at.size)
    return np.array([f(at + step).imag / 1e-30 for step in steps])


def gradient(params: Any, weights: np.ndarray, batch: Any) -> np.ndarray:
    return derivative(lambda w: loss(params, w, batch), weights)


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def test_snip_scores_are_derivatives_by_the_mask() -> None:
    params, batch = example(0)
    weights = flat(params)
    by_mask = derivative(lambda c: loss(params, c * weights, batch), np.ones(SIZE))
    found = ms.snip_scores(LOSS, params, [batch])
    assert masking.is_masked_node(found["bias"])
    np.testing.assert_allclose(flat(found), np.abs(by_mask), rtol=1e-12)


def test_grasp_scores_against_an_explicit_hessian() -> None:
    params, batch = example(1)
    weights, h = flat(params), 1e-5
    differences = [
        gradient(params, weights + d, batch) - gradient(params, weights - d, batch)
        for d in h * np.eye(SIZE)
    ]
    g = gradient(params, weights, batch)
    expected = weights * (np.stack(differences) / (2 * h) @ g)
    found = flat(ms.grasp_scores(LOSS, params, [batch]))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
    assert (found < 0).any()
    assert (found > 0).any()
    # Shrinking the weight with the highest score lowers norm(g)^2 by twice the score.
    shrunk = weights * (1.0 - 1e-6 * largest([found], 1)[0])
    after = gradient(params, shrunk, batch)
    np.testing.assert_allclose((after @ after - g @ g) / 1e-6, -2 * found.max(), 1e-3)
    # That weight is the first to stay, and the most negative score the first to go.
    masks = ms.grasp(LOSS, params, [batch], 0.5)
    np.testing.assert_array_equal(flat(masks), largest([expected], 18)[0])


@pytest.mark.parametrize("revive", [False, True])
def test_rounds_against_numpy(revive: bool) -> None:
    params, batch = example(2)
    weights, keep, masks = flat(params), np.ones(SIZE, bool), []
    for k in (1, 2, 3, 4):
        g = gradient(params, np.where(keep, weights, 0.0), batch)
        number = distributions.total_count(SIZE, 1.0 - 0.2 ** (k / 4))
        scores = np.abs(weights * g)
        ranks = scores if revive else np.where(keep, scores, -1.0)
        (keep,) = largest([ranks], number)
        masks.append(keep)
    # The example is one in which weights do return if they may.
    back = any((later & ~earlier).any() for earlier, later in itertools.pairwise(masks))
    assert back == revive
    source = ms.force if revive else ms.snip
    found = source(LOSS, params, [batch], 0.8, rounds=4)
    np.testing.assert_array_equal(flat(found), masks[-1])
    # With one round, both are SNIP.
    once = source(LOSS, params, [batch], 0.8, rounds=1)
    scores = np.abs(weights * gradient(params, weights, batch))
    np.testing.assert_array_equal(flat(once), largest([scores], 7)[0])


def test_several_batches() -> None:
    params, (x, labels) = example(3)
    halves = [(x[:4], labels[:4]), (x[4:], labels[4:])]
    for scores in (ms.snip_scores, ms.grasp_scores):
        whole = flat(scores(LOSS, params, [(x, labels)]))
        np.testing.assert_allclose(flat(scores(LOSS, params, halves)), whole, rtol=1e-9)
    # Every batch has the same weight, and the absolute value comes after the mean.
    unequal = [halves[0], (x, labels)]
    mean = sum(gradient(params, flat(params), batch) for batch in unequal) / 2
    expected = np.abs(flat(params) * mean)
    found = flat(ms.snip_scores(LOSS, params, iter(unequal)))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


# --- Several devices. The values are whole numbers, so sums are exact in any order.


def whole_loss(params: Any, x: Any) -> Any:
    return jnp.mean(jnp.square(jnp.sum(x @ params["a"] @ params["b"], axis=-1)) / 2)


def on_devices(axis_name: str | None, params: Any, x: Any) -> Any:
    """Scores and masks, from the examples of this device."""
    at = {"axis_name": axis_name}
    return (
        ms.snip_scores(whole_loss, params, [x], **at),
        ms.grasp_scores(whole_loss, params, [x], **at),
        ms.snip(whole_loss, params, [x], 0.5, rounds=1, **at),
        ms.force(whole_loss, params, [x], 0.5, rounds=2, **at),
    )


def test_devices_agree_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 8), "b": (8, 4), "x": (8, 4)}
    with jax.enable_x64(False):
        params = {k: np.float32(rng.integers(-1, 2, size=s)) for k, s in shapes.items()}
        x = params.pop("x")
        expected = jax.device_get(on_devices(None, params, x))
        mapped = jax.pmap(
            functools.partial(on_devices, "data"),
            axis_name="data",
            in_axes=(None, 0),
            devices=jax.devices()[:4],
        )(params, x.reshape(4, 2, 4))
        for device in range(4):
            one = jax.tree.map(lambda v, d=device: np.asarray(v)[d], mapped)
            trees.assert_same(one, expected)
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        # A traced function. `shard_map` checks that all devices have the same results.
        sharded = jax.jit(
            jax.shard_map(
                functools.partial(on_devices, "data"),
                mesh=mesh,
                in_specs=(P(), P("data")),
                out_specs=P(),
            )
        )(params, x)
        trees.assert_same(jax.device_get(sharded), expected)
        # The same with sharded parameters and batches, and no mapped axis.
        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=2 * (AxisType.Auto,))
        params = jax.device_put(params, NamedSharding(mesh, P(None, "model")))
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        found = on_devices(None, params, x)
        trees.assert_same(jax.device_get(found), expected)
        for k, mask in found[-1].items():
            assert mask.sharding.is_equivalent_to(params[k].sharding, 2)


# --- Numerics and errors.


def test_scores_of_bfloat16_parameters_are_float32() -> None:
    params, batch = jax.tree.map(jnp.asarray, example(6))
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    for scores in (ms.snip_scores, ms.grasp_scores):
        assert scores(LOSS, half, [batch])["a"].dtype == jnp.float32
    masks = ms.snip(LOSS, half, [batch], 0.8, rounds=2)
    assert granet_jax.sparsity(masks).active == 7


def test_bad_data_is_refused() -> None:
    params, (x, labels) = example(0)
    with pytest.raises(TypeError, match="labels of dtype float64"):
        ms.snip(LOSS, params, [(x, 1.0 * labels)], 0.5)
    x[0, 0] = np.nan
    for source in (ms.snip, ms.grasp):
        with pytest.raises(ValueError, match=r"scores must be finite.*'a', 'b'"):
            source(LOSS, params, [(x, labels)], 0.5)
