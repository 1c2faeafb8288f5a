"""The state that training starts from: masks from a source, scales, on any devices."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import granet_jax
from experiments import data
from experiments.config.run import Config, MaskConfig, OptimizerConfig, ToSTConfig
from experiments.training import initial_masks, initial_state, loop
from experiments.training.step import TrainStep
from granet_jax import distributions
from tests.helpers import runs

CONFIG = dataclasses.replace(
    runs.CONFIG, method="static", sparsity=0.95, steps=8, eval_every=4
)
LRSI = ToSTConfig(lrsi=True)


def with_source(source: str, **changes: Any) -> Config:
    few = {"iterative-snip": 3, "force": 3, "synflow": 5}
    masks = MaskConfig(source=source, rounds=few.get(source))  # type: ignore[arg-type]
    return dataclasses.replace(CONFIG, masks=masks, **changes)


def train_step(config: Config) -> TrainStep:
    return TrainStep(config, data.load("digits"))


def initial_weights(config: Config, seed: int) -> Any:
    """The initial weights without any masks."""
    return train_step(config).variables(jnp.uint32(seed))["params"]


@functools.cache
def weights(config: Config, seed: int) -> tuple[Any, Any]:
    params, _, masks = initial_state.weights(train_step(config), seed)
    return params, masks


@pytest.mark.parametrize(
    "source", ["magnitude", "snip", "iterative-snip", "grasp", "force", "synflow"]
)
def test_masks_of_a_source_are_on_the_drawn_weights(source):
    # Magnitude empties a layer at 95%.
    sparsity = 0.5 if source == "magnitude" else 0.95
    config = with_source(source, sparsity=sparsity)
    params, masks = weights(config, 3)
    active = distributions.total_count(runs.TOTAL, sparsity)
    assert granet_jax.sparsity(masks).active == active
    dense = initial_weights(config, 3)
    assert runs.same(params, jax.device_get(granet_jax.apply_masks(dense, masks)))
    random = granet_jax.init_masks(granet_jax.static(sparsity), dense, seed=3)
    assert not runs.same(masks, jax.device_get(random))


@pytest.mark.parametrize(
    ("form", "devices"),
    [
        ({}, 1),
        ({"fsdp": 4, "optimizer": OptimizerConfig(ema=0.9)}, 8),
        ({"parallel": "pmap"}, 4),
        ({"seeds": 2, "vmap_seeds": True}, 1),
    ],
    ids=["one", "fsdp", "pmap", "vmap"],
)
def test_training_starts_from_the_masks_on_any_devices(form, devices):
    config = with_source("snip", **form)
    step = runs.create_setup(config, devices).compiled_step
    seeds = range(step.lanes)
    state = jax.device_get(step.snapshot(initial_state.state(step, seeds)))
    expected = [weights(with_source("snip"), seed) for seed in seeds]
    params, masks = expected[0]
    if step.lanes > 1:
        params, masks = jax.tree.map(lambda *lanes: np.stack(lanes), *expected)
    assert runs.same((state.params, state.opt_state.masks), (params, masks))
    assert state.average == () or runs.same(state.average, params)


def test_examples_have_all_classes_alike_and_are_of_the_seed():
    config = dataclasses.replace(CONFIG, masks=MaskConfig(source="snip", images=157))
    step = train_step(config)
    first = initial_masks.examples(step, 1)
    assert [len(labels) for _, labels in first] == [79, 78]
    labels = np.concatenate([labels for _, labels in first])
    assert sorted(np.bincount(labels)) == 3 * [15] + 7 * [16]
    assert runs.same(first, initial_masks.examples(step, 1))
    assert not runs.same(first[0], initial_masks.examples(step, 2)[0])
    # They are normalised training images, each once.
    images = np.concatenate([images for images, _ in first]).reshape(157, -1)
    training_images = np.asarray(step.inputs(data.load("digits").train.inputs)).reshape(
        -1, 64
    )
    assert len(np.unique(images, axis=0)) == 157
    assert {x.tobytes() for x in images} <= {x.tobytes() for x in training_images}


def test_a_dynamic_method_starts_from_the_source_and_continues_exactly(
    tmp_path, monkeypatch
):
    runs.use_small_networks(monkeypatch)
    config = with_source("snip", method="rigl", tost=LRSI)
    masks = dataclasses.replace(config.masks, interval=2)
    each = runs.create_setup(dataclasses.replace(config, masks=masks))
    (records,), whole = loop.fit(each, [1], tmp_path / "whole")
    # RigL keeps the number of every layer.
    _, masks = weights(config, 1)
    assert records[-1].sparsity.leaves == granet_jax.sparsity(masks).leaves
    with pytest.raises(loop.StoppedError):
        loop.fit(each, [1], tmp_path / "run", stopped={5: 15}.get)
    _, rest = loop.fit(each, [1], tmp_path / "run")
    assert runs.same(jax.device_get(whole), jax.device_get(rest))


def test_rescaled_weights_are_multiples_of_the_drawn_ones():
    config = dataclasses.replace(CONFIG, tost=LRSI)
    params, masks = weights(config, 0)
    state = train_step(config).create(jnp.uint32(0))
    assert runs.same(masks, jax.device_get(state.opt_state.masks))
    for name, layer in params.items():
        before = np.asarray(state.params[name]["kernel"])
        mask = masks[name]["kernel"]
        assert not layer["kernel"][~mask].any()
        ratio = layer["kernel"][mask] / before[mask]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
        assert abs(ratio[0] - 1) > 0.05
        assert not layer["bias"].any()
    # Dense training is rescaled too.
    dense = dataclasses.replace(config, method="dense", sparsity=0.0)
    params, masks = weights(dense, 0)
    assert masks is None
    assert not runs.same(params, jax.device_get(initial_weights(dense, 0)))
