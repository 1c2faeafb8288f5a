"""Data sets: what is read is what the original files hold, or a clear error."""

import collections
import dataclasses
import fcntl
import functools
import gc
import gzip
import hashlib
import http.server
import io
import itertools
import json
import math
import multiprocessing
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
from typing import Any

import numpy as np
import PIL.Image
import pytest
import scipy.stats
import sklearn.datasets
import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants

from experiments import data, prepare
from experiments.data import downloads, preparation
from experiments.data import imagenet as stream

ROOT = pathlib.Path(__file__).parents[2]
PREPARE = [sys.executable, "-m", "experiments.prepare"]


@pytest.fixture(autouse=True)
def network(monkeypatch) -> list[Any]:
    """Cuts off all but this machine; holds what was tried."""
    attempts: list[Any] = []
    look_up, connect = socket.getaddrinfo, socket.socket.connect

    def only_local_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host == "127.0.0.1":
            return look_up(host, *args, **kwargs)
        attempts.append(host)
        raise socket.gaierror("no network")

    def only_local_connect(self: socket.socket, address: Any) -> Any:
        if address[0] == "127.0.0.1":
            return connect(self, address)
        attempts.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", only_local_look_up)
    monkeypatch.setattr(socket.socket, "connect", only_local_connect)
    return attempts


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> pathlib.Path:
    """A folder of prepared data sets, to share and not to damage."""
    return tmp_path_factory.mktemp("data")


def rows(part: data.Split) -> collections.Counter[bytes]:
    """Every image with its label, whatever the order."""
    images = np.asarray(part.inputs)
    return collections.Counter(
        bytes([label, *image.ravel()])
        for label, image in zip(np.asarray(part.labels), images, strict=True)
    )


def equal(one: Any, other: Any) -> bool:
    return all(
        a.dtype == b.dtype and np.array_equal(a, b)
        for a, b in zip(one, other, strict=True)
    )


def random_images(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- digits


def test_digits_are_split_into_disjoint_parts_that_are_complete(data_dir):
    dataset = data.load("digits", data_dir)
    images, labels = map(np.asarray, sklearn.datasets.load_digits(return_X_y=True))
    assert len(labels) == 1797
    # From 0..16 to 0..255, rounded half to even as NumPy does.
    scaled = np.round(images * 255 / 16).astype(np.uint8)
    assert rows(dataset.train) + rows(dataset.test) == rows(data.Split(scaled, labels))
    assert (len(dataset.train.labels), len(dataset.test.labels)) == (1201, 596)
    for label in range(10):
        found = int(np.sum(dataset.test.labels == label))
        assert found == int(np.sum(labels == label)) // 3
    assert dataset.train.inputs.shape == (1201, 8, 8, 1)
    assert dataset.train.labels.dtype == np.int32
    assert dataset.classes == 10
    # Both parts keep the order of the file.
    seen = collections.Counter[int]()
    is_test = []
    for label in labels:
        seen[label] += 1
        is_test.append(seen[label] % 3 == 0)
    for part, chosen in (
        (dataset.test, np.array(is_test)),
        (dataset.train, ~np.array(is_test)),
    ):
        assert np.array_equal(part.inputs.reshape(-1, 64), scaled[chosen])
        assert np.array_equal(part.labels, labels[chosen])


def test_the_split_is_the_same_every_time(data_dir, tmp_path):
    one, other = data.load("digits", data_dir), data.load("digits", tmp_path)
    assert equal([*one.train, *one.test], [*other.train, *other.test])
    assert (one.mean, one.std) == (other.mean, other.std)


def test_normalised_training_images_have_mean_0_and_deviation_1(data_dir):
    dataset = data.load("digits", data_dir)
    x = (dataset.train.inputs / 255 - dataset.mean) / dataset.std
    assert abs(x.mean()) < 1e-12
    assert abs(x.std() - 1) < 1e-12


# --- arrays


def colours(n: int = 40) -> data.Split:
    images = random_images(0, n, 6, 5, 3)
    images[..., 2] = 7
    return data.Split(images, np.arange(n, dtype=np.int32) % 4)


@pytest.mark.parametrize("n", [40, 2500])
def test_statistics_are_those_of_the_training_images(n):
    dataset = data.from_arrays("colours", colours(n), colours(9), classes=4)
    images = colours(n).inputs.astype(np.float64) / 255
    assert np.allclose(dataset.mean, images.mean((0, 1, 2)), rtol=0, atol=1e-12)
    std = images.std((0, 1, 2))
    assert np.allclose(dataset.std[:2], std[:2], rtol=0, atol=1e-12)
    # Of a channel that is constant, nothing to divide by.
    assert dataset.std[2] == 1.0


TEXT = data.Split(
    np.zeros((3, 8), np.uint8), np.ones((3, 8), np.int32)
)  # rows of eight bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s._replace(inputs=s.inputs / 255), "must be uint8"),
        (lambda s: s._replace(inputs=s.inputs[..., 0]), "must be uint8 of shape"),
        (lambda s: data.Split(s.inputs[:0], s.labels[:0]), "with n > 0"),
        (lambda s: s._replace(labels=s.labels[1:]), "must be int32 of shape"),
        (lambda s: s._replace(labels=s.labels.astype(int)), "must be int32"),
        (lambda s: s._replace(labels=s.labels + 1), "in 0 to 3, got 1 to 4"),
        (lambda s: s._replace(inputs=s.inputs[:, :4]), "must have one shape"),
        (lambda _: TEXT, "must have one shape"),
        (lambda _: TEXT._replace(labels=TEXT.labels[:, 0]), r"of shape \(3, 8\)"),
    ],
)
def test_arrays_that_are_no_data_set_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        data.from_arrays("colours", colours(), change(colours(9)), classes=4)


# --- the files of other people


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def put(folder: pathlib.Path, contents: dict[str, bytes]) -> dict[str, str]:
    """Writes files; returns their checksums."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: sha256(content) for name, content in contents.items()}


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def mnist_parts() -> dict[str, data.Split]:
    return {
        "train": data.Split(
            random_images(1, 40, 28, 28, 1), np.arange(40, dtype=np.int32) % 10
        ),
        "t10k": data.Split(
            random_images(2, 12, 28, 28, 1), np.arange(12, dtype=np.int32) % 10
        ),
    }


def mnist_files(times: dict[str, int]) -> dict[str, bytes]:
    """Files as the gzip program makes them: with name and time."""
    found = {}
    for prefix, (images, labels) in mnist_parts().items():
        for kind, array in (
            ("images-idx3", images[..., 0]),
            ("labels-idx1", labels.astype(np.uint8)),
        ):
            name = f"{prefix}-{kind}-ubyte"
            buffer = io.BytesIO()
            with gzip.GzipFile(name, "wb", 6, buffer, times[prefix]) as file:
                file.write(idx(array))
            content = bytearray(buffer.getvalue())
            # Python leaves the system unknown; gzip says Unix.
            content[8:10] = b"\x00\x03"
            found[name + ".gz"] = bytes(content)
    return found


ORIGINAL_TIMES = {"train": 1504176606, "t10k": 1504176627}


def without_name(content: bytes) -> bytes:
    """A gzip file as Debian has it: another time, and no name."""
    assert content[3] == 8
    end = content.index(b"\0", 10) + 1
    time = (1591347949).to_bytes(4, "little")
    return b"\x1f\x8b\x08\x00" + time + content[8:10] + content[end:]


def cifar_archive(prefix: str, members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def cifar_rows(part: data.Split, coarse: list[int] | None) -> bytes:
    """Labels and then all red, all green, all blue, row by row."""
    content = b""
    for index, (image, label) in enumerate(zip(*part, strict=True)):
        heads = [label] if coarse is None else [coarse[index], label]
        content += bytes(heads) + b"".join(
            image[:, :, channel].tobytes() for channel in range(3)
        )
    return content


def cifar(name: str) -> tuple[dict[str, bytes], data.Split, data.Split]:
    classes = 10 if name == "cifar10" else 100
    train, test = (
        data.Split(
            random_images(seed, n, 32, 32, 3),
            np.arange(n, dtype=np.int32) * 7 % classes,
        )
        for seed, n in ((3, 30), (4, 11))
    )
    if name == "cifar10":
        members = {
            f"data_batch_{number}.bin": cifar_rows(
                data.Split(*(part[6 * number - 6 : 6 * number] for part in train)), None
            )
            for number in range(1, 6)
        }
        members |= {
            "batches.meta.txt": "\n".join(map(str, range(10))).encode() + b"\n\n",
            "test_batch.bin": cifar_rows(test, None),
        }
        prefix = "cifar-10-batches-bin/"
        return {"cifar-10-binary.tar.gz": cifar_archive(prefix, members)}, train, test
    members = {
        "coarse_label_names.txt": "\n".join(f"c{i}" for i in range(20)).encode(),
        "fine_label_names.txt": "\n".join(f"f{i}" for i in range(100)).encode(),
        "train.bin": cifar_rows(train, [i % 20 for i in range(30)]),
        "test.bin": cifar_rows(test, [i % 20 for i in range(11)]),
    }
    prefix = "cifar-100-binary/"
    return {"cifar-100-binary.tar.gz": cifar_archive(prefix, members)}, train, test


def encoded(image: np.ndarray, kind: str = "jpeg") -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def decoded(content: bytes) -> np.ndarray:
    """Pixels with three channels, equal where the image is gray."""
    pixels = np.asarray(PIL.Image.open(io.BytesIO(content)))
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


def tiny_imagenet() -> tuple[dict[str, bytes], data.Split, data.Split]:
    ids = [f"n{number:08}" for number in range(200)]
    shuffled = ids[::-1]
    train: tuple[list[np.ndarray], list[int]] = ([], [])
    test: tuple[list[np.ndarray], list[int]] = ([], [])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        root = "tiny-imagenet-200/"
        archive.writestr(root + "wnids.txt", "\n".join(shuffled) + "\n")
        for label in (0, 3, 199):
            for number in range(4):
                image = random_images(label * 10 + number, 64, 64, 3)
                # Some of the original ones are gray.
                content = encoded(image[..., 0] if number == 2 else image)
                folder = f"{root}train/{ids[label]}/"
                archive.writestr(f"{folder}images/{ids[label]}_{number}.JPEG", content)
                train[0].append(decoded(content))
                train[1].append(label)
            archive.writestr(f"{root}train/{ids[label]}/{ids[label]}_boxes.txt", "")
        lines = []
        for number, label in enumerate((199, 0, 3, 3, 0)):
            content = encoded(random_images(5000 + number, 64, 64, 3))
            archive.writestr(f"{root}val/images/val_{number}.JPEG", content)
            lines.append(f"val_{number}.JPEG\t{ids[label]}\t0\t32\t44\t62")
            test[0].append(decoded(content))
            test[1].append(label)
        archive.writestr(root + "val/val_annotations.txt", "\n".join(lines) + "\n")
        archive.writestr(root + "test/images/test_0.JPEG", encoded(image))
    parts = (
        data.Split(np.stack(images), np.array(labels, np.int32))
        for images, labels in (train, test)
    )
    return {"tiny-imagenet-200.zip": buffer.getvalue()}, *parts


def made_up(name: str) -> tuple[dict[str, bytes], data.Split, data.Split]:
    """Small files in the format of the original ones, and what they hold."""
    if name in ("mnist", "fashion_mnist"):
        parts = mnist_parts()
        return mnist_files(ORIGINAL_TIMES), parts["train"], parts["t10k"]
    return tiny_imagenet() if name == "tiny_imagenet" else cifar(name)


MADE_UP = ("mnist", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet")
CLASSES = dict(zip(MADE_UP, (10, 10, 10, 100, 200), strict=True))


@pytest.fixture(scope="module")
def made_up_dir(tmp_path_factory) -> pathlib.Path:
    """A folder of data sets prepared from files made up here."""
    folder = tmp_path_factory.mktemp("made-up")
    for name in MADE_UP:
        manual = folder / "manual" / name
        checksums = put(manual, made_up(name)[0])
        path, had_to = preparation.prepare(name, folder, manual, checksums=checksums)
        assert had_to
        assert path.parent == folder / name
    text = SHAKESPEARE.encode()
    checksums = put(folder / "downloads" / "manual", {"input.txt": text})
    preparation.prepare("tiny_shakespeare", folder, checksums=checksums)
    return folder


SHAKESPEARE = "".join(f"Citizen {number}: Speak, spéak.\n" for number in range(300))


@pytest.mark.parametrize("name", MADE_UP)
def test_what_is_read_is_what_the_files_hold(name, made_up_dir, network):
    _, train, test = made_up(name)
    dataset = data.load(name, made_up_dir)
    assert rows(dataset.train) == rows(train)
    assert rows(dataset.test) == rows(test)
    assert dataset.train.inputs.shape == train.inputs.shape
    assert dataset.name == name
    assert dataset.classes == CLASSES[name]
    assert not network


@pytest.mark.parametrize(
    "name", ["mnist", "fashion_mnist", "cifar10", "cifar100", "tiny_shakespeare"]
)
def test_the_catalogue_opens_what_was_prepared(name, made_up_dir, tmp_path):
    catalogue: Any = tfds.builder(name, data_dir=made_up_dir)
    blank: Any = tfds.builder(name, data_dir=tmp_path)
    assert type(catalogue).__module__.startswith("tensorflow_datasets.")
    assert catalogue.is_prepared()
    assert not blank.is_prepared()
    ours = tfds.builder_from_directory(catalogue.data_dir)
    assert ours.version == blank.version
    written, known = (
        {name: repr(feature) for name, feature in builder.info.features.items()}
        for builder in (ours, blank)
    )
    assert written == known
    assert ours.info.supervised_keys == blank.info.supervised_keys
    assert ours.info.description == blank.info.description
    splits = {"train", "test"} | ({"validation"} if "text" in known else set())
    assert set(catalogue.info.splits) == splits
    example = catalogue.as_data_source("train")[0]
    assert set(example) == set(known)
    if "image" in example:
        assert example["image"].shape == blank.info.features["image"].shape
        part = data.Split(example["image"][None], np.array([example["label"]]))
        assert rows(part) <= rows(made_up(name)[1])


def test_label_names_and_ids_of_cifar_are_kept(made_up_dir):
    source = tfds.data_source("cifar100", split="train", data_dir=made_up_dir)
    features = source.dataset_info.features
    assert features["label"].names[99] == "f99"
    assert features["coarse_label"].names == [f"c{i}" for i in range(20)]
    by_id = {example["id"].decode(): example for example in source}
    assert sorted(by_id) == [f"train_{index:05d}" for index in range(30)]
    assert by_id["train_00023"]["coarse_label"] == 3
    assert by_id["train_00023"]["label"] == 23 * 7 % 100


# --- text


def check_text(part: data.Split, text: bytes) -> None:
    """Rows of 128 bytes, one after the other, and the byte that follows each."""
    n = (len(text) - 1) // 128
    assert part.inputs.shape == part.labels.shape == (n, 128)
    assert (part.inputs.dtype, part.labels.dtype) == (np.uint8, np.int32)
    assert part.inputs.tobytes() == text[: n * 128]
    assert part.labels.astype(np.uint8).tobytes() == text[1 : n * 128 + 1]


def test_tiny_shakespeare_is_cut_as_in_the_catalogue(made_up_dir):
    dataset = data.load("tiny_shakespeare", made_up_dir)
    characters = len(SHAKESPEARE)
    # In characters, of which some have two bytes.
    check_text(dataset.train, SHAKESPEARE[: int(characters * 0.9)].encode())
    rest = SHAKESPEARE[int(characters * 0.9) :]
    check_text(dataset.test, rest[int(len(rest) * 0.5) :].encode())
    assert (dataset.classes, dataset.mean, dataset.std) == (256, (), ())


def test_python_docs_needs_no_files_and_ends_in_its_test_data(data_dir, network):
    from pydoc_data.topics import topics

    dataset = data.load("python_docs", data_dir)
    text = "\n".join(topics[name] for name in sorted(topics))
    cut = math.floor(len(text) * 0.9)
    check_text(dataset.train, text[:cut].encode())
    check_text(dataset.test, text[cut:].encode())
    assert len(dataset.test.labels) > 200
    folder = preparation.builder_of("python_docs", data_dir).data_dir
    version = "{}.{}.0".format(*sys.version_info)
    assert pathlib.Path(folder).name == version
    assert not network


# --- Debian's Fashion-MNIST


def test_debian_files_get_their_original_header_back(tmp_path, monkeypatch, network):
    originals = mnist_files(ORIGINAL_TIMES)
    put(tmp_path / "debian", {n: without_name(c) for n, c in originals.items()})
    for name, content in originals.items():
        assert downloads.with_original_header(tmp_path / "debian" / name) == content
    monkeypatch.setattr(downloads, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    assert preparation.is_available("fashion_mnist")
    assert not preparation.is_available("mnist")
    checksums = {name: sha256(content) for name, content in originals.items()}
    preparation.prepare("fashion_mnist", tmp_path, checksums=checksums)
    dataset = data.load("fashion_mnist", tmp_path)
    assert rows(dataset.train) == rows(mnist_parts()["train"])
    assert not network


def test_debian_files_that_are_others_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    put(
        tmp_path / "debian",
        {n: without_name(c) for n, c in mnist_files(ORIGINAL_TIMES).items()},
    )
    # Found, so it is tried at once; but these are not the 70,000 images.
    with pytest.raises(OSError, match="has the wrong checksum: sha256 must be"):
        data.load("fashion_mnist", tmp_path)
    put(tmp_path / "debian", mnist_files(ORIGINAL_TIMES))
    with pytest.raises(OSError, match="not a file of Debian's package"):
        data.load("fashion_mnist", tmp_path)


def test_fashion_mnist_of_the_package_is_complete(data_dir, tmp_path, network):
    """The real images, where Debian's package is installed."""
    folder = downloads.DEBIAN_FASHION_MNIST
    sizes = {"train": 60_000, "t10k": 10_000}
    if not folder.exists():
        folder, sizes = tmp_path, {"train": 40, "t10k": 12}
        checksums = put(folder, mnist_files(ORIGINAL_TIMES))
        preparation.prepare("fashion_mnist", data_dir, folder, checksums=checksums)
    dataset = data.load("fashion_mnist", data_dir)
    for prefix, part in (("train", dataset.train), ("t10k", dataset.test)):
        with gzip.open(folder / f"{prefix}-images-idx3-ubyte.gz") as file:
            images = np.frombuffer(file.read()[16:], np.uint8).reshape(-1, 28, 28, 1)
        with gzip.open(folder / f"{prefix}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read()[8:], np.uint8)
        assert part.inputs.shape == (sizes[prefix], 28, 28, 1)
        # TFDS shuffles; every image must be there with its own label.
        wanted, found = (
            collections.Counter(
                (label, image.tobytes()) for image, label in zip(*each, strict=True)
            )
            for each in ((images, labels.tolist()), (part.inputs, part.labels.tolist()))
        )
        assert wanted == found
    if sizes["train"] == 60_000:
        assert np.bincount(dataset.train.labels).tolist() == [6000] * 10
        assert np.bincount(dataset.test.labels).tolist() == [1000] * 10
        assert np.allclose((*dataset.mean, *dataset.std), (0.28604, 0.35302), atol=1e-5)
    assert not network


# --- what can go wrong


@pytest.mark.parametrize("name", ["mnist", "cifar10", "tiny_imagenet"])
def test_a_file_with_a_wrong_checksum_is_refused(name, tmp_path, network):
    contents = made_up(name)[0]
    first = next(iter(contents))
    # Not the original ones: the known checksums do not fit.
    put(tmp_path / "manual", contents)
    with pytest.raises(OSError, match="has the wrong checksum: sha256 must be"):
        preparation.prepare(name, tmp_path, tmp_path / "manual")
    # One bit of what was expected.
    checksums = {n: sha256(c) for n, c in contents.items()}
    damaged = bytearray(contents[first])
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "manual" / first).write_bytes(damaged)
    with pytest.raises(OSError, match=f"sha256 must be {checksums[first]}, got"):
        preparation.prepare(name, tmp_path, tmp_path / "manual", checksums=checksums)
    # Nothing is left that looks prepared.
    with pytest.raises(FileNotFoundError, match="is not in"):
        data.load(name, tmp_path)
    put(tmp_path / "manual", contents)
    assert preparation.prepare(
        name, tmp_path, tmp_path / "manual", checksums=checksums
    )[1]
    assert not network


def test_known_checksums_are_those_that_are_registered():
    for name in ("mnist", "fashion_mnist", "cifar10", "cifar100", "tiny_shakespeare"):
        catalogue: Any = tfds.builder_cls(name)
        archives = preparation.tfds_builders.BUILDERS[name].archives()
        assert len(archives) == (4 if "mnist" in name else 1)
        for archive in archives:
            assert catalogue.url_infos[archive.url].checksum == archive.sha256
            assert len(archive.sha256) == 64


NEEDS_COMMAND = [
    ("mnist", "train-images-idx3-ubyte.gz"),
    ("cifar10", "cifar-10-binary.tar.gz"),
    ("cifar100", "cifar-100-binary.tar.gz"),
    ("tiny_imagenet", "tiny-imagenet-200.zip"),
    ("tiny_shakespeare", "input.txt"),
    ("imagenet2012", "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar"),
]


@pytest.mark.parametrize(("name", "file"), NEEDS_COMMAND)
def test_a_data_set_that_is_not_there_comes_with_the_command(
    name, file, tmp_path, monkeypatch, network
):
    folder = tmp_path / "my data"
    with pytest.raises(FileNotFoundError) as caught:
        data.load(name, folder)
    command = f"python -m experiments.prepare {name}"
    assert f"`{command} --data-dir '{folder}'`" in str(caught.value)
    assert file in str(caught.value)
    assert f"into {folder}/downloads/manual" in str(caught.value)
    # Without a folder, the command needs none.
    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"`{command}`"):
        data.load(name)
    assert not network
    assert not folder.exists()


def test_fashion_mnist_without_the_package_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "DEBIAN_FASHION_MNIST", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="package dataset-fashion-mnist has"):
        data.load("fashion_mnist", tmp_path)


def test_an_unknown_data_set_is_told_from_the_known_ones(tmp_path):
    for name, nearest in (("fashion-mnist", "fashion_mnist"), ("cifar", "cifar10")):
        with pytest.raises(ValueError, match=f"Did you mean '{nearest}'") as caught:
            data.load(name, tmp_path)
        assert all(each in str(caught.value) for each in data.NAMES)


def test_a_download_without_network_fails_at_once_and_says_what_to_do(
    tmp_path, network, capsys
):
    assert prepare.main(["cifar10", "--data-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "error: cifar-10-binary.tar.gz could not be downloaded" in error
    assert f"into {tmp_path}/downloads/manual" in error
    assert network


def test_what_is_downloaded_is_verified(tmp_path, monkeypatch, network):
    served = tmp_path / "served"
    checksum = put(served, {"input.txt": SHAKESPEARE.encode()})["input.txt"]
    handler = functools.partial(QuietHandler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/input.txt"
        builder = preparation.tfds_builders.BUILDERS["tiny_shakespeare"]
        (known,) = builder.url_infos.values()
        size = type(known.size)(len(SHAKESPEARE.encode()))
        info = dataclasses.replace(known, size=size, checksum=checksum)
        monkeypatch.setattr(builder, "url_infos", {url: info})
        # The first answer is another text, of the same length.
        put(served, {"input.txt": SHAKESPEARE.swapcase().encode()})
        with pytest.raises(OSError, match="could not be downloaded") as caught:
            preparation.prepare("tiny_shakespeare", tmp_path / "data")
        assert "wrong checksum" in str(caught.value)
        put(served, {"input.txt": SHAKESPEARE.encode()})
        preparation.prepare("tiny_shakespeare", tmp_path / "data")
        server.shutdown()
    dataset = data.load("tiny_shakespeare", tmp_path / "data")
    check_text(dataset.train, SHAKESPEARE[: int(len(SHAKESPEARE) * 0.9)].encode())
    assert not network


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def digits_copy(data_dir, tmp_path) -> pathlib.Path:
    """The folder of a prepared data set, to damage."""
    data.load("digits", data_dir)
    shutil.copytree(data_dir / "digits", tmp_path / "digits")
    return tmp_path / "digits" / "1.0.0"


def damage_flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("change", [damage_flip, damage_cut, pathlib.Path.unlink])
@pytest.mark.parametrize(
    "file",
    [
        "digits-train.array_record-00000-of-00001",
        "digits-test.array_record-00000-of-00001",
        "features.json",
        "dataset_info.json",
    ],
)
def test_damaged_data_are_named(change, file, digits_copy):
    if file.endswith("json") and change is damage_flip:
        (digits_copy / file).write_bytes(b"")
    else:
        change(digits_copy / file)
    root = digits_copy.parent.parent
    with pytest.raises(OSError, match=re.escape(str(digits_copy.parent))) as caught:
        data.load("digits", root)
    remedy = f"run `python -m experiments.prepare digits --data-dir {root}`"
    assert f"Remove the folder, then {remedy}" in str(caught.value)
    shutil.rmtree(digits_copy)
    assert len(data.load("digits", root).train.labels) == 1201


def test_data_in_another_format_are_left_alone(digits_copy):
    info = digits_copy / "dataset_info.json"
    changed = json.loads(info.read_text()) | {"fileFormat": "tfrecord"}
    info.write_text(json.dumps(changed))
    with pytest.raises(OSError, match="files in the format tfrecord"):
        data.load("digits", digits_copy.parent.parent)


def test_the_command_prepares_once_and_reports(tmp_path, capsys):
    args = ["digits", "--data-dir", str(tmp_path)]
    assert prepare.main(args) == 0
    folder = tmp_path / "digits" / "1.0.0"
    assert f"digits is in {folder}: prepared in" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare.main(args) == 0
    assert "was prepared already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare.main(["digit"]) == 2
    assert "error: there is no data set 'digit'. Did you" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert prepare.main(["digits", "--data-dir", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_only_one_process_at_a_time_prepares(tmp_path):
    with open(tmp_path / ".digits.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = subprocess.Popen(
            [*PREPARE, "digits", "--data-dir", str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert waiting.stderr is not None
        assert "waiting for another process" in waiting.stderr.readline()
        assert not (tmp_path / "digits").exists()
        # What the other one prepares meanwhile is not prepared again.
        preparation_of_other = tmp_path / "elsewhere"
        preparation.prepare("digits", preparation_of_other)
        shutil.move(preparation_of_other / "digits", tmp_path / "digits")
    out, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 0
    assert "was prepared already" in out


def test_a_killed_preparation_leaves_nothing_that_looks_complete(tmp_path):
    script = """
import os, signal, sys
from experiments.data import tfds_builders, preparation
whole = tfds_builders.Digits._generate_examples
def examples(*args):
    for key, example in whole(*args):
        if len(args[1]) == 596 and key == 300:  # the training images are written
            os.kill(os.getpid(), signal.SIGKILL)
        yield key, example
tfds_builders.Digits._generate_examples = examples
preparation.prepare("digits", sys.argv[1])
"""
    killed = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    (leftover,) = (tmp_path / "digits").iterdir()
    assert leftover.name.startswith("incomplete.")
    assert len(data.load("digits", tmp_path).train.labels) == 1201
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_imagenet_says_what_its_preparation_needs(tmp_path, monkeypatch, capsys):
    args = ["imagenet2012", "--data-dir", str(tmp_path)]
    assert prepare.main(args) == 2
    error = capsys.readouterr().err
    assert f"put ILSVRC2012_img_train.tar into {tmp_path}/downloads/manual" in error
    archives = {name: name.encode() for name in preparation.IMAGENET_ARCHIVES}
    put(tmp_path / "downloads" / "manual", archives)
    finding = preparation.importlib.util
    monkeypatch.setattr(finding, "find_spec", lambda name: None)
    assert prepare.main(args) == 2
    assert "run `pip install '.[imagenet]'`" in capsys.readouterr().err
    monkeypatch.setattr(finding, "find_spec", lambda name: object())
    assert prepare.main(args) == 2
    error = capsys.readouterr().err
    assert (
        "ILSVRC2012_img_train.tar has the wrong checksum: sha256 must be b08" in error
    )


# --- ImageNet

TRAIN_SIZE, TEST_SIZE = 23, 10


def picture(seed: int) -> np.ndarray:
    """Of another size and colour each."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(60, 400, 2)
    ramp = np.linspace(0, 120, width)[None, :, None]
    return (np.ones((height, 1, 1)) * ramp + rng.uniform(0, 130, 3)).astype(np.uint8)


_Catalogue: Any = tfds.builder_cls("imagenet2012")


class MadeUpImagenet(_Catalogue, skip_registration=True):
    """The catalogue's features; the label of an image is its number."""

    name = "imagenet2012"
    pkg_dir_path = _Catalogue.pkg_dir_path
    splits = (("train", TRAIN_SIZE), ("validation", TEST_SIZE))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split, n) for split, n in self.splits}

    def _generate_examples(self, split, n):
        for number in range(n):
            seed = number + (0 if split == "train" else 1000)
            image = encoded(picture(seed))
            yield (
                f"{split}{number}",
                {"image": image, "label": number, "file_name": f"{split}{number}"},
            )


def write_imagenet(folder: pathlib.Path, builder: Any = MadeUpImagenet) -> None:
    builder(data_dir=folder).download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
    )


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> data.Stream:
    folder = tmp_path_factory.mktemp("imagenet")
    write_imagenet(folder)
    found = data.load("imagenet2012", folder)
    assert isinstance(found, data.Stream)
    return found


def take(batches: Any, n: int) -> list[data.Split]:
    return list(itertools.islice(batches, n))


def joined(parts: list[list[data.Split]]) -> list[data.Split]:
    """Global batches of what the processes hold."""
    return [
        data.Split(*map(np.concatenate, zip(*step, strict=True)))
        for step in zip(*parts, strict=True)
    ]


def same_batches(one: list[data.Split], other: list[data.Split]) -> bool:
    return len(one) == len(other) and all(
        equal(a, b) for a, b in zip(one, other, strict=True)
    )


def test_imagenet_is_a_stream(imagenet):
    assert (imagenet.train_size, imagenet.test_size) == (TRAIN_SIZE, TEST_SIZE)
    assert imagenet.classes == 1000
    assert imagenet.image_shape == (224, 224, 3)
    assert len(imagenet.mean) == len(imagenet.std) == 3
    (batch,) = take(imagenet.train_batches(seed=0, start=0, batch_size=4), 1)
    assert batch.inputs.shape == (4, 224, 224, 3)
    assert (batch.inputs.dtype, batch.labels.dtype) == (np.uint8, np.int32)


def test_every_pass_holds_every_image_once_in_an_order_of_its_own(imagenet):
    orders = set()
    for seed in (0, 1):
        batches = take(imagenet.train_batches(seed=seed, start=0, batch_size=6), 12)
        labels = np.concatenate([batch.labels for batch in batches])
        # Batches run on from one pass into the next.
        for start in (0, TRAIN_SIZE, 2 * TRAIN_SIZE):
            one = labels[start : start + TRAIN_SIZE]
            assert sorted(one) == list(range(TRAIN_SIZE))
            orders.add(tuple(one))
    assert len(orders) == 6


def test_batches_depend_on_seed_and_step_alone(imagenet):
    def batches(**kwargs: Any) -> list[data.Split]:
        start = kwargs.setdefault("start", 0)
        return take(imagenet.train_batches(seed=7, batch_size=4, **kwargs), 8 - start)

    whole = batches()
    assert same_batches(batches(), whole)
    for start in (1, 5, 7):
        assert same_batches(batches(start=start), whole[start:])
    for processes in (2, 4):
        parts = [
            batches(start=3, process=process, processes=processes)
            for process in range(processes)
        ]
        assert all(len(batch.labels) == 4 // processes for batch in parts[0])
        assert same_batches(joined(parts), whole[3:])
    # An image comes again in the next pass, with another crop.
    assert not same_batches(whole[:2], whole[6:])


def test_workers_change_nothing(imagenet):
    for make, n in (
        (lambda **k: imagenet.train_batches(seed=3, start=2, batch_size=4, **k), 5),
        (lambda **k: imagenet.test_batches(batch_size=4, **k), 3),
    ):
        assert same_batches(take(make(workers=2), n), take(make(), n))
    gc.collect()
    assert not multiprocessing.active_children()


def test_a_program_with_workers_ends_quietly(imagenet):
    folder = pathlib.Path(imagenet.train_source.dataset_info.data_dir).parent.parent
    script = f"""
from experiments import data
if __name__ == "__main__":
    stream = data.load("imagenet2012", {str(folder)!r})
    batches = stream.train_batches(seed=0, start=0, batch_size=2, workers=1)
    batch = next(batches)
    print(batch.inputs.shape)
"""
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.stdout.strip() == "(2, 224, 224, 3)"
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(("batch_size", "processes"), [(4, 1), (4, 2), (5, 1), (16, 4)])
def test_every_test_image_comes_exactly_once(imagenet, batch_size, processes):
    parts = [
        list(
            imagenet.test_batches(
                batch_size=batch_size, process=process, processes=processes
            )
        )
        for process in range(processes)
    ]
    steps = math.ceil(TEST_SIZE / batch_size)
    assert [len(part) for part in parts] == [steps] * processes
    images = np.concatenate([batch.inputs for batch in joined(parts)])
    labels = np.concatenate([batch.labels for batch in joined(parts)])
    assert len(labels) == steps * batch_size
    assert sorted(labels[labels >= 0]) == list(range(TEST_SIZE))
    assert np.all(labels[TEST_SIZE:] == -1)
    assert not images[labels < 0].any()
    for image, label in zip(images, labels, strict=True):
        if label >= 0:
            wanted = stream.test_image(encoded(picture(1000 + label)))
            assert np.array_equal(image, wanted)


def test_the_centre_of_a_test_image_is_cut_out():
    # The shorter side has 256 pixels already: no pixel changes.
    for height, width, top, left in ((256, 300, 16, 38), (411, 256, 93, 16)):
        image = random_images(height, height, width, 3)
        found = stream.test_image(encoded(image, "png"))
        assert np.array_equal(found, image[top : top + 224, left : left + 224])
    # Else it is resized: of a ramp over 512 columns, each is worth half of one.
    ramp = np.broadcast_to(np.arange(512) / 2, (600, 512))
    image = np.repeat(ramp[..., None], 3, axis=2).astype(np.uint8)
    found = stream.test_image(encoded(image, "png"))
    assert found.shape == (224, 224, 3)
    assert np.abs(found - (16.0 + np.arange(224)[None, :, None])).max() <= 1


def test_random_crops_have_the_areas_and_ratios_they_should():
    side, n = 100_000, 6000
    rng = np.random.default_rng(0)
    boxes = np.array([stream.random_crop(rng, side, side) for _ in range(n)])
    left, top, right, bottom = boxes.T
    width, height = right - left, bottom - top
    assert boxes.min() >= 0
    assert boxes.max() <= side
    area, ratio = width * height / side**2, np.log(width / height)
    assert area.min() > 0.0799
    # Crops of more than 3/4 of a square do not fit in every shape; all others do.
    fits = area < 0.75
    uniform = scipy.stats.uniform
    for sample, low, high in (
        (area[fits], 0.08, 0.75),
        (ratio[fits], math.log(3 / 4), math.log(4 / 3)),
        (left[fits] / (side - width[fits]), 0, 1),
        (top[fits] / (side - height[fits]), 0, 1),
    ):
        result = scipy.stats.kstest(sample, uniform(low, high - low).cdf)
        assert result.pvalue > 1e-3
    assert abs(np.corrcoef(area[fits], ratio[fits])[0, 1]) < 0.05
    # Two thirds of the rest of the areas, less what does not fit.
    assert 0.05 < 1 - fits.mean() < 0.25 / 0.92


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [(10_000, 12, (4992, 0, 5008, 12)), (9, 10_000, (0, 4994, 9, 5006))],
)
def test_where_no_crop_fits_the_centre_is_taken(width, height, box):
    found = stream.random_crop(np.random.default_rng(0), width, height)
    assert found == box


def test_crops_are_resized_and_half_of_them_are_mirrored():
    ramp = np.broadcast_to(np.linspace(0, 255, 320), (240, 320))
    image = encoded(np.repeat(ramp[..., None], 3, axis=2).astype(np.uint8), "png")
    n, mirrored = 300, 0
    for seed in range(n):
        found = stream.train_image(image, np.random.default_rng(seed))
        assert found.shape == (224, 224, 3)
        assert found.dtype == np.uint8
        line = found[112, :, 0].astype(int)
        box = stream.random_crop(np.random.default_rng(seed), 320, 240)
        ends = [box[0] * 255 / 319, (box[2] - 1) * 255 / 319]
        falls = line[0] > line[-1]
        mirrored += falls
        # The crop that the generator draws first, from edge to edge.
        assert np.abs(line[[-1, 0] if falls else [0, -1]] - ends).max() <= 2
    assert abs(mirrored - n / 2) < 4 * math.sqrt(n / 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"start": -1}, "start must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be a positive multiple"),
        ({"processes": 3}, "multiple of the number of processes, 3, got 4"),
        ({"process": 2, "processes": 2}, "process must lie in 0 to 1, got 2"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
    ],
)
def test_bad_arguments_of_a_stream_are_refused(imagenet, changes, message):
    with pytest.raises(ValueError, match=message):
        imagenet.train_batches(**({"seed": 0, "start": 0, "batch_size": 4} | changes))


def test_a_damaged_imagenet_is_named(tmp_path):
    class OneSplit(MadeUpImagenet, skip_registration=True):
        name = "imagenet2012"
        splits = (("train", 3),)

    write_imagenet(tmp_path / "one", OneSplit)
    with pytest.raises(OSError, match="there is no split 'validation'"):
        data.load("imagenet2012", tmp_path / "one")

    class NoImages(MadeUpImagenet, skip_registration=True):
        name = "imagenet2012"

        def _generate_examples(self, split, n):
            for key, example in super()._generate_examples(split, n):
                yield key, example | {"image": b"no image"}

    write_imagenet(tmp_path / "two", NoImages)
    broken = data.load("imagenet2012", tmp_path / "two")
    with pytest.raises(OSError, match=r"imagenet2012/5\.1\.0 cannot be read"):
        take(broken.train_batches(seed=0, start=0, batch_size=2), 1)
