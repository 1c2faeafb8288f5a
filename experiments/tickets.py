"""Lottery tickets as files: masks, and the weights that are trained under them."""

import math
import pathlib
from typing import Any

import jax
import numpy as np

import granet_jax
from experiments.files import complete
from granet_jax import distributions, masking

PyTree = Any


def path_of(folder: pathlib.Path, seed: int, active: int) -> pathlib.Path:
    """The file of a seed's ticket with so many active weights."""
    return folder / f"seed{seed}-active{active}.npz"


def write(folder: pathlib.Path, seed: int, weights: PyTree, masks: PyTree) -> None:
    """Writes a ticket: all parameters, and the masks at 1 bit a weight.

    Raises:
      OSError: it cannot be written.
    """
    arrays: Any = {f"weights/{_name(path)}": x for path, x in _leaves(weights)}
    arrays |= {f"masks/{_name(path)}": np.packbits(x) for path, x in _leaves(masks)}
    folder.mkdir(parents=True, exist_ok=True)
    active = granet_jax.sparsity(masks).active
    with complete(path_of(folder, seed, active)) as path, path.open("wb") as file:
        np.savez(file, **arrays)


def read(
    folder: pathlib.Path, seed: int, sparsity: float, params: PyTree, masks: PyTree
) -> tuple[PyTree, PyTree]:
    """The ticket of a seed at a sparsity: (weights, masks).

    Args:
      folder: that `experiments.lottery` wrote.
      seed: of the run that was pruned.
      sparsity: of the ticket, to the weight.
      params: of the network, for their structure and shapes.
      masks: likewise.

    Raises:
      FileNotFoundError: there is no such ticket.
      ValueError: it is of another network, or damaged.
    """
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(masks))
    path = path_of(folder, seed, distributions.total_count(total, sparsity))
    if not path.exists():
        found = sorted(x.name for x in folder.glob("seed*.npz"))
        raise FileNotFoundError(
            f"masks.tickets: {folder} has no ticket of seed {seed} at sparsity "
            f"{sparsity} ({path.name}), only {', '.join(found) or 'none'}: python -m "
            "experiments.lottery makes them."
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        weights = jax.tree_util.tree_map_with_path(
            lambda p, x: _of_shape(arrays[f"weights/{_name(p)}"], x), params
        )
        bits = jax.tree_util.tree_map_with_path(
            lambda p, x: _unpacked(arrays[f"masks/{_name(p)}"], x.shape), masks
        )
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"masks.tickets: {path} is not a ticket of this network ({error})."
        ) from error
    return weights, bits


def _leaves(tree: PyTree) -> list[tuple[Any, np.ndarray]]:
    return [(p, np.asarray(x)) for p, x in jax.tree_util.tree_leaves_with_path(tree)]


def _name(path: Any) -> str:
    return masking.leaf_name(path)


def _of_shape(array: np.ndarray, like: Any) -> np.ndarray:
    if array.shape != like.shape:
        raise ValueError(f"shape {array.shape} instead of {like.shape}")
    return array


def _unpacked(bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    size = math.prod(shape)
    if bits.size != math.ceil(size / 8):
        raise ValueError(f"{bits.size} bytes of a mask of {size} weights")
    return np.unpackbits(bits, count=size).reshape(shape).astype(bool)
