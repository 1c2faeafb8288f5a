"""Networks with ghosts: how they train, and that nothing of them is left."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data, models
from experiments.config.run import Config, MaskConfig, OptimizerConfig, ToSTConfig
from experiments.training import loop
from granet_jax import distributions, tost
from tests.helpers.runs import make, same

BOTH = ToSTConfig(neurons="swish", skips="conv", ghost_fraction=0.5)
CONFIG = Config(
    model="cnn-bn",
    method="rigl",
    sparsity=0.9,
    steps=12,
    eval_every=3,
    seeds=1,
    progress=False,
    masks=MaskConfig(interval=2),
    tost=BOTH,
)


# Compilation takes nearly all of the time.
maker_of = functools.cache(make)


def trained(config: Config, folder: Any, devices: int = 1) -> Any:
    maker = maker_of(config, devices)
    records, state = loop.fit(maker, [0], folder)
    return maker, records[0], state


DENSE_LAYERS: dict[str, Any] = {
    "model": "lenet-300-100",
    "tost": ToSTConfig(neurons="swish", ghost_fraction=0.5),
}


def with_ghosts(alpha: float) -> models.Ghosts:
    skip = models.Skip(tost.Skips(kind="conv"), jnp.float32(alpha))
    return models.Ghosts(lambda x: tost.soft_relu(x, 2.0), skip)


@pytest.mark.parametrize("name", models.WITH_SKIPS)
def test_ghosts_stand_beside_the_convolutions(name):
    model = models.create(name, classes=10)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def init(key, x, **ghosts):
        return model.init(key, x, train=False, **ghosts)

    plain = jax.eval_shape(init, key, x)
    haunted = jax.eval_shape(
        lambda key, x: init(key, x, ghosts=with_ghosts(1.0)), key, x
    )
    assert tost.drop_ghosts(haunted) == plain
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(haunted["params"])
    }
    ghosts = {name for name in names if tost.is_ghost(name)}
    kernels = [name for name in ghosts if name.endswith("kernel")]
    # Beside every 3 x 3 convolution of a block, and of what has no blocks; in
    # MobileNets, whose blocks are pairs, beside each of both.
    sizes = [leaf.shape[:2] for name, leaf in names.items() if leaf.ndim == 4]
    expected = sizes.count((3, 3))
    if name.startswith(("resnet", "wrn")):
        expected -= names.get("conv/kernel", x).shape[:2] == (3, 3)  # The stem.
    if name.startswith("mobilenet"):
        expected = len(sizes) - len(kernels)
    assert len(kernels) == expected > 2
    assert not any(models.maskable(name, names[name]) for name in ghosts)


def test_ghosts_change_no_weight_of_the_network():
    x = jax.random.normal(jax.random.key(0), (2, 12, 12, 3))
    model = models.create("cnn-bn", classes=10)

    @jax.jit
    def outputs(key, alpha):
        skip = models.Skip(tost.Skips(kind="conv"), alpha)
        faint = models.Ghosts(skip=skip)
        soft = with_ghosts(1.0)
        plain = model.init(key, x, train=False)
        haunted = model.init(key, x, train=False, ghosts=soft)
        return (
            (plain, haunted),
            model.apply(plain, x, train=False),
            model.apply(haunted, x, train=False, ghosts=faint),
            model.apply(haunted, x, train=False, ghosts=soft),
        )

    (plain, haunted), without, none, full = outputs(jax.random.key(1), jnp.float32(0))
    assert same(tost.drop_ghosts(haunted), plain)
    np.testing.assert_allclose(none, without, rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(full - without)).max() > 0.1


def test_every_network_takes_what_it_says():
    for name in models.NAMES:
        model = models.create(name, classes=10)
        takes = "ghosts" in type(model).__call__.__annotations__
        assert takes == (name in models.WITH_NEURONS)
    assert set(models.WITH_SKIPS) < set(models.WITH_NEURONS)


@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        ({}, 1),
        ({**DENSE_LAYERS, "fsdp": 2, "optimizer": OptimizerConfig(ema=0.9)}, 4),
        ({**DENSE_LAYERS, "parallel": "pmap"}, 2),
    ],
)
def test_after_the_ghosts_the_network_is_the_plain_one(changes, devices, tmp_path):
    config = dataclasses.replace(CONFIG, **changes)
    maker, records, state = trained(config, tmp_path / "run", devices)
    plain = maker_of(dataclasses.replace(config, tost=ToSTConfig()), devices)
    expected = plain.compiled_step.create([0])
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    total = sum(maker.mask_sizes.values())
    expected_active = distributions.total_count(total, 0.9)
    assert [r.sparsity.active for r in records] == 5 * [expected_active]
    # Its function is that of the plain network, bit for bit.
    (batch,) = loop.padded_batches(maker.dataset.test, 1024, devices)
    placed = plain.compiled_step.place_test(batch)
    score = plain.compiled_step.evaluate(state, placed)
    assert int(score.correct[0]) == records[-1].test_correct
    assert same(
        jax.device_get(score),
        jax.device_get(maker.compiled_step.evaluate(state, placed)),
    )


def test_the_ghost_phase_ends_at_its_step(tmp_path):
    maker = maker_of(CONFIG, 1)
    assert CONFIG.ghost_steps == 6
    early = maker.ghost_step
    assert early is not None
    assert [maker.compiled_step_at(step) is early for step in (0, 5, 6, 12)] == [
        True,
        True,
        False,
        False,
    ]
    # By hand: six steps with ghosts, their end, six without.
    state = early.create([0])
    for _ in range(6):
        state, _ = early.steps(state, maker.train_data, 1)
    assert "ghost_1" in state.params
    state = tost.drop_ghosts(state)
    for _ in range(6):
        state, _ = maker.compiled_step.steps(state, maker.train_data, 1)
    _, _, found = trained(CONFIG, tmp_path / "run")
    assert same(jax.device_get(found), jax.device_get(state))


def test_blocks_of_steps_end_where_the_ghosts_do(tmp_path):
    config = dataclasses.replace(
        CONFIG,
        model="lenet-300-100",
        eval_every=12,
        tost=ToSTConfig(neurons="swish", ghost_fraction=0.42),
    )
    assert config.ghost_steps == 5
    _, _, single = trained(config, tmp_path / "single")
    _, _, blocks = trained(dataclasses.replace(config, scan_block=4), tmp_path / "four")
    for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(blocks), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("stop", [4, 6])
def test_a_run_stopped_at_any_phase_goes_on_exactly(stop, tmp_path):
    _, whole_records, whole = trained(CONFIG, tmp_path / "whole")
    with pytest.raises(loop.StoppedError):
        loop.fit(maker_of(CONFIG, 1), [0], tmp_path / "run", stopped={stop: 15}.get)
    _, records, rest = trained(CONFIG, tmp_path / "run")
    assert same(jax.device_get(whole), jax.device_get(rest))
    strip = [r._replace(seconds=0.0) for r in whole_records]
    assert [r._replace(seconds=0.0) for r in records] == strip


def test_ghosts_as_in_the_code_are_kept(tmp_path):
    config = dataclasses.replace(
        CONFIG, tost=ToSTConfig(neurons="swish", skips="conv", as_in_code=True)
    )
    maker, records, state = trained(config, tmp_path / "run")
    assert maker.compiled_step_at(12) is maker.ghost_step
    kernel = state.params["ghost_1"]["ghost_conv"]["kernel"]
    # All output channels start equal, and are no more.
    assert kernel.shape == (1, 1, 16, 32)
    assert np.asarray(kernel).all()
    start = maker.ghost_step.create([0]).params["ghost_1"]["ghost_conv"]["kernel"]
    assert np.array_equal(start, np.full((1, 1, 16, 32), 1e-4, np.float32))
    assert not np.array_equal(kernel, start)
    # They carry no mask and are not counted.
    assert records[-1].sparsity.active == 2574
    assert "ghost_1/ghost_conv/kernel" not in records[-1].sparsity.leaves


def test_refined_labels_are_in_the_loss_of_training_only():
    plain = dataclasses.replace(CONFIG, model="lenet-300-100", tost=ToSTConfig())
    config = dataclasses.replace(plain, tost=ToSTConfig(labels=0.1))
    # In the usual convention the same amount is larger by 10 / 9.
    usual = dataclasses.replace(
        plain, optimizer=OptimizerConfig(label_smoothing=0.1 * 10 / 9)
    )
    losses, scores = [], []
    for each in (config, usual, plain):
        maker = make(each)
        state = maker.compiled_step.create([0])
        (batch,) = loop.padded_batches(data.load("digits").test, 1024, 1)
        scores.append(maker.compiled_step.evaluate(state, batch).loss[0])
        _, loss = maker.compiled_step.steps(state, maker.train_data, 1)
        losses.append(float(loss[0, 0]))
    assert scores[0] == scores[1] == scores[2]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert abs(losses[0] - losses[2]) > 1e-4
