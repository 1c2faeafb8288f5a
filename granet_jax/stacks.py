"""Leaves of one shape in one array: a pass over it is one kernel for all of them.

What a loop does to every leaf is compiled, and on accelerators launched, leaf by leaf;
but deep networks have few shapes. What makes a leaf's part writes it in place, so that
a stack takes no more memory than its leaves.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from granet_jax.masking import is_explicit


class Stack(NamedTuple):
    """Leaves of one shape, sharded alike.

    Attributes:
      leaves: their numbers, ascending.
      like: the type of each (`jax.typeof`).
    """

    leaves: list[int]
    like: Any


def stacks_of(like: Sequence[Any]) -> list[Stack]:
    """Which leaves go into one stack, by their types.

    On Auto mesh axes only the compiler knows how a leaf is sharded: of two of one shape
    it might have to send one to other devices. So each is a stack of its own there; and
    so are large leaves, since XLA does not divide what a kernel writes in place over
    the threads of a CPU, and they leave little to be saved.
    """
    stacks: dict[Any, Stack] = {}
    for number, x in enumerate(like):
        alone = x.size > _MOST_IN_LEAF or _is_auto(x.sharding.mesh)
        key = x.shape, x.sharding, number if alone else None
        stacks.setdefault(key, Stack([], x)).leaves.append(number)
    return list(stacks.values())


_MOST_IN_LEAF = 2**16


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


def with_part(whole: Array, number: Array, part: Array) -> Array:
    """A stack in which the leaf at `number` is `part`, in place under `jit`."""
    if len(whole) == 1:
        return part[None]
    return lax.dynamic_update_index_in_dim(whole, part, number, 0)


def part_of(whole: Array, number: Array) -> Array:
    """The leaf at `number`, as a stack of one."""
    return whole if len(whole) == 1 else lax.dynamic_slice_in_dim(whole, number, 1)
