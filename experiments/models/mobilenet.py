"""MobileNets for images of ImageNet's size.

Kernels are He-normal (fan-out) and the classifier is normal with standard deviation
0.01, as in torchvision's MobileNet-V2. Both networks have ReLU6 and no dropout.

References:
  Howard et al., MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
  Applications, 2017.
  Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models import layers

# (channels, strides) of every pair of a depthwise and a 1 x 1 convolution.
_V1 = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *5 * ((512, 1),),
    (1024, 2),
    (1024, 1),
)
# (expansion, channels, blocks, strides of the first block) of every group of blocks.
_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class Block(nn.Module):
    """Convolutions with norms, and a shortcut around them if the shape stays the same.

    Attributes:
      plan: (channels, kernel, strides, groups) of every convolution.
      linear: Whether the last convolution has no ReLU6. Only then is there a shortcut.
      dtype: Dtype of the output.
      axis_name: Mapped axis of the batch; None without one.
    """

    plan: tuple[tuple[int, int, int, int], ...]
    linear: bool
    dtype: jnp.dtype
    axis_name: str | None

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, ghosts: layers.Ghosts = layers.NO_GHOSTS
    ) -> jax.Array:
        y = x
        for i, (features, kernel, strides, groups) in enumerate(self.plan, start=1):
            block_input = y
            y = layers.conv(
                features,
                kernel,
                strides,
                groups=groups,
                dtype=self.dtype,
                name=f"conv_{i}",
            )(y)
            y = layers.batch_norm(
                train, dtype=self.dtype, axis_name=self.axis_name, name=f"norm_{i}"
            )(y)
            y = ghosts.add_skip(
                y,
                block_input,
                strides,
                train,
                axis_name=self.axis_name,
                name=f"ghost_{i}",
            )
            if i < len(self.plan) or not self.linear:
                y = jnp.minimum(ghosts.activation(y), 6.0)  # ReLU6
        return x + y if self.linear and x.shape == y.shape else y


class MobileNetV1(nn.Module):
    """Pairs of a depthwise 3 x 3 and a 1 x 1 convolution.

    Attributes:
      classes: Number of logits.
      dtype: Dtype of the convolutions.
      axis_name: Mapped axis of the batch; None without one.
    """

    classes: int
    dtype: jnp.dtype
    axis_name: str | None

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, ghosts: layers.Ghosts = layers.NO_GHOSTS
    ) -> jax.Array:
        """Return logits (n, classes) for images (n, height, width, channels)."""
        layers.check_images("mobilenet-v1", x)
        block = functools.partial(
            Block, linear=False, dtype=self.dtype, axis_name=self.axis_name
        )
        x = block(((32, 3, 2, 1),), name="layer_00")(x, train, ghosts)
        for i, (features, strides) in enumerate(_V1, start=1):
            width = x.shape[-1]
            plan = ((width, 3, strides, width), (features, 1, 1, 1))
            x = block(plan, name=f"layer_{i:02}")(x, train, ghosts)
        init = nn.initializers.normal(0.01)
        return layers.output(self.classes, init=init)(layers.average_pool(x))


class MobileNetV2(nn.Module):
    """Inverted residual blocks: wide inside, with shortcuts between their narrow ends.

    Attributes:
      classes: Number of logits.
      dtype: Dtype of the convolutions.
      axis_name: Mapped axis of the batch; None without one.
    """

    classes: int
    dtype: jnp.dtype
    axis_name: str | None

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, ghosts: layers.Ghosts = layers.NO_GHOSTS
    ) -> jax.Array:
        """Return logits (n, classes) for images (n, height, width, channels)."""
        layers.check_images("mobilenet-v2", x)
        block = functools.partial(Block, dtype=self.dtype, axis_name=self.axis_name)
        x = block(((32, 3, 2, 1),), linear=False, name="layer_00")(x, train, ghosts)
        i = 0
        for expansion, features, number, first in _V2:
            for j in range(number):
                i += 1
                width = expansion * x.shape[-1]
                plan = [(width, 3, 1 if j else first, width), (features, 1, 1, 1)]
                if expansion > 1:
                    plan.insert(0, (width, 1, 1, 1))
                x = block(tuple(plan), linear=True, name=f"layer_{i:02}")(
                    x, train, ghosts
                )
        x = block(((1280, 1, 1, 1),), linear=False, name=f"layer_{i + 1:02}")(
            x, train, ghosts
        )
        init = nn.initializers.normal(0.01)
        return layers.output(self.classes, init=init)(layers.average_pool(x))
