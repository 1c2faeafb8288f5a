"""The trainer: configuration, steps, whole runs, and what a run leaves behind.

Runs are short and use LeNet-300-100, which compiles fastest; all go through what
`python -m experiments.train` runs, most of them through its `main`. The trainer takes
the first of the eight virtual devices here; several devices have tests of their own.
"""

import collections
import dataclasses
import functools
import json
import math
import pathlib
import re
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from experiments import data, models, train
from experiments.config.run import (
    CheckpointConfig,
    Config,
    DataConfig,
    DistributedConfig,
    MaskConfig,
    OptimizerConfig,
    ToSTConfig,
    build_method,
)
from experiments.data import augment
from experiments.training import loop, metrics, optimizer, run_folders, step
from granet_jax.penalties import PenaltyInputs
from tests.helpers.profile import NIGHTLY
from tests.helpers.runs import same

METHODS = ["granet", "granet-st", "gmp", "rigl", "set", "snfs", "static", "dense"]
METHODS += ["cyclical", "acdc", "sculpt", "straight-through", "top-kast", "greg2"]
# The kernels of LeNet-300-100 on 8 x 8 pixels.
LAYERS = {
    "hidden_0/kernel": 64 * 300,
    "hidden_1/kernel": 300 * 100,
    "output/kernel": 100 * 10,
}
TOTAL = sum(LAYERS.values())
STEPS = 160
SHORT = ["--model", "lenet-300-100", "--steps", "160", "--eval-every", "40"]
SHORT += ["--checkpoint.every", "80", "--no-progress"]
SHORT_CONFIG = Config(
    model="lenet-300-100",
    steps=STEPS,
    eval_every=40,
    progress=False,
    seeds=1,
    checkpoint=CheckpointConfig(every=160),
)


def kept(sparsity: float) -> int:
    """Number of active weights of the MLP at an overall sparsity."""
    return math.floor((1 - sparsity) * TOTAL + 0.5)


def lines(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


CREATE = functools.partial(loop.create, devices=jax.devices()[:1])


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "create", CREATE)


def make(**changes: Any) -> loop.TrainSetup:
    config = dataclasses.replace(SHORT_CONFIG, **changes)
    return CREATE(config, data.load("digits"))


@pytest.fixture(scope="module")
def makers() -> dict[str, loop.TrainSetup]:
    """Trainers to share, since compilation takes nearly all of the time."""
    return {method: make(method=method) for method in ("granet", "static", "dense")}


def trained(
    maker: loop.TrainSetup, seed: int, folder: pathlib.Path
) -> tuple[list[metrics.MetricsRecord], step.TrainState]:
    """The records without their times, and the final state."""
    folder.mkdir()
    (records,), state = loop.fit(maker, [seed], folder)
    return [record._replace(seconds=0.0) for record in records], state


def masks_of(maker: loop.TrainSetup, state: step.TrainState) -> Any:
    return maker.compiled_step.train_step.masks(state)


# --- configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.5}, r"sparsity must lie in \[0, 1\), got 1.5"),
        ({"sparsity": math.nan}, "sparsity must lie"),
        ({"steps": -5}, r"steps must lie in \[1, 2\*\*31\), got -5"),
        ({"steps": 1}, "steps must leave time for a mask update"),
        ({"steps": 1, "method": "set"}, "steps must leave time for a mask update"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"seed": -1}, "seed must lie"),
        ({"seed": 2**31 - 2}, r"seed \+ seeds - 1 must lie"),
        ({"scan_block": 0}, "scan_block must be at least 1"),
        ({"eval_every": 0}, "eval_every must be at least 1"),
        ({"data": DataConfig(batch_size=0)}, "data.batch_size must be at least 1"),
        ({"data": DataConfig(shift=-1)}, "data.shift must be at least 0"),
        ({"optimizer": OptimizerConfig(learning_rate=0)}, "optimizer.learning_rate"),
        ({"optimizer": OptimizerConfig(momentum=1)}, "optimizer.momentum must lie"),
        ({"optimizer": OptimizerConfig(weight_decay=-1)}, "optimizer.weight_decay"),
        ({"masks": MaskConfig(interval=0)}, "masks.interval must be at least 1"),
        ({"model": "lenet5"}, "got 'lenet5'. Did you mean 'lenet-5'?"),
        ({"data": DataConfig(dataset="cifar")}, "got 'cifar'. Did you mean 'cifar10'"),
        ({"optimizer": OptimizerConfig(drops=(0.5, 1.0))}, "optimizer.drops must lie"),
        (
            {"optimizer": OptimizerConfig(warmup_steps=1200)},
            r"must lie in \[0, steps\)",
        ),
        (
            {"optimizer": OptimizerConfig(accumulate=3)},
            "must divide data.batch_size, 64",
        ),
        (
            {"optimizer": OptimizerConfig(ema=1.0)},
            r"optimizer.ema must lie in \(0, 1\)",
        ),
        ({"optimizer": OptimizerConfig(label_smoothing=1)}, "label_smoothing must lie"),
        ({"parallel": "pmap", "fsdp": 2}, "fsdp must be 1 with pmap, got 2"),
        ({"fsdp": 0}, "fsdp must be at least 1"),
        ({"checkpoint": CheckpointConfig(keep=0)}, "checkpoint.keep must be at least"),
        ({"out": pathlib.Path("gs://bucket/run")}, "mount the bucket"),
        ({"masks": MaskConfig(interval=601)}, "in the first 600 of 1200 steps"),
        ({"masks": MaskConfig(pruning_end=0)}, "masks.pruning_end must lie"),
        ({"masks": MaskConfig(fraction=2)}, r"fraction must be in \[0, 1\], got 2"),
        ({"masks": MaskConfig(initial_sparsity=0.95)}, "initial_sparsity must be at"),
        ({"masks": MaskConfig(stop=0.5)}, "stop is not an option of method 'granet'"),
        (
            {"method": "static", "masks": MaskConfig(fraction=0.3)},
            "masks.fraction is not an option of method 'static', only of granet",
        ),
        ({"method": "acdc", "steps": 7}, r"at least 2 \* masks.cycles, 8, got 7"),
        (
            {"method": "cyclical", "steps": 1201},
            "steps must be a multiple of the 4 cycles .* got 1201: 1 fewer",
        ),
        (
            {"method": "greg2", "masks": MaskConfig(interval=250)},
            "leave time for three increases of the penalty, got 250",
        ),
        (
            {"method": "acdc", "masks": MaskConfig(recovery="hard")},
            "masks.recovery is not an option of method 'acdc', only of cyclical",
        ),
        ({"masks": MaskConfig(cycles=0)}, "masks.cycles must be at least 1"),
        (
            {"method": "top-kast", "tost": ToSTConfig(lrsi=True)},
            "tost.lrsi scales masked weights, and top-kast starts from dense ones",
        ),
        (
            {"method": "dense", "masks": MaskConfig(distribution="erk")},
            "masks.distribution is not an option of method 'dense'",
        ),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


@pytest.mark.parametrize(
    ("method", "masks", "start", "updates"),
    [
        ("granet", MaskConfig(), 0.0, range(15, 1201, 15)),
        ("granet", MaskConfig(initial_sparsity=0.2), 0.2, range(15, 1201, 15)),
        ("granet-st", MaskConfig(interval=100), 0.5, range(100, 1201, 100)),
        ("gmp", MaskConfig(pruning_end=0.25), 0.0, range(15, 301, 15)),
        ("rigl", MaskConfig(), 0.9, range(15, 901, 15)),
        ("set", MaskConfig(), 0.9, range(15, 901, 15)),
        ("set", MaskConfig(stop=0.5), 0.9, range(15, 601, 15)),
        ("snfs", MaskConfig(), 0.9, range(15, 1201, 15)),
        ("static", MaskConfig(distribution="uniform"), 0.9, range(0)),
        (
            "cyclical",
            MaskConfig(cycles=2, initial_sparsity=0.3, recovery="projected"),
            0.3,
            [*range(15, 451, 15), 600, *range(615, 1051, 15)],
        ),
        ("cyclical", MaskConfig(cycles=1), 0.0, range(15, 901, 15)),
        ("acdc", MaskConfig(), 0.0, range(150, 1051, 150)),
        ("acdc", MaskConfig(cycles=1), 0.0, [600]),
        ("sculpt", MaskConfig(), 0.8, [900]),
        ("sculpt", MaskConfig(cycles=1, initial_sparsity=0.5), 0.5, [600]),
        ("straight-through", MaskConfig(), 0.0, range(15, 601, 15)),
        ("top-kast", MaskConfig(), 0.9, []),
        ("greg2", MaskConfig(interval=7), 0.0, [600]),
    ],
)
def test_methods_are_configured_as_documented(method, masks, start, updates):
    record = build_method(Config(method=method, masks=masks))
    assert record is not None
    assert record.sparsity(0) == pytest.approx(start, rel=0, abs=1e-12)
    assert record.sparsity(1200) == 0.9
    assert list(record.updates.steps()) == list(updates)


def test_defaults_of_later_methods():
    def made(method, **masks):
        record = build_method(Config(method=method, masks=MaskConfig(**masks)))
        assert record is not None
        return record

    assert made("cyclical").weights == "sparse"
    assert made("cyclical", recovery="projected").weights == "projected"
    assert made("cyclical", recovery="straight_through").weights == "dense"
    assert len(made("cyclical").updates.steps()) == 4 * 15 + 3
    assert made("top-kast").marked_sparsity == pytest.approx(0.8)
    assert made("top-kast").refresh == 15
    assert made("top-kast", backward_sparsity=0.5).marked_sparsity == 0.5
    # In every cycle but the first the optimizer starts anew.
    assert list(made("acdc").resets.steps()) == [300, 600, 900]
    assert list(made("sculpt").resets.steps()) == [300, 600, 900]


def test_the_penalty_of_greg2_grows_to_the_pruning():
    def penalties(steps, marked, **options):
        config = Config(method="greg2", **options)
        record = build_method(config)
        assert record is not None
        assert record.penalty is not None
        ones, marks = jnp.ones(1), jnp.array([marked])
        at = [PenaltyInputs(ones, ones > 0, marks, jnp.int32(t)) for t in steps]
        return [float(jnp.asarray(record.penalty(x)).sum()) for x in at]

    # Pruning at step 600: until 480 there are 32 increases, 3 of them of all weights.
    steps = (0, 14, 15, 30, 44, 45, 60, 465, 480, 599, 600)
    found = penalties(steps, False, masks=MaskConfig(interval=15))
    assert found == [*sorted(found[:-1]), 0.0]
    assert found[0] > 0
    assert found[-2] == pytest.approx(1.0, abs=0.06)
    kept = penalties(steps, True, masks=MaskConfig(interval=15))
    decay = OptimizerConfig().weight_decay
    assert kept[-3] == pytest.approx(-decay)
    adamw = OptimizerConfig(name="adamw")
    kept = penalties(steps, True, masks=MaskConfig(interval=15), optimizer=adamw)
    assert kept[-3] == 0.0


def test_dense_training_has_no_method():
    assert build_method(Config(method="dense")) is None


# --- the step


def test_shifted_images_are_crops_of_the_padded_ones_and_all_crops_occur():
    images = np.random.default_rng(1).integers(1, 256, (200, 4, 5, 2), dtype=np.uint8)
    corners = augment.shifts(jax.random.key(0), 200, 1)
    found = np.asarray(augment.shifted(jnp.asarray(images), corners, 1))
    assert (found.shape, found.dtype) == (images.shape, np.uint8)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    seen = collections.Counter(
        (dy, dx)
        for i in range(200)
        for dy in range(3)
        for dx in range(3)
        if np.array_equal(found[i], padded[i, dy : dy + 4, dx : dx + 5])
    )
    assert sum(seen.values()) == 200
    assert set(seen) == {(dy, dx) for dy in range(3) for dx in range(3)}
    assert not np.array_equal(corners, augment.shifts(jax.random.key(1), 200, 1))


def test_mirrored_images_are_the_chosen_ones():
    images = np.random.default_rng(1).integers(0, 256, (5, 3, 4, 2), dtype=np.uint8)
    which = np.asarray([True, False, False, True, True])
    found = np.asarray(augment.mirrored(jnp.asarray(images), jnp.asarray(which)))
    for image, mirrored, result in zip(images, which, found, strict=True):
        assert np.array_equal(result, np.fliplr(image) if mirrored else image)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            OptimizerConfig(),
            {0: 0.1, 49: 0.1, 50: 0.01, 74: 0.01, 75: 0.001, 100: 0.001},
        ),
        (
            OptimizerConfig(drops=(0.3, 0.6, 0.9)),
            {29: 0.1, 30: 0.01, 59: 0.01, 60: 1e-3, 89: 1e-3, 90: 1e-4},
        ),
        (OptimizerConfig(schedule="cosine"), {0: 0.1, 50: 0.05, 100: 0.0}),
        (
            OptimizerConfig(schedule="cyclic", cycles=2),
            {0: 0.1, 25: 0.05, 50: 0.1, 75: 0.05, 100: 0.0},
        ),
        (OptimizerConfig(schedule="constant"), {0: 0.1, 100: 0.1}),
        (
            OptimizerConfig(schedule="constant", warmup_steps=4),
            {0: 0.02, 1: 0.04, 3: 0.08, 4: 0.1, 100: 0.1},
        ),
        (
            OptimizerConfig(schedule="cosine", warmup_steps=4),
            {0: 0.02, 50: 0.05, 100: 0.0},
        ),
    ],
)
def test_learning_rate(config, expected):
    rate = optimizer.learning_rate(config, 100)
    for at, value in expected.items():
        assert float(np.asarray(rate(at))) == pytest.approx(value, rel=1e-6, abs=1e-9)


def test_an_epoch_goes_once_through_the_data_in_an_order_of_its_own(makers):
    compiled_step, train_data = makers["granet"].compiled_step, makers["granet"].train
    state = compiled_step.create([0])
    assert np.array_equal(state.order, np.arange(1201))
    orders = []
    for _ in range(2 * 18):  # 18 batches of 64 images are an epoch
        state, _ = compiled_step.steps(state, train_data, 1)
        orders.append(np.asarray(state.order))
    assert int(state.step) == 36
    for first in (0, 18):
        assert np.array_equal(np.sort(orders[first]), np.arange(1201))
        for order in orders[first : first + 18]:
            assert np.array_equal(order, orders[first])
    assert not np.array_equal(orders[0], orders[18])
    assert not np.array_equal(orders[0], np.arange(1201))


def test_a_scan_over_steps_gives_what_the_loop_gives_bit_for_bit(makers, tmp_path):
    loop = trained(makers["granet"], 0, tmp_path / "loop")
    # 40 = 3 x 13 + 1 steps between evaluations.
    maker = make(method="granet", scan_block=3)
    lengths = []

    def steps(state: step.TrainState, train_data: Any, number: int) -> Any:
        lengths.append(number)
        return maker.compiled_step.steps(state, train_data, number)

    counted = maker._replace(
        compiled_step=dataclasses.replace(maker.compiled_step, steps=steps)
    )
    scan = trained(counted, 0, tmp_path / "scan")
    assert lengths == 4 * [*13 * [3], 1]
    assert scan[0] == loop[0]
    assert same(scan[1], loop[1])


def test_the_seed_decides_everything_and_all_share_one_program(makers, tmp_path):
    maker = makers["granet"]
    records, state = trained(maker, 5, tmp_path / "5")
    other, state_other = trained(maker, 6, tmp_path / "6")
    again, state_again = trained(maker, 5, tmp_path / "again")
    assert records == again
    assert same(state, state_again)
    for a, b in zip(records[1:], other[1:], strict=True):
        assert a.train_loss != b.train_loss
    for name in ("hidden_0", "hidden_1", "output"):
        for a, b in (
            (state.params, state_other.params),
            (masks_of(maker, state), masks_of(maker, state_other)),
        ):
            assert not np.array_equal(a[name]["kernel"], b[name]["kernel"])
    assert maker.compiled_step.steps._cache_size() == 1


def test_random_masks_are_drawn_from_the_seed_too(makers):
    maker = makers["static"]
    masks = {
        seed: masks_of(maker, maker.compiled_step.create([seed])) for seed in (0, 1, 2)
    }
    assert same(masks[1], masks_of(maker, maker.compiled_step.create([1])))
    for seed in (1, 2):
        for a, b in zip(*map(jax.tree.leaves, (masks[0], masks[seed])), strict=True):
            assert not np.array_equal(a, b)


@pytest.mark.parametrize("size", [1024, 100])
def test_evaluation_counts_every_image_once(makers, size):
    maker = makers["dense"]
    dataset, compiled_step = maker.dataset, maker.compiled_step
    state = compiled_step.create([3])
    batches = loop.padded_batches(dataset.test, size, 1)
    assert len({batch.labels.shape for batch in batches}) == 1
    scores = [
        compiled_step.evaluate(state, compiled_step.place_test(b)) for b in batches
    ]

    x = (np.asarray(dataset.test.inputs, np.float64) / 255 - dataset.mean) / dataset.std
    x = x.reshape(596, 64)
    for name in ("hidden_0", "hidden_1", "output"):
        layer = jax.tree.map(np.asarray, state.params[name])
        x = x @ layer["kernel"] + layer["bias"]
        x = np.maximum(x, 0) if name != "output" else x
    labels = dataset.test.labels
    expected = int(np.sum(x.argmax(1) == labels))
    entropy = np.log(np.exp(x).sum(1)) - x[np.arange(596), labels]
    assert sum(int(score.correct[0]) for score in scores) == expected
    found = sum(float(score.loss[0]) for score in scores)
    assert found == pytest.approx(entropy.sum(), rel=1e-5)


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_test_batches_suit_the_devices(devices):
    labels = np.arange(50, dtype=np.int32) % 10
    split = data.Split(np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1), labels)
    batches = loop.padded_batches(split, 20, devices)
    assert all(len(batch.labels) % devices == 0 for batch in batches)
    real = [batch.labels >= 0 for batch in batches]
    inputs = [np.asarray(b.inputs)[r] for b, r in zip(batches, real, strict=True)]
    assert np.array_equal(np.concatenate(inputs), split.inputs)


def test_a_network_that_is_not_as_sparse_as_it_should_be_is_noticed(makers):
    maker = makers["static"]
    state = maker.compiled_step.create([0])
    loop._check_state(maker, state, STEPS, None)
    wrong = dataclasses.replace(
        maker.compiled_step,
        train_step=dataclasses.replace(
            maker.compiled_step.train_step,
            config=dataclasses.replace(maker.config, sparsity=0.8),
        ),
    )
    with pytest.raises(RuntimeError, match=f"{kept(0.9)} weights are active"):
        loop._check_state(maker._replace(compiled_step=wrong), state, STEPS, None)
    filled = jax.tree.map(jnp.ones_like, state.params)
    with pytest.raises(RuntimeError, match="hidden_0/kernel has weights"):
        loop._check_state(maker, state._replace(params=filled), 1, None)


def test_weight_decay_is_on_weights_alone():
    maker = make(method="dense", optimizer=OptimizerConfig(weight_decay=0.5))
    shapes = jax.eval_shape(maker.compiled_step.train_step.create, np.uint32(0)).params
    decayed = optimizer.decay_mask(shapes, models.maskable)
    for layer in ("hidden_0", "hidden_1", "output"):
        assert decayed[layer] == {"kernel": True, "bias": False}


def reference_loss(params: Any, x: np.ndarray, labels: np.ndarray, smoothing: float):
    for name in ("hidden_0", "hidden_1", "output"):
        x = x @ params[name]["kernel"] + params[name]["bias"]
        x = jnp.maximum(x, 0) if name != "output" else x
    targets = np.eye(10)[labels] * (1 - smoothing) + smoothing / 10
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(x), axis=1))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_one_step_is_the_textbook_step(accumulate):
    """Loss with label smoothing, Nesterov, decay and average, written out by hand."""
    config = OptimizerConfig(
        label_smoothing=0.1, accumulate=accumulate, ema=0.9, weight_decay=0.01
    )
    maker = make(method="dense", optimizer=config, data=DataConfig(shift=0))
    dataset, compiled_step = maker.dataset, maker.compiled_step
    state = compiled_step.create([0])
    params = jax.device_get(state.params)
    state, loss = compiled_step.steps(state, maker.train_data, 1)
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
        for kind, decay in (("kernel", 0.01), ("bias", 0.0)):
            before = params[name][kind]
            gradient = np.asarray(grads[name][kind]) + decay * before
            after = before - 0.1 * (gradient + 0.9 * gradient)
            np.testing.assert_allclose(
                state.params[name][kind], after, rtol=1e-5, atol=1e-6
            )
            # In the first step the average's decay is 1 / 10.
            average = 0.1 * before + 0.9 * after
            np.testing.assert_allclose(
                state.average[name][kind], average, rtol=1e-5, atol=1e-6
            )


def test_a_moving_average_is_evaluated_masked(tmp_path):
    optimizer = OptimizerConfig(ema=0.99)
    maker = make(method="granet", optimizer=optimizer)
    records, state = trained(maker, 0, tmp_path / "ema")
    train_step = maker.compiled_step.train_step
    evaluated = train_step.evaluation_params(state)
    masks = masks_of(maker, state)
    for name in ("hidden_0", "hidden_1", "output"):
        mask = np.asarray(masks[name]["kernel"])
        assert not np.any(np.asarray(evaluated[name]["kernel"])[~mask])
        assert np.any(np.asarray(state.average[name]["kernel"])[~mask])
    # Neither the average as it is nor the weights give the recorded loss.
    (batch,) = loop.padded_batches(maker.dataset.test, 1024, 1)
    dense = make(method="dense").compiled_step
    losses = [
        float(dense.evaluate(state._replace(params=params), batch).loss[0]) / 596
        for params in (evaluated, state.average, state.params)
    ]
    differences = [abs(loss - records[-1].test_loss) for loss in losses]
    assert differences[0] < 1e-6
    assert min(differences[1:]) > 3e-6


def test_bfloat16_computes_in_it_and_keeps_float32_parameters():
    maker = make(method="dense", precision="bfloat16")
    train_step = maker.compiled_step.train_step
    shapes = jax.eval_shape(train_step.create, np.uint32(0))
    assert {x.dtype for x in jax.tree.leaves(shapes.params)} == {jnp.dtype("float32")}
    text = str(jax.make_jaxpr(train_step.step)(shapes, maker.dataset.train))
    assert "bf16[64,300]" in text
    _, loss = maker.compiled_step.steps(
        maker.compiled_step.create([0]), maker.train_data, 1
    )
    assert loss.dtype == jnp.float32


# --- a whole run


@dataclasses.dataclass
class Finished:
    """What `main` left behind."""

    folder: pathlib.Path
    output: str
    lines: list[dict[str, Any]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    """GraNet and dense, two seeds each."""
    folder = tmp_path_factory.mktemp("runs") / "new" / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        capture = tmp_path_factory.mktemp("out") / "stdout"
        patch.setattr(loop, "create", CREATE)
        with capture.open("w") as file:
            patch.setattr(sys, "stdout", file)
            status = train.main([*SHORT, "--seeds", "2", "--out", str(folder)])
    assert status == 0
    found = [
        line
        for run in ("granet-seed0", "granet-seed1", "dense-seed0", "dense-seed1")
        for line in lines(folder / run / "metrics.jsonl")
    ]
    return Finished(folder, capture.read_text(), found)


def test_a_run_leaves_these_files(finished):
    assert sorted(path.name for path in finished.folder.iterdir()) == [
        "config.json",
        "curves.png",
        "dense-seed0",
        "dense-seed1",
        "granet-seed0",
        "granet-seed1",
        "summary.json",
    ]
    for run in ("dense-seed0", "granet-seed1"):
        checkpoints, board, log = sorted((finished.folder / run).iterdir())
        assert checkpoints.name == "checkpoints"
        assert sorted(path.name for path in checkpoints.iterdir()) == ["160", "80"]
        assert board.name.startswith("events.out.tfevents.")
        assert log.name == "metrics.jsonl"
    config = json.loads((finished.folder / "config.json").read_text())
    assert config["method"] == "granet"
    assert config["steps"] == STEPS
    assert config["masks"]["interval"] == 2
    assert config["out"] == str(finished.folder)


def test_metrics_have_a_line_for_every_evaluation(finished):
    assert [(x["method"], x["seed"], x["step"]) for x in finished.lines] == [
        (method, seed, at)
        for method in ("granet", "dense")
        for seed in (0, 1)
        for at in (0, 40, 80, 120, 160)
    ]
    for line in finished.lines:
        assert line["test_accuracy"] == line["test_correct"] / 596
        assert (line["train_loss"] is None) == (line["step"] == 0)
        assert line["total_weights"] == TOTAL
        assert line["sparsity"] == 1 - line["active_weights"] / TOTAL
        rate = {0: 0.1, 40: 0.1, 80: 0.01}.get(line["step"], 0.001)
        assert line["learning_rate"] == pytest.approx(rate, rel=1e-6)


def test_sparsity_follows_the_cubic_schedule_to_the_exact_target(finished):
    # An update every second step, pruning to the 80th of 160.
    for line in finished.lines:
        if line["method"] == "granet":
            at = min(line["step"] / 80, 1.0)
            assert line["active_weights"] == kept(0.9 - 0.9 * (1 - at) ** 3)
        else:
            assert line["active_weights"] == TOTAL
            assert line["sparsity"] == 0.0
            assert line["layer_sparsity"] == dict.fromkeys(LAYERS, 0.0)


def test_it_learns(finished):
    for line in finished.lines:
        if line["step"] == 0:
            assert line["test_accuracy"] < 0.3
        if line["step"] == STEPS:
            assert line["test_accuracy"] > 0.85


@pytest.mark.parametrize("method", ["granet", "dense"])
def test_metrics_agree_with_the_masks_and_weights(finished, makers, method, tmp_path):
    """Also: the baseline is what `--method dense` trains, untouched by the other."""
    maker = makers[method]
    records, state = trained(maker, 1, tmp_path / "run")
    mine = [x for x in finished.lines if (x["method"], x["seed"]) == (method, 1)]
    assert [(r.step, r.train_loss, r.test_correct) for r in records] == [
        (x["step"], x["train_loss"], x["test_correct"]) for x in mine
    ]
    masks = masks_of(maker, state)
    assert list(mine[-1]["layer_sparsity"]) == list(LAYERS)
    active = 0
    for name, size in LAYERS.items():
        layer = name.removesuffix("/kernel")
        mask = np.asarray(masks[layer]["kernel"])
        weights = np.asarray(state.params[layer]["kernel"])
        assert mask.size == size
        assert not np.any(weights[~mask])
        assert mine[-1]["layer_sparsity"][name] == 1 - int(mask.sum()) / size
        active += int(mask.sum())
    assert active == mine[-1]["active_weights"]
    assert active == (kept(0.9) if method == "granet" else TOTAL)


def best(finished: Finished, method: str) -> list[float]:
    """Of every seed the best accuracy where the sparsity is the final one."""
    active = {"granet": kept(0.9), "dense": TOTAL}[method]
    return [
        max(
            x["test_accuracy"]
            for x in finished.lines
            if (x["method"], x["seed"], x["active_weights"]) == (method, seed, active)
        )
        for seed in (0, 1)
    ]


def test_tensorboard_has_the_same_numbers(finished):
    (board,) = (finished.folder / "granet-seed1").glob("events.*")
    data_ = board.read_bytes()
    found, at = {}, 0
    while at < len(data_):  # records of: length, its CRC, data, its CRC
        length = int.from_bytes(data_[at : at + 8], "little")
        event = event_pb2.Event.FromString(data_[at + 12 : at + 12 + length])
        at += 12 + length + 4
        for value in event.summary.value:
            found[value.tag, event.step] = value.simple_value
    mine = [x for x in finished.lines if (x["method"], x["seed"]) == ("granet", 1)]
    for line in mine:
        expected = {
            "test/accuracy": line["test_accuracy"],
            "test/loss": line["test_loss"],
            "sparsity/all": line["sparsity"],
            "learning_rate": line["learning_rate"],
            "sparsity/output/kernel": line["layer_sparsity"]["output/kernel"],
        }
        if line["step"]:
            expected["train/loss"] = line["train_loss"]
        for tag, value in expected.items():
            assert found[tag, line["step"]] == np.float32(value), tag


def test_the_same_command_again_trains_nothing_and_says_the_same(finished, capsys):
    before = {
        path: path.read_bytes()
        for path in finished.folder.rglob("*")
        if path.is_file() and "events." not in path.name
    }
    status = train.main([*SHORT, "--seeds", "2", "--out", str(finished.folder)])
    assert status == 0
    assert {path: path.read_bytes() for path in before} == before


def test_the_summary_has_the_last_line_of_every_run(finished):
    summary = json.loads((finished.folder / "summary.json").read_text())
    assert [row["method"] for row in summary["runs"]] == ["granet", "dense"]
    for row in summary["runs"]:
        last = [
            x
            for x in finished.lines
            if x["method"] == row["method"] and x["step"] == STEPS
        ]
        assert row["seeds"] == [x["seed"] for x in last]
        for key in ("test_accuracy", "sparsity", "active_weights", "seconds"):
            assert row[key] == [x[key] for x in last]
        assert row["total_weights"] == TOTAL
        assert row["best_test_accuracy"] == best(finished, row["method"])
    assert summary["environment"]["jax"] == jax.__version__
    assert summary["environment"]["backend"] == "cpu"


def test_the_table_has_both_methods_and_fits_80_columns(finished):
    rows = {}
    for line in finished.output.splitlines():
        assert len(line) <= 80 or line.startswith("Results in ")
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells:
            rows[cells[0]] = cells[1:]
    assert list(rows) == ["granet", "dense"]
    for method, cells in rows.items():
        last = [
            x for x in finished.lines if x["method"] == method and x["step"] == STEPS
        ]
        accuracy = [100 * x["test_accuracy"] for x in last]
        highest = [100 * x for x in best(finished, method)]
        assert cells == [
            f"{statistics.mean(accuracy):.2f} ± {statistics.stdev(accuracy):.2f}",
            f"{statistics.mean(highest):.2f} ± {statistics.stdev(highest):.2f}",
            {"granet": "90.00", "dense": "0.00"}[method],
            {"granet": "5,020 of 50,200", "dense": "50,200 of 50,200"}[method],
        ]
    for heading in ("last / %", "best / %", "sparsity / %", "active of all weights"):
        assert heading in finished.output
    assert "mean ± std over 2 seeds" in finished.output
    assert f"Results in {finished.folder}" in finished.output


def has_colour(image: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool(np.all(image == colour, axis=-1).sum() > 500)


def read_image(path: pathlib.Path) -> np.ndarray:
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return np.round(matplotlib.image.imread(path)[..., :3] * 255).astype(int)


BLUE, ORANGE = (0, 114, 178), (213, 94, 0)


def test_the_plot_is_an_image_that_shows_both_methods(finished):
    image = read_image(finished.folder / "curves.png")
    assert image.shape == (900, 1650, 3)
    left, right = image[:, :950], image[:, 1050:]
    for colour in (BLUE, ORANGE):
        assert has_colour(left, colour)
        assert has_colour(right, colour)
    assert 0.5 < np.all(image == 255, axis=-1).mean() < 0.95


# Those that differ in what the trainer does for them; with HYPOTHESIS_PROFILE=nightly
# all, but for the two of `finished`.
TRAINED = ("granet-st", "acdc", "straight-through", "top-kast", "greg2")
if NIGHTLY:
    TRAINED = tuple(x for x in METHODS if x not in ("granet", "dense"))


@pytest.mark.parametrize("method", TRAINED)
def test_every_method_trains(method, tmp_path):
    options = ["--method", method, "--no-baseline", "--seeds", "1"]
    options += ["--eval-every", "160"]
    assert train.main([*SHORT, *options, "--out", str(tmp_path)]) == 0
    found = lines(tmp_path / f"{method}-seed0" / "metrics.jsonl")
    assert [line["method"] for line in found] == [method, method]
    first, last = found
    dense = ("gmp", "cyclical", "acdc", "straight-through", "greg2")
    start = {"granet-st": 0.5, "sculpt": 0.8} | dict.fromkeys(dense, 0.0)
    start = start.get(method, 0.9)
    assert first["active_weights"] == kept(start)
    assert last["active_weights"] == kept(0.9)
    assert (first["step"], last["step"]) == (0, STEPS)
    assert last["test_accuracy"] > 0.6
    image = read_image(tmp_path / "curves.png")
    assert has_colour(image, BLUE)
    assert not has_colour(image, ORANGE)


def test_the_default_network_trains_into_the_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--no-baseline", "--seeds", "1", "--steps", "2"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-granet")
    last = lines(folder / "granet-seed0" / "metrics.jsonl")[-1]
    assert list(last["layer_sparsity"]) == [
        "conv_0/kernel",
        "conv_1/kernel",
        "conv_2/kernel",
        "output/kernel",
    ]
    assert (last["active_weights"], last["total_weights"]) == (2574, 25744)


def test_default_folders_of_the_same_second_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len({run_folders.new_folder(Config()) for _ in range(4)}) == 4


# --- when something is wrong


def test_help_explains_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        train.main(["--help"])
    assert exit_.value.code == 0
    # The choices that an option has may take several lines.
    text = re.sub(r"\{[^}]*\}", "{}", capsys.readouterr().out)
    for prefix, record in (
        ("", Config),
        ("data.", DataConfig),
        ("optimizer.", OptimizerConfig),
        ("masks.", MaskConfig),
        ("checkpoint.", CheckpointConfig),
        ("distributed.", DistributedConfig),
    ):
        for field in dataclasses.fields(record):
            if not dataclasses.is_dataclass(field.type):
                option = f"--{prefix}{field.name}".replace("_", "-")
                # The line after the option's own begins its explanation.
                match = re.search(rf"\n[│ ]+{option}[ ,].*\n[│ ]+(\S.*)", text)
                assert match, option
                assert re.match(r"[A-Z][a-z]+", match[1]), match[1]
    for method in METHODS:
        assert f"`{method}`" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "lottery"], "invalid choice 'lottery'"),
        (["--sparsity", "1.5"], "sparsity must lie in [0, 1), got 1.5"),
        (["--sparsity", "much"], "much"),
        (["--steps", "-5"], "steps must lie in [1, 2**31), got -5"),
        (["--data.batch-size", "2000"], "most the 1201 training examples of digits"),
        (["--lottery"], "--lottery"),
    ],
)
def test_bad_input_is_a_clear_error_and_leaves_nothing(
    options, message, tmp_path, capsys
):
    folder = tmp_path / "run"
    try:
        status: Any = train.main([*SHORT, "--out", str(folder), *options])
    except SystemExit as error:
        status = error.code
    assert status == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in error
    assert "Traceback" not in error
    assert not folder.exists()
