"""Files of results: each gets its name when it is complete, or not at all."""

import contextlib
import json
import pathlib
from collections.abc import Generator, Mapping
from typing import Any


@contextlib.contextmanager
def atomic_path(path: pathlib.Path) -> Generator[pathlib.Path]:
    """Gives a file its name only when it is complete.

    Yields:
      The path to write to, `path` with ".partial" added. An exception leaves it there,
      as does the end of the process.

    Raises:
      OSError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    with explain_write_errors(path):
        yield partial
        partial.replace(path)


@contextlib.contextmanager
def explain_write_errors(path: pathlib.Path) -> Generator[None]:
    """Has an error of writing `path` say what to do.

    Raises:
      OSError: one of the body's, with the remedy.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error.strerror}): make room (or give "
            "another folder as --out) and run the same command again."
        ) from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The values in a file of a folder of results.

    Raises:
      FileExistsError: it holds something else.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise FileExistsError(f"out: {path} cannot be read ({error}).") from error


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes values to be read by people too; see `complete`."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n")
