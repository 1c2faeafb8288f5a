"""The state of `transform`, and how to find it and its masks among optax's states."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from granet_jax import masking
from granet_jax.masking import PyTree


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
      phases: The states of the method's phases.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    masks: PyTree
    inner_state: optax.OptState
    average: PyTree = ()
    marked: PyTree = ()
    phases: tuple[Any, ...] = ()


def is_packed_state(state: SparseState) -> bool:
    """Whether a state holds its masks as `PackedMask` records."""
    leaves = jax.tree.leaves(state.masks, is_leaf=masking.is_packed)
    return any(map(masking.is_packed, leaves))


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
    states = [
        x for x in jax.tree.leaves(opt_state, is_leaf=_is_sparse) if _is_sparse(x)
    ]
    if len(states) != 1:
        raise ValueError(
            f"opt_state must hold one state of granet_jax.transform, got {len(states)}"
            + (
                ": pass the state of one of them."
                if states
                else ": is transform part of the optimizer?"
            )
        )
    return states[0]


def get_masks(opt_state: optax.OptState) -> PyTree:
    """The masks inside any nest of optax states, as boolean arrays; see `get_state`."""
    return masking.unpack_masks(get_state(opt_state).masks)


def set_masks(opt_state: optax.OptState, masks: PyTree) -> optax.OptState:
    """Replace the masks inside any nest of optax states.

    The next step makes the parameters and the moments agree with the new masks;
    `apply_masks` does so at once for the parameters.

    Args:
      opt_state: Any nest of optax states with one `SparseState`.
      masks: Pytree of masks with the structure and shapes of those in the state.

    Returns:
      The nest of states with `masks` in place.

    Raises:
      ValueError: There is no sparse state or more than one; or the masks have another
        structure or shape.
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
        packed = is_packed_state(state)
        return state._replace(masks=masking.pack_masks(checked) if packed else checked)

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
      opt_state: Any nest of optax states with one `SparseState`.

    Returns:
      `params` with exact zeros outside the masks of `opt_state`.

    Raises:
      ValueError: There is no sparse state or more than one; or the parameters have
        another structure.
    """
    return masking.apply_masks(params, get_masks(opt_state))


def _is_sparse(x: Any) -> bool:
    return isinstance(x, SparseState)
