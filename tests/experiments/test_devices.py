"""One training step in all its forms: jit, pmap, fully sharded, vmap over seeds.

All start from the same state and take the same batch, so that one step gives the same
numbers up to rounding; masks and counts are equal exactly.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments import data
from experiments.config.run import Config, DataConfig, MaskConfig, OptimizerConfig
from experiments.training import loop

CONFIG = Config(
    model="lenet-300-100",
    method="rigl",
    steps=12,
    seeds=1,
    progress=False,
    masks=MaskConfig(interval=3),
    data=DataConfig(flip=True),
)
FORMS: dict[str, tuple[dict[str, Any], int]] = {
    "jit": ({}, 8),
    "pmap": ({"parallel": "pmap"}, 8),
    "fsdp": ({"fsdp": 4}, 8),
}


@functools.cache
def make(devices: int, **changes: Any) -> loop.TrainSetup:
    config = dataclasses.replace(CONFIG, **changes)
    return loop.create(config, data.load("digits"), jax.devices()[:devices])


def run(maker: loop.TrainSetup, steps: int) -> tuple[Any, np.ndarray]:
    """The state after some steps, as saved, and the losses (lanes, steps)."""
    state = maker.compiled_step.create(range(maker.compiled_step.lanes))
    losses = []
    for _ in range(steps):
        state, loss = maker.compiled_step.steps(state, maker.train_data, 1)
        losses.append(np.asarray(jax.block_until_ready(loss)))
    return maker.compiled_step.snapshot(state), np.concatenate(losses, axis=1)


@pytest.fixture(scope="module")
def one_device() -> tuple[Any, np.ndarray]:
    state, losses = run(make(1), 4)
    return jax.device_get(state), losses


@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains_alike(form, one_device):
    changes, devices = FORMS[form]
    maker = make(devices, **changes)
    state, losses = run(maker, 4)
    expected, expected_losses = one_device
    assert losses.shape == (1, 4)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for found, want in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True
    ):
        np.testing.assert_allclose(found, want, rtol=1e-2, atol=1e-4)
    assert np.array_equal(state.order, expected.order)
    assert int(state.step) == 4
    # The third step changed the masks; rounding may decide between near equals.
    found, want = (jax.tree.leaves(s.opt_state.masks) for s in (state, expected))
    for a, b in zip(found, want, strict=True):
        assert int(np.sum(a)) == int(np.sum(b))
        assert np.mean(np.asarray(a) != np.asarray(b)) < 1e-3


@pytest.mark.parametrize("form", ["pmap", "fsdp"])
def test_weights_that_live_on_are_trained_alike(form):
    changes, devices = FORMS[form]
    states = []
    for maker in (
        make(devices, method="top-kast", **changes),
        make(1, method="top-kast"),
    ):
        state, losses = run(maker, 4)
        states.append(jax.device_get(state))
        seen = maker.compiled_step.inspect(maker.compiled_step.restore(state))
        # The network uses none of the weights outside the masks.
        assert np.asarray(seen.broken).sum() == 0
        assert np.asarray(seen.active).sum() == 5_020
        assert np.isfinite(losses).all()
    for a, b in zip(*(jax.tree.leaves(s.params) for s in states), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4)
    for part in ("masks", "marked"):
        trees = [jax.tree.leaves(getattr(s.opt_state, part)) for s in states]
        for a, b in zip(*trees, strict=True):
            assert int(a.sum()) == int(b.sum()) > 0
            assert np.mean(a != b) < 1e-3
    kernel = states[0].params["hidden_0"]["kernel"]
    assert (kernel != 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_the_initial_state_is_the_same_to_the_bit(form):
    changes, devices = FORMS[form]
    found, want = (
        m.compiled_step.snapshot(m.compiled_step.create([3]))
        for m in (make(devices, **changes), make(1))
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_evaluation_counts_alike(form):
    changes, devices = FORMS[form]
    scores = []
    for maker in (make(devices, **changes), make(1)):
        state = maker.compiled_step.create([1])
        batches = maker.test
        assert batches is not None
        scores.append(
            [jax.device_get(maker.compiled_step.evaluate(state, b)) for b in batches]
        )
    counts = [[score.correct.tolist() for score in each] for each in scores]
    assert counts[0] == counts[1]
    sums = [[score.loss.tolist() for score in each] for each in scores]
    np.testing.assert_allclose(*sums, rtol=1e-5)


def test_fsdp_keeps_a_part_of_parameters_moments_and_masks_on_each_device():
    maker = make(8, fsdp=4)
    state = maker.compiled_step.create([0])
    for _ in range(3):
        state, _ = jax.block_until_ready(
            maker.compiled_step.steps(state, maker.train_data, 1)
        )
    kernel = state.params["hidden_0"]["kernel"]
    mask = state.opt_state.masks["hidden_0"]["kernel"]
    moments = [
        x for x in jax.tree.leaves(state.opt_state.inner_state) if x.shape == (64, 300)
    ]
    assert len(moments) == 1
    for x in (kernel, mask, *moments):
        assert x.shape == (64, 300)
        assert x.sharding.spec == P(None, "fsdp")
        assert x.addressable_shards[0].data.shape == (64, 75)
    assert state.order.sharding.is_fully_replicated
    seen = maker.compiled_step.inspect(state)
    assert np.asarray(seen.broken).sum() == 0
    assert np.asarray(seen.finite).all()


def test_the_batch_is_split_over_the_devices():
    maker = make(8)
    state = maker.compiled_step.abstract()
    text = (
        maker.compiled_step.steps.lower(state, maker.train_data, 1).compile().as_text()
    )
    # Each device's matrix product with the first layer has 8 of the 64 rows.
    assert "f32[8,300]" in text


def test_seeds_under_vmap_are_the_runs_one_by_one():
    together = make(1, vmap_seeds=True, seeds=3)
    assert together.compiled_step.lanes == 3
    state, losses = run(together, 4)
    assert losses.shape == (3, 4)
    assert state.step.shape == state.opt_state.count.shape == ()
    for seed in range(3):
        alone = make(1)
        expected = alone.compiled_step.create([seed])
        alone_losses = []
        for _ in range(4):
            expected, loss = alone.compiled_step.steps(expected, alone.train_data, 1)
            alone_losses.append(float(loss[0, 0]))
        np.testing.assert_allclose(losses[seed], alone_losses, rtol=1e-4)
        assert np.array_equal(state.order[seed], expected.order)
        for layer in ("hidden_0", "hidden_1", "output"):
            found = state.opt_state.masks[layer]["kernel"][seed]
            want = expected.opt_state.masks[layer]["kernel"]
            assert int(found.sum()) == int(want.sum())
            assert np.mean(np.asarray(found) != np.asarray(want)) < 1e-3
    first, second = (state.opt_state.masks["output"]["kernel"][i] for i in (0, 1))
    assert not np.array_equal(first, second)


def test_under_vmap_whether_to_update_stays_one_question():
    """Were it one for each seed, every step would update the masks and drop the result.

    An update is a loop of 0 or 1 trips that carries the masks and its condition.
    """
    maker = make(1, vmap_seeds=True, seeds=2)
    state = maker.compiled_step.abstract()
    compiled_step = jax.make_jaxpr(maker.compiled_step.steps, static_argnums=2)
    assert () in flags(compiled_step(state, maker.train_data, 1))
    assert (2,) not in flags(compiled_step(state, maker.train_data, 1))
    # The naive form, counters batched too, has one for each.
    step = maker.compiled_step.train_step.step
    one = jax.eval_shape(maker.compiled_step.train_step.create, np.uint32(0))
    batched = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), one)
    naive = jax.make_jaxpr(jax.vmap(step, in_axes=(0, None)))
    assert (2,) in flags(naive(batched, maker.train_data))


def flags(jaxpr: Any) -> set[tuple[int, ...]]:
    """Shapes of the booleans that outermost loops over what is active carry."""
    shapes = set()
    for eqn in jaxpr.eqns:
        carried = [v.aval for v in eqn.outvars]
        codes = {x.shape for x in carried if x.dtype == np.int8}
        if eqn.primitive.name == "while" and (2, 64, 300) in codes:
            shapes |= {x.shape for x in carried if x.dtype == bool}
            continue
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            shapes |= flags(inner)
    return shapes


@pytest.mark.parametrize(
    ("changes", "devices", "message"),
    [
        ({"data": DataConfig(batch_size=60)}, 8, "multiple of the 8 devices, got 60"),
        (
            {"optimizer": OptimizerConfig(accumulate=16)},
            8,
            r"optimizer.accumulate must be a multiple of the 8 devices, got 4",
        ),
        ({"fsdp": 3}, 8, "fsdp must divide the number of devices, 8, got 3"),
        ({"vmap_seeds": True, "seeds": 2}, 2, "vmap_seeds trains on one device, got 2"),
    ],
)
def test_what_does_not_fit_the_devices_is_refused(changes, devices, message):
    with pytest.raises(ValueError, match=message):
        make(devices, **changes)


def test_text_trains_too():
    rng = np.random.default_rng(0)
    rows = rng.integers(97, 101, (64, 17), dtype=np.uint8)
    split = data.Split(rows[:, :-1], rows[:, 1:].astype(np.int32))
    dataset = data.from_arrays("letters", split, split, classes=256)
    config = dataclasses.replace(
        CONFIG,
        model="gpt",
        data=DataConfig(batch_size=8, shift=0, flip=False),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-3),
    )
    maker = loop.create(config, dataset, jax.devices()[:1])
    state, losses = run(maker, 6)
    assert jnp.isfinite(losses).all()
    assert losses[0, -1] < losses[0, 0]
    (batch,) = maker.test or ()
    score = maker.compiled_step.evaluate(state, batch)
    assert 0 < int(score.correct[0]) <= split.labels.size
