"""A checkpoint's own account of its files, to tell one that is damaged.

Orbax and tensorstore notice that a file is missing or cut off, but not every bit that
has changed: flipped in the data of an array, some are read as other numbers.
"""

import hashlib
import json
import pathlib
from typing import Any

import orbax.checkpoint as ocp

NAME = "manifest"
FILE = "sha256.json"


class DamagedError(ValueError):
    """The files are not those that were written."""


class Handler(ocp.CheckpointHandler):
    """The last item of a checkpoint: the SHA-256 of every file of the others.

    Written when all of them are, before the folder of the checkpoint gets its name, so
    that there is none without it.
    """

    def save(self, directory: Any, args: Any) -> None:
        """Nothing yet: the other items are still being written."""

    def restore(self, directory: Any, args: Any) -> None:
        """Nothing: see `check`."""

    def finalize(self, directory: Any) -> None:
        """Writes it, in the one process that orbax calls."""
        folder = pathlib.Path(directory)
        # Keys in order, so that equal checkpoints have equal manifests.
        text = json.dumps(_digests(folder.parent), indent=1, sort_keys=True)
        (folder / FILE).write_text(text + "\n")


@ocp.args.register_with_handler(Handler, for_save=True, for_restore=True)
class Args(ocp.args.CheckpointArgs):
    """Of `Handler`: none."""


def check(folder: pathlib.Path) -> bool:
    """Whether the checkpoint in this folder has a manifest, which then is true.

    Raises:
      DamagedError: a file that is missing, is another, or was not there.
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
            f"not as they were written: {', '.join(map(str, names[:3]))}{more}"
        )
    return True


def _digests(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 by path of all files in the folders of the items, but for this one's.

    Those of orbax's beside them have times, and nothing that is restored.
    """
    found = {}
    for item in folder.iterdir():
        # The manifest's own folder has a longer name until it is written.
        if not item.is_dir() or item.name.startswith(NAME):
            continue
        for path in item.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                found[path.relative_to(folder).as_posix()] = digest
    return found
