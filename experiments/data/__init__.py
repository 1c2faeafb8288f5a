"""Data sets, by tensorflow-datasets and without TensorFlow.

Small ones are read whole, as uint8 arrays that live on the device and are shuffled,
moved and normalised within the training step. ImageNet is a `Stream`. Nothing here
downloads anything; `python -m experiments.prepare NAME` does.
"""

from experiments.data.arrays import Dataset, Split, from_arrays
from experiments.data.preparation import NAMES
from experiments.data.reading import load
from experiments.data.stream import Stream

__all__ = ["NAMES", "Dataset", "Split", "Stream", "from_arrays", "load"]
