"""VGG with batch norm, for CIFAR.

Convolutions have no bias, and there is one linear classifier, as in the code of GraNet
and GraSP. The last pooling is a mean over all positions. For images of 32 x 32 pixels
it equals the 2 x 2 pooling of that code, and it supports other sizes.

References:
  Simonyan & Zisserman, Very Deep Convolutional Networks for Large-Scale Image
  Recognition, ICLR 2015.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models import layers


class VGG(nn.Module):
    """3 x 3 convolutions with norm and ReLU, and a max-pool between groups.

    Kernels are He-normal (fan-out), norm scales start at 0.5, and the classifier is
    normal with standard deviation 0.01.

    Attributes:
      classes: Number of logits.
      dtype: Dtype of the convolutions.
      axis_name: Mapped axis of the batch; None without one.
      groups: Number of convolutions in each of the five groups.
      width: Channels of the first group. They double from group to group, up to eight
        times as many.
    """

    classes: int
    dtype: jnp.dtype
    axis_name: str | None
    groups: tuple[int, int, int, int, int]
    width: int = 64

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, ghosts: layers.Ghosts = layers.NO_GHOSTS
    ) -> jax.Array:
        """Return logits (n, classes) for images (n, height, width, channels)."""
        layers.check_images(f"vgg-{sum(self.groups) + 3}", x, smallest=16)
        i = 0
        for group, number in enumerate(self.groups):
            if group:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for _ in range(number):
                features = self.width * min(8, 2**group)
                y = layers.conv(features, 3, dtype=self.dtype, name=f"conv_{i:02}")(x)
                y = layers.batch_norm(
                    train,
                    scale=0.5,
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    name=f"norm_{i:02}",
                )(y)
                y = ghosts.add_skip(
                    y, x, 1, train, axis_name=self.axis_name, name=f"ghost_{i:02}"
                )
                x = ghosts.activation(y)
                i += 1
        init = nn.initializers.normal(0.01)
        return layers.output(self.classes, init=init)(layers.average_pool(x))
