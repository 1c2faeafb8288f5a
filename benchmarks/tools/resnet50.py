"""The parameter tree of ResNet-50: shapes only, as a realistic load for benchmarks."""

import math
from typing import Any

import numpy as np

# He et al. 2016, as flax and torchvision build it: convolutions without bias, each
# followed by a batch normalisation.
PARAMETERS = 25_557_032
KERNELS = 54
_STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))
_EXPANSION = 4

Shapes = dict[str, Any]


def shapes() -> Shapes:
    """ResNet-50 for ImageNet: 161 arrays, 54 of them kernels (HWIO or in x out)."""
    return _resnet(stages=_STAGES, stem=64, classes=1000)


def small_shapes() -> Shapes:
    """The same structure with one block and few channels: for checks, not timings."""
    return _resnet(stages=((1, 8),), stem=8, classes=10)


def size(tree: Shapes) -> int:
    """Number of parameters in a tree of shapes."""
    return sum(
        size(node) if isinstance(node, dict) else math.prod(node)
        for node in tree.values()
    )


def draw(tree: Shapes, seed: int, *, scale: float | None = None) -> dict[str, Any]:
    """A tree of float32 NumPy arrays.

    Args:
      tree: tree of shapes.
      seed: of the random numbers.
      scale: standard deviation of all entries. Default: as at initialisation, so
        kernels normal with variance 2 / fan-in, norm scales one, biases zero.
    """
    rng = np.random.default_rng(seed)

    def leaf(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if scale is not None:
            return rng.standard_normal(shape, np.float32) * np.float32(scale)
        if len(shape) < 2:
            return np.full(shape, name == "scale", np.float32)
        deviation = math.sqrt(2 / math.prod(shape[:-1]))
        return rng.standard_normal(shape, np.float32) * np.float32(deviation)

    def node(tree: Shapes) -> dict[str, Any]:
        return {
            name: node(child) if isinstance(child, dict) else leaf(name, child)
            for name, child in tree.items()
        }

    return node(tree)


def _resnet(stages: tuple[tuple[int, int], ...], stem: int, classes: int) -> Shapes:
    tree: Shapes = {"stem": _convolution(7, 3, stem)}
    channels = stem
    for i, (blocks, width) in enumerate(stages):
        for j in range(blocks):
            out = _EXPANSION * width
            block = {
                "conv1": _convolution(1, channels, width),
                "conv2": _convolution(3, width, width),
                "conv3": _convolution(1, width, out),
            }
            if j == 0:
                block["shortcut"] = _convolution(1, channels, out)
            tree[f"stage{i + 1}_block{j + 1}"] = block
            channels = out
    tree["head"] = {"kernel": (channels, classes), "bias": (classes,)}
    return tree


def _convolution(kernel: int, inputs: int, outputs: int) -> Shapes:
    return {
        "kernel": (kernel, kernel, inputs, outputs),
        "scale": (outputs,),
        "bias": (outputs,),
    }
