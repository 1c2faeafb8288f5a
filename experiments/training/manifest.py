"""The SHA-256 of every file of a checkpoint, to detect damage.

Orbax and tensorstore detect missing and truncated files, but not every changed bit in
the data of an array.
"""

import hashlib
import json
from collections.abc import Generator
from typing import Any, cast

import orbax.checkpoint as ocp
from etils import epath

NAME = "manifest"
FILE = "sha256.json"


class DamagedError(ValueError):
    """The files of a checkpoint differ from the files that were written."""


class Handler(ocp.CheckpointHandler):
    """Writes the manifest as the last item of a checkpoint.

    It is written after all other items and before the checkpoint's folder gets its
    final name, so every complete checkpoint has a manifest.
    """

    def save(self, directory: Any, args: Any) -> None:
        """Do nothing: the other items are still being written."""

    def restore(self, directory: Any, args: Any) -> None:
        """Do nothing: see `check`."""

    def finalize(self, directory: Any) -> None:
        """Write the manifest. Orbax calls this in one process."""
        folder = epath.Path(directory)
        # Sorted keys make the manifests of equal checkpoints equal.
        text = json.dumps(_digests(folder.parent), indent=1, sort_keys=True)
        (folder / FILE).write_text(text + "\n")


@ocp.args.register_with_handler(Handler, for_save=True, for_restore=True)
class Args(ocp.args.CheckpointArgs):
    """Arguments of `Handler`: none."""


def check(folder: epath.Path) -> bool:
    """Check that the files of a checkpoint are the files that were written.

    Returns:
      Whether there is a manifest. Without one, nothing is checked.

    Raises:
      DamagedError: A file is missing, changed, or new.
    """
    path = folder / NAME / FILE
    if not path.exists():
        return False
    try:
        expected = json.loads(path.read_bytes())
        changed = expected.items() ^ _digests(folder).items()
    except (ValueError, AttributeError, TypeError) as error:
        raise DamagedError(f"{path} cannot be read ({error})") from None
    if changed:
        names = sorted({name for name, _ in changed})
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise DamagedError(
            f"these files were changed: {', '.join(map(str, names[:3]))}{more}"
        )
    return True


def _digests(folder: epath.Path) -> dict[str, str]:
    """Return the SHA-256 of the files of all items except the manifest, by path.

    Orbax's own files next to the items are left out: they contain times, and nothing
    that is restored.
    """
    digests = {}
    for item in folder.iterdir():
        # The folder of the manifest has a longer name until it is complete.
        if not item.is_dir() or item.name.startswith(NAME):
            continue
        for path in _files(item):
            with path.open("rb") as file:
                digest = hashlib.file_digest(cast("Any", file), "sha256").hexdigest()
            digests[path.relative_to(folder).as_posix()] = digest
    return digests


def _files(folder: epath.Path) -> Generator[epath.Path]:
    """Yield all files in a folder and in the folders in it."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path
