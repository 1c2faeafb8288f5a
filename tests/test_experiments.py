"""The first-run trainer: data, configuration, training, and what a run leaves behind.

Runs are short and use the MLP, which compiles fastest; all go through what
`python -m experiments.train` runs, most of them through its `main`.
"""

import collections
import dataclasses
import json
import math
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import sklearn.datasets

from experiments import data, report, step, train, trainer
from experiments.config import (
    Config,
    DataConfig,
    MaskConfig,
    OptimizerConfig,
    build_method,
)

METHODS = ["granet", "granet-st", "gmp", "rigl", "set", "snfs", "static", "dense"]
# The kernels of LeNet-300-100 on 8 x 8 pixels.
LAYERS = {
    "hidden_0/kernel": 64 * 300,
    "hidden_1/kernel": 300 * 100,
    "output/kernel": 100 * 10,
}
TOTAL = sum(LAYERS.values())
STEPS = 160
SHORT = ["--model", "mlp", "--steps", "160", "--eval-every", "40", "--no-progress"]
SHORT_CONFIG = Config(model="mlp", steps=STEPS, eval_every=40, progress=False)


def kept(sparsity: float) -> int:
    """Number of active weights of the MLP at an overall sparsity."""
    return math.floor((1 - sparsity) * TOTAL + 0.5)


def lines(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def makers() -> dict[str, trainer.Trainer]:
    """Trainers to share, since compilation takes nearly all of the time."""
    return {
        method: trainer.Trainer(
            dataclasses.replace(SHORT_CONFIG, method=method), data.load("digits"), 0
        )
        for method in ("granet", "static", "dense")
    }


def trained(
    maker: trainer.Trainer, seed: int
) -> tuple[list[trainer.Record], step.TrainState]:
    """The records without their times, and the final state."""
    records: list[trainer.Record] = []
    state = trainer.fit(maker, seed, records.append)
    return [record._replace(seconds=0.0) for record in records], state


def same(a: Any, b: Any) -> bool:
    """Whether two pytrees are equal, bit for bit."""
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).dtype == np.asarray(y).dtype
        and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# --- data


def test_digits_are_split_into_disjoint_parts_that_are_complete():
    dataset = data.load("digits")
    images, labels = map(np.asarray, sklearn.datasets.load_digits(return_X_y=True))
    assert len(labels) == 1797

    def rows(part: data.Split) -> collections.Counter[bytes]:
        pixels = np.asarray(part.images).reshape(-1, 64)
        return collections.Counter(
            bytes([label, *row])
            for label, row in zip(np.asarray(part.labels), pixels, strict=True)
        )

    # From 0..16 to 0..255, rounded half to even as NumPy does.
    scaled = np.round(images * 255 / 16).astype(np.uint8)
    assert rows(dataset.train) + rows(dataset.test) == rows(data.Split(scaled, labels))
    assert (len(dataset.train.labels), len(dataset.test.labels)) == (1201, 596)
    for label in range(10):
        found = int(np.sum(dataset.test.labels == label))
        assert found == int(np.sum(labels == label)) // 3
    first = np.flatnonzero(labels == 0)[2]
    zero = dataset.test.images[np.argmin(dataset.test.labels)]
    assert np.array_equal(zero.ravel(), scaled[first])
    assert dataset.train.images.shape == (1201, 8, 8, 1)
    assert dataset.classes == 10


def test_the_split_is_the_same_every_time():
    one, other = data.load("digits"), data.load("digits")
    assert same((one.train, one.test), (other.train, other.test))
    assert (one.mean, one.std) == (other.mean, other.std)


def test_normalised_training_images_have_mean_0_and_deviation_1():
    dataset = data.load("digits")
    x = np.asarray(
        step.normalised(dataset.train.images, dataset.mean, dataset.std), np.float64
    )
    assert x.shape == (1201, 8, 8, 1)
    assert abs(x.mean()) < 1e-6
    assert abs(x.std() - 1) < 1e-6


def colours(n: int = 40) -> data.Split:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 6, 5, 3), dtype=np.uint8)
    images[..., 2] = 7
    return data.Split(images, np.arange(n, dtype=np.int32) % 4)


def test_another_data_set_fits_and_a_constant_channel_is_no_trouble():
    dataset = data.from_arrays("colours", colours(), colours(9), classes=4)
    images = np.asarray(colours().images, np.float64) / 255
    assert np.allclose(dataset.mean, images.mean((0, 1, 2)), rtol=0, atol=1e-12)
    assert dataset.std[2] == 1.0
    config = dataclasses.replace(
        SHORT_CONFIG, method="dense", steps=4, data=DataConfig(batch_size=16)
    )
    records: list[trainer.Record] = []
    trainer.fit(trainer.Trainer(config, dataset, 0), 0, records.append)
    assert [record.step for record in records] == [0, 4]
    assert math.isfinite(records[-1].train_loss or math.nan)
    assert records[-1].test_accuracy == records[-1].test_correct / 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s._replace(images=s.images / 255), "must be uint8"),
        (lambda s: s._replace(images=s.images[..., 0]), "must be uint8 of shape"),
        (lambda s: data.Split(s.images[:0], s.labels[:0]), "with n > 0"),
        (lambda s: s._replace(labels=s.labels[1:]), "must be int32 of shape"),
        (lambda s: s._replace(labels=s.labels.astype(int)), "must be int32"),
        (lambda s: s._replace(labels=s.labels + 1), "in 0 to 3, got 1 to 4"),
        (lambda s: s._replace(images=s.images[:, :4]), "must have one shape"),
    ],
)
def test_arrays_that_are_no_data_set_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        data.from_arrays("colours", colours(), change(colours(9)), classes=4)


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
        ({"masks": MaskConfig(interval=601)}, "in the first 600 of 1200 steps"),
        ({"masks": MaskConfig(pruning_end=0)}, "masks.pruning_end must lie"),
        ({"masks": MaskConfig(fraction=2)}, r"fraction must be in \[0, 1\], got 2"),
        ({"masks": MaskConfig(initial_sparsity=0.95)}, "initial_sparsity must be at"),
        ({"masks": MaskConfig(stop=0.5)}, "stop is not an option of method 'granet'"),
        (
            {"method": "static", "masks": MaskConfig(fraction=0.3)},
            "masks.fraction is not an option of method 'static', only of granet",
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
    ],
)
def test_methods_are_configured_as_documented(method, masks, start, updates):
    record = build_method(Config(method=method, masks=masks))
    assert record is not None
    assert record.sparsity(0) == pytest.approx(start, rel=0, abs=1e-12)
    assert record.sparsity(1200) == 0.9
    assert list(record.updates.steps()) == list(updates)


def test_dense_training_has_no_method():
    assert build_method(Config(method="dense")) is None


# --- the step


def test_shifted_images_are_crops_of_the_padded_ones_and_all_crops_occur():
    images = np.random.default_rng(1).integers(1, 256, (200, 4, 5, 2), dtype=np.uint8)
    found = np.asarray(step.shifted(jnp.asarray(images), jax.random.key(0), 1))
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
    other = np.asarray(step.shifted(jnp.asarray(images), jax.random.key(1), 1))
    assert not np.array_equal(found, other)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("drops", {0: 0.1, 49: 0.1, 50: 0.01, 74: 0.01, 75: 0.001, 100: 0.001}),
        ("cosine", {0: 0.1, 50: 0.05, 100: 0.0}),
        ("constant", {0: 0.1, 100: 0.1}),
    ],
)
def test_learning_rate(schedule, expected):
    rate = step.learning_rate(OptimizerConfig(schedule=schedule), 100)
    for at, value in expected.items():
        assert float(np.asarray(rate(at))) == pytest.approx(value, rel=1e-6, abs=1e-9)


def test_an_epoch_goes_once_through_the_data_in_an_order_of_its_own(makers):
    maker = makers["granet"]
    state = maker.create(0)
    assert np.array_equal(state.order, np.arange(1201))
    orders = []
    for _ in range(2 * 18):  # 18 batches of 64 images are an epoch
        state, _ = maker.steps(state, 1)
        orders.append(np.asarray(state.order))
    assert int(state.step) == 36
    for first in (0, 18):
        assert np.array_equal(np.sort(orders[first]), np.arange(1201))
        for order in orders[first : first + 18]:
            assert np.array_equal(order, orders[first])
    assert not np.array_equal(orders[0], orders[18])
    assert not np.array_equal(orders[0], np.arange(1201))


def test_a_scan_over_steps_gives_what_the_loop_gives_bit_for_bit(makers, monkeypatch):
    maker = makers["granet"]
    loop = trained(maker, 0)
    # 40 = 3 x 13 + 1 steps between evaluations.
    in_blocks = dataclasses.replace(maker.config, scan_block=3)
    lengths = []
    plain_steps = maker.steps

    def steps(state: step.TrainState, number: int) -> Any:
        lengths.append(number)
        return plain_steps(state, number)

    monkeypatch.setattr(maker, "config", in_blocks)
    monkeypatch.setattr(maker, "steps", steps)
    scan = trained(maker, 0)
    assert lengths == 4 * [*13 * [3], 1]
    assert scan[0] == loop[0]
    assert same(scan[1], loop[1])


def test_the_seed_decides_everything(makers):
    maker = makers["granet"]
    records, state = trained(maker, 5)
    other, state_other = trained(maker.for_seed(6), 6)
    again, state_again = trained(maker.for_seed(5), 5)
    assert records == again
    assert same(state, state_again)
    for a, b in zip(records[1:], other[1:], strict=True):
        assert a.train_loss != b.train_loss
    for name in ("hidden_0", "hidden_1", "output"):
        for a, b in (
            (state.params, state_other.params),
            (step.masks_of(state), step.masks_of(state_other)),
        ):
            assert not np.array_equal(a[name]["kernel"], b[name]["kernel"])


def test_random_masks_are_drawn_from_the_seed_too(makers):
    maker = makers["static"]
    masks = {
        seed: step.masks_of(maker.for_seed(seed).create(seed)) for seed in (0, 1, 2)
    }
    assert same(masks[1], step.masks_of(maker.for_seed(1).create(1)))
    for seed in (1, 2):
        for a, b in zip(*map(jax.tree.leaves, (masks[0], masks[seed])), strict=True):
            assert not np.array_equal(a, b)


def test_evaluation_in_several_batches_counts_every_image_once(makers, monkeypatch):
    whole, dataset = makers["dense"], makers["dense"].dataset
    params = whole.create(3).params
    monkeypatch.setattr(trainer, "EVALUATION_BATCH", 100)
    parts = trainer.Trainer(whole.config, dataset, 0)

    x = (np.asarray(dataset.test.images, np.float64) / 255 - dataset.mean) / dataset.std
    x = x.reshape(596, 64)
    for name in ("hidden_0", "hidden_1", "output"):
        layer = jax.tree.map(np.asarray, params[name])
        x = x @ layer["kernel"] + layer["bias"]
        x = np.maximum(x, 0) if name != "output" else x
    expected = int(np.sum(x.argmax(1) == dataset.test.labels))
    assert whole.evaluate(params) == expected
    assert parts.evaluate(params) == expected


def test_a_network_that_is_not_as_sparse_as_it_should_be_is_noticed(makers):
    config, state = makers["static"].config, makers["static"].create(0)
    trainer.check_exact(config, state)
    with pytest.raises(RuntimeError, match=f"{kept(0.9)} weights are active"):
        trainer.check_exact(dataclasses.replace(config, sparsity=0.8), state)
    filled = jax.tree.map(jnp.ones_like, state.params)
    with pytest.raises(RuntimeError, match="hidden_0/kernel has weights"):
        trainer.check_exact(config, state._replace(params=filled))


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
        with capture.open("w") as file:
            patch.setattr(sys, "stdout", file)
            status = train.main([*SHORT, "--seeds", "2", "--out", str(folder)])
    assert status == 0
    return Finished(folder, capture.read_text(), lines(folder / "metrics.jsonl"))


def test_a_run_leaves_these_files(finished):
    assert sorted(path.name for path in finished.folder.iterdir()) == [
        "config.json",
        "curves.png",
        "metrics.jsonl",
        "summary.json",
    ]
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
def test_metrics_agree_with_the_masks_and_weights(finished, makers, method):
    """Also: the baseline is what `--method dense` trains, untouched by the other."""
    records, state = trained(makers[method], 1)
    mine = [x for x in finished.lines if (x["method"], x["seed"]) == (method, 1)]
    assert [(r.step, r.train_loss, r.test_correct) for r in records] == [
        (x["step"], x["train_loss"], x["test_correct"]) for x in mine
    ]
    masks = step.masks_of(state)
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
        assert cells[:4] == [
            f"{statistics.mean(accuracy):.2f} ± {statistics.stdev(accuracy):.2f}",
            {"granet": "90.00", "dense": "0.00"}[method],
            {"granet": f"{kept(0.9):,}", "dense": "50,200"}[method],
            "50,200",
        ]
    for heading in ("accuracy / %", "sparsity / %", "active weights"):
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


# The two others are those of `finished`.
@pytest.mark.parametrize("method", [x for x in METHODS if x not in ("granet", "dense")])
def test_every_method_trains(method, tmp_path):
    options = ["--method", method, "--no-baseline", "--seeds", "1"]
    options += ["--eval-every", "160"]
    assert train.main([*SHORT, *options, "--out", str(tmp_path)]) == 0
    found = lines(tmp_path / "metrics.jsonl")
    assert [line["method"] for line in found] == [method, method]
    first, last = found
    start = {"granet-st": 0.5, "gmp": 0.0}.get(method, 0.9)
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
    last = lines(folder / "metrics.jsonl")[-1]
    assert list(last["layer_sparsity"]) == [
        "conv_0/kernel",
        "conv_1/kernel",
        "conv_2/kernel",
        "output/kernel",
    ]
    assert (last["active_weights"], last["total_weights"]) == (2574, 25744)


def test_default_folders_of_the_same_second_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len({train._new_folder(Config()) for _ in range(4)}) == 4


# --- when something is wrong


def test_help_explains_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        train.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for prefix, record in (
        ("", Config),
        ("data.", DataConfig),
        ("optimizer.", OptimizerConfig),
        ("masks.", MaskConfig),
    ):
        for field in dataclasses.fields(record):
            if field.name not in ("data", "optimizer", "masks"):
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
        (["--data.dataset", "mnist"], "data.dataset must be 'digits', got 'mnist'"),
        (["--data.batch-size", "2000"], "at most the 1201 training images of digits"),
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


def test_results_are_never_overwritten(finished, capsys):
    before = {path: path.read_bytes() for path in finished.folder.iterdir()}
    assert train.main([*SHORT, "--out", str(finished.folder)]) == 2
    assert "exists already and is not an empty folder" in capsys.readouterr().err
    assert train.main([*SHORT, "--out", str(finished.folder / "config.json")]) == 2
    assert {path: path.read_bytes() for path in finished.folder.iterdir()} == before


UNFINISHED = ["config.json", "metrics.jsonl.partial"]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    options = ["--method", "dense", "--optimizer.learning-rate", "1e30"]
    assert train.main([*SHORT, *options, "--out", str(tmp_path)]) == 1
    assert "lower optimizer.learning_rate" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == UNFINISHED
    assert [x["step"] for x in lines(tmp_path / "metrics.jsonl.partial")] == [0]


def test_ctrl_c_ends_the_run_without_a_traceback(tmp_path, capsys, monkeypatch):
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "fit", interrupted)
    assert train.main([*SHORT, "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == UNFINISHED


def test_a_plot_that_fails_has_no_name_yet(tmp_path):
    def fails() -> None:
        with report.complete(tmp_path / "curves.png") as path:
            path.write_text("half of it")
            raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        fails()
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png.partial"]


def test_a_killed_run_leaves_nothing_that_looks_complete(tmp_path):
    folder = tmp_path / "run"
    options = ["--model", "mlp", "--method", "dense", "--steps", "1000000"]
    options += ["--eval-every", "5", "--out", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.train", *options],
        cwd=pathlib.Path(train.__file__).parent.parent,
        stderr=subprocess.DEVNULL,
    )
    partial = folder / "metrics.jsonl.partial"
    try:
        deadline = time.monotonic() + 120
        while not partial.exists() or partial.read_bytes().count(b"\n") < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert sorted(path.name for path in folder.iterdir()) == UNFINISHED
    whole = partial.read_text().split("\n")[:-1]
    assert [json.loads(line)["step"] for line in whole][:3] == [0, 5, 10]
