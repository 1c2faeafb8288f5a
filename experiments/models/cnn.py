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
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits (n, classes) of images (n, height, width, channels)."""
        layers.check_images("cnn", x)
        for i, features in enumerate((16, 32, 64)):
            strides = 1 if i == 0 else 2
            conv = nn.Conv(
                features, (3, 3), strides, dtype=self.dtype, name=f"conv_{i}"
            )
            x = nn.relu(conv(x))
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
    """

    classes: int
    dtype: jnp.dtype
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits (n, classes) of images (n, height, width, channels)."""
        layers.check_images("cnn-bn", x)
        for i, features in enumerate((16, 32, 64)):
            x = layers.conv(
                features,
                3,
                1 if i == 0 else 2,
                init=layers.he_fan_in,
                dtype=self.dtype,
                name=f"conv_{i}",
            )(x)
            x = layers.batch_norm(
                train, dtype=self.dtype, axis_name=self.axis_name, name=f"norm_{i}"
            )(x)
            x = nn.relu(x)
        init = nn.initializers.lecun_normal()
        return layers.output(self.classes, init=init)(x.reshape(x.shape[0], -1))
