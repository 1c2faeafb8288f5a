"""Result files, each of which gets its name only when it is complete."""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Generator, Mapping
from typing import Any

from etils import epath

from experiments.buckets import in_bucket


@contextlib.contextmanager
def atomic_path(path: epath.Path) -> Generator[pathlib.Path]:
    """Give a file its name only when it is complete.

    An object in a bucket appears when its upload is complete. A file on disk is
    renamed, which buckets cannot do.

    Yields:
      The local path to write to. For a file on disk it is `path` with ".partial"
      appended, which remains if an exception or a kill interrupts the body.

    Raises:
      OSError: The file cannot be written.
    """
    try:
        if in_bucket(path):
            with tempfile.TemporaryDirectory() as folder:
                local = pathlib.Path(folder) / path.name
                yield local
                path.write_bytes(local.read_bytes())
            return
        partial = pathlib.Path(f"{path}.partial")
        yield partial
        with partial.open("rb") as file:
            # A crash of the machine must not leave a complete name and no content.
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error.strerror or error}): make room (or "
            "give another folder as --out) and run the same command again."
        ) from error


def read_json(path: epath.Path) -> dict[str, Any]:
    """Read a JSON file in a folder of results.

    Raises:
      FileExistsError: The file is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise FileExistsError(f"out: {path} cannot be read ({error}).") from error


def write_json(path: epath.Path, values: Mapping[str, Any]) -> None:
    """Write values as an indented JSON file, atomically."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n")
