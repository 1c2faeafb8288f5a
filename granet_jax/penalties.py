"""Extra L2 penalties, with a coefficient for every weight.

A penalty of coefficient lambda adds lambda w, the gradient of lambda/2 w^2, to the
gradient of a weight w before the optimizer sees it. It comes on top of the optimizer's
own weight decay. Any function from `PenaltyInputs` of a leaf to the coefficients of its
weights is a penalty. Those here are records with a `__call__`, and not closures, so
that equal ones compare as equal.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from granet_jax import masking
from granet_jax.checks import check_number, check_steps
from granet_jax.dtypes import wider
from granet_jax.masking import PyTree


class PenaltyInputs(NamedTuple):
    """The arguments of a penalty, for one maskable leaf.

    Attributes:
      param: The weights before the optimizer's step.
      mask: The boolean mask under which the gradient was computed.
      marked: The second boolean mask of a method with `marked_sparsity`; else None.
      count: int32 scalar, the number of steps before this one.
    """

    param: Array
    mask: Array
    marked: Array | None
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]


Penalty = Callable[[PenaltyInputs], ArrayLike]


def penalised(
    penalty: Penalty | None,
    grads: PyTree,
    masks: PyTree,
    marked: PyTree,
    params: PyTree,
    count: Array,
) -> PyTree:
    """Add the gradient of a penalty to the gradients of the maskable leaves.

    Args:
      penalty: The penalty; None leaves the gradients as they are.
      grads: Pytree of gradients of the structure of `params`.
      masks: Pytree of boolean masks, `optax.MaskedNode()` at dense leaves.
      marked: The second tree of masks of a method with `marked_sparsity`; else empty.
      params: Pytree of parameters.
      count: int32 scalar, the number of steps before this one.

    Returns:
      Pytree of the structure, shapes and dtypes of `grads`.
    """
    if penalty is None:
        return grads
    leaves, treedef = jax.tree.flatten(masks)
    marks = jax.tree.leaves(marked) or [None] * len(leaves)
    weights = masking.maskable_leaves(params, masks)
    terms: list[Array] = []
    for p, m, k in zip(weights, leaves, marks, strict=True):
        wide = p.astype(wider(p.dtype, jnp.float32))
        terms.append(penalty(PenaltyInputs(p, m, k, count)) * wide)
    return masking.map_masked(
        lambda _, g, term: g + term.astype(g.dtype),
        masks,
        grads,
        treedef.unflatten(terms),
    )


def outside(size: float) -> Penalty:
    """A penalty of weights outside the mask (SR-STE, Zhou et al. 2021).

    Args:
      size: Coefficient, 0 or larger.

    Raises:
      TypeError, ValueError: `size` is not a finite number of 0 or more.
    """
    check_number("size", size, least=0.0)
    return _Outside(size)


@dataclasses.dataclass(frozen=True)
class _Outside:
    size: float

    def __call__(self, inputs: PenaltyInputs) -> Array:
        return jnp.where(inputs.mask, 0.0, self.size)


def exploration(size: float, density: float) -> Penalty:
    """The exploration penalty of Top-KAST (Jayakumar et al. 2020).

    The coefficient is `size` at active weights, `size` / `density` at marked weights
    that are not active, and 0 at all others.

    Args:
      size: Coefficient of active weights, 0 or larger.
      density: Density of the active weights, in (0, 1].

    Raises:
      TypeError, ValueError: An argument is out of range or of the wrong type.
    """
    check_number("size", size, least=0.0)
    check_number("density", density, above=0.0, most=1.0)
    return _Exploration(size, density)


@dataclasses.dataclass(frozen=True)
class _Exploration:
    size: float
    density: float

    def __call__(self, inputs: PenaltyInputs) -> Array:
        explored = jnp.where(_marked(inputs), self.size / self.density, 0.0)
        return jnp.where(inputs.mask, self.size, explored)


def growing(
    *,
    interval: int,
    step: float,
    first: int,
    last: int,
    start: float = 0.0,
    kept: float = 0.0,
) -> Penalty:
    """A penalty of unmarked weights that grows from step `first` to step `last`.

    Before `first` all coefficients are 0. From then on they are start + step * j at
    unmarked weights and `kept` at marked weights, where j = 1, 2, ... numbers the
    intervals of `interval` steps. j stops at the last interval that begins before
    `last`.

    Args:
      interval: Steps between increases.
      step: Increase of the coefficient, larger than 0.
      first: Step at which the penalty begins.
      last: Step from which the penalty no longer grows, after `first`.
      start: Value to which the increases add, 0 or larger.
      kept: Coefficient of marked weights, of any sign.

    Raises:
      TypeError, ValueError: An argument is out of range or of the wrong type.

    References:
      Wang et al., Neural Pruning via Growing Regularization, ICLR 2021.
    """
    check_steps("interval", interval)
    check_number("step", step, above=0.0)
    check_steps("first", first, least=0)
    check_steps("last", last, least=first + 1)
    check_number("start", start, least=0.0)
    check_number("kept", kept)
    return _Growing(interval, step, first, last, start, kept)


@dataclasses.dataclass(frozen=True)
class _Growing:
    interval: int
    step: float
    first: int
    last: int
    start: float
    kept: float

    def __call__(self, inputs: PenaltyInputs) -> Array:
        # An integer counts the increases. A sum of floats would add up rounding errors.
        most = -(-(self.last - self.first) // self.interval)
        elapsed = inputs.count - self.first
        grown = jnp.clip(elapsed // self.interval + 1, 1, most).astype(jnp.float32)
        size = jnp.where(_marked(inputs), self.kept, self.start + self.step * grown)
        return jnp.where(elapsed >= 0, size, 0.0)


def picking(*, interval: int, step: float, last: int) -> Penalty:
    """A penalty that grows at all weights until step `last`, and is 0 after.

    In the j-th interval of `interval` steps the coefficient is step * j, from j = 1 on.

    Args:
      interval: Steps between increases.
      step: Increase of the coefficient, larger than 0.
      last: Step at which the penalty ends.

    Raises:
      TypeError, ValueError: An argument is out of range or of the wrong type.
    """
    check_steps("interval", interval)
    check_number("step", step, above=0.0)
    check_steps("last", last)
    return _Picking(interval, step, last)


@dataclasses.dataclass(frozen=True)
class _Picking:
    interval: int
    step: float
    last: int

    def __call__(self, inputs: PenaltyInputs) -> Array:
        size = self.step * (inputs.count // self.interval + 1).astype(jnp.float32)
        return jnp.where(inputs.count < self.last, size, 0.0)


def _marked(inputs: PenaltyInputs) -> Array:
    if inputs.marked is None:
        raise ValueError(
            "this penalty reads marked weights, and the method has none: set its "
            "`marked_sparsity`."
        )
    return inputs.marked
