"""The state of `transform`, and how to find it and its masks among optax's states."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from granet_jax import masking
from granet_jax.masking import PyTree
from granet_jax.packed_masks import is_packed


class SparseState(NamedTuple):
    """State of `transform`.

    Attributes:
      count: int32 scalar, the optimizer steps taken.
      masks: Pytree of the structure of params: boolean arrays, True where a weight is
        active, and `optax.MaskedNode()` at dense leaves. With `packed=True`, the arrays
        are `PackedMask` records; `get_masks` gives boolean arrays in any case.
      inner_state: The state of the inner optimizer; `optax.EmptyState()` without one.
      average: The moving average of the dense gradient, of the structure of the masks,
        for a method with `average_decay`; else the empty tuple.
      marked: A second tree of masks, stored like `masks`, for a method with
        `marked_sparsity`; else the empty tuple.
      entered: The weights that became active in the last update of the masks and did
        not keep a value from before, stored like `masks`; the empty tuple for a method
        that never grows weights.
      phases: The states of the method's phases.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    masks: PyTree
    inner_state: optax.OptState
    average: PyTree = ()
    marked: PyTree = ()
    entered: PyTree = ()
    phases: tuple[Any, ...] = ()


def is_packed_state(state: SparseState) -> bool:
    """Whether a state holds its masks as `PackedMask` records."""
    leaves = jax.tree.leaves(state.masks, is_leaf=is_packed)
    return any(map(is_packed, leaves))


def unpacked_like(params: PyTree, masks: PyTree) -> PyTree:
    """The masks of a state as boolean arrays, in the shardings of the parameters."""
    unpacked = masking.unpack_masks(masks)
    if unpacked is masks or not jax.tree.leaves(unpacked):
        return unpacked
    return masking.map_masked(
        lambda m, _, p: masking.placed_like(m, p), unpacked, unpacked, params
    )


def get_state(opt_state: optax.OptState) -> SparseState:
    """The one `SparseState` inside any nest of optax states.

    Raises:
      ValueError: There is none, or more than one.
    """
    states = _states(opt_state)
    if len(states) > 1:
        raise ValueError(
            "opt_state must hold one state of granet_jax.transform, got "
            f"{len(states)}: pass the state of one of them, such as "
            "opt_state.inner_states[label] of optax.multi_transform."
        )
    return states[0]


def get_masks(opt_state: optax.OptState) -> PyTree:
    """The masks inside any nest of optax states, as boolean arrays.

    Several transformations may each mask a part of the parameters, inside
    `optax.multi_transform` or `optax.masked`. Their masks come as one tree.

    Raises:
      ValueError: There is no sparse state, or two of them mask the same parameters.
    """
    parts = [masking.unpack_masks(state.masks) for state in _states(opt_state)]
    return functools.reduce(_merged, parts)


def set_masks(opt_state: optax.OptState, masks: PyTree) -> optax.OptState:
    """Replace the masks inside any nest of optax states.

    The next step makes the parameters and the moments agree with the new masks;
    `apply_masks` does so at once for the parameters.

    Args:
      opt_state: Any nest of optax states with a `SparseState`; with several, each gets
        the masks of its own part of the parameters.
      masks: Pytree of masks with the structure and shapes of `get_masks(opt_state)`.

    Returns:
      The nest of states with `masks` in place.

    Raises:
      ValueError: There is no sparse state, or two of them mask the same parameters; or
        the masks have another structure or shape.
    """
    present = get_masks(opt_state)
    like = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, jnp.float32), present)
    checked = masking.check_masks(masks, like)
    if jax.tree.structure(checked) != jax.tree.structure(present):
        raise ValueError(
            "masks must have masks at the same leaves as the state: expected "
            f"{jax.tree.structure(present)}, got {jax.tree.structure(checked)}."
        )
    checked = jax.tree.map(masking.placed_like, checked, present)

    def replace(state: SparseState) -> SparseState:
        part = masking.unpack_masks(state.masks)
        part = masking.map_masked(lambda _, m, new: new, part, part, checked)
        packed = is_packed_state(state)
        return state._replace(masks=masking.pack_masks(part) if packed else part)

    return jax.tree.map(
        lambda x: replace(x) if _is_sparse(x) else x, opt_state, is_leaf=_is_sparse
    )


def sparse_view(params: PyTree, opt_state: optax.OptState) -> PyTree:
    """The sparse parameters: those of the forward pass, and those to keep.

    For a method that keeps its weights dense (`straight_through`, `top_kast`, or any
    with `weights="dense"`), the loss, its gradient and every evaluation take this view,
    and so does whoever keeps the result of the training::

        sparse = granet_jax.sparse_view(params, opt_state)
        grads = jax.grad(loss)(sparse, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)

    For other methods it equals the parameters after a step.

    Args:
      params: Pytree of arrays.
      opt_state: Any nest of optax states with a `SparseState`, or with several that
        mask different parameters.

    Returns:
      `params` with exact zeros outside the masks of `opt_state`.

    Raises:
      ValueError: There is no sparse state, or two of them mask the same parameters; or
        the parameters have another structure.
    """
    return masking.apply_masks(params, get_masks(opt_state))


def _states(opt_state: optax.OptState) -> list[SparseState]:
    """All sparse states inside a nest of optax states, at least one."""
    leaves = jax.tree.leaves(opt_state, is_leaf=_is_sparse)
    states = [x for x in leaves if _is_sparse(x)]
    if not states:
        raise ValueError(
            "opt_state must hold a state of granet_jax.transform, got 0: is "
            "transform part of the optimizer?"
        )
    return states


def _merged(masks: PyTree, others: PyTree) -> PyTree:
    """Two trees of masks as one, each with `MaskedNode` where the other has masks."""
    other_leaves = jax.tree_util.tree_leaves_with_path(
        others, is_leaf=masking.is_masked_node
    )
    absent = {path for path, x in other_leaves if masking.is_masked_node(x)}

    def one_of(path: tuple[Any, ...], mask: Any, other: Any) -> Any:
        if masking.is_masked_node(mask):
            return other
        if masking.is_masked_node(other):
            return mask
        raise ValueError(f"both mask {masking.leaf_name(path)!r}")

    try:
        # A MaskedNode on either side may stand for a subtree.
        return jax.tree_util.tree_map_with_path(
            one_of,
            masks,
            others,
            is_leaf=lambda path, x: masking.is_masked_node(x) or path in absent,
            is_leaf_takes_path=True,
        )
    except ValueError as error:
        raise ValueError(
            "opt_state holds several states of granet_jax.transform, which must mask "
            f"different parameters of one tree: {error}. Pass one of these states."
        ) from error


def _is_sparse(x: Any) -> bool:
    return isinstance(x, SparseState)
