"""Networks by name, from normalised images, or bytes of text, to logits.

Each is a flax module that is called as `module(x, train)`. Parameters and logits are
float32; `dtype` is what the layers between compute in. Layers are named so that the
alphabetical order of the kernels, in which jax walks a dictionary, is the order in
which the network applies them; reports list them in it.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from experiments.models import resnet
from experiments.models.cnn import CNN, NormedCNN
from experiments.models.layers import Ghosts as Ghosts
from experiments.models.layers import Skip as Skip
from experiments.models.lenet import LeNet5, LeNet300
from experiments.models.mobilenet import MobileNetV1, MobileNetV2
from experiments.models.transformer import GPT, ViT
from experiments.models.vgg import VGG
from experiments.models.wide_resnet import WideResNet
from granet_jax import tost

_PLAIN: dict[str, Callable[..., nn.Module]] = {
    "lenet-300-100": LeNet300,
    "lenet-5": LeNet5,
    "cnn": CNN,
    "vit-s-16": ViT,
    "gpt": GPT,
}
_WITH_BATCH_NORM: dict[str, Callable[..., nn.Module]] = {
    "cnn-bn": NormedCNN,
    "cnn-bn-small": functools.partial(NormedCNN, stem_strides=2),
    "resnet-20": resnet.thin(20),
    "resnet-32": resnet.thin(32),
    "resnet-56": resnet.thin(56),
    "resnet-104": resnet.thin(104),
    "resnet-110": resnet.thin(110),
    "resnet-18-cifar": resnet.wide((2, 2, 2, 2), bottleneck=False, large=False),
    "resnet-34-cifar": resnet.wide((3, 4, 6, 3), bottleneck=False, large=False),
    "resnet-50-cifar": resnet.wide((3, 4, 6, 3), bottleneck=True, large=False),
    "resnet-50": resnet.wide((3, 4, 6, 3), bottleneck=True, large=True),
    "vgg-16": functools.partial(VGG, groups=(2, 2, 3, 3, 3)),
    "vgg-19": functools.partial(VGG, groups=(2, 2, 4, 4, 4)),
    "wrn-22-2": functools.partial(WideResNet, depth=22, factor=2),
    "mobilenet-v1": MobileNetV1,
    "mobilenet-v2": MobileNetV2,
}

NAMES: tuple[str, ...] = (*_PLAIN, *_WITH_BATCH_NORM)
"""The models there are."""

WITH_NEURONS: tuple[str, ...] = tuple(n for n in NAMES if n not in ("vit-s-16", "gpt"))
"""Those with ReLU, which ghost activations take the place of."""

WITH_SKIPS: tuple[str, ...] = ("cnn", *_WITH_BATCH_NORM)
"""Those that have places for ghost skips."""

_DTYPES = ("float32", "bfloat16")


def create(
    name: str,
    *,
    classes: int,
    dtype: DTypeLike = jnp.float32,
    axis_name: str | None = None,
) -> nn.Module:
    """A network.

    Args:
      name: one of `NAMES`.
      classes: number of logits.
      dtype: that the layers compute in: float32 or bfloat16.
      axis_name: mapped axis (of `pmap`) that batch norm averages the statistics of the
        batch over; None outside of a mapped function.

    Returns:
      A module whose `apply(variables, x, train)` gives logits.

    Raises:
      ValueError: an unknown name, or another dtype.
    """
    if name not in NAMES:
        raise ValueError(f"model must be one of {', '.join(NAMES)}, got {name!r}.")
    dtype = jnp.dtype(dtype)
    if dtype.name not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype}.")
    if name in _PLAIN:
        return _PLAIN[name](classes=classes, dtype=dtype)
    model = _WITH_BATCH_NORM[name]
    return model(classes=classes, dtype=dtype, axis_name=axis_name)


def maskable(path: str, leaf: jax.Array) -> bool:
    """Whether a parameter is pruned: the kernels of convolutions and linear layers.

    The rule of the papers. It leaves out biases and norms, and what else has two
    dimensions or more: embeddings of bytes and positions, the class token; and ghosts.

    Args:
      path: "layer/kernel", as the library names leaves.
      leaf: the parameter.
    """
    is_kernel = path.rpartition("/")[2] == "kernel" and leaf.ndim >= 2
    return is_kernel and not tost.is_ghost(path)
