"""Row-major positions of the entries of an array, under any sharding."""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from granet_jax.masking import is_explicit


class Positions(NamedTuple):
    """How far the entries of an array are from its end, in row-major order.

    The last entry is 1 from the end, the first as far as the array has entries. An
    entry is `rest - column` from the end; the two are kept apart, because together they
    would take as much memory as the array.

    Attributes:
      rest: The distance of the first entry of every row, of shape (..., 1).
      column: The index along the last axis, of shape (1, ..., n).
    """

    rest: Array
    column: Array

    def at_least_from_end(self, bound: Array) -> Array:
        """Whether entries are at least `bound`, an unsigned scalar, from the end."""
        bound = bound.astype(self.rest.dtype)
        zero = jnp.zeros_like(self.rest)
        columns = jnp.where(self.rest >= bound, self.rest - bound + 1, zero)
        return self.column < columns

    @staticmethod
    def dtype(places: Sequence["Positions"]) -> jnp.dtype:
        """The dtype that holds the distances of all of several arrays."""
        return jnp.result_type(*(x.rest.dtype for x in places))


def positions(like: Any) -> Positions:
    """The positions in an array of the shape and sharding of `like`."""
    size = math.prod(like.shape)
    dtype = jnp.dtype(np.uint32 if size < 2**32 else np.uint64)
    ndim = len(like.shape)
    if not ndim:
        return Positions(jnp.ones((), dtype), jnp.zeros((), dtype))
    rows, last = range(ndim - 1), ndim - 1
    rest = jnp.full((1,) * ndim, size, dtype)
    for axis in rows:
        stride = jnp.asarray(math.prod(like.shape[axis + 1 :]), dtype)
        rest -= iota(like, dtype, axis, along=rows) * stride
    return Positions(rest, iota(like, dtype, last, along=(last,)))


def iota(
    like: Any, dtype: jnp.dtype, axis: int, *, along: Collection[int] | None = None
) -> Array:
    """The index along `axis` of every entry.

    Args:
      like: Anything with the shape and the sharding of an array's type.
      dtype: The dtype of the index.
      axis: The axis along which the index grows.
      along: The axes along which the result has entries; along the others it has
        length 1. By default all axes.
    """
    sizes = [n if along is None or i in along else 1 for i, n in enumerate(like.shape)]
    sharding = like.sharding
    if sharding is None or not is_explicit(sharding):
        return lax.broadcasted_iota(dtype, sizes, axis)
    # On Explicit mesh axes the sharding is part of an array's type, and an iota has no
    # operand to take it from.
    spec = [
        name if along is None or i in along else None
        for i, name in enumerate(sharding.spec)
    ]
    sharding = sharding.update(spec=jax.sharding.PartitionSpec(*spec))
    return lax.broadcasted_iota(dtype, sizes, axis, out_sharding=sharding)


def mesh_axes(spec: Iterable[Any]) -> list[str]:
    """The names of the mesh axes over which an array is sharded."""
    names = [name if isinstance(name, tuple) else (name,) for name in spec]
    return [name for group in names for name in group if name is not None]
