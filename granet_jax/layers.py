"""Layers: whole leaves, and the parts of leaves that stack several layers.

`flax.linen.scan`, experts and ensembles keep many layers in one array, with an axis (or
several) that counts them. Each of them is a layer of its own to a method: it has its
own density, its own threshold with scope "layer", and its own boxes of a structure.

The layers of a tree are numbered in one row: those of the first leaf, then those of the
second, and so on; within a leaf in row-major order of its stack axes. A vector "of one
number per layer" follows this order.
"""

import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from granet_jax.distributions import Shape

# The axes of a leaf that count layers, in rising order; none in a leaf of one layer.
Axes = tuple[int, ...]
# Which axes of a leaf count layers: by a regular expression for its name, or by a
# function of (name, leaf).
Stacked = (
    Mapping[str, int | Sequence[int]]
    | Callable[[str, Any], int | Sequence[int] | None]
    | None
)


def stack_axes(stacked: Stacked, name: str, leaf: Any) -> Axes:
    """The axes of a leaf that count layers.

    Args:
      stacked: A mapping from regular expressions to one axis or several: the first
        expression that is found in the name of the leaf decides. Or a function of
        (name, leaf) that returns one axis, several, or None. None for no stacks.
      name: The name of the leaf, as from `masking.leaf_name`.
      leaf: The leaf, of which the shape is read.

    Raises:
      TypeError, ValueError: `stacked` is neither, or an axis is not one of the leaf's.
    """
    check_stacked(stacked)
    if stacked is None:
        return ()
    found: Any
    if callable(stacked):
        found = stacked(name, leaf)
    else:
        patterns = (axes for key, axes in stacked.items() if re.search(key, name))
        found = next(patterns, None)
    axes = () if found is None else tuple(found) if np.iterable(found) else (found,)
    ndim = len(leaf.shape)
    if not all(_is_integer(axis) and -ndim <= axis < ndim for axis in axes):
        raise ValueError(
            f"stacked gives {found!r} for {name!r} of shape {tuple(leaf.shape)}: it "
            "must give axes of the leaf, such as 0 for layers along the first axis."
        )
    return tuple(sorted({int(axis) % ndim for axis in axes}))


def _is_integer(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def check_stacked(stacked: Any) -> None:
    """Raise TypeError or ValueError unless `stacked` is a mapping or a function."""
    if stacked is None or callable(stacked):
        return
    if not isinstance(stacked, Mapping):
        raise TypeError(
            "stacked must be a mapping from regular expressions to axes, such as "
            '{"layers/": 0}, or a function of (name, leaf), or None; got '
            f"{stacked!r}."
        )
    for pattern in stacked:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"stacked must have regular expressions as keys, got {pattern!r}: "
                f"{error}."
            ) from error


def check_leaves(stacked: Stacked, leaves: Mapping[str, Any]) -> None:
    """Compare `stacked` with the leaves of a tree, by name.

    Raises:
      ValueError: A pattern of `stacked` is found in no name.

    Warns:
      UserWarning: `stacked` is None, and biases or scales look like those of several
        layers.
    """
    check_stacked(stacked)
    names = list(leaves)
    if stacked is None:
        likely = [name for name in names if _looks_stacked(name, leaves)]
        if likely:
            warnings.warn(
                f"{likely[0]!r} of shape {tuple(leaves[likely[0]].shape)} looks as if "
                "its module kept several layers in one array. They count as a single "
                "layer now. If an axis counts layers, say which, such as "
                'stacked={"layers/": 0}; if none does, pass stacked={}.',
                UserWarning,
                stacklevel=2,
            )
        return
    for pattern in stacked if isinstance(stacked, Mapping) else ():
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"stacked has {pattern!r}, which is found in no name of a leaf: there "
                f"are {', '.join(map(repr, names[:8]))}"
                f"{', ...' if len(names) > 8 else ''}."
            )


def _looks_stacked(name: str, leaves: Mapping[str, Any]) -> bool:
    """Whether a bias or a scale has one axis more than those of a single layer."""
    # In the parameters of flax.nnx, an attribute of the parameter comes last.
    module, _, own = re.sub("/(raw_)?value$", "", name).rpartition("/")
    shape = tuple(leaves[name].shape)
    if own in ("scale", "gamma"):
        return len(shape) == 2 and min(shape) > 1
    if own not in ("bias", "b") or len(shape) < 2 or max(shape[1:]) == 1:
        return False
    # The bias of a stack has the first axis of its kernels, and their outputs, which
    # are the last axes of a kernel in flax, and the next ones in equinox.
    n = len(shape)
    prefix = f"{module}/" if module else ""
    kernels = [
        tuple(x.shape)
        for other, x in leaves.items()
        if other.startswith(prefix) and len(x.shape) > n
    ]
    return any(
        k[:n] == shape or (k[0] == shape[0] and k[1 - n :] == shape[1:])
        for k in kernels
    )


def no_stacks(leaves: Sequence[Any]) -> tuple[Axes, ...]:
    """The stack axes of leaves of one layer each."""
    return ((),) * len(leaves)


def layer_shape(shape: Shape, axes: Axes) -> Shape:
    """The shape of one layer of a leaf."""
    return tuple(n for i, n in enumerate(shape) if i not in axes)


def layer_axes(ndim: int, axes: Axes) -> Axes:
    """The axes of a leaf that lie within its layers."""
    return tuple(i for i in range(ndim) if i not in axes)


def layer_count(shape: Shape, axes: Axes) -> int:
    """The number of layers in a leaf."""
    return math.prod(shape[axis] for axis in axes)


def layer_shapes(shapes: Iterable[Shape], stacks: Iterable[Axes]) -> tuple[Shape, ...]:
    """The shapes of all layers."""
    return tuple(
        itertools.chain.from_iterable(
            [layer_shape(shape, axes)] * layer_count(shape, axes)
            for shape, axes in zip(shapes, stacks, strict=True)
        )
    )


def layer_names(name: str, shape: Shape, axes: Axes) -> Iterator[str]:
    """The names of a leaf's layers: its own name, or with the layer's number after."""
    for place in np.ndindex(*(shape[axis] for axis in axes)):
        yield "/".join([name, *map(str, place)])


def divide(numbers: Any, shapes: Iterable[Shape], stacks: Iterable[Axes]) -> list[Any]:
    """One number per layer as one array per leaf, which broadcasts over the leaf.

    The array of a leaf has length 1 along its other axes; that of a leaf of one layer
    is a scalar. Leaves may have other lengths along other axes than their stack axes.
    """
    pieces, start = [], 0
    for shape, axes in zip(shapes, stacks, strict=True):
        stop = start + layer_count(shape, axes)
        sides = [n if i in axes else 1 for i, n in enumerate(shape)]
        pieces.append(numbers[start:stop].reshape(sides) if axes else numbers[start])
        start = stop
    return pieces


def join(numbers: Sequence[Array]) -> Array:
    """The inverse of `divide`: a vector of one number per layer."""
    return jnp.concatenate([_replicated(x).reshape(-1) for x in numbers])


def _replicated(x: Array) -> Array:
    """`x` without its sharding, where the sharding is part of its type."""
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x
    return jax.sharding.reshard(
        x, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    )


def layer_keys(
    key: Array, shapes: Iterable[Shape], stacks: Iterable[Axes]
) -> list[Array]:
    """The random keys of the layers of every leaf, by the layers' numbers."""
    keys, first = [], 0
    for shape, axes in zip(shapes, stacks, strict=True):
        count = layer_count(shape, axes)
        numbers = np.arange(first, first + count, dtype=np.uint32)
        keys.append(fold_in_each(key, numbers.reshape([shape[a] for a in axes])))
        first += count
    return keys


def fold_in_each(key: Array, numbers: Any) -> Array:
    """The key with each number of an array (or a scalar) folded in."""
    f = jax.random.fold_in
    for _ in range(np.ndim(numbers)):
        f = jax.vmap(f, (None, 0))
    return f(key, numbers)


def over_layers(
    f: Callable[[Array, Any], Array], axes: Axes
) -> Callable[[Array, Any], Array]:
    """`f` of one layer, as a function of a leaf.

    Args:
      f: A function of the key and the arrays (a pytree) of a layer.
      axes: The stack axes of the leaf.

    Returns:
      A function of the keys of all layers, see `layer_keys`, and the arrays of a leaf.
    """
    mapped = f
    # The outer maps come first, so the inner ones see a leaf without their axes.
    for i in reversed(range(len(axes))):
        axis = axes[i] - i
        mapped = jax.vmap(mapped, in_axes=(0, axis), out_axes=axis)

    def of_leaf(keys: Array, arrays: Any) -> Array:
        sharding = jax.typeof(jax.tree.leaves(arrays)[0]).sharding
        if axes and any(sharding.spec):
            spec = jax.sharding.PartitionSpec(*(sharding.spec[axis] for axis in axes))
            keys = jax.sharding.reshard(keys, sharding.update(spec=spec))
        return mapped(keys, arrays)

    return of_leaf
