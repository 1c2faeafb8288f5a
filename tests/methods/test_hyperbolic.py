"""HAM's step, against NumPy and inside `transform`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax import analysis


def test_the_step_is_that_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32).at[0].set(0.0),
        "b": jnp.ones(4),
    }
    schedule = optax.linear_schedule(0.1, 0.05, 2)
    tx = granet_jax.hyperbolic(optax.sgd(schedule), schedule, alpha=20.0, beta=0.01)
    state, expected = tx.init(params), jax.tree.map(np.asarray, params)
    for rate in (0.1, 0.075):
        grads = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params
        )
        grads["w"] = grads["w"].at[0].set(0.0).at[1, 0].set(40.0)
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        g = {name: np.asarray(x) for name, x in grads.items()}
        after = expected["w"] - rate * g["w"]
        exponent = np.clip(-rate * (20 * np.sign(after) * g["w"] + 0.01), -5, 5)
        expected = {"w": after * np.exp(exponent), "b": expected["b"] - rate * g["b"]}
        for name, value in expected.items():
            np.testing.assert_allclose(params[name], value, rtol=2e-5, atol=1e-6)
        assert np.all(params["w"][0] == 0)


def test_pruned_weights_stay_zero_under_it() -> None:
    params = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(16, 8)))}
    inner = granet_jax.hyperbolic(optax.adam(0.01), 0.01)
    method = granet_jax.rigl(0.75, 10, interval=2)
    tx = granet_jax.transform(method, inner)
    state = tx.init(params)
    params = granet_jax.apply_masks(params, granet_jax.get_masks(state))
    for step in range(6):
        grads = {"w": jnp.cos(params["w"] + step)}
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        masks = granet_jax.get_masks(state)
        assert np.all(params["w"][~masks["w"]] == 0)
        assert np.count_nonzero(masks["w"]) == 32


def test_bad_arguments_are_named() -> None:
    for options, message in (
        ({"learning_rate": -1.0}, "learning_rate must be at least 0"),
        ({"learning_rate": 0.1, "alpha": -1.0}, "alpha must be at least 0"),
        ({"learning_rate": 0.1, "beta": float("nan")}, "beta must be"),
    ):
        with pytest.raises(ValueError, match=message):
            granet_jax.hyperbolic(optax.sgd(0.1), **options)
    tx = granet_jax.hyperbolic(optax.sgd(0.1), 0.1)
    grads: Any = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="params must be given"):
        tx.update(grads, tx.init(grads))


def test_average_density_is_the_mean_over_the_steps() -> None:
    for method in (
        granet_jax.gmp(0.8, 75, begin_step=25, interval=5),
        granet_jax.granet(0.9, 100, interval=7),
        granet_jax.static(0.6),
        granet_jax.cyclical(0.8, 100, cycles=4, interval=5),
    ):
        updates = set(method.updates.steps())
        density, densities = 1.0 - method.sparsity(0), []
        for step in range(100):
            if step in updates:
                density = 1.0 - method.sparsity(step)
            densities.append(density)
        expected = np.mean(densities)
        assert analysis.average_density(method, 100) == pytest.approx(expected)
