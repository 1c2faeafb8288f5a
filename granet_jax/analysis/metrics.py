"""Numbers on masks: what they have in common, how they change, what they cut off.

On the host, of concrete masks, packed or not; all but `gradient_flow`, which runs in a
step. A mask of units in, units out lies as kernels of linen and nnx do: the last axis
is that of output units, the one before it that of inputs. (Move the axes of others, as
equinox's, first.)
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from granet_jax import masking
from granet_jax.analysis.named_leaves import check_same, named_masks
from granet_jax.checks import check_integer, check_type
from granet_jax.masking import PyTree

T = TypeVar("T")


class PerLeaf(NamedTuple, Generic[T]):
    """A number of all maskable weights together, and of every leaf.

    Attributes:
      total: of all leaves together.
      leaves: of every leaf, by its name ("dense/kernel").
    """

    total: T
    leaves: dict[str, T]


class Overlap(NamedTuple):
    """How alike two masks are.

    Attributes:
      iou: intersection over union of their active weights, in [0, 1]; 1 if both have
        none.
      chance: its mean for independent random masks with as many active weights.
      hamming: share of weights that are active in one of them only, in [0, 1].
    """

    iou: float
    chance: float
    hamming: float


class Churn(NamedTuple):
    """How masks changed.

    Attributes:
      dropped: share of the weights active before that no longer are, in [0, 1].
      grown: share of the weights active after that were not before, in [0, 1].
    """

    dropped: float
    grown: float


class Connectivity(NamedTuple):
    """Which paths lead from inputs to outputs, through a chain of masks.

    Attributes:
      units: of every layer of units, inputs first and outputs last, boolean: whether
        a path from an input to an output goes through.
      active: number of active weights of every mask.
      effective: number of those on such a path; the others compute nothing that
        reaches an output, or from nothing but biases.
    """

    units: list[np.ndarray]
    active: list[int]
    effective: list[int]

    @property
    def connected(self) -> bool:
        """Whether every output is reached."""
        return bool(self.units[-1].all())


def overlap(a: PyTree, b: PyTree) -> PerLeaf[Overlap]:
    """How alike two trees of masks are.

    Args:
      a: pytree of masks.
      b: pytree of masks of the same leaves, matched by name.

    Returns:
      Of every leaf, and of all together: there `chance` keeps each leaf's number of
      active weights, and is exact up to the third moment of the intersection.

    Raises:
      ValueError: other leaves or shapes.
    """
    first, second = named_masks(a, "a"), named_masks(b, "b")
    check_same("a", first, "b", second)
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
    # f(i) = i / (n + m - i), to second order about its mean.
    chance = mean / union + (n + m) * variance / union**3 if union else 1.0
    return PerLeaf(_overlap(size, n, m, both, chance), leaves)


def chance_iou(size: int, first: int, second: int) -> float:
    """Mean IoU of two independent random masks of a leaf, exactly.

    The intersection of masks with a and b of n weights is hypergeometric, and the mean
    is that of i / (a + b - i). (Of large masks, without the tails beyond 12 standard
    deviations.)

    Args:
      size: n, the number of weights.
      first: a, the active weights of one mask.
      second: b, those of the other.

    Returns:
      A number in [0, 1]; 1 where neither has an active weight.

    Raises:
      ValueError: more active weights than there are, or fewer than none.
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
    # Each probability over the one before it, and so all of them up to a factor.
    ratios = (first - i) * (second - i) / ((i + 1) * (size - first - second + i + 1))
    logs = np.concatenate([[0.0], np.cumsum(np.log(ratios))])
    weights = np.exp(logs - logs.max())
    i = np.arange(low, high + 1, dtype=np.float64)
    return float(np.sum(weights * i / (first + second - i)) / weights.sum())


def churn(before: PyTree, after: PyTree) -> PerLeaf[Churn]:
    """What an update, or many, changed: from one tree of masks to another.

    Args:
      before: pytree of masks.
      after: pytree of masks of the same leaves, matched by name.

    Returns:
      Shares of active weights that were dropped and grown. (A weight that an update
      drops and grows again has not changed.)

    Raises:
      ValueError: other leaves or shapes.
    """
    first, second = named_masks(before, "before"), named_masks(after, "after")
    check_same("before", first, "after", second)
    counts = {
        name: (_count(m), _count(second[name]), _count(m & second[name]))
        for name, m in first.items()
    }
    total = (sum(column) for column in zip(*counts.values(), strict=True))
    return PerLeaf(
        _churn(*total), {name: _churn(*numbers) for name, numbers in counts.items()}
    )


def exploration(history: Iterable[PyTree]) -> PerLeaf[float]:
    """Exploration rate R_s: share of weights that were active at least once.

    Args:
      history: trees of masks over time, of the same leaves: a list, or anything that
        yields them one by one, of which no more than one is held.

    Returns:
      Shares in [0, 1].

    Raises:
      ValueError: no masks, or other leaves or shapes.

    References:
      Liu et al., Do We Actually Need Dense Over-Parameterization? In-Time
      Over-Parameterization in Sparse Training, ICML 2021.
    """
    if not isinstance(history, Iterable):
        raise TypeError(f"history must be trees of masks, got {history!r}.")
    seen = None
    for _, union in _unions(enumerate(history)):
        seen = union
    if seen is None:
        raise ValueError("history must hold masks, got none.")
    return _rates(seen)


def exploration_over_time(history: Mapping[int, PyTree]) -> dict[int, PerLeaf[float]]:
    """Exploration rate R_s up to every step: what `exploration` gives, as it rises.

    Args:
      history: trees of masks by step, of the same leaves.

    Returns:
      Shares in [0, 1] by step, in the order of steps; those of a step count its masks.

    Raises:
      ValueError: no masks, or other leaves or shapes.

    References:
      See `exploration`.
    """
    check_type("history", history, Mapping, "trees of masks by step")
    if not history:
        raise ValueError("history must hold masks, got none.")
    return {step: _rates(union) for step, union in _unions(sorted(history.items()))}


def channel_density(mask: Any) -> np.ndarray:
    """Share of the incoming weights of every output unit that is active.

    Args:
      mask: (..., units).

    Returns:
      float64 (units,), in [0, 1].
    """
    array = _unpacked("mask", mask)
    return array.reshape(-1, array.shape[-1]).mean(axis=0)


def dead_units(mask: Any, following: Any = None) -> np.ndarray:
    """Output units of a mask with no active weight coming in, or none going out.

    A unit without incoming weights is constant (its bias); one without outgoing
    weights is of no use, unless something else reads it, as a skip connection does.

    Args:
      mask: (..., units).
      following: mask of the next layer, for outgoing weights too: (..., units, out);
        of a dense layer on flattened positions, channels last, (positions * units,
        out); of a grouped convolution (..., units / groups, out). None for incoming
        weights only.

    Returns:
      Boolean (units,).

    Raises:
      ValueError: masks that do not follow one another.
    """
    array = _unpacked("mask", mask)
    dead = _none(array.reshape(-1, array.shape[-1]), axis=0)
    if following is None:
        return dead
    links = _links("following", _unpacked("following", following), dead.size)
    return dead | _none(links, axis=1)


def connectivity(chain: Sequence[Any]) -> Connectivity:
    """Which units and weights of a chain of layers lie on a path to an output.

    Args:
      chain: masks of layers that follow one another, from input to output, in the forms
        that `dead_units` takes. Skip connections are not in a chain: with them more
        is connected than this finds.

    Returns:
      See `Connectivity`.

    Raises:
      ValueError: an empty chain, or masks that do not follow one another.

    References:
      Vysogorets & Kempe, Connectivity Matters: Neural Network Pruning Through the Lens
      of Effective Sparsity, JMLR 2023.
    """
    if not isinstance(chain, Sequence):
        raise TypeError(f"chain must be a sequence of masks, got {chain!r}.")
    if not chain:
        raise ValueError("chain must hold masks, got none.")
    masks = [_unpacked(f"chain[{i}]", mask) for i, mask in enumerate(chain)]
    # The inputs are those of the first mask: channels, if it is a convolution.
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
    """Sum of the squared gradients of active weights: how much a step can gain.

    To first order, gradient descent with a rate eta lowers the loss by eta times this.

    Args:
      grads: pytree of gradients, dense or masked.
      masks: pytree of masks of the same structure.

    Returns:
      float32 scalars, of the leaves with a mask; may be traced.

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


def _unions(
    history: Iterable[tuple[int, PyTree]],
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """After each tree of masks, which weights were active so far; overwritten later."""
    union: dict[str, np.ndarray] = {}
    for step, masks in history:
        found = named_masks(masks, "history")
        if not union:
            union = {name: mask.copy() for name, mask in found.items()}
        check_same("the first masks of history", union, "others", found)
        for name, mask in found.items():
            union[name] |= mask
        yield step, union


def _rates(union: Mapping[str, np.ndarray]) -> PerLeaf[float]:
    active = {name: _count(mask) for name, mask in union.items()}
    size = sum(mask.size for mask in union.values())
    return PerLeaf(
        sum(active.values()) / size if size else 0.0,
        {name: n / max(union[name].size, 1) for name, n in active.items()},
    )


def _count(mask: np.ndarray) -> int:
    return int(np.count_nonzero(mask))


def _none(mask: np.ndarray, axis: int) -> np.ndarray:
    return np.logical_not(mask.any(axis=axis))


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


def _unpacked(name: str, mask: Any) -> np.ndarray:
    (array,) = named_masks(mask, name).values()
    if array.ndim < 2:
        raise ValueError(
            f"{name} must have an axis of inputs and one of units, got shape "
            f"{array.shape}."
        )
    return array


def _links(name: str, mask: np.ndarray, units: int) -> np.ndarray:
    """Which unit has an active weight to which output: boolean (units, outputs)."""
    *_, inputs, outputs = mask.shape
    links = mask.reshape(-1, inputs, outputs).any(axis=0)
    if units and inputs % units == 0:  # Positions, with their channels last.
        return np.asarray(links.reshape(-1, units, outputs).any(axis=0))
    groups = units // inputs if inputs and units % inputs == 0 else 0
    if not groups or outputs % groups:
        raise ValueError(
            f"{name} must follow {units} units, got shape {mask.shape}: its axis "
            "before the last must be their number, a multiple, or with groups a part "
            "of it."
        )
    wide = np.zeros((groups, inputs, groups, outputs // groups), bool)
    each = np.arange(groups)
    wide[each, :, each] = links.reshape(inputs, groups, -1).transpose(1, 0, 2)
    return wide.reshape(units, outputs)


def _spread(mask: np.ndarray, units: np.ndarray) -> np.ndarray:
    """The boolean of the unit that each weight of a mask comes from, to its shape."""
    *_, inputs, outputs = mask.shape
    if inputs % units.size == 0:
        return np.tile(units, inputs // units.size)[:, None]
    groups = units.size // inputs
    by_group = units.reshape(groups, inputs).T
    return np.repeat(by_group, outputs // groups, axis=1)
