"""MEST: drop the lowest abs(w) + lambda abs(g), grow at random."""

import jax
import numpy as np
import optax
import pytest

import granet_jax
from tests.helpers.compiler_options import QUICK
from tests.helpers.fuzzing import KERNELS, Lab, run_schedule, spec


@pytest.mark.parametrize("gradient_weight", [0.0, 2.0**-3, 4.0])
def test_trainings_follow_the_reference(gradient_weight: float) -> None:
    method = spec(
        "mest", 0.8, 40, interval=2, fraction=0.5, gradient_weight=gradient_weight
    )
    lab = Lab(KERNELS, [method], inner="momentum", options=QUICK)
    changed, _ = run_schedule(lab)
    assert changed >= 30


def test_drops_by_magnitude_and_gradient_by_hand() -> None:
    method = granet_jax.mest(0.5, 8, interval=1, fraction=0.25, gradient_weight=0.5)
    params = {"w": np.float32([[4.0, 3.0, 2.0, 1.0, 0, 0, 0, 0]])}
    grads = {"w": np.float32([[0.0, 0.0, 4.0, 8.0, 0, 0, 0, 0]])}
    tx = granet_jax.transform(method, optax.sgd(0.0), masks={"w": params["w"] != 0})
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    mask = np.asarray(granet_jax.get_masks(state)["w"])[0]
    # The scores are 4, 3, 4 and 5: the second goes, and any of the inactive comes.
    assert mask[[0, 2, 3]].all()
    assert mask.sum() == 4
    new = optax.apply_updates(params, updates)["w"][0]
    np.testing.assert_array_equal(new, np.where(mask, params["w"][0], 0))
