"""Methods that keep weights dense, and growing penalties; the loss sees a sparse view.

`test_methods` compares whole trainings with the reference, from drawn gradients.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax import penalties
from granet_jax.penalties import PenaltyInputs
from tests.methods.test_cyclical import SHAPES, draw, train


@pytest.mark.parametrize(
    "method",
    [
        granet_jax.straight_through(0.75, 4, interval=2, scope="global", penalty=0.5),
        granet_jax.top_kast(0.5, backward_sparsity=0.25, interval=2, penalty=0.25),
    ],
    ids=lambda m: m.name,
)
def test_the_view_is_zero_outside_of_the_masks(method: granet_jax.Method) -> None:
    tx = granet_jax.transform(method, optax.sgd(0.25, momentum=0.5))
    params, state = train(tx, 2)[1][-1]
    view = jax.jit(granet_jax.sparse_view)(params, state)
    masks = {**granet_jax.get_masks(state), "bias": True}
    for name, p in jax.device_get(params).items():
        mask = np.broadcast_to(masks[name], p.shape)
        np.testing.assert_array_equal(view[name], np.where(mask, p, np.float32(0)))
        # The parameters themselves stay dense.
        assert np.count_nonzero(p[~mask]) >= 0.9 * np.sum(~mask)


def test_penalties_of_growing_regularisation_over_time() -> None:
    def over_time(method: granet_jax.Method, kept: bool) -> Any:
        @jax.jit
        def coefficient(count: jax.Array) -> jax.Array:
            leaf, on = jnp.ones((1, 1)), jnp.full((1, 1), True)
            inputs = PenaltyInputs(leaf, on, jnp.full((1, 1), kept), count)
            assert method.penalty is not None
            return jnp.broadcast_to(method.penalty(inputs), (1, 1))

        return lambda count: float(coefficient(jnp.int32(count))[0, 0])

    # As in the authors' code for CIFAR: 10,001 increases, ten steps apart.
    greg1 = granet_jax.greg1(0.9)
    pruned = over_time(greg1, kept=False)
    assert [pruned(t) for t in (0, 9, 10)] == pytest.approx([1e-4, 1e-4, 2e-4])
    assert pruned(99_999) == pytest.approx(1.0)
    assert pruned(100_000) == pruned(110_009) == pytest.approx(1.0001)
    assert pruned(110_010) == 0.0
    assert over_time(greg1, kept=True)(5000) == 0.0
    assert list(greg1.updates.steps()) == [110_010]
    # GReg-2: 1,000 increases for all weights, then 9,901.
    greg2 = granet_jax.greg2(0.9, weight_decay=1e-4)
    pruned, kept = (over_time(greg2, kept=k) for k in (False, True))
    assert pruned(0) == kept(0) == pytest.approx(1e-5)
    assert pruned(9_999) == kept(9_999) == pytest.approx(1e-2)
    assert pruned(10_000) == pytest.approx(1.01e-2)
    assert kept(10_000) == kept(110_000) == pytest.approx(-1e-4)
    assert pruned(10_000 + 99_010) == pytest.approx(1.0001)
    assert list(greg2.marks.steps()) == [10_000]
    assert list(greg2.updates.steps()) == [10_000 + 99_010 + 10_000]


def test_the_view_of_sparse_weights_is_the_weights() -> None:
    tx = granet_jax.transform(granet_jax.static(0.5), optax.sgd(0.25))
    state = tx.init(draw(0))
    params = granet_jax.apply_masks(draw(0), granet_jax.get_masks(state))
    view = granet_jax.sparse_view(params, (optax.EmptyState(), state))
    for name in SHAPES:
        np.testing.assert_array_equal(view[name], params[name])
    with pytest.raises(ValueError, match="must hold a state of"):
        granet_jax.sparse_view(params, optax.EmptyState())


def test_uses_that_do_not_fit() -> None:
    kast = granet_jax.top_kast(0.5, backward_sparsity=0.1)
    with pytest.raises(ValueError, match="adds to its gradient"):
        granet_jax.transform(kast)
    with pytest.raises(ValueError, match=r"ceiling must be above 0\.01"):
        granet_jax.greg2(0.5, ceiling=0.01)
    # A penalty that reads marked weights, of a method without.
    method = dataclasses.replace(
        granet_jax.static(0.5), penalty=penalties.exploration(0.1, 0.5)
    )
    tx = granet_jax.transform(method, optax.sgd(0.25))
    with pytest.raises(ValueError, match="set its `marked_sparsity`"):
        tx.update(draw(1), tx.init(draw(0)), draw(0))
