"""What may befall a checkpoint: a kill, damage, another program; never silently wrong.

A process that is killed leaves the files as they are at that moment. So the folder is
copied before every step that Python takes in it (making, renaming, removing, opening a
file to write), and what goes on from each copy must end as the run did. Real kills are
in `test_resume.py`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import pickle
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from experiments import models
from experiments.config.run import CheckpointConfig, Config, MaskConfig, OptimizerConfig
from experiments.training import checkpoints, loop, manifest
from experiments.training.checkpoints import CheckpointError, Checkpoints
from tests.experiments.test_bad_input import one_line, status_of
from tests.helpers import runs
from tests.helpers.profile import NIGHTLY

# Saved at 2, 4 and 6; the last save removes the first checkpoint.
LAST = 6
CONFIG = Config(
    model="lenet-300-100",
    method="granet",
    sparsity=0.8,
    steps=LAST,
    seeds=1,
    eval_every=4,
    masks=MaskConfig(interval=2),
    checkpoint=CheckpointConfig(every=2, keep=2),
)
FIXTURE = pathlib.Path(__file__).parent / "checkpoint_format_1"


class Wider(runs.Small):
    """The same leaves, some of other shapes."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dense(50, use_bias=False, name="hidden")(x.reshape(x.shape[0], -1))
        x = nn.BatchNorm(not train, momentum=0.9, axis_name=self.axis_name)(x)
        return nn.Dense(self.classes, name="output")(nn.relu(x))


@pytest.fixture(autouse=True)
def _small(monkeypatch) -> None:
    """Networks of any name are small ones."""

    def create(name: str, *, classes: int, dtype: Any, axis_name: str | None) -> Any:
        kind = Wider if name == "cnn" else runs.Small
        return kind(classes, axis_name)

    monkeypatch.setattr(models, "create", create)


@functools.cache
def maker(**changes: Any) -> loop.TrainSetup:
    return runs.make(dataclasses.replace(CONFIG, **changes))


# --- kills

# Events of Python's own audit, before what they tell of is done: the path comes first.
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
_watchers: list[Callable[[str, Any], None]] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _watchers and event in EVENTS:
        for watcher in _watchers:
            watcher(event, args)


sys.addaudithook(_audit)  # For good: there is no way to take one away.


@contextlib.contextmanager
def copying(run: pathlib.Path, target: pathlib.Path) -> Iterator[list[str]]:
    """Copies a run's folder before every change that Python makes in it.

    Yields:
      What was about to be done, of every copy; copies have their numbers as names.
    """
    done: list[str] = []
    lock = threading.RLock()
    busy = threading.local()

    def watch(event: str, args: tuple[Any, ...]) -> None:
        path = args[0]
        if not isinstance(path, str) or not path.startswith(str(run)):
            return
        if event == "open" and not (args[2] or 0) & 3:  # Only to read.
            return
        if getattr(busy, "copying", False):
            return
        with lock:
            busy.copying = True
            try:
                copy(run, target / str(len(done)))
            finally:
                busy.copying = False
            done.append(f"{event} {pathlib.Path(path).relative_to(run)}")

    _watchers.append(watch)
    try:
        yield done
    finally:
        _watchers.remove(watch)


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies what is there; files of other threads may come and go."""
    target.mkdir(parents=True)
    for path in sorted(source.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            to = target / path.relative_to(source)
            if path.is_dir():
                to.mkdir(parents=True, exist_ok=True)
            else:
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, to)


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


SAVE = Checkpoints.save


def save_and_wait(checkpoints: Checkpoints, *args: Any) -> None:
    SAVE(checkpoints, *args)
    checkpoints.wait()


@pytest.fixture(scope="module")
def recorded(
    tmp_path_factory,
) -> tuple[pathlib.Path, list[tuple[str, pathlib.Path]]]:
    """A run's folder, and those that kills would have left, each with its moment."""
    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            models,
            "create",
            lambda name, *, classes, dtype, axis_name: runs.Small(classes, axis_name),
        )
        # So that nothing else goes on meanwhile: a copy is of one moment.
        patch.setattr(Checkpoints, "save", save_and_wait)
        with copying(folder / "run", folder / "killed") as done:
            loop.fit(maker(), [3], folder / "run")
    assert runs.steps_saved(folder / "run") == [4, 6]
    found = [(what, folder / "killed" / str(i)) for i, what in enumerate(done)]
    return folder / "run", found


def test_every_phase_of_a_save_is_among_the_kills(recorded) -> None:
    """Or the next test would say little."""
    moments = [what for what, _ in recorded[1]]
    for phase in (
        "open metrics.jsonl",
        "os.mkdir checkpoints/6.orbax-checkpoint-tmp",
        "open checkpoints/6.orbax-checkpoint-tmp/_CHECKPOINT_METADATA",
        "os.mkdir checkpoints/6.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp",
        "os.rename checkpoints/6.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp",
        "os.rename checkpoints/6.orbax-checkpoint-tmp/progress.orbax-checkpoint-tmp",
        "open checkpoints/6.orbax-checkpoint-tmp/manifest.orbax-checkpoint-tmp/sha256",
        "os.rename checkpoints/6.orbax-checkpoint-tmp/manifest.orbax-checkpoint-tmp",
        "open checkpoints/6.orbax-checkpoint-tmp/commit_success.txt",
        # The end of the name: these are the folder's own.
        "os.rename checkpoints/6.orbax-checkpoint-tmp$",
        "shutil.rmtree checkpoints/2$",
        "os.rmdir checkpoints/2$",
    ):
        assert any(f"{what}$".startswith(phase) for what in moments), (phase, moments)


def test_a_kill_at_any_moment_is_gone_on_from(recorded, tmp_path) -> None:
    run, killed = recorded
    expected = runs.restored(maker(), run, LAST)
    if not NIGHTLY:
        # Once for every kind of moment, the last of it, and of those that left the
        # same files behind one.
        kinds = {re.sub(r"\d+", "#", what): left for what, left in killed}
        different = {str(list(files(left))): (k, left) for k, left in kinds.items()}
        killed = list(different.values())
        assert len(killed) > 12
    for what, left in killed:
        again = tmp_path / left.name
        shutil.copytree(left, again)
        begun: list[int] = []
        loop.fit(maker(), [3], again, stopped=begun.append)
        # From the last whole one: those have their names.
        there = runs.steps_saved(left) if (left / "checkpoints").exists() else []
        assert begun[0] == max(there, default=0), what
        assert runs.same(runs.restored(maker(), again, LAST), expected), what
        assert runs.lines(again) == runs.lines(run), what
        assert not list((again / "checkpoints").glob("*tmp*")), what
        shutil.rmtree(again)


# --- damage


def refusal(run: pathlib.Path, **changes: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        loop.fit(maker(**changes), [3], run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_flipped_bit_in_any_file_is_found(recorded, tmp_path) -> None:
    """Which tensorstore does not always: some would be read as other numbers."""
    run = tmp_path / "run"
    shutil.copytree(recorded[0], run)
    folder = run / "checkpoints" / str(LAST)
    before = files(folder)
    rng = np.random.default_rng(0)
    opened = Checkpoints(run / "checkpoints", keep=2)
    try:
        for name, content in before.items():
            for place in rng.integers(8 * len(content), size=64 if NIGHTLY else 6):
                flipped = bytearray(content)
                flipped[place // 8] ^= 1 << (place % 8)
                (folder / name).write_bytes(flipped)
                try:
                    opened.restore(LAST, maker().compiled_step.abstract())
                except CheckpointError as error:
                    message = str(error)
                    assert f"remove {folder} to go on from the one before." in message
                    assert name in message or name.startswith(manifest.NAME), message
                else:
                    # Times, and the word that it is complete: nothing that is restored.
                    assert name in (
                        "_CHECKPOINT_METADATA",
                        "commit_success.txt",
                        "manifest/commit_success.txt",
                    )
            (folder / name).write_bytes(content)
        opened.restore(LAST, maker().compiled_step.abstract())
    finally:
        opened.close()


def test_files_that_are_missing_or_were_not_there(recorded, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(recorded[0], run)
    folder = run / "checkpoints" / str(LAST)
    (folder / "state" / "more").write_bytes(b"")
    assert "(these files were changed: state/more)" in refusal(run)
    (folder / "state" / "more").unlink()
    (folder / manifest.NAME / manifest.FILE).unlink()
    assert "manifest/sha256.json is missing" in refusal(run)
    (folder / manifest.NAME / manifest.FILE).write_text('["sha256"]')
    assert "sha256.json cannot be read" in refusal(run)
    shutil.rmtree(folder)
    loop.fit(maker(), [3], run)
    assert runs.same(*(runs.restored(maker(), r, LAST) for r in (run, recorded[0])))


def test_a_pickle_in_place_of_a_file_is_not_run(recorded, tmp_path, capfd) -> None:
    """Not even where no manifest tells, as in a checkpoint of the first format."""
    ran = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> Any:
            return (pathlib.Path.write_text, (ran, "by a pickle"))

    run = tmp_path / "run"
    shutil.copytree(recorded[0], run)
    folder = run / "checkpoints" / str(LAST)
    make_first_format(folder)
    payload = pickle.dumps(Payload())
    for name, content in files(folder).items():
        (folder / name).write_bytes(payload)
        status_of(capfd, lambda: runs.restored(maker(), run, LAST))
        (folder / name).write_bytes(content)
    assert not ran.exists()
    pickle.loads(payload)
    assert ran.exists()


def make_first_format(folder: pathlib.Path) -> None:
    shutil.rmtree(folder / manifest.NAME)
    stated(folder, None)


def stated(folder: pathlib.Path, version: Any) -> None:
    """Changes the version that a checkpoint states."""
    path = folder / "progress" / "metadata"
    values = json.loads(path.read_text())
    del values["format_version"]
    if version is not None:
        values["format_version"] = version
    path.write_text(json.dumps(values))
    index = folder / manifest.NAME / manifest.FILE
    if index.exists():
        digests = json.loads(index.read_text())
        digests["progress/metadata"] = hashlib.sha256(path.read_bytes()).hexdigest()
        index.write_text(json.dumps(digests))


# --- other versions, and other runs


@pytest.mark.parametrize("version", [checkpoints.FORMAT + 1, "2", 0])
def test_a_version_that_is_not_known_is_refused(version, recorded, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(recorded[0], run)
    stated(run / "checkpoints" / str(LAST), version)
    before = files(run)
    message = refusal(run)
    assert f"it has version {version!r} of the format" in message
    assert "reads up to 3: go on with the one that wrote it, or give" in message
    # Which "remove it" would be bad advice for.
    assert "remove" not in message
    assert files(run) == before


def digests(state: Any) -> dict[str, str]:
    """SHA-256 of every array, by its name."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): hashlib.sha256(
            np.asarray(x).tobytes()
        ).hexdigest()
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    }


def test_a_checkpoint_of_the_first_version_is_read_and_gone_on_from(tmp_path) -> None:
    """One that the library wrote before checkpoints stated a version."""
    run = tmp_path / "run"
    shutil.copytree(FIXTURE / "run", run)
    folder = run / "checkpoints" / "4"
    assert not (folder / manifest.NAME).exists()
    assert "format_version" not in json.loads(
        (folder / "progress/metadata").read_text()
    )
    found = runs.restored(maker(), run, 4)
    # Two trees of masks have become one of codes: what is active continues.
    sparse = found.opt_state
    masks = sparse.masks
    for code, mask in zip(
        jax.tree.leaves(sparse.activity), jax.tree.leaves(masks), strict=True
    ):
        np.testing.assert_array_equal(code, 2 * np.asarray(mask, np.int8), strict=True)
    now = digests(found._replace(opt_state=sparse._replace(activity=masks)))
    wanted = json.loads((FIXTURE / "digests.json").read_text())
    assert {name.replace("/activity/", "/masks/"): x for name, x in now.items()} == {
        name: x for name, x in wanted.items() if "/continuing/" not in name
    }
    begun: list[int] = []
    loop.fit(maker(), [3], run, stopped=begun.append)
    assert begun[0] == 4
    assert runs.steps_saved(run) == [4, 6]
    assert (run / "checkpoints" / "6" / manifest.NAME / manifest.FILE).exists()


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        (
            {"model": "cnn"},
            "params/hidden/kernel is float32[64, 40] there and float32[64, 50] here",
        ),
        ({"method": "snfs"}, "is missing there and float32[64, 40] here"),
        # Its state has the form of GraNet's.
        ({"method": "gmp"}, "the method is granet there and gmp here"),
        ({"method": "top-kast"}, "is missing there and bool[64, 40] here"),
        (
            {"optimizer": OptimizerConfig(name="adamw", learning_rate=1e-3)},
            "opt_state/inner_state/",
        ),
    ],
)
def test_another_run_s_checkpoint_is_refused(changes, differs, recorded, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(recorded[0], run)
    before = files(run)
    message = refusal(run, **changes)
    assert message.startswith(f"the checkpoint of step 6 in {run / 'checkpoints'}")
    assert "it is of another model, method or optimizer: " in message
    assert differs in message
    assert "Give the options it was written with, or another folder" in message
    assert files(run) == before


# --- folders that cannot be written


def test_a_file_in_the_place_of_the_folder(tmp_path) -> None:
    """Read-only folders are none to the root user, under whom tests may run."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("words")
    with pytest.raises(OSError, match="checkpoints"):
        loop.fit(maker(), [3], run)
    assert (run / "checkpoints").read_text() == "words"


def test_a_folder_that_is_taken_away_in_mid_run(
    recorded, tmp_path, capfd, monkeypatch
) -> None:
    monkeypatch.setattr(Checkpoints, "save", save_and_wait)
    run, aside = tmp_path / "run", tmp_path / "aside"

    def stopped(step: int) -> int | None:
        if step == 3:
            (run / "checkpoints").rename(aside)
            (run / "checkpoints").write_text("words")
        return None

    status, error = status_of(
        capfd, lambda: loop.fit(maker(), [3], run, stopped=stopped)
    )
    assert status == 2
    assert "the same command again" in one_line(error)
    (run / "checkpoints").unlink()
    aside.rename(run / "checkpoints")
    assert runs.steps_saved(run) == [2]
    loop.fit(maker(), [3], run)
    assert runs.same(*(runs.restored(maker(), r, LAST) for r in (run, recorded[0])))
    assert runs.lines(run) == runs.lines(recorded[0])
