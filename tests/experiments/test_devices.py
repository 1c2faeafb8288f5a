"""One training step, by hand and in all its forms: jit, pmap, fully sharded, vmap.

All forms start from the same state and take the same batch. One step gives the same
numbers up to rounding; counts of weights are equal exactly.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments import data
from experiments.config.run import DataConfig, MaskConfig, OptimizerConfig
from experiments.training import loop
from tests.helpers import runs

CONFIG = dataclasses.replace(
    runs.CONFIG,
    method="rigl",
    steps=12,
    masks=MaskConfig(interval=3),
    data=DataConfig(flip=True),
)
FORMS = {"jit": {}, "pmap": {"parallel": "pmap"}, "fsdp": {"fsdp": 4}}


def setup(devices: int, **changes: Any) -> loop.TrainSetup:
    return runs.create_setup(dataclasses.replace(CONFIG, **changes), devices)


@functools.cache
def train_four_steps(devices: int, **changes: Any) -> tuple[Any, np.ndarray]:
    """The state after 4 steps, as saved, and the losses (lanes, steps)."""
    each = setup(devices, **changes)
    step, losses = each.compiled_step, []
    state = step.create(range(step.lanes))
    for _ in range(4):
        state, loss = step.steps(state, each.train_data, 1)
        losses.append(np.asarray(jax.block_until_ready(loss)))
    # The network uses none of the weights outside the masks.
    inspection = step.inspect(state)
    assert np.asarray(inspection.broken).sum() == 0
    assert np.asarray(inspection.finite).all()
    assert (np.asarray(inspection.active).sum(axis=-1) == 5_020).all()
    return step.snapshot(state), np.concatenate(losses, axis=1)


def assert_trained_alike(state: Any, expected: Any) -> None:
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    runs.assert_close(state.params, expected.params, rtol=1e-2, atol=1e-4)
    assert np.array_equal(state.order, expected.order)
    for part in ("masks", "marked"):
        trees = (getattr(s.opt_state, part) for s in (state, expected))
        for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
            assert int(np.sum(a)) == int(np.sum(b)) > 0
            # Rounding may decide between near equals.
            assert np.mean(np.asarray(a) != np.asarray(b)) < 1e-3


def reference_loss(params: Any, x: np.ndarray, labels: np.ndarray, smoothing: float):
    targets = np.eye(10)[labels] * (1 - smoothing) + smoothing / 10
    outputs = jax.nn.log_softmax(runs.lenet(params, x))
    return -jnp.mean(jnp.sum(targets * outputs, axis=1))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_one_step_is_the_textbook_step(accumulate):
    """Loss with label smoothing, Nesterov, decay and average, written out by hand."""
    config = OptimizerConfig(
        label_smoothing=0.1, accumulate=accumulate, ema=0.9, weight_decay=0.01
    )
    dense = {"method": "dense", "masks": MaskConfig(), "data": DataConfig(shift=0)}
    each = setup(1, optimizer=config, **dense)
    dataset: Any = each.dataset
    state = each.compiled_step.create([0])
    params = jax.device_get(state.params)
    state, loss = each.compiled_step.steps(state, each.train_data, 1)
    rows = np.asarray(state.order)[:64]
    assert not np.array_equal(rows, np.arange(64))
    x = (np.asarray(dataset.train.inputs)[rows] / 255 - dataset.mean) / dataset.std
    x = x.reshape(64, 64).astype(np.float32)
    with jax.numpy_rank_promotion("allow"):
        expected, grads = jax.value_and_grad(reference_loss)(
            params, x, dataset.train.labels[rows], 0.1
        )
    assert float(loss[0, 0]) == pytest.approx(float(expected), rel=1e-5)
    for name in ("hidden_0", "hidden_1", "output"):
        # Weights decay, and biases do not.
        for kind, decay in (("kernel", 0.01), ("bias", 0.0)):
            before = params[name][kind]
            gradient = np.asarray(grads[name][kind]) + decay * before
            after = before - 0.1 * (gradient + 0.9 * gradient)
            # In the first step the decay of the average is 1 / 10.
            average = 0.1 * before + 0.9 * after
            for array, target in ((state.params, after), (state.average, average)):
                np.testing.assert_allclose(
                    array[name][kind], target, rtol=1e-5, atol=1e-6
                )


def test_the_first_updates_of_weights_that_entered_are_smaller():
    """RigL updates the masks in the third step: the weights that enter are zero."""
    plain, _ = train_four_steps(1)
    warm, _ = train_four_steps(1, masks=MaskConfig(interval=3, warmup=4))
    entered = np.asarray(plain.opt_state.entered["hidden_0"]["kernel"])
    before, after = (np.asarray(x.params["hidden_0"]["kernel"]) for x in (plain, warm))
    assert np.count_nonzero(before[entered]) > 100
    np.testing.assert_array_equal(after, np.where(entered, before / 4, before))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains_and_evaluates_alike(form):
    """The third of the four steps changes the masks."""
    state, losses = train_four_steps(8, **FORMS[form])
    expected, expected_losses = train_four_steps(1)
    assert losses.shape == (1, 4)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    assert int(state.step) == 4
    assert_trained_alike(state, expected)
    scores, initial_states = [], []
    for each in (setup(8, **FORMS[form]), setup(1)):
        state = each.compiled_step.create([3])
        initial_states.append(jax.device_get(each.compiled_step.snapshot(state)))
        evaluate = functools.partial(each.compiled_step.evaluate, state)
        scores.append(jax.device_get([evaluate(batch) for batch in each.test_batches]))
    # The initial state is the same to the bit.
    assert runs.same(*initial_states)
    for one, other in zip(*scores, strict=True):
        assert one.correct.tolist() == other.correct.tolist()
        np.testing.assert_allclose(one.loss, other.loss, rtol=1e-5)


def test_weights_that_live_on_are_trained_alike():
    state, _ = train_four_steps(8, method="top-kast", fsdp=4)
    expected, _ = train_four_steps(1, method="top-kast")
    assert_trained_alike(state, expected)
    assert (np.asarray(state.params["hidden_0"]["kernel"]) != 0).all()


def test_devices_share_the_batch_and_fsdp_the_parameters_moments_and_masks():
    state, _ = train_four_steps(8, fsdp=4)
    inner = jax.tree.leaves(state.opt_state.inner_state)
    (moment,) = [x for x in inner if x.shape == (64, 300)]
    mask = state.opt_state.masks["hidden_0"]["kernel"]
    for x in (state.params["hidden_0"]["kernel"], mask, moment):
        assert x.sharding.spec == P(None, "fsdp")
        assert x.addressable_shards[0].data.shape == (64, 75)
    assert state.order.sharding.is_fully_replicated
    each = setup(8)
    step = each.compiled_step
    program = step.steps.lower(step.abstract(), each.train_data, 1).compile()
    # Each device's matrix product with the first layer has 8 of the 64 rows.
    assert "f32[8,300]" in program.as_text()


def test_seeds_under_vmap_are_the_runs_one_by_one():
    state, losses = train_four_steps(1, vmap_seeds=True, seeds=2)
    assert losses.shape == (2, 4)
    assert state.step.shape == state.opt_state.count.shape == ()
    alone = setup(1)
    for seed in range(2):
        expected, alone_losses = alone.compiled_step.create([seed]), []
        for _ in range(4):
            expected, loss = alone.compiled_step.steps(expected, alone.train_data, 1)
            alone_losses.append(float(loss[0, 0]))
        np.testing.assert_allclose(losses[seed], alone_losses, rtol=1e-4)
        assert np.array_equal(state.order[seed], expected.order)
        for layer in ("hidden_0", "hidden_1", "output"):
            actual = state.opt_state.masks[layer]["kernel"][seed]
            expected_mask = expected.opt_state.masks[layer]["kernel"]
            assert int(actual.sum()) == int(expected_mask.sum())
            assert np.mean(np.asarray(actual) != np.asarray(expected_mask)) < 1e-3
    first, second = state.opt_state.masks["output"]["kernel"]
    assert not np.array_equal(first, second)


def test_text_trains_too():
    rng = np.random.default_rng(0)
    rows = rng.integers(97, 101, (64, 17), dtype=np.uint8)
    split = data.Split(rows[:, :-1], rows[:, 1:].astype(np.int32))
    dataset = data.from_arrays("letters", split, split, classes=256)
    config = dataclasses.replace(
        CONFIG,
        model="gpt",
        method="static",
        masks=MaskConfig(),
        data=DataConfig(batch_size=8, shift=0, flip=False),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-3),
    )
    each = loop.create(config, dataset, jax.devices()[:1])
    state, losses = each.compiled_step.create([0]), []
    for _ in range(6):
        state, loss = each.compiled_step.steps(state, each.train_data, 1)
        losses.append(float(loss[0, 0]))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    (batch,) = each.test_batches or ()
    score = each.compiled_step.evaluate(state, batch)
    assert 0 < int(score.correct[0]) <= split.labels.size
