"""Data sets that fit in memory: whole, as uint8 inputs and integer labels."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np


class Split(NamedTuple):
    """Inputs with their labels.

    Attributes:
      inputs: uint8; images of shape (n, height, width, channels), 0 to 255, or text of
        shape (n, length), one byte each.
      labels: int32, 0 to classes - 1; of shape (n,) for images, or (n, length) for
        text: the byte that follows. -1 marks a row that only fills a batch up.
    """

    inputs: np.ndarray | jax.Array
    labels: np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set in main memory.

    Attributes:
      name: as given to `load`.
      train: what a network learns from, and what any choice may be based on.
      test: for the final number alone; no choice may be based on it.
      classes: number of classes; 256 for text.
      mean: of every channel over the training images, for values from 0 to 1; () for
        text.
      std: standard deviation, likewise; 1 for a channel that is constant.
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
        """Number of test labels: of a text, one for every character predicted."""
        return self.test.labels.size

    def steps_per_epoch(self, batch_size: int) -> float:
        """Steps of a pass through the data: whole batches, the rest is left out."""
        return self.train_size // batch_size


def from_arrays(name: str, train: Split, test: Split, classes: int) -> Dataset:
    """A `Dataset` with the statistics of its training images.

    Raises:
      ValueError: inputs that are not uint8 with four dimensions (images) or two (text),
        or of another shape in the two splits; labels of another shape than `Split`
        says, that are not int32, or outside the classes.
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
    """Mean and standard deviation of every channel, for values from 0 to 1.

    Computed from how often each value occurs: exact, and without a float64 copy.
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
