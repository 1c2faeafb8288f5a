"""Prepare data sets as folders of array_record files with tensorflow-datasets."""

import contextlib
import difflib
import fcntl
import hashlib
import importlib.util
import io
import os
import pathlib
import shlex
import shutil
import sys
from collections.abc import Generator, Mapping
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants

from experiments.buckets import in_bucket
from experiments.data import downloads, tfds_builders

NAMES = (*tfds_builders.BUILDERS, "imagenet2012")

# The images in the two archives of imagenet2012.
IMAGENET_ARCHIVES = {
    "ILSVRC2012_img_train.tar": "training",
    "ILSVRC2012_img_val.tar": "validation",
}


def check_name(name: str) -> None:
    """Check that there is a data set `name`.

    Raises:
      ValueError: There is no such data set.
    """
    if name not in NAMES:
        nearest = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(
            f"there is no data set {name!r}.{hint} There are {', '.join(NAMES)}."
        )


def builder_of(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    """Return the tensorflow-datasets builder of `name` without network access.

    Raises:
      ValueError: There is no such data set.
      OSError: The folder of the data set cannot be read.
    """
    check_name(name)
    folder = (
        None if data_dir is None else pathlib.Path(data_dir).expanduser().absolute()
    )
    builder: Any = (
        tfds.builder_cls(name)
        if name == "imagenet2012"
        else tfds_builders.BUILDERS[name]
    )
    try:
        return builder(data_dir=folder)
    except Exception as error:  # Damaged metadata raise errors of many types.
        path = (folder or default_dir()) / name
        raise OSError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Remove the "
            f"folder, then run `{command(name, folder)}`."
        ) from error


def prepare(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
    *,
    checksums: Mapping[str, str] | None = None,
) -> tuple[pathlib.Path, bool]:
    """Prepare the data set `name`, unless it is already prepared.

    If several processes call this at once, one does the work and the others wait. An
    interrupted preparation never looks complete, and the next call removes its files.

    Args:
      name: One of `NAMES`.
      data_dir: Folder of prepared data sets; None means the folder in TFDS_DATA_DIR,
        otherwise ~/tensorflow_datasets.
      manual_dir: Folder of files obtained by hand; None means downloads/manual in
        `data_dir`.
      checksums: SHA-256 by file name, to replace the known values.

    Returns:
      (the folder of the data set, whether it was prepared by this call).

    Raises:
      ValueError: There is no such data set, or `data_dir` is in a bucket.
      ModuleNotFoundError: The preparation needs TensorFlow, which is not installed.
      OSError: A file is missing or has the wrong checksum, the network or the disk
        fails, or the folder contains something else.
    """
    if data_dir is not None and in_bucket(data_dir):
        raise ValueError(
            f"data_dir must be on disk, got {data_dir}: prepare {name} there, then "
            f"copy it with `gcloud storage cp -r {default_dir() / name} {data_dir}/`."
        )
    builder = builder_of(name, data_dir)
    folder = pathlib.Path(builder.data_dir)
    if is_prepared(builder):
        return folder, False
    with lock(pathlib.Path(builder.data_dir_root), name):
        # Another process may have prepared it in the meantime.
        builder = builder_of(name, data_dir)
        if is_prepared(builder):
            return folder, False
        for leftover in folder.parent.glob("incomplete.*"):
            shutil.rmtree(leftover)
        manual = _manual_dir(builder, manual_dir)
        if name == "imagenet2012":
            _check_imagenet(builder, manual, checksums)
        else:
            builder.manual_dir = manual
            builder.checksums = checksums or {}
        # Hide the output, which refers to the sizes in the catalogue.
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(
                    download_config=tfds.download.DownloadConfig(
                        manual_dir=manual,
                        try_download_gcs=False,
                        force_checksums_validation=True,
                    ),
                    file_format="array_record",
                )
        except (
            RuntimeError
        ) as error:  # The writer raises it, for example on a full disk.
            raise OSError(
                f"{name} could not be prepared in {folder}: {error}"
            ) from error
    return folder, True


def is_prepared(builder: Any) -> bool:
    """Return whether the data set of `builder` is prepared.

    Raises:
      OSError: Its folder is incomplete or has files in another format.
    """
    folder = pathlib.Path(builder.data_dir)
    if not folder.exists():
        return False
    if not builder.is_prepared():
        raise OSError(f"{folder} is not a prepared data set. {remedy(builder)}")
    file_format = builder.info.file_format
    if file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise OSError(
            f"{folder} holds files in the format {file_format.value}, which cannot be "
            "read at random. Keep it, and choose another folder by --data-dir; or: "
            f"{remedy(builder)}"
        )
    return True


def remedy(builder: Any) -> str:
    """Describe what to do about a folder that cannot be read."""
    return (
        f"Remove the folder, then run `{command(builder.name, builder.data_dir_root)}`."
    )


def command(name: str, data_dir: str | os.PathLike[str] | None) -> str:
    """Return the command that prepares `name`."""
    words = ["python", "-m", "experiments.prepare", name]
    if data_dir is not None and pathlib.Path(data_dir) != default_dir():
        words += ["--data-dir", os.fspath(data_dir)]
    return shlex.join(words)


def is_available(name: str) -> bool:
    """Return whether `name` can be prepared without a download."""
    if name == "imagenet2012":
        return False
    builder = tfds_builders.BUILDERS[name]
    archives, debian_dir = builder.archives(), builder.debian_dir
    return not archives or (
        debian_dir is not None
        and all((debian_dir / archive.name).is_file() for archive in archives)
    )


def missing_message(name: str, data_dir: str | os.PathLike[str] | None) -> str:
    """Describe how to get a data set that is not prepared."""
    builder = builder_of(name, data_dir)
    manual = _manual_dir(builder, None)
    run = f"`{command(name, data_dir)}`"
    start = f"{name} is not in {builder.data_dir_root}. "
    if name == "imagenet2012":
        return (
            f"{start}Put {' and '.join(IMAGENET_ARCHIVES)} into {manual}, run "
            f"`pip install '.[imagenet]'`, then {run}."
        )
    archives = tfds_builders.BUILDERS[name].archives()
    names = ", ".join(archive.name for archive in archives)
    if any(archive.url is None for archive in archives):
        return f"{start}Put {names} into {manual}, then run {run}."
    package = (
        f" Debian's package {downloads.DEBIAN_PACKAGE} also has the files: if it is "
        "installed, no command is needed."
        if tfds_builders.BUILDERS[name].debian_dir
        else ""
    )
    return (
        f"{start}Run {run}, which downloads it. Without a network, put {names} "
        f"into {manual} first.{package}"
    )


def default_dir() -> pathlib.Path:
    """Return the folder in TFDS_DATA_DIR, otherwise ~/tensorflow_datasets."""
    return pathlib.Path(constants.DATA_DIR).expanduser()


def _manual_dir(
    builder: Any, manual_dir: str | os.PathLike[str] | None
) -> pathlib.Path:
    if manual_dir is None:
        return pathlib.Path(builder.data_dir_root) / "downloads" / "manual"
    return pathlib.Path(manual_dir).expanduser().absolute()


@contextlib.contextmanager
def lock(root: pathlib.Path, name: str) -> Generator[None]:
    """Let one process at a time prepare `name`. The lock ends with the process.

    Args:
      root: Folder of prepared data sets.
      name: Name of the data set.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / f".{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that prepares {name}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_imagenet(
    builder: Any, manual: pathlib.Path, checksums: Mapping[str, str] | None
) -> None:
    """Check the archives and TensorFlow, which the builder of imagenet2012 needs."""
    for name, part in IMAGENET_ARCHIVES.items():
        if not (manual / name).is_file():
            raise FileNotFoundError(
                f"the {part} images of imagenet2012 are missing: put {name} into "
                f"{manual}, or give its folder by --manual-dir. The archives come "
                "from the site of ImageNet, after registration."
            )
    if importlib.util.find_spec("tensorflow") is None:
        raise ModuleNotFoundError(
            "preparing imagenet2012 needs TensorFlow (training does not): run "
            "`pip install '.[imagenet]'`, then prepare again."
        )
    known = {
        url.rsplit("/", 1)[-1]: info.checksum for url, info in builder.url_infos.items()
    } | dict(checksums or {})
    for name in IMAGENET_ARCHIVES:
        print(f"checking {manual / name}", file=sys.stderr)
        with (manual / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != known[name]:
            raise OSError(
                f"{manual / name} has the wrong checksum: sha256 must be "
                f"{known[name]}, got {digest}. The file is damaged or another one: "
                "get it again."
            )
