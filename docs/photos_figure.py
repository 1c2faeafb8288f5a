"""Draw images of the data set fashion_mnist_photos.

    python docs/photos_figure.py

It writes `docs/images/fashion_mnist_photos.png`.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from experiments import data  # noqa: E402

NAMES = (
    *("t-shirt", "trousers", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "boot"),
)


def draw(path: Path) -> None:
    """Draw two training images and a test image of every class."""
    dataset = data.load("fashion_mnist_photos")
    assert isinstance(dataset, data.Dataset)
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    rows = figure.subplots(3, 10)
    sources = ((dataset.train, 0), (dataset.train, 1), (dataset.test, 0))
    for axes, (split, number) in zip(rows, sources, strict=True):
        for label, ax in enumerate(axes):
            index = np.flatnonzero(np.asarray(split.labels) == label)[number]
            ax.imshow(np.asarray(split.inputs[index]))
            ax.set(xticks=[], yticks=[])
    for ax, name in zip(rows[0], NAMES, strict=True):
        ax.set_title(name, fontsize=10)
    for axes, text in zip(rows, ("training", "training", "test"), strict=True):
        axes[0].set_ylabel(text)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(HERE / "images" / "fashion_mnist_photos.png")
