"""Folders in buckets of Google Cloud Storage: paths that start with gs://.

`etils.epath.Path` reads and writes them like folders on disk.
"""

import importlib.util
import os

import fsspec.config
from etils import epath

# Orbax writes files by a library of its own, which a list kept from before would miss.
fsspec.config.conf["gcs"] = {"use_listings_cache": False}


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is in a bucket."""
    return str(path).startswith("gs://")


def check_folder(name: str, path: str | os.PathLike[str] | None) -> None:
    """Check that a folder is on disk or in a bucket that can be read.

    Args:
      name: Name of the option, for the message.
      path: The folder, if any.

    Raises:
      ValueError: It is neither, or a package is missing.
    """
    if path is None:
        return
    if not in_bucket(path):
        # `pathlib.Path` removes one of the two slashes.
        if str(path).partition("/")[0].endswith(":"):
            raise ValueError(
                f"{name} must be a folder on disk or gs://BUCKET/FOLDER, got {path}."
            )
        return
    if len(epath.Path(path).parts) < 4:
        raise ValueError(f"{name} must name a folder in the bucket, got {path}.")
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(
            f"{name} is in a bucket, got {path}, and the package gcsfs is missing: "
            "pip install '.[buckets]'."
        )


def check_reachable(name: str, path: str | os.PathLike[str]) -> None:
    """Check that the bucket of a folder, if it is in one, answers.

    Raises:
      OSError: There is no such bucket, or this machine may not read it.
    """
    if not in_bucket(path):
        return
    bucket = epath.Path(f"gs://{epath.Path(path).parts[2]}")
    remedy = "check its name, and log in with `gcloud auth application-default login`."
    try:
        found = bucket.exists()
    except Exception as error:  # Libraries for buckets raise errors of many types.
        raise OSError(
            f"{name}: {bucket} cannot be reached ({error}): {remedy}"
        ) from error
    if not found:
        raise OSError(
            f"{name}: {bucket} cannot be reached (it does not exist, or may not "
            f"be read): {remedy}"
        )
