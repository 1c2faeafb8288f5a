"""Data sets, by tensorflow-datasets and without TensorFlow.

Small ones are read whole, as uint8 arrays that live on the device and are shuffled,
moved and normalised within the training step. ImageNet is a `Stream`. Nothing here
downloads anything; `python -m experiments.prepare NAME` does.
"""

from experiments.data.imagenet import Stream
from experiments.data.in_memory import Dataset, Split, from_arrays
from experiments.data.loading import load
from experiments.data.preparation import NAMES

__all__ = ["NAMES", "Dataset", "Split", "Stream", "from_arrays", "load"]
