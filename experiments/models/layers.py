"""Layers of the reference implementations, with float32 parameters.

Padding is kernel // 2 on every side, as in PyTorch. With stride 2, "SAME" would pad one
side only.
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
"""Normal with variance 2 / (kernel size x output channels), as in PyTorch networks."""

he_fan_in: Initializer = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
"""Normal with variance 2 / (inputs of a unit)."""

torch_default: Initializer = nn.initializers.variance_scaling(
    1 / 3, "fan_in", "uniform"
)
"""Uniform in +-1 / sqrt(inputs of a unit), the default of PyTorch's layers."""


class Skip(NamedTuple):
    """Ghost skip connections, one around every convolution of a block.

    Attributes:
      config: Kind of the connections.
      alpha: Coefficient of the connections, a floating-point scalar.
    """

    config: tost.Skips
    alpha: jax.Array


class Ghosts(NamedTuple):
    """Parts of a network that exist only early in training (ToST).

    Attributes:
      activation: Activation that replaces ReLU.
      skip: Skip connections; None for none.
    """

    activation: Callable[[jax.Array], jax.Array] = nn.relu
    skip: Skip | None = None

    def add_skip(
        self,
        y: jax.Array,
        x: jax.Array,
        strides: int,
        train: bool,
        *,
        axis_name: str | None = None,
        name: str,
    ) -> jax.Array:
        """Add the skip connection, if any, to the output of a convolution.

        Args:
          y: Output of the convolution, after its norm.
          x: Input of the convolution.
          strides: Strides of the convolution.
          train: Whether batch norm uses the statistics of the batch.
          axis_name: Mapped axis over which these statistics are averaged.
          name: Name of the layer, which begins with "ghost_".
        """
        if self.skip is None:
            return y
        skip = linen.make_skip(
            self.skip.config,
            y.shape[-1],
            strides,
            dtype=y.dtype,
            axis_name=axis_name,
            name=name,
        )
        return y + self.skip.alpha.astype(y.dtype) * skip(x, train)


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
    """Return a convolution with a square kernel."""
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
    """Return a batch norm that computes in float32.

    Args:
      train: Whether to use the statistics of the batch and update the running ones.
      scale: Initial scale.
      dtype: Dtype of the output.
      axis_name: Mapped axis over which the statistics of the batch are averaged.
      name: Name of the layer.
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
    """Return the linear classifier "output".

    It computes in float32 or the dtype of its input, whichever is wider.
    """
    return nn.Dense(classes, kernel_init=init, name="output")


def average_pool(x: jax.Array) -> jax.Array:
    """Average over all positions, (n, h, w, c) to (n, c), in float32 or wider."""
    return jnp.mean(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=(1, 2))


def check_images(model: str, x: jax.Array, smallest: int = 1) -> None:
    """Raise ValueError unless x is (n, height, width, channels) and large enough."""
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
    """Raise ValueError unless x is (n, length) and at most `longest` long."""
    if x.ndim != 2:
        raise ValueError(
            f"model {model} takes text (n, length), got an input of shape {x.shape}; "
            "choose a data set of text, or another model."
        )
    if x.shape[1] > longest:
        raise ValueError(
            f"model {model} takes texts of at most {longest} bytes, got "
            f"{x.shape[1]}; cut them into shorter texts."
        )
