"""Residual networks: for CIFAR of 6n + 2 layers, ResNet-18/34/50, and for ImageNet.

All shortcuts that change the shape are a strided 1 x 1 convolution with a norm ("option
B"), as in the code of GraNet and of ToST. The classifier has a bias; GraNet's code for
CIFAR leaves it out of ResNet-18/34/50. ResNet-50 strides in the 3 x 3 convolution
("v1.5"), as torchvision's.

References:
  He et al., Deep Residual Learning for Image Recognition, CVPR 2016.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models import layers


class Block(nn.Module):
    """Two 3 x 3 convolutions, or 1 x 1, 3 x 3 and 1 x 1, beside a shortcut.

    Attributes:
      features: channels; of a bottleneck, four times as many come out.
      strides: of the first 3 x 3 convolution.
      bottleneck: whether there are three convolutions.
      kernel_init: initial kernels.
      dtype: of the output.
      axis_name: mapped axis of the batch.
    """

    features: int
    strides: int
    bottleneck: bool
    kernel_init: layers.Initializer
    dtype: jnp.dtype
    axis_name: str | None

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, ghosts: layers.Ghosts = layers.NO_GHOSTS
    ) -> jax.Array:
        conv = functools.partial(layers.conv, init=self.kernel_init, dtype=self.dtype)
        norm = functools.partial(
            layers.batch_norm, train, dtype=self.dtype, axis_name=self.axis_name
        )
        if self.bottleneck:
            plan = [
                (self.features, 1, 1),
                (self.features, 3, self.strides),
                (4 * self.features, 1, 1),
            ]
        else:
            plan = [(self.features, 3, self.strides), (self.features, 3, 1)]
        y = x
        for i, (features, kernel, strides) in enumerate(plan, start=1):
            given = y
            y = conv(features, kernel, strides, name=f"conv_{i}")(y)
            y = norm(name=f"norm_{i}")(y)
            if kernel == 3:
                y = ghosts.beside(
                    y,
                    given,
                    strides,
                    train,
                    axis_name=self.axis_name,
                    name=f"ghost_{i}",
                )
            if i < len(plan):
                y = ghosts.activation(y)
        if x.shape != y.shape:
            x = conv(y.shape[-1], 1, self.strides, name="shortcut")(x)
            x = norm(name="shortcut_norm")(x)
        return ghosts.activation(x + y)


class ResNet(nn.Module):
    """A stem, groups of blocks each at half the resolution of the last, a classifier.

    Attributes:
      classes: number of logits.
      dtype: of the convolutions.
      axis_name: mapped axis of the batch.
      blocks: number of blocks in every group.
      width: channels of the stem and of the first group; they double from group to
        group.
      bottleneck: see `Block`.
      large: whether the stem is a 7 x 7 convolution and a max-pool, for images of
        ImageNet's size, instead of a 3 x 3 convolution.
      kernel_init: initial kernels of the convolutions.
      output_init: initial kernel of the classifier.
    """

    classes: int
    dtype: jnp.dtype
    axis_name: str | None
    blocks: tuple[int, ...]
    width: int
    bottleneck: bool
    large: bool
    kernel_init: layers.Initializer
    output_init: layers.Initializer

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, ghosts: layers.Ghosts = layers.NO_GHOSTS
    ) -> jax.Array:
        """Logits (n, classes) of images (n, height, width, channels)."""
        layers.check_images("resnet", x)
        kernel, strides = (7, 2) if self.large else (3, 1)
        x = layers.conv(
            self.width,
            kernel,
            strides,
            init=self.kernel_init,
            dtype=self.dtype,
            name="conv",
        )(x)
        x = layers.batch_norm(
            train, dtype=self.dtype, axis_name=self.axis_name, name="conv_norm"
        )(x)
        x = ghosts.activation(x)
        if self.large:
            sides = ((1, 1), (1, 1))
            # Its annotation has strings only; its documentation has this too.
            x = nn.max_pool(x, (3, 3), (2, 2), sides)  # pyright: ignore[reportArgumentType]
        for group, number in enumerate(self.blocks):
            for block in range(number):
                x = Block(
                    features=self.width * 2**group,
                    strides=2 if group and not block else 1,
                    bottleneck=self.bottleneck,
                    kernel_init=self.kernel_init,
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    name=f"group_{group + 1}_block_{block + 1:02}",
                )(x, train, ghosts)
        x = layers.average_pool(x)
        return layers.output(self.classes, init=self.output_init)(x)


def thin(depth: int) -> functools.partial[ResNet]:
    """The network of He et al. for CIFAR, of 6n + 2 layers and 16, 32, 64 channels.

    He-normal (fan-in) kernels, as in GraNet's code. Basic blocks at every depth, where
    ToST's code goes over to bottlenecks from depth 54 on: its "ResNet-104" has 155
    layers, this one 104.
    """
    return functools.partial(
        ResNet,
        blocks=3 * ((depth - 2) // 6,),
        width=16,
        bottleneck=False,
        large=False,
        kernel_init=layers.he_fan_in,
        output_init=layers.he_fan_in,
    )


def wide(
    blocks: tuple[int, ...], *, bottleneck: bool, large: bool
) -> functools.partial[ResNet]:
    """ResNet-18/34/50, from 64 channels on.

    For CIFAR from PyTorch's default kernels, as in GraNet's code; for ImageNet from
    He-normal (fan-out) kernels, as torchvision's and GraNet's.
    """
    return functools.partial(
        ResNet,
        blocks=blocks,
        width=64,
        bottleneck=bottleneck,
        large=large,
        kernel_init=layers.he_fan_out if large else layers.torch_default,
        output_init=layers.torch_default,
    )
