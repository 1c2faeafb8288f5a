"""SynFlow against an enumeration of paths; conservation, overflow, collapse."""

import functools
import itertools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import granet_jax
from experiments import models
from granet_jax import distributions, masking
from granet_jax import mask_sources as ms
from tests.helpers import trees

SIZES = (3, 4, 5, 2)
NAMES = ("0", "1", "2")
POINT = jax.ShapeDtypeStruct((1, 3), jnp.float32)


def make(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in zip(NAMES, itertools.pairwise(SIZES), strict=True)
    }


def apply(params: Any, x: Any) -> Any:
    x = jax.nn.relu(x @ params["0"])
    x = jax.nn.relu(x @ params["1"])
    return x @ params["2"]


def enumerated(weights: list[np.ndarray]) -> list[np.ndarray]:
    """For every weight, the sum over the paths through it of |their product|."""
    scores = [np.zeros(w.shape) for w in weights]
    for path in itertools.product(*map(range, SIZES)):
        edges = list(itertools.pairwise(path))
        flow = np.prod([abs(w[e]) for w, e in zip(weights, edges, strict=True)])
        for score, e in zip(scores, edges, strict=True):
            score[e] += flow
    return scores


def test_scores_by_enumerating_paths() -> None:
    params = make()
    weights = [np.asarray(params[k], np.float64) for k in NAMES]
    found = ms.synflow_scores(apply, params, POINT)
    total = None
    for name, expected in zip(NAMES, enumerated(weights), strict=True):
        assert found[name].dtype == np.float64
        np.testing.assert_allclose(found[name], expected, rtol=1e-12)
        # Every layer is a cut: its scores sum to R.
        total = expected.sum() if total is None else total
        np.testing.assert_allclose(np.sum(np.asarray(found[name])), total, rtol=1e-12)
    np.testing.assert_allclose(
        total,
        np.abs(weights[0]).sum(0) @ np.abs(weights[1]) @ np.abs(weights[2]).sum(1),
        rtol=1e-12,
    )


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_rounds_against_enumeration(scope: Any) -> None:
    params = make(1)
    weights = [np.asarray(params[k], np.float64) for k in NAMES]
    masks = [np.ones(w.shape, bool) for w in weights]
    counts: Any = None
    for k in range(1, 6):
        live = [np.where(m, w, 0.0) for m, w in zip(masks, weights, strict=True)]
        scores = enumerated(live)
        ranked = [np.where(m, s, -1.0) for m, s in zip(masks, scores, strict=True)]
        share = 1.0 - 0.3 ** (k / 5)
        before = masks
        if scope == "global":
            keep = distributions.total_count(42, share)
            order = np.argsort(
                -np.concatenate([r.ravel() for r in ranked]), kind="stable"
            )
            flat = np.zeros(42, bool)
            flat[order[:keep]] = True
            masks = [
                part.reshape(w.shape)
                for part, w in zip(np.split(flat, [12, 32]), weights, strict=True)
            ]
        else:
            shapes = [w.shape for w in weights]
            counts = distributions.counts(shapes, share, "uniform", counts)
            masks = []
            for r, n in zip(ranked, counts, strict=True):
                flat = np.zeros(r.size, bool)
                flat[np.argsort(-r.ravel(), kind="stable")[:n]] = True
                masks.append(flat.reshape(r.shape))
        assert not any((m & ~b).any() for m, b in zip(masks, before, strict=True))
    found = ms.synflow(apply, params, POINT, 0.7, rounds=5, scope=scope)
    for name, mask in zip(NAMES, masks, strict=True):
        np.testing.assert_array_equal(found[name], mask)
    # In a traced function, float64 all the same.
    traced = jax.jit(lambda p: ms.synflow(apply, p, POINT, 0.7, rounds=5, scope=scope))(
        params
    )
    trees.assert_same(jax.device_get(traced), jax.device_get(found))


def test_all_parameters_are_made_absolute() -> None:
    def biased(params: Any, x: Any) -> Any:
        hidden = jax.nn.relu(
            x @ params["0"] * params["scale"][None] + params["b"][None]
        )
        return hidden @ params["1"]

    rng = np.random.default_rng(0)
    shapes = {"0": (3, 4), "1": (4, 2), "b": (4,), "scale": (4,)}
    params = {
        k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()
    }
    w, v, b, scale = (np.abs(np.asarray(params[k], np.float64)) for k in shapes)
    found = ms.synflow_scores(biased, params, POINT)
    assert masking.is_masked_node(found["b"])
    assert masking.is_masked_node(found["scale"])
    np.testing.assert_allclose(found["0"], w * scale * v.sum(1), rtol=1e-12)
    hidden = w.sum(0) * scale + b
    np.testing.assert_allclose(found["1"], hidden[:, None] * v, rtol=1e-12)


def deep(params: Any, x: Any) -> Any:
    """Sixty residual layers: R is far beyond float32."""

    def layer(x: Any, w: Any) -> tuple[Any, None]:
        return x + jax.nn.relu(x @ w), None

    return jax.lax.scan(layer, x, params["layers"])[0] @ params["last"]


def deep_params() -> Any:
    rng = np.random.default_rng(0)
    shapes = {"layers": (60, 8, 8), "last": (8, 3)}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def test_beyond_float32() -> None:
    params, point = deep_params(), jax.ShapeDtypeStruct((1, 8), jnp.float32)
    scores = ms.synflow_scores(deep, params, point)
    last = np.asarray(scores["last"])
    layers = np.asarray(scores["layers"]).sum((1, 2))
    assert 1e40 < last.sum() < np.inf
    # The last layer is a cut; one beside a shortcut carries a part of the flow.
    assert np.all((layers > 0) & (layers < last.sum()))
    masks = ms.synflow(deep, params, point, 0.9, rounds=2, on_collapse="ignore")
    assert granet_jax.sparsity(masks).active == 386
    assert ms.connected(deep, params, masks, point)


def test_a_network_that_insists_on_float32_overflows() -> None:
    def narrow(params: Any, x: Any) -> Any:
        return deep(*jax.tree.map(lambda v: v.astype(jnp.float32), (params, x)))

    point = jax.ShapeDtypeStruct((1, 8), jnp.float32)
    with pytest.raises(ValueError, match=r"flow R .* must be finite.*dtype=None"):
        ms.synflow(narrow, deep_params(), point, 0.9, rounds=2)
    with pytest.raises(ValueError, match=r"flow R .* must be finite"):
        ms.synflow_scores(narrow, deep_params(), point)


def test_many_rounds_keep_a_chain_connected_where_one_does_not() -> None:
    # A layer's weights share R: in one round, the layers of most weights go.
    sizes = {"0": (8, 40), "1": (40, 40), "2": (40, 4)}
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in sizes.items()}
    point = jax.ShapeDtypeStruct((1, 8), jnp.float32)
    with pytest.warns(UserWarning, match="no active weight is left at '1'; no path is"):
        once = ms.synflow(apply, params, point, 0.99, rounds=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks = ms.synflow(apply, params, point, 0.99)
    assert ms.collapse(masks).empty == ()
    assert granet_jax.sparsity(masks).active == granet_jax.sparsity(once).active == 21


def test_empty_leaves_beside_a_shortcut_cut_nothing() -> None:
    model, x = models.create("resnet-20", classes=10), jnp.zeros((1, 8, 8, 3))
    shapes = jax.eval_shape(lambda k: model.init(k, x, False), jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> Any:
        """As at initialisation: He-normal kernels, norms that change nothing."""
        name = masking.leaf_name(path)
        if name.endswith("kernel"):
            deviation = np.sqrt(2 / np.prod(leaf.shape[:-1]))
            return jnp.asarray(rng.normal(size=leaf.shape) * deviation, leaf.dtype)
        one = name.endswith(("scale", "var"))
        return jnp.full(leaf.shape, float(one), leaf.dtype)

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    params = variables["params"]

    def resnet(params: Any, x: Any) -> Any:
        return model.apply({**variables, "params": params}, x, False)

    with pytest.warns(UserWarning, match="'group_3_.*is still connected from input"):
        masks = ms.synflow(resnet, params, x, 0.999, rounds=50, where=models.maskable)
    empty = ms.collapse(masks).empty
    assert empty
    assert all("_block_" in name for name in empty)
    assert granet_jax.sparsity(masks).active == 271
    # Magnitude empties a leaf of this network from about 99.1% on.
    few, many = (
        ms.magnitude(params, s, where=models.maskable, on_collapse="ignore")
        for s in (0.985, 0.995)
    )
    assert not ms.collapse(few).empty
    assert ms.collapse(many).empty


def test_vgg_stays_connected_down_to_one_weight_a_layer() -> None:
    """The maximal critical compression of a chain of 13 convolutions and a classifier.

    Some 15 seconds: all 100 rounds are needed.
    """
    model, x = models.create("vgg-16", classes=10), jnp.zeros((1, 16, 16, 3))
    variables = model.init(jax.random.key(0), x, False)
    params = variables["params"]

    def vgg(params: Any, x: Any) -> Any:
        return model.apply({**variables, "params": params}, x, False)

    total = 14_715_584
    masks = ms.synflow(vgg, params, x, 1 - 14 / total, where=models.maskable)
    assert [int(m.sum()) for m in jax.tree.leaves(masks)] == 14 * [1]
    assert ms.connected(vgg, params, masks, x)


@pytest.mark.parametrize("name", ["resnet-18-cifar", "resnet-20", "vgg-16"])
def test_magnitude_empties_a_layer_where_the_initial_spread_says(name: str) -> None:
    """Weights uniform in +-1/sqrt(fan-in), PyTorch's default, have a closed form.

    The layer of the largest fan-in is empty once the threshold exceeds its bound: from
    86.4%, 88.6% and 99.87% on.
    """
    model = models.create(name, classes=10)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(0), image
    )
    rng = np.random.default_rng(0)
    bounds = []

    def draw(path: Any, leaf: Any) -> Any:
        if not models.maskable(masking.leaf_name(path), leaf):
            return np.zeros(leaf.shape, np.float32)
        bounds.append((leaf.size, 1 / np.sqrt(np.prod(leaf.shape[:-1]))))
        return rng.uniform(-bounds[-1][1], bounds[-1][1], leaf.shape).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, shapes["params"])
    least = min(bound for _, bound in bounds)
    left = sum(size * (1 - least / bound) for size, bound in bounds)
    density = left / sum(size for size, _ in bounds)
    for factor, empty in ((1.1, False), (0.95, True)):
        masks = ms.magnitude(
            params, 1 - factor * density, where=models.maskable, on_collapse="ignore"
        )
        assert bool(ms.collapse(masks).empty) == empty


def test_a_network_cut_through_is_refused() -> None:
    # Two weights of three layers: no path.
    with pytest.raises(ValueError, match="no path is left from input to output"):
        ms.synflow(apply, make(), POINT, 0.96, rounds=3, on_collapse="error")
    # Three are one.
    masks = ms.synflow(apply, make(), POINT, 0.93, rounds=30, on_collapse="error")
    assert [int(m.sum()) for m in masks.values()] == [1, 1, 1]
    assert ms.connected(apply, make(), masks, POINT)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"sparsity": 1.0}, ValueError, "sparsity must be in"),
        ({"rounds": 0}, ValueError, "rounds must be at least 1"),
        ({"scope": "x"}, ValueError, "scope must be"),
        ({"on_collapse": "x"}, ValueError, "on_collapse must be"),
    ],
)
def test_bad_arguments(change: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ms.synflow(
            **{
                "apply_fn": apply,
                "params": make(),
                "inputs": POINT,
                "sparsity": 0.5,
                **change,
            }
        )
