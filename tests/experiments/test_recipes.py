"""Recipes and the dry run, against numbers worked out by hand."""

import dataclasses
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data, train
from experiments.config import recipes
from experiments.config.run import (
    Config,
    DataConfig,
    MaskConfig,
    ToSTConfig,
    build_method,
)
from experiments.data import tfds_builders
from experiments.reports import dry_run
from experiments.training import optimizer
from experiments.training.step import TrainStep

ALL = recipes.recipes()
FULL = {name: r for name, r in ALL.items() if not name.endswith("-mini")}
LENET = Config(
    method="granet",
    model="lenet-300-100",
    steps=1000,
    data=DataConfig("fashion_mnist", batch_size=100),
    masks=MaskConfig(interval=100),
)
TOST_SOURCES = ("random", "snip", "grasp", "synflow")
TOST_CIFAR = ("resnet18", "resnet32", "vgg16")
# 784 x 300, 300 x 100 and 100 x 10 weights, and as many multiply-accumulates.
LENET_WEIGHTS = 235_200 + 30_000 + 1_000


def run(capsys, *arguments):
    """Exit status, standard output and error of the command line."""
    try:
        status = train.main(arguments)
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    return status, out, err


# Of GraNet: two data sets with two models, and one with one; dense, and 6 methods at 3
# sparsities. Of ToST: two data sets with three models, and one with two; 4 sources at 3
# sparsities, plain and with its techniques. And a twin of each.
def test_every_row_is_there():
    names = [f"{d}-{m}" for d in ("cifar10", "cifar100") for m in ("vgg19", "resnet50")]
    rows = {f"dense-{n}" for n in [*names, "imagenet-resnet50"]}
    for method in ("granet", "granet-st", "gmp", "rigl", "set", "static"):
        rows |= {f"{method}-{n}-{s}" for n in names for s in (90, 95, 98)}
        rows |= {f"{method}-imagenet-resnet50-{s}" for s in (80, 90, 95)}
    assert len(rows) == 5 * (1 + 6 * 3)
    networks = [f"{d}-{m}" for d in ("cifar10", "cifar100") for m in TOST_CIFAR]
    for name in (*networks, "tiny-resnet18", "tiny-mobilenetv2"):
        for source in TOST_SOURCES:
            for s in (90, 95, 98):
                rows |= {f"{source}-{name}-{s}", f"tost-{source}-{name}-{s}"}
    assert len(rows) == 5 * (1 + 6 * 3) + 8 * 4 * 3 * 2
    assert set(FULL) == rows
    assert set(ALL) == rows | {f"{row}-mini" for row in rows}


@pytest.mark.parametrize("name", ALL)
def test_name_says_what_it_is(name):
    config = ALL[name].config
    pattern = r"(.+)-(cifar100?|imagenet|tiny)-([a-z0-9]+?)(-\d\d)?(-mini)?"
    method, data, label, rest, mini = re.fullmatch(pattern, name).groups(default="")
    if not mini:
        assert config.model.replace("-", "").removesuffix("cifar") == label
        assert config.data.dataset.partition("_")[0].removesuffix("2012") == data
    source = method.removeprefix("tost-")
    if source in TOST_SOURCES:
        assert config.method == "static"
        assert config.masks.source == (None if source == "random" else source)
        techniques = ToSTConfig("swish", "identity", lrsi=True, labels=0.1)
        assert config.tost == (techniques if method != source else ToSTConfig())
        of_the_code = label == "resnet18" and data != "tiny"
        assert ALL[name].ours == (not mini and not of_the_code)
    else:
        assert config.method == method
        assert config.masks.source is None
        assert config.tost == ToSTConfig()
        assert not ALL[name].ours
    built = build_method(config)
    if config.method == "dense":
        assert built is None
        assert rest == ""
    else:
        assert built.sparsity(config.steps) == config.sparsity == int(rest[1:]) / 100
    assert not config.baseline


def test_steps():
    # 160 epochs of 390 batches, or 182; 182 of 781; 100 of 10,009; 10 of 468.
    steps = {"cifar10": 62_400, "cifar100": 62_400, "imagenet2012": 1_000_900}
    tost = {"cifar10": 70_980, "cifar100": 70_980, "tiny_imagenet": 142_142}
    for name, recipe in FULL.items():
        of_tost = name.removeprefix("tost-").startswith(TOST_SOURCES)
        expected = (tost if of_tost else steps)[recipe.config.data.dataset]
        assert recipe.config.steps == expected
        assert recipe.config.data.batch_size == 128
        assert ALL[f"{recipe.name}-mini"].config.steps == 4_680


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        (
            "granet-cifar10-vgg19-90",
            {0: 0.1, 31_199: 0.1, 31_200: 1e-2, 46_799: 1e-2, 46_800: 1e-3},
        ),
        (
            "set-imagenet-resnet50-80",
            {
                0: 0.1 / 50_046,
                25_022: 0.05,
                50_045: 0.1,
                300_269: 0.1,
                300_270: 1e-2,
                600_539: 1e-2,
                600_540: 1e-3,
                900_809: 1e-3,
                900_810: 1e-4,
                1_000_899: 1e-4,
            },
        ),
        # Epochs 90 and 135.
        (
            "tost-snip-cifar10-resnet18-95",
            {35_099: 0.1, 35_100: 1e-2, 52_649: 1e-2, 52_650: 1e-3},
        ),
        # The same shares of 4,680 steps.
        ("granet-cifar10-vgg19-90-mini", {2_339: 0.05, 2_340: 5e-3, 3_510: 5e-4}),
        ("set-imagenet-resnet50-80-mini", {234: 0.01, 1_403: 0.01, 1_404: 1e-3}),
    ],
)
def test_learning_rates(name, rates):
    config = ALL[name].config
    schedule = optimizer.learning_rate(config.optimizer, config.steps)
    found = [float(schedule(jnp.int32(step))) for step in rates]
    np.testing.assert_allclose(found, list(rates.values()), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "updates", "first", "before", "last"),
    [
        # Until epoch 80 is step 31,200; epoch 30 of ImageNet is 300,270.
        ("granet-cifar10-resnet50-95", 62, 0.0, 30_000, 31_000),
        ("granet-st-cifar100-vgg19-98", 62, 0.5, 30_000, 31_000),
        ("gmp-cifar10-vgg19-90", 31, 0.0, 30_000, 31_000),
        ("granet-imagenet-resnet50-80", 250, 0.0, 296_000, 300_000),
        ("granet-st-imagenet-resnet50-90", 250, 0.5, 296_000, 300_000),
        ("gmp-imagenet-resnet50-95", 75, 0.0, 296_000, 300_000),
    ],
)
def test_gradual_pruning(name, updates, first, before, last):
    config = ALL[name].config
    method = build_method(config)
    assert len(method.updates.steps()) == updates
    assert method.sparsity(0) == first
    assert method.sparsity(before) < method.sparsity(last) == config.sparsity


@pytest.mark.parametrize(
    ("name", "updates", "fractions"),
    [
        ("rigl-cifar10-vgg19-90", 62, {0: 0.5, 31_200: 0.25, 62_400: 0.0}),
        ("rigl-imagenet-resnet50-80", 250, {0: 0.5, 500_450: 0.25}),
        ("set-cifar10-vgg19-90", 46, {0: 0.3, 46_000: 0.3}),
        ("granet-cifar10-vgg19-90", 62, {0: 0.5, 31_200: 0.2525, 62_400: 0.005}),
        ("static-cifar10-vgg19-90", 0, {0: 0.0}),
    ],
)
def test_exchange(name, updates, fractions):
    method = build_method(ALL[name].config)
    assert len(method.updates.steps()) == updates
    found = [method.fraction(step) for step in fractions]
    np.testing.assert_allclose(found, list(fractions.values()), atol=1e-12)


def test_optimizers():
    cifar = ALL["granet-cifar100-resnet50-90"].config.optimizer
    assert (cifar.momentum, cifar.nesterov, cifar.weight_decay) == (0.9, True, 5e-4)
    assert (cifar.label_smoothing, cifar.warmup_steps) == (0.0, 0)
    tost = ALL["tost-grasp-cifar100-resnet18-98"].config.optimizer
    assert (tost.momentum, tost.nesterov, tost.weight_decay) == (0.9, False, 2e-4)
    imagenet = ALL["rigl-imagenet-resnet50-90"].config.optimizer
    assert (imagenet.momentum, imagenet.nesterov) == (0.9, False)
    assert (imagenet.weight_decay, imagenet.label_smoothing) == (1e-4, 0.1)
    assert imagenet.warmup_steps == 5 * 10_009


@pytest.mark.parametrize("name", FULL)
def test_twin_keeps_the_shares(name):
    full, small = FULL[name].config, ALL[f"{name}-mini"].config
    assert (small.method, small.sparsity) == (full.method, full.sparsity)
    assert small.data == DataConfig("fashion_mnist", batch_size=128)
    models = {"vgg-19": "cnn", "resnet-50": "lenet-5", "resnet-50-cifar": "lenet-5"}
    assert small.model == models.get(full.model, "cnn-bn-small")
    assert (small.masks.source, small.tost) == (full.masks.source, full.tost)
    assert ALL[f"{name}-mini"].published is None
    scale = full.steps / small.steps
    for option in ("fraction", "initial_sparsity", "pruning_end", "stop"):
        assert getattr(small.masks, option) == getattr(full.masks, option)
    assert small.masks.distribution == full.masks.distribution
    for option in ("drops", "schedule", "label_smoothing", "weight_decay", "nesterov"):
        assert getattr(small.optimizer, option) == getattr(full.optimizer, option)
    warmup = full.optimizer.warmup_steps / scale
    assert abs(small.optimizer.warmup_steps - warmup) <= 0.5
    if full.masks.interval is None:
        assert small.masks.interval is None
    else:
        assert abs(small.masks.interval - full.masks.interval / scale) <= 0.5
        methods = build_method(full), build_method(small)
        numbers = [len(method.updates.steps()) for method in methods]
        assert abs(numbers[0] - numbers[1]) <= 0.03 * numbers[0]


def test_published_numbers_carry_their_mark():
    some = [recipe for recipe in ALL.values() if recipe.published is not None]
    assert some
    for recipe in ALL.values():
        marked = recipe.provenance.endswith("; recalled, unverified")
        assert marked == (recipe.published is not None)


def test_list(capsys):
    status, out, _ = run(capsys, "--list-recipes")
    lines = out.splitlines()
    assert status == 0
    assert max(map(len, lines)) <= 100
    listed = {line.split()[0]: line for line in lines if line.split()}
    for name, recipe in FULL.items():
        config = recipe.config
        cells = listed[name].split()
        assert cells[1:4] == [config.model, config.data.dataset, config.method]
        assert cells[4] == f"{config.steps:,}"
        if recipe.published is None:
            assert cells[5:] == ["ours" if recipe.ours else "-"]
        else:
            assert cells[5:] == [f"{recipe.published:.2f}", "*"]
    assert "* Published best test accuracy, recalled, unverified" in out


def test_list_of_some(capsys):
    status, out, _ = run(capsys, "--list-recipes", "cifar10-vgg19-95")
    assert status == 0
    assert out.count("-cifar10-vgg19-95 ") == 6
    assert "98" not in out
    status, out, _ = run(capsys, "--list-recipes", "mini")
    assert out.count("-mini ") == len(FULL)
    assert max(map(len, out.splitlines())) <= 100
    status, _, err = run(capsys, "--list-recipes", "cifar1000")
    assert status == 2
    assert "'cifar1000'" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "granet-cifar10-resnet-95"], "granet-cifar10-resnet50-95"),
        (["--recipe", "zzzz"], "there is no recipe 'zzzz'. --list-recipes"),
        (["--recipe"], "expected one argument"),
        (["--recipe", "dense-cifar10-vgg19", "--masks.stop", "1"], "masks.stop"),
        (["--dry-run", "--data.batch-size", "5000"], "1201 training examples"),
        (["--dry-run", "--data.dataset", "python_docs"], "takes images"),
    ],
)
def test_bad_input(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert message in err
    assert out == ""


def test_help_names_the_options(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for option in ("--recipe NAME", "--list-recipes [TEXT]", "--dry-run", "--sparsity"):
        assert option in out


def test_facts_are_those_of_the_data(tmp_path):
    assert set(dry_run.DATASETS) == set(data.NAMES)
    for name, facts in dry_run.DATASETS.items():
        if name == "imagenet2012":
            continue
        features = tfds_builders.BUILDERS[name](data_dir=tmp_path).info.features
        if "text" in features:
            assert facts[:2] == ((128,), 256)
            continue
        assert facts.shape == features["image"].shape
        assert facts.classes == features["label"].num_classes
    digits = data.load("digits", tmp_path)
    facts = dry_run.DATASETS["digits"]
    assert (len(digits.train.labels), digits.classes) == (facts.train_size, 10)
    # 90% of 1,115,394 characters, in rows of 128 that each have a successor.
    assert dry_run.DATASETS["tiny_shakespeare"].train_size == (1_003_854 - 1) // 128


def test_counts_of_lenet():
    result = dry_run.analyse(LENET)
    leaves = {leaf.name: leaf for leaf in result.leaves}
    assert {name: leaf.shape for name, leaf in leaves.items()} == {
        "hidden_0/bias": (300,),
        "hidden_0/kernel": (784, 300),
        "hidden_1/bias": (100,),
        "hidden_1/kernel": (300, 100),
        "output/bias": (10,),
        "output/kernel": (100, 10),
    }
    for name, leaf in leaves.items():
        kernel = name.endswith("kernel")
        assert leaf.maskable == kernel
        assert leaf.macs == (leaf.size if kernel else 0)
        assert leaf.start == leaf.size
    assert result.maskable == LENET_WEIGHTS
    assert result.active == 26_620
    assert result.memory["parameters"] == 4 * (LENET_WEIGHTS + 410)
    assert result.updates == list(range(100, 1001, 100))
    assert result.prunings == [100, 200, 300, 400, 500]
    assert result.steps_per_epoch == 600


def test_streamed_data_has_no_remainder():
    config = ALL["static-imagenet-resnet50-80"].config
    result = dry_run.analyse(config)
    assert result.steps_per_epoch == 1_281_167 / 128
    assert sum(leaf.size for leaf in result.leaves) == 25_557_032
    assert result.active == math.floor(0.2 * result.maskable + 0.5)
    assert sum(leaf.start for leaf in result.masked) == result.active


def test_memory_is_that_of_a_state(tmp_path):
    config = dataclasses.replace(LENET, data=DataConfig("digits"))
    train_step = TrainStep(config, data.load("digits", tmp_path))
    state = jax.jit(train_step.create)(jnp.uint32(0))
    result = dry_run.analyse(config)
    counters = state.step.nbytes + state.seed.nbytes
    held = sum(x.nbytes for x in jax.tree.leaves(state))
    assert sum(result.memory.values()) == held - counters


# A forward pass of this network costs as many multiply-accumulates as it has weights,
# whatever the split over layers.
def test_training_cost_by_hand():
    def cost(method, masks=LENET.masks):
        config = dataclasses.replace(LENET, masks=masks, method=method)
        return dry_run.training_cost(dry_run.analyse(config), "uniform")

    static = cost("static", MaskConfig(distribution="uniform"))
    assert static == pytest.approx(0.1)
    assert cost("set") == pytest.approx(0.1)
    assert cost("dense", MaskConfig()) == 1
    # Dense gradients by weights once in 101 steps, until the last update at 700.
    growing = (3 * 0.1 * 100 + 2 * 0.1 + 1) / 101 / 3
    assert cost("rigl") == pytest.approx(0.7 * growing + 0.3 * 0.1)
    assert cost("snfs") == pytest.approx((2 * 0.1 + 1) / 3)
    # Pruned at steps 100 to 500, to 1 - 0.9 (1 - (1 - j / 5)^3).
    sparse = [1 - 0.9 * (1 - (1 - min(j, 5) / 5) ** 3) for j in range(10)]
    assert cost("gmp") == pytest.approx(sum(sparse) / 10)
    mean = sum((300 * f + 2 * f + 1) / 101 / 3 for f in sparse) / 10
    assert cost("granet") == pytest.approx(mean)


def test_final_cost_follows_the_split():
    config = Config(
        method="static",
        model="lenet-5",
        sparsity=0.9,
        data=DataConfig("fashion_mnist"),
    )
    result = dry_run.analyse(config)
    # By hand: 24 x 24 x 500, 8 x 8 x 25,000, and two linear layers.
    dense = {"conv_0": 288_000, "conv_1": 1_600_000, "hidden": 400_000, "output": 5_000}
    assert {leaf.name: leaf.macs for leaf in result.masked} == {
        f"{name}/kernel": number for name, number in dense.items()
    }
    assert dry_run.forward_cost(result, "uniform") == pytest.approx(229_300)
    exact = sum(leaf.macs * leaf.start / leaf.size for leaf in result.masked)
    # The counts of active weights are whole numbers, the densities are not.
    assert dry_run.forward_cost(result, "erk") == pytest.approx(exact, rel=1e-4)
    assert exact > 1.5 * 229_300


def test_dry_run_needs_no_data(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nowhere = tmp_path / "nothing"
    status, out, _ = run(
        capsys,
        *("--recipe", "granet-cifar10-vgg19-95", "--dry-run"),
        *("--data.data-dir", str(nowhere)),
    )
    assert status == 0
    assert not nowhere.exists()
    plot = tmp_path / "dry-run-granet-cifar10-vgg19-95.png"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == [plot.name]
    assert max(map(len, out.splitlines())) <= 100
    words = " ".join(out.split())
    for part in (
        "Published accuracy: 93.72 %",
        "recalled, unverified",
        "62,400 of 128 examples",
        "160, of 390 steps each",
        "62, every 1,000 steps, from step 1,000 to 62,000",
        "31, the last one at 31,000",
        "20,035,018 parameters; 20,024,000 have masks, and 1,001,200 of these are",
        "Estimates, since data and training decide",
    ):
        assert part in words


def test_dry_run_of_a_constant_split_is_exact(capsys, tmp_path):
    out_file = tmp_path / "some" / "plot.png"
    arguments = ("--recipe", "static-cifar10-vgg19-98-mini", "--dry-run")
    status, out, _ = run(capsys, *arguments, "--out", str(out_file))
    assert status == 0
    assert out_file.read_bytes().startswith(b"\x89PNG")
    assert "Estimates" not in out
    assert "No published accuracy is known" in out
    assert "mask updates   none" in out


def test_dry_run_leaves_to_a_source_what_it_decides(capsys, tmp_path):
    arguments = ("--recipe", "tost-snip-tiny-mobilenetv2-95", "--dry-run")
    status, out, _ = run(capsys, *arguments, "--out", str(tmp_path / "x"))
    assert status == 0
    words = " ".join(out.split())
    for part in (
        "Its settings are ours: those of the paper were not available.",
        "masks from snip",
        "ToST swish neurons, identity skips for 35,535 steps, LRsI, labels smoothed by "
        "0.1",
        "At start: active weights. The source of the masks splits them.",
        "Estimates, since data and training decide",
    ):
        assert part in words
    rows = [line.split() for line in out.splitlines() if " yes " in line]
    assert {row[-1] for row in rows} == {"?"}
    # 5% of all.
    (total,) = [line.split() for line in out.splitlines() if line.startswith("all ")]
    masked = sum(int(row[2].replace(",", "")) for row in rows)
    assert int(total[2].replace(",", "")) == masked
    assert int(total[-1].replace(",", "")) == math.floor(0.05 * masked + 0.5)
    for changes, told in (
        ((), "swish neurons, identity skips throughout"),
        (("--tost.neurons", "None"), "ToST identity skips throughout"),
        (("--tost.neurons", "None", "--tost.skips", "None"), "ToST LRsI, labels"),
    ):
        more = (*arguments, "--out", str(tmp_path / "x"), "--tost.as-in-code", *changes)
        _, out, _ = run(capsys, *more)
        assert told in " ".join(out.split())


def test_an_option_changes_a_recipe(capsys, tmp_path):
    out = tmp_path / "run"
    status, text, _ = run(
        capsys,
        *("--recipe", "granet-cifar10-vgg19-95", "--dry-run", "--out", str(out)),
        *("--masks.interval", "500", "--model", "lenet-5"),
    )
    assert status == 0
    assert "124, every 500 steps" in text
    assert "The recipe except for masks.interval, model: no published" in text
    assert "93.72" not in text
    # The folder itself stays free for the run.
    assert not out.exists()
    assert (tmp_path / "run-dry-run.png").exists()


def test_a_twin_trains(capsys, tmp_path):
    out = tmp_path / "run"
    status, _, err = run(
        capsys,
        *("--recipe", "granet-imagenet-resnet50-90-mini", "--no-progress"),
        *("--data.dataset", "digits", "--data.data-dir", str(tmp_path / "data")),
        *("--model", "lenet-300-100", "--data.batch-size", "64", "--steps", "40"),
        *("--optimizer.warmup-steps", "2", "--masks.interval", "4"),
        *("--eval-every", "20", "--checkpoint.every", "40", "--out", str(out)),
    )
    assert status == 0, err
    config = json.loads((out / "config.json").read_text())
    assert config["optimizer"]["label_smoothing"] == 0.1
    assert config["optimizer"]["drops"] == [0.3, 0.6, 0.9]
    assert config["masks"]["pruning_end"] == 0.3
    lines = (out / "granet-seed0" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [0, 20, 40]
    # 10% of 64 x 300 + 300 x 100 + 100 x 10 weights.
    assert [record["active_weights"] for record in records] == [50_200, 5_020, 5_020]
    # What the page says about reading a checkpoint holds for this one.
    page = pathlib.Path(recipes.__file__).with_name("README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert "runs/c10/granet-seed0" in code
    found = {}
    exec(code.replace("runs/c10", str(out)), found)
    assert found["step"] == 40
    for layer, mask in found["masks"].items():
        assert mask["bias"] is None
        assert not found["weights"][layer]["kernel"][~mask["kernel"]].any()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    assert all(line.startswith("['") and "active" in line for line in printed)
