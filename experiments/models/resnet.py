"""Residual networks: 6n + 2 layers for CIFAR, and ResNet-18/34/50.

Shortcuts that change the shape are strided 1 x 1 convolutions with a norm ("option B"),
as in the code of GraNet and ToST. The classifier has a bias, which GraNet's code leaves
out of ResNet-18/34/50 for CIFAR. ResNet-50 has its strides in the 3 x 3 convolution
("v1.5"), as in torchvision.

References:
  He et al., Deep Residual Learning for Image Recognition, CVPR 2016.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models import layers


class Block(nn.Module):
    """Two 3 x 3 convolutions, or 1 x 1, 3 x 3 and 1 x 1, with a shortcut around them.

    Attributes:
      features: Number of channels. The output of a bottleneck has four times as many.
      strides: Strides of the first 3 x 3 convolution.
      bottleneck: Whether there are three convolutions.
      kernel_init: Initializer of the kernels.
      dtype: Dtype of the output.
      axis_name: Mapped axis of the batch; None without one.
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
            block_input = y
            y = conv(features, kernel, strides, name=f"conv_{i}")(y)
            y = norm(name=f"norm_{i}")(y)
            if kernel == 3:
                y = ghosts.add_skip(
                    y,
                    block_input,
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
    """A stem, groups of blocks that halve the resolution, and a classifier.

    Attributes:
      classes: Number of logits.
      dtype: Dtype of the convolutions.
      axis_name: Mapped axis of the batch; None without one.
      blocks: Number of blocks in every group.
      width: Channels of the stem and the first group. They double from group to group.
      bottleneck: Whether the blocks have three convolutions.
      large: Whether the stem is a 7 x 7 convolution and a max-pool, for images of
        ImageNet's size, instead of a 3 x 3 convolution.
      kernel_init: Initializer of the convolutions' kernels.
      output_init: Initializer of the classifier's kernel.
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
        """Return logits (n, classes) for images (n, height, width, channels)."""
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
            # The documentation of max_pool allows this, its annotation does not.
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


def thin(depth: int, width: int = 16) -> functools.partial[ResNet]:
    """Return the network of He et al. for CIFAR: 6n + 2 layers, 16, 32, 64 channels.

    Another width than 16 has other numbers of channels in proportion.

    Kernels are He-normal (fan-in), as in GraNet's code. All depths have basic blocks.
    ToST's code uses bottlenecks from depth 54 on, so its "ResNet-104" has 155 layers,
    and this one has 104.
    """
    return functools.partial(
        ResNet,
        blocks=3 * ((depth - 2) // 6,),
        width=width,
        bottleneck=False,
        large=False,
        kernel_init=layers.he_fan_in,
        output_init=layers.he_fan_in,
    )


def wide(
    blocks: tuple[int, ...], *, bottleneck: bool, large: bool
) -> functools.partial[ResNet]:
    """Return ResNet-18/34/50, which begin with 64 channels.

    For CIFAR, kernels have PyTorch's default initialisation, as in GraNet's code. For
    ImageNet they are He-normal (fan-out), as in torchvision and GraNet.
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
