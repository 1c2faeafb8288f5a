"""Data sets, read with tensorflow-datasets but without TensorFlow.

Small data sets are read completely. Their uint8 arrays stay on the device, and the
training step shuffles, augments and normalises them. ImageNet is a `Stream`. Reading
never downloads anything; `python -m experiments.prepare NAME` does.
"""

from experiments.data.imagenet import Stream
from experiments.data.in_memory import Dataset, Split, as_rows, from_arrays
from experiments.data.loading import load
from experiments.data.preparation import NAMES

__all__ = ["NAMES", "Dataset", "Split", "Stream", "as_rows", "from_arrays", "load"]
