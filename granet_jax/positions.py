"""Row-major positions of the entries of an array, under any sharding."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from granet_jax.shardings import is_explicit


def from_end(end: Array, like: Array, axes: Collection[int]) -> Array:
    """`end` less the row-major index of every entry, along some axes.

    Args:
      end: Unsigned integers that broadcast to `like`.
      like: An array. The result has its shape and its sharding along the axes that are
        counted, and those of `end` along the others.
      axes: The axes along which entries are counted.
    """
    place, stride = end, 1
    for axis in sorted(axes, reverse=True):
        # Subtracting one axis after the other keeps all arrays but the result small.
        place = place - iota(jax.typeof(like), end.dtype, axis) * end.dtype.type(stride)
        stride *= like.shape[axis]
    return place


def iota(like: Any, dtype: jnp.dtype, axis: int) -> Array:
    """The index along `axis`: as an array has it, with length 1 along the other axes.

    Args:
      like: The type of the array. The sharding of the result follows it.
      dtype: The dtype of the index.
      axis: The axis.
    """
    shape = [n if i == axis else 1 for i, n in enumerate(like.shape)]
    sharding = like.sharding
    if not is_explicit(sharding):
        return lax.broadcasted_iota(dtype, shape, axis)
    # On Explicit mesh axes the sharding is part of an array's type, and an iota has no
    # operand to take it from.
    spec = [name if i == axis else None for i, name in enumerate(sharding.spec)]
    sharding = sharding.update(spec=jax.sharding.PartitionSpec(*spec))
    return lax.broadcasted_iota(dtype, shape, axis, out_sharding=sharding)
