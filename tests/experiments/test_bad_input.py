"""Bad configurations, folders and data: a clear error, and nothing is lost.

Each error is one line that names the option, its value and the remedy. The command
ends with an exit status other than 0 and without a traceback.
"""

import dataclasses
import math
import pathlib
from typing import Any

import jax
import pytest
from etils import epath

from experiments import cyclical_linear, data, lottery, plasticity, train
from experiments.config import plasticity as study
from experiments.config.run import Config
from experiments.training import devices, initial_masks, run_folders
from experiments.training.exit_status import exit_status
from experiments.training.step import TrainStep
from tests.helpers import runs

SMALL = dataclasses.replace(runs.CONFIG, method="static", steps=12, eval_every=4)
DENSE = dataclasses.replace(SMALL, method="dense")
TICKETS = lottery.LotteryConfig(
    (0.3, 0.5), pathlib.Path("tickets"), train=dataclasses.replace(SMALL, sparsity=0.0)
)

SNIP = {"method": "static", "masks.source": "snip"}
GHOSTS = {"tost.neurons": "swish"}
# (options, part of the message), by the record that has the options.
CONFIG = [
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
    ({"fsdp": 0}, "fsdp must be at least 1"),
    ({"parallel": "pmap", "fsdp": 2}, "fsdp must be 1 with pmap, got 2"),
    ({"model": "lenet5"}, "model must be one .* got 'lenet5'. Did .* 'lenet-5'?"),
    ({"out": epath.Path("s3://bucket/run")}, "out must be a folder on disk or gs://"),
    ({"out": pathlib.Path("gs://bucket/run")}, "got gs:/bucket/run"),
    ({"init_from": epath.Path("gs://bucket")}, "must name a folder in the bucket"),
    ({"data.batch_size": 0}, "data.batch_size must be at least 1"),
    ({"data.shift": -1}, "data.shift must be at least 0"),
    ({"data.dataset": "cifar"}, "got 'cifar'. Did you mean 'cifar10'"),
    ({"checkpoint.keep": 0}, "checkpoint.keep must be at least"),
    ({"optimizer.learning_rate": 0}, "optimizer.learning_rate"),
    ({"optimizer.momentum": 1}, "optimizer.momentum must lie"),
    ({"optimizer.weight_decay": -1}, "optimizer.weight_decay"),
    ({"optimizer.drops": (0.5, 1.0)}, "optimizer.drops must lie"),
    ({"optimizer.warmup_steps": 1200}, r"must lie in \[0, steps\)"),
    ({"optimizer.accumulate": 3}, "must divide data.batch_size, 64"),
    ({"optimizer.ema": 1.0}, r"optimizer.ema must lie in \(0, 1\)"),
    ({"optimizer.label_smoothing": 1}, "label_smoothing must lie"),
    ({"masks.interval": 0}, "masks.interval must be at least 1"),
    ({"masks.interval": 601}, "in the first 600 of 1200 steps"),
    ({"masks.pruning_end": 0}, "masks.pruning_end must lie"),
    ({"masks.fraction": 2}, r"fraction must be in \[0, 1\], got 2"),
    ({"masks.initial_sparsity": 0.95}, "initial_sparsity must be at"),
    ({"masks.cycles": 0}, "masks.cycles must be at least 1"),
    ({"masks.warmup": -1}, "masks.warmup must be at least 0, got -1"),
    ({"method": "gmp", "masks.warmup": 9}, "warmup is not .* 'gmp', only of granet"),
    ({"masks.stop": 0.5}, "stop is not an option of method 'granet'"),
    ({"method": "static", "masks.fraction": 0.3}, "fraction is not .*, only of granet"),
    ({"method": "acdc", "masks.recovery": "hard"}, "recovery is not .* of cyclical"),
    ({"method": "dense", "masks.source": "snip"}, "not an option of method 'dense'"),
    ({"method": "acdc", "steps": 7}, r"at least 2 \* masks.cycles, 8, got 7"),
    ({"method": "cyclical", "steps": 1201}, "multiple of the 4 .* got 1201: 1 fewer"),
    ({"method": "greg2", "masks.interval": 250}, "for three increases .*, got 250"),
    ({"method": "top-kast", "tost.lrsi": True}, "top-kast starts from dense ones"),
    ({"masks.source": "snip"}, "granet starts dense: give masks.initial_sparsity"),
    (SNIP | {"masks.rounds": 3}, "iterative-snip, force, synflow, and .* is snip"),
    (SNIP | {"masks.images": 3, "masks.source": None}, "snip, .*, and .* is None"),
    (SNIP | {"masks.source": "synflow", "masks.rounds": 0}, "at least 1, got 0"),
    (SNIP | {"masks.source": "tickets"}, "masks.tickets is missing"),
    (SNIP | {"masks.tickets": "x"}, "masks.tickets is an option of"),
    ({"method": "top-kast", "init_from": "x"}, "init_from is not for top-kast"),
    (
        SNIP | {"masks.source": "tickets", "masks.tickets": "x", "init_from": "y"},
        "init_from and masks.tickets both give the weights",
    ),
    (
        {"model": "vit-s-16", "tost.neurons": "swish"},
        "for model vit-s-16, only for len",
    ),
    (
        {"model": "lenet-5", "tost.skips": "conv"},
        "for model lenet-5, only for cnn, cnn-bn",
    ),
    ({"tost.labels": 0.1, "optimizer.label_smoothing": 0.1}, "both smooth"),
    ({"tost.labels": 1.5}, "alpha must .* 1.5"),
    (GHOSTS | {"tost.ghost_fraction": 1e-4}, "at least one step, got 0.0001 of .*1200"),
    ({"tost.lrsi": True, "tost.ghost_fraction": 0.5}, "without neurons or skips"),
    (GHOSTS | {"tost.ghost_fraction": 0.5, "tost.as_in_code": True}, "with as_in_code"),
    ({"tost.as_in_code": True}, "tost.as_in_code has an effect on neurons, skips a"),
]
LOTTERY = [
    ({"sparsities": ()}, "sparsities must not be empty"),
    ({"sparsities": (0.9, 0.5)}, "and rise, got 0.9, 0.5"),
    ({"sparsities": (0.0, 0.5)}, r"must lie in \(0, 1\)"),
    ({"sparsities": (0.5, 1.0)}, r"must lie in \(0, 1\)"),
    ({"rewind_steps": 12}, "rewind_steps must lie in .*, got 12 of 12"),
    ({"train.method": "acdc"}, "train.method is not for lottery tickets"),
    ({"train.sparsity": 0.5}, "train.sparsity is not for lottery tickets"),
    ({"train.tost.labels": 0.1}, "train.tost is not for lottery tickets"),
    ({"train.init_from": "x"}, "train.init_from is not for lottery tickets"),
]
STUDY = [
    ({"points": 0}, "points must be at least 1, got 0"),
    ({"points": 1201}, "points must be at most train.steps, 1200, got 1201"),
    ({"lanes": 0}, "lanes must be at least 1, got 0"),
    ({"epochs": 0.0}, r"epochs must lie in \(0, inf\), got 0.0"),
    ({"rates": (0.5, 1.0)}, r"rates must lie in \(0, 1\), got 1.0"),
    ({"rates": ()}, r"rates must have distinct values, got \(\)"),
    ({"regrow": (0.5, 0.5)}, "regrow must have distinct values"),
    ({"regrow": (1.5,)}, r"regrow must lie in \[0, 1\], got 1.5"),
    ({"train.method": "granet"}, "train.method must be dense, got granet"),
    ({"train.out": pathlib.Path("x")}, "train.out is not for a study"),
    ({"train.init_from": pathlib.Path("x")}, "train.init_from is not for a study"),
    ({"train.eval_every": 3}, "train.eval_every is not for a study"),
    ({"train.parallel": "pmap"}, "train.parallel must be jit, got pmap"),
]
LINEAR = [
    ({"steps": 4001}, "steps must be a multiple of 8"),
    ({"steps": 8}, "at least 64"),
    ({"nonzeros": ()}, "nonzeros must hold"),
    ({"nonzeros": (200,)}, "nonzeros must be between"),
    ({"correlations": (1.0,)}, "correlations must be in"),
    ({"seeds": 0}, "seeds and equations must be at least 1"),
]
TABLES: list[tuple[Any, list[tuple[dict[str, Any], str]]]] = [
    (Config(), CONFIG),
    (TICKETS, LOTTERY),
    (study.Study(), STUDY),
    (cyclical_linear.Config(), LINEAR),
]


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        pytest.param(record, options, message, id=",".join(map(str, options)))
        for record, table in TABLES
        for options, message in table
    ],
)
def test_bad_options_are_refused(record, options, message):
    with pytest.raises(ValueError, match=message):
        runs.replace_options(record, options)


def test_options_that_do_not_fit_the_devices_are_refused():
    for options, number, message in (
        ({"data.batch_size": 60}, 8, "multiple of the 8 devices, got 60"),
        ({"optimizer.accumulate": 16}, 8, "accumulate .* of the 8 devices, got 4"),
        ({"fsdp": 3}, 8, "fsdp must divide the number of devices, 8, got 3"),
        ({"vmap_seeds": True, "seeds": 2}, 2, "trains on one device, got 2"),
    ):
        config = runs.replace_options(Config(), options)
        with pytest.raises(ValueError, match=message):
            devices.compile_step(config, data.load("digits"), jax.devices()[:number])


def test_more_images_for_the_masks_than_there_are_is_an_error():
    options = {"masks.source": "snip", "masks.images": 10**6}
    step = TrainStep(runs.replace_options(SMALL, options), data.load("digits"))
    with pytest.raises(ValueError, match=r"masks.images must be at most the 1201 .*"):
        initial_masks.examples(step, 0)


@pytest.mark.parametrize(
    ("main", "options", "message"),
    [
        (train.main, "--sparsity 1.5", "must lie in [0, 1), got 1.5"),
        (train.main, "--sparsity much", "much"),
        (train.main, "--data.batch-size 2000", "1201 training examples of digits"),
        (train.main, "--lottery", "--lottery"),
        (train.main, "--method grannet", "invalid choice 'grannet'"),
        (plasticity.main, "--epochs 0.2", "at most 2, half of the 4 steps"),
        (lottery.main, "0.9 0.5", "and rise, got 0.9, 0.5"),
    ],
)
def test_the_command_line_says_what_is_wrong(main, options, message, tmp_path, capfd):
    out = tmp_path / "out"
    try:
        status = main([*options.split(), "--out", str(out)])
    except SystemExit as error:
        status = error.code
    assert status == 2
    printed, error = capfd.readouterr()
    assert printed == ""
    # Words may be broken over the lines of a box.
    error = "".join(error.replace("│", " ").split())
    assert "".join(message.split()) in error
    assert "Traceback" not in error
    assert not out.exists()


def refusal(capfd: Any, out: pathlib.Path, **options: Any) -> str:
    """The error of a training command that leaves `out` as it was."""
    before = runs.contents(out) if out.is_dir() else None
    config = runs.replace_options(SMALL, options | {"out": out})
    with pytest.MonkeyPatch.context() as patch:
        runs.share_setups(patch)
        error = runs.failure(capfd, lambda: exit_status(lambda: train.run(config)))
    assert (runs.contents(out) if out.is_dir() else None) == before
    return error


def test_results_of_another_configuration_are_left_alone(tmp_path, capfd):
    run_folders.open_folder(dataclasses.replace(SMALL, out=tmp_path))
    for options, message in (
        ({"model": "cnn"}, "model=lenet-300-100, and this one has model=cnn"),
        ({"method": "dense"}, "method=static, and this one has method=dense"),
        ({"sparsity": 0.8}, "sparsity=0.9, and this one has sparsity=0.8"),
        ({"optimizer.momentum": 0.8}, "with optimizer.momentum=0.9"),
    ):
        config = runs.replace_options(SMALL, options | {"out": tmp_path})
        with pytest.raises(ValueError, match=message):
            run_folders.open_folder(config)
    error = refusal(capfd, tmp_path, steps=13, seed=1)
    for part in (
        "seed=1 (and 1 more). Give the same options to go on with it, or another",
        f"To train on from its result: another folder, --init-from {tmp_path}",
    ):
        assert part in error


def test_other_files_are_left_alone(tmp_path, capfd):
    run_folders.open_folder(dataclasses.replace(SMALL, out=tmp_path / "run"))
    for file, out, message in (
        ("1/thesis.tex", "1", "choose another folder"),
        ("2/config.json", "2", "config.json cannot be read"),
        ("3", "3", f"{tmp_path}/3 already exists"),
        ("4", "4/out", "4/out"),
        ("run/static-seed0", "run", "run/static-seed0"),
    ):
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_text("words")
        assert message in refusal(capfd, tmp_path / out)
        assert path.read_text() == "words"
    assert "/proc/granet" in refusal(capfd, pathlib.Path("/proc/granet"))


def test_a_command_that_was_killed_while_it_made_the_folder_may_run_again(tmp_path):
    (tmp_path / "config.json.partial").write_text('{"method": "gra')
    assert run_folders.open_folder(dataclasses.replace(SMALL, out=tmp_path)) == tmp_path
    assert list(runs.contents(tmp_path)) == ["config.json"]


def test_no_folder_is_made_if_data_are_missing(tmp_path, capfd):
    missing = {"data.dataset": "cifar10", "data.data_dir": str(tmp_path / "data")}
    error = refusal(capfd, tmp_path / "out", **missing)
    assert "python -m experiments.prepare cifar10" in error
    assert list(tmp_path.iterdir()) == []
