"""The record of ToST: what it refuses, and the parts it makes."""

import dataclasses
import math
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from granet_jax import tost


def test_the_default_does_nothing() -> None:
    config = tost.ToST()
    assert tost.activation(config, 100) is None
    assert tost.skip_alpha(config, 100) is None
    assert tost.label_alpha(config, 100) is None
    assert config.lrsi is None


def test_both_ghosts_end_together() -> None:
    config = tost.ToST(
        neurons=tost.Neurons(kind="mish", beta_0=2.0, beta_1=8.0),
        skips=tost.Skips(alpha_0=0.5, decay="cosine"),
        ghost_fraction=0.3,
    )
    steps = tost.ghost_steps(config, 101)
    assert steps == 30
    act = tost.activation(config, 101)
    alpha = tost.skip_alpha(config, 101)
    assert act is not None
    assert alpha is not None
    x = jnp.linspace(-2.0, 2.0, 9)
    np.testing.assert_array_equal(act(x, 30), np.maximum(x, 0))
    np.testing.assert_allclose(act(x, 15), tost.soft_relu(x, 4.0, "mish"), rtol=1e-5)
    assert float(alpha(30)) == 0.0
    assert math.isclose(float(alpha(15)), 0.25, rel_tol=1e-6)


def test_the_authors_code_keeps_its_ghosts() -> None:
    config = tost.reproduce()
    assert tost.ghost_steps(config, 100) is None
    act, alpha = tost.activation(config, 100), tost.skip_alpha(config, 100)
    smoothing = tost.label_alpha(config, 100)
    assert act is not None
    assert alpha is not None
    assert smoothing is not None
    x = np.linspace(-2, 2, 9, dtype=np.float32)
    np.testing.assert_allclose(act(x, 10**6), x / (1 + np.exp(-2 * x)), rtol=1e-5)
    assert float(alpha(10**6)) == 1.0
    assert float(smoothing(10**6)) == np.float32(0.1)
    assert config.lrsi == tost.LRsI(mask_lookahead=False)
    assert config.skips == tost.Skips(kind="conv", constant_init=True)
    assert dataclasses.replace(config, lrsi=None).lrsi is None


def test_labels_smoothed_at_the_start_only() -> None:
    smoothing = tost.label_alpha(tost.ToST(labels=tost.Labels(fraction=0.5)), 10)
    assert smoothing is not None
    assert [float(smoothing(t)) > 0 for t in (0, 4, 5, 9)] == [True, True, False, False]


def test_lrsi_defaults_are_the_authors_command() -> None:
    assert dataclasses.asdict(tost.LRsI()) == {
        "eta": 0.1,
        "gamma": 1.0,
        "learning_rate": 1e-2,
        "min_scale": 0.01,
        "iterations": 180,
        "clip": 1.0,
        "mask_lookahead": True,
    }


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: tost.ToST(ghost_fraction=0.0),
            ValueError,
            "ghost_fraction must be ab",
        ),
        (lambda: tost.ToST(ghost_fraction=1.1), ValueError, "and at most 1, got 1.1."),
        (lambda: tost.ToST(ghost_fraction=True), TypeError, "ghost_fraction must be a"),
        (
            lambda: tost.ToST(neurons="swish"),
            TypeError,
            "neurons must be None or a record Neurons, got 'swish'.",
        ),
        (lambda: tost.ToST(labels=0.1), TypeError, "labels must be None or a record"),
        (lambda: tost.Neurons(kind="gelu"), ValueError, "kind must be one of 'swish'"),
        (lambda: tost.Neurons(beta_0=-1), ValueError, "beta_0 must be above 0"),
        (
            lambda: tost.Skips(kind="dense"),
            ValueError,
            "kind must be one of 'identity'",
        ),
        (
            lambda: tost.Skips(alpha_0=math.inf),
            ValueError,
            "alpha_0 must be above 0 an",
        ),
        (
            lambda: tost.Labels(alpha=2),
            ValueError,
            "alpha must be at least 0 and at mos",
        ),
        (
            lambda: tost.Labels(fraction=0),
            ValueError,
            "fraction must be above 0 and at",
        ),
        (
            lambda: tost.LRsI(eta=0),
            ValueError,
            "eta must be above 0 and finite, got 0.",
        ),
        (lambda: tost.LRsI(gamma=0), ValueError, "gamma must be above 0, got 0."),
        (
            lambda: tost.LRsI(learning_rate=-1),
            ValueError,
            "learning_rate must be above",
        ),
        (
            lambda: tost.LRsI(min_scale=2),
            ValueError,
            "min_scale must be at least 0 and",
        ),
        (lambda: tost.LRsI(iterations=0), ValueError, "iterations must be at least 1"),
        (
            lambda: tost.LRsI(clip=math.nan),
            ValueError,
            "clip must be above 0, got nan.",
        ),
        (lambda: tost.LRsI(mask_lookahead=1), TypeError, "mask_lookahead must be True"),
        (
            lambda: tost.ghost_steps(tost.ToST(), 3),
            ValueError,
            "ghost_fraction must leave at least one step, got 0.25 of total_steps=3.",
        ),
        (
            lambda: tost.label_alpha(tost.ToST(labels=tost.Labels()), 0),
            ValueError,
            "total_steps must be at least 1",
        ),
    ],
)
def test_refused(make: Callable[[], Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_imports_without_flax() -> None:
    code = (
        "import sys; sys.modules['flax'] = None; import granet_jax.tost\n"
        "try:\n    import granet_jax.tost.linen\n"
        "except ImportError:\n    print('linen needs it')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "linen needs it"
