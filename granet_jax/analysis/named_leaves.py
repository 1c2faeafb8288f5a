"""Parameters and concrete masks by the name of their leaf, on the host."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from granet_jax import masking
from granet_jax.masking import PyTree
from granet_jax.packed_masks import is_packed


def named_masks(masks: PyTree, argument: str = "masks") -> dict[str, np.ndarray]:
    """Return the masks as boolean NumPy arrays, by the name of their leaf.

    Args:
      masks: Pytree of concrete masks, packed or not, with None or `optax.MaskedNode()`
        at leaves without one.
      argument: Name of the argument, for error messages.

    Raises:
      ValueError: No mask, or values other than 0 and 1.
      TypeError: A leaf that is not an array, or is traced.
    """
    masking.check_arrays(argument, masks)
    masking.check_concrete(argument, masks)
    leaves = jax.tree_util.tree_leaves_with_path(masks, is_leaf=is_packed)
    if not leaves:
        raise ValueError(f"{argument} holds no mask, got {masks!r}.")
    names = [masking.leaf_name(path) for path, _ in leaves]
    return {
        name: _as_bools(argument, name, mask)
        for name, (_, mask) in zip(names, leaves, strict=True)
    }


def pair_with_masks(
    params: PyTree, masks: PyTree | None
) -> dict[str, tuple[Any, np.ndarray | None]]:
    """Return every leaf of `params` with its mask (None if it has none), by name.

    Matching by name allows different containers for parameters and masks, for example
    the parameters of a flax.nnx model and masks from the state of its optimizer.

    Args:
      params: Pytree of arrays or `jax.ShapeDtypeStruct`.
      masks: Pytree of masks, see `named_masks`; or None for no masks at all.

    Raises:
      ValueError: As `named_masks`, and for a mask without a leaf of its name and shape.
    """
    masking.check_arrays("params", params)
    flat = jax.tree_util.tree_leaves_with_path(params)
    leaves = {masking.leaf_name(path): leaf for path, leaf in flat}
    if not leaves or len(leaves) != len(flat):
        raise ValueError(
            "params must have leaves, of different names, got "
            f"{jax.tree.structure(params)}."
        )
    by_name = {} if masks is None else named_masks(masks)
    if unknown := [name for name in by_name if name not in leaves]:
        raise ValueError(
            f"masks has leaves {unknown}, which params does not have: it has "
            f"{[*leaves]}. With flax.nnx, pass nnx.as_pure of both."
        )
    for name, mask in by_name.items():
        if mask.shape != leaves[name].shape:
            raise ValueError(
                f"masks has shape {mask.shape} at {name!r}, where params has "
                f"{leaves[name].shape}."
            )
    return {name: (leaf, by_name.get(name)) for name, leaf in leaves.items()}


def check_same_leaves(
    first: str, a: Mapping[str, np.ndarray], second: str, b: Mapping[str, np.ndarray]
) -> None:
    """Raise ValueError unless two mappings of masks have equal names and shapes."""
    shapes = [{name: mask.shape for name, mask in x.items()} for x in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{first} and {second} must be masks of the same leaves, got {shapes[0]} "
            f"and {shapes[1]}."
        )


def _as_bools(argument: str, name: str, mask: Any) -> np.ndarray:
    # NumPy instead of jax.numpy, so that this also works while JAX traces other code.
    array = np.asarray(masking.unpack_masks(mask))
    if array.dtype != np.bool_ and not np.all((array == 0) | (array == 1)):
        at = f" at {name!r}" if name else ""
        raise ValueError(f"{argument} has values other than 0 and 1{at}.")
    return array.astype(bool, copy=False)
