"""ImageNet: decoded, cropped and flipped on the host while the device trains.

What every batch holds is a pure function of the seed and the number of the step, so a
run continues at any step, with any number of processes and workers, as if it had never
stopped; there is no iterator state to save.
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

# Side of the images a network sees, and what the shorter side of a test image is
# resized to before its centre is cut out, in pixels.
IMAGE_SIZE = 224
RESIZED = 256

# Part of the image's area that a random crop covers, and the ratio of its width to its
# height.
CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)

# Of ImageNet's training images, for values from 0 to 1, as everywhere in the
# literature.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# More steps than any run has.
_ENDLESS = 2**40

# Each thread makes a batch of its own, and decoding leaves the interpreter free.
_MAX_THREADS = 16

# Distinguish the uses of a seed.
_ORDER, _AUGMENTATION = 0, 1


@dataclasses.dataclass(frozen=True)
class Stream:
    """A data set that outgrows memory, as batches.

    Attributes:
      name: as given to `load`.
      classes: number of classes.
      mean: of every channel over the training images, for values from 0 to 1.
      std: standard deviation, likewise.
      image_shape: height, width and channels of what the batches hold.
      train_size: number of training images.
      test_size: number of test images.
      train_source: encoded training images with labels, by index.
      test_source: likewise, for test images.
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
        """Steps of a pass through the data: batches run on into the next one."""
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
        """This process's part of the global batches `start`, `start` + 1, and so on.

        The images follow each other in an order drawn anew for every pass through the
        data, and batches run on from one pass into the next. Each image is cropped at
        random and mirrored half of the time.

        Args:
          seed: of order and augmentation, at least 0.
          start: number of the first step.
          batch_size: of the global batch; the processes share it evenly, in order.
          process: number of this process.
          processes: number of processes.
          workers: processes that decode; 0: threads of this process do.

        Returns:
          Endless batches: images of shape (batch_size / processes, 224, 224, 3), and
          labels.

        Raises:
          ValueError: an argument is out of range, or `processes` does not divide
            `batch_size`.
          OSError: while iterating: the data cannot be read.
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
        """This process's part of the test images: together, each exactly once.

        All batches are whole, and every process has as many: rows that only fill up
        are black, with the label -1.

        Args:
          batch_size: of the global batch; the processes share it evenly, in order.
          process: number of this process.
          processes: number of processes.
          workers: processes that decode; 0: threads of this process do.

        Returns:
          Images of shape (batch_size / processes, 224, 224, 3), and labels.

        Raises:
          ValueError: as of `train_batches`.
          OSError: likewise.
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
    """The prepared data set of a builder of tensorflow-datasets, as a `Stream`.

    Raises:
      ValueError: the data set lacks a split.
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
    """Left, top, right and bottom of a crop of random area and shape.

    Its area is uniform over `CROP_AREA`, the logarithm of its ratio over `CROP_RATIO`,
    its place over all where it fits. Where ten drawn do not fit, it is the largest one
    in the centre whose ratio is allowed.
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
    """A random crop of an encoded image, resized, mirrored half of the time."""
    with _decoded(encoded) as image:
        box = random_crop(rng, *image.size)
        size = (IMAGE_SIZE, IMAGE_SIZE)
        crop = image.resize(size, PIL.Image.Resampling.BILINEAR, box)
        pixels = np.asarray(crop)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def test_image(encoded: bytes) -> np.ndarray:
    """The centre of an encoded image, of which the shorter side was resized first."""
    with _decoded(encoded) as image:
        width, height = image.size
        scale = RESIZED / min(width, height)
        # Exactly RESIZED for the shorter side, and downwards for the longer one.
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
    """The order of the images in pass number `epoch` through the data."""
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
    """Rows `offset` to `offset` + `local` of the global batch `step`."""
    first = step * batch_size + offset
    positions = range(first, first + local)
    indices = [int(_order(seed, p // size, size)[p % size]) for p in positions]
    images = np.empty((local, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    labels = np.empty(local, np.int32)
    examples = _read(source, indices)
    for row, (position, example) in enumerate(zip(positions, examples, strict=True)):
        rng = np.random.default_rng((seed, _AUGMENTATION, position))
        with _readable(source):
            images[row] = train_image(example["image"], rng)
        labels[row] = example["label"]
    return Split(images, labels)


def _test_batch(
    step: int, *, source: Any, size: int, batch_size: int, offset: int, local: int
) -> Split:
    """Rows `offset` to `offset` + `local` of the global batch `step`."""
    first = step * batch_size + offset
    images = np.zeros((local, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    labels = np.full(local, -1, np.int32)
    examples = _read(source, list(range(min(first, size), min(first + local, size))))
    for row, example in enumerate(examples):
        with _readable(source):
            images[row] = test_image(example["image"])
        labels[row] = example["label"]
    return Split(images, labels)


def _read(source: Any, indices: list[int]) -> list[Any]:
    with _readable(source):
        return source.__getitems__(indices)


@contextlib.contextmanager
def _readable(source: Any) -> Generator[None]:
    """Turns whatever the reader of damaged data raises into an OSError."""
    try:
        yield
    except Exception as error:
        raise OSError(
            f"{source.dataset_info.data_dir} cannot be read ({type(error).__name__}: "
            f"{error}). Remove the folder, then prepare {source.dataset_info.name} "
            "again."
        ) from error


def _local_size(batch_size: int, process: int, processes: int) -> int:
    """Number of rows of a global batch that belong to one process."""
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
    """`make(start)` to `make(stop - 1)` in order, made ahead of their use.

    An element of grain's is a whole batch, so that neither the number of workers nor
    that of threads has a part in what a batch holds.
    """
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}.")
    batches = grain.MapDataset.range(start, stop).map(make)
    threads = 1 if workers else min(os.cpu_count() or 1, _MAX_THREADS)
    dataset = batches.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
    )
    if workers:
        # Grain reads flags of absl, which nothing here parses.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    running = [iter(dataset)]
    found = _batches(running)
    # Ends threads and workers with the last use, and before the interpreter shuts down.
    weakref.finalize(found, _end, running)
    return found


def _batches(running: list[Any]) -> Iterator[Split]:
    """The batches of the only iterator in the list.

    They are copied out of the memory that is shared with workers, which ends with them.
    """
    while True:
        try:
            batch = Split(*map(np.array, next(running[0])))
        except StopIteration:
            return
        yield batch


def _end(running: list[Any]) -> None:
    running.pop().close()
