"""Builders of tensorflow-datasets that work without TensorFlow.

The builders of the catalogue need TensorFlow to read and to encode files. The builders
here inherit the name, version and features from them and read the same source files, so
the catalogue's classes can open the result. They store images as encoded bytes, which
needs no TensorFlow. `digits`, `fashion_mnist_photos`, `python_docs` and `tiny_imagenet`
are not in the catalogue.
"""

import gzip
import importlib
import io
import pathlib
import platform
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import PIL.Image
import requests
import tensorflow_datasets as tfds

from experiments.data import downloads

_Examples = Iterator[tuple[int, dict[str, Any]]]

# The types of tensorflow-datasets are too narrow for this use.
_BUILDER: Any = tfds.core.GeneratorBasedBuilder
_CATALOGUE: Any = tfds.image_classification
_TINY_SHAKESPEARE: Any = tfds.builder_cls("tiny_shakespeare")

# Seconds to wait for a server. Without a network, the retries of tensorflow-datasets
# take minutes.
_NETWORK_TIMEOUT = 20.0


class _Unregistered:
    """Does not register class names, and uses the checksums of the catalogue."""

    catalogue: Any = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        parent: Any = super()
        parent.__init_subclass__(**({"skip_registration": True} | kwargs))
        if cls.catalogue is not None:
            cls.url_infos = cls.catalogue.url_infos


class FromFiles(_Unregistered, _BUILDER):
    """Base class of the builders here, which read verified files.

    Attributes:
      name: Name of the data set.
      catalogue: The catalogue's builder, if there is one.
      debian_dir: Folder of Debian's package of the source files, if there is one.
      manual_dir: Folder of files obtained by hand; set it before preparing.
      checksums: SHA-256 by file name, to replace the known values.
    """

    name: str
    debian_dir: pathlib.Path | None = None
    manual_dir: pathlib.Path
    checksums: Mapping[str, str] = {}

    @classmethod
    def archives(cls) -> tuple[downloads.Archive, ...]:
        """Return the source files; none if a package contains the data."""
        if cls.catalogue is None:
            return ()
        return tuple(
            downloads.Archive(url.rsplit("/", 1)[-1], info.checksum, url)
            for url, info in cls.url_infos.items()
        )

    def contents(self, dl_manager: Any) -> dict[str, bytes]:
        """Return the verified contents of all source files, by name."""

        def download(url: str) -> pathlib.Path:
            requests.head(url, timeout=_NETWORK_TIMEOUT, allow_redirects=True)
            return pathlib.Path(dl_manager.download(url))

        contents = {}
        for archive in self.archives():
            sha256 = self.checksums.get(archive.name, archive.sha256)
            archive = downloads.Archive(archive.name, sha256, archive.url)
            contents[archive.name] = downloads.content(
                archive, self.manual_dir, self.debian_dir, download
            )
        return contents


def _png(pixels: np.ndarray) -> bytes:
    """Encode uint8 pixels of shape (h, w, 1) or (h, w, 3) as PNG."""
    buffer = io.BytesIO()
    squeezed = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    PIL.Image.fromarray(squeezed).save(buffer, "png")
    return buffer.getvalue()


def _ten_classes(
    builder: Any, description: str, shape: tuple[int, int, int]
) -> tfds.core.DatasetInfo:
    """Describe images of ten classes, kept in the order of the examples."""
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=shape),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        ),
        supervised_keys=("image", "label"),
        disable_shuffling=True,
    )


class Digits(FromFiles):
    """Handwritten digits of 8 x 8 pixels, which are part of scikit-learn.

    Every third image of each class, in the order of the file, is test data. This split
    is stratified and needs no random numbers.
    """

    name = "digits"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return _ten_classes(
            self, "1,797 handwritten digits, which are part of scikit-learn.", (8, 8, 1)
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, _Examples]:
        del dl_manager
        # The import takes a second, and only this data set needs it.
        import sklearn.datasets

        images, labels = map(np.asarray, sklearn.datasets.load_digits(return_X_y=True))
        # Scale the values from 0 to 16 in the file to 0 to 255.
        images = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
        test = np.zeros(len(labels), bool)
        for label in range(10):
            test[np.flatnonzero(labels == label)[2::3]] = True
        return {
            "train": self._generate_examples(images[~test], labels[~test]),
            "test": self._generate_examples(images[test], labels[test]),
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> _Examples:
        for key, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield key, {"image": _png(image), "label": int(label)}


class _Mnist(FromFiles):
    """Reads the four files of MNIST or Fashion-MNIST."""

    def _split_generators(self, dl_manager: Any) -> dict[str, _Examples]:
        contents = self.contents(dl_manager)
        splits = {}
        for split, prefix in (("train", "train"), ("test", "t10k")):
            pixels, labels = (
                downloads.read_idx(gzip.decompress(contents[name]), name)
                for name in (
                    f"{prefix}-images-idx3-ubyte.gz",
                    f"{prefix}-labels-idx1-ubyte.gz",
                )
            )
            images = self._images(split, pixels)
            splits[split] = self._generate_examples(images, labels)
        return splits

    def _images(self, split: str, pixels: np.ndarray) -> Iterable[np.ndarray]:
        """Return the images (h, w, channels) for pixels (n, 28, 28)."""
        del split
        return pixels[..., None]

    def _generate_examples(
        self, images: Iterable[np.ndarray], labels: np.ndarray
    ) -> _Examples:
        for key, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield key, {"image": _png(image), "label": int(label)}


class Mnist(_Mnist, _CATALOGUE.MNIST):
    """The catalogue's mnist."""

    name = "mnist"
    catalogue = _CATALOGUE.MNIST


class FashionMnist(_Mnist, _CATALOGUE.FashionMNIST):
    """The catalogue's fashion_mnist."""

    name = "fashion_mnist"
    catalogue = _CATALOGUE.FashionMNIST
    debian_dir = downloads.DEBIAN_FASHION_MNIST


class FashionMnistPhotos(_Mnist):
    """Fashion-MNIST on photographs, by the recipe of MNIST-M: 32 x 32 pixels, colour.

    Every garment is blended into a crop of one of scikit-learn's two photographs. Crops
    of training images come from the left halves of the photographs, and crops of test
    images from the right halves. Sizes, places and mirroring of the crops are random
    but always the same, so the data set is too.

    References:
      Ganin et al., Domain-Adversarial Training of Neural Networks, JMLR 2016.
    """

    name = "fashion_mnist_photos"
    VERSION = tfds.core.Version("1.0.0")
    debian_dir = downloads.DEBIAN_FASHION_MNIST

    @classmethod
    def archives(cls) -> tuple[downloads.Archive, ...]:
        return FashionMnist.archives()

    def _info(self) -> tfds.core.DatasetInfo:
        return _ten_classes(
            self, "Fashion-MNIST blended into crops of two photographs.", (32, 32, 3)
        )

    def _images(self, split: str, pixels: np.ndarray) -> Iterator[np.ndarray]:
        # The import takes a second, and most data sets do not need it.
        import sklearn.datasets

        side = ("train", "test").index(split)
        photos = sklearn.datasets.load_sample_images().images
        halves = [np.split(np.asarray(photo), 2, axis=1)[side] for photo in photos]
        # NumPy promises that the numbers of a RandomState never change.
        rng = np.random.RandomState(side)
        for image in pixels:
            photo = photo_crop(rng, halves[rng.randint(len(halves))])
            yield blended(rng, image, photo)


def photo_crop(rng: np.random.RandomState, photo: np.ndarray) -> np.ndarray:
    """Crop a square of 32 to 96 pixels, resize it to 32, and mirror it at random."""
    height, width = photo.shape[:2]
    side = rng.randint(32, 97)
    top, left = rng.randint(height - side + 1), rng.randint(width - side + 1)
    crop = PIL.Image.fromarray(photo[top : top + side, left : left + side])
    pixels = np.asarray(crop.resize((32, 32), PIL.Image.Resampling.BILINEAR))
    return pixels[:, ::-1] if rng.randint(2) else pixels


def blended(
    rng: np.random.RandomState, image: np.ndarray, photo: np.ndarray
) -> np.ndarray:
    """Return |photo - image|, with the grey image at a random place in the photo."""
    top, left = rng.randint(photo.shape[0] - image.shape[0] + 1, size=2)
    result = photo.astype(np.int16)
    place = result[top : top + image.shape[0], left : left + image.shape[1]]
    place -= image[..., None]
    return np.abs(result).astype(np.uint8)


class _Cifar(FromFiles):
    """Reads the archive of CIFAR-10 or CIFAR-100."""

    def _split_generators(self, dl_manager: Any) -> dict[str, _Examples]:
        (archive,) = self.contents(dl_manager).values()
        parts = self._cifar_info
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:

            def read(name: str) -> bytes:
                stream = tar.extractfile(parts.prefix + name)
                return b"" if stream is None else stream.read()

            names = [read(name).decode().split("\n") for name in parts.label_files]
            train = b"".join(map(read, parts.train_files))
            test = b"".join(map(read, parts.test_files))
        for key, lines in zip(parts.label_keys, names, strict=True):
            self.info.features[key].names = [line for line in lines if line]
        return {
            "train": self._generate_examples("train_", train),
            "test": self._generate_examples("test_", test),
        }

    def _generate_examples(self, split_prefix: str, content: bytes) -> _Examples:
        keys = self._cifar_info.label_keys
        rows = np.frombuffer(content, np.uint8)
        for key, row in enumerate(rows.reshape(-1, len(keys) + 3 * 32 * 32)):
            pixels = row[len(keys) :].reshape(3, 32, 32).transpose(1, 2, 0)
            yield (
                key,
                dict(zip(keys, row[: len(keys)].tolist(), strict=True))
                | {"id": f"{split_prefix}{key:05d}", "image": _png(pixels)},
            )


class Cifar10(_Cifar, _CATALOGUE.Cifar10):
    """The catalogue's cifar10."""

    name = "cifar10"
    catalogue = _CATALOGUE.Cifar10


class Cifar100(_Cifar, _CATALOGUE.Cifar100):
    """The catalogue's cifar100."""

    name = "cifar100"
    catalogue = _CATALOGUE.Cifar100


class TinyImagenet(FromFiles):
    """Tiny ImageNet: 64 x 64 pixels, 200 classes.

    The test images of the archive have no labels and are left out.
    """

    name = "tiny_imagenet"
    VERSION = tfds.core.Version("1.0.0")

    @classmethod
    def archives(cls) -> tuple[downloads.Archive, ...]:
        # The checksum of the official archive, of 248,100,043 bytes.
        sha256 = "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821"
        return (downloads.Archive("tiny-imagenet-200.zip", sha256),)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="100,000 training and 10,000 validation images of 200 classes.",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(64, 64, 3)),
                    "label": tfds.features.ClassLabel(num_classes=200),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, _Examples]:
        (content,) = self.contents(dl_manager).values()
        archive = zipfile.ZipFile(io.BytesIO(content))
        root = "tiny-imagenet-200/"
        classes = archive.read(root + "wnids.txt").decode().split()
        self.info.features["label"].names = sorted(classes)
        # Names are like train/n01443537/images/n01443537_0.JPEG.
        train = [
            (path, path.split("/")[2])
            for path in archive.namelist()
            if path.startswith(root + "train/") and path.endswith(".JPEG")
        ]
        annotations = archive.read(root + "val/val_annotations.txt").decode()
        validation = [
            (f"{root}val/images/{fields[0]}", fields[1])
            for fields in map(str.split, annotations.splitlines())
        ]
        return {
            "train": self._generate_examples(archive, sorted(train)),
            "validation": self._generate_examples(archive, validation),
        }

    def _generate_examples(
        self, archive: zipfile.ZipFile, labelled: list[tuple[str, str]]
    ) -> _Examples:
        for key, (path, label) in enumerate(labelled):
            image = archive.read(path)
            with PIL.Image.open(io.BytesIO(image)) as decoded:
                # Some images are grey, but readers expect three channels.
                if decoded.mode != "RGB":
                    image = _png(np.asarray(decoded.convert("RGB")))
            yield (
                key,
                {"id": path.rsplit("/", 1)[-1], "image": image, "label": label},
            )


class TinyShakespeare(FromFiles, _TINY_SHAKESPEARE):
    """The catalogue's tiny_shakespeare: 1.1 million characters of plays."""

    name = "tiny_shakespeare"
    catalogue = _TINY_SHAKESPEARE
    pkg_dir_path = _TINY_SHAKESPEARE.pkg_dir_path

    def _split_generators(self, dl_manager: Any) -> dict[str, _Examples]:
        (content,) = self.contents(dl_manager).values()
        text = content.decode()
        # As in the catalogue: 90% train, 5% validation, 5% test.
        start = int(len(text) * 0.9)
        middle = start + int((len(text) - start) * 0.5)
        parts = {
            "train": text[:start],
            "validation": text[start:middle],
            "test": text[middle:],
        }
        return {
            split: self._generate_examples(split, part) for split, part in parts.items()
        }

    def _generate_examples(self, split_key: str, split_text: str) -> Any:
        yield split_key, {"text": split_text}


class PythonDocs(FromFiles):
    """Chapters of Python's language reference, which are part of the interpreter.

    They differ between Python versions, so the version of the data set is Python's. The
    last tenth is test data.
    """

    name = "python_docs"
    VERSION = tfds.core.Version(".".join(platform.python_version_tuple()[:2]) + ".0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Text of pydoc_data.topics, sorted by the names of the topics.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        topics = importlib.import_module("pydoc_data.topics").topics
        text = "\n".join(topics[name] for name in sorted(topics))
        start = len(text) * 9 // 10
        return {
            "train": self._generate_examples("train", text[:start]),
            "test": self._generate_examples("test", text[start:]),
        }

    def _generate_examples(self, key: str, text: str) -> Any:
        yield key, {"text": text}


BUILDERS: dict[str, type[FromFiles]] = {
    builder.name: builder
    for builder in (
        Digits,
        FashionMnist,
        FashionMnistPhotos,
        Mnist,
        Cifar10,
        Cifar100,
        TinyImagenet,
        TinyShakespeare,
        PythonDocs,
    )
}
