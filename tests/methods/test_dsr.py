"""DSR: an adaptive global threshold, and growth where weights survive."""

from typing import Any

import jax
import numpy as np
import optax
import pytest

import granet_jax
from tests.helpers.compiler_options import QUICK
from tests.helpers.fuzzing import KERNELS, Lab, run_schedule, spec


@pytest.mark.parametrize(("threshold", "rises"), [(2.0**-8, True), (4.0, False)])
def test_trainings_follow_the_reference(threshold: float, rises: bool) -> None:
    method = spec(
        "dsr",
        0.75,
        40,
        interval=2,
        fraction=0.125,
        threshold=threshold,
        distribution="uniform",
    )
    lab = Lab(KERNELS, [method], inner="momentum", options=QUICK)
    changed, run = run_schedule(lab)
    assert changed >= 20
    # The threshold adapts, and the number of active weights stays.
    assert (run.training.threshold > threshold) == rises
    assert sum(m.sum() for m in lab.masked(run.training.masks)) == 96


def test_moves_weights_to_the_leaves_that_keep_theirs_by_hand() -> None:
    method = granet_jax.dsr(0.625, 4, interval=1, fraction=0.5, threshold=1.0)
    params: Any = {
        "a": np.float32([[8.0, 9.0, 0.1, 0, 0, 0, 0, 0]]),
        "b": np.float32([[8.0, 0.1, 0.1, 0, 0, 0, 0, 0]]),
    }
    masks = {name: p != 0 for name, p in params.items()}
    tx = granet_jax.transform(method, optax.sgd(0.0), masks=masks)
    grads = jax.tree.map(np.zeros_like, params)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    actual = granet_jax.get_masks(state)
    # The three small weights go. Two and one are left, so two and one come.
    assert {name: int(m.sum()) for name, m in actual.items()} == {"a": 4, "b": 2}
    assert actual["a"][0, :2].all()
    assert actual["b"][0, 0]
    new = optax.apply_updates(params, updates)
    for name, mask in actual.items():
        kept = np.where(mask, params[name], np.float32(0))
        np.testing.assert_array_equal(new[name], kept)
