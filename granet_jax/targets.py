"""Target numbers of active weights, per leaf and update step.

They are computed ahead of training in plain Python, and a training step only indexes
them. They count parts of leaves as the method's structure does (`structures.parts`):
single weights, whole boxes, or the weights of one box.
"""

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from granet_jax import distributions, structures
from granet_jax.distributions import Shape

if TYPE_CHECKING:
    from granet_jax.methods.method import Method


@functools.lru_cache(maxsize=64)
def active_counts(method: "Method", shapes: tuple[Shape, ...]) -> np.ndarray:
    """The number of active parts after pruning or revival, at every update.

    The numbers never rise unless a phase of the method revives weights. With scope
    "layer", no leaf loses parts while the total rises, and none gains parts while it
    falls.

    Args:
      method: The method.
      shapes: The shapes of the maskable leaves.

    Returns:
      Array of unsigned integers, of shape (updates,) with scope "global" and
      (updates, leaves) with scope "layer".
    """
    present = initial_counts(method, shapes)
    if _is_global(method):
        present = [sum(present)]
    rows: list[int | list[int]] = []
    for step in method.updates.steps():
        sparsity = method.sparsity(step)
        target = _counts(method, shapes, sparsity)
        if sum(target) < sum(present):
            present = _counts(method, shapes, sparsity, caps=present)
        elif sum(target) > sum(present) and method.revives:
            present = _counts(method, shapes, sparsity, floors=present)
        rows.append(_row(method, present))
    return np.asarray(rows, _dtype(shapes))


def check_least(method: "Method", shapes: Sequence[Shape]) -> None:
    """Raise ValueError if units keep more weights than the method ends with."""
    if structures.has_least(method.structure):
        steps = (0, *method.updates.steps())
        highest = max(method.sparsity(step) for step in steps)
        structures.check_least(method.structure, shapes, highest)


def initial_counts(method: "Method", shapes: Sequence[Shape]) -> list[int]:
    """The number of active parts of every leaf at step 0."""
    return structures.counts(
        method.structure, shapes, method.sparsity(0), method.distribution
    )


def counts_at(method: "Method", shapes: Sequence[Shape], sparsity: float) -> np.ndarray:
    """The number of active parts at one sparsity, when all weights are candidates.

    Returns:
      Unsigned integers: a scalar with scope "global", a vector of one number per leaf
      with scope "layer".
    """
    counts = _row(method, _counts(method, shapes, sparsity))
    return np.asarray(counts, _dtype(shapes))


def _counts(
    method: "Method",
    shapes: Sequence[Shape],
    sparsity: float,
    caps: Sequence[int] | None = None,
    floors: Sequence[int] | None = None,
) -> list[int]:
    """One number per leaf; with scope "global", a list of the one total number."""
    structure = method.structure
    if _is_global(method):
        parts = structures.parts(structure, shapes)
        return [distributions.total_count(sum(parts), sparsity)]
    return structures.counts(
        structure, shapes, sparsity, method.distribution, caps, floors
    )


def _row(method: "Method", counts: list[int]) -> int | list[int]:
    return counts[0] if _is_global(method) else counts


def _is_global(method: "Method") -> bool:
    # Boxes that all keep the same number of weights cannot compete across leaves.
    boxes = structures.has_equal_boxes(method.structure)
    return method.scope == "global" and not boxes


def _dtype(shapes: Sequence[Shape]) -> type[np.unsignedinteger]:
    total = sum(math.prod(s) for s in shapes)
    return np.uint32 if total < 2**32 else np.uint64
