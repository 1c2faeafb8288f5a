"""SNIP, iterative SNIP, FORCE and GraSP against derivatives taken by NumPy.

The oracle knows the loss only: first derivatives by the complex step, which are exact
to rounding, second ones by central differences of those.
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

TEMPERATURE = 4.0
WEIGHTS = 3 * 5 + 5 * 4


def make(seed: int) -> tuple[Any, tuple[np.ndarray, np.ndarray]]:
    """Parameters of a network of 3, 5 and 4 units, and 8 examples with labels."""
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
    """The same by NumPy, of all weights of both kernels in one complex vector."""
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


def best(scores: np.ndarray, k: int) -> np.ndarray:
    chosen = np.zeros(scores.size, bool)
    chosen[np.argsort(-scores, kind="stable")[:k]] = True
    return chosen


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def test_snip_scores_are_derivatives_by_the_mask() -> None:
    params, batch = make(0)
    weights = flat(params)
    by_mask = derivative(lambda c: loss(params, c * weights, batch), np.ones(WEIGHTS))
    found = ms.snip_scores(LOSS, params, [batch])
    assert masking.is_masked_node(found["bias"])
    np.testing.assert_allclose(flat(found), np.abs(by_mask), rtol=1e-12)


def test_grasp_scores_by_an_explicit_hessian() -> None:
    params, batch = make(1)
    weights, h = flat(params), 1e-5
    hessian = np.stack(
        [
            (
                gradient(params, weights + d, batch)
                - gradient(params, weights - d, batch)
            )
            / (2 * h)
            for d in h * np.eye(WEIGHTS)
        ]
    )
    g = gradient(params, weights, batch)
    found = flat(ms.grasp_scores(LOSS, params, [batch]))
    expected = weights * (hessian @ g)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
    assert (found < 0).any()
    assert (found > 0).any()
    # To shrink the weight of the highest score lowers ||g||^2, by twice the score.
    shrunk = weights * (1.0 - 1e-6 * best(found, 1))
    after = gradient(params, shrunk, batch)
    np.testing.assert_allclose((after @ after - g @ g) / 1e-6, -2 * found.max(), 1e-3)
    # It is the first that stays, and the most negative the first that goes.
    masks = ms.grasp(LOSS, params, [batch], 0.5)
    np.testing.assert_array_equal(flat(masks), best(expected, 18))


@pytest.mark.parametrize("revive", [False, True])
def test_rounds_against_numpy(revive: bool) -> None:
    params, batch = make(2)
    weights, keep, masks = flat(params), np.ones(WEIGHTS, bool), []
    for k in (1, 2, 3, 4):
        g = gradient(params, np.where(keep, weights, 0.0), batch)
        number = distributions.total_count(WEIGHTS, 1.0 - 0.2 ** (k / 4))
        scores = np.abs(weights * g)
        keep = best(scores if revive else np.where(keep, scores, -1.0), number)
        masks.append(keep)
    back = any((later & ~earlier).any() for earlier, later in itertools.pairwise(masks))
    assert back == revive
    source = ms.force if revive else ms.snip
    found = source(LOSS, params, [batch], 0.8, rounds=4)
    np.testing.assert_array_equal(flat(found), masks[-1])
    # In one round both are SNIP.
    once = source(LOSS, params, [batch], 0.8, rounds=1)
    np.testing.assert_array_equal(
        flat(once), best(np.abs(weights * gradient(params, weights, batch)), 7)
    )


def test_several_batches() -> None:
    params, (x, labels) = make(3)
    halves = [(x[:4], labels[:4]), (x[4:], labels[4:])]
    for scores in (ms.snip_scores, ms.grasp_scores):
        whole = flat(scores(LOSS, params, [(x, labels)]))
        np.testing.assert_allclose(flat(scores(LOSS, params, halves)), whole, rtol=1e-9)
    # The modulus comes last, or this would be the sum of both halves' scores.
    parts = [flat(ms.snip_scores(LOSS, params, [half])) for half in halves]
    assert np.abs(flat(ms.snip_scores(LOSS, params, halves)) - sum(parts) / 2).max() > 0
    # Every batch counts alike.
    mean = sum(gradient(params, flat(params), b) for b in (halves[0], (x, labels))) / 2
    np.testing.assert_allclose(
        flat(ms.snip_scores(LOSS, params, iter([halves[0], (x, labels)]))),
        np.abs(flat(params) * mean),
        rtol=1e-12,
    )


def test_scaling_the_loss_leaves_the_masks() -> None:
    params, batch = make(4)
    for source in (ms.snip, ms.grasp):
        masks = source(LOSS, params, [batch], 0.7)
        scaled = source(lambda p, b: 8.0 * LOSS(p, b), params, [batch], 0.7)
        trees.assert_same(scaled, masks)


@pytest.mark.parametrize("sparsity", [0.9, 0.95, 0.98, 0.99, 0.999])
def test_counts_are_exact_where_all_scores_tie(sparsity: float) -> None:
    params = {"a": jnp.ones((40, 30)), "b": jnp.ones((30, 27))}

    def even(params: Any, batch: Any) -> Any:
        return batch * (jnp.sum(params["a"]) + jnp.sum(params["b"]))

    source = functools.partial(ms.snip, even, params, [1.0], on_collapse="ignore")
    keep = distributions.total_count(40 * 30 + 30 * 27, sparsity)
    np.testing.assert_array_equal(flat(source(sparsity)), np.arange(2010) < keep)
    shapes = [(40, 30), (30, 27)]
    found = source(sparsity, scope="layer", rounds=3).values()
    counts = distributions.counts(shapes, sparsity, "uniform")
    for mask, n in zip(found, counts, strict=True):
        np.testing.assert_array_equal(mask.ravel(), np.arange(mask.size) < n)


@pytest.mark.parametrize(
    "source",
    [
        functools.partial(ms.snip, rounds=3),
        functools.partial(ms.force, rounds=3, scope="layer"),
        ms.grasp,
    ],
)
def test_traced_is_the_same(source: Any) -> None:
    params, batch = jax.tree.map(jnp.asarray, make(5))

    def masks(params: Any, batch: Any) -> Any:
        return source(LOSS, params, [batch], 0.8)

    trees.assert_same(jax.jit(masks)(params, batch), masks(params, batch))


# --- Devices: with whole numbers, sums are exact in any order -------------------------


def whole_loss(params: Any, x: Any) -> Any:
    return jnp.mean(jnp.square(jnp.sum(x @ params["a"] @ params["b"], axis=-1)) / 2)


def whole_numbers() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    params = {
        "a": jnp.asarray(rng.integers(-1, 2, size=(4, 8)), jnp.float32),
        "b": jnp.asarray(rng.integers(-1, 2, size=(8, 4)), jnp.float32),
    }
    return params, jnp.asarray(rng.integers(-1, 2, size=(8, 4)), jnp.float32)


def on_devices(axis_name: str | None, params: Any, x: Any) -> Any:
    """Scores and masks, from this device's examples."""
    at = {"axis_name": axis_name}
    return (
        ms.snip_scores(whole_loss, params, [x], **at),
        ms.grasp_scores(whole_loss, params, [x], **at),
        ms.snip(whole_loss, params, [x], 0.5, rounds=2, **at),
        ms.force(whole_loss, params, [x], 0.5, rounds=2, **at),
    )


def test_devices_agree_to_the_bit() -> None:
    params, x = whole_numbers()
    with jax.enable_x64(False):
        expected = jax.device_get(on_devices(None, params, x))
        mapped = jax.pmap(
            functools.partial(on_devices, "data"),
            axis_name="data",
            in_axes=(None, 0),
            devices=jax.devices()[:4],
        )(params, x.reshape(4, 2, 4))
        for device in range(4):
            mine = jax.tree.map(lambda v, d=device: np.asarray(v)[d], mapped)
            trees.assert_same(mine, expected)
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        # That the results are the same on all devices is checked when it is traced.
        sharded = jax.jit(
            jax.shard_map(
                functools.partial(on_devices, "data"),
                mesh=mesh,
                in_specs=(P(), P("data")),
                out_specs=P(),
            )
        )(params, x)
        trees.assert_same(jax.device_get(sharded), expected)


def test_sharded_parameters_and_batches() -> None:
    params, x = whole_numbers()
    with jax.enable_x64(False):
        expected = jax.device_get(on_devices(None, params, x))
        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=2 * (AxisType.Auto,))
        params = jax.device_put(params, NamedSharding(mesh, P(None, "model")))
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        found = on_devices(None, params, x)
        trees.assert_same(jax.device_get(found), expected)
        for mask, p in zip(
            jax.tree.leaves(found[2]), jax.tree.leaves(params), strict=True
        ):
            assert mask.sharding.is_equivalent_to(p.sharding, 2)


# --- What is refused ------------------------------------------------------------------


def test_bfloat16_scores_in_float32() -> None:
    params, batch = jax.tree.map(jnp.asarray, make(6))
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    for scores in (ms.snip_scores, ms.grasp_scores):
        assert scores(LOSS, half, [batch])["a"].dtype == jnp.float32
    masks = ms.snip(LOSS, half, [batch], 0.8, rounds=2)
    assert granet_jax.sparsity(masks).active == 7


def test_not_finite() -> None:
    params, (x, labels) = make(0)
    x[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"scores must be finite.*'a', 'b'"):
        ms.snip(LOSS, params, [(x, labels)], 0.5)
    with pytest.raises(ValueError, match="scores must be finite"):
        ms.grasp(LOSS, params, [(x, labels)], 0.5)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda p, b: ms.snip(LOSS, p, [], 0.5), ValueError, "at least one batch"),
        (lambda p, b: ms.snip(LOSS, p, b[0], 0.5), TypeError, "put it into a list"),
        (lambda p, b: ms.snip(LOSS, p, 3, 0.5), TypeError, "must be iterable"),
        (
            lambda p, b: ms.snip(LOSS, p, iter([b]), 0.5, rounds=2),
            TypeError,
            "re-iterable because they are read 2 times",
        ),
        (lambda p, b: ms.force(LOSS, p, iter([b]), 0.5), TypeError, "re-iterable"),
        (lambda p, b: ms.grasp(LOSS, p, iter([b]), 0.5), TypeError, "re-iterable"),
        (lambda p, b: ms.snip(LOSS, p, [b], 0.5, rounds=0), ValueError, "rounds must"),
        (lambda p, b: ms.snip(LOSS, p, [b], 0.5, rounds=2.0), TypeError, "rounds must"),
        (lambda p, b: ms.snip(LOSS, p, [b], 1.5), ValueError, "sparsity must be in"),
        (lambda p, b: ms.grasp(LOSS, p, [b], 1.5), ValueError, "sparsity must be in"),
        (lambda p, b: ms.snip(LOSS, p, [b], 0.5, scope="x"), ValueError, "scope must"),
        (
            lambda p, b: ms.snip(LOSS, p, [(b[0], 1.0 * b[1])], 0.5),
            TypeError,
            "labels of dtype float64",
        ),
        (lambda p, b: ms.cross_entropy(apply, 0.0), ValueError, "temperature must be"),
        (lambda p, b: ms.cross_entropy(apply, "T"), TypeError, "temperature must be"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call(*make(0))
