"""Cyclical pruning, AC/DC and SCULPT: schedules, and moments that start anew.

`test_methods` compares whole trainings with the reference.
"""

import dataclasses
import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax import schedules
from granet_jax.phases import Revive
from tests.helpers.compiler_options import QUICK
from tests.helpers.training import make_step
from tests.helpers.trees import assert_same

SHAPES = {"bias": (8,), "conv": (3, 3, 2, 4), "dense": (6, 8)}
STEPS = 12


def draw(step: int) -> dict[str, np.ndarray]:
    """Multiples of 1/8, none of them zero, that differ from step to step."""
    rng = np.random.default_rng(step)
    return {
        name: rng.choice([-1, 1], shape) * rng.integers(1, 17, shape) / np.float32(8)
        for name, shape in SHAPES.items()
    }


def train(tx: optax.GradientTransformation, steps: int) -> tuple[Any, list[Any]]:
    """Returns the compiled step, and (params, state) before and after every step."""
    history: list[Any] = [(draw(0), tx.init(draw(0)))]
    step = jax.jit(make_step(tx), compiler_options=QUICK)
    for t in range(1, steps + 1):
        history.append(step(*history[-1], draw(t)))
    return step, history


def test_one_cycle_is_gradual_pruning_and_a_square_wave_is_acdc() -> None:
    for cyclical, other in (
        (
            granet_jax.cyclical(0.9, STEPS, cycles=1, ramp=1.0, interval=2),
            granet_jax.gmp(0.9, STEPS, interval=2),
        ),
        (
            granet_jax.cyclical(0.8, STEPS, cycles=3, ramp=0.5, interval=2),
            granet_jax.acdc(0.8, (2, 4, 6, 8, 10)),
        ),
    ):
        assert list(cyclical.updates.steps()) == list(other.updates.steps())
        for t in range(STEPS + 1):
            assert cyclical.sparsity(t) == other.sparsity(t)
        assert (*other.phases, Revive())[:2] == cyclical.phases
        assert (cyclical.scope, cyclical.weights) == (other.scope, other.weights)
        assert cyclical.distribution == other.distribution


def test_acdc_follows_its_timeline() -> None:
    # Epochs of ImageNet: sparse from 10, 20, ..., 70 and 85 on, dense in between.
    method = granet_jax.acdc(0.9, (*range(10, 80, 5), 85))
    sparse = [e for e in range(100) if method.sparsity(e) == 0.9]
    expected = [e for start in range(10, 71, 10) for e in range(start, start + 5)]
    assert sparse == [*expected, *range(85, 100)]
    assert method.resets.steps() == tuple(range(15, 76, 10))
    cifar = granet_jax.acdc(0.9, range(10, 171, 20))
    switches = [e for e in cifar.updates.steps() if cifar.sparsity(e)]
    assert switches == [*range(10, 171, 40)]
    assert cifar.resets.steps() == (30, 70, 110, 150)


def test_moments_start_anew_from_what_init_returns() -> None:
    # The base iterate of schedule-free optimizers starts from the parameters.
    inner = optax.contrib.schedule_free(optax.sgd(0.25), learning_rate=0.25, b1=0.5)
    tx = granet_jax.transform(granet_jax.acdc(0.5, (1, 2, 9)), inner)
    step, (*_, (params, state), last) = train(tx, 3)
    # The second step still ends with the old iterate; the third begins with the new.
    assert not np.array_equal(state.inner_state.z["bias"], params["bias"])
    fresh = state._replace(
        count=state.count + 1, inner_state=state.inner_state._replace(z=params)
    )
    _, expected = step(params, fresh, draw(3))
    assert_same(last[1].inner_state, expected.inner_state)


def test_moments_that_start_above_zero_do_so_at_all_weights() -> None:
    method = dataclasses.replace(
        granet_jax.gmp(0.5, 2, interval=2), resets=schedules.listed((2,))
    )
    tx = granet_jax.transform(method, optax.adagrad(0.25))
    step, history = train(tx, 2)
    _, state = step(*history[-1], jax.tree.map(np.zeros_like, draw(0)))
    for moments in state.inner_state[0].sum_of_squares.values():
        np.testing.assert_array_equal(moments, np.full_like(moments, 0.1))


@hypothesis.given(st.integers(1, 5), st.integers(4, 60), st.data())
def test_every_training_ends_at_its_sparsity(cycles, period, data) -> None:
    interval = data.draw(st.integers(1, period // 2))
    ramp = data.draw(st.floats(0.5, 0.95))
    hypothesis.assume(math.floor(ramp * period) >= interval)
    total = cycles * period
    method = granet_jax.cyclical(
        0.8, total, cycles=cycles, interval=interval, ramp=ramp, initial_sparsity=0.1
    )
    assert method.sparsity(total) == method.sparsity(total - 1) == 0.8
    starts = [c * period for c in range(cycles)]
    assert all(math.isclose(method.sparsity(t), 0.1) for t in starts)
    steps = method.updates.steps()
    assert set(starts[1:]) <= set(steps)
    assert max(steps) < total
    for t in range(1, total + 1):
        assert t in steps or method.sparsity(t) == method.sparsity(t - 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_steps": 1001}, "the 4 cycles, got 1001: .* Take 1000 or 1004 steps"),
        ({"total_steps": 3}, "Take 4 steps"),
        ({"ramp": 1.0, "interval": 50}, "ramp must end before the cycle"),
        ({"interval": 188}, "interval must be at most the 187 steps"),
    ],
)
def test_arguments_that_do_not_fit(changes: Any, message: str) -> None:
    arguments = {"sparsity": 0.9, "total_steps": 1000, "interval": 10, **changes}
    with pytest.raises(ValueError, match=message):
        granet_jax.cyclical(**arguments)


def test_uses_that_do_not_fit() -> None:
    for method in (granet_jax.acdc(0.9, (1, 2, 3)), granet_jax.greg1(0.9)):
        with pytest.raises(ValueError, match=f"{method.name} resets .* or adds"):
            granet_jax.transform(method)
    with pytest.raises(ValueError, match="the 3 cycles"):
        granet_jax.sculpt(0.9, 10, cycles=2)
    projected = granet_jax.cyclical(
        0.9, 100, interval=1, initial_sparsity=0.5, recovery="projected"
    )
    shapes = {"w": jax.ShapeDtypeStruct((4, 4), jnp.float32)}
    for params in (shapes, {**shapes, "v": jnp.ones((4, 4))}):
        with pytest.raises(TypeError, match="params must be arrays: cyclical chooses"):
            granet_jax.init_masks(projected, params)
    # Where everything is traced, so are the masks.
    state = jax.eval_shape(granet_jax.transform(projected).init, shapes)
    assert jax.tree.leaves(granet_jax.get_masks(state))[0].shape == (4, 4)
