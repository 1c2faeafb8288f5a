"""Layers as the reference codes have them, with float32 parameters.

Padding is that of PyTorch, kernel // 2 on every side, which differs from "SAME" where
the stride is 2: there "SAME" pads one side only.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from granet_jax import tost
from granet_jax.tost import linen

Initializer = jax.nn.initializers.Initializer

he_fan_out: Initializer = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""Normal of variance 2 / (kernel size x output channels): PyTorch codes' "kaiming"."""

he_fan_in: Initializer = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
"""Normal of variance 2 / (inputs of a unit)."""

torch_default: Initializer = nn.initializers.variance_scaling(
    1 / 3, "fan_in", "uniform"
)
"""Uniform in +-1 / sqrt(inputs of a unit): what PyTorch's layers start from."""


class Skip(NamedTuple):
    """Ghost skip connections, one beside every convolution of a block.

    Attributes:
      config: which kind they are of.
      alpha: their coefficient, a floating scalar.
    """

    config: tost.Skips
    alpha: jax.Array


class Ghosts(NamedTuple):
    """What a network has for the early part of its training only (ToST).

    Attributes:
      activation: in place of ReLU.
      skip: None for none.
    """

    activation: Callable[[jax.Array], jax.Array] = nn.relu
    skip: Skip | None = None

    def beside(
        self,
        y: jax.Array,
        x: jax.Array,
        strides: int,
        train: bool,
        *,
        axis_name: str | None = None,
        name: str,
    ) -> jax.Array:
        """What a convolution makes of `x`, `y`, with the skip beside it, if any.

        Args:
          y: after the norm that follows the convolution, if one does.
          x: what goes into the convolution.
          strides: of the convolution.
          train: see `batch_norm`.
          axis_name: see `batch_norm`.
          name: of the layer; begins with "ghost_".
        """
        if self.skip is None:
            return y
        around = linen.make_skip(
            self.skip.config,
            y.shape[-1],
            strides,
            dtype=y.dtype,
            axis_name=axis_name,
            name=name,
        )
        return y + self.skip.alpha.astype(y.dtype) * around(x, train)


NO_GHOSTS = Ghosts()
"""The plain network."""


def conv(
    features: int,
    kernel: int,
    strides: int = 1,
    *,
    groups: int = 1,
    bias: bool = False,
    init: Initializer = he_fan_out,
    dtype: jnp.dtype,
    name: str,
) -> nn.Conv:
    """A square convolution."""
    return nn.Conv(
        features,
        (kernel, kernel),
        strides,
        padding=kernel // 2,
        feature_group_count=groups,
        use_bias=bias,
        kernel_init=init,
        dtype=dtype,
        name=name,
    )


def batch_norm(
    train: bool,
    *,
    scale: float = 1.0,
    dtype: jnp.dtype,
    axis_name: str | None,
    name: str,
) -> nn.BatchNorm:
    """Batch norm that computes in float32 and gives `dtype`.

    Args:
      train: with the statistics of the batch, which the running ones then follow.
      scale: the initial one.
      dtype: of the output.
      axis_name: mapped axis that the statistics of the batch are averaged over.
      name: of the layer.
    """
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        scale_init=nn.initializers.constant(scale),
        dtype=dtype,
        axis_name=axis_name,
        name=name,
    )


def output(classes: int, *, init: Initializer) -> nn.Dense:
    """The linear classifier "output", in float32 even where other layers are not.

    That is, in the wider of the dtypes of its parameters, float32, and of its input.
    """
    return nn.Dense(classes, kernel_init=init, name="output")


def average_pool(x: jax.Array) -> jax.Array:
    """The mean over all positions, float32 or wider: (n, h, w, c) to (n, c)."""
    return jnp.mean(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=(1, 2))


def check_images(model: str, x: jax.Array, smallest: int = 1) -> None:
    """Raises ValueError unless x is (n, height, width, channels) and large enough."""
    if x.ndim != 4:
        raise ValueError(
            f"model {model} takes images (n, height, width, channels), got an input of "
            f"shape {x.shape}; choose a data set of images, or another model."
        )
    if min(x.shape[1:3]) < smallest:
        raise ValueError(
            f"model {model} takes images of {smallest} x {smallest} pixels or more, "
            f"got {x.shape[1]} x {x.shape[2]}; choose a smaller model, such as cnn."
        )


def check_text(model: str, x: jax.Array, longest: int) -> None:
    """Raises ValueError unless x is (n, length) and not longer than `longest`."""
    if x.ndim != 2:
        raise ValueError(
            f"model {model} takes text (n, length), got an input of shape {x.shape}; "
            "choose a data set of text, or another model."
        )
    if x.shape[1] > longest:
        raise ValueError(
            f"model {model} takes texts of at most {longest} bytes, got "
            f"{x.shape[1]}; cut them into shorter ones."
        )
