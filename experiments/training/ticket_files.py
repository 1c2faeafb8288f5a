"""Lottery tickets as files: masks and the weights from which their training starts."""

import math
import zipfile
from typing import Any

import jax
import numpy as np
from etils import epath

from experiments.buckets import check_reachable
from experiments.training.atomic_files import atomic_path
from granet_jax import distributions, masking

PyTree = Any


def write(
    folder: epath.Path, seed: int, sparsity: float, weights: PyTree, masks: PyTree
) -> None:
    """Write a ticket: all parameters, and the masks with 1 bit per weight.

    Raises:
      OSError: The file cannot be written.
    """
    arrays: Any = {f"weights/{name}": x for name, x in _by_name(weights).items()}
    arrays |= {f"masks/{name}": np.packbits(x) for name, x in _by_name(masks).items()}
    with atomic_path(_path(folder, seed, sparsity)) as path, path.open("wb") as file:
        np.savez(file, **arrays)


def read(
    folder: epath.Path, seed: int, sparsity: float, params: PyTree, masks: PyTree
) -> tuple[PyTree, PyTree]:
    """Read the ticket of a seed at a sparsity.

    Args:
      folder: Folder written by `python -m experiments.lottery`.
      seed: Seed of the run that was pruned.
      sparsity: Sparsity of the ticket.
      params: Parameters of the network, for their structure and shapes.
      masks: Masks of the network, for their structure and shapes.

    Returns:
      (weights, masks).

    Raises:
      FileNotFoundError: The folder has no such ticket.
      ValueError: The ticket is damaged or belongs to another network.
    """
    check_reachable("masks.tickets", folder)
    path = _path(folder, seed, sparsity)
    if not path.exists():
        tickets = ", ".join(sorted(x.name for x in folder.glob("seed*.npz")))
        raise FileNotFoundError(
            f"masks.tickets: {folder} has no ticket {path.name}, only "
            f"{tickets or 'none at all'}: python -m experiments.lottery writes them."
        )
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(masks))
    expected = distributions.total_count(total, sparsity)
    try:
        # NumPy does not close a damaged file that it opened itself.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        weights = jax.tree_util.tree_map_with_path(
            lambda p, x: _check_shape(
                arrays[f"weights/{masking.leaf_name(p)}"], x.shape
            ),
            params,
        )
        bits = jax.tree_util.tree_map_with_path(
            lambda p, x: _unpack(arrays[f"masks/{masking.leaf_name(p)}"], x.shape),
            masks,
        )
        active = sum(int(x.sum()) for x in jax.tree.leaves(bits))
        if active != expected:
            raise ValueError(f"{active} active weights instead of {expected}")
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"masks.tickets: {path} is not a ticket of this network ({error})."
        ) from error
    return weights, bits


def _path(folder: epath.Path, seed: int, sparsity: float) -> epath.Path:
    return folder / f"seed{seed}-{sparsity}.npz"


def _by_name(tree: PyTree) -> dict[str, np.ndarray]:
    return {
        masking.leaf_name(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _check_shape(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if array.shape != shape:
        raise ValueError(f"shape {array.shape} instead of {shape}")
    return array


def _unpack(bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    size = math.prod(shape)
    if bits.size != math.ceil(size / 8):
        raise ValueError(f"{bits.size} bytes of a mask of {size} weights")
    return np.unpackbits(bits, count=size).reshape(shape).astype(bool)
