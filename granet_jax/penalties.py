"""Extra L2 penalties of single weights: one leaf in, its coefficients out.

A penalty lambda adds lambda w to the gradient of a weight w (that of lambda/2 w^2)
before the optimizer sees it, on top of any weight decay of the optimizer's own. A
user's own penalty is any function of `PenaltyInputs`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from granet_jax import masking
from granet_jax.checks import check_number, check_steps
from granet_jax.masking import PyTree


class PenaltyInputs(NamedTuple):
    """What a penalty may look at: one maskable leaf.

    Attributes:
      param: the weights before the optimizer's step.
      mask: the mask that the gradient was taken under, boolean.
      marked: the second mask of a method with `marked_sparsity`, boolean; else None.
      count: int32 scalar, steps done before this one.
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
    """Gradients with the gradient of a penalty, at leaves that carry a mask.

    Args:
      penalty: The penalty; None leaves the gradients as they are.
      grads: Pytree of gradients of the structure of `params`.
      masks: Pytree of boolean masks, `optax.MaskedNode()` at dense leaves.
      marked: The second tree of masks of a method with `marked_sparsity`; else empty.
      params: Pytree of parameters.
      count: int32 scalar, the steps done before this one.
    """
    if penalty is None:
        return grads
    leaves, treedef = jax.tree.flatten(masks)
    marks = jax.tree.leaves(marked) or [None] * len(leaves)
    weights = masking.maskable_leaves(params, masks)
    terms: list[Array] = []
    for p, m, k in zip(weights, leaves, marks, strict=True):
        wide = p.astype(jnp.promote_types(p.dtype, jnp.float32))
        terms.append(penalty(PenaltyInputs(p, m, k, count)) * wide)
    return masking.map_masked(
        lambda _, g, term: g + term.astype(g.dtype),
        masks,
        grads,
        treedef.unflatten(terms),
    )


def outside(size: float) -> Penalty:
    """`size`, from 0 on, at weights outside the mask (SR-STE, Zhou et al. 2021)."""
    check_number("size", size, least=0.0)
    return lambda inputs: jnp.where(inputs.mask, 0.0, size)


def exploration(size: float, density: float) -> Penalty:
    """`size` at active weights, `size` / `density` at the others that are marked.

    The further down a weight that the gradient reaches has been left out, the harder it
    is held back (Top-KAST, Jayakumar et al. 2020). Elsewhere none.

    Raises:
      TypeError, ValueError: `size` below 0, or `density` not in (0, 1].
    """
    check_number("size", size, least=0.0)
    check_number("density", density, above=0.0, most=1.0)

    def penalty(inputs: PenaltyInputs) -> Array:
        marked = _marked(inputs)
        explored = jnp.where(marked, size / density, 0.0)
        return jnp.where(inputs.mask, size, explored)

    return penalty


def growing(
    *,
    interval: int,
    step: float,
    first: int,
    last: int,
    start: float = 0.0,
    kept: float = 0.0,
) -> Penalty:
    """Grows at unmarked weights, from step `first` on: growing regularisation.

    start + step * j in the j-th interval of `interval` steps, j from 1, for as many as
    begin before step `last`, and no more after. (An integer counts them: accumulated in
    floats, the end would shift.) The marked weights have `kept` from then on. Before
    `first` it is none.

    Raises:
      TypeError, ValueError: an argument of the wrong type or out of range.

    References:
      Wang et al., Neural Pruning via Growing Regularization, ICLR 2021.
    """
    check_steps("interval", interval)
    check_number("step", step, above=0.0)
    check_steps("first", first, least=0)
    check_steps("last", last, least=first + 1)
    check_number("start", start, least=0.0)
    check_number("kept", kept, least=-math.inf)
    most = -(-(last - first) // interval)

    def penalty(inputs: PenaltyInputs) -> Array:
        elapsed = inputs.count - first
        grown = jnp.clip(elapsed // interval + 1, 1, most).astype(jnp.float32)
        size = jnp.where(_marked(inputs), kept, start + step * grown)
        return jnp.where(elapsed >= 0, size, 0.0)

    return penalty


def picking(*, interval: int, step: float, last: int) -> Penalty:
    """Grows at all weights alike: step * j in the j-th interval, until step `last`.

    Raises:
      TypeError, ValueError: an argument of the wrong type or out of range.
    """
    check_steps("interval", interval)
    check_number("step", step, above=0.0)
    check_steps("last", last)

    def penalty(inputs: PenaltyInputs) -> Array:
        size = step * (inputs.count // interval + 1).astype(jnp.float32)
        return jnp.where(inputs.count < last, size, 0.0)

    return penalty


def _marked(inputs: PenaltyInputs) -> Array:
    if inputs.marked is None:
        raise ValueError(
            "this penalty reads marked weights, and the method has none: set its "
            "`marked_sparsity`."
        )
    return inputs.marked
