"""Networks by name, from normalised images or bytes of text to logits.

Each network is a flax module that is called as `module(x, train)`. Parameters and
logits are float32, and `dtype` is the dtype of the other layers. The names of the
layers are in alphabetical order from input to output: JAX traverses dictionaries in
this order, so reports list the layers in it.
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
    "cnn-bn-gap": functools.partial(NormedCNN, stem_strides=2, pooled=True),
    "resnet-8-width-8": resnet.thin(8, width=8),
    "resnet-20-width-8": resnet.thin(20, width=8),
    "resnet-20": resnet.thin(20),
    "resnet-32": resnet.thin(32),
    "resnet-56": resnet.thin(56),
    "resnet-104": resnet.thin(104),
    "resnet-110": resnet.thin(110),
    "resnet-18-cifar": resnet.wide((2, 2, 2, 2), bottleneck=False, large=False),
    "resnet-34-cifar": resnet.wide((3, 4, 6, 3), bottleneck=False, large=False),
    "resnet-50-cifar": resnet.wide((3, 4, 6, 3), bottleneck=True, large=False),
    "resnet-50": resnet.wide((3, 4, 6, 3), bottleneck=True, large=True),
    "vgg-11-width-16": functools.partial(VGG, groups=(1, 1, 2, 2, 2), width=16),
    "vgg-16": functools.partial(VGG, groups=(2, 2, 3, 3, 3)),
    "vgg-19": functools.partial(VGG, groups=(2, 2, 4, 4, 4)),
    "wrn-22-2": functools.partial(WideResNet, depth=22, factor=2),
    "mobilenet-v1": MobileNetV1,
    "mobilenet-v2": MobileNetV2,
}

NAMES: tuple[str, ...] = (*_PLAIN, *_WITH_BATCH_NORM)
"""Names of the models."""

WITH_NEURONS: tuple[str, ...] = tuple(n for n in NAMES if n not in ("vit-s-16", "gpt"))
"""Models with ReLU, which ghost activations can replace."""

WITH_SKIPS: tuple[str, ...] = ("cnn", *_WITH_BATCH_NORM)
"""Models that support ghost skips."""

_DTYPES = ("float32", "bfloat16")


def create(
    name: str,
    *,
    classes: int,
    dtype: DTypeLike = jnp.float32,
    axis_name: str | None = None,
) -> nn.Module:
    """Create a network.

    Args:
      name: One of `NAMES`.
      classes: Number of logits.
      dtype: Dtype of the layers, float32 or bfloat16.
      axis_name: Mapped axis (of `pmap`) over which batch norm averages the statistics
        of the batch; None outside a mapped function.

    Returns:
      A module whose `apply(variables, x, train)` returns logits.

    Raises:
      ValueError: The name or the dtype is unknown.
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
    """Return whether a parameter is pruned: kernels of convolutions and linear layers.

    This is the rule of the papers. It leaves out biases, norms, embeddings of bytes and
    positions, the class token, and ghosts.

    Args:
      path: Name of the parameter, such as "layer/kernel".
      leaf: The parameter.
    """
    is_kernel = path.rpartition("/")[2] == "kernel" and leaf.ndim >= 2
    return is_kernel and not tost.is_ghost(path)
