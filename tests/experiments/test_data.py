"""Data sets: what is read is what the original files hold, or a clear error.

The original files are not here. Small files in the same formats stand in for them.
"""

import collections
import fcntl
import gzip
import hashlib
import io
import itertools
import json
import math
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import zipfile
from typing import Any

import numpy as np
import PIL.Image
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants

from experiments import data, prepare
from experiments.data import downloads, preparation
from experiments.data import tfds_builders as builders

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def network(monkeypatch) -> list[Any]:
    """Cuts off the network, and lists what was tried."""
    attempts: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        attempts.append(args)
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return attempts


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> pathlib.Path:
    """A folder of prepared data sets that the tests share and do not damage."""
    return tmp_path_factory.mktemp("data")


def rows(part: data.Split) -> collections.Counter[bytes]:
    """Count every image with its label, whatever the order."""
    images = np.asarray(part.inputs)
    return collections.Counter(
        bytes([label, *image.ravel()])
        for label, image in zip(np.asarray(part.labels), images, strict=True)
    )


def random_images(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_digits_are_split_by_class_and_complete(data_dir):
    dataset: Any = data.load("digits", data_dir)
    images, labels = map(np.asarray, sklearn.datasets.load_digits(return_X_y=True))
    # From 0..16 to 0..255, rounded half to even as NumPy does.
    scaled = np.round(images * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1)
    # Every third image of a class is test data. Both parts keep the order of the file.
    numbers = np.array([np.sum(labels[: i + 1] == x) for i, x in enumerate(labels)])
    for part, chosen in (
        (dataset.test, numbers % 3 == 0),
        (dataset.train, numbers % 3),
    ):
        np.testing.assert_array_equal(part.inputs, scaled[chosen > 0], strict=True)
        expected = labels[chosen > 0].astype(np.int32)
        np.testing.assert_array_equal(part.labels, expected, strict=True)
    assert (len(dataset.train.labels), len(dataset.test.labels)) == (1201, 596)
    assert dataset.classes == 10
    x = (dataset.train.inputs / 255 - dataset.mean) / dataset.std
    assert abs(x.mean()) < 1e-12
    assert abs(x.std() - 1) < 1e-12


def colours(n: int = 40) -> data.Split:
    images = random_images(0, n, 6, 5, 3)
    images[..., 2] = 7
    return data.Split(images, np.arange(n, dtype=np.int32) % 4)


def test_statistics_are_those_of_the_training_images():
    dataset = data.from_arrays("colours", colours(2500), colours(9), classes=4)
    images = colours(2500).inputs.astype(np.float64) / 255
    assert np.allclose(dataset.mean, images.mean((0, 1, 2)), rtol=0, atol=1e-12)
    std = images.std((0, 1, 2))
    # A constant channel is divided by 1.
    assert np.allclose(dataset.std, (*std[:2], 1.0), rtol=0, atol=1e-12)


def test_arrays_that_are_no_data_set_are_refused():
    s = colours(9)
    for test, message in (
        (s._replace(inputs=s.inputs / 255), "must be uint8 of shape"),
        (data.Split(s.inputs[:0], s.labels[:0]), "with n > 0"),
        (s._replace(labels=s.labels[1:]), "must be int32 of shape"),
        (s._replace(labels=s.labels + 1), "in 0 to 3, got 1 to 4"),
        (s._replace(inputs=s.inputs[:, :4]), "must have one shape"),
    ):
        with pytest.raises(ValueError, match=message):
            data.from_arrays("colours", colours(), test, classes=4)


def check_text(part: data.Split, text: bytes) -> None:
    """Assert rows of 128 bytes one after the other, and the byte that follows each."""
    n = (len(text) - 1) // 128
    assert part.inputs.shape == part.labels.shape == (n, 128)
    assert (part.inputs.dtype, part.labels.dtype) == (np.uint8, np.int32)
    assert part.inputs.tobytes() == text[: n * 128]
    assert part.labels.astype(np.uint8).tobytes() == text[1 : n * 128 + 1]


def test_python_docs_needs_no_files_and_ends_in_its_test_data(data_dir, network):
    from pydoc_data.topics import topics

    dataset = data.load("python_docs", data_dir)
    text = "\n".join(topics[name] for name in sorted(topics))
    cut = math.floor(len(text) * 0.9)
    check_text(dataset.train, text[:cut].encode())
    check_text(dataset.test, text[cut:].encode())
    assert len(dataset.test.labels) > 200
    folder = preparation.builder_of("python_docs", data_dir).data_dir
    assert pathlib.Path(folder).name == "{}.{}.0".format(*sys.version_info)
    assert not network


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def put(folder: pathlib.Path, contents: dict[str, bytes]) -> dict[str, str]:
    """Write files, and return their checksums."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: sha256(content) for name, content in contents.items()}


def png_or_jpeg(image: np.ndarray, kind: str = "jpeg") -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def labelled(seed: int, n: int, side: int, channels: int, classes: int) -> data.Split:
    labels = np.arange(n, dtype=np.int32) * 7 % classes
    return data.Split(random_images(seed, n, side, side, channels), labels)


def mnist() -> tuple[dict[str, bytes], data.Split, data.Split]:
    """Files as the gzip program writes them, with name, time and system."""
    parts = {"train": labelled(1, 40, 28, 1, 10), "t10k": labelled(2, 12, 28, 1, 10)}
    times = {"train": 1504176606, "t10k": 1504176627}
    contents = {}
    for prefix, (images, labels) in parts.items():
        for kind, array in (("images-idx3", images[..., 0]), ("labels-idx1", labels)):
            name = f"{prefix}-{kind}-ubyte"
            buffer = io.BytesIO()
            with gzip.GzipFile(name, "wb", 6, buffer, times[prefix]) as file:
                file.write(idx(array.astype(np.uint8)))
            content = bytearray(buffer.getvalue())
            # Python leaves the system unknown; gzip says Unix.
            content[8:10] = b"\x00\x03"
            contents[name + ".gz"] = bytes(content)
    return contents, parts["train"], parts["t10k"]


def debian(content: bytes) -> bytes:
    """A gzip file as Debian has it: another time, and no name."""
    assert content[3] == 8
    time, end = (1591347949).to_bytes(4, "little"), content.index(b"\0", 10) + 1
    return b"\x1f\x8b\x08\x00" + time + content[8:10] + content[end:]


def cifar_rows(part: data.Split, fine: bool) -> bytes:
    """Labels, then all red, all green and all blue, row by row."""
    content = b""
    for index, (image, label) in enumerate(zip(*part, strict=True)):
        content += bytes([index % 20, label] if fine else [label])
        content += image.transpose(2, 0, 1).tobytes()
    return content


def cifar(name: str) -> tuple[dict[str, bytes], data.Split, data.Split]:
    fine = name == "cifar100"
    classes = 100 if fine else 10
    train, test = labelled(3, 30, 32, 3, classes), labelled(4, 11, 32, 3, classes)
    folder = "cifar-100-binary/" if fine else "cifar-10-batches-bin/"
    test_name = "test.bin" if fine else "test_batch.bin"
    members = {
        "batches.meta.txt": b"\n".join(b"%d" % i for i in range(10)) + b"\n\n",
        "coarse_label_names.txt": b"\n".join(b"c%d" % i for i in range(20)),
        "fine_label_names.txt": b"\n".join(b"f%d" % i for i in range(100)),
        test_name: cifar_rows(test, fine),
        "train.bin": cifar_rows(train, fine),
    }
    for i in range(5):
        part = data.Split(*(x[6 * i : 6 * i + 6] for x in train))
        members[f"data_batch_{i + 1}.bin"] = cifar_rows(part, fine)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member, content in members.items():
            info = tarfile.TarInfo(folder + member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return {f"cifar-{classes}-binary.tar.gz": buffer.getvalue()}, train, test


def tiny_imagenet() -> tuple[dict[str, bytes], data.Split, data.Split]:
    ids = [f"n{number:08}" for number in range(200)]
    root, lines = "tiny-imagenet-200/", []
    parts: dict[str, Any] = {"train": ([], []), "val": ([], [])}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:

        def add(part: str, path: str, image: np.ndarray, label: int) -> None:
            content = png_or_jpeg(image)
            archive.writestr(root + path, content)
            pixels = np.asarray(PIL.Image.open(io.BytesIO(content)).convert("RGB"))
            parts[part][0].append(pixels)
            parts[part][1].append(label)

        # The classes are numbered by their names, not by their order in this file.
        archive.writestr(root + "wnids.txt", "\n".join(ids[::-1]) + "\n")
        for label in (0, 3, 199):
            for number in range(4):
                image = random_images(label * 10 + number, 64, 64, 3)
                # Some of the original images are grey.
                image = image[..., 0] if number == 2 else image
                path = f"train/{ids[label]}/images/{ids[label]}_{number}.JPEG"
                add("train", path, image, label)
            archive.writestr(f"{root}train/{ids[label]}/{ids[label]}_boxes.txt", "")
        for number, label in enumerate((199, 0, 3, 3, 0)):
            image = random_images(5000 + number, 64, 64, 3)
            add("val", f"val/images/val_{number}.JPEG", image, label)
            lines.append(f"val_{number}.JPEG\t{ids[label]}\t0\t32\t44\t62")
        archive.writestr(root + "val/val_annotations.txt", "\n".join(lines) + "\n")
        # These have no labels and are left out.
        archive.writestr(root + "test/images/test_0.JPEG", png_or_jpeg(image))
    splits = [data.Split(np.stack(x), np.array(y, np.int32)) for x, y in parts.values()]
    return {"tiny-imagenet-200.zip": buffer.getvalue()}, *splits


SHAKESPEARE = "".join(f"Citizen {number}: Speak, spéak.\n" for number in range(300))


def stand_in(name: str) -> tuple[dict[str, bytes], Any, Any]:
    """Small files in the format of the original ones, and the data in them."""
    if name == "tiny_shakespeare":
        # The catalogue cuts at characters, some of which have two bytes.
        start = int(len(SHAKESPEARE) * 0.9)
        middle = start + int((len(SHAKESPEARE) - start) * 0.5)
        train, test = SHAKESPEARE[:start].encode(), SHAKESPEARE[middle:].encode()
        return {"input.txt": SHAKESPEARE.encode()}, train, test
    if "mnist" in name:
        return mnist()
    return tiny_imagenet() if name == "tiny_imagenet" else cifar(name)


CLASSES = {
    "mnist": 10,
    "fashion_mnist": 10,
    "cifar10": 10,
    "cifar100": 100,
    "tiny_imagenet": 200,
    "tiny_shakespeare": 256,
}


def check_missing(name: str, file: str, folder: pathlib.Path) -> None:
    """Assert that missing data come with the command that prepares them."""
    with pytest.raises(FileNotFoundError) as caught:
        data.load(name, folder)
    message = str(caught.value)
    assert f"`python -m experiments.prepare {name} --data-dir '{folder}'`" in message
    assert file in message
    assert f"into {folder}/downloads/manual" in message
    assert not folder.exists()


@pytest.mark.parametrize("name", CLASSES)
def test_contract_of_a_builder(name, tmp_path, network, monkeypatch):
    """Only the right files are taken, and what is read is what they hold."""
    monkeypatch.setattr(builders.FashionMnist, "debian_dir", tmp_path / "debian")
    contents, train, test = stand_in(name)
    check_missing(name, next(iter(contents)), tmp_path / "my data")
    manual = tmp_path / "manual"
    first = next(iter(contents))
    checksums = put(manual, contents)
    # These are not the original files, so that the known checksums do not fit.
    with pytest.raises(OSError, match="has the wrong checksum: sha256 must be"):
        preparation.prepare(name, tmp_path, manual)
    (manual / first).write_bytes(flipped(contents[first]))
    with pytest.raises(OSError, match=f"sha256 must be {checksums[first]}, got"):
        preparation.prepare(name, tmp_path, manual, checksums=checksums)
    # Nothing that is left looks prepared.
    assert not preparation.is_prepared(preparation.builder_of(name, tmp_path))
    put(manual, contents)
    path, worked = preparation.prepare(name, tmp_path, manual, checksums=checksums)
    assert worked
    assert path.parent == tmp_path / name

    dataset: Any = data.load(name, tmp_path)
    assert (dataset.name, dataset.classes) == (name, CLASSES[name])
    if name == "tiny_shakespeare":
        check_text(dataset.train, train)
        check_text(dataset.test, test)
        assert (dataset.mean, dataset.std) == ((), ())
    else:
        assert (rows(dataset.train), rows(dataset.test)) == (rows(train), rows(test))
        assert dataset.train.inputs.shape == train.inputs.shape
    if name != "tiny_imagenet":
        check_catalogue(name, tmp_path, dataset)
    assert not network


def check_catalogue(name: str, folder: pathlib.Path, dataset: Any) -> None:
    """Assert that the class of the catalogue opens the data set and knows its form."""
    checksums = {url: x.checksum for url, x in tfds.builder_cls(name).url_infos.items()}
    archives = builders.BUILDERS[name].archives()
    assert {each.url: each.sha256 for each in archives} == checksums
    assert len(archives) == (4 if "mnist" in name else 1)
    catalogue: Any = tfds.builder(name, data_dir=folder)
    blank: Any = tfds.builder(name, data_dir=folder / "nothing")
    assert catalogue.is_prepared()
    assert not blank.is_prepared()
    ours = tfds.builder_from_directory(catalogue.data_dir)
    assert ours.version == blank.version
    written, known = (
        {key: repr(feature) for key, feature in builder.info.features.items()}
        for builder in (ours, blank)
    )
    assert written == known
    splits = {"train", "test"} | ({"validation"} if "text" in known else set())
    assert set(catalogue.info.splits) == splits
    source = catalogue.as_data_source("train")
    assert set(source[0]) == set(known)
    if "image" in known:
        images = np.stack([example["image"] for example in source])
        labels = np.array([example["label"] for example in source])
        assert rows(data.Split(images, labels)) == rows(dataset.train)
    if name == "cifar100":
        features = ours.info.features
        assert features["label"].names[99] == "f99"
        assert features["coarse_label"].names == [f"c{i}" for i in range(20)]
        by_id = {example["id"].decode(): example for example in source}
        assert sorted(by_id) == [f"train_{index:05d}" for index in range(30)]
        assert by_id["train_00023"]["coarse_label"] == 3
        assert by_id["train_00023"]["label"] == 23 * 7 % 100


def test_files_of_debian_get_their_original_header_back(tmp_path, monkeypatch, network):
    originals, train, _ = mnist()
    monkeypatch.setattr(builders.FashionMnist, "debian_dir", tmp_path / "debian")
    with pytest.raises(FileNotFoundError, match="package dataset-fashion-mnist also"):
        data.load("fashion_mnist", tmp_path)
    put(tmp_path / "debian", {name: debian(x) for name, x in originals.items()})
    for name, content in originals.items():
        assert downloads.with_original_header(tmp_path / "debian" / name) == content
    assert preparation.is_available("fashion_mnist")
    assert not preparation.is_available("mnist")
    # The files are there, so that loading tries them; but they are not the originals.
    with pytest.raises(OSError, match="has the wrong checksum: sha256 must be"):
        data.load("fashion_mnist", tmp_path)
    checksums = {name: sha256(content) for name, content in originals.items()}
    preparation.prepare("fashion_mnist", tmp_path, checksums=checksums)
    assert rows(data.load("fashion_mnist", tmp_path).train) == rows(train)
    put(tmp_path / "debian", originals)
    with pytest.raises(OSError, match="not a file of Debian's package"):
        data.load("fashion_mnist", tmp_path / "other")
    assert not network


def test_photos_have_a_garment_at_some_place(tmp_path, monkeypatch):
    originals, train, test = mnist()
    checksums = put(tmp_path / "manual", originals)
    photo = np.full((100, 200, 3), 10, np.uint8)
    photo[:, 100:] = 200  # only test images see this half
    samples = sklearn.utils.Bunch(images=[photo])
    monkeypatch.setattr(sklearn.datasets, "load_sample_images", lambda: samples)
    parts = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        preparation.prepare(
            "fashion_mnist_photos", folder, tmp_path / "manual", checksums=checksums
        )
        parts.append(data.load("fashion_mnist_photos", folder))
    assert rows(parts[0].train) == rows(parts[1].train)
    assert parts[0].classes == 10
    places = collections.Counter()
    for made, given, colour in (
        (parts[0].train, train, 10),
        (parts[0].test, test, 200),
    ):
        assert made.labels.tolist() == given.labels.tolist()
        for image, garment in zip(made.inputs, given.inputs, strict=True):
            fitting = [
                (top, left)
                for top, left in itertools.product(range(5), repeat=2)
                if (image == on_plain_ground(garment, colour, top, left)).all()
            ]
            assert len(fitting) == 1
            places.update(fitting)
    assert len(places) > 5


def on_plain_ground(garment: np.ndarray, colour: int, top: int, left: int):
    grey = np.pad(garment[..., 0], ((top, 4 - top), (left, 4 - left))).astype(int)
    return abs(grey - colour)[..., None]


def test_crops_of_photos_have_random_sizes_places_and_mirroring():
    columns = np.broadcast_to(np.arange(150, dtype=np.uint8)[:, None], (120, 150, 3))
    rng = np.random.RandomState(0)
    widths, starts, mirrored = [], [], 0
    for _ in range(300):
        crop = builders.photo_crop(rng, columns)[0, :, 0].astype(int)
        steps = np.diff(crop)
        assert (steps >= 0).all() or (steps <= 0).all()
        mirrored += steps.sum() < 0
        widths.append(abs(crop[-1] - crop[0]))
        starts.append(min(crop[0], crop[-1]))
    # A crop of n pixels begins and ends n / 32 / 2 pixels from its sides.
    assert (min(widths), max(widths)) == (31, 93)
    assert min(starts) == 0
    assert 100 < max(starts) <= 150 - 32
    assert 120 < mirrored < 180


def test_a_download_without_a_network_fails_with_a_remedy(tmp_path, network, capsys):
    assert prepare.main(["cifar10", "--data-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "error: cifar-10-binary.tar.gz could not be downloaded" in error
    assert f"into {tmp_path}/downloads/manual" in error
    assert network


def flipped(content: bytes) -> bytes:
    """One bit in the middle is another."""
    half = len(content) // 2
    return content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]


def test_damaged_data_are_named_with_a_remedy(data_dir, tmp_path):
    data.load("digits", data_dir)
    whole = data_dir / "digits" / "1.0.0"
    folder = tmp_path / "digits" / "1.0.0"
    remedy = f"run `python -m experiments.prepare digits --data-dir {tmp_path}`"
    for file in (
        "digits-train.array_record-00000-of-00001",
        "digits-test.array_record-00000-of-00001",
        "features.json",
        "dataset_info.json",
    ):
        content = (whole / file).read_bytes()
        changed = b"" if "json" in file else flipped(content)
        for damaged in (changed, content[:-7], None):
            shutil.copytree(whole, folder)
            (folder / file).unlink()
            if damaged is not None:
                (folder / file).write_bytes(damaged)
            with pytest.raises(OSError, match=re.escape(str(folder.parent))) as caught:
                data.load("digits", tmp_path)
            message = str(caught.value)
            assert f"Remove the folder, then {remedy}" in message, file
            assert "\n" not in message
            shutil.rmtree(folder)
    # Data in another format are left alone.
    shutil.copytree(whole, folder)
    info = folder / "dataset_info.json"
    changed = json.loads(info.read_text()) | {"fileFormat": "tfrecord"}
    info.write_text(json.dumps(changed))
    with pytest.raises(OSError, match="files in the format tfrecord"):
        data.load("digits", tmp_path)
    shutil.rmtree(folder)
    assert len(data.load("digits", tmp_path).train.labels) == 1201


def test_the_command_prepares_once_and_reports(tmp_path, capsys):
    args = ["digits", "--data-dir", str(tmp_path)]
    assert prepare.main(args) == 0
    folder = tmp_path / "digits" / "1.0.0"
    assert f"digits is in {folder}: prepared in" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare.main(args) == 0
    assert "was prepared already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    for name, nearest in (("digit", "digits"), ("fashion-mnist", "fashion_mnist")):
        assert prepare.main([name]) == 2
        error = capsys.readouterr().err
        assert (
            f"error: there is no data set '{name}'. Did you mean '{nearest}'" in error
        )
        assert all(known in error for known in data.NAMES)
    (tmp_path / "file").write_text("")
    assert prepare.main(["digits", "--data-dir", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_only_one_process_prepares_and_a_killed_one_leaves_nothing_complete(tmp_path):
    script = """
import os, signal, sys
from experiments.data import preparation, tfds_builders
whole = tfds_builders.Digits._generate_examples
def examples(*args):
    for key, example in whole(*args):
        if len(args[1]) == 596 and key == 300:  # the training images are written
            os.kill(os.getpid(), signal.SIGKILL)
        yield key, example
tfds_builders.Digits._generate_examples = examples
preparation.prepare("digits", sys.argv[1])
"""
    with open(tmp_path / ".digits.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "-c", script, str(tmp_path)]
        pipe = subprocess.PIPE
        waiting: Any = subprocess.Popen(command, cwd=ROOT, stderr=pipe, text=True)
        assert "waiting for another process" in waiting.stderr.readline()
        assert not (tmp_path / "digits").exists()
    waiting.communicate(timeout=60)
    assert waiting.returncode == -signal.SIGKILL
    (leftover,) = (tmp_path / "digits").iterdir()
    assert leftover.name.startswith("incomplete.")
    assert len(data.load("digits", tmp_path).train.labels) == 1201
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_data_that_another_process_prepared_meanwhile_are_taken(tmp_path, monkeypatch):
    whole = preparation.prepare("digits", tmp_path / "whole")[0].parent
    flock = fcntl.flock

    def other_process_first(file: Any, operation: int) -> None:
        if not (tmp_path / "digits").exists():
            shutil.copytree(whole, tmp_path / "digits")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", other_process_first)
    folder, worked = preparation.prepare("digits", tmp_path)
    assert (folder, worked) == (tmp_path / "digits" / "1.0.0", False)


ARCHIVES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")


def test_imagenet_says_what_its_preparation_needs(tmp_path, monkeypatch, capsys):
    check_missing("imagenet2012", " and ".join(ARCHIVES), tmp_path / "my data")
    # In the default folder, the command needs none.
    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="prepare imagenet2012`"):
        data.load("imagenet2012")
    manual = tmp_path / "downloads/manual"
    for tensorflow, message in (
        (None, f"put ILSVRC2012_img_train.tar into {manual}"),
        (None, "run `pip install '.[imagenet]'`"),
        (object(), "_train.tar has the wrong checksum: sha256 must be b08"),
    ):
        find_spec = lambda name, spec=tensorflow: spec  # noqa: E731
        monkeypatch.setattr(preparation.importlib.util, "find_spec", find_spec)
        assert prepare.main(["imagenet2012", "--data-dir", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
        put(manual, {name: name.encode() for name in ARCHIVES})
