"""DSR and MEST by hand; `test_methods` compares whole trainings with the reference."""

from typing import Any

import jax
import numpy as np
import optax

import granet_jax
from tests.helpers.training import compiled_step


def test_dsr_moves_weights_to_leaves_that_keep_theirs_and_adapts() -> None:
    # Ten weights are to go. Below 9 the threshold doubles, and above 11 it halves.
    method = granet_jax.dsr(0.5, 4, interval=1, fraction=0.5, threshold=1.0)
    masks = {"a": np.arange(20)[None] < 12, "b": np.arange(20)[None] < 8}
    tx = granet_jax.transform(method, optax.sgd(0.0), masks=masks)
    step = compiled_step(tx)
    # The first leaf keeps eight. As many come as go, in proportion to what is left.
    for small, counts, threshold in (
        (8, {"a": 14, "b": 6}, 2.0),
        (10, {"a": 16, "b": 4}, 1.0),
        (12, {"a": 20, "b": 0}, 0.5),
    ):
        kept = {"a": np.arange(20)[None] < 8, "b": np.arange(20)[None] < 12 - small}
        params: Any = {
            name: np.where(kept[name], 8, 0.1 * mask).astype(np.float32)
            for name, mask in masks.items()
        }
        grads = jax.tree.map(np.zeros_like, params)
        new, state = step(params, tx.init(params), grads)
        actual = granet_jax.get_masks(state)
        assert {name: int(m.sum()) for name, m in actual.items()} == counts
        assert state.phases == (threshold,)
        for name, mask in actual.items():
            assert mask[kept[name]].all()
            values = np.where(mask, params[name], np.float32(0))
            np.testing.assert_array_equal(new[name], values)


def test_mest_drops_by_magnitude_and_gradient() -> None:
    method = granet_jax.mest(0.5, 8, interval=1, fraction=0.25, gradient_weight=0.5)
    params = {"w": np.float32([[4.0, 3.0, 2.0, 1.0, 0, 0, 0, 0]])}
    grads = {"w": np.float32([[0.0, 0.0, 1.5, 8.0, 0, 0, 0, 0]])}
    tx = granet_jax.transform(method, optax.sgd(0.0), masks={"w": params["w"] != 0})
    new, state = compiled_step(tx)(params, tx.init(params), grads)
    mask = np.asarray(granet_jax.get_masks(state)["w"])[0]
    # The scores are 4, 3, 2.75 and 5: the third goes, and any of the inactive comes.
    assert mask[[0, 1, 3]].all()
    assert mask.sum() == 4
    np.testing.assert_array_equal(new["w"][0], np.where(mask, params["w"][0], 0))
