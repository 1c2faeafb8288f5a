"""Checkpoints of a training run: complete or not there at all."""

import contextlib
import pathlib
from collections.abc import Generator
from typing import Any, NamedTuple

import orbax.checkpoint as ocp

PyTree = Any


class CheckpointError(OSError):
    """A checkpoint could not be written or read; those before it are as they were."""


class Progress(NamedTuple):
    """What a run remembers beside its state.

    Attributes:
      losses: float32, of every lane those of the steps since the last evaluation.
      seconds: of training so far.
    """

    losses: list[list[float]]
    seconds: float


class _Manager(ocp.CheckpointManager):
    """Leaves it to the trainer to ask whether to stop.

    Orbax would ask JAX's service too, with numbers of its own, which would confuse the
    count by which the processes agree on where.
    """

    def reached_preemption(self, step: int) -> bool:
        """No."""
        return False


class Checkpoints:
    """The checkpoints of one run, in `folder`, each named by its step.

    Written in the background; a folder gets its name when all of it is written. The
    position in the data follows from the step, so it needs no place of its own.
    """

    def __init__(self, folder: pathlib.Path, keep: int) -> None:
        """Opens the folder, without making it; all processes of a run together."""
        self.folder = folder
        self._manager = _Manager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=True,
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
            ),
            item_names=("state", "progress"),
        )

    def save(self, step: int, state: PyTree, progress: Progress) -> None:
        """Starts to write a checkpoint; `state` must not be donated until `wait`."""
        self.wait()
        with self._clear("written", step):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    progress=ocp.args.JsonSave(progress._asdict()),
                ),
            )

    def wait(self) -> None:
        """Returns when all is written."""
        with self._clear("written", None):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    @property
    def latest(self) -> int | None:
        """Step of the last complete checkpoint."""
        return self._manager.latest_step()

    def restore(self, step: int, abstract: PyTree) -> tuple[PyTree, Progress]:
        """A checkpoint, on the devices that `abstract` names."""
        with self._clear("read", step):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract),
                    progress=ocp.args.JsonRestore(),
                ),
            )
            return restored["state"], Progress(**restored["progress"])

    def close(self) -> None:
        """Waits, and gives the background threads back."""
        with self._clear("written", None):
            self._manager.close()

    @contextlib.contextmanager
    def _clear(self, done: str, step: int | None) -> Generator[None]:
        try:
            yield
        # Orbax raises what it meets, and a bare Exception for an array it cannot read.
        except Exception as error:
            which = "a checkpoint" if step is None else f"the checkpoint of step {step}"
            remedy = (
                "the checkpoints before it are complete. Make room (or give another "
                "folder as --out) and run the same command again."
                if done == "written"
                else f"remove {self.folder / str(step)} to go on from the one before."
            )
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            reason = str(cause).strip().partition("\n")[0] or repr(cause)
            raise CheckpointError(
                f"{which} in {self.folder} could not be {done}: {remedy} ({reason})"
            ) from error
