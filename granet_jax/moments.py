"""The optimizer's moments of pruned weights: which leaves they are, and fresh ones.

Optimizers keep their moments in copies of the tree of parameters. So a subtree of the
optimizer's state with the structure of the parameters belongs to them, leaf by leaf,
whatever the names. `optax.masked` and `multi_transform` put `optax.MaskedNode()` where
they leave parameters out. A leaf is a moment of its parameter if both have the same
shape. Factored statistics (the rows and columns of adafactor, the axes of sm3) have
other shapes and belong to many weights. They stay as they are.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from granet_jax.masking import is_masked_node

PyTree = Any


def renew_moments(inner_state: PyTree, fresh: PyTree, keep: PyTree) -> PyTree:
    """Set the moments in an optimizer's state to fresh ones outside `keep`.

    Args:
      inner_state: State of any optax optimizer.
      fresh: State from the optimizer's `init`. It is zero in most moments; then XLA
        computes nothing for it.
      keep: Pytree of boolean arrays with the structure of the parameters, and
        `optax.MaskedNode()` at dense leaves.

    Returns:
      The state, with the same structure, shapes and dtypes.
    """

    def renewed(x: Array, new: Array, mask: Any) -> Array:
        if is_masked_node(mask):
            return x
        return jnp.where(mask, x, new.astype(x.dtype))

    masks = matching_masks(inner_state, keep)
    return jax.tree.map(renewed, inner_state, fresh, masks)


def restart_moments(
    inner_state: PyTree, fresh: PyTree, params: PyTree, restart: Array
) -> PyTree:
    """Set all moments in an optimizer's state to fresh ones if `restart` is true.

    This includes the moments of dense leaves. Counters stay as they are, because
    learning-rate schedules depend on them, and so do factored statistics.

    Args:
      inner_state: State of any optax optimizer.
      fresh: State from the optimizer's `init`.
      params: Pytree of the parameters.
      restart: Boolean scalar.

    Returns:
      The state, with the same structure, shapes and dtypes.
    """

    def restarted(x: Array, new: Array, param: Any) -> Array:
        if is_masked_node(param):
            return x
        return jnp.where(restart, new.astype(x.dtype), x)

    owners = matching_masks(inner_state, params)
    return jax.tree.map(restarted, inner_state, fresh, owners)


def matching_masks(inner_state: PyTree, masks: PyTree) -> PyTree:
    """For every leaf of an optimizer's state, the mask of its parameter.

    A leaf that is no moment of a masked parameter gets `optax.MaskedNode()`. With the
    parameters in place of the masks, every moment gets its parameter.
    """

    def of_node(node: Any) -> PyTree:
        leaves, treedef = jax.tree.flatten(node, is_leaf=is_masked_node)
        found = _masks_of(node, masks) or [optax.MaskedNode()]
        return treedef.unflatten(
            mask if _has_shape_of(x, mask) else optax.MaskedNode()
            for x, mask in zip(leaves, found, strict=True)
        )

    return jax.tree.map(
        of_node, inner_state, is_leaf=lambda node: bool(_masks_of(node, masks))
    )


def _has_shape_of(x: Any, mask: Any) -> bool:
    return hasattr(x, "shape") and getattr(mask, "shape", None) == x.shape


def _masks_of(node: Any, masks: PyTree) -> list[Any] | None:
    """The masks of all leaves of `node`, or None if it has another structure."""
    leaves, treedef = jax.tree.flatten(node, is_leaf=is_masked_node)
    try:
        found = treedef.flatten_up_to(masks)
    except ValueError:
        return None
    # A MaskedNode in the state may stand for a whole subtree.
    pairs = zip(leaves, found, strict=True)
    fits = all(is_masked_node(x) or _is_entry(mask) for x, mask in pairs)
    return found if fits else None


def _is_entry(x: Any) -> bool:
    return is_masked_node(x) or jax.tree_util.all_leaves([x])


def refuse_flattened(
    inner_state: PyTree, params: PyTree, argument: str = "inner"
) -> None:
    """Raise ValueError for `optax.flatten`, whose moments belong to no parameter.

    Each of its moments is a single vector over all parameters, outside of any subtree
    that has an entry for every parameter.
    """
    structure = jax.tree.structure(params)
    shapes = [tuple(p.shape) for p in jax.tree.leaves(params)]
    size = sum(map(math.prod, shapes))

    def is_per_parameter(node: Any) -> bool:
        if jax.tree_util.treedef_is_leaf(structure):
            return getattr(node, "shape", None) == shapes[0]
        try:
            entries = structure.flatten_up_to(node)
        except ValueError:
            return False
        # The state of an optimizer is a tuple. Parameters in a tuple have the structure
        # of a chain of optimizers, but no entry of a chain is an array or a list.
        return all(is_masked_node(x) or not isinstance(x, tuple) for x in entries)

    for x in jax.tree.leaves(inner_state, is_leaf=is_per_parameter):
        if getattr(x, "shape", None) == (size,) and not is_per_parameter(x):
            raise ValueError(
                f"{argument} keeps its state as one flat vector over all parameters "
                f"(shape ({size},)), as optax.flatten does: the moments of pruned "
                "weights cannot be addressed. Use the optimizer without optax.flatten."
            )
