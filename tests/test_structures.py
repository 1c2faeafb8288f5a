"""N:M sparsity against NumPy's sort, alone and at the end of methods."""

import dataclasses
import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax import structures
from tests.test_cyclic import QUICK

SHAPES = {"conv": (3, 3, 8, 4), "dense": (16, 6)}


def inputs(param: Any, name: str = "w") -> granet_jax.ScoreInputs:
    return granet_jax.ScoreInputs(
        param=jnp.asarray(param),
        grad=None,
        mask=jnp.ones(np.shape(param), bool),
        accumulator=None,
        key=jax.random.key(0),
        name=name,
    )


def draw(seed: int) -> dict[str, np.ndarray]:
    """Few values, so that groups tie."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.integers(-6, 7, shape) / 8).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def best_of_groups(score: np.ndarray, n: int, m: int, axis: int) -> np.ndarray:
    """By a stable sort of every group."""
    moved = np.moveaxis(score, axis, -1)
    groups = moved.reshape(*moved.shape[:-1], -1, m)
    order = np.argsort(np.argsort(-groups, axis=-1, kind="stable"), axis=-1)
    return np.moveaxis((order < n).reshape(moved.shape), -1, axis)


@hypothesis.given(
    st.sampled_from([(1, 2), (1, 4), (2, 4), (3, 8), (4, 8)]),
    st.sampled_from([(8, 3), (3, 3, 8, 2), (2, 8, 8)]),
    st.integers(0, 10**6),
    st.data(),
)
@hypothesis.settings(max_examples=12)
def test_best_of_every_group(numbers, shape, seed, data) -> None:
    n, m = numbers
    axis = data.draw(
        st.sampled_from([i for i in range(-len(shape), 0) if not shape[i] % m])
    )
    rng = np.random.default_rng(seed)
    param = (rng.integers(-4, 5, shape) / 4).astype(np.float32)
    score = np.asarray(structures.n_of_m(n, m, axis=axis)(inputs(param)))
    best = best_of_groups(abs(param), n, m, axis)
    np.testing.assert_array_equal(np.isinf(score), best)
    np.testing.assert_array_equal(score[~best], abs(param)[~best])


@pytest.mark.parametrize(
    ("method", "n", "m"),
    [
        (granet_jax.gmp(0.5, 6, interval=2), 2, 4),
        (granet_jax.gmp(0.75, 6, interval=6, scope="layer"), 1, 4),
        (granet_jax.straight_through(0.5, 6, interval=3, penalty=0.25), 4, 8),
    ],
)
def test_methods_end_with_n_of_m(method: Any, n: int, m: int) -> None:
    method = dataclasses.replace(method, prune=structures.n_of_m(n, m))
    tx = granet_jax.transform(method, optax.sgd(0.25))
    params, state = draw(0), tx.init(draw(0))
    update = jax.jit(tx.update, compiler_options=QUICK)
    for t in range(1, 8):
        updates, state = update(draw(t), state, params)
        params = optax.apply_updates(params, updates)
        masks = jax.device_get(state.masks)
        for name, mask in masks.items():
            # Never fewer than n, and from the last pruning on no more.
            groups = np.moveaxis(mask, -2, -1)
            sums = groups.reshape(*groups.shape[:-1], -1, m).sum(axis=-1)
            assert sums.min() >= n
            if t >= 6:
                assert sums.max() == n
            if t >= 6 and method.weights == "dense":
                expected = best_of_groups(abs(np.asarray(params[name])), n, m, -2)
                np.testing.assert_array_equal(mask, expected)


def test_nan_is_the_worst_of_its_group() -> None:
    param = np.array([[np.nan], [0.0], [-1.0], [0.5]], np.float32)
    score = structures.n_of_m(3, 4)(inputs(param))
    assert np.isinf(score).ravel().tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((4, 4), ValueError, "n must be at least 1 and below m"),
        ((0, 4), ValueError, "n must be at least 1 and below m"),
        ((2.0, 4), TypeError, "n must be an integer"),
        ((1, True), TypeError, "m must be an integer"),
    ],
)
def test_bad_arguments(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        structures.n_of_m(*arguments)


def test_shapes_that_do_not_divide() -> None:
    score = functools.partial(structures.n_of_m, 2, 4)
    with pytest.raises(ValueError, match=r"'head/kernel' has shape .*leave it out"):
        score()(inputs(np.ones((6, 8), np.float32), "head/kernel"))
    with pytest.raises(ValueError, match="along axis -2"):
        score()(inputs(np.ones(8, np.float32)))
    assert np.isinf(score(axis=1)(inputs(np.ones((6, 8), np.float32)))).sum() == 24
