"""Kills, damage and other versions of a checkpoint: an error, or no consequence.

A process that is killed leaves the files as they are at that moment. So the folder is
copied before every change that Python makes in it, and training from each copy must end
as the undisturbed run did. Real kills are in `test_resume.py`.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from experiments.config.run import CheckpointConfig, MaskConfig
from experiments.training import checkpoints, loop, manifest
from experiments.training.checkpoints import CheckpointError, Checkpoints
from experiments.training.exit_status import exit_status
from tests.helpers import runs

# Saved at steps 2, 4 and 6. The last save removes the first checkpoint.
LAST = 6
CONFIG = dataclasses.replace(
    runs.CONFIG,
    sparsity=0.8,
    steps=LAST,
    eval_every=4,
    masks=MaskConfig(interval=2),
    checkpoint=CheckpointConfig(every=2, keep=2),
)
FIXTURE = pathlib.Path(__file__).parent / "checkpoint_format_1"
MANIFEST = f"{manifest.NAME}/{manifest.FILE}"


@pytest.fixture(autouse=True, scope="module")
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        runs.use_small_networks(patch)
        yield


def setup() -> loop.TrainSetup:
    return runs.create_setup(CONFIG)


def fit(run: pathlib.Path, **options: Any) -> Any:
    return loop.fit(setup(), [3], run, **options)


def restore(run: pathlib.Path) -> Any:
    return runs.restore_state(setup(), run, LAST)


# Python audits these before it carries them out; their first argument is a path.
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
_watchers: list[Callable[[str, Any], None]] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _watchers and event in EVENTS:
        for watcher in _watchers:
            watcher(event, args)


sys.addaudithook(_audit)  # Python cannot remove a hook.


@contextlib.contextmanager
def copying(run: pathlib.Path, target: pathlib.Path) -> Iterator[list[str]]:
    """Copy a run's folder before every change that Python makes in it.

    Yields:
      The change that follows each copy. Copies are named by their index in this list.
    """
    changes: list[str] = []
    lock = threading.RLock()
    busy = threading.local()

    def watch(event: str, args: tuple[Any, ...]) -> None:
        path = args[0]
        if not isinstance(path, str) or not path.startswith(str(run)):
            return
        only_reads = event == "open" and not (args[2] or 0) & 3
        if only_reads or getattr(busy, "copying", False):
            return
        with lock:
            busy.copying = True
            try:
                copy(run, target / str(len(changes)))
            finally:
                busy.copying = False
            changes.append(f"{event} {pathlib.Path(path).relative_to(run)}")

    _watchers.append(watch)
    try:
        yield changes
    finally:
        _watchers.remove(watch)


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copy a folder in which other threads may add and remove files."""
    target.mkdir(parents=True)
    for path in sorted(source.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            to = target / path.relative_to(source)
            if path.is_dir():
                to.mkdir(parents=True, exist_ok=True)
            else:
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, to)


SAVE = Checkpoints.save


def save_and_wait(self: Checkpoints, *args: Any) -> None:
    SAVE(self, *args)
    self.wait()


@pytest.fixture(scope="module")
def recording(
    _small, tmp_path_factory
) -> tuple[pathlib.Path, list[tuple[str, pathlib.Path]]]:
    """A run's folder, and the folder that a kill before each change would leave."""
    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        # Nothing else changes while a copy is made.
        patch.setattr(Checkpoints, "save", save_and_wait)
        with copying(folder / "run", folder / "killed") as changes:
            fit(folder / "run")
    assert runs.saved_steps(folder / "run") == [4, 6]
    kills = [(what, folder / "killed" / str(i)) for i, what in enumerate(changes)]
    return folder / "run", kills


@pytest.fixture
def run(recording, tmp_path) -> pathlib.Path:
    """A copy of the finished run, to damage."""
    shutil.copytree(recording[0], tmp_path / "run")
    return tmp_path / "run"


def assert_ends_alike(run: pathlib.Path, undisturbed: pathlib.Path) -> None:
    assert runs.same(restore(run), restore(undisturbed))
    assert runs.metrics(run) == runs.metrics(undisturbed)
    assert not list((run / "checkpoints").glob("*tmp*"))


def test_training_continues_after_a_kill_at_any_moment(recording, tmp_path) -> None:
    undisturbed, kills = recording
    changes = [what for what, _ in kills]
    save = "checkpoints/6.orbax-checkpoint-tmp"
    for phase in (
        "open metrics.jsonl",
        f"os.mkdir {save}",
        f"open {save}/_CHECKPOINT_METADATA",
        f"os.mkdir {save}/state.orbax-checkpoint-tmp",
        f"os.rename {save}/state.orbax-checkpoint-tmp",
        f"os.rename {save}/progress.orbax-checkpoint-tmp",
        f"open {save}/manifest.orbax-checkpoint-tmp/sha256",
        f"os.rename {save}/manifest.orbax-checkpoint-tmp",
        f"open {save}/commit_success.txt",
        # "$" is the end of the path: these change the folder itself.
        f"os.rename {save}$",
        "shutil.rmtree checkpoints/2$",
        "os.rmdir checkpoints/2$",
    ):
        assert any(f"{change}$".startswith(phase) for change in changes), phase
    # One kill of every kind, the last, and one of those that left the same files.
    kinds = {re.sub(r"\d+", "#", what): left for what, left in kills}
    different = {str(list(runs.contents(x))): (kind, x) for kind, x in kinds.items()}
    assert len(different) > 12
    for what, left in different.values():
        again = tmp_path / left.name
        shutil.copytree(left, again)
        steps: list[int] = []
        fit(again, stopped=steps.append)
        assert steps[0] == max(runs.saved_steps(left), default=0), what
        assert_ends_alike(again, undisturbed)
        shutil.rmtree(again)


def error_of(capfd: Any, command: Callable[[], object], status: int = 2) -> str:
    return runs.failure(capfd, lambda: exit_status(command), status)


def refusal(capfd: Any, run: pathlib.Path, each: loop.TrainSetup | None = None) -> str:
    """The error of a training that does not go on with a run, and leaves it alone."""
    before = runs.contents(run)
    error = error_of(capfd, lambda: loop.fit(each or setup(), [3], run))
    assert runs.contents(run) == before
    return error


def test_damage_in_any_file_is_found_or_of_no_consequence(recording, run) -> None:
    """Tensorstore would read some flipped bits as other numbers."""
    folder = run / "checkpoints" / str(LAST)
    rng = np.random.default_rng(0)
    expected = restore(run)
    no_consequence = set()
    opened = Checkpoints(run / "checkpoints", keep=2)

    def check(name: str) -> None:
        try:
            state, _ = opened.restore(LAST, setup().compiled_step.abstract())
        except CheckpointError as error:
            message = str(error)
            assert "\n" not in message
            assert f"remove {folder} to go on from the one before." in message
            assert name in message or name.startswith(manifest.NAME), message
        else:
            assert runs.same(state, expected), name
            no_consequence.add(name)

    try:
        for name, content in runs.contents(folder).items():
            path = folder / name
            for place in rng.integers(8 * len(content), size=6):
                flipped = bytearray(content)
                flipped[place // 8] ^= 1 << (place % 8)
                path.write_bytes(flipped)
                check(name)
            for damaged in (content[: len(content) // 2], b""):
                path.write_bytes(damaged)
                check(name)
            path.unlink()
            check(name)
            path.write_bytes(content)
        # Orbax writes times and a mark of success, which nothing here restores.
        assert no_consequence == {
            "_CHECKPOINT_METADATA",
            "commit_success.txt",
            f"{manifest.NAME}/commit_success.txt",
        }
        manifest_entries = json.loads((folder / MANIFEST).read_text())
        for item in ("progress/metadata", "state/manifest.ocdbt", "state/_METADATA"):
            assert item in manifest_entries
    finally:
        opened.close()


def test_training_continues_from_the_checkpoint_before_a_damaged_one(
    recording, run, capfd
) -> None:
    folder = run / "checkpoints" / str(LAST)
    more = folder / "state" / "more"
    for damage, message in (
        (lambda: more.write_bytes(b""), "these files were changed: state/more"),
        (
            lambda: (more.unlink(), (folder / MANIFEST).unlink()),
            f"{MANIFEST} is missing",
        ),
        (lambda: (folder / MANIFEST).write_text('["sha256"]'), "json cannot be read"),
    ):
        damage()
        error = refusal(capfd, run)
        assert message in error
        assert f"remove {folder} to go on from the one before." in error
    shutil.rmtree(folder)
    fit(run)
    assert_ends_alike(run, recording[0])


def test_metrics_that_do_not_belong_to_the_checkpoint(recording, run, capfd):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for left in ("", "".join(lines[:-2] + lines[-1:])):
        path.write_text(left)
        error = refusal(capfd, run)
        assert f"{path} lacks records up to step {LAST}" in error
        assert f"put the file back, or remove {run} to train again" in error
    path.write_text("".join(lines))
    fit(run)
    assert_ends_alike(run, recording[0])


def test_other_versions_are_refused(run, capfd) -> None:
    folder = run / "checkpoints" / str(LAST)
    path, index = folder / "progress" / "metadata", folder / MANIFEST
    for version in (checkpoints.FORMAT + 1, "2", 0):
        values = json.loads(path.read_text()) | {"format_version": version}
        path.write_text(json.dumps(values))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        digests = json.loads(index.read_text()) | {"progress/metadata": digest}
        index.write_text(json.dumps(digests))
        message = refusal(capfd, run)
        assert f"it has version {version!r} of the format" in message
        # "Remove it" would be bad advice.
        assert "remove" not in message


def test_a_checkpoint_of_the_first_version_is_refused(tmp_path, capfd) -> None:
    """The library wrote it before checkpoints stated a version."""
    run = tmp_path / "run"
    shutil.copytree(FIXTURE / "run", run)
    metadata = json.loads((run / "checkpoints/4/progress/metadata").read_text())
    assert "format_version" not in metadata
    error = refusal(capfd, run)
    for part in (
        "it has version 1 of the format",
        f"reads version {checkpoints.FORMAT} only: continue with the version",
        "that wrote it, or give another folder as --out",
    ):
        assert part in error


def test_a_checkpoint_of_another_run_is_refused(run, capfd):
    for changes, differs in (
        ({"model": "cnn"}, "hidden/kernel is float32[64, 40] there and float32[64, 50"),
        # Its state has the form of GraNet's.
        ({"method": "gmp"}, "the method is granet there and gmp here"),
        ({"method": "top-kast"}, "is missing there and bool[64, 40] here"),
        ({"optimizer.name": "adamw"}, "opt_state/inner_state/"),
    ):
        other = runs.create_setup(runs.replace_options(CONFIG, changes))
        message = refusal(capfd, run, other)
        assert f"the checkpoint of step 6 in {run / 'checkpoints'}" in message
        assert "it is of another model, method or optimizer: " in message
        assert differs in message
        assert "Give the options it was written with, or another folder" in message


@pytest.fixture
def partial_run(tmp_path) -> pathlib.Path:
    """A run that was stopped after step 3, with a checkpoint."""
    run = tmp_path / "run"
    stop = {3: signal.SIGTERM}
    with pytest.raises(loop.StoppedError):
        fit(run, stopped=stop.get)
    assert runs.saved_steps(run) == [2, 3]
    return run


@pytest.mark.parametrize("file", ["checkpoint", "metrics"])
def test_a_full_disk(file, partial_run, recording, capfd):
    setup().compiled_step.inspect(setup().compiled_step.create([3]))
    before = runs.restore_state(setup(), partial_run, 3)
    path = partial_run / "metrics.jsonl"
    records = path.read_bytes()
    # Orbax divides arrays among files as it likes, but `_METADATA` has 8 kB.
    limit = 5_000 if file == "checkpoint" else len(records) + 100

    def limited() -> None:
        with runs.full_disk(limit):
            fit(partial_run)

    error = error_of(capfd, limited)
    for part in ("could not be written", "ake room", "the same command again"):
        assert part in error
    if file == "metrics":
        assert f"{path} could not be written (File too large)" in error
        # The disk is full in the middle of the next line.
        assert path.read_bytes() == records
    assert runs.saved_steps(partial_run) == [2, 3]
    assert runs.same(runs.restore_state(setup(), partial_run, 3), before)
    fit(partial_run)
    assert_ends_alike(partial_run, recording[0])


def test_a_file_in_the_place_of_the_folder(
    partial_run, recording, tmp_path, capfd
) -> None:
    """The root user may write in any folder, so that no folder can be read-only."""
    folder, aside = partial_run / "checkpoints", tmp_path / "aside"

    def stopped(step: int) -> int | None:
        if step == 5:
            folder.rename(aside)
            folder.write_text("words")
        return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_wait)
        error = error_of(capfd, lambda: fit(partial_run, stopped=stopped))
    assert "the same command again" in error
    folder.unlink()
    aside.rename(folder)
    assert runs.saved_steps(partial_run) == [3, 4]
    fit(partial_run)
    assert_ends_alike(partial_run, recording[0])


def test_training_that_diverges_keeps_the_last_good_checkpoint(tmp_path, capfd):
    options = {
        "optimizer.learning_rate": 1e30,
        "checkpoint.every": 1,
        "method": "static",
    }
    diverging = runs.create_setup(
        runs.replace_options(CONFIG, options | {"masks": MaskConfig()})
    )
    messages = [
        error_of(capfd, lambda: loop.fit(diverging, [0], tmp_path), status=1)
        for _ in range(2)  # A second attempt ends in the same way.
    ]
    assert messages[0] == messages[1]
    assert "lower optimizer.learning_rate" in messages[0]
    last = runs.saved_steps(tmp_path)[-1]
    assert f"The last good checkpoint is kept (it is of step {last})." in messages[0]
    state: Any = runs.restore_state(diverging, tmp_path, last)
    assert int(state.step) == last
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
