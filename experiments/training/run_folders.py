"""Folders of results: a new one, or the folder of a run that continues."""

import datetime
import re
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from experiments.buckets import check_reachable
from experiments.config.run import Config, check_same
from experiments.training import processes
from experiments.training.atomic_files import read_json, write_json

DEFAULT_FOLDER = epath.Path("runs")


def open_folder(config: Config) -> epath.Path:
    """Return the results folder of a configuration, new or to be continued.

    Raises:
      FileExistsError: The folder contains other files.
      ValueError: The folder contains a run with another configuration.
    """
    if config.out is None:
        if jax.process_count() > 1:
            raise ValueError("several processes need one folder: give --out.")
        return new_folder(config)
    if processes.is_first():
        hint = f" To train on from its result: another folder, --init-from {config.out}"
        claim(config.out, config.to_dict(), hint)
    return config.out


def claim(folder: epath.Path, options: dict[str, Any], hint: str = "") -> None:
    """Create a results folder, or check that it belongs to the same run.

    Args:
      folder: Folder for the results.
      options: All options as JSON values, for config.json.
      hint: What to do instead, for the message about other options.

    Raises:
      FileExistsError: The folder contains other files.
      OSError: The folder is in a bucket that cannot be reached.
      ValueError: The folder contains a run with other options.
    """
    check_reachable("out", folder)
    path = folder / "config.json"
    if path.exists():
        check_same(
            read_json(path),
            options,
            holder=f"{folder} holds a run",
            this="this one",
            hint=hint,
        )
        return
    if folder.exists() and (not folder.is_dir() or _has_other_files(folder)):
        raise FileExistsError(
            f"out: {folder} already exists, and it is neither empty nor the folder of "
            "a run. Results are never overwritten: choose another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, options)


def _has_other_files(folder: epath.Path) -> bool:
    # A killed run may have left an unfinished config.json.
    return any(path.name != "config.json.partial" for path in folder.iterdir())


def new_folder(config: Config) -> epath.Path:
    """Create a folder named after the time and the method in `DEFAULT_FOLDER`."""
    time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    DEFAULT_FOLDER.mkdir(exist_ok=True)
    for suffix in ("", *(f"-{i}" for i in range(2, 100))):
        folder = DEFAULT_FOLDER / f"{time}-{config.method}{suffix}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        write_json(folder / "config.json", config.to_dict())
        return folder
    raise FileExistsError(f"{DEFAULT_FOLDER} already has 99 runs of {time}.")


def seeds_of(folder: epath.Path, method: str) -> range | None:
    """Return the seeds of a run's folder, or None if it has another name."""
    name = re.fullmatch(
        rf"{re.escape(method)}-(?:seed(\d+)|seeds(\d+)-(\d+))", folder.name
    )
    if name is None:
        return None
    first = int(name[1] or name[2])
    return range(first, int(name[3] or first) + 1)


def run_name(method: str, seeds: Sequence[int]) -> str:
    """Return the folder name of a run of one seed, or of several seeds at once."""
    if len(seeds) == 1:
        return f"{method}-seed{seeds[0]}"
    return f"{method}-seeds{seeds[0]}-{seeds[-1]}"
