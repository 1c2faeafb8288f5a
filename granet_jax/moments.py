"""Zeroing the optimizer's moments at pruned weights, for any optimizer.

A leaf of the optimizer's state belongs to a parameter when the tail of its key path is
the parameter's key path (the longest tail first) and the shapes are equal. That holds
in every optax optimizer tried, also inside `masked`, `multi_transform`,
`inject_hyperparams` and `nnx.Optimizer`. Factored statistics (adafactor's rows and
columns, sm3's axes) have other shapes, are shared by many weights, and stay as they
are.
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
    """Sets parameter-shaped leaves of an optimizer's state to zero outside `keep`.

    Args:
      inner_state: the state of any optax optimizer.
      keep: pytree of booleans of the structure of the parameters,
        `optax.MaskedNode()` at dense leaves.

    Returns:
      The state, with structure, shapes and dtypes as they were.
    """

    def zero(x: Any, mask: Any) -> Any:
        return x if is_masked_node(mask) else jnp.where(mask, x, jnp.zeros_like(x))

    return _map_matched(zero, inner_state, keep)


def matching_masks(inner_state: PyTree, masks: PyTree) -> PyTree:
    """For every leaf of an optimizer's state, the mask of its parameter.

    Leaves that belong to no parameter with a mask get `optax.MaskedNode()`.
    """
    return _map_matched(lambda _, m: m, inner_state, masks)


def restart_moments(
    inner_state: PyTree, fresh: PyTree, params: PyTree, restart: Array
) -> PyTree:
    """Parameter-shaped leaves of an optimizer's state as new, where `restart` holds.

    Of all parameters, dense leaves included. Counters and factored statistics go on:
    learning-rate schedules live by the former.

    Args:
      inner_state: the state of any optax optimizer.
      fresh: the state that its `init` makes.
      params: pytree of the parameters.
      restart: boolean scalar.

    Returns:
      The state, with structure, shapes and dtypes as they were.
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
    """f(leaf, mask) over an optimizer's state; `MaskedNode` where no mask belongs."""
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
    """Raises ValueError for `optax.flatten`, whose moments cannot be told apart.

    Its moments are one vector over all parameters, and no parameter's path is part of
    theirs.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    size = sum(math.prod(x.shape) for _, x in leaves)
    paths = [_names(path) for path, _ in leaves]

    def names_a_parameter(path: tuple[str, ...]) -> bool:
        return any(
            own and path[start : start + len(own)] == own
            for own in paths
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
    # By name, whatever container holds it: a restored checkpoint may be a dict where
    # the optimizer had a NamedTuple.
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
