"""Row-major positions of the entries of an array, under any sharding."""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from granet_jax.masking import is_explicit


class Positions(NamedTuple):
    """Where the entries of an array are, in row-major order.

    Rows and columns are kept apart, because the index of every entry would take as much
    memory as the array.

    Attributes:
      row: The number of the row along the last axis, of shape (..., 1).
      column: The index along the last axis, of shape (1, ..., n).
    """

    row: Array
    column: Array

    @classmethod
    def of(cls, like: Any) -> "Positions":
        """The positions in an array of the shape and sharding of `like`."""
        dtype, ndim = index_dtype(math.prod(like.shape)), len(like.shape)
        if not ndim:
            return cls(jnp.zeros((), dtype), jnp.zeros((), dtype))
        row, leading = jnp.zeros((1,) * ndim, dtype), range(ndim - 1)
        for axis in leading:
            stride = jnp.asarray(math.prod(like.shape[axis + 1 : -1]), dtype)
            row += iota(like, dtype, axis, along=leading) * stride
        return cls(row, iota(like, dtype, ndim - 1, along=(ndim - 1,)))

    def before(self, row: Array, column: Array) -> Array:
        """Which entries come before that of a row and a column, both scalars."""
        row, column = row.astype(self.row.dtype), column.astype(self.column.dtype)
        return (self.row < row) | ((self.row == row) & (self.column < column))


def split_positions(
    from_end: Array, shapes: Sequence[tuple[int, ...]]
) -> tuple[Array, Array]:
    """Rows and columns before which entries are at least so far from the end.

    The last entry of an array is 1 from its end, and the first one as far as the array
    has entries.

    Args:
      from_end: Unsigned vector of distances, one per array.
      shapes: The shapes of the arrays.

    Returns:
      A vector of rows and one of columns, for `Positions.before`.
    """
    size = jnp.asarray([math.prod(s) for s in shapes], from_end.dtype)
    length = jnp.asarray([max(s[-1], 1) if s else 1 for s in shapes], from_end.dtype)
    end = jnp.where(from_end <= size, size + 1 - from_end, 0)
    return end // length, end % length


def index_dtype(size: int) -> jnp.dtype:
    """The unsigned integer dtype of the positions among so many entries."""
    return jnp.dtype(jnp.uint32 if size < 2**32 - 1 else jnp.uint64)


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
