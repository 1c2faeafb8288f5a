"""Metrics of masks: their overlap, their changes, and the units they cut off.

All functions but `gradient_flow`, which can run inside a training step, run on the host
and take concrete masks, packed or not. Where axes matter, masks have the layout of
kernels in linen and nnx: the last axis holds output units, the axis before it input
units. Move the axes of other masks first, such as those of equinox.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from granet_jax import masking
from granet_jax.analysis.named_leaves import check_same_leaves, named_masks
from granet_jax.checks import check_integer, check_type
from granet_jax.masking import PyTree

T = TypeVar("T")


class PerLeaf(NamedTuple, Generic[T]):
    """A metric over all maskable weights together, and of each leaf.

    Attributes:
      total: Metric over all leaves together.
      leaves: Metric of each leaf, by its name ("dense/kernel").
    """

    total: T
    leaves: dict[str, T]


class Overlap(NamedTuple):
    """Similarity of two masks.

    Attributes:
      iou: Intersection over union of their active weights, in [0, 1]; 1 if neither has
        active weights.
      chance: Mean IoU of independent random masks with the same numbers of active
        weights.
      hamming: Fraction of weights that are active in exactly one of the two masks, in
        [0, 1].
    """

    iou: float
    chance: float
    hamming: float


class Churn(NamedTuple):
    """Change from one mask to another.

    Attributes:
      dropped: Fraction of the weights active before that are inactive after, in [0, 1].
      grown: Fraction of the weights active after that were inactive before, in [0, 1].
    """

    dropped: float
    grown: float


class Connectivity(NamedTuple):
    """Units and weights on paths from inputs to outputs through a chain of masks.

    Attributes:
      units: For each layer of units, inputs first and outputs last, a boolean array:
        whether a path from an input to an output goes through the unit.
      active: Number of active weights of each mask.
      effective: Number of active weights on such a path. The others do not reach an
        output, or depend on nothing but biases.
    """

    units: list[np.ndarray]
    active: list[int]
    effective: list[int]

    @property
    def connected(self) -> bool:
        """Whether every output is connected to an input."""
        return bool(self.units[-1].all())


def overlap(a: PyTree, b: PyTree) -> PerLeaf[Overlap]:
    """Compare two trees of masks.

    Args:
      a: Pytree of masks.
      b: Pytree of masks of the same leaves, matched by name.

    Returns:
      The overlap of each leaf and of all leaves together. The total `chance` is that of
      masks with each leaf's numbers of active weights; it is a second-order expansion,
      exact up to the third central moment of the intersection.

    Raises:
      ValueError: Different leaves or shapes.
    """
    first, second = named_masks(a, "a"), named_masks(b, "b")
    check_same_leaves("a", first, "b", second)
    counts = {
        name: (m.size, _count(m), _count(second[name]), _count(m & second[name]))
        for name, m in first.items()
    }
    leaves = {
        name: _overlap(size, n, m, both, chance_iou(size, n, m))
        for name, (size, n, m, both) in counts.items()
    }
    size, n, m, both = (sum(column) for column in zip(*counts.values(), strict=True))
    # Mean and variance of the hypergeometric intersections, summed over leaves.
    mean = sum(x * y / s for s, x, y, _ in counts.values() if s)
    variance = sum(
        x * y * (s - x) * (s - y) / (s * s * (s - 1))
        for s, x, y, _ in counts.values()
        if s > 1
    )
    union = n + m - mean
    # The IoU i / (n + m - i) of an intersection i, expanded around the mean of i.
    chance = mean / union + (n + m) * variance / union**3 if union else 1.0
    return PerLeaf(_overlap(size, n, m, both, chance), leaves)


def chance_iou(size: int, first: int, second: int) -> float:
    """Return the exact mean IoU of two independent random masks of one leaf.

    The intersection i of random masks with a and b of n weights active is
    hypergeometric, and the result is the mean of i / (a + b - i). For large masks, the
    sum omits tails beyond 12 standard deviations.

    Args:
      size: n, the number of weights.
      first: a, the number of active weights of one mask.
      second: b, the number of active weights of the other mask.

    Returns:
      A number in [0, 1]; 1 if neither mask has an active weight.

    Raises:
      ValueError: A number of active weights below 0 or above `size`.
    """
    for name, value in (("size", size), ("first", first), ("second", second)):
        check_integer(name, value)
    if not 0 <= first <= size or not 0 <= second <= size:
        raise ValueError(
            f"first and second must be from 0 to size, got {first} and {second} of "
            f"{size}."
        )
    if not first + second:
        return 1.0
    low, high = max(0, first + second - size), min(first, second)
    mean = first * second / size
    variance = mean * (size - first) * (size - second) / size / max(size - 1, 1)
    reach = 12 * math.sqrt(variance) + 12
    low, high = max(low, math.floor(mean - reach)), min(high, math.ceil(mean + reach))
    i = np.arange(low, high, dtype=np.float64)
    # Ratios of successive probabilities give all probabilities up to a common factor.
    ratios = (first - i) * (second - i) / ((i + 1) * (size - first - second + i + 1))
    logs = np.concatenate([[0.0], np.cumsum(np.log(ratios))])
    weights = np.exp(logs - logs.max())
    i = np.arange(low, high + 1, dtype=np.float64)
    return float(np.sum(weights * i / (first + second - i)) / weights.sum())


def churn(before: PyTree, after: PyTree) -> PerLeaf[Churn]:
    """Measure how masks changed in one or more updates.

    Args:
      before: Pytree of masks.
      after: Pytree of masks of the same leaves, matched by name.

    Returns:
      Fractions of active weights that were dropped and grown. A weight that an update
      drops and grows again does not count.

    Raises:
      ValueError: Different leaves or shapes.
    """
    first, second = named_masks(before, "before"), named_masks(after, "after")
    check_same_leaves("before", first, "after", second)
    counts = {
        name: (_count(m), _count(second[name]), _count(m & second[name]))
        for name, m in first.items()
    }
    total = (sum(column) for column in zip(*counts.values(), strict=True))
    return PerLeaf(
        _churn(*total), {name: _churn(*numbers) for name, numbers in counts.items()}
    )


def exploration(history: Iterable[PyTree]) -> PerLeaf[float]:
    """Return the exploration rate R_s: the fraction of weights ever active.

    Args:
      history: Iterable of trees of masks of the same leaves. A generator works as well
        as a list; only one tree is kept in memory at a time.

    Returns:
      Fractions in [0, 1].

    Raises:
      ValueError: No masks, or different leaves or shapes.

    References:
      Liu et al., Do We Actually Need Dense Over-Parameterization? In-Time
      Over-Parameterization in Sparse Training, ICML 2021.
    """
    if not isinstance(history, Iterable):
        raise TypeError(f"history must be trees of masks, got {history!r}.")
    final = None
    for _, union in _running_unions(enumerate(history)):
        final = union
    if final is None:
        raise ValueError("history must hold masks, got none.")
    return _active_fractions(final)


def exploration_over_time(history: Mapping[int, PyTree]) -> dict[int, PerLeaf[float]]:
    """Return the exploration rate R_s of every step in a history.

    Args:
      history: Trees of masks of the same leaves, by step.

    Returns:
      Fractions in [0, 1] by step, in ascending order of steps. The rate of a step
      covers the masks up to and including that step.

    Raises:
      ValueError: No masks, or different leaves or shapes.

    References:
      See `exploration`.
    """
    check_type("history", history, Mapping, "trees of masks by step")
    if not history:
        raise ValueError("history must hold masks, got none.")
    unions = _running_unions(sorted(history.items()))
    return {step: _active_fractions(union) for step, union in unions}


def channel_density(mask: Any) -> np.ndarray:
    """Return the fraction of active incoming weights of every output unit.

    Args:
      mask: Mask of shape (..., units).

    Returns:
      float64 array of shape (units,), in [0, 1].
    """
    array = _kernel_mask("mask", mask)
    return array.reshape(-1, array.shape[-1]).mean(axis=0)


def dead_units(mask: Any, following: Any = None) -> np.ndarray:
    """Find output units without active incoming weights, or without outgoing ones.

    A unit without incoming weights is constant: it outputs its bias. A unit without
    outgoing weights has no effect, unless something else reads it, such as a skip
    connection.

    Args:
      mask: Mask of shape (..., units).
      following: Mask of the next layer, to check outgoing weights as well. Its shape is
        (..., units, out); for a dense layer on flattened positions with channels last,
        (positions * units, out); for a grouped convolution, (..., units / groups, out).
        None to check incoming weights only.

    Returns:
      Boolean array of shape (units,).

    Raises:
      ValueError: The shape of `following` does not match the units of `mask`.
    """
    array = _kernel_mask("mask", mask)
    dead = np.logical_not(array.reshape(-1, array.shape[-1]).any(axis=0))
    if following is None:
        return dead
    links = _links("following", _kernel_mask("following", following), dead.size)
    return dead | np.logical_not(links.any(axis=1))


def connectivity(chain: Sequence[Any]) -> Connectivity:
    """Find the units and weights of a chain of layers on paths from input to output.

    Args:
      chain: Masks of consecutive layers from input to output, in the shapes that
        `dead_units` accepts. Skip connections are not part of a chain; a network that
        has them is connected better than the result says.

    Returns:
      The units on such paths and the numbers of weights, see `Connectivity`.

    Raises:
      ValueError: An empty chain, or masks whose shapes do not match.

    References:
      Vysogorets & Kempe, Connectivity Matters: Neural Network Pruning Through the Lens
      of Effective Sparsity, JMLR 2023.
    """
    if not isinstance(chain, Sequence):
        raise TypeError(f"chain must be a sequence of masks, got {chain!r}.")
    if not chain:
        raise ValueError("chain must hold masks, got none.")
    masks = [_kernel_mask(f"chain[{i}]", mask) for i, mask in enumerate(chain)]
    units = masks[0].shape[-2]
    links = []
    for i, mask in enumerate(masks):
        links.append(_links(f"chain[{i}]", mask, units))
        units = mask.shape[-1]
    reached = [np.ones(len(links[0]), bool)]
    for link in links:
        reached.append(reached[-1] @ link)
    useful = [np.ones(units, bool)]
    for link in reversed(links):
        useful.append(link @ useful[-1])
    alive = [a & b for a, b in zip(reached, reversed(useful), strict=True)]
    effective = [
        _count(mask & _spread(mask, before) & after)
        for mask, before, after in zip(masks, alive, alive[1:], strict=False)
    ]
    return Connectivity(alive, [*map(_count, masks)], effective)


def gradient_flow(grads: PyTree, masks: PyTree) -> PerLeaf[Array]:
    """Return the sum of the squared gradients of active weights.

    To first order, a step of gradient descent with learning rate eta lowers the loss by
    eta times this sum.

    Args:
      grads: Pytree of gradients, dense or masked.
      masks: Pytree of masks of the same structure.

    Returns:
      float32 scalars of the leaves with a mask, and their total. May be traced.

    References:
      Evci et al., Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win,
      AAAI 2022.
    """
    masks = masking.check_masks(masks, grads, "grads")
    named = jax.tree_util.tree_leaves_with_path(masks)
    leaves = {
        masking.leaf_name(path): jnp.sum(
            jnp.where(mask, jnp.square(g.astype(jnp.float32)), 0.0)
        )
        for (path, mask), g in zip(
            named, masking.maskable_leaves(grads, masks), strict=True
        )
    }
    return PerLeaf(sum(leaves.values(), start=jnp.float32(0)), leaves)


def _running_unions(
    history: Iterable[tuple[int, PyTree]],
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yield the union of the masks so far at each step; later steps overwrite it."""
    union: dict[str, np.ndarray] = {}
    for step, tree in history:
        masks = named_masks(tree, "history")
        if not union:
            union = {name: mask.copy() for name, mask in masks.items()}
        check_same_leaves("the first masks of history", union, "others", masks)
        for name, mask in masks.items():
            union[name] |= mask
        yield step, union


def _active_fractions(masks: Mapping[str, np.ndarray]) -> PerLeaf[float]:
    active = {name: _count(mask) for name, mask in masks.items()}
    size = sum(mask.size for mask in masks.values())
    return PerLeaf(
        sum(active.values()) / size if size else 0.0,
        {name: n / max(masks[name].size, 1) for name, n in active.items()},
    )


def _count(mask: np.ndarray) -> int:
    return int(np.count_nonzero(mask))


def _overlap(size: int, n: int, m: int, both: int, chance: float) -> Overlap:
    union = n + m - both
    return Overlap(
        iou=both / union if union else 1.0,
        chance=chance,
        hamming=(union - both) / size if size else 0.0,
    )


def _churn(before: int, after: int, both: int) -> Churn:
    return Churn(
        dropped=(before - both) / before if before else 0.0,
        grown=(after - both) / after if after else 0.0,
    )


def _kernel_mask(name: str, mask: Any) -> np.ndarray:
    (array,) = named_masks(mask, name).values()
    if array.ndim < 2:
        raise ValueError(
            f"{name} must have an axis of inputs and one of units, got shape "
            f"{array.shape}."
        )
    return array


def _links(name: str, mask: np.ndarray, units: int) -> np.ndarray:
    """Return whether a unit has an active weight to an output: (units, outputs)."""
    *_, inputs, outputs = mask.shape
    links = mask.reshape(-1, inputs, outputs).any(axis=0)
    if units and inputs % units == 0:  # Flattened positions, with channels last.
        return np.asarray(links.reshape(-1, units, outputs).any(axis=0))
    groups = units // inputs if inputs and units % inputs == 0 else 0
    if not groups or outputs % groups:
        raise ValueError(
            f"{name} must follow {units} units, got shape {mask.shape}: its axis "
            "before the last must be their number, a multiple of it, or their number "
            "divided by the number of groups."
        )
    block_diagonal = np.zeros((groups, inputs, groups, outputs // groups), bool)
    group = np.arange(groups)
    by_group = links.reshape(inputs, groups, -1).transpose(1, 0, 2)
    block_diagonal[group, :, group] = by_group
    return block_diagonal.reshape(units, outputs)


def _spread(mask: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Broadcast a boolean per input unit to the weights that read the unit."""
    *_, inputs, outputs = mask.shape
    if inputs % units.size == 0:
        return np.tile(units, inputs // units.size)[:, None]
    groups = units.size // inputs
    by_group = units.reshape(groups, inputs).T
    return np.repeat(by_group, outputs // groups, axis=1)
