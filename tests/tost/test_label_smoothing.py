"""Smoothed labels: both conventions, their relation, and no smoothing at all."""

import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from granet_jax import tost

ENTROPIES = {10: 0.54481, 100: 0.78459, 200: 0.85441}


def logits_and_labels(classes: int, shape: tuple[int, ...] = (5,)) -> Any:
    rng = np.random.default_rng(classes)
    logits = jnp.asarray(rng.normal(size=(*shape, classes)), jnp.float32)
    return logits, jnp.asarray(rng.integers(0, classes, shape))


@hypothesis.given(
    st.integers(2, 12), st.floats(0, 1), st.sampled_from(["tost", "standard"])
)
def test_targets_by_loops(classes: int, alpha: float, convention: Any) -> None:
    _, labels = logits_and_labels(classes, (2, 3))
    found = np.asarray(tost.smooth_targets(labels, classes, alpha, convention))
    assert found.shape == (2, 3, classes)
    for i in range(2):
        for j in range(3):
            for c in range(classes):
                true = c == labels[i, j]
                if convention == "tost":
                    expected = 1 - alpha if true else alpha / (classes - 1)
                else:
                    expected = (1 - alpha) * true + alpha / classes
                assert math.isclose(found[i, j, c], expected, abs_tol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("classes", ENTROPIES)
def test_agrees_with_optax_at_the_other_alpha(classes: int) -> None:
    logits, labels = logits_and_labels(classes)
    other = 0.1 * classes / (classes - 1)
    usual = optax.smooth_labels(jax.nn.one_hot(labels, classes), other)
    ours = tost.smooth_targets(labels, classes, 0.1)
    np.testing.assert_allclose(ours, usual, atol=1e-7)
    standard = tost.smooth_targets(labels, classes, other, "standard")
    np.testing.assert_allclose(standard, usual, rtol=1e-6)
    # Nothing goes below the entropy of the target.
    best = jnp.log(ours)
    found = tost.smoothed_cross_entropy(best, labels, 0.1)
    np.testing.assert_allclose(found, ENTROPIES[classes], atol=1e-5)
    assert bool(jnp.all(tost.smoothed_cross_entropy(logits, labels, 0.1) > found))


@pytest.mark.parametrize("convention", ["tost", "standard"])
def test_no_smoothing_is_the_loss_of_integer_labels(convention: Any) -> None:
    logits, labels = logits_and_labels(7, (4, 3))
    found = tost.smoothed_cross_entropy(logits, labels, 0.0, convention=convention)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_alpha_of_a_schedule_in_a_compiled_step() -> None:
    logits, labels = logits_and_labels(7)
    alpha, traces = tost.early(0.1, 2), []

    @jax.jit
    @jax.value_and_grad
    def loss(logits: Any, step: Any) -> Any:
        traces.append(step)
        return jnp.mean(tost.smoothed_cross_entropy(logits, labels, alpha(step)))

    for step in range(4):
        value, gradient = loss(logits, step)
        targets = tost.smooth_targets(labels, 7, 0.1 if step < 2 else 0.0)
        np.testing.assert_allclose(
            value, -np.sum(targets * jax.nn.log_softmax(logits)) / 5, rtol=1e-5
        )
        np.testing.assert_allclose(
            gradient, (jax.nn.softmax(logits) - targets) / 5, atol=1e-6
        )
    assert len(traces) == 1
    each = jax.vmap(tost.smoothed_cross_entropy, (0, 0, None))(logits, labels, 0.1)
    np.testing.assert_allclose(
        each, tost.smoothed_cross_entropy(logits, labels, 0.1), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"alpha": 1.5}, ValueError, "alpha must be at least 0 and at most 1, got 1.5"),
        ({"alpha": jnp.ones(2)}, ValueError, r"alpha must be a scalar, got shape \(2,"),
        ({"alpha": math.nan}, ValueError, "alpha must be at least 0 and at most 1"),
        ({"alpha": "0.1"}, TypeError, "alpha must be a number, got '0.1'"),
        ({"classes": 1}, ValueError, "classes must be at least 2, got 1"),
        ({"classes": 3.0}, TypeError, "classes must be an integer, got 3.0"),
        ({"labels": jnp.array([0.5])}, TypeError, "labels must be integers, got dtype"),
        (
            {"labels": jnp.array([3, 0])},
            ValueError,
            r"in \[0, 3\), got values from 0 to",
        ),
        ({"labels": jnp.array([-1])}, ValueError, r"labels must be in \[0, 3\)"),
        ({"convention": "torch"}, ValueError, "convention must be one of 'tost', 'st"),
    ],
)
def test_refused(change: dict[str, Any], error: Any, message: str) -> None:
    arguments: dict[str, Any] = {"labels": jnp.array([0, 2]), "classes": 3}
    with pytest.raises(error, match=message):
        tost.smooth_targets(**{**arguments, "alpha": 0.1, **change})


def test_refused_shapes() -> None:
    logits, labels = logits_and_labels(3)
    with pytest.raises(ValueError, match=r"labels of shape \(4,\) and logits of shape"):
        tost.smoothed_cross_entropy(logits, labels[:4], 0.1)
