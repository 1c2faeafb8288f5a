"""SynFlow against an enumeration of paths; overflow and collapse."""

import functools
import itertools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import granet_jax
from granet_jax import distributions, masking
from granet_jax import mask_sources as ms
from tests.mask_sources.helpers import draw, largest, largest_by_leaf

UNITS = (3, 4, 5, 2)
NAMES = ("0", "1", "2")
POINT = jax.ShapeDtypeStruct((1, 3), jnp.float32)


def chain_of(units: tuple[int, ...], seed: int = 0) -> dict[str, Any]:
    return draw(dict(zip(NAMES, itertools.pairwise(units), strict=True)), seed)


def apply(params: Any, x: Any) -> Any:
    x = jax.nn.relu(x @ params["0"])
    x = jax.nn.relu(x @ params["1"])
    return x @ params["2"]


def flows(weights: list[np.ndarray]) -> list[np.ndarray]:
    """For every weight, the sum over the paths through it of abs(product)."""
    scores = [np.zeros(w.shape) for w in weights]
    for path in itertools.product(*map(range, UNITS)):
        edges = list(itertools.pairwise(path))
        flow = np.prod([abs(w[e]) for w, e in zip(weights, edges, strict=True)])
        for score, e in zip(scores, edges, strict=True):
            score[e] += flow
    return scores


def test_scores_are_the_flows_along_all_paths() -> None:
    params = chain_of(UNITS)
    weights = [np.asarray(params[k], np.float64) for k in NAMES]
    first, middle, last = map(np.abs, weights)
    total = first.sum(0) @ middle @ last.sum(1)
    found = ms.synflow_scores(apply, params, POINT)
    for name, expected in zip(NAMES, flows(weights), strict=True):
        assert found[name].dtype == np.float64
        np.testing.assert_allclose(found[name], expected, rtol=1e-12)
        # Every layer is a cut, so its scores sum to R.
        np.testing.assert_allclose(np.sum(np.asarray(found[name])), total, rtol=1e-12)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_rounds_against_enumeration(scope: Any) -> None:
    params = chain_of(UNITS, seed=1)
    weights = [np.asarray(params[k], np.float64) for k in NAMES]
    masks = [np.ones(w.shape, bool) for w in weights]
    shapes = [w.shape for w in weights]
    counts: Any = None
    for k in range(1, 6):
        left = [np.where(m, w, 0.0) for m, w in zip(masks, weights, strict=True)]
        ranks = [np.where(m, s, -1.0) for m, s in zip(masks, flows(left), strict=True)]
        sparsity = 1.0 - 0.3 ** (k / 5)
        if scope == "global":
            masks = largest(ranks, distributions.total_count(42, sparsity))
        else:
            counts = distributions.counts(shapes, sparsity, "uniform", counts)
            masks = largest_by_leaf(ranks, counts)

    def source(params: Any) -> Any:
        return ms.synflow(apply, params, POINT, 0.7, rounds=5, scope=scope)

    # A traced function computes in float64, too.
    for found in (source(params), jax.jit(source)(params)):
        for name, mask in zip(NAMES, masks, strict=True):
            np.testing.assert_array_equal(found[name], mask)


def test_all_parameters_are_replaced_by_their_absolute_values() -> None:
    def biased(params: Any, x: Any) -> Any:
        x = x @ params["0"] * params["scale"][None] + params["b"][None]
        return jax.nn.relu(x) @ params["1"]

    shapes = {"0": (3, 4), "1": (4, 2), "b": (4,), "scale": (4,)}
    params = draw(shapes)
    w, v, b, scale = (np.abs(np.asarray(params[k], np.float64)) for k in shapes)
    found = ms.synflow_scores(biased, params, POINT)
    assert masking.is_masked_node(found["b"])
    assert masking.is_masked_node(found["scale"])
    np.testing.assert_allclose(found["0"], w * scale * v.sum(1), rtol=1e-12)
    hidden = w.sum(0) * scale + b
    np.testing.assert_allclose(found["1"], hidden[:, None] * v, rtol=1e-12)


def deep(params: Any, x: Any) -> Any:
    """Sixty residual layers, whose R far exceeds float32."""

    def layer(x: Any, w: Any) -> tuple[Any, None]:
        return x + jax.nn.relu(x @ w), None

    return jax.lax.scan(layer, x, params["layers"])[0] @ params["last"]


def test_deep_networks_need_float64() -> None:
    params = draw({"layers": (60, 8, 8), "last": (8, 3)})
    point = jax.ShapeDtypeStruct((1, 8), jnp.float32)
    scores = ms.synflow_scores(deep, params, point)
    total = np.asarray(scores["last"]).sum()
    layers = np.asarray(scores["layers"]).sum((1, 2))
    assert 1e40 < total < np.inf
    # The last layer is a cut. A layer next to a shortcut carries a part of the flow.
    assert np.all((layers > 0) & (layers < total))
    masks = ms.synflow(deep, params, point, 0.9, rounds=2, on_collapse="ignore")
    assert granet_jax.sparsity(masks).active == 386
    assert ms.connected(deep, params, masks, point)

    def in_float32(params: Any, x: Any) -> Any:
        return deep(*jax.tree.map(lambda v: v.astype(jnp.float32), (params, x)))

    for source in (ms.synflow_scores, functools.partial(ms.synflow, sparsity=0.9)):
        with pytest.raises(ValueError, match=r"flow R .* must be finite.*dtype=None"):
            source(in_float32, params, point)


def test_many_rounds_keep_a_chain_connected_where_one_does_not() -> None:
    # The weights of a layer share R, so one round empties the layer with most weights.
    params = chain_of((8, 40, 40, 4))
    point = jax.ShapeDtypeStruct((1, 8), jnp.float32)
    with pytest.warns(UserWarning, match="no active weight is left at '1'; no path is"):
        once = ms.synflow(apply, params, point, 0.99, rounds=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks = ms.synflow(apply, params, point, 0.99)
    assert ms.collapse(masks).empty == ()
    assert granet_jax.sparsity(masks).active == granet_jax.sparsity(once).active == 21
    assert ms.connected(apply, params, masks, point)
    # Three layers need three weights for a path, and with two they have none.
    masks = ms.synflow(apply, params, point, 1 - 3 / 2080, on_collapse="error")
    assert [int(m.sum()) for m in masks.values()] == [1, 1, 1]
    with pytest.raises(ValueError, match="no path is left from input to output"):
        ms.synflow(apply, params, point, 1 - 2 / 2080, on_collapse="error")


def test_an_empty_leaf_next_to_a_shortcut_disconnects_nothing() -> None:
    def residual(params: Any, x: Any) -> Any:
        x = jax.nn.relu(x @ params["0"])
        return (x + jax.nn.relu(x @ params["1"])) @ params["2"]

    params = chain_of((3, 12, 12, 4))
    params["1"] /= 10  # Most of the flow goes through the shortcut.
    with pytest.warns(UserWarning, match="left at '1'; the network is still connected"):
        masks = ms.synflow(residual, params, POINT, 0.97)
    assert ms.collapse(masks).empty == ("1",)
    assert granet_jax.sparsity(masks).active == 7
