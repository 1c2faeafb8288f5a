"""ImageNet: decoded, cropped and flipped on the host while the device trains.

The content of a batch is a pure function of the seed and the step. A run can therefore
resume at any step, with any number of processes and workers, and no iterator state
needs to be saved.
"""

import contextlib
import dataclasses
import functools
import io
import math
import os
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any

import grain
import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from absl import flags

from experiments.data.in_memory import Split

# Side of the network's input, and length of a test image's shorter side before its
# centre is cropped, in pixels.
IMAGE_SIZE = 224
RESIZED = 256

# Ranges of a random crop's relative area and of its width divided by its height.
CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)

# The usual statistics of ImageNet's training images, for values from 0 to 1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# More steps than in any run.
_ENDLESS = 2**40

# Each thread creates whole batches, and decoding releases the interpreter lock.
_MAX_THREADS = 16

# Random streams of a seed.
_ORDER, _AUGMENTATION = 0, 1


@dataclasses.dataclass(frozen=True)
class Stream:
    """A data set that does not fit in memory, read in batches.

    Attributes:
      name: Name for `load`.
      classes: Number of classes.
      mean: Mean of every channel over the training images, for values from 0 to 1.
      std: Standard deviation of every channel, for values from 0 to 1.
      image_shape: Height, width and channels of the images in a batch.
      train_size: Number of training images.
      test_size: Number of test images.
      train_source: Encoded training images with labels, by index.
      test_source: Encoded test images with labels, by index.
    """

    name: str
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_shape: tuple[int, int, int]
    train_size: int
    test_size: int
    train_source: Any = dataclasses.field(repr=False)
    test_source: Any = dataclasses.field(repr=False)

    def steps_per_epoch(self, batch_size: int) -> float:
        """Return the steps of a pass through the data, not rounded to whole batches."""
        return self.train_size / batch_size

    def train_batches(
        self,
        *,
        seed: int,
        start: int,
        batch_size: int,
        process: int = 0,
        processes: int = 1,
        workers: int = 0,
    ) -> Iterator[Split]:
        """Return this process's part of the global batches `start`, `start` + 1, ...

        Every pass through the data has a new random order, and a batch may contain the
        end of one pass and the beginning of the next. Each image is cropped at random
        and mirrored with probability 1/2.

        Args:
          seed: Seed of order and augmentation, at least 0.
          start: Number of the first step.
          batch_size: Size of the global batch, which the processes share equally, in
            order.
          process: Number of this process.
          processes: Number of processes.
          workers: Number of processes that decode images; 0 means threads of this
            process.

        Returns:
          Endless batches with images (batch_size / processes, 224, 224, 3) and labels.

        Raises:
          ValueError: An argument is out of range, or `processes` does not divide
            `batch_size`.
          OSError: The data cannot be read; raised while iterating.
        """
        for name, value in (("seed", seed), ("start", start)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}.")
        local = _local_size(batch_size, process, processes)
        make = functools.partial(
            _train_batch,
            source=self.train_source,
            size=self.train_size,
            seed=seed,
            batch_size=batch_size,
            offset=process * local,
            local=local,
        )
        return _iterate(make, start, _ENDLESS, workers)

    def test_batches(
        self,
        *,
        batch_size: int,
        process: int = 0,
        processes: int = 1,
        workers: int = 0,
    ) -> Iterator[Split]:
        """Return this process's part of the test images.

        Together, the processes get every test image once. All batches are whole, and
        every process has the same number; padding is black and has the label -1.

        Args:
          batch_size: Size of the global batch, which the processes share equally, in
            order.
          process: Number of this process.
          processes: Number of processes.
          workers: Number of processes that decode images; 0 means threads of this
            process.

        Returns:
          Images of shape (batch_size / processes, 224, 224, 3), and labels.

        Raises:
          ValueError: An argument is out of range, or `processes` does not divide
            `batch_size`.
          OSError: The data cannot be read; raised while iterating.
        """
        local = _local_size(batch_size, process, processes)
        make = functools.partial(
            _test_batch,
            source=self.test_source,
            size=self.test_size,
            batch_size=batch_size,
            offset=process * local,
            local=local,
        )
        return _iterate(make, 0, -(-self.test_size // batch_size), workers)


def open_stream(name: str, builder: Any, test_split: str) -> Stream:
    """Open the prepared data set of a tensorflow-datasets builder as a `Stream`.

    Raises:
      ValueError: The data set does not have the splits.
    """
    sources = {}
    for split in ("train", test_split):
        if split not in builder.info.splits:
            raise ValueError(f"there is no split {split!r}")
        sources[split] = builder.as_data_source(
            split, decoders={"image": tfds.decode.SkipDecoding()}
        )
    return Stream(
        name=name,
        classes=builder.info.features["label"].num_classes,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_shape=(IMAGE_SIZE, IMAGE_SIZE, 3),
        train_size=len(sources["train"]),
        test_size=len(sources[test_split]),
        train_source=sources["train"],
        test_source=sources[test_split],
    )


def random_crop(
    rng: np.random.Generator, width: int, height: int
) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a random crop.

    Its relative area is uniform in `CROP_AREA` and its ratio log-uniform in
    `CROP_RATIO`. Its position is uniform. If ten attempts do not fit into the image, it
    is the largest central crop with an allowed ratio.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*CROP_AREA)
        ratio = math.exp(rng.uniform(*np.log(CROP_RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(width - w, endpoint=True))
            top = int(rng.integers(height - h, endpoint=True))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * CROP_RATIO[1])))
    h = min(height, max(1, round(width / CROP_RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def train_image(encoded: bytes, rng: np.random.Generator) -> np.ndarray:
    """Decode an image, crop it at random, resize it, and mirror it at random."""
    with _decoded(encoded) as image:
        box = random_crop(rng, *image.size)
        size = (IMAGE_SIZE, IMAGE_SIZE)
        crop = image.resize(size, PIL.Image.Resampling.BILINEAR, box)
        pixels = np.asarray(crop)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def test_image(encoded: bytes) -> np.ndarray:
    """Decode an image, resize its shorter side to `RESIZED`, and crop the centre."""
    with _decoded(encoded) as image:
        width, height = image.size
        scale = RESIZED / min(width, height)
        # The shorter side becomes exactly RESIZED. The longer side is rounded down.
        w, h = max(RESIZED, int(width * scale)), max(RESIZED, int(height * scale))
        resized = image.resize((w, h), PIL.Image.Resampling.BILINEAR)
        left, top = (w - IMAGE_SIZE) // 2, (h - IMAGE_SIZE) // 2
        return np.asarray(
            resized.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))
        )


def _decoded(encoded: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG")).convert("RGB")


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Return the order of the images in pass `epoch` through the data."""
    return np.random.default_rng((seed, _ORDER, epoch)).permutation(size)


def _train_batch(
    step: int,
    *,
    source: Any,
    size: int,
    seed: int,
    batch_size: int,
    offset: int,
    local: int,
) -> Split:
    """Return rows `offset` to `offset` + `local` of the global batch `step`."""
    first = step * batch_size + offset
    positions = range(first, first + local)
    indices = [int(_order(seed, p // size, size)[p % size]) for p in positions]
    images = np.empty((local, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    labels = np.empty(local, np.int32)
    examples = _read(source, indices)
    for row, (position, example) in enumerate(zip(positions, examples, strict=True)):
        rng = np.random.default_rng((seed, _AUGMENTATION, position))
        with _explain_read_errors(source):
            images[row] = train_image(example["image"], rng)
        labels[row] = example["label"]
    return Split(images, labels)


def _test_batch(
    step: int, *, source: Any, size: int, batch_size: int, offset: int, local: int
) -> Split:
    """Return rows `offset` to `offset` + `local` of the global batch `step`."""
    first = step * batch_size + offset
    images = np.zeros((local, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    labels = np.full(local, -1, np.int32)
    examples = _read(source, list(range(min(first, size), min(first + local, size))))
    for row, example in enumerate(examples):
        with _explain_read_errors(source):
            images[row] = test_image(example["image"])
        labels[row] = example["label"]
    return Split(images, labels)


def _read(source: Any, indices: list[int]) -> list[Any]:
    with _explain_read_errors(source):
        return source.__getitems__(indices)


@contextlib.contextmanager
def _explain_read_errors(source: Any) -> Generator[None]:
    """Turn all errors of a reader of damaged data into an OSError."""
    try:
        yield
    except Exception as error:
        raise OSError(
            f"{source.dataset_info.data_dir} cannot be read ({type(error).__name__}: "
            f"{error}). Remove the folder, then prepare {source.dataset_info.name} "
            "again."
        ) from error


def _local_size(batch_size: int, process: int, processes: int) -> int:
    """Return the number of rows of a global batch that belong to one process."""
    if batch_size < 1 or batch_size % processes:
        raise ValueError(
            "batch_size must be a positive multiple of the number of processes, "
            f"{processes}, got {batch_size}."
        )
    if not 0 <= process < processes:
        raise ValueError(f"process must lie in 0 to {processes - 1}, got {process}.")
    return batch_size // processes


def _iterate(
    make: Callable[[int], Split], start: int, stop: int, workers: int
) -> Iterator[Split]:
    """Yield `make(start)` to `make(stop - 1)` in order, computed ahead of their use.

    An element of the grain data set is a whole batch, so batches do not depend on the
    number of workers or threads.
    """
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}.")
    batches = grain.MapDataset.range(start, stop).map(make)
    threads = 1 if workers else min(os.cpu_count() or 1, _MAX_THREADS)
    dataset = batches.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
    )
    if workers:
        # Grain reads absl flags, which this program does not parse.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    running = [iter(dataset)]
    copies = _copy_batches(running)
    # Stop threads and workers after the last use, before the interpreter shuts down.
    weakref.finalize(copies, _stop, running)
    return copies


def _copy_batches(running: list[Any]) -> Iterator[Split]:
    """Copy the batches of the only iterator in the list.

    The memory of the original batches is shared with the workers and ends with them.
    """
    while True:
        try:
            batch = Split(*map(np.array, next(running[0])))
        except StopIteration:
            return
        yield batch


def _stop(running: list[Any]) -> None:
    running.pop().close()
