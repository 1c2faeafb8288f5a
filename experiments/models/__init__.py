"""Networks by name, from normalised images, or bytes of text, to logits.

Each is a flax module that is called as `module(x, train)`. Parameters and logits are
float32; `dtype` is what the layers between compute in. Layers are named so that the
alphabetical order of the kernels, in which jax walks a dictionary, is the order in
which the network applies them; reports list them in it.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.cnn import CNN
from experiments.models.lenet import LeNet5, LeNet300

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet-300-100": LeNet300,
    "lenet-5": LeNet5,
    "cnn": CNN,
}

NAMES: tuple[str, ...] = tuple(_MODELS)
"""The models there are."""


def create(
    name: str,
    *,
    classes: int,
    dtype: jnp.dtype = jnp.dtype("float32"),
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
      ValueError: an unknown name.
    """
    if name not in _MODELS:
        raise ValueError(f"model must be one of {', '.join(NAMES)}, got {name!r}.")
    model = _MODELS[name]
    if "axis_name" in model.__dataclass_fields__:
        return model(classes=classes, dtype=jnp.dtype(dtype), axis_name=axis_name)
    return model(classes=classes, dtype=jnp.dtype(dtype))


def maskable(path: str, leaf: jax.Array) -> bool:
    """Whether a parameter is pruned: the kernels of convolutions and linear layers.

    The rule of the papers. It leaves out biases and norms, and what else has two
    dimensions or more: embeddings of bytes and positions, and the class token.

    Args:
      path: "layer/kernel", as the library names leaves.
      leaf: the parameter.
    """
    return path.rpartition("/")[2] == "kernel" and leaf.ndim >= 2
