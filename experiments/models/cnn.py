"""A small convolutional network, for data sets of small images."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models import layers


class CNN(nn.Module):
    """3 x 3 convolutions with ReLU, halving the resolution from the second on.

    LeCun-normal kernels, no norms.

    Attributes:
      classes: number of logits.
      dtype: of the convolutions.
    """

    classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, ghosts: layers.Ghosts = layers.NO_GHOSTS
    ) -> jax.Array:
        """Logits (n, classes) of images (n, height, width, channels)."""
        layers.check_images("cnn", x)
        for i, features in enumerate((16, 32, 64)):
            strides = 1 if i == 0 else 2
            conv = nn.Conv(
                features, (3, 3), strides, dtype=self.dtype, name=f"conv_{i}"
            )
            y = ghosts.beside(conv(x), x, strides, train, name=f"ghost_{i}")
            x = ghosts.activation(y)
        init = nn.initializers.lecun_normal()
        return layers.output(self.classes, init=init)(x.reshape(x.shape[0], -1))


class NormedCNN(nn.Module):
    """The same with batch norm after every convolution, from He-normal kernels.

    A norm keeps the scale of the activations where most weights are masked from the
    start; without one the signal of such a network can vanish.

    Attributes:
      classes: number of logits.
      dtype: of the convolutions.
      axis_name: mapped axis of the batch.
      stem_strides: of the first convolution. With 2 a step takes a fifth of the time
        on a CPU.
    """

    classes: int
    dtype: jnp.dtype
    axis_name: str | None
    stem_strides: int = 1

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, ghosts: layers.Ghosts = layers.NO_GHOSTS
    ) -> jax.Array:
        """Logits (n, classes) of images (n, height, width, channels)."""
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
            y = ghosts.beside(
                y, x, strides, train, axis_name=self.axis_name, name=f"ghost_{i}"
            )
            x = ghosts.activation(y)
        init = nn.initializers.lecun_normal()
        return layers.output(self.classes, init=init)(x.reshape(x.shape[0], -1))
