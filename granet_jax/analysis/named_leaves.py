"""Parameters and their masks by name, on the host."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from granet_jax import masking
from granet_jax.masking import PyTree


def named_masks(masks: PyTree, argument: str = "masks") -> dict[str, np.ndarray]:
    """The masks by the name of their leaf, as boolean arrays.

    Args:
      masks: pytree of concrete masks, `PackedMask`s among them; None or
        `optax.MaskedNode()` at leaves without one.
      argument: its name, for messages.

    Raises:
      ValueError: no mask, or values other than 0 and 1.
      TypeError: what is no array, or traced.
    """
    masking.check_arrays(argument, masks)
    masking.check_concrete(argument, masks)
    found = {
        masking.leaf_name(path): _as_bools(argument, masking.leaf_name(path), mask)
        for path, mask in jax.tree_util.tree_leaves_with_path(
            masks, is_leaf=masking.is_packed
        )
    }
    if not found:
        raise ValueError(f"{argument} holds no mask, got {masks!r}.")
    return found


def paired(params: PyTree, masks: PyTree | None) -> dict[str, tuple[Any, Any]]:
    """Every leaf of `params` and its mask (None if it has none), by name.

    By name, so that containers of different classes meet, as those of a model's
    parameters and of its optimizer's state in flax.nnx do.

    Args:
      params: pytree of arrays or `jax.ShapeDtypeStruct`s.
      masks: see `named_masks`; or None for no masks at all.

    Raises:
      ValueError: as `named_masks`; a mask without a leaf of its name and shape.
    """
    masking.check_arrays("params", params)
    flat = jax.tree_util.tree_leaves_with_path(params)
    leaves = {masking.leaf_name(path): leaf for path, leaf in flat}
    if not leaves or len(leaves) != len(flat):
        raise ValueError(
            "params must have leaves, of different names, got "
            f"{jax.tree.structure(params)}."
        )
    given = {} if masks is None else named_masks(masks)
    if unknown := [name for name in given if name not in leaves]:
        raise ValueError(
            f"masks has leaves {unknown}, which params has not: it has {[*leaves]}. "
            "Of flax.nnx hand over nnx.as_pure of both."
        )
    for name, mask in given.items():
        if mask.shape != leaves[name].shape:
            raise ValueError(
                f"masks has shape {mask.shape} at {name!r}, where params has "
                f"{leaves[name].shape}."
            )
    return {name: (leaf, given.get(name)) for name, leaf in leaves.items()}


def check_same(first: str, a: Mapping[str, np.ndarray], second: str, b: Any) -> None:
    """Raises ValueError unless two mappings of masks have equal names and shapes."""
    shapes = [{name: mask.shape for name, mask in x.items()} for x in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{first} and {second} must be masks of the same leaves, got {shapes[0]} "
            f"and {shapes[1]}."
        )


def _as_bools(argument: str, name: str, mask: Any) -> np.ndarray:
    # In NumPy, other than `masking.given_masks`: also while something else is traced.
    array = np.asarray(masking.unpack_masks(mask))
    if array.dtype != np.bool_ and not np.all((array == 0) | (array == 1)):
        at = f" at {name!r}" if name else ""
        raise ValueError(f"{argument} has values other than 0 and 1{at}.")
    return array.astype(bool, copy=False)
