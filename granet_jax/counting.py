"""Sums over whole leaves and positions in them, under any sharding.

Nothing is gathered or reshaped: a count is a local reduction of every device, and an
exchange of a few integers.
"""

import functools
import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from granet_jax.masking import is_explicit


def count_leaves(flags: Sequence[Sequence[Array]], counter: jnp.dtype) -> list[Array]:
    """`_count` of all stacks, whatever their shardings.

    On Explicit mesh axes it is known how a leaf is sharded: every device counts its
    shards, and one all-reduce adds the counts of all leaves.
    """
    meshes = {jax.typeof(f[0]).sharding.mesh for f in flags}
    kinds = {kind for mesh in meshes for kind in getattr(mesh, "axis_types", ())}
    if len(meshes) > 1 or kinds != {jax.sharding.AxisType.Explicit}:
        return _count(flags, counter)
    specs = [jax.typeof(f[0]).sharding.spec for f in flags]
    axes = [mesh_axes(spec) for spec in specs]
    lengths = [len(f[0]) for f in flags]
    names = tuple(dict.fromkeys(name for mine in axes for name in mine))

    def count_shards(flags: list[list[Array]]) -> Array:
        counts = jnp.stack(_count(flags, counter))
        for name in names:
            # Of devices that hold the same shard of a leaf, the first counts it.
            divided = np.repeat([name in mine for mine in axes], lengths)
            counts = jnp.where(divided | (lax.axis_index(name) == 0), counts, 0)
        return lax.psum(counts, names) if names else counts

    count = jax.shard_map(
        count_shards,
        mesh=meshes.pop(),
        in_specs=([[spec] * len(f) for spec, f in zip(specs, flags, strict=True)],),
        out_specs=jax.sharding.PartitionSpec(),
    )
    return list(count([list(f) for f in flags]))


def _count(flags: Sequence[Sequence[Array]], counter: jnp.dtype) -> list[Array]:
    """How many entries are True, one pass over memory: a vector with a row per leaf.

    One for the first array of every stack of leaves (`stacks`), one for the second ...

    On accelerators XLA fuses the sums of a leaf with each other and with what makes
    them; and divides each over the devices of Auto mesh axes, which ends in all-reduces
    of one number, combined. On CPU it splits such a sum in two, to round better, and
    writes the array out as integers in between: there it gets reductions of several
    arrays. But those it divides with gathers of the counts of every device, so not
    where a mesh of Auto axes is set (`jax.set_mesh`): virtual devices then show what
    accelerators do.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    if any(kind == jax.sharding.AxisType.Auto and size > 1 for kind, size in kinds):
        return _count_singly(flags, counter)
    return lax.platform_dependent(
        flags,
        cpu=functools.partial(_count_together, counter=counter),
        default=functools.partial(_count_singly, counter=counter),
    )


def _count_singly(flags: Any, counter: jnp.dtype) -> list[Array]:
    def count(x: Array) -> Array:
        return jnp.sum(x, axis=range(1, x.ndim), dtype=counter)

    return _vectors([list(map(count, stack)) for stack in flags], counter)


def _count_together(flags: Any, counter: jnp.dtype) -> list[Array]:
    # Neighbours of one type are converted together: each count of 16 bits on its own
    # would be one more kernel.
    per_stack = [_count_stack(stack, counter) for stack in flags]
    runs = itertools.groupby(per_stack, key=lambda counts: counts[0].dtype)
    parts = [_vectors(list(run), counter) for _, run in runs]
    return [jnp.concatenate(part) for part in zip(*parts, strict=True)]


def _vectors(counts: Sequence[Sequence[Array]], counter: jnp.dtype) -> list[Array]:
    return [jnp.concatenate(x).astype(counter) for x in zip(*counts, strict=True)]


@functools.partial(jax.jit, static_argnames="counter")
def _count_stack(stack: Sequence[Array], counter: jnp.dtype) -> list[Array]:
    """The sums of each leaf of several boolean stacks of one shape, in one pass.

    First of rows, in 16 bits, then of their sums: processors add twice as many in one
    instruction, and XLA divides the rows over its threads. Rows are as many of the last
    axes as 16 bits count; if those have few entries, the sums of rows would be too
    large to write out. Where each leaf is one row, that is what is returned, in 16
    bits.
    """
    shape = stack[0].shape
    axis, size = len(shape), 1
    while axis > 1 and size * shape[axis - 1] <= _MOST_IN_ROW:
        axis -= 1
        size *= shape[axis]
    if axis > 1 and size < _LEAST_IN_ROW:
        return _sums(stack, range(1, len(shape)), counter)
    rows = _sums(stack, range(axis, len(shape)), jnp.dtype(jnp.uint16))
    return _sums(rows, range(1, axis), counter) if axis > 1 else rows


_MOST_IN_ROW, _LEAST_IN_ROW = 2**16 - 1, 256


def _sums(
    arrays: Sequence[Array], axes: Sequence[int], dtype: jnp.dtype
) -> list[Array]:
    """Sums of several arrays in one reduction, in the dtype given."""

    def add(a: Sequence[Array], b: Sequence[Array]) -> Sequence[Array]:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    operands = tuple(x.astype(dtype) for x in arrays)
    zeros = tuple(jnp.zeros((), dtype) for _ in arrays)
    return list(lax.reduce(operands, zeros, add, tuple(axes)))


def mesh_axes(spec: Iterable[Any]) -> list[str]:
    """The mesh axes over which an array is sharded."""
    names = [name if isinstance(name, tuple) else (name,) for name in spec]
    return [name for group in names for name in group if name is not None]


class Places(NamedTuple):
    """Where the entries of a leaf are, in row-major order.

    To be made outside of loops that compare with them, once a shape: XLA would hoist
    them out of a loop leaf by leaf. Columns made within a kernel would besides be
    compared as 64 bits, however narrow, because LLVM takes the loop's counter for them;
    processors without AVX-512 do that a few at a time.

    Attributes:
      start: index of the first entry of every row, of shape (..., 1).
      column: index along the last axis, of shape (1, ..., n), as narrow as it can be.
    """

    start: Array
    column: Array


def places(like: Any) -> Places:
    """The places of the entries of a leaf, by its shape and sharding.

    An index may be that past the last entry, so 2**32 of them take 64 bits.
    """
    dtype = jnp.dtype(jnp.uint32 if like.size < 2**32 else jnp.uint64)
    start = jnp.zeros((1,) * len(like.shape), dtype)
    if not like.shape:
        return Places(start, jnp.zeros((), jnp.int16))
    last = len(like.shape) - 1
    for axis in range(last):
        stride = jnp.asarray(math.prod(like.shape[axis + 1 :]), dtype)
        start += iota(like, dtype, axis, along=range(last)) * stride
    size = like.shape[-1]
    narrow = jnp.int16 if size < 2**15 else jnp.uint32 if size < 2**32 else jnp.uint64
    return Places(start, iota(like, jnp.dtype(narrow), last, along=(last,)))


def iota(
    like: Any, dtype: jnp.dtype, axis: int, *, along: Collection[int] | None = None
) -> Array:
    """The index along `axis` of every entry.

    Args:
      like: anything with a shape and a sharding as in an array's type.
      dtype: of the index.
      axis: that it goes along.
      along: the axes to have entries along; of the others, the first entries only.
        Default: all.
    """
    sizes = [n if along is None or i in along else 1 for i, n in enumerate(like.shape)]
    sharding = like.sharding
    if sharding is None or not is_explicit(sharding):
        return lax.broadcasted_iota(dtype, sizes, axis)
    # On Explicit mesh axes an array's sharding is part of its type, and an iota has
    # none to inherit.
    spec = [
        name if along is None or i in along else None
        for i, name in enumerate(sharding.spec)
    ]
    sharding = sharding.update(spec=jax.sharding.PartitionSpec(*spec))
    return lax.broadcasted_iota(dtype, sizes, axis, out_sharding=sharding)


def sum_before(counts: Array, order: np.ndarray | None = None) -> Array:
    """Exclusive cumulative sum of a short vector, in its dtype.

    As one masked sum: `cumsum` takes ten times as long to compile.

    Args:
      counts: the vector.
      order: the place of every entry in what is summed. Default: as they are.
    """
    position = jnp.asarray(np.arange(counts.size) if order is None else order)
    earlier = position[None, :] < position[:, None]
    return jnp.sum(jnp.where(earlier, counts, 0), axis=1, dtype=counts.dtype)
