"""Masks of 1 bit per weight."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from granet_jax.shardings import is_explicit, whole_along

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedMask:
    """A mask of 1 bit per weight.

    A byte holds eight neighbours along one axis, the first in its highest bit. Zeros
    pad the last byte of the axis. So a packed mask has the sharding of its parameter,
    and devices exchange nothing to pack or read it, as long as the length of their
    shards along that axis is a multiple of eight.

    Attributes:
      bits: uint8 array of the mask's shape, except that the axis of length n has length
        ceil(n / 8); of shape (1,) for a scalar.
      shape: The shape of the mask (static).
    """

    bits: Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def axis(self) -> int:
        """The axis along which neighbours share bytes: -2, or -1 if that takes less."""
        return _packed_axis(self.shape)


def _packed_axis(shape: tuple[int, ...]) -> int:
    # Packing along axis -2 puts neighbours along the last axis into neighbouring bytes,
    # at the same bit. So a step can unpack them with vector instructions.
    if len(shape) < 2:
        return -1
    *_, rows, columns = shape
    return -2 if -(-rows // 8) * columns <= rows * -(-columns // 8) else -1


def is_packed(x: Any) -> bool:
    """Whether `x` is a `PackedMask`."""
    return isinstance(x, PackedMask)


def pack(mask: Array) -> PackedMask:
    """A boolean mask, packed."""
    axis = _packed_axis(mask.shape)
    sharding = jax.typeof(mask).sharding
    if is_explicit(sharding) and mask.ndim:
        shard = sharding.shard_shape(mask.shape)[axis]
        if shard < mask.shape[axis] and shard % 8:
            # With Explicit mesh axes, a byte cannot span two shards.
            mask = whole_along(mask, axis)
    return PackedMask(_pack_leaf(jnp.atleast_1d(mask), axis), mask.shape)


def unpack(tree: PyTree) -> PyTree:
    """A tree with boolean arrays in place of its packed masks."""
    return jax.tree.map(
        lambda x: _unpack_leaf(x) if is_packed(x) else x, tree, is_leaf=is_packed
    )


def _pack_leaf(mask: Array, axis: int) -> Array:
    # `jnp.packbits` along axis -2 would transpose. XLA would then store the bits of the
    # state in transposed order, and every step would read them with large strides.
    padding = [(0, 0)] * mask.ndim
    padding[axis] = (0, -mask.shape[axis] % 8)
    shape = list(mask.shape)
    shape[axis : axis + 1 or None] = [-(-mask.shape[axis] // 8), 8]
    # The compiler for TPUs (libtpu 0.0.52) aborts on some sums in 8 bits.
    digits = jnp.pad(mask, padding).reshape(shape).astype(jnp.uint32)
    places = _places(digits.ndim, axis).astype(jnp.uint32)
    return jnp.sum(digits << places, axis=axis, dtype=jnp.uint32).astype(jnp.uint8)


def _places(ndim: int, axis: int) -> Array:
    """The bit positions of the eight weights of a byte, along one axis."""
    shape = [1] * ndim
    shape[axis] = 8
    return jnp.arange(7, -1, -1, dtype=jnp.uint8).reshape(shape)


# Compiled, because outside jit it would dispatch several operations for every leaf.
@jax.jit
def _unpack_leaf(x: PackedMask) -> Array:
    axis = x.axis
    digits = jnp.expand_dims(x.bits, axis)
    digits = (digits >> _places(digits.ndim, axis)) & 1
    # The axis counts from the end, because states from a vmapped `init` have leading
    # axes in `bits` that `x.shape` lacks.
    shape = list(x.bits.shape)
    shape[axis] *= 8
    mask = digits.astype(bool).reshape(shape)
    if not x.shape:
        return mask[..., 0]
    return lax.slice_in_dim(mask, 0, x.shape[axis], axis=axis)
