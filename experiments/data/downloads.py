"""The source files of data sets: find or download them, and verify them."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable

import numpy as np

# Folder of Debian's package dataset-fashion-mnist.
DEBIAN_FASHION_MNIST = pathlib.Path("/usr/share/datasets/fashion-mnist")
DEBIAN_PACKAGE = "dataset-fashion-mnist"

# Unix times in the gzip headers of the original files of Fashion-MNIST.
_FASHION_MNIST_TIMES = {"train": 1504176606, "t10k": 1504176627}


@dataclasses.dataclass(frozen=True)
class Archive:
    """A source file of a data set.

    Attributes:
      name: Name of the file.
      sha256: SHA-256 of its content in hexadecimal digits.
      url: Address for the download; None if it must be obtained by hand.
    """

    name: str
    sha256: str
    url: str | None = None


def content(
    archive: Archive,
    manual_dir: pathlib.Path,
    debian_dir: pathlib.Path | None,
    download: Callable[[str], pathlib.Path],
) -> bytes:
    """Return the verified content of a source file.

    The file comes from `manual_dir`, otherwise from Debian's package in `debian_dir`,
    otherwise from the network.

    Args:
      archive: The source file.
      manual_dir: Folder of files obtained by hand.
      debian_dir: Folder of Debian's package; None if the data set has no package.
      download: Function from an address to the path of the downloaded file.

    Raises:
      FileNotFoundError: The file must be put into `manual_dir` by hand.
      OSError: The content is not the expected one, or the download failed.
    """
    path = manual_dir / archive.name
    if path.is_file():
        data = path.read_bytes()
    elif debian_dir is not None and (debian_dir / archive.name).is_file():
        path = debian_dir / archive.name
        data = with_original_header(path)
    elif archive.url is not None:
        try:
            path = pathlib.Path(download(archive.url))
            data = path.read_bytes()
        except Exception as error:
            raise OSError(
                f"{archive.name} could not be downloaded from {archive.url} ({error}). "
                f"Put the file (sha256 {archive.sha256}) into {manual_dir}, then "
                "prepare again."
            ) from error
    else:
        raise FileNotFoundError(
            f"{archive.name} is not in {manual_dir}. Put the file (sha256 "
            f"{archive.sha256}) there, or give its folder by --manual-dir."
        )
    digest = hashlib.sha256(data).hexdigest()
    if digest != archive.sha256:
        raise OSError(
            f"{path} has the wrong checksum: sha256 must be {archive.sha256}, got "
            f"{digest}. The file is damaged or another one: remove it, and get it "
            "again."
        )
    return data


def with_original_header(path: pathlib.Path) -> bytes:
    """Read a file of Debian's Fashion-MNIST and restore its original gzip header.

    Debian's files differ from the original files only in this header, which has another
    time and no file name.

    Raises:
      OSError: The file does not have Debian's header.
    """
    data = path.read_bytes()
    # The two magic bytes, the method deflate, and no flags.
    if data[:4] != b"\x1f\x8b\x08\x00":
        raise OSError(
            f"{path} is not a file of Debian's package {DEBIAN_PACKAGE}: its gzip "
            "header differs. Install the package again."
        )
    time = _FASHION_MNIST_TIMES[path.name.split("-")[0]].to_bytes(4, "little")
    header = b"\x1f\x8b\x08\x08" + time + b"\x00\x03"
    return header + path.stem.encode() + b"\x00" + data[10:]


def read_idx(data: bytes, name: str) -> np.ndarray:
    """Return the uint8 array in the bytes of an idx file.

    Raises:
      OSError: The bytes are not an idx file of unsigned bytes.
    """
    if data[:3] == b"\x00\x00\x08" and len(data) >= 4:
        start = 4 + 4 * data[3]
        shape = tuple(np.frombuffer(data[4:start], ">u4").astype(int).tolist())
        if len(shape) == data[3] and len(data) - start == np.prod(shape, dtype=int):
            return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
    raise OSError(f"{name} is not an idx file of unsigned bytes, or it is incomplete.")
