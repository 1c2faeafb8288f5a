"""Training: methods, the step, evaluation, and the files of a finished command.

Runs are short and use LeNet-300-100 on the first of the eight virtual devices.
Several devices have tests of their own.
"""

import collections
import dataclasses
import json
import pathlib
import re
import statistics
import sys
import typing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from experiments import data, models, train
from experiments.config.methods import OPTIONS, MethodName
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
from granet_jax import tost
from granet_jax.penalties import PenaltyInputs
from tests.helpers import runs
from tests.helpers.runs import TOTAL, active_count

METHODS: tuple[str, ...] = typing.get_args(MethodName)
# The kernels of LeNet-300-100 on 8 x 8 pixels.
LAYERS = {
    "hidden_0/kernel": 64 * 300,
    "hidden_1/kernel": 300 * 100,
    "output/kernel": 100 * 10,
}
STEPS = 160
SHORT = dataclasses.replace(
    runs.CONFIG, steps=STEPS, eval_every=40, checkpoint=CheckpointConfig(every=80)
)


@pytest.fixture(autouse=True)
def _shared(monkeypatch: pytest.MonkeyPatch) -> None:
    runs.share_setups(monkeypatch)


def setup(**changes: Any) -> loop.TrainSetup:
    return runs.create_setup(dataclasses.replace(SHORT, **changes))


def lines(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def fit(
    each: loop.TrainSetup, seed: int, folder: pathlib.Path
) -> tuple[list[metrics.MetricsRecord], step.TrainState]:
    """Train from the start: (the records without their times, the final state)."""
    (records,), state = loop.fit(each, [seed], folder)
    return [record._replace(seconds=0.0) for record in records], state


def masks_of(each: loop.TrainSetup, state: step.TrainState) -> Any:
    return each.compiled_step.train_step.masks(state)


def test_methods_are_configured_as_documented():
    cycles = {"cycles": 2, "initial_sparsity": 0.3, "recovery": "projected"}
    for method, masks, start, updates in (
        ("granet", {}, 0.0, range(15, 1186, 15)),
        ("granet", {"initial_sparsity": 0.2}, 0.2, range(15, 1186, 15)),
        ("granet-st", {"interval": 100}, 0.5, range(100, 1101, 100)),
        ("gmp", {"pruning_end": 0.25}, 0.0, range(15, 301, 15)),
        ("rigl", {}, 0.9, range(15, 901, 15)),
        ("set", {}, 0.9, range(15, 901, 15)),
        ("set", {"stop": 0.5}, 0.9, range(15, 601, 15)),
        ("mest", {}, 0.9, range(15, 1186, 15)),
        ("dsr", {}, 0.9, range(15, 901, 15)),
        ("snfs", {}, 0.9, range(15, 1186, 15)),
        ("srigl", {"stop": 0.5}, 0.9, range(15, 601, 15)),
        ("static", {"distribution": "uniform"}, 0.9, ()),
        ("cyclical", cycles, 0.3, [*range(15, 451, 15), 600, *range(615, 1051, 15)]),
        ("cyclical", {"cycles": 1}, 0.0, range(15, 901, 15)),
        ("acdc", {}, 0.0, range(150, 1051, 150)),
        ("acdc", {"cycles": 1}, 0.0, [600]),
        ("sculpt", {}, 0.8, [900]),
        ("sculpt", {"cycles": 1, "initial_sparsity": 0.5}, 0.5, [600]),
        ("straight-through", {}, 0.0, range(15, 601, 15)),
        ("top-kast", {}, 0.9, []),
        ("greg2", {"interval": 7}, 0.0, [600]),
    ):
        record = build_method(Config(method=method, masks=MaskConfig(**masks)))
        assert record is not None
        assert record.sparsity(0) == pytest.approx(start, rel=0, abs=1e-12), method
        assert record.sparsity(1200) == 0.9
        assert list(record.updates.steps()) == list(updates), (method, masks)


def test_options_of_methods_and_techniques():
    def built(method, **masks):
        record = build_method(Config(method=method, masks=MaskConfig(**masks)))
        assert record is not None
        return record

    assert build_method(Config(method="dense")) is None
    assert built("cyclical").weights == "sparse"
    assert built("cyclical", recovery="projected").weights == "projected"
    assert built("cyclical", recovery="straight_through").weights == "dense"
    assert len(built("cyclical").updates.steps()) == 4 * 15 + 3
    assert built("top-kast").marked_sparsity == pytest.approx(0.8)
    assert built("top-kast").refresh == 15
    assert built("top-kast", backward_sparsity=0.5).marked_sparsity == 0.5
    # The optimizer starts again in every cycle but the first.
    assert list(built("acdc").resets.steps()) == [300, 600, 900]
    assert list(built("sculpt").resets.steps()) == [300, 600, 900]
    techniques = ToSTConfig(neurons="swish", skips="conv", lrsi=True, labels=0.1)
    code = dataclasses.replace(techniques, as_in_code=True)
    assert code.build() == tost.reproduce()
    assert techniques.build().neurons == tost.Neurons(kind="swish")
    assert ToSTConfig().build() == tost.ToST()


def test_the_methods_that_grow_weights_have_a_warmup_of_them():
    built = {name: build_method(Config(method=name)) for name in METHODS}
    growing = {name for name, record in built.items() if record and record.grows}
    assert growing == {name for name in METHODS if "warmup" in OPTIONS[name]}


def test_the_penalty_of_greg2_grows_until_it_prunes():
    def penalties(steps, marked, **options):
        masks = MaskConfig(interval=15)
        record = build_method(Config(method="greg2", masks=masks, **options))
        assert record is not None
        assert record.penalty is not None
        ones, marks = jnp.ones(1), jnp.array([marked])
        at = [PenaltyInputs(ones, ones > 0, marks, jnp.int32(t)) for t in steps]
        return [float(jnp.asarray(record.penalty(x)).sum()) for x in at]

    # It prunes at step 600. Until 480 there are 32 increases, 3 of them of all weights.
    steps = (0, 14, 15, 30, 44, 45, 60, 465, 480, 599, 600)
    pruned = penalties(steps, False)
    assert pruned == [*sorted(pruned[:-1]), 0.0]
    assert pruned[0] > 0
    assert pruned[-2] == pytest.approx(1.0, abs=0.06)
    assert penalties(steps, True)[-3] == pytest.approx(-OptimizerConfig().weight_decay)
    adamw = OptimizerConfig(name="adamw")
    assert penalties(steps, True, optimizer=adamw)[-3] == 0.0


def test_shifted_images_are_crops_of_the_padded_ones_and_all_crops_occur():
    images = np.random.default_rng(1).integers(1, 256, (200, 4, 5, 2), dtype=np.uint8)
    corners = augment.shifts(jax.random.key(0), 200, 1)
    shifted = np.asarray(augment.shifted(jnp.asarray(images), corners, 1))
    assert (shifted.shape, shifted.dtype) == (images.shape, np.uint8)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    seen = collections.Counter(
        (dy, dx)
        for i in range(200)
        for dy in range(3)
        for dx in range(3)
        if np.array_equal(shifted[i], padded[i, dy : dy + 4, dx : dx + 5])
    )
    assert sum(seen.values()) == 200
    assert set(seen) == {(dy, dx) for dy in range(3) for dx in range(3)}
    assert not np.array_equal(corners, augment.shifts(jax.random.key(1), 200, 1))
    which = np.arange(200) % 3 == 0
    mirrored = np.asarray(augment.mirrored(jnp.asarray(images), jnp.asarray(which)))
    expected = np.where(which[:, None, None, None], images[:, :, ::-1], images)
    assert np.array_equal(mirrored, expected)


def test_learning_rates():
    for config, expected in (
        ({}, {0: 0.1, 49: 0.1, 50: 0.01, 74: 0.01, 75: 0.001, 100: 0.001}),
        ({"drops": (0.3, 0.6, 0.9)}, {29: 0.1, 30: 0.01, 60: 1e-3, 89: 1e-3, 90: 1e-4}),
        ({"schedule": "cosine"}, {0: 0.1, 50: 0.05, 100: 0.0}),
        ({"schedule": "cyclic", "cycles": 2}, {0: 0.1, 25: 0.05, 50: 0.1, 100: 0.0}),
        ({"schedule": "constant"}, {0: 0.1, 100: 0.1}),
        (
            {"schedule": "constant", "warmup_steps": 4},
            {0: 0.02, 1: 0.04, 3: 0.08, 4: 0.1, 100: 0.1},
        ),
        ({"schedule": "cosine", "warmup_steps": 4}, {0: 0.02, 50: 0.05, 100: 0.0}),
    ):
        rate = optimizer.learning_rate(OptimizerConfig(**config), 100)
        for at, value in expected.items():
            actual = float(np.asarray(rate(at)))
            assert actual == pytest.approx(value, rel=1e-6, abs=1e-9), (config, at)


def test_an_epoch_goes_once_through_the_data_in_an_order_of_its_own():
    each = setup(method="granet")
    state = each.compiled_step.create([0])
    assert np.array_equal(state.order, np.arange(1201))
    orders = []
    for _ in range(2 * 18):  # 18 batches of 64 images are an epoch
        state, _ = each.compiled_step.steps(state, each.train_data, 1)
        orders.append(np.asarray(state.order))
    assert int(state.step) == 36
    for first in (0, 18):
        assert np.array_equal(np.sort(orders[first]), np.arange(1201))
        for order in orders[first : first + 18]:
            assert np.array_equal(order, orders[first])
    assert not np.array_equal(orders[0], orders[18])
    assert not np.array_equal(orders[0], np.arange(1201))


def test_the_seed_decides_everything_and_all_seeds_share_one_program(tmp_path):
    each = setup(method="granet")
    records, state = fit(each, 5, tmp_path / "5")
    other, state_other = fit(each, 6, tmp_path / "6")
    again, state_again = fit(each, 5, tmp_path / "again")
    assert records == again
    assert runs.same(state, state_again)
    for a, b in zip(records[1:], other[1:], strict=True):
        assert a.train_loss != b.train_loss
    for name in ("hidden_0", "hidden_1", "output"):
        for a, b in (
            (state.params, state_other.params),
            (masks_of(each, state), masks_of(each, state_other)),
        ):
            assert not np.array_equal(a[name]["kernel"], b[name]["kernel"])
    assert each.compiled_step.steps._cache_size() == 1
    # A scan gives what the loop gives, bit for bit.
    # There are 40 = 3 x 13 + 1 steps between evaluations.
    blocks = setup(method="granet", scan_block=3)
    lengths = []

    def steps(state: step.TrainState, train_data: Any, number: int) -> Any:
        lengths.append(number)
        return blocks.compiled_step.steps(state, train_data, number)

    counted = dataclasses.replace(blocks.compiled_step, steps=steps)
    scan = fit(blocks._replace(compiled_step=counted), 5, tmp_path / "scan")
    assert lengths == 4 * [*13 * [3], 1]
    assert scan[0] == records
    assert runs.same(scan[1], state)


def test_evaluation_counts_every_image_once():
    each = setup(method="dense")
    dataset, compiled_step = each.dataset, each.compiled_step
    state = compiled_step.create([3])
    x = (np.asarray(dataset.test.inputs, np.float64) / 255 - dataset.mean) / dataset.std
    x = runs.lenet(jax.device_get(state.params), x.reshape(596, 64))
    labels = dataset.test.labels
    entropy = np.log(np.exp(x).sum(1)) - x[np.arange(596), labels]
    for size in (1024, 100):
        batches = loop.padded_batches(dataset.test, size, 1)
        assert len({batch.labels.shape for batch in batches}) == 1
        placed = map(compiled_step.place_test, batches)
        scores = [compiled_step.evaluate(state, batch) for batch in placed]
        correct = sum(int(score.correct[0]) for score in scores)
        assert correct == np.sum(x.argmax(1) == labels)
        loss = sum(float(score.loss[0]) for score in scores)
        assert loss == pytest.approx(entropy.sum(), rel=1e-5)


def test_test_batches_suit_the_devices():
    labels = np.arange(50, dtype=np.int32) % 10
    split = data.Split(np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1), labels)
    for devices in (1, 3, 8):
        batches = loop.padded_batches(split, 20, devices)
        assert all(len(batch.labels) % devices == 0 for batch in batches)
        inputs = [np.asarray(batch.inputs)[batch.labels >= 0] for batch in batches]
        assert np.array_equal(np.concatenate(inputs), split.inputs)


def test_a_network_that_is_not_as_sparse_as_it_should_be_is_noticed(tmp_path):
    # One weight of all layers is active.
    each = setup(method="static", sparsity=1 - 1 / TOTAL, steps=1, eval_every=1)
    with pytest.warns(UserWarning, match="no active weight is left at 'h") as seen:
        (record, *_), state = fit(each, 0, tmp_path)
    empty = record.sparsity.empty
    assert len(empty) == 2
    assert all(name in str(seen[0].message) for name in empty)
    loop._check_state(each, state, 1, None)
    train_step = each.compiled_step.train_step
    config = dataclasses.replace(each.config, sparsity=0.8)
    wrong = dataclasses.replace(
        each.compiled_step, train_step=dataclasses.replace(train_step, config=config)
    )
    with pytest.raises(RuntimeError, match="1 weights are active, 10040 of 50200"):
        loop._check_state(each._replace(compiled_step=wrong), state, 1, None)
    filled = jax.tree.map(jnp.ones_like, state.params)
    with pytest.raises(RuntimeError, match="hidden_0/kernel has weights"):
        loop._check_state(each, state._replace(params=filled), 1, None)


def test_a_moving_average_is_evaluated_masked(tmp_path):
    each = setup(method="gmp", optimizer=OptimizerConfig(ema=0.99))
    records, state = fit(each, 0, tmp_path / "ema")
    evaluated = each.compiled_step.train_step.evaluation_params(state)
    masks = masks_of(each, state)
    for name in ("hidden_0", "hidden_1", "output"):
        mask = np.asarray(masks[name]["kernel"])
        assert not np.any(np.asarray(evaluated[name]["kernel"])[~mask])
        assert np.any(np.asarray(state.average[name]["kernel"])[~mask])
    # Neither the unmasked average nor the weights give the recorded loss.
    (batch,) = loop.padded_batches(each.dataset.test, 1024, 1)
    dense = setup(method="dense").compiled_step
    losses = [
        float(dense.evaluate(state._replace(params=params), batch).loss[0]) / 596
        for params in (evaluated, state.average, state.params)
    ]
    differences = [abs(loss - records[-1].test_loss) for loss in losses]
    assert differences[0] < 1e-6
    assert min(differences[1:]) > 3e-6


def test_bfloat16_is_for_activations_and_parameters_stay_float32():
    each = setup(method="dense", precision="bfloat16")
    train_step = each.compiled_step.train_step
    shapes = jax.eval_shape(train_step.create, np.uint32(0))
    text = str(jax.make_jaxpr(train_step.step)(shapes, each.dataset.train))
    assert "bf16[64,300]" in text
    state, loss = jax.eval_shape(train_step.step, shapes, each.dataset.train)
    assert loss.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    decayed = optimizer.decay_mask(shapes.params, models.maskable)
    for layer in ("hidden_0", "hidden_1", "output"):
        assert decayed[layer] == {"kernel": True, "bias": False}


class Results(NamedTuple):
    """The folder, the output and the metrics of a finished command."""

    folder: pathlib.Path
    output: str
    lines: list[dict[str, Any]]

    def of(self, method: str, seed: int) -> list[dict[str, Any]]:
        return [x for x in self.lines if (x["method"], x["seed"]) == (method, seed)]

    def last(self, method: str) -> list[dict[str, Any]]:
        return [self.of(method, seed)[-1] for seed in (0, 1)]

    def best(self, method: str) -> list[float]:
        """Every seed's best accuracy at the final sparsity."""
        active = self.last(method)[0]["active_weights"]
        return [
            max(
                line["test_accuracy"]
                for line in self.of(method, seed)
                if line["active_weights"] == active
            )
            for seed in (0, 1)
        ]


def command(folder: pathlib.Path) -> list[str]:
    """GraNet and dense training, two seeds each."""
    config = dataclasses.replace(SHORT, seeds=2, baseline=True, out=folder)
    return runs.arguments(config)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    folder = tmp_path_factory.mktemp("runs") / "new" / "run"
    capture = tmp_path_factory.mktemp("out") / "stdout"
    with pytest.MonkeyPatch.context() as patch, capture.open("w") as file:
        patch.setenv("COLUMNS", "80")
        runs.share_setups(patch)
        patch.setattr(sys, "stdout", file)
        assert train.main(command(folder)) == 0
    names = [
        f"{method}-seed{seed}" for method in ("granet", "dense") for seed in (0, 1)
    ]
    all_lines = [x for name in names for x in lines(folder / name / "metrics.jsonl")]
    return Results(folder, capture.read_text(), all_lines)


def test_a_run_leaves_these_files(results):
    names = " ".join(sorted(path.name for path in results.folder.iterdir()))
    assert names == (
        "config.json curves.png dense-seed0 dense-seed1 granet-seed0 granet-seed1 "
        "summary.json"
    )
    for run in ("dense-seed0", "granet-seed1"):
        checkpoints, board, log = sorted((results.folder / run).iterdir())
        assert checkpoints.name == "checkpoints"
        assert runs.saved_steps(results.folder / run) == [80, 160]
        assert board.name.startswith("events.out.tfevents.")
        assert log.name == "metrics.jsonl"
    config = json.loads((results.folder / "config.json").read_text())
    assert (config["method"], config["steps"]) == ("granet", STEPS)
    assert config["masks"]["interval"] == 2
    assert config["out"] == str(results.folder)


def test_metrics_have_a_line_for_every_evaluation(results):
    assert [(x["method"], x["seed"], x["step"]) for x in results.lines] == [
        (method, seed, at)
        for method in ("granet", "dense")
        for seed in (0, 1)
        for at in (0, 40, 80, 120, 160)
    ]
    for line in results.lines:
        assert line["test_accuracy"] == line["test_correct"] / 596
        assert (line["train_loss"] is None) == (line["step"] == 0)
        assert line["total_weights"] == TOTAL
        assert line["sparsity"] == 1 - line["active_weights"] / TOTAL
        rate = {0: 0.1, 40: 0.1, 80: 0.01}.get(line["step"], 0.001)
        assert line["learning_rate"] == pytest.approx(rate, rel=1e-6)
        if line["method"] == "granet":
            # A cubic schedule with an update every second step, which ends at step 80.
            at = min(line["step"] / 80, 1.0)
            assert line["active_weights"] == active_count(0.9 - 0.9 * (1 - at) ** 3)
        else:
            assert line["active_weights"] == TOTAL
            assert line["layer_sparsity"] == dict.fromkeys(LAYERS, 0.0)
        # It learns.
        if line["step"] == 0:
            assert line["test_accuracy"] < 0.3
        if line["step"] == STEPS:
            assert line["test_accuracy"] > 0.85


@pytest.mark.parametrize("method", ["granet", "dense"])
def test_metrics_agree_with_the_masks_and_weights(results, method, tmp_path):
    """Also: the baseline is what `--method dense` trains."""
    each = setup(method=method)
    records, state = fit(each, 1, tmp_path / "run")
    metrics_lines = results.of(method, 1)
    assert [(r.step, r.train_loss, r.test_correct) for r in records] == [
        (x["step"], x["train_loss"], x["test_correct"]) for x in metrics_lines
    ]
    masks = masks_of(each, state)
    assert list(metrics_lines[-1]["layer_sparsity"]) == list(LAYERS)
    active = 0
    for name, size in LAYERS.items():
        layer = name.removesuffix("/kernel")
        mask = np.asarray(masks[layer]["kernel"])
        weights = np.asarray(state.params[layer]["kernel"])
        assert mask.size == size
        assert not np.any(weights[~mask])
        assert metrics_lines[-1]["layer_sparsity"][name] == 1 - int(mask.sum()) / size
        active += int(mask.sum())
    assert active == metrics_lines[-1]["active_weights"]
    assert active == (active_count(0.9) if method == "granet" else TOTAL)


def test_tensorboard_has_the_same_numbers(results):
    (board,) = (results.folder / "granet-seed1").glob("events.*")
    content = board.read_bytes()
    scalars, at = {}, 0
    while at < len(content):  # records of: length, its CRC, data, its CRC
        length = int.from_bytes(content[at : at + 8], "little")
        event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
        at += 12 + length + 4
        for value in event.summary.value:
            scalars[value.tag, event.step] = value.simple_value
    for line in results.of("granet", 1):
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
            assert scalars[tag, line["step"]] == np.float32(value), tag


def test_the_same_command_again_trains_nothing_and_says_the_same(results):
    def files() -> dict[str, bytes]:
        contents = runs.contents(results.folder)
        return {name: contents[name] for name in contents if "events." not in name}

    before = files()
    assert train.main(command(results.folder)) == 0
    assert files() == before


def test_the_summary_and_the_table_have_the_last_line_of_every_run(results):
    summary = json.loads((results.folder / "summary.json").read_text())
    assert [row["method"] for row in summary["runs"]] == ["granet", "dense"]
    for row in summary["runs"]:
        last = results.last(row["method"])
        assert row["seeds"] == [x["seed"] for x in last]
        for key in ("test_accuracy", "sparsity", "active_weights", "seconds"):
            assert row[key] == [x[key] for x in last]
        assert row["total_weights"] == TOTAL
        assert row["best_test_accuracy"] == results.best(row["method"])
    assert summary["environment"]["jax"] == jax.__version__
    assert summary["environment"]["backend"] == "cpu"

    rows = {}
    for line in results.output.splitlines():
        assert len(line) <= 80 or line.startswith("Results in ")
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells:
            rows[cells[0]] = cells[1:]
    assert list(rows) == ["granet", "dense"]
    for method, cells in rows.items():
        accuracy = [100 * x["test_accuracy"] for x in results.last(method)]
        highest = [100 * x for x in results.best(method)]
        assert cells == [
            f"{statistics.mean(accuracy):.2f} ± {statistics.stdev(accuracy):.2f}",
            f"{statistics.mean(highest):.2f} ± {statistics.stdev(highest):.2f}",
            {"granet": "90.00", "dense": "0.00"}[method],
            {"granet": "5,020 of 50,200", "dense": "50,200 of 50,200"}[method],
        ]
    for heading in ("last / %", "best / %", "sparsity / %", "active of all weights"):
        assert heading in results.output
    assert "mean ± std over 2 seeds" in results.output
    assert f"Results in {results.folder}" in results.output


def test_the_plot_is_an_image_that_shows_both_methods(results):
    image = matplotlib.image.imread(results.folder / "curves.png")[..., :3]
    image = np.round(image * 255).astype(int)
    assert image.shape == (900, 1650, 3)
    for half in (image[:, :950], image[:, 1050:]):
        for colour in ((0, 114, 178), (213, 94, 0)):
            assert np.all(half == colour, axis=-1).sum() > 500
    assert 0.5 < np.all(image == 255, axis=-1).mean() < 0.95


def test_the_page_says_how_to_read_a_checkpoint(results, capsys):
    page = pathlib.Path(train.__file__).with_name("README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert "runs/c10/granet-seed0" in code
    names: dict[str, Any] = {}
    exec(code.replace("runs/c10", str(results.folder)), names)
    assert names["step"] == STEPS
    for layer, mask in names["masks"].items():
        assert mask["bias"] is None
        assert not names["weights"][layer]["kernel"][~mask["kernel"]].any()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    assert all(line.startswith("['") and "active" in line for line in printed)


# Weights that live on behind the masks, a penalty, and counts that layers round. The
# others are slow.
TRAINED = ("top-kast", "greg2", "srigl")


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(x, marks=() if x in TRAINED else pytest.mark.slow)
        for x in METHODS
        if x not in ("granet", "dense")
    ],
)
def test_every_method_trains(method, tmp_path):
    # In so short a training, DSR stays near its first distribution, uniform.
    masks = MaskConfig(distribution="erk" if method == "dsr" else None)
    each = setup(method=method, masks=masks, eval_every=STEPS)
    (first, last), _ = fit(each, 0, tmp_path)
    dense = ("gmp", "cyclical", "acdc", "straight-through", "greg2")
    start = {"granet-st": 0.5, "sculpt": 0.8} | dict.fromkeys(dense, 0.0)
    # Each of SRigL's 410 units may be half an input off, at the start and at the end.
    slack = 410 if method == "srigl" else 0
    assert abs(first.sparsity.active - active_count(start.get(method, 0.9))) <= slack
    assert abs(last.sparsity.active - active_count(0.9)) <= slack
    assert (first.step, last.step) == (0, STEPS)
    assert last.test_accuracy > 0.6


def test_default_folders_of_the_same_second_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {run_folders.open_folder(Config()) for _ in range(4)}
    assert len(folders) == 4
    assert {folder.parent for folder in folders} == {pathlib.Path("runs")}


def test_help_explains_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        train.main(["--help"])
    assert exit_.value.code == 0
    # The choices of an option may take several lines.
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
    for option in ("--recipe NAME", "--list-recipes [TEXT]", "--dry-run", "--sparsity"):
        assert option in text
