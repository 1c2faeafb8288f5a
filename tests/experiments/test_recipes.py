"""Recipes and the dry run, against numbers worked out by hand."""

import dataclasses
import re
from typing import Any

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
FULL = {name: recipe for name, recipe in ALL.items() if not name.endswith("-mini")}
SOURCES = ("random", "snip", "grasp", "synflow")
LENET = Config(
    method="granet",
    model="lenet-300-100",
    steps=1000,
    data=DataConfig("fashion_mnist", batch_size=100),
    masks=MaskConfig(interval=100),
)
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
# sparsities, plain and with its techniques. Each has a small twin.
def test_every_row_of_the_tables_has_a_recipe_and_a_twin():
    names = [f"{d}-{m}" for d in ("cifar10", "cifar100") for m in ("vgg19", "resnet50")]
    rows = {f"dense-{n}" for n in [*names, "imagenet-resnet50"]}
    for method in ("granet", "granet-st", "gmp", "rigl", "set", "static"):
        rows |= {f"{method}-{n}-{s}" for n in names for s in (90, 95, 98)}
        rows |= {f"{method}-imagenet-resnet50-{s}" for s in (80, 90, 95)}
    assert len(rows) == 5 * (1 + 6 * 3)
    networks = ("resnet18", "resnet32", "vgg16")
    names = [f"{d}-{n}" for d in ("cifar10", "cifar100") for n in networks]
    for name in (*names, "tiny-resnet18", "tiny-mobilenetv2"):
        for source in SOURCES:
            for s in (90, 95, 98):
                rows |= {f"{source}-{name}-{s}", f"tost-{source}-{name}-{s}"}
    assert len(rows) == 5 * (1 + 6 * 3) + 8 * 4 * 3 * 2
    assert set(FULL) == rows
    assert set(ALL) == rows | {f"{row}-mini" for row in rows}


def test_names_say_what_the_recipes_are():
    pattern = r"(.+)-(cifar100?|imagenet|tiny)-([a-z0-9]+?)(-\d\d)?(-mini)?"
    for name, recipe in ALL.items():
        config = recipe.config
        match = re.fullmatch(pattern, name)
        assert match is not None
        method, dataset, label, rest, mini = match.groups(default="")
        if not mini:
            assert config.model.replace("-", "").removesuffix("cifar") == label, name
            dataset_name = config.data.dataset.partition("_")[0].removesuffix("2012")
            assert dataset_name == dataset, name
        source = method.removeprefix("tost-")
        tost = source in SOURCES
        techniques = ToSTConfig("swish", "identity", lrsi=True, labels=0.1)
        assert config.method == ("static" if tost else method), name
        assert config.masks.source == (source if source in SOURCES[1:] else None), name
        assert config.tost == (techniques if method != source else ToSTConfig()), name
        in_the_code = label == "resnet18" and dataset != "tiny"
        assert recipe.ours == (tost and not mini and not in_the_code), name
        method_record = build_method(config)
        assert (method_record is None) == (config.method == "dense") == (rest == ""), (
            name
        )
        if method_record is not None:
            assert (
                method_record.sparsity(config.steps)
                == config.sparsity
                == int(rest[1:]) / 100
            )
        assert not config.baseline, name
        marked = recipe.provenance.endswith("; recalled, unverified")
        assert marked == (recipe.published is not None), name
        # 160 epochs of 390 batches, or 182; 182 of 781; 100 of 10,009; 10 of 468.
        steps = {"cifar": 70_980 if tost else 62_400, "imagenet": 1_000_900}
        steps |= {"tiny": 142_142}
        assert config.steps == 4_680 if mini else steps[dataset.rstrip("01")], name
        assert config.data.batch_size == 128, name
    assert any(recipe.published is not None for recipe in ALL.values())


def test_twins_keep_the_shares_of_the_steps():
    models = {"vgg-19": "cnn", "resnet-50": "lenet-5", "resnet-50-cifar": "lenet-5"}
    for name, recipe in FULL.items():
        full, twin = recipe.config, ALL[f"{name}-mini"]
        small = twin.config
        assert twin.published is None
        assert (small.method, small.sparsity) == (full.method, full.sparsity)
        assert small.data == DataConfig("fashion_mnist", batch_size=128)
        assert small.model == models.get(full.model, "cnn-bn-small")
        assert small.tost == full.tost
        scale = full.steps / small.steps
        own = {"masks": {"interval"}, "optimizer": {"learning_rate", "warmup_steps"}}
        for part, names in own.items():
            a, b = (dataclasses.asdict(getattr(x, part)) for x in (full, small))
            assert {k for k in a if a[k] != b[k]} <= names, name
        warmup = full.optimizer.warmup_steps / scale
        assert abs(small.optimizer.warmup_steps - warmup) <= 0.5
        if full.masks.interval is None:
            assert small.masks.interval is None
        else:
            assert abs(small.masks.interval - full.masks.interval / scale) <= 0.5
            numbers = [len(build_method(x).updates.steps()) for x in (full, small)]
            assert abs(numbers[0] - numbers[1]) <= 0.03 * numbers[0], name


def test_optimizers():
    for name, rates in (
        ("granet-cifar10-vgg19-90", {31_199: 0.1, 31_200: 1e-2, 46_800: 1e-3}),
        # Five epochs of warm-up; drops at epochs 30, 60 and 90.
        ("set-imagenet-resnet50-80", {0: 0.1 / 50_046, 50_045: 0.1, 300_269: 0.1}),
        ("set-imagenet-resnet50-80", {300_270: 1e-2, 600_540: 1e-3, 900_810: 1e-4}),
        # Epochs 90 and 135.
        ("tost-snip-cifar10-resnet18-95", {35_099: 0.1, 35_100: 1e-2, 52_650: 1e-3}),
        # The same shares of 4,680 steps.
        ("set-imagenet-resnet50-80-mini", {234: 0.01, 1_403: 0.01, 1_404: 1e-3}),
    ):
        config = ALL[name].config
        rate = optimizer.learning_rate(config.optimizer, config.steps)
        actual = [float(np.asarray(rate(jnp.int32(step)))) for step in rates]
        np.testing.assert_allclose(actual, list(rates.values()), rtol=1e-5)
    for name, nesterov, decay, smoothing in (
        ("granet-cifar100-resnet50-90", True, 5e-4, 0.0),
        ("tost-grasp-cifar100-resnet18-98", False, 2e-4, 0.0),
        ("rigl-imagenet-resnet50-90", False, 1e-4, 0.1),
    ):
        config = ALL[name].config.optimizer
        assert (config.momentum, config.nesterov) == (0.9, nesterov)
        assert (config.weight_decay, config.label_smoothing) == (decay, smoothing)


def test_schedules_of_pruning_and_exchange():
    # Until epoch 80, which is step 31,200; epoch 30 of ImageNet is 300,270. The
    # sparsity is reached at the last update before, and not at the one before that.
    # Nothing grows in the last interval of 62,400 steps.
    for name, updates, first, before, last in (
        ("granet-cifar10-resnet50-95", 61, 0.0, 30_000, 31_000),
        ("granet-st-cifar100-vgg19-98", 61, 0.5, 30_000, 31_000),
        ("gmp-cifar10-vgg19-90", 31, 0.0, 30_000, 31_000),
        ("granet-imagenet-resnet50-80", 249, 0.0, 296_000, 300_000),
        ("gmp-imagenet-resnet50-95", 75, 0.0, 296_000, 300_000),
    ):
        config = ALL[name].config
        method: Any = build_method(config)
        assert len(method.updates.steps()) == updates
        assert method.sparsity(0) == first
        assert method.sparsity(before) < method.sparsity(last) == config.sparsity
    for name, updates, fractions in (
        ("rigl-cifar10-vgg19-90", 61, {0: 0.5, 31_200: 0.25, 62_400: 0.0}),
        ("set-cifar10-vgg19-90", 46, {0: 0.3, 46_000: 0.3}),
        ("granet-cifar10-vgg19-90", 61, {0: 0.5, 31_200: 0.2525, 62_400: 0.0}),
        ("static-cifar10-vgg19-90", 0, {}),
    ):
        method = build_method(ALL[name].config)
        assert len(method.updates.steps()) == updates
        actual = dry_run._exchange_fractions(method, list(fractions))
        np.testing.assert_allclose(actual, list(fractions.values()), atol=1e-12)


def test_the_list(capsys):
    status, out, _ = run(capsys, "--list-recipes")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 100
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.split()}
    assert rows["granet-cifar10-vgg19-95"][1:] == (
        ["vgg-19", "cifar10", "granet", "62,400", "93.72", "*"]
    )
    assert rows["snip-cifar10-vgg16-90"][-1] == "ours"
    assert rows["static-cifar10-vgg19-90"][-1] == "-"
    assert set(FULL) < set(rows)
    assert "* Published best test accuracy, recalled, unverified" in out
    for text, part, number in (
        ("cifar10-vgg19-95", "-cifar10-vgg19-95 ", 6),
        ("mini", "-mini ", len(FULL)),
    ):
        _, out, _ = run(capsys, "--list-recipes", text)
        assert out.count(part) == number


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "granet-cifar10-resnet-95"], "granet-cifar10-resnet50-95"),
        (["--recipe", "zzzz"], "there is no recipe 'zzzz'. --list-recipes"),
        (["--recipe"], "expected one argument"),
        (["--recipe", "dense-cifar10-vgg19", "--masks.stop", "1"], "masks.stop"),
        (["--list-recipes", "cifar1000"], "'cifar1000'"),
        (["--dry-run", "--data.batch-size", "5000"], "1201 training examples"),
        (["--dry-run", "--data.dataset", "python_docs"], "takes images"),
    ],
)
def test_bad_input(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert message in err
    assert out == ""


def test_its_data_sets_are_the_real_ones(tmp_path):
    assert set(dry_run.DATASETS) == set(data.NAMES)
    for name in ("fashion_mnist", "cifar100", "tiny_imagenet"):
        features = tfds_builders.BUILDERS[name](data_dir=tmp_path).info.features
        facts = dry_run.DATASETS[name]
        assert facts.shape == features["image"].shape
        assert facts.classes == features["label"].num_classes
    assert dry_run.DATASETS["digits"].train_size == 1201
    # 90% of 1,115,394 characters, in rows of 128 that each have a successor.
    assert dry_run.DATASETS["tiny_shakespeare"].train_size == (1_003_854 - 1) // 128


def test_counts_of_lenet():
    result = dry_run.analyse(LENET)
    leaves = {leaf.name: leaf for leaf in result.leaves}
    assert leaves["hidden_0/kernel"].shape == (784, 300)
    assert sum(leaf.size for leaf in result.leaves) == LENET_WEIGHTS + 410
    for name, leaf in leaves.items():
        assert leaf.maskable == name.endswith("kernel")
        assert leaf.macs == (leaf.size if leaf.maskable else 0)
        assert leaf.start == leaf.size
    assert (result.maskable, result.active) == (LENET_WEIGHTS, 26_620)
    assert result.updates == list(range(100, 1000, 100))
    assert result.prunings == [100, 200, 300, 400, 500]
    assert result.steps_per_epoch == 600
    # The memory is that of a state without its step and its seed.
    config = dataclasses.replace(LENET, data=DataConfig("digits"))
    create = TrainStep(config, data.load("digits")).create
    state = jax.tree.leaves(jax.eval_shape(create, jnp.uint32(0)))
    held = sum(x.size * x.dtype.itemsize for x in state) - 8
    assert sum(dry_run.analyse(config).memory.values()) == held


# A forward pass of LeNet-300-100 costs as many multiply-accumulates as it has weights,
# whatever the split over layers.
def test_costs_by_hand():
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
    # The last update that grows is at step 900.
    growing = [(300 * f + 2 * f + 1) / 101 / 3 for f in sparse[:9]]
    assert cost("granet") == pytest.approx((sum(growing) + sparse[9]) / 10)


def test_it_needs_no_data_and_takes_other_options(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = ("--recipe", "granet-cifar10-vgg19-95", "--dry-run")
    status, out, _ = run(capsys, *recipe, "--data.data-dir", str(tmp_path / "nothing"))
    assert status == 0
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
        "61, every 1,000 steps, from step 1,000 to 61,000",
        "31, the last one at 31,000",
        "20,035,018 parameters; 20,024,000 have masks, and 1,001,200 of these are",
        "Estimates, since data and training decide",
    ):
        assert part in words
    tost = ALL["tost-snip-cifar10-vgg16-95"]
    out = dry_run.text(dry_run.analyse(tost.config), tost.name, tost)
    words = " ".join(out.split())
    assert "Its settings are ours: those of the paper were not available." in words
    assert "ToST swish neurons, identity skips for 17,745 steps, LRsI, labels" in words
    assert "masks from snip" in words
    # The source splits the active weights over the layers.
    assert all(line.endswith("?") for line in out.splitlines() if " yes " in line)
    options = ("--masks.interval", "500", "--model", "lenet-5", "--out", "run")
    status, out, _ = run(capsys, *recipe, *options)
    assert status == 0
    assert "123, every 500 steps" in out
    assert "The recipe except for masks.interval, model: no published" in out
    assert "93.72" not in out
    # The folder itself stays free for the run.
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "run-dry-run.png").exists()
    out_file = tmp_path / "some" / "plot.png"
    constant = ("--recipe", "static-cifar10-vgg19-98-mini", "--dry-run")
    status, out, _ = run(capsys, *constant, "--out", str(out_file))
    assert status == 0
    assert out_file.read_bytes().startswith(b"\x89PNG")
    assert "Estimates" not in out
    assert "No published accuracy is known" in out
    assert "mask updates   none" in out


def test_options_of_the_command_line_change_a_recipe(monkeypatch):
    configs: list[Config] = []
    monkeypatch.setattr(train, "run", configs.append)
    recipe = ("--recipe", "granet-imagenet-resnet50-90-mini", "--steps", "4000")
    assert train.main([*recipe, "--masks.interval", "4"]) == 0
    expected = ALL["granet-imagenet-resnet50-90-mini"].config
    masks = dataclasses.replace(expected.masks, interval=4)
    assert configs == [dataclasses.replace(expected, steps=4000, masks=masks)]
