"""The record of ToST and the functions that it describes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from granet_jax import tost


def test_the_default_does_nothing() -> None:
    config = tost.ToST()
    for part in (tost.activation, tost.skip_alpha, tost.label_alpha):
        assert part(config, 100) is None
    assert config.lrsi is None


def test_both_ghosts_end_together() -> None:
    config = tost.ToST(
        neurons=tost.Neurons(kind="mish", beta_0=2.0, beta_1=8.0),
        skips=tost.Skips(alpha_0=0.5, decay="cosine"),
        ghost_fraction=0.3,
    )
    assert tost.ghost_steps(config, 101) == 30
    act, alpha = tost.activation(config, 101), tost.skip_alpha(config, 101)
    assert act is not None
    assert alpha is not None
    x = jnp.linspace(-2.0, 2.0, 9)
    np.testing.assert_array_equal(act(x, 30), np.maximum(x, 0))
    np.testing.assert_allclose(act(x, 15), tost.soft_relu(x, 4.0, "mish"), rtol=1e-5)
    assert float(alpha(30)) == 0.0
    assert float(alpha(15)) == pytest.approx(0.25, rel=1e-6)
    with pytest.raises(ValueError, match=r"ghost_fraction .* one step, got .* of .*=3"):
        tost.ghost_steps(config, 3)


def test_the_authors_code_keeps_its_ghosts() -> None:
    config = tost.reproduce()
    assert tost.ghost_steps(config, 100) is None
    act, alpha = tost.activation(config, 100), tost.skip_alpha(config, 100)
    smoothing = tost.label_alpha(config, 100)
    assert act is not None
    assert alpha is not None
    assert smoothing is not None
    x = np.linspace(-2, 2, 9, dtype=np.float32)
    for step in (0, 10**6):
        np.testing.assert_allclose(act(x, step), x / (1 + np.exp(-2 * x)), rtol=1e-5)
        assert float(alpha(step)) == 1.0
        assert float(smoothing(step)) == np.float32(0.1)
    assert config.lrsi == tost.LRsI(mask_lookahead=False)
    assert config.skips == tost.Skips(kind="conv", constant_init=True)


def test_labels_smoothed_at_the_start_only() -> None:
    smoothing = tost.label_alpha(tost.ToST(labels=tost.Labels(fraction=0.5)), 10)
    assert smoothing is not None
    assert [float(smoothing(t)) > 0 for t in (0, 4, 5, 9)] == [True, True, False, False]


def test_lrsi_defaults_are_those_of_the_authors_command() -> None:
    defaults = (0.1, 1.0, 1e-2, 0.01, 180, 1.0, True)
    assert dataclasses.astuple(tost.LRsI()) == defaults
