"""Wide residual networks for CIFAR, norms before the convolutions.

Without the dropout that some codes have between the convolutions.

References:
  Zagoruyko & Komodakis, Wide Residual Networks, BMVC 2016.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models import layers


class Block(nn.Module):
    """Norm, ReLU, 3 x 3 convolution, twice, beside a shortcut.

    Attributes:
      features: channels.
      strides: of the first convolution.
      dtype: of the output.
      axis_name: mapped axis of the batch.
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
        beside = functools.partial(ghosts.beside, axis_name=self.axis_name)
        first = ghosts.activation(norm(name="norm_1")(x))
        y = conv(self.features, 3, self.strides, name="conv_1")(first)
        y = beside(y, first, self.strides, train, name="ghost_1")
        second = ghosts.activation(norm(name="norm_2")(y))
        y = conv(self.features, 3, name="conv_2")(second)
        y = beside(y, second, 1, train, name="ghost_2")
        if x.shape[-1] != self.features:
            # It takes what comes out of the norm: there is no identity to keep.
            x = conv(self.features, 1, self.strides, name="shortcut")(first)
        return x + y


class WideResNet(nn.Module):
    """Three groups of blocks, at 32 x 32, 16 x 16 and 8 x 8 pixels of CIFAR.

    He-normal (fan-out) kernels, and PyTorch's default one of the classifier.

    Attributes:
      classes: number of logits.
      dtype: of the convolutions.
      axis_name: mapped axis of the batch.
      depth: 6n + 4 layers, n blocks in each group.
      factor: channels are 16, 32 and 64 times as many.
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
        """Logits (n, classes) of images (n, height, width, channels)."""
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
