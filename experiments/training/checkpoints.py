"""Checkpoints of a training run: complete or not there at all."""

import contextlib
import json
import pathlib
from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

import granet_jax
from experiments.training import manifest
from granet_jax import activity, masking

PyTree = Any

FORMAT = 3
"""Version of what a checkpoint holds, which it states. Up to 2 a sparse state had two
trees of masks, which are made the codes of today as they are read; 1, which stated no
version, had no manifest of its files."""


class CheckpointError(OSError):
    """A checkpoint could not be written or read; those before it are as they were."""


class _OtherError(ValueError):
    """It is in order, and not what is asked for; the message has the remedy."""


class Progress(NamedTuple):
    """What a run remembers beside its state.

    Attributes:
      losses: float32, of every lane those of the steps since the last evaluation.
      seconds: of training so far.
      method: the name of its method; states of several have one form. Empty where
        none is stated, up to format 2.
    """

    losses: list[list[float]]
    seconds: float
    method: str = ""


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

    def restore(
        self, step: int, abstract: PyTree, method: str = ""
    ) -> tuple[PyTree, Progress]:
        """A checkpoint, on the devices that `abstract` names.

        Args:
          step: when it was written.
          abstract: the state, as `jax.ShapeDtypeStruct`.
          method: the name of the method that goes on from it, if one does.

        Raises:
          CheckpointError: it is damaged, of a newer version, or of another state or
            method.
        """
        with self._clear("read", step):
            stated = self._check_files(step)
            saved = self._manager.item_metadata(step)["state"].tree
            if stated.get("format_version", 1) < 3:
                abstract = _with_two_masks(abstract, saved)
            found = differences(saved, abstract)
            there = stated.get("method", "")
            if method and there and there != method:
                found.insert(0, f"the method is {there} there and {method} here")
            if found:
                more = f" and {len(found) - 3} more" if len(found) > 3 else ""
                raise _OtherError(
                    "it is of another model, method or optimizer: "
                    f"{'; '.join(found[:3])}{more}. Give the options it was written "
                    "with, or another folder as --out."
                )
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract),
                    progress=ocp.args.JsonRestore(),
                ),
            )
            progress = restored["progress"]
            progress.pop("format_version", None)
            return _with_codes(restored["state"]), Progress(**progress)

    def close(self) -> None:
        """Waits, and gives the background threads back."""
        with self._clear("written", None):
            self._manager.close()

    def _check_files(self, step: int) -> dict[str, Any]:
        """What it states of itself; raises unless files are as they were written."""
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
        return stated

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


class _TwoMasks(NamedTuple):
    """`granet_jax.SparseState` as it was up to format 2."""

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]
    masks: PyTree
    inner_state: PyTree
    accumulator: PyTree
    continuing: PyTree
    marked: PyTree


def _with_two_masks(abstract: PyTree, saved: PyTree) -> PyTree:
    """The state that format 2 has of an abstract one of today."""
    both = any("continuing" in name.split("/") for name in _forms(saved))

    def before(x: Any) -> Any:
        if not isinstance(x, granet_jax.SparseState):
            return x
        continuing = x.masks if both else ()
        fields = (x.count, x.masks, x.inner_state, x.accumulator, continuing, x.marked)
        return _TwoMasks(*fields)

    return jax.tree.map(
        before, abstract, is_leaf=lambda x: isinstance(x, granet_jax.SparseState)
    )


def _with_codes(state: PyTree) -> PyTree:
    """A state of today; what entered with the last update is of no consequence."""

    def today(x: Any) -> Any:
        if not isinstance(x, _TwoMasks):
            return x
        codes = jax.jit(activity.codes_of)(x.masks)
        return granet_jax.SparseState(
            x.count, codes, x.inner_state, x.accumulator, x.marked
        )

    return jax.tree.map(today, state, is_leaf=lambda x: isinstance(x, _TwoMasks))


def differences(saved: PyTree, abstract: PyTree) -> list[str]:
    """What a saved state has otherwise than the one to be restored, by leaf.

    Args:
      saved: what orbax says of its arrays: pytree of what has a shape and a dtype.
      abstract: pytree of `jax.ShapeDtypeStruct`.
    """
    there, here = _forms(saved), _forms(abstract)
    return [
        f"{name} is {there.get(name, 'missing')} there and "
        f"{here.get(name, 'missing')} here"
        for name in (*here, *(name for name in there if name not in here))
        if there.get(name) != here.get(name)
    ]


def _forms(tree: PyTree) -> dict[str, str]:
    return {
        masking.leaf_name(path): f"{x.dtype}{list(x.shape)}"
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
