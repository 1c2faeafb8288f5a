"""Masks as pytrees: which leaves carry one, applying, packing, counting.

A tree of masks has the structure of the parameters, with a boolean array (True =
active) at every maskable leaf and `optax.MaskedNode()` at every dense leaf.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.core import Tracer

PyTree = Any
# Which leaves carry a mask: a rule, or a tree of bools of the structure of params.
Where = Callable[[str, Any], bool] | PyTree | None


class Sparsity(NamedTuple):
    """How sparse a tree of masks is: numbers on the host.

    Attributes:
      overall: share of maskable weights that are pruned (0 if there are none).
      leaves: the same for every maskable leaf, by its name ("dense/kernel").
      active: number of active weights.
      total: number of maskable weights.
    """

    overall: float
    leaves: dict[str, float]
    active: int
    total: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedMask:
    """A mask at 1 bit a weight.

    Eight neighbours along one axis are a byte, the first of them its highest bit, and
    where their number is no multiple of eight the last byte is padded with zeros: so a
    packed mask is sharded as its parameter is, and neither packing nor reading it moves
    anything between devices (as long as the shards of that axis hold multiples of
    eight).

    Attributes:
      bits: uint8, of the mask's shape with ceil(n / 8) for the length n of that axis;
        (1,) for a scalar.
      shape: the mask's shape (static).
    """

    bits: Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def axis(self) -> int:
        """The axis whose neighbours share bytes: -2, or -1 where that is smaller."""
        return _packed_axis(self.shape)


def _packed_axis(shape: tuple[int, ...]) -> int:
    # Weights that lie side by side, along the last axis, then have the same bit of
    # bytes that do: a step reads them with vector instructions, from the cache.
    if len(shape) < 2:
        return -1
    *_, rows, columns = shape
    return -2 if -(-rows // 8) * columns <= rows * -(-columns // 8) else -1


def is_explicit(sharding: Any) -> bool:
    """Whether a sharding is part of its array's type: some mesh axis is Explicit."""
    types = getattr(sharding.mesh, "axis_types", ())
    return jax.sharding.AxisType.Explicit in types


def is_masked_node(x: Any) -> bool:
    """Whether `x` stands for a leaf that carries no mask."""
    return isinstance(x, optax.MaskedNode)


def _is_absent(x: Any) -> bool:
    return x is None or is_masked_node(x)


def leaf_name(path: tuple[Any, ...]) -> str:
    """Name of a leaf: its keys joined by slashes, "dense/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def default_where(name: str, leaf: Any) -> bool:
    """Every floating leaf with two or more dimensions: not biases, not norms."""
    del name
    return leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)


def maskable(params: PyTree, where: Where = None) -> PyTree:
    """Tree of bools: which leaves of `params` carry a mask.

    Args:
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      where: None for every floating leaf with ndim >= 2; or a function of (name,
        leaf), the name as in `leaf_name`; or a pytree of bools of the structure of
        `params`.

    Returns:
      Pytree of Python bools of the structure of `params`.

    Raises:
      ValueError: no leaves, none selected, or `where` of another structure.
      TypeError: a leaf selected that is not floating.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    if not leaves:
        raise ValueError(
            f"params has no leaves, got {params!r}: nothing to make sparse."
        )
    check_arrays("params", params)
    if where is None or callable(where):
        rule = default_where if where is None else where
        chosen = [bool(rule(leaf_name(path), leaf)) for path, leaf in leaves]
    else:
        if jax.tree.structure(where) != treedef:
            raise ValueError(
                "where must be None, a function of (name, leaf), or a pytree of bools "
                f"of the structure of params; got structure "
                f"{jax.tree.structure(where)} for params of {treedef}."
            )
        chosen = [bool(x) for x in jax.tree.leaves(where)]
    for (path, leaf), selected in zip(leaves, chosen, strict=True):
        if selected and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"where selects {leaf_name(path)!r} of dtype {leaf.dtype}: only "
                "floating leaves can carry a mask; exclude it in `where`."
            )
    if not any(chosen):
        found = ", ".join(
            f"{leaf_name(path)!r} {leaf.dtype}{list(leaf.shape)}"
            for path, leaf in leaves[:8]
        )
        raise ValueError(
            "no maskable leaf: "
            + (
                "the default takes floating leaves with ndim >= 2"
                if where is None
                else "`where` selects none"
            )
            + f", and params has {found}{', ...' if len(leaves) > 8 else ''}. "
            "Pass `where=` to choose leaves."
        )
    return jax.tree.unflatten(treedef, chosen)


def map_masked(
    f: Callable[..., Any], masks: PyTree, tree: PyTree, *rest: PyTree
) -> Any:
    """`f(mask, x, *others)` at maskable leaves; elsewhere the leaf of `tree`."""
    return jax.tree.map(
        lambda mask, x, *others: x if is_masked_node(mask) else f(mask, x, *others),
        masks,
        tree,
        *rest,
        is_leaf=is_masked_node,
    )


def maskable_leaves(tree: PyTree, masks: PyTree) -> list[Any]:
    """The leaves of `tree` that carry a mask, in the order of the leaves of `masks`."""
    chosen = jax.tree.map(
        lambda mask, x: mask if is_masked_node(mask) else x,
        masks,
        tree,
        is_leaf=is_masked_node,
    )
    return jax.tree.leaves(chosen)


def flags(tree: PyTree, masks: PyTree) -> list[bool]:
    """For every leaf of `tree`, whether it carries a mask."""
    marked = jax.tree.map(
        lambda mask, x: (
            jax.tree.map(lambda _: False, x) if is_masked_node(mask) else True
        ),
        masks,
        tree,
        is_leaf=is_masked_node,
    )
    return jax.tree.leaves(marked)


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Parameters with every pruned weight exactly zero.

    Args:
      params: pytree of arrays.
      masks: pytree of masks of the same structure (`optax.MaskedNode()` or None at
        leaves to leave alone).

    Returns:
      Pytree of the structure, shapes and dtypes of `params`.

    Raises:
      ValueError: masks of another structure or shape.
    """
    return map_masked(
        lambda mask, x: jnp.where(placed_like(mask, x), x, jnp.zeros_like(x)),
        check_masks(masks, params),
        params,
    )


def placed_like(mask: Array, leaf: Any) -> Array:
    """The mask in the sharding of the array `leaf`, of the same shape."""
    return mask | jnp.zeros_like(leaf, bool)


def check_masks(masks: PyTree, params: PyTree, argument: str = "params") -> PyTree:
    """Given masks as boolean arrays with `MaskedNode` at dense leaves, checked.

    Args:
      masks: pytree of boolean (or 0/1) arrays, packed or not; None or
        `optax.MaskedNode()` at dense leaves.
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      argument: name of the latter, for messages.

    Returns:
      Pytree of boolean arrays and `optax.MaskedNode()`.

    Raises:
      ValueError: another structure or shape, values other than 0 and 1, no mask.
      TypeError: a mask that is neither boolean nor numeric, or at a leaf that is not
        floating.
    """
    given, treedef = jax.tree_util.tree_flatten_with_path(
        _unpack(masks), is_leaf=_is_absent
    )
    try:
        leaves = treedef.flatten_up_to(params)
    except ValueError as error:
        raise ValueError(
            f"masks must have the structure of {argument} (None or optax.MaskedNode() "
            f"at leaves without a mask): {error}"
        ) from error
    checked = [
        _check_mask(leaf_name(path), mask, leaf, argument)
        for (path, mask), leaf in zip(given, leaves, strict=True)
    ]
    if all(map(_is_absent, checked)):
        raise ValueError(f"masks holds no mask, got {masks!r}.")
    return treedef.unflatten(checked)


def _check_mask(name: str, mask: Any, leaf: Any, argument: str) -> Any:
    if _is_absent(mask):
        # A None of the parameters' own is no leaf, and stays.
        return None if leaf is None else optax.MaskedNode()
    if is_masked_node(leaf):
        raise ValueError(
            "masks must have masks at the same leaves as the state, which has none at "
            f"{name!r}: put None there."
        )
    shape = getattr(leaf, "shape", None)
    if jnp.shape(mask) != shape:
        raise ValueError(
            f"masks has shape {jnp.shape(mask)} at {name!r}, where {argument} has "
            f"{shape}."
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            f"masks has a mask at {name!r} of dtype {leaf.dtype}: only floating leaves "
            "can carry one; put None there."
        )
    return _as_bool(name, mask)


def _as_bool(name: str, mask: Any) -> Array:
    mask = mask if hasattr(mask, "dtype") else np.asarray(mask)
    if mask.dtype == jnp.bool_:
        return jnp.asarray(mask)
    if not jnp.issubdtype(mask.dtype, jnp.number):
        raise TypeError(
            f"masks has dtype {mask.dtype} at {name!r}; it must be boolean."
        )
    if isinstance(mask, Tracer):
        raise TypeError(
            f"masks has dtype {mask.dtype} at {name!r} inside a traced function, where "
            "its values cannot be checked: convert it to bool."
        )
    if not bool(jnp.all((mask == 0) | (mask == 1))):
        raise ValueError(f"masks has values other than 0 and 1 at {name!r}.")
    return jnp.asarray(mask) != 0


def given_masks(masks: PyTree) -> PyTree:
    """Given masks, packed or not, as boolean arrays: `check_masks` without params.

    Args:
      masks: pytree of boolean (or 0/1) arrays, or of `PackedMask` records.

    Raises:
      ValueError: values other than 0 and 1.
      TypeError: what is no array, or neither boolean nor numeric.
    """
    unpacked = _unpack(masks)
    check_arrays("masks", unpacked)
    return jax.tree_util.tree_map_with_path(
        lambda path, mask: _as_bool(leaf_name(path), mask), unpacked
    )


def check_arrays(argument: str, tree: PyTree) -> None:
    """Raises TypeError unless every leaf is an array, or the shape of one."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(f"{argument} must hold arrays, got {leaf!r}{_at(path)}.")


def check_concrete(argument: str, tree: PyTree) -> None:
    """Raises TypeError for values that are traced, and so not known."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, Tracer):
            raise TypeError(
                f"{argument} must be concrete, and is traced{_at(path)}: call this "
                "outside of jit."
            )


def _at(path: tuple[Any, ...]) -> str:
    return f" at {leaf_name(path)!r}" if path else ""


def active_counts(masks: PyTree) -> list[Array]:
    """Number of active weights of every maskable leaf: uint32 (uint64 if larger)."""
    check_arrays("masks", masks)
    return [
        jnp.sum(m, dtype=jnp.uint32 if m.size < 2**32 else jnp.uint64)
        for m in jax.tree.leaves(masks)
    ]


def sparsity(masks: PyTree) -> Sparsity:
    """How sparse masks are, overall and per leaf (see `Sparsity`).

    Args:
      masks: pytree of masks, packed or not. Must be concrete: the numbers are exact
        Python ones.

    Raises:
      TypeError, ValueError: what is no mask; traced masks.
    """
    masks = given_masks(masks)
    check_concrete("masks", masks)
    leaves = [
        (leaf_name(path), mask)
        for path, mask in jax.tree_util.tree_leaves_with_path(masks)
    ]
    sizes = {name: math.prod(mask.shape) for name, mask in leaves}
    active = dict(
        zip(sizes, map(int, jax.device_get(active_counts(masks))), strict=True)
    )
    total = sum(sizes.values())
    return Sparsity(
        overall=1.0 - sum(active.values()) / total if total else 0.0,
        leaves={
            name: 1.0 - active[name] / size if size else 0.0
            for name, size in sizes.items()
        },
        active=sum(active.values()),
        total=total,
    )


def pack_masks(masks: PyTree) -> PyTree:
    """Masks at 1 bit a weight, for storage, transport, and states.

    Args:
      masks: pytree of masks.

    Returns:
      The same tree with a `PackedMask` for every mask; `unpack_masks` gives the masks
      back exactly.
    """

    def pack(mask: Array) -> PackedMask:
        axis = _packed_axis(mask.shape)
        sharding = jax.typeof(mask).sharding
        if is_explicit(sharding) and mask.ndim:
            shard = sharding.shard_shape(mask.shape)[axis]
            if shard < mask.shape[axis] and shard % 8:
                # On Explicit mesh axes, the eight of a byte must be in one shard.
                axes = list(sharding.spec)
                axes[axis] = None
                spec = jax.sharding.PartitionSpec(*axes)
                mask = jax.sharding.reshard(
                    mask, jax.sharding.NamedSharding(sharding.mesh, spec)
                )
        return PackedMask(_pack_leaf(jnp.atleast_1d(mask), axis), mask.shape)

    return jax.tree.map(pack, given_masks(masks))


def unpack_masks(packed: PyTree) -> PyTree:
    """The masks that `pack_masks` packed; others as they are.

    Raises:
      TypeError: what is no array.
    """
    check_arrays("packed", packed)
    return _unpack(packed)


def _unpack(packed: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x: _unpack_leaf(x) if is_packed(x) else x, packed, is_leaf=is_packed
    )


def _pack_leaf(mask: Array, axis: int) -> Array:
    # (Not `jnp.packbits`: along the axis -2 it transposes, XLA then lays out the bits
    # that a state holds in that order, and every step reads them across.)
    padding = [(0, 0)] * mask.ndim
    padding[axis] = (0, -mask.shape[axis] % 8)
    shape = list(mask.shape)
    shape[axis : axis + 1 or None] = [-(-mask.shape[axis] // 8), 8]
    digits = jnp.pad(mask, padding).reshape(shape).astype(jnp.uint8)
    return jnp.sum(digits << _places(digits.ndim, axis), axis=axis, dtype=jnp.uint8)


def _places(ndim: int, axis: int) -> Array:
    """The places of eight neighbours in their byte, along an axis of their own."""
    shape = [1] * ndim
    shape[axis] = 8
    return jnp.arange(7, -1, -1, dtype=jnp.uint8).reshape(shape)


# Compiled: outside jit it would be several operations a leaf.
@jax.jit
def _unpack_leaf(x: PackedMask) -> Array:
    axis = x.axis
    digits = jnp.expand_dims(x.bits, axis)
    digits = (digits >> _places(digits.ndim, axis)) & 1
    # (Counted from the end: under `vmap`, bits of all lanes come in one array.)
    shape = list(x.bits.shape)
    shape[axis] *= 8
    mask = digits.astype(bool).reshape(shape)
    if not x.shape:
        return mask[..., 0]
    return lax.slice_in_dim(mask, 0, x.shape[axis], axis=axis)


def is_packed(x: Any) -> bool:
    """Whether `x` is a `PackedMask`."""
    return isinstance(x, PackedMask)
