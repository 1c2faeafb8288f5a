"""Checkpoints of a training run: complete or not there at all."""

import contextlib
import json
import pathlib
from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from experiments import manifest
from granet_jax import masking

PyTree = Any

FORMAT = 2
"""Version of what a checkpoint holds, which it states. 1, which stated none, had no
manifest of its files; it is read as it is."""


class CheckpointError(OSError):
    """A checkpoint could not be written or read; those before it are as they were."""


class _OtherError(ValueError):
    """It is in order, and not what is asked for; the message has the remedy."""


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
            # In the order in which they are completed: the manifest comes last.
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "progress": ocp.JsonCheckpointHandler(),
                manifest.NAME: manifest.Handler(),
            },
        )

    def save(self, step: int, state: PyTree, progress: Progress) -> None:
        """Starts to write a checkpoint; `state` must not be donated until `wait`."""
        self.wait()
        with self._clear("written", step):
            # Orbax would wait for minutes for a folder that it cannot make.
            if self.folder.exists() and not self.folder.is_dir():
                raise NotADirectoryError(f"{self.folder} is no folder")
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
        """Returns when all is written."""
        with self._clear("written", None):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    @property
    def latest(self) -> int | None:
        """Step of the last complete checkpoint."""
        return self._manager.latest_step()

    def restore(self, step: int, abstract: PyTree) -> tuple[PyTree, Progress]:
        """A checkpoint, on the devices that `abstract` names.

        Raises:
          CheckpointError: it is damaged, of a newer version, or of another state.
        """
        with self._clear("read", step):
            self._check(step, abstract)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract),
                    progress=ocp.args.JsonRestore(),
                ),
            )
            progress = restored["progress"]
            progress.pop("format_version", None)
            return restored["state"], Progress(**progress)

    def close(self) -> None:
        """Waits, and gives the background threads back."""
        with self._clear("written", None):
            self._manager.close()

    def _check(self, step: int, abstract: PyTree) -> None:
        """Raises unless the files are as they were written, of a state like this."""
        folder = self.folder / str(step)
        has_manifest = manifest.check(folder)
        # Read here, since what else a newer version changes is not known.
        stated = json.loads((folder / "progress" / "metadata").read_bytes())
        version = stated.get("format_version", 1)
        if version not in range(1, FORMAT + 1):
            raise _OtherError(
                f"it has version {version!r} of the format, and this version of "
                f"granet_jax reads up to {FORMAT}: go on with the one that wrote it, "
                "or give another folder as --out."
            )
        if version > 1 and not has_manifest:
            raise manifest.DamagedError(f"{manifest.NAME}/{manifest.FILE} is missing")
        saved = self._manager.item_metadata(step)["state"]
        if found := differences(saved.tree, abstract):
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise _OtherError(
                f"it is of another model, method or optimizer: {'; '.join(found[:3])}"
                f"{more}. Give the options it was written with, or another folder as "
                "--out."
            )

    @contextlib.contextmanager
    def _clear(self, done: str, step: int | None) -> Generator[None]:
        try:
            yield
        except _OtherError as error:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.folder} could not be {done}: "
                f"{error}"
            ) from error
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


def differences(saved: PyTree, abstract: PyTree) -> list[str]:
    """What a saved state has otherwise than the one to be restored, by leaf.

    Args:
      saved: what orbax says of its arrays: pytree of what has a shape and a dtype.
      abstract: pytree of `jax.ShapeDtypeStruct`.
    """

    def forms(tree: PyTree) -> dict[str, str]:
        return {
            masking.leaf_name(path): f"{x.dtype}{list(x.shape)}"
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        }

    there, here = forms(saved), forms(abstract)
    return [
        f"{name} is {there.get(name, 'missing')} there and "
        f"{here.get(name, 'missing')} here"
        for name in (*here, *(name for name in there if name not in here))
        if there.get(name) != here.get(name)
    ]
