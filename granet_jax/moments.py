"""Zeroing the optimizer's moments at pruned weights, for any optimizer.

A leaf of the optimizer's state belongs to a parameter if its key path ends in the key
path of the parameter and both have the same shape. If the paths of several parameters
match, the longest one counts. This rule holds in every optax optimizer that we tried,
also inside `masked`, `multi_transform`, `inject_hyperparams` and `nnx.Optimizer`.
Factored statistics (the rows and columns of adafactor, the axes of sm3) have other
shapes and belong to many weights. They stay as they are.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from granet_jax.masking import is_masked_node

PyTree = Any


def zero_moments(inner_state: PyTree, keep: PyTree) -> PyTree:
    """Set the moments in an optimizer's state to zero outside `keep`.

    Args:
      inner_state: State of any optax optimizer.
      keep: Pytree of boolean arrays with the structure of the parameters, and
        `optax.MaskedNode()` at dense leaves.

    Returns:
      The state, with the same structure, shapes and dtypes.
    """

    def zero(x: Any, mask: Any) -> Any:
        return x if is_masked_node(mask) else jnp.where(mask, x, jnp.zeros_like(x))

    return _map_matched(zero, inner_state, keep)


def matching_masks(inner_state: PyTree, masks: PyTree) -> PyTree:
    """For every leaf of an optimizer's state, the mask of its parameter.

    A leaf that belongs to no masked parameter gets `optax.MaskedNode()`.
    """
    return _map_matched(lambda _, m: m, inner_state, masks)


def restart_moments(
    inner_state: PyTree, fresh: PyTree, params: PyTree, restart: Array
) -> PyTree:
    """Reset the moments in an optimizer's state if `restart` is true.

    This resets the moments of all parameters, dense leaves included. Counters stay as
    they are, because learning-rate schedules depend on them, and so do factored
    statistics.

    Args:
      inner_state: State of any optax optimizer.
      fresh: State from the optimizer's `init`.
      params: Pytree of the parameters.
      restart: Boolean scalar.

    Returns:
      The state, with the same structure, shapes and dtypes.
    """
    moments = _map_matched(lambda _, p: not is_masked_node(p), inner_state, params)
    return jax.tree.map(
        lambda moment, x, new: jnp.where(restart, new, x) if moment else x,
        moments,
        inner_state,
        fresh,
    )


def _map_matched(
    f: Callable[[Any, Any], Any], inner_state: PyTree, masks: PyTree
) -> PyTree:
    """f(leaf, mask) for every leaf of the state; `MaskedNode` where it has no mask."""
    leaves = jax.tree_util.tree_leaves_with_path(masks, is_leaf=is_masked_node)
    by_path = {_names(path): mask for path, mask in leaves}

    def at(path: tuple[Any, ...], x: Any) -> Any:
        names = _names(path)
        for start in range(len(names) + 1):
            mask = by_path.get(names[start:])
            if mask is None:
                continue
            if is_masked_node(mask) or jnp.shape(x) != mask.shape:
                break
            return f(x, mask)
        return f(x, optax.MaskedNode())

    return jax.tree_util.tree_map_with_path(at, inner_state)


def refuse_flattened(
    inner_state: PyTree, params: PyTree, argument: str = "inner"
) -> None:
    """Raise ValueError for `optax.flatten`, whose moments belong to no parameter.

    Each of its moments is a single vector over all parameters, and its key path
    contains the path of no parameter.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    size = sum(math.prod(x.shape) for _, x in leaves)
    paths = [_names(path) for path, _ in leaves]

    def names_a_parameter(path: tuple[str, ...]) -> bool:
        return any(
            names and path[start : start + len(names)] == names
            for names in paths
            for start in range(len(path))
        )

    for path, x in jax.tree_util.tree_leaves_with_path(inner_state):
        if jnp.shape(x) == (size,) and not names_a_parameter(_names(path)):
            raise ValueError(
                f"{argument} keeps its state as one flat vector over all parameters "
                f"(shape ({size},)), as optax.flatten does: the moments of pruned "
                "weights cannot be addressed. Use the optimizer without optax.flatten."
            )


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    # Keys compare by name, because a restored checkpoint may hold a dict where the
    # optimizer had a NamedTuple.
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
