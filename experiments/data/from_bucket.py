"""Prepared data sets in buckets, which are copied to this machine before they are read.

The reader of array_record files reads files on disk only.
"""

import os
import pathlib
import shutil
import sys
from typing import Any

import fsspec
from etils import epath
from fsspec.callbacks import TqdmCallback

from experiments.buckets import check_reachable
from experiments.data import preparation


def copy(name: str, data_dir: str | os.PathLike[str]) -> None:
    """Copy a data set from a bucket to the folder of TFDS_DATA_DIR, unless it is there.

    If several processes call this at once, one does the work and the others wait. An
    interrupted copy never looks complete, and the next call removes its files.

    Args:
      name: Name of the data set.
      data_dir: Folder of prepared data sets in a bucket.

    Raises:
      ValueError: There is no such data set.
      FileNotFoundError: The bucket does not have it.
      OSError: The folder on disk has something else.
    """
    builder: Any = preparation.builder_of(name, None)
    if preparation.is_prepared(builder):
        return
    folder = pathlib.Path(builder.data_dir)
    inside = folder.relative_to(builder.data_dir_root)
    source = epath.Path(data_dir) / inside
    with preparation.lock(pathlib.Path(builder.data_dir_root), name):
        if folder.exists():  # Another process has copied it.
            return
        check_reachable("data.data_dir", source)
        if not source.is_dir():
            raise FileNotFoundError(
                f"data.data_dir: there is no {source}. Prepare {name} on one machine, "
                f"then copy it: `gcloud storage cp -r {folder} {source.parent}/`."
            )
        print(f"copying {source} to {folder}", file=sys.stderr)
        incomplete = folder.with_name("incomplete.copy")
        shutil.rmtree(incomplete, ignore_errors=True)
        fsspec.filesystem("gcs").get(
            str(source),
            str(incomplete),
            recursive=True,
            callback=TqdmCallback({"unit": "file"}),
        )
        incomplete.rename(folder)
