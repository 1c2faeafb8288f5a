"""Wide residual networks for CIFAR, with norms before the convolutions.

There is no dropout between the convolutions, unlike in some implementations.

References:
  Zagoruyko & Komodakis, Wide Residual Networks, BMVC 2016.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models import layers


class Block(nn.Module):
    """Norm, ReLU and 3 x 3 convolution, twice, with a shortcut around them.

    Attributes:
      features: Number of channels.
      strides: Strides of the first convolution.
      dtype: Dtype of the output.
      axis_name: Mapped axis of the batch; None without one.
    """

    features: int
    strides: int
    dtype: jnp.dtype
    axis_name: str | None

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, ghosts: layers.Ghosts = layers.NO_GHOSTS
    ) -> jax.Array:
        conv = functools.partial(layers.conv, dtype=self.dtype)
        norm = functools.partial(
            layers.batch_norm, train, dtype=self.dtype, axis_name=self.axis_name
        )
        add_skip = functools.partial(ghosts.add_skip, axis_name=self.axis_name)
        first = ghosts.activation(norm(name="norm_1")(x))
        y = conv(self.features, 3, self.strides, name="conv_1")(first)
        y = add_skip(y, first, self.strides, train, name="ghost_1")
        second = ghosts.activation(norm(name="norm_2")(y))
        y = conv(self.features, 3, name="conv_2")(second)
        y = add_skip(y, second, 1, train, name="ghost_2")
        if x.shape[-1] != self.features:
            # The shortcut begins after the norm, since it is no identity anyway.
            x = conv(self.features, 1, self.strides, name="shortcut")(first)
        return x + y


class WideResNet(nn.Module):
    """Three groups of blocks, at 32 x 32, 16 x 16 and 8 x 8 pixels for CIFAR.

    Kernels are He-normal (fan-out); the classifier has PyTorch's default.

    Attributes:
      classes: Number of logits.
      dtype: Dtype of the convolutions.
      axis_name: Mapped axis of the batch; None without one.
      depth: Number of layers, 6n + 4 with n blocks in each group.
      factor: Factor of the channels, which are 16, 32 and 64 times this number.
    """

    classes: int
    dtype: jnp.dtype
    axis_name: str | None
    depth: int
    factor: int

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, ghosts: layers.Ghosts = layers.NO_GHOSTS
    ) -> jax.Array:
        """Return logits (n, classes) for images (n, height, width, channels)."""
        layers.check_images(f"wrn-{self.depth}-{self.factor}", x)
        x = layers.conv(16, 3, dtype=self.dtype, name="conv")(x)
        for group in range(3):
            for block in range((self.depth - 4) // 6):
                x = Block(
                    features=16 * self.factor * 2**group,
                    strides=2 if group and not block else 1,
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    name=f"group_{group + 1}_block_{block + 1:02}",
                )(x, train, ghosts)
        x = layers.batch_norm(
            train, dtype=self.dtype, axis_name=self.axis_name, name="norm"
        )(x)
        x = layers.average_pool(ghosts.activation(x))
        return layers.output(self.classes, init=layers.torch_default)(x)
