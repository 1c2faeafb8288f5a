"""What training starts from: masks from a source, scales, on any devices."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from experiments import data, models
from experiments.config.run import Config, MaskConfig, OptimizerConfig, ToSTConfig
from experiments.training import initial_masks, initial_state, loop
from experiments.training.devices import CompiledStep
from experiments.training.step import TrainStep
from granet_jax import distributions, mask_sources, tost
from tests.helpers.runs import make, same

SOURCES = ("magnitude", "snip", "iterative-snip", "grasp", "force", "synflow")
FEW = {"iterative-snip": 3, "force": 3, "synflow": 5}
CONFIG = Config(
    model="lenet-300-100",
    method="static",
    sparsity=0.95,
    steps=8,
    eval_every=4,
    seeds=1,
    progress=False,
)
TOTAL = 64 * 300 + 300 * 100 + 100 * 10


def with_source(source: str, **changes: Any) -> Config:
    masks = MaskConfig(source=source, rounds=FEW.get(source))  # type: ignore[arg-type]
    return dataclasses.replace(CONFIG, masks=masks, **changes)


def functions(config: Config) -> TrainStep:
    return TrainStep(config, data.load("digits"))


def drawn(config: Config, seed: int) -> Any:
    """The initial weights without any masks."""
    return functions(config).variables(jnp.uint32(seed))["params"]


@functools.cache
def compiled_step(devices: int = 1, **changes: Any) -> CompiledStep:
    return make(dataclasses.replace(CONFIG, **changes), devices).compiled_step


@functools.cache
def weights(config: Config, seed: int) -> tuple[Any, Any]:
    return initial_state.weights(functions(config), seed)


def started(config: Config, of: list[int], devices: int = 1, **form: Any) -> Any:
    """The state at step 0, by a program that is the same for all configurations."""
    shared = compiled_step(devices, **form)
    own = dataclasses.replace(
        shared,
        train_step=dataclasses.replace(
            shared.train_step, config=dataclasses.replace(config, **form)
        ),
    )
    return jax.device_get(shared.snapshot(initial_state.state(own, of)))


@pytest.mark.parametrize("source", SOURCES)
def test_training_starts_from_the_masks_of_the_source(source):
    config = with_source(source)
    if source == "magnitude":
        # At 95%, that empties a layer.
        config = dataclasses.replace(config, sparsity=0.5)
    state = started(config, [3])
    params, masks = weights(config, 3)
    assert same(state.opt_state.masks, masks)
    assert same(state.params, params)
    assert granet_jax.sparsity(masks).active == distributions.total_count(
        TOTAL, config.sparsity
    )
    # The weights are the drawn ones, where active.
    dense = drawn(config, 3)
    assert same(params, jax.device_get(granet_jax.apply_masks(dense, masks)))
    random = granet_jax.init_masks(granet_jax.static(config.sparsity), dense, seed=3)
    assert not same(masks, jax.device_get(random))


def test_the_masks_are_those_of_the_library():
    config = with_source("snip")
    found = initial_masks.masks(functions(config), drawn(config, 0), {}, 0)
    model = models.create("lenet-300-100", classes=10)

    def loss(params, batch):
        logits = model.apply({"params": params}, batch[0], train=False)
        entropy = optax.softmax_cross_entropy_with_integer_labels
        return entropy(logits, batch[1]).mean()

    batches = initial_masks.examples(functions(config), 0)
    assert [len(labels) for _, labels in batches] == [100]
    grads = jax.grad(loss)(drawn(config, 0), batches[0])
    scores = [
        np.abs(np.asarray(p) * np.asarray(g))
        for p, g in zip(
            jax.tree.leaves(drawn(config, 0)), jax.tree.leaves(grads), strict=True
        )
        if p.ndim == 2
    ]
    everything = np.concatenate([s.ravel() for s in scores])
    least = np.sort(everything)[-math.floor(0.05 * TOTAL + 0.5)]
    for mask, score in zip(jax.tree.leaves(found), scores, strict=True):
        # Rounding may decide between near equals.
        clear = np.abs(score - least) > 1e-5 * least
        assert np.array_equal(np.asarray(mask)[clear], (score >= least)[clear])


def test_examples_have_all_classes_alike_and_are_of_the_seed():
    config = dataclasses.replace(CONFIG, masks=MaskConfig(source="snip", images=157))
    first = initial_masks.examples(functions(config), 1)
    assert [len(labels) for _, labels in first] == [79, 78]
    labels = np.concatenate([labels for _, labels in first])
    assert sorted(np.bincount(labels)) == 3 * [15] + 7 * [16]
    assert same(first, initial_masks.examples(functions(config), 1))
    assert not same(first[0], initial_masks.examples(functions(config), 2)[0])
    # They are normalised training images, each once.
    images = np.concatenate([images for images, _ in first]).reshape(157, -1)
    train = data.load("digits").train
    known = np.asarray(functions(config).inputs(train.inputs)).reshape(-1, 64)
    assert len(np.unique(images, axis=0)) == 157
    assert {x.tobytes() for x in images} <= {x.tobytes() for x in known}


@pytest.mark.parametrize(
    ("changes", "devices"),
    [({}, 8), ({"fsdp": 4}, 8), ({"parallel": "pmap"}, 4)],
    ids=["jit", "fsdp", "pmap"],
)
def test_the_masks_are_the_same_on_any_devices(changes, devices):
    config = with_source("snip", optimizer=OptimizerConfig(ema=0.9))
    form = {**changes, "optimizer": OptimizerConfig(ema=0.9)}
    state = started(config, [5], devices, **form)
    params, masks = weights(with_source("snip"), 5)
    assert same(state.params, params)
    assert same(state.average, params)
    assert same(state.opt_state.masks, masks)


def test_seeds_at_once_have_masks_of_their_own():
    config = with_source("snip")
    state = started(config, [0, 1], seeds=2, vmap_seeds=True)
    for seed in (0, 1):
        expected = weights(config, seed)
        lane = jax.tree.map(
            lambda x, seed=seed: x[seed], (state.params, state.opt_state.masks)
        )
        assert same(lane, expected)


def test_a_dynamic_method_starts_from_the_source(tmp_path):
    config = with_source("snip", method="rigl", steps=8)
    config = dataclasses.replace(
        config, masks=dataclasses.replace(config.masks, interval=2)
    )
    (records,), _ = loop.fit(make(config), [0], tmp_path / "run")
    _, masks = initial_state.weights(functions(config), 0)
    # RigL keeps the number of every layer.
    assert records[-1].sparsity.leaves == granet_jax.sparsity(masks).leaves


def test_a_run_from_a_source_goes_on_exactly(tmp_path):
    config = with_source("synflow", tost=ToSTConfig(lrsi=True))
    maker, wishes = make(config), {5: 15}
    whole = loop.fit(maker, [1], tmp_path / "whole")[1]
    with pytest.raises(loop.StoppedError):
        loop.fit(maker, [1], tmp_path / "run", stopped=wishes.get)
    rest = loop.fit(maker, [1], tmp_path / "run")[1]
    assert same(jax.device_get(whole), jax.device_get(rest))


def test_rescaled_weights_are_multiples_of_the_drawn_ones():
    config = dataclasses.replace(CONFIG, tost=ToSTConfig(lrsi=True))
    params, masks = initial_state.weights(functions(config), 0)
    state = functions(config).create(jnp.uint32(0))
    assert same(masks, jax.device_get(state.opt_state.masks))
    kernels = 0
    for name, layer in params.items():
        before = np.asarray(state.params[name]["kernel"])
        mask = masks[name]["kernel"]
        assert not layer["kernel"][~mask].any()
        ratio = layer["kernel"][mask] / before[mask]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
        kernels += abs(ratio[0] - 1) > 0.05
        assert not layer["bias"].any()
    assert kernels == 3


def test_dense_training_is_rescaled_too():
    config = dataclasses.replace(
        CONFIG, method="dense", sparsity=0.0, tost=ToSTConfig(lrsi=True)
    )
    params, masks = initial_state.weights(functions(config), 0)
    assert masks is None
    assert not same(params, jax.device_get(drawn(config, 0)))


def test_synflow_of_a_deep_network_does_not_overflow():
    # In float32 the sum of all paths of ResNet-32 is infinite.
    config = dataclasses.replace(
        CONFIG, model="resnet-32", masks=MaskConfig(source="synflow", rounds=1)
    )
    variables = functions(config).variables(jnp.uint32(0))
    # One round empties convolutions beside which there is a shortcut.
    with pytest.warns(UserWarning, match="the network is still connected"):
        found = initial_masks.masks(
            functions(config), variables["params"], variables["batch_stats"], 0
        )
    sizes = granet_jax.sparsity(found)
    assert sizes.active == math.floor(0.05 * sizes.total + 0.5)
    assert mask_sources.connected(
        lambda params, x: (
            models.create("resnet-32", classes=10)
            .clone(dtype=None)
            .apply({**variables, "params": params}, x, train=False)
        ),
        variables["params"],
        found,
        jnp.ones((1, 8, 8, 1)),
    )


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dense start": (
        {"method": "granet", "masks": MaskConfig(source="snip", interval=1)},
        "masks.source is snip, and granet starts dense: give masks.initial_sparsity",
    ),
    "dense": (
        {"method": "dense", "masks": MaskConfig(source="snip")},
        "masks.source is not an option of method 'dense'",
    ),
    "rounds": (
        {"masks": MaskConfig(source="snip", rounds=3)},
        "masks.rounds is an option of the sources iterative-snip, force, synflow, and "
        "masks.source is snip",
    ),
    "images": (
        {"masks": MaskConfig(images=3)},
        "masks.images is an option of the sources snip, .*, and masks.source is None",
    ),
    "no rounds": (
        {"masks": MaskConfig(source="synflow", rounds=0)},
        "masks.rounds must be at least 1, got 0",
    ),
    "neurons": (
        {"model": "vit-s-16", "tost": ToSTConfig(neurons="swish")},
        "tost.neurons is not available for model vit-s-16, only for lenet-300-100",
    ),
    "skips": (
        {"tost": ToSTConfig(skips="conv")},
        "tost.skips is not available for model lenet-300-100, only for cnn, cnn-bn",
    ),
    "labels": (
        {
            "tost": ToSTConfig(labels=0.1),
            "optimizer": OptimizerConfig(label_smoothing=0.1),
        },
        "tost.labels and optimizer.label_smoothing both smooth",
    ),
    "label amount": ({"tost": ToSTConfig(labels=1.5)}, "alpha must .* 1.5"),
    "fraction": (
        {"tost": ToSTConfig(neurons="swish", ghost_fraction=0.01)},
        r"tost.ghost_fraction must leave at least one step, got 0.01 of .*8",
    ),
    "fraction of nothing": (
        {"tost": ToSTConfig(lrsi=True, ghost_fraction=0.5)},
        "tost.ghost_fraction has no effect without neurons or skips",
    ),
    "fraction of what is kept": (
        {"tost": ToSTConfig(neurons="swish", ghost_fraction=0.5, as_in_code=True)},
        "tost.ghost_fraction has no effect .* with as_in_code",
    ),
    "as in code": (
        {"tost": ToSTConfig(as_in_code=True)},
        "tost.as_in_code has an effect on neurons, skips and lrsi only",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused(case):
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_more_images_than_there_are_is_an_error():
    config = dataclasses.replace(CONFIG, masks=MaskConfig(source="snip", images=10**6))
    with pytest.raises(ValueError, match=r"masks.images must be at most the 1201 .*"):
        initial_masks.examples(functions(config), 0)


def test_the_record_is_the_librarys():
    given = ToSTConfig(neurons="mish", skips="conv", lrsi=True, labels=0.2)
    assert given.build() == tost.ToST(
        neurons=tost.Neurons(kind="mish"),
        skips=tost.Skips(kind="conv"),
        lrsi=tost.LRsI(),
        labels=tost.Labels(alpha=0.2),
    )
    code = dataclasses.replace(
        given, neurons="swish", labels=0.1, as_in_code=True
    ).build()
    assert code == tost.reproduce()
    mish = dataclasses.replace(given, as_in_code=True).build()
    assert mish.neurons == tost.Neurons(kind="mish", beta_0=1.0)
    assert ToSTConfig().build() == tost.ToST()
