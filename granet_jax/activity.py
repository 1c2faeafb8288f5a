"""A byte a weight for all that a state remembers of masks.

Which weights are active, and which of those the last step moved: a weight that enters
with a mask update is zero, with zero moments, and moves from the next step on. One
array for both is half of the memory of two; and a step reads no more of it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from granet_jax.masking import PyTree, is_packed

# What a weight is, during an update and after it: inactive, but would continue if it
# were grown again; inactive; active, from zero; active, with its value and moments.
DROPPED, INACTIVE, ENTERED, CONTINUING = map(np.int8, (-1, 0, 1, 2))


def encode(mask: Array, continuing: Array) -> Array:
    """The codes of a leaf.

    Args:
      mask: boolean array, True where active.
      continuing: boolean array: which of those keep value and moments.

    Returns:
      int8 array: 2 where weights continue, 1 where they are active otherwise, else 0.
    """
    return mask.astype(jnp.int8) + (mask & continuing).astype(jnp.int8)


def is_active(codes: Array) -> Array:
    """The mask: where codes say that weights are active."""
    return codes > INACTIVE


def is_continuing(codes: Array, updated: Array | bool) -> Array:
    """Which weights this step moves; `updated` says whether it changed the masks.

    In any other step all that is active moves, what entered before included.
    """
    return codes >= jnp.where(updated, CONTINUING, ENTERED)


# Compiled, so that outside jit the number to compare with is not sent to the device.
_is_active = jax.jit(is_active, inline=True)


def masks_of(activity: PyTree) -> PyTree:
    """The masks of a state: of codes boolean arrays; packed ones as they are.

    Shapes for shapes, NumPy's arrays for NumPy's.
    """
    return _map_codes(_mask_of, activity)


def codes_of(masks: PyTree) -> PyTree:
    """What a state holds of masks of which every active weight continues."""
    return _map_codes(lambda mask: encode(mask, mask), masks)


def _map_codes(f: Callable[[Any], Any], tree: PyTree) -> PyTree:
    """`f` of every leaf but of packed masks."""
    return jax.tree.map(lambda x: x if is_packed(x) else f(x), tree, is_leaf=is_packed)


def _mask_of(activity: Any) -> Any:
    if isinstance(activity, jax.ShapeDtypeStruct):
        return activity.update(dtype=jnp.bool_)
    if isinstance(activity, np.ndarray):
        return activity > INACTIVE
    return _is_active(activity)
