"""Augmentation and normalisation of images on the device, in the training step."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike


def normalised(
    images: ArrayLike, mean: tuple[float, ...], std: tuple[float, ...]
) -> Array:
    """Normalise images to mean 0 and standard deviation 1 in every channel.

    Args:
      images: Images, uint8 (..., channels).
      mean: Mean of every channel, for values from 0 to 1.
      std: Standard deviation of every channel, for values from 0 to 1.

    Returns:
      float32 images of the same shape.
    """
    x = jnp.asarray(images, jnp.float32) / 255
    channels = (1,) * (x.ndim - 1) + (len(mean),)
    mean_, std_ = jnp.float32(mean), jnp.float32(std)
    return (x - mean_.reshape(channels)) / std_.reshape(channels)


def shifts(key: Array, n: int, shift: int) -> Array:
    """Return random corners for `shifted`, int32 (n, 2), from 0 to 2 * shift."""
    return jax.random.randint(key, (n, 2), 0, 2 * shift + 1)


def shifted(images: Array, corners: Array, shift: int) -> Array:
    """Shift images by up to `shift` pixels in both directions, padded with zeros.

    Args:
      images: Images (n, height, width, channels).
      corners: Corner of every crop in the padded image, int (n, 2), from 0 to
        2 * shift.
      shift: Largest shift in pixels.

    Returns:
      Images of the same shape and dtype.
    """
    _, height, width, channels = images.shape
    padding = ((0, 0), (shift, shift), (shift, shift), (0, 0))
    padded = jnp.pad(images, padding)

    def crop(image: Array, corner: Array) -> Array:
        start = (corner[0], corner[1], 0)
        return lax.dynamic_slice(image, start, (height, width, channels))

    return jax.vmap(crop)(padded, corners)


def mirrored(images: Array, which: Array) -> Array:
    """Mirror the images selected by `which`, bool (n,), left to right."""
    return jnp.where(which[:, None, None, None], images[:, :, ::-1], images)
