"""Read prepared data sets from disk."""

import io
import os
import sys
from typing import Any

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from experiments.buckets import in_bucket
from experiments.data import from_bucket, preparation
from experiments.data.imagenet import Stream, open_stream
from experiments.data.in_memory import Dataset, Split, from_arrays

# Length of a row of text, in bytes.
TEXT_LENGTH = 128

# Data sets whose labelled test images are in a split of another name.
_TEST_SPLITS = {"tiny_imagenet": "validation", "imagenet2012": "validation"}


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset | Stream:
    """Load a data set. It never downloads anything.

    Data sets whose source files are on this machine are prepared first if necessary:
    `digits`, `python_docs`, and with Debian's package also `fashion_mnist` and
    `fashion_mnist_photos`.

    Args:
      name: One of `NAMES`.
      data_dir: Folder of prepared data sets; None means the folder in TFDS_DATA_DIR,
        otherwise ~/tensorflow_datasets. If it is in a bucket, the data set is first
        copied to the folder that None means.

    Returns:
      The whole data set in main memory; for imagenet2012, a `Stream`.

    Raises:
      ValueError: There is no such data set.
      FileNotFoundError: The data set is not prepared.
      OSError: The data set cannot be read.
    """
    if data_dir is not None and in_bucket(data_dir):
        from_bucket.copy(name, data_dir)
        data_dir = None
    builder = preparation.builder_of(name, data_dir)
    if not preparation.is_prepared(builder):
        if not preparation.is_available(name):
            raise FileNotFoundError(preparation.missing_message(name, data_dir))
        print(f"preparing {name} in {builder.data_dir}", file=sys.stderr)
        preparation.prepare(name, data_dir)
    try:
        # The metadata in the folder say what it contains, not our builder.
        reader: Any = tfds.builder_from_directory(builder.data_dir)
        test_split = _TEST_SPLITS.get(name, "test")
        if name == "imagenet2012":
            return open_stream(name, reader, test_split)
        if "text" in reader.info.features:
            return from_arrays(
                name, _text(reader, "train"), _text(reader, test_split), classes=256
            )
        return from_arrays(
            name,
            _images(reader, "train"),
            _images(reader, test_split),
            reader.info.features["label"].num_classes,
        )
    except Exception as error:  # Damaged files raise errors of many types.
        raise OSError(
            f"{builder.data_dir} cannot be read ({type(error).__name__}: {error}). "
            f"{preparation.remedy(builder)}"
        ) from error


def _images(builder: Any, split: str) -> Split:
    """Return all images and labels of a split, in the order of its files."""
    source = builder.as_data_source(
        split, decoders={"image": tfds.decode.SkipDecoding()}
    )
    size = builder.info.splits[split].num_examples
    examples = source.__getitems__(range(size))
    images = np.empty((size, *builder.info.features["image"].shape), np.uint8)
    mode = "L" if images.shape[-1] == 1 else "RGB"
    for index, example in enumerate(examples):
        with PIL.Image.open(
            io.BytesIO(example["image"]), formats=("PNG", "JPEG")
        ) as image:
            images[index] = np.asarray(image.convert(mode)).reshape(images.shape[1:])
    labels = np.array([example["label"] for example in examples], np.int32)
    return Split(images, labels)


def _text(builder: Any, split: str) -> Split:
    """Return a text in rows; the label of every byte is the next byte."""
    (example,) = builder.as_data_source(split)
    text = np.frombuffer(example["text"], np.uint8)
    rows = (len(text) - 1) // TEXT_LENGTH
    inputs = text[: rows * TEXT_LENGTH].reshape(rows, TEXT_LENGTH)
    labels = text[1 : rows * TEXT_LENGTH + 1].reshape(rows, TEXT_LENGTH)
    return Split(inputs.copy(), labels.astype(np.int32))
