"""LeNets.

References:
  LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models import layers


class LeNet300(nn.Module):
    """LeNet-300-100: three fully connected layers with LeCun-normal kernels.

    Attributes:
      classes: Number of logits.
      dtype: Dtype of the hidden layers.
    """

    classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, ghosts: layers.Ghosts = layers.NO_GHOSTS
    ) -> jax.Array:
        """Return logits (n, classes) for images (n, height, width, channels)."""
        layers.check_images("lenet-300-100", x)
        x = x.reshape(x.shape[0], -1)
        for i, features in enumerate((300, 100)):
            hidden = nn.Dense(features, dtype=self.dtype, name=f"hidden_{i}")
            x = ghosts.activation(hidden(x))
        return layers.output(self.classes, init=nn.initializers.lecun_normal())(x)


class LeNet5(nn.Module):
    """LeNet-5 as in Caffe: ReLU after the third layer only, and Caffe's "xavier".

    Attributes:
      classes: Number of logits.
      dtype: Dtype of the hidden layers.
    """

    classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, ghosts: layers.Ghosts = layers.NO_GHOSTS
    ) -> jax.Array:
        """Return logits (n, classes) for images (n, height, width, channels)."""
        layers.check_images("lenet-5", x, smallest=16)
        xavier = nn.initializers.lecun_uniform()
        for i, features in enumerate((20, 50)):
            x = nn.Conv(
                features,
                (5, 5),
                padding="VALID",
                kernel_init=xavier,
                dtype=self.dtype,
                name=f"conv_{i}",
            )(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        hidden = nn.Dense(500, kernel_init=xavier, dtype=self.dtype, name="hidden")
        return layers.output(self.classes, init=xavier)(ghosts.activation(hidden(x)))
