"""Masks as pytrees: choose the leaves that carry one; apply and count masks.

A tree of masks has the structure of the parameters. It holds a boolean array (True for
active weights) at every maskable leaf and `optax.MaskedNode()` at every dense leaf.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer

from granet_jax.layers import (
    Axes,
    Stacked,
    check_leaves,
    check_stacked,
    stack_axes,
)
from granet_jax.packed_masks import pack, unpack

PyTree = Any
# Which leaves carry a mask: a regular expression, a function of (name, leaf), or a
# pytree of bools.
Where = str | Callable[[str, Any], bool] | PyTree | None

# Words in the name of a parameter that is no kernel and no embedding, however many
# dimensions it has: flax's attention biases have two, and so have the biases and scales
# of layers that `nn.scan` stacks; class tokens and learned positions have three.
_POSITIONS = {"pos", "position", "positions", "positional", "wpe"}
_DENSE = {"bias", "biases", "scale", "scales", "gamma", "beta", "lora"} | _POSITIONS
_TOKENS = {"token", "tokens", "cls", "class"}
_TABLES = {"embed", "embeds", "embedding", "embeddings"}


class Sparsity(NamedTuple):
    """The sparsity of a tree of masks, in Python numbers.

    Attributes:
      overall: The share of maskable weights that are pruned; 0 if there are no weights.
      leaves: The share of pruned weights of every maskable leaf, by name
        ("dense/kernel").
      active: The number of active weights.
      total: The number of maskable weights.
    """

    overall: float
    leaves: dict[str, float]
    active: int
    total: int

    @property
    def empty(self) -> tuple[str, ...]:
        """The names of the leaves without active weights."""
        return tuple(name for name, sparsity in self.leaves.items() if sparsity == 1.0)


def is_masked_node(x: Any) -> bool:
    """Whether `x` stands for a leaf that carries no mask."""
    return isinstance(x, optax.MaskedNode)


def _is_absent(x: Any) -> bool:
    return x is None or is_masked_node(x)


def leaf_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf: its keys joined by slashes, such as "dense/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def default_where(name: str, leaf: Any, axes: Axes = ()) -> bool:
    """Whether a leaf is a kernel or an embedding, as far as one can tell.

    It is if it is floating, has two or more dimensions besides `axes`, the axes that
    count layers, and no word of its own name
    (after the last slash, words divided by underscores) says that it is a bias, a
    norm's scale, a token, a table of positions, or an adapter. "token_embedding" is the
    table of an embedding, and so is "embedding" alone, unless the module around it is
    named after positions ("position_embeddings/embedding").
    """
    if leaf.ndim - len(axes) < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return False
    # In the parameters of flax.nnx, an attribute of the parameter comes last.
    path = re.sub("/(raw_)?value$", "", name).lower().split("/")
    words = set(path[-1].split("_"))
    if words == {"embedding"} and len(path) > 1:
        words |= _POSITIONS.intersection(path[-2].split("_"))
    return not words & _DENSE and (bool(words & _TABLES) or not words & _TOKENS)


def maskable(params: PyTree, where: Where = None, stacked: Stacked = None) -> PyTree:
    """Which leaves of `params` carry a mask.

    Args:
      params: Pytree of arrays or `jax.ShapeDtypeStruct`.
      where: None for kernels and embeddings, see `default_where`; a regular expression
        that is searched for in the name of every leaf ("encoder/.*kernel"); a function
        of (name, leaf), with names as from `leaf_name`; or a pytree of bools of the
        structure of `params`.
      stacked: Which axes of a leaf count layers, as in `transform`.

    Returns:
      Pytree of Python bools of the structure of `params`.

    Raises:
      ValueError: `params` has no leaves, no leaf is selected, or `where` has another
        structure or is no regular expression.
      TypeError: A selected leaf is not floating.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    if not leaves:
        raise ValueError(
            f"params has no leaves, got {params!r}: nothing to make sparse."
        )
    check_arrays("params", params)
    check_leaves(stacked, {leaf_name(path): leaf for path, leaf in leaves})
    if where is None or isinstance(where, str) or callable(where):
        rule = _rule(where, stacked)  # pyright: ignore[reportArgumentType]
        chosen = [bool(rule(leaf_name(path), leaf)) for path, leaf in leaves]
    else:
        if jax.tree.structure(where) != treedef:
            raise ValueError(
                "where must be None, a regular expression, a function of (name, leaf), "
                "or a pytree of bools of the structure of params; got structure "
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
        listing = ", ".join(
            f"{leaf_name(path)!r} {leaf.dtype}{list(leaf.shape)}"
            for path, leaf in leaves[:8]
        )
        raise ValueError(
            "no maskable leaf: "
            + (
                "the default takes floating leaves with ndim >= 2 that are not named "
                "as biases, scales, tokens, positions or adapters"
                if where is None
                else f"`where` ({where!r}) selects none"
                if isinstance(where, str)
                else "`where` selects none"
            )
            + f", and params has {listing}{', ...' if len(leaves) > 8 else ''}. "
            "Pass `where=` to choose leaves."
        )
    return jax.tree.unflatten(treedef, chosen)


def stacks_of(tree: PyTree, stacked: Stacked) -> tuple[Axes, ...]:
    """The axes that count layers, of every leaf of a tree of masks or scores."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return tuple(stack_axes(stacked, leaf_name(path), x) for path, x in paths)


def by_layer(tree: PyTree, stacked: Stacked) -> PyTree:
    """A tree in which every layer is a leaf, for functions that report leaf by leaf.

    A leaf that stacks layers becomes a dict of them, by their numbers. So the layers of
    "blocks/kernel" are called "blocks/kernel/0", "blocks/kernel/1" and so on::

        granet_jax.sparsity(analysis.by_layer(masks, {"blocks/": 0})).leaves

    Args:
      tree: Pytree of arrays, such as masks, packed or not.
      stacked: Which axes of a leaf count layers, as in `transform`.

    Returns:
      Pytree of arrays.

    Raises:
      TypeError, ValueError: `stacked` is not valid, or a leaf is not an array.
    """
    check_stacked(stacked)
    tree = unpack(tree)
    check_arrays("tree", tree)

    def layers(path: tuple[Any, ...], x: Array) -> Any:
        axes = stack_axes(stacked, leaf_name(path), x)
        front = jnp.moveaxis(x, axes, range(len(axes)))

        def divided(x: Array, depth: int) -> Any:
            if not depth:
                return x
            return {str(i): divided(x[i], depth - 1) for i in range(x.shape[0])}

        return divided(front, len(axes))

    return jax.tree_util.tree_map_with_path(layers, tree)


def _rule(
    where: str | Callable[[str, Any], bool] | None, stacked: Stacked
) -> Callable[[str, Any], bool]:
    if where is None:
        return lambda name, x: default_where(name, x, stack_axes(stacked, name, x))
    if callable(where):
        return where
    try:
        pattern = re.compile(where)
    except re.error as error:
        raise ValueError(
            f"where must be a regular expression, got {where!r}: {error}."
        ) from error
    return lambda name, _: pattern.search(name) is not None


def map_masked(
    f: Callable[..., Any], masks: PyTree, tree: PyTree, *rest: PyTree
) -> Any:
    """`f(mask, x, *others)` at maskable leaves; the leaf of `tree` at dense leaves."""
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
    """Set all pruned weights to exactly zero.

    Args:
      params: Pytree of arrays.
      masks: Pytree of masks of the same structure, with `optax.MaskedNode()` or None at
        dense leaves.

    Returns:
      Pytree of the structure, shapes and dtypes of `params`.

    Raises:
      ValueError: The masks have another structure or shape.
    """
    return map_masked(
        lambda mask, x: jnp.where(placed_like(mask, x), x, jnp.zeros_like(x)),
        check_masks(masks, params),
        params,
    )


def placed_like(mask: Array, leaf: Any) -> Array:
    """The mask in the sharding of `leaf`, an array of the same shape."""
    return mask | jnp.zeros_like(leaf, bool)


def check_masks(
    masks: PyTree,
    params: PyTree,
    argument: str = "params",
    *,
    integers: bool = False,
) -> PyTree:
    """Check masks from the user against the parameters, and make them boolean.

    Args:
      masks: Pytree of boolean or 0/1 arrays, packed or not, with None or
        `optax.MaskedNode()` at dense leaves.
      params: Pytree of arrays or `jax.ShapeDtypeStruct`.
      argument: Name of `params` in error messages.
      integers: Whether leaves of integers, such as quantised weights, may carry a mask.

    Returns:
      Pytree of the structure of `params`: boolean arrays, and `optax.MaskedNode()` at
      dense leaves.

    Raises:
      ValueError: The masks have another structure or shape, or values other than 0 and
        1; or there is no mask.
      TypeError: A mask is neither boolean nor numeric, or is at a leaf that is not
        floating.
    """
    entries, treedef = jax.tree_util.tree_flatten_with_path(
        unpack(masks), is_leaf=_is_absent
    )
    try:
        leaves = treedef.flatten_up_to(params)
    except ValueError as error:
        raise ValueError(
            f"masks must have the structure of {argument} (None or optax.MaskedNode() "
            f"at leaves without a mask): {error}"
        ) from error
    checked = [
        _check_mask(leaf_name(path), mask, leaf, argument, integers)
        for (path, mask), leaf in zip(entries, leaves, strict=True)
    ]
    if not jax.tree.leaves(checked):
        raise ValueError(f"masks holds no mask, got {masks!r}.")
    return treedef.unflatten(checked)


def _check_mask(name: str, mask: Any, leaf: Any, argument: str, integers: bool) -> Any:
    if _is_absent(mask):
        # It may stand for a subtree. A None in the parameters is no leaf, and stays.
        return jax.tree.map(lambda _: optax.MaskedNode(), leaf)
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
    is_integer = jnp.issubdtype(leaf.dtype, jnp.integer)
    if not (jnp.issubdtype(leaf.dtype, jnp.floating) or (integers and is_integer)):
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
    """Check masks from the user as `check_masks` does, without the parameters.

    Args:
      masks: Pytree of boolean or 0/1 arrays, or of `PackedMask` records.

    Returns:
      Pytree of boolean arrays.

    Raises:
      ValueError: A mask has values other than 0 and 1.
      TypeError: A leaf is not an array, or is neither boolean nor numeric.
    """
    unpacked = unpack(masks)
    check_arrays("masks", unpacked)
    return jax.tree_util.tree_map_with_path(
        lambda path, mask: _as_bool(leaf_name(path), mask), unpacked
    )


def check_arrays(argument: str, tree: PyTree) -> None:
    """Raise TypeError unless every leaf has a shape and a dtype."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(f"{argument} must hold arrays, got {leaf!r}{_at(path)}.")


def check_concrete(argument: str, tree: PyTree) -> None:
    """Raise TypeError if a leaf is traced, so that its values are unknown."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, Tracer):
            raise TypeError(
                f"{argument} must be concrete, and is traced{_at(path)}: call this "
                "outside of jit."
            )


def _at(path: tuple[Any, ...]) -> str:
    return f" at {leaf_name(path)!r}" if path else ""


def active_counts(masks: PyTree) -> list[Array]:
    """The number of active weights of every maskable leaf.

    The numbers are uint32, or uint64 for leaves of 2**32 weights or more.
    """
    check_arrays("masks", masks)
    return [
        jnp.sum(m, dtype=jnp.uint32 if m.size < 2**32 else jnp.uint64)
        for m in jax.tree.leaves(masks)
    ]


def sparsity(masks: PyTree) -> Sparsity:
    """The sparsity of masks, overall and per leaf.

    Args:
      masks: Pytree of masks, packed or not. They must not be traced.

    Returns:
      A `Sparsity` record of exact Python numbers.

    Raises:
      TypeError, ValueError: A leaf is not a mask, or is traced.
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
    """Pack masks to 1 bit per weight, to store or to send them.

    Args:
      masks: Pytree of masks.

    Returns:
      The same tree with a `PackedMask` for every mask. `unpack_masks` restores the
      masks exactly.

    Raises:
      TypeError, ValueError: A leaf is not a mask.
    """
    return jax.tree.map(pack, given_masks(masks))


def unpack_masks(packed: PyTree) -> PyTree:
    """Unpack masks from `pack_masks`.

    Args:
      packed: Pytree of `PackedMask` records. Masks that are not packed are returned as
        they are.

    Returns:
      Pytree of boolean arrays.

    Raises:
      TypeError: A leaf is not an array.
    """
    check_arrays("packed", packed)
    return unpack(packed)
