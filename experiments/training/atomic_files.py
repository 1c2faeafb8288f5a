"""Result files, each of which gets its name only when it is complete."""

import contextlib
import json
import pathlib
from collections.abc import Generator, Mapping
from typing import Any


@contextlib.contextmanager
def atomic_path(path: pathlib.Path) -> Generator[pathlib.Path]:
    """Give a file its name only when it is complete.

    Yields:
      The path to write to: `path` with ".partial" appended. If an exception or the end
      of the process interrupts the body, that partial file remains.

    Raises:
      OSError: The file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    with explain_write_errors(path):
        yield partial
        partial.replace(path)


@contextlib.contextmanager
def explain_write_errors(path: pathlib.Path) -> Generator[None]:
    """Add the remedy to an OSError of the body, which writes `path`."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error.strerror}): make room (or give "
            "another folder as --out) and run the same command again."
        ) from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON file in a folder of results.

    Raises:
      FileExistsError: The file is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise FileExistsError(f"out: {path} cannot be read ({error}).") from error


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Write values as an indented JSON file, atomically."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n")
