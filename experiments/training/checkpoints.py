"""Checkpoints of a training run. Every checkpoint is complete, or it does not exist."""

import contextlib
import json
from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from experiments.buckets import in_bucket
from experiments.training import manifest
from granet_jax import masking

PyTree = Any

FORMAT = 5
"""Version of the checkpoint format. It is part of every checkpoint, except that version
1 did not state it. Other versions are refused."""


class CheckpointError(OSError):
    """A checkpoint could not be written or read. Earlier checkpoints are unchanged."""


class _MismatchError(ValueError):
    """The checkpoint is intact but does not fit; the message says what to do."""


class Progress(NamedTuple):
    """Values that a run needs in addition to its state to resume.

    Attributes:
      losses: Losses of the steps since the last evaluation, one list per lane.
      seconds: Training time so far.
      method: Name of the method. States of different methods can look the same.
    """

    losses: list[list[float]]
    seconds: float
    method: str


class _Manager(ocp.CheckpointManager):
    """A checkpoint manager that does not ask JAX whether to stop.

    The training loop asks JAX's preemption service with its own numbers, by which the
    processes agree on a step. Orbax would ask with other numbers and disturb that.
    """

    def reached_preemption(self, step: int) -> bool:
        """Return False."""
        return False


class Checkpoints:
    """The checkpoints of one run, each in a subfolder named after its step.

    Checkpoints are written in the background. A subfolder gets its final name when all
    of its files are complete. The position in the data is not saved: it follows from
    the step.
    """

    def __init__(self, folder: epath.Path, keep: int) -> None:
        """Open the folder without creating it. All processes of a run must do so.

        Args:
          folder: Folder of the checkpoints.
          keep: Number of checkpoints to keep.
        """
        self.folder = folder
        self._manager = _Manager(
            # `resolve` does not know buckets.
            folder if in_bucket(folder) else folder.resolve(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=True,
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
            ),
            # Orbax finishes the items in this order, and the manifest must be last.
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "progress": ocp.JsonCheckpointHandler(),
                manifest.NAME: manifest.Handler(),
            },
        )

    def save(self, step: int, state: PyTree, progress: Progress) -> None:
        """Start writing a checkpoint. Do not donate `state` before `wait` returns."""
        self.wait()
        with self._explain_errors("written", step):
            # Without this check, orbax would wait for minutes for the folder.
            if self.folder.exists() and not self.folder.is_dir():
                raise NotADirectoryError(f"{self.folder} is not a folder")
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    progress=ocp.args.JsonSave(
                        {"format_version": FORMAT, **progress._asdict()}
                    ),
                    **{manifest.NAME: manifest.Args()},
                ),
            )

    def wait(self) -> None:
        """Wait until the last checkpoint is written."""
        with self._explain_errors("written", None):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    @property
    def latest(self) -> int | None:
        """Step of the last complete checkpoint."""
        return self._manager.latest_step()

    def restore(
        self, step: int, abstract: PyTree, method: str = ""
    ) -> tuple[PyTree, Progress]:
        """Read a checkpoint onto the devices that `abstract` names.

        Args:
          step: Step of the checkpoint.
          abstract: The state as `jax.ShapeDtypeStruct` leaves.
          method: Name of the method that continues from it; "" for any.

        Returns:
          (state, progress).

        Raises:
          CheckpointError: The checkpoint is damaged, has another format version, or
            belongs to another state or method.
        """
        with self._explain_errors("read", step):
            saved_method = self._check_files(step)
            mismatches = differences(
                self._manager.item_metadata(step)["state"].tree, abstract
            )
            if method and saved_method and saved_method != method:
                mismatches.insert(
                    0, f"the method is {saved_method} there and {method} here"
                )
            if mismatches:
                more = f" and {len(mismatches) - 3} more" if len(mismatches) > 3 else ""
                raise _MismatchError(
                    "it is of another model, method or optimizer: "
                    f"{'; '.join(mismatches[:3])}{more}. Give the options it was "
                    "written with, or another folder as --out."
                )
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract),
                    progress=ocp.args.JsonRestore(),
                ),
            )
            progress = restored["progress"]
            progress.pop("format_version")
            return restored["state"], Progress(**progress)

    def restore_on_host(self, step: int) -> PyTree:
        """Read the state of a checkpoint, whatever it is, as dicts of NumPy arrays.

        Raises:
          CheckpointError: The checkpoint is damaged or has another format version.
        """
        with self._explain_errors("read", step):
            self._check_files(step)
            types = self._manager.item_metadata(step)["state"].tree
            arrays = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), types)
            return self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(arrays))
            )["state"]

    def close(self) -> None:
        """Finish writing and stop the background threads."""
        with self._explain_errors("written", None):
            self._manager.close()

    def _check_files(self, step: int) -> str:
        """Check the manifest and the format version, and return the method's name."""
        folder = self.folder / str(step)
        has_manifest = manifest.check(folder)
        # Orbax is not asked: another version of the format may change anything else.
        progress = json.loads((folder / "progress" / "metadata").read_bytes())
        version = progress.get("format_version", 1)
        if version != FORMAT:
            raise _MismatchError(
                f"it has version {version!r} of the format, and this version of "
                f"granet_jax reads version {FORMAT} only: continue with the version of "
                "granet_jax that wrote it, or give another folder as --out."
            )
        if not has_manifest:
            raise manifest.DamagedError(f"{manifest.NAME}/{manifest.FILE} is missing")
        return progress["method"]

    @contextlib.contextmanager
    def _explain_errors(self, action: str, step: int | None) -> Generator[None]:
        """Turn all errors into a CheckpointError that says what to do."""
        try:
            yield
        except _MismatchError as error:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.folder} could not be "
                f"{action}: {error}"
            ) from error
        # Orbax raises many kinds of errors, among them a plain Exception for an array
        # that it cannot read.
        except Exception as error:
            which = "a checkpoint" if step is None else f"the checkpoint of step {step}"
            others = (
                "see whether all processes run, " if jax.process_count() > 1 else ""
            )
            remedy = (
                f"the checkpoints before it are complete. To go on, {others}make "
                "room (or give another folder as --out) and run the same command again."
                if action == "written"
                else f"remove {self.folder / str(step)} to go on from the one before."
            )
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            reason = str(cause).strip().partition("\n")[0] or repr(cause)
            raise CheckpointError(
                f"{which} in {self.folder} could not be {action}: {remedy} ({reason})"
            ) from error


def is_complete(run: epath.Path, step: int) -> bool:
    """Return whether a run has a complete checkpoint of a step.

    Args:
      run: Folder of the run.
      step: The step.
    """
    path = run / "checkpoints" / str(step)
    # In a bucket the folder has its final name from the start.
    return path.is_dir() and bool(ocp.utils.is_checkpoint_finalized(path))


def differences(saved: PyTree, abstract: PyTree) -> list[str]:
    """Describe the leaves in which a saved state and an expected state differ.

    Args:
      saved: Pytree whose leaves have a shape and a dtype, as orbax returns it.
      abstract: Pytree of `jax.ShapeDtypeStruct`.
    """
    there, here = _leaf_types(saved), _leaf_types(abstract)
    return [
        f"{name} is {there.get(name, 'missing')} there and "
        f"{here.get(name, 'missing')} here"
        for name in dict.fromkeys((*here, *there))
        if there.get(name) != here.get(name)
    ]


def _leaf_types(tree: PyTree) -> dict[str, str]:
    return {
        masking.leaf_name(path): f"{x.dtype}{list(x.shape)}"
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
