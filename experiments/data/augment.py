"""Augmentation and normalisation of images on the device, within the training step."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike


def normalised(
    images: ArrayLike, mean: tuple[float, ...], std: tuple[float, ...]
) -> Array:
    """Float32 images of mean 0 and standard deviation 1, given those of each channel.

    Args:
      images: uint8, of shape (..., channels).
      mean: of every channel, for values from 0 to 1.
      std: standard deviation, likewise.
    """
    x = jnp.asarray(images, jnp.float32) / 255
    channels = (1,) * (x.ndim - 1) + (len(mean),)
    mean_, std_ = jnp.float32(mean), jnp.float32(std)
    return (x - mean_.reshape(channels)) / std_.reshape(channels)


def shifts(key: Array, n: int, shift: int) -> Array:
    """Random shifts for `shifted`: int32 (n, 2), each from 0 to 2 shift."""
    return jax.random.randint(key, (n, 2), 0, 2 * shift + 1)


def shifted(images: Array, corners: Array, shift: int) -> Array:
    """Each image moved by -shift to shift pixels in both directions, zeros moving in.

    Args:
      images: (n, height, width, channels).
      corners: int (n, 2), from 0 to 2 shift: where in the padded image to cut.
      shift: in pixels.

    Returns:
      An array of the shape and dtype of `images`.
    """
    _, height, width, channels = images.shape
    padding = ((0, 0), (shift, shift), (shift, shift), (0, 0))
    padded = jnp.pad(images, padding)

    def crop(image: Array, corner: Array) -> Array:
        start = (corner[0], corner[1], 0)
        return lax.dynamic_slice(image, start, (height, width, channels))

    return jax.vmap(crop)(padded, corners)


def mirrored(images: Array, which: Array) -> Array:
    """The images, those chosen by `which` (bool (n,)) mirrored left to right."""
    return jnp.where(which[:, None, None, None], images[:, :, ::-1], images)
