"""Data sets that fit in memory, as uint8 inputs and integer labels."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np


class Split(NamedTuple):
    """Inputs and their labels.

    Attributes:
      inputs: uint8 images (n, height, width, channels), or bytes of text (n, length).
      labels: int32 classes (n,) for images, from 0 to classes - 1; for text, the next
        bytes (n, length). The label -1 marks padding.
    """

    inputs: np.ndarray | jax.Array
    labels: np.ndarray | jax.Array


def as_rows(split: Split) -> Split:
    """Return the same data with every image as a row of its pixels.

    The training step gathers a batch of rows. On a TPU, an array (n, height, width,
    channels) has another layout than a gather needs, and every step would copy all of
    the images.
    """
    return split._replace(inputs=split.inputs.reshape(len(split.labels), -1))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set in main memory.

    Attributes:
      name: Name for `load`.
      train: Training data, on which choices may be based.
      test: Test data, for final results only. No choice may be based on them.
      classes: Number of classes; 256 for text.
      mean: Mean of every channel over the training images, for values from 0 to 1; ()
        for text.
      std: Standard deviation of every channel, for values from 0 to 1; 1 for a constant
        channel; () for text.
    """

    name: str
    train: Split
    test: Split
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def train_size(self) -> int:
        """Number of training examples."""
        return self.train.labels.shape[0]

    @property
    def test_size(self) -> int:
        """Number of test labels; a text has one for every predicted byte."""
        return self.test.labels.size

    def steps_per_epoch(self, batch_size: int) -> float:
        """Return the number of whole batches in a pass through the data."""
        return self.train_size // batch_size


def from_arrays(name: str, train: Split, test: Split, classes: int) -> Dataset:
    """Create a `Dataset` with the statistics of its training images.

    Raises:
      ValueError: Inputs or labels do not have the shapes, dtypes and values that
        `Split` describes, or the two splits have examples of different shapes.
    """
    for part, (inputs, labels) in (("train", train), ("test", test)):
        if inputs.dtype != np.uint8 or inputs.ndim not in (2, 4) or not len(inputs):
            raise ValueError(
                f"{part} inputs of {name} must be uint8 of shape (n, height, width, "
                "channels), or (n, length) for text, with n > 0, got "
                f"{inputs.dtype} of shape {inputs.shape}."
            )
        shape = inputs.shape if inputs.ndim == 2 else inputs.shape[:1]
        if labels.dtype != np.int32 or labels.shape != shape:
            raise ValueError(
                f"{part} labels of {name} must be int32 of shape {shape}, got "
                f"{labels.dtype} of shape {labels.shape}."
            )
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(
                f"{part} labels of {name} must lie in 0 to {classes - 1}, got "
                f"{labels.min()} to {labels.max()}."
            )
    if train.inputs.shape[1:] != test.inputs.shape[1:]:
        raise ValueError(
            f"inputs of {name} must have one shape, got {train.inputs.shape[1:]} for "
            f"train and {test.inputs.shape[1:]} for test."
        )
    is_text = train.inputs.ndim == 2
    mean, std = ((), ()) if is_text else _statistics(np.asarray(train.inputs))
    return Dataset(name, train, test, classes, mean, std)


def _statistics(
    images: np.ndarray,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of every channel, for values from 0 to 1.

    They are computed from histograms, which is exact and needs no float64 copy.
    """
    counts = np.zeros((images.shape[-1], 256), np.int64)
    for start in range(0, len(images), 1000):  # bincount copies to int64
        for channel, count in enumerate(counts):
            part = images[start : start + 1000, ..., channel]
            count += np.bincount(part.ravel(), minlength=256)
    values = np.arange(256)
    means, stds = [], []
    for count in counts:
        mean = float(count @ values / count.sum())
        variance = float(count @ (values - mean) ** 2 / count.sum())
        means.append(mean / 255)
        stds.append(variance**0.5 / 255 if np.count_nonzero(count) > 1 else 1.0)
    return tuple(means), tuple(stds)
