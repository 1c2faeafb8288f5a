"""Input that is of no use, and what goes wrong on the way: a clear error, nothing lost.

Each is one line on standard error that names the cause and the remedy, an exit status
other than 0, and no traceback; what was there before is there after.
"""

import dataclasses
import functools
import gc
import json
import pathlib
import shutil
import signal
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from experiments import train
from experiments.config.run import CheckpointConfig, Config, DataConfig, OptimizerConfig
from experiments.training import loop
from tests.helpers import runs

CONFIG = Config(
    model="lenet-300-100",
    method="static",
    steps=12,
    seeds=1,
    eval_every=4,
    checkpoint=CheckpointConfig(every=5),
)
ARGUMENTS = [
    *("--model", "lenet-300-100", "--method", "static", "--steps", "12"),
    *("--seeds", "1", "--eval-every", "4", "--checkpoint.every", "5"),
    *("--no-baseline", "--no-progress"),
]
RUN = "static-seed0"


@functools.cache
def maker() -> loop.TrainSetup:
    return runs.make(CONFIG)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    """Results of a run, to be left as they are."""
    out = tmp_path_factory.mktemp("finished") / "out"
    train.open_folder(dataclasses.replace(CONFIG, out=out))
    loop.fit(maker(), [0], out / RUN)
    assert runs.steps_saved(out / RUN) == [10, 12]
    return out


@pytest.fixture
def begun(tmp_path) -> pathlib.Path:
    """Results of a run that was stopped after step 5, with a checkpoint."""
    out = tmp_path / "out"
    train.open_folder(dataclasses.replace(CONFIG, out=out))
    with pytest.raises(loop.StoppedError):
        loop.fit(
            maker(),
            [0],
            out / RUN,
            stopped=lambda step: signal.SIGTERM if step == 5 else None,
        )
    assert runs.steps_saved(out / RUN) == [5]
    return out


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """All files, by their paths."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def one_line(text: str) -> str:
    """The text, which is to be one line that says "error"."""
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert "Traceback" not in text
    return text


def refused(capfd, *arguments: str) -> str:
    """What the command line says when it refuses them."""
    capfd.readouterr()
    assert train.main([*ARGUMENTS, *arguments]) == 2
    printed, errors = capfd.readouterr()
    assert printed == ""
    return one_line(errors)


def status_of(capfd, command: Callable[[], object]) -> tuple[int, str]:
    """Exit status and error of a command, which runs in this process."""
    capfd.readouterr()
    status = train.exit_status(command)
    # What orbax has left unfinished is complained of here, or nowhere.
    gc.collect()
    return status, capfd.readouterr().err


def assert_goes_on(out: pathlib.Path, finished: pathlib.Path) -> None:
    """Asserts that training there now ends as if nothing had happened."""
    loop.fit(maker(), [0], out / RUN)
    final = [runs.restored(maker(), folder / RUN, 12) for folder in (out, finished)]
    assert runs.same(*final)
    assert runs.lines(out / RUN) == runs.lines(finished / RUN)
    assert not list((out / RUN / "checkpoints").glob("*tmp*"))


# --- names


@pytest.mark.parametrize(
    ("name", "value", "messages"),
    [
        ("model", "vgg19", ["model must be one of", "Did you mean 'vgg-19'?"]),
        ("model", "lenet300", ["got 'lenet300'", "Did you mean 'lenet-300-100'?"]),
        ("data.dataset", "cifar-10", ["digits, fashion_mnist", "mean 'cifar10'?"]),
        ("data.dataset", "?", ["data.dataset must be one of digits, ", "got '?'."]),
        ("method", "grannet", ["invalid choice 'grannet'", "granet-st"]),
    ],
)
def test_an_unknown_name_comes_with_those_there_are(
    name, value, messages, tmp_path, capfd
):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as caught:
        train.main([*ARGUMENTS, f"--{name}", value, "--out", str(out)])
    assert caught.value.code == 2
    # tyro's box breaks lines, in names too.
    error = "".join(capfd.readouterr().err.replace("│", " ").split())
    for message in messages:
        assert "".join(message.split()) in error
    assert "Traceback" not in error
    assert not out.exists()


# --- the folder for the results


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "cnn"), "model=lenet-300-100, and this one has model=cnn"),
        (("--method", "dense"), "method=static, and this one has method=dense"),
        (("--sparsity", "0.8"), "sparsity=0.9, and this one has sparsity=0.8"),
        (("--optimizer.momentum", "0.8"), "with optimizer.momentum=0.9"),
        (("--steps", "13", "--seed", "1"), "seed=1 (and 1 more)"),
    ],
)
def test_results_of_another_configuration_are_left_alone(
    options, message, finished, capfd
):
    before = contents(finished)
    error = refused(capfd, *options, "--out", str(finished))
    assert message in error
    assert "Give the same options to go on with it, or another folder." in error
    assert contents(finished) == before


def test_a_folder_with_other_files_is_left_alone(tmp_path, capfd):
    (tmp_path / "thesis.tex").write_text("words")
    error = refused(capfd, "--out", str(tmp_path))
    assert "choose another folder" in error
    assert contents(tmp_path) == {"thesis.tex": b"words"}


def test_a_config_that_is_no_json_is_left_alone(tmp_path, capfd):
    (tmp_path / "config.json").write_text("{")
    error = refused(capfd, "--out", str(tmp_path))
    assert "config.json cannot be read" in error
    assert contents(tmp_path) == {"config.json": b"{"}


def test_a_run_that_was_killed_before_it_began_is_no_hindrance(tmp_path):
    (tmp_path / "config.json.partial").write_text('{"method": "gra')
    config = dataclasses.replace(CONFIG, out=tmp_path)
    assert train.open_folder(config) == tmp_path
    assert list(contents(tmp_path)) == ["config.json"]


@pytest.mark.parametrize("out", ["a_file/out", "a_file", "/proc/granet"])
def test_a_folder_that_cannot_be_made(out, tmp_path, capfd):
    (tmp_path / "a_file").write_text("words")
    error = refused(capfd, "--out", str(tmp_path / out))
    assert str(tmp_path / out) in error
    assert (tmp_path / "a_file").read_text() == "words"


def test_a_run_without_a_place_in_the_folder(tmp_path, capfd):
    train.open_folder(dataclasses.replace(CONFIG, out=tmp_path))
    (tmp_path / RUN).write_text("words")
    assert str(tmp_path / RUN) in refused(capfd, "--out", str(tmp_path))
    assert (tmp_path / RUN).read_text() == "words"


# --- data


def test_data_that_is_not_there(tmp_path, capfd):
    options = ("--data.dataset", "cifar10", "--data.data-dir", str(tmp_path / "data"))
    error = refused(capfd, *options, "--out", str(tmp_path / "out"))
    assert "python -m experiments.prepare cifar10" in error
    assert not (tmp_path / "out").exists()


def test_data_that_cannot_be_read(tmp_path, capfd):
    data = tmp_path / "data"
    dataclasses.replace(CONFIG, data=DataConfig(data_dir=str(data)))
    runs.data.load("digits", data)
    capfd.readouterr()
    (records,) = (data / "digits").rglob("*train*.array_record*")
    records.write_bytes(records.read_bytes()[: records.stat().st_size // 2])
    options = ("--data.data-dir", str(data), "--out", str(tmp_path / "out"))
    error = refused(capfd, *options)
    assert str(records.parent) in error
    assert "cannot be read" in error
    assert not (tmp_path / "out").exists()


# --- checkpoints


@pytest.mark.parametrize(
    "changes",
    [{"model": "cnn"}, {"method": "dense"}, {"method": "set"}, {"method": "snfs"}],
)
def test_a_checkpoint_of_another_network_or_method_is_not_read(
    changes, begun, finished, capfd
):
    """Were it put where the configuration does not tell."""
    other = runs.make(dataclasses.replace(CONFIG, **changes))
    before = contents(begun)
    status, error = status_of(capfd, lambda: loop.fit(other, [0], begun / RUN))
    assert status == 2
    assert "the checkpoint of step 5" in one_line(error)
    assert contents(begun) == before


@pytest.mark.parametrize("how", ["cut", "empty", "gone"])
def test_a_damaged_checkpoint_is_an_error_or_of_no_consequence(
    how, finished, tmp_path, capfd
):
    expected = runs.restored(maker(), finished / RUN, 12)
    run = tmp_path / "run"
    shutil.copytree(finished / RUN, run)
    folder = run / "checkpoints" / "12"
    errors = []
    for name, content in contents(folder).items():
        if how == "gone":
            (folder / name).unlink()
        else:
            size = 0 if how == "empty" else len(content) // 2
            (folder / name).write_bytes(content[:size])
        states = []
        status, error = status_of(
            capfd, lambda s=states: s.append(runs.restored(maker(), run, 12))
        )
        if status == 0:
            assert error == ""
            assert runs.same(states[0], expected), name
        else:
            errors.append(name)
            remedy = f"remove {folder} to go on from the one before"
            assert f"{remedy}. (" in one_line(error)
        (folder / name).write_bytes(content)
    # All that is restored, and what vouches for it: the others are of no consequence.
    assert "manifest/sha256.json" in errors
    vouched = json.loads((folder / "manifest" / "sha256.json").read_text())
    assert set(vouched) <= set(errors)
    for item in ("progress/metadata", "state/manifest.ocdbt", "state/_METADATA"):
        assert item in vouched


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(
    finished, tmp_path, capfd
):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    last = out / RUN / "checkpoints" / "12"
    for path in last.glob("state/ocdbt.process_0/d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = contents(out)
    status, error = status_of(capfd, lambda: loop.fit(maker(), [0], out / RUN))
    assert status == 2
    assert f"remove {last} to go on from the one before." in one_line(error)
    assert contents(out) == before
    shutil.rmtree(last)
    assert_goes_on(out, finished)


@pytest.mark.parametrize("change", ["gone", "shorter"])
def test_metrics_that_do_not_go_with_the_checkpoint(change, finished, tmp_path, capfd):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    path = out / RUN / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    if change == "gone":
        path.unlink()
    else:
        path.write_text("".join(lines[:-2] + lines[-1:]))
    before = contents(out)
    status, error = status_of(capfd, lambda: loop.fit(maker(), [0], out / RUN))
    assert status == 2
    assert f"{path} lacks records up to step 12" in one_line(error)
    remedy = f"put the file back, or remove {out / RUN} to train again from the start"
    assert remedy in one_line(error)
    assert contents(out) == before
    path.write_text("".join(lines))
    assert_goes_on(out, finished)


def test_an_old_checkpoint_that_was_half_deleted_is_no_hindrance(
    finished, tmp_path, capfd
):
    """As by a kill while orbax deletes it."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    shutil.rmtree(out / RUN / "checkpoints" / "12")
    half = out / RUN / "checkpoints" / "5"
    shutil.copytree(out / RUN / "checkpoints" / "10", half)
    shutil.rmtree(half / "state")
    (half / "_CHECKPOINT_METADATA").unlink()
    assert_goes_on(out, finished)
    assert runs.steps_saved(out / RUN) == [10, 12]
    assert capfd.readouterr().err == ""


# --- a full disk, as a limit on the size of files


def test_no_room_for_a_checkpoint(begun, finished):
    before = runs.restored(maker(), begun / RUN, 5)
    # The largest file of a checkpoint has about 60 kB.
    process = runs.start([*ARGUMENTS, "--out", str(begun)], largest=20_000)
    status, error = runs.end(process)
    assert status == 2
    for part in ("could not be written", "Make room", "the same command again"):
        assert part in one_line(error)
    assert runs.steps_saved(begun / RUN) == [5]
    assert runs.same(runs.restored(maker(), begun / RUN, 5), before)
    assert_goes_on(begun, finished)


def test_no_room_for_metrics(begun, finished):
    metrics = begun / RUN / "metrics.jsonl"
    before = metrics.read_bytes()
    process = runs.start([*ARGUMENTS, "--out", str(begun)], largest=len(before) + 100)
    status, error = runs.end(process)
    assert status == 2
    assert f"{metrics} could not be written (File too large)" in one_line(error)
    # The disk is full in the middle of a line.
    assert metrics.read_bytes().startswith(before)
    assert metrics.stat().st_size == len(before) + 100
    assert runs.steps_saved(begun / RUN) == [5]
    assert_goes_on(begun, finished)


# --- training


def test_training_that_diverges_keeps_the_last_good_checkpoint(tmp_path, capfd):
    diverging = runs.make(
        dataclasses.replace(
            CONFIG,
            optimizer=OptimizerConfig(learning_rate=1e6),
            checkpoint=CheckpointConfig(every=1),
        )
    )
    messages = []
    for _ in range(2):  # and the same again, when it goes on
        status, error = status_of(
            capfd, lambda: loop.fit(diverging, [0], tmp_path / RUN)
        )
        assert status == 1
        messages.append(one_line(error))
        assert "lower optimizer.learning_rate" in error
    assert messages[0] == messages[1]
    last = runs.steps_saved(tmp_path / RUN)[-1]
    assert f"The last good checkpoint is kept (it is of step {last})." in messages[0]
    state: Any = runs.restored(diverging, tmp_path / RUN, last)
    assert int(state.step) == last
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
