"""Small convolutional networks for small images."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models import layers


class CNN(nn.Module):
    """3 x 3 convolutions with ReLU. All but the first halve the resolution.

    Kernels are LeCun-normal, and there are no norms.

    Attributes:
      classes: Number of logits.
      dtype: Dtype of the convolutions.
    """

    classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, ghosts: layers.Ghosts = layers.NO_GHOSTS
    ) -> jax.Array:
        """Return logits (n, classes) for images (n, height, width, channels)."""
        layers.check_images("cnn", x)
        for i, features in enumerate((16, 32, 64)):
            strides = 1 if i == 0 else 2
            conv = nn.Conv(
                features, (3, 3), strides, dtype=self.dtype, name=f"conv_{i}"
            )
            y = ghosts.add_skip(conv(x), x, strides, train, name=f"ghost_{i}")
            x = ghosts.activation(y)
        init = nn.initializers.lecun_normal()
        return layers.output(self.classes, init=init)(x.reshape(x.shape[0], -1))


class NormedCNN(nn.Module):
    """The CNN with batch norm after every convolution and He-normal kernels.

    Norms keep the scale of the activations. Without them, the signal can vanish if most
    weights are masked from the start.

    Attributes:
      classes: Number of logits.
      dtype: Dtype of the convolutions.
      axis_name: Mapped axis of the batch; None without one.
      stem_strides: Strides of the first convolution. With 2, a step takes a fifth of
        the time on a CPU.
      pooled: Whether the classifier sees the average over all positions, as in the
        papers' networks. Without, it has most of the weights.
    """

    classes: int
    dtype: jnp.dtype
    axis_name: str | None
    stem_strides: int = 1
    pooled: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, ghosts: layers.Ghosts = layers.NO_GHOSTS
    ) -> jax.Array:
        """Return logits (n, classes) for images (n, height, width, channels)."""
        layers.check_images("cnn-bn", x)
        for i, features in enumerate((16, 32, 64)):
            strides = self.stem_strides if i == 0 else 2
            y = layers.conv(
                features,
                3,
                strides,
                init=layers.he_fan_in,
                dtype=self.dtype,
                name=f"conv_{i}",
            )(x)
            y = layers.batch_norm(
                train, dtype=self.dtype, axis_name=self.axis_name, name=f"norm_{i}"
            )(y)
            y = ghosts.add_skip(
                y, x, strides, train, axis_name=self.axis_name, name=f"ghost_{i}"
            )
            x = ghosts.activation(y)
        x = layers.average_pool(x) if self.pooled else x.reshape(x.shape[0], -1)
        init = nn.initializers.lecun_normal()
        return layers.output(self.classes, init=init)(x)
