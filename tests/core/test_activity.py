"""What a state holds of masks: the codes, and what is read from them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax as gj
from granet_jax import activity, masking

# Every combination of active, and of continuing if active.
MASK = np.asarray([False, False, True, True])
CONTINUING = np.asarray([False, True, False, True])
CODES = np.asarray([0, 0, 1, 2], np.int8)


def test_what_is_inactive_does_not_continue() -> None:
    codes = activity.encode(jnp.asarray(MASK), jnp.asarray(CONTINUING))
    assert codes.dtype == jnp.int8
    np.testing.assert_array_equal(codes, CODES)


@pytest.mark.parametrize("updated", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_only_an_update_tells_entered_from_continuing(
    updated: bool, traced: bool
) -> None:
    codes = np.asarray([-1, 0, 1, 2], np.int8)
    question = jnp.asarray(updated) if traced else updated
    got = jax.jit(activity.is_continuing)(jnp.asarray(codes), question)
    np.testing.assert_array_equal(got, codes >= 2 if updated else codes >= 1)
    np.testing.assert_array_equal(activity.is_active(jnp.asarray(codes)), codes >= 1)


def test_masks_of_every_kind_of_leaf() -> None:
    packed = masking.pack_masks(jnp.asarray(MASK))
    shape = jax.ShapeDtypeStruct((4,), jnp.int8)
    tree = {"jax": jnp.asarray(CODES), "numpy": CODES, "packed": packed, "shape": shape}
    masks = activity.masks_of({**tree, "none": None})
    assert masks["jax"].dtype == bool
    assert isinstance(masks["jax"], jax.Array)
    np.testing.assert_array_equal(masks["jax"], MASK)
    assert isinstance(masks["numpy"], np.ndarray)
    np.testing.assert_array_equal(masks["numpy"], MASK)
    assert masks["packed"] is packed
    assert masks["shape"] == jax.ShapeDtypeStruct((4,), jnp.bool_)
    assert masks["none"] is None


def test_codes_of_masks_and_back() -> None:
    packed = masking.pack_masks(jnp.asarray(MASK))
    codes = activity.codes_of({"bytes": jnp.asarray(MASK), "bits": packed})
    np.testing.assert_array_equal(codes["bytes"], 2 * MASK.astype(np.int8))
    assert codes["bits"] is packed
    np.testing.assert_array_equal(activity.masks_of(codes["bytes"]), MASK)


def test_a_weight_that_enters_is_said_to_until_the_next_update() -> None:
    """Of every step, from the masks before and after it."""
    method = gj.rigl(0.5, 16, interval=3)
    tx = gj.transform(method, inner=optax.sgd(0.1, momentum=0.9))
    rng = np.random.default_rng(0)
    params: Any = {"kernel": jnp.asarray(rng.standard_normal((12, 10)), jnp.float32)}
    state = tx.init(params)
    step = jax.jit(tx.update)
    before = np.asarray(state.masks["kernel"])
    np.testing.assert_array_equal(state.activity["kernel"], 2 * before.astype(np.int8))
    entered = np.zeros_like(before)
    moved = []
    for number in range(13):
        grads = {"kernel": jnp.asarray(rng.standard_normal((12, 10)), jnp.float32)}
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
        codes = np.asarray(state.activity["kernel"])
        now = np.asarray(state.masks["kernel"])
        if (number + 1) % 3 == 0:
            entered = now & ~before
            moved.append(int(entered.sum()))
            assert (np.asarray(params["kernel"])[entered] == 0).all()
        else:
            np.testing.assert_array_equal(now, before)
        np.testing.assert_array_equal(codes == 1, entered & now)
        np.testing.assert_array_equal(codes == 2, now & ~entered)
        before = now
    # The last one moves nothing: what entered with the one before continues.
    assert all(moved[:3])
    assert moved[3] == 0
