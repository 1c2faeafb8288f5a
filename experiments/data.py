"""Data sets: whole, as uint8 images and integer labels, split once and for all.

A reader is a function without arguments that returns a `Dataset`, made by `from_arrays`
of anything that ends in NumPy arrays; of tensorflow-datasets, each split is

    raw = tfds.as_numpy(tfds.load("cifar10", split="train", batch_size=-1))
    Split(raw["image"], raw["label"].astype(np.int32))

Small data sets live on the device as uint8 and are shuffled, moved and normalised
within the training step.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import sklearn.datasets


class Split(NamedTuple):
    """Images with their labels.

    Attributes:
      images: uint8, of shape (n, height, width, channels), 0 to 255.
      labels: int32, of shape (n,), 0 to classes - 1.
    """

    images: np.ndarray | jax.Array
    labels: np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set for image classification.

    Attributes:
      name: as given to `load`.
      train: what a network learns from, and what any choice may be based on.
      test: for the final number alone; no choice may be based on it.
      classes: number of classes.
      mean: of every channel over the training images, for values from 0 to 1.
      std: standard deviation, likewise; 1 for a channel that is constant.
    """

    name: str
    train: Split
    test: Split
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(name: str) -> Dataset:
    """The data set `name`, in main memory.

    Raises:
      ValueError: there is no such data set.
    """
    if name not in _READERS:
        known = " or ".join(map(repr, _READERS))
        raise ValueError(f"data.dataset must be {known}, got {name!r}.")
    return _READERS[name]()


def digits() -> Dataset:
    """1,797 handwritten digits of 8 x 8 pixels that scikit-learn carries along.

    Of each class, in the order of the file, every third image is test data: a split
    that is stratified and needs no random numbers.
    """
    images, labels = map(np.asarray, sklearn.datasets.load_digits(return_X_y=True))
    # The file has values from 0 to 16; here, as everywhere, from 0 to 255.
    images = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    test = np.zeros(len(labels), bool)
    for label in range(10):
        test[np.flatnonzero(labels == label)[2::3]] = True
    labels = labels.astype(np.int32)
    return from_arrays(
        "digits",
        train=Split(images[~test], labels[~test]),
        test=Split(images[test], labels[test]),
        classes=10,
    )


def from_arrays(name: str, train: Split, test: Split, classes: int) -> Dataset:
    """A `Dataset` with the statistics of its training images.

    Raises:
      ValueError: images that are not uint8 with four dimensions, or of another shape
        in the two splits; another number of labels than of images, labels that are not
        int32, or outside the classes.
    """
    for part, (images, labels) in (("train", train), ("test", test)):
        if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
            raise ValueError(
                f"{part} images of {name} must be uint8 of shape (n, height, width, "
                f"channels) with n > 0, got {images.dtype} of shape {images.shape}."
            )
        if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{part} labels of {name} must be int32 of shape {images.shape[:1]}, "
                f"got {labels.dtype} of shape {labels.shape}."
            )
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(
                f"{part} labels of {name} must lie in 0 to {classes - 1}, got "
                f"{labels.min()} to {labels.max()}."
            )
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f"images of {name} must have one shape, got {train.images.shape[1:]} for "
            f"train and {test.images.shape[1:]} for test."
        )
    pixels = np.asarray(train.images)
    std = pixels.std((0, 1, 2), dtype=np.float64) / 255
    return Dataset(
        name=name,
        train=train,
        test=test,
        classes=classes,
        mean=tuple((pixels.mean((0, 1, 2), dtype=np.float64) / 255).tolist()),
        std=tuple(np.where(std > 0, std, 1.0).tolist()),
    )


_READERS: dict[str, Callable[[], Dataset]] = {"digits": digits}
