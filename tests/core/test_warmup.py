"""The weights that entered in the last mask update, and their warm-up."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from tests.helpers.training import arrays
from tests.helpers.trees import assert_same, eighths

INTERVAL, WARMUP, STEPS = 4, 2, 12


def test_entered_weights_warm_up_linearly() -> None:
    method = granet_jax.rigl(0.5, 4 * STEPS, interval=INTERVAL)
    with_warmup, without = (
        granet_jax.transform(method, optax.adam(0.125), warmup=n) for n in (WARMUP, 0)
    )
    params, state = eighths(0), with_warmup.init(eighths(0))
    step, plain_step = jax.jit(with_warmup.update), jax.jit(without.update)
    age, seen = 0, 0
    for count in range(1, STEPS + 1):
        old, grads = granet_jax.get_masks(state), eighths(count)
        plain, plain_state = plain_step(grads, state, params)
        updates, state = step(grads, state, params)
        new = granet_jax.get_masks(state)
        # A weight that RigL drops and regrows at once continues. So the weights that
        # enter are those that were inactive before.
        age = 0 if count % INTERVAL == 0 else age + 1
        if age == 0:
            entered = jax.tree.map(lambda n, o: n & ~o, new, old)
            assert_same(state.entered, entered)
        share = np.float32(min(1.0, age / WARMUP))
        for e, u, p, n in zip(
            arrays(state.entered),
            arrays(granet_jax.masking.maskable_leaves(updates, new)),
            arrays(granet_jax.masking.maskable_leaves(plain, new)),
            arrays(new),
            strict=True,
        ):
            grown = e & n & (age > 0)
            np.testing.assert_array_equal(u, np.where(grown, p * share, p))
            seen += int(grown.sum() > 0 and share < 1)
        # Only the updates differ.
        assert_same(state, plain_state)
        params = optax.apply_updates(params, updates)
    assert seen


def test_a_weight_that_an_update_prunes_and_regrows_has_entered() -> None:
    """GraNet prunes the smallest weight; its large gradient brings it back at zero."""
    method = granet_jax.granet(0.5, 10, interval=1, end_step=2, fraction=0.5)
    params = {"w": jnp.asarray([[1.0, 2.0, 3.0, 0.5]])}
    tx = granet_jax.transform(method, optax.sgd(0.0))
    state = tx.init(params)
    grads = {"w": jnp.asarray([[0.0, 0.0, 0.0, 9.0]])}
    updates, state = tx.update(grads, state, params)
    masks, entered = granet_jax.get_masks(state)["w"], state.entered["w"]
    assert masks[0, 3]
    assert entered.tolist() == [[False, False, False, True]]
    assert (params["w"] + updates["w"])[0, 3] == 0.0


def test_a_warmup_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup must be 0 for gmp, which never"):
        granet_jax.transform(granet_jax.gmp(0.5, 4, interval=1), warmup=2)
