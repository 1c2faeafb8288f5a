"""Prepared data sets, read from disk."""

import io
import os
import sys
from typing import Any

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from experiments.data import preparation
from experiments.data.imagenet import Stream, open_stream
from experiments.data.in_memory import Dataset, Split, from_arrays

# Length of a row of text, in bytes.
TEXT_LENGTH = 128

# Where the labelled images that a model is judged by are not called "test".
_TEST_SPLITS = {"tiny_imagenet": "validation", "imagenet2012": "validation"}


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset | Stream:
    """The data set `name`; never downloads anything.

    Sets whose files are on the machine anyway (`digits`, `python_docs`, and
    `fashion_mnist` with Debian's package) are prepared first where they are not.

    Args:
      name: one of `NAMES`.
      data_dir: where prepared data sets are; None: the folder in TFDS_DATA_DIR, else
        ~/tensorflow_datasets.

    Returns:
      The whole data set in main memory; for imagenet2012 a `Stream`.

    Raises:
      ValueError: there is no such data set.
      FileNotFoundError: it is not prepared; says how to.
      OSError: it cannot be read.
    """
    own = preparation.builder_of(name, data_dir)
    if not preparation.is_prepared(own):
        if not preparation.is_at_hand(name):
            raise FileNotFoundError(preparation.missing_message(name, data_dir))
        print(f"preparing {name} in {own.data_dir}", file=sys.stderr)
        preparation.prepare(name, data_dir)
    try:
        # What is read is what the folder says it holds, not what our builder writes.
        builder: Any = tfds.builder_from_directory(own.data_dir)
        test_split = _TEST_SPLITS.get(name, "test")
        if name == "imagenet2012":
            return open_stream(name, builder, test_split)
        if "text" in builder.info.features:
            return from_arrays(
                name, _text(builder, "train"), _text(builder, test_split), classes=256
            )
        return from_arrays(
            name,
            _images(builder, "train"),
            _images(builder, test_split),
            builder.info.features["label"].num_classes,
        )
    except Exception as error:  # whatever the reader of a damaged file raises
        raise OSError(
            f"{own.data_dir} cannot be read ({type(error).__name__}: {error}). "
            f"{preparation.remedy(own)}"
        ) from error


def _images(builder: Any, split: str) -> Split:
    """All images and labels of a split, in the order of its files."""
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
    """A text in rows, with the byte that follows each as its label."""
    (example,) = builder.as_data_source(split)
    text = np.frombuffer(example["text"], np.uint8)
    rows = (len(text) - 1) // TEXT_LENGTH
    inputs = text[: rows * TEXT_LENGTH].reshape(rows, TEXT_LENGTH)
    labels = text[1 : rows * TEXT_LENGTH + 1].reshape(rows, TEXT_LENGTH)
    return Split(inputs.copy(), labels.astype(np.int32))
