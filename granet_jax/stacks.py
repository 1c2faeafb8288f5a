"""Leaves of one shape in one array: what is done to it is one kernel for all of them.

What a loop does to every leaf is compiled, and on accelerators launched, leaf by leaf;
but deep networks have few shapes, and their many small leaves little memory.
"""

import itertools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from granet_jax.masking import is_explicit


class Stack(NamedTuple):
    """Leaves of one shape and dtype, sharded alike.

    Attributes:
      leaves: their numbers, ascending.
      like: the type of each (`jax.typeof`).
    """

    leaves: list[int]
    like: Any


def stacks_of(
    like: Sequence[Any], kinds: Sequence[Hashable] | None = None
) -> list[Stack]:
    """Which leaves go into one stack, by their types.

    On Auto mesh axes only the compiler knows how a leaf is sharded: of two of one shape
    it might have to send one to other devices. So each is a stack of its own there; and
    so are large leaves, of which copies are not to be kept, and which leave little to
    be saved.

    Args:
      like: types of the leaves (`jax.typeof`).
      kinds: one for every leaf; those of another kind go into another stack.
    """
    stacks: dict[Any, Stack] = {}
    for number, x in enumerate(like):
        alone = x.size > _MOST_IN_LEAF or _is_auto(x.sharding.mesh)
        kind = None if kinds is None else kinds[number]
        key = x.shape, x.dtype, x.sharding, kind, number if alone else None
        stacks.setdefault(key, Stack([], x)).leaves.append(number)
    return list(stacks.values())


_MOST_IN_LEAF = 2**14


def _is_auto(mesh: Any) -> bool:
    meshes = mesh, jax.sharding.get_abstract_mesh()
    axes = [zip(m.axis_types, m.axis_sizes, strict=True) for m in meshes]
    auto = jax.sharding.AxisType.Auto
    return any(kind == auto and size > 1 for kind, size in itertools.chain(*axes))


def blank(stack: Stack, dtype: Any) -> Array:
    """Zeros for all leaves of a stack, which go along the first axis."""
    shape = (len(stack.leaves), *stack.like.shape)
    sharding = stack.like.sharding
    if not is_explicit(sharding):
        return jnp.zeros(shape, dtype)
    spec = jax.sharding.PartitionSpec(None, *sharding.spec)
    sharding = sharding.update(spec=spec)
    # (Where no mesh is set, `jnp.zeros` of jax 0.12 leaves out an abstract sharding.)
    return jax.sharding.reshard(jnp.zeros(shape, dtype, device=sharding), sharding)


def stacked(stacks: Sequence[Stack], arrays: Sequence[Array]) -> list[Array]:
    """The arrays of all leaves, those of a stack along the first axis of one array."""
    return [jnp.stack([arrays[leaf] for leaf in stack.leaves]) for stack in stacks]


def unstacked(stacks: Sequence[Stack], arrays: Sequence[Array]) -> list[Array]:
    """The arrays of all leaves, from those of stacks."""
    numbers = unknown(range(max(len(stack.leaves) for stack in stacks)))
    found = {}
    for stack, x in zip(stacks, arrays, strict=True):
        if len(stack.leaves) == 1:
            found[stack.leaves[0]] = x[0]
            continue
        for leaf, number in zip(stack.leaves, numbers, strict=False):
            found[leaf] = _part(x, number)
    return [found[leaf] for leaf in range(len(found))]


@jax.jit
def _part(x: Array, number: Array) -> Array:
    return lax.dynamic_index_in_dim(x, number, keepdims=False)


def unknown(known: Sequence[int]) -> Sequence[Array]:
    """Integers as scalars whose values the compiler does not know.

    XLA compiles kernels that compute the same once (on CPU), and those of leaves of one
    shape differ in nothing but their place. As a constant the place would be part of
    the code; so it is made an argument, the result of a choice that nothing can
    foresee. (Where the barrier is no obstacle to constant folding, there are as many
    kernels as leaves, and all else is the same.)
    """
    values = tuple(jnp.asarray(i, jnp.uint32) for i in known)
    always = lax.optimization_barrier(jnp.ones((), bool))
    zeros = (jnp.zeros((), jnp.uint32),) * len(values)
    return lax.cond(always, lambda: values, lambda: zeros)
