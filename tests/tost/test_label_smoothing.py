"""Smoothed labels: both conventions, their relation to optax, and no smoothing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from granet_jax import tost


def logits_and_labels(classes: int, shape: tuple[int, ...] = (5,)) -> Any:
    rng = np.random.default_rng(classes)
    logits = jnp.asarray(rng.normal(size=(*shape, classes)), jnp.float32)
    return logits, jnp.asarray(rng.integers(0, classes, shape))


@pytest.mark.parametrize("classes", [2, 10])
def test_targets_follow_their_definitions(classes: int) -> None:
    _, labels = logits_and_labels(classes, (2, 3))
    is_true = np.asarray(labels)[..., None] == np.arange(classes)
    for alpha in (0.0, 0.1, 0.5, 1.0):
        expected = np.where(is_true, 1 - alpha, alpha / (classes - 1))
        targets = tost.smooth_targets(labels, classes, alpha)
        np.testing.assert_allclose(targets, expected, atol=1e-6)
        np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)
        standard = tost.smooth_targets(labels, classes, alpha, "standard")
        by_optax = optax.smooth_labels(jax.nn.one_hot(labels, classes), alpha)
        np.testing.assert_allclose(standard, by_optax, atol=1e-6)
        # The two conventions agree at corresponding values of alpha.
        corresponding = alpha * (classes - 1) / classes
        same = tost.smooth_targets(labels, classes, corresponding)
        np.testing.assert_allclose(standard, same, atol=1e-6)


def test_no_smoothing_is_the_loss_of_integer_labels() -> None:
    logits, labels = logits_and_labels(7, (4, 3))
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    for convention in ("tost", "standard"):
        loss = tost.smoothed_cross_entropy(logits, labels, 0.0, convention=convention)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_a_traced_alpha() -> None:
    logits, labels = logits_and_labels(7)

    @jax.jit
    @jax.value_and_grad
    def loss(logits: Any, alpha: Any) -> Any:
        losses = jax.vmap(tost.smoothed_cross_entropy, (0, 0, None))
        return jnp.mean(losses(logits, labels, alpha))

    for alpha in (0.1, 0.0):
        value, gradient = loss(logits, jnp.float32(alpha))
        targets = tost.smooth_targets(labels, 7, alpha)
        expected = -np.sum(targets * jax.nn.log_softmax(logits)) / 5
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        slope = (jax.nn.softmax(logits) - targets) / 5
        np.testing.assert_allclose(gradient, slope, atol=1e-6)
