"""Wanda and RIA: prune a pretrained network in one shot, without gradients.

Both rank a weight by its size and the size of the inputs that it meets. They keep the
weights as they are; train on with fixed or dynamic masks to recover more.
"""

import jax.numpy as jnp
from jax import Array

from granet_jax.checks import check_number
from granet_jax.mask_sources.by_inputs import (
    InputScope,
    Sparsities,
    Statistics,
    choose,
    group_axes,
)
from granet_jax.mask_sources.input_statistics import InputStatistics
from granet_jax.masking import PyTree
from granet_jax.structures import Structure


def wanda(
    params: PyTree,
    statistics: Statistics,
    sparsity: Sparsities,
    *,
    scope: InputScope = "unit",
    structure: Structure | None = None,
) -> PyTree:
    """Return the masks of Wanda: the score of a weight is abs(w) times its input norm.

    For example::

        statistics = mask_sources.input_statistics(apply_fn, params, batches)
        masks = mask_sources.wanda(params, statistics, 0.5)

    Args:
      params: Pytree of arrays, the pretrained parameters.
      statistics: Result of `input_statistics` for these parameters.
      sparsity: Share of pruned weights, in [0, 1): one number, or one for each leaf by
        its name, as from `owl`.
      scope: "unit" compares the weights of the same output, as the paper does, so that
        all outputs of a layer keep the same number of inputs. "layer" compares all
        weights of a layer. Layers that are stacked in one leaf are ranked apart.
      structure: Structure of the masks instead of a scope, such as
        `structures.n_of_m(2, 4)` or `structures.block(4, 4)`.

    Returns:
      Masks with the structure of `params`, for the leaves in `statistics`. Each layer
      has exactly the sparsity asked for, rounded to the nearest number of weights of an
      output, a layer or a box (at least one weight of an output).

    Raises:
      ValueError, TypeError: An argument is out of range, statistics are of other
        parameters, or a leaf does not fit the structure.

    References:
      Sun et al., A Simple and Effective Pruning Approach for Large Language Models,
      ICLR 2024, equation 1.
    """
    return choose(wanda_score, params, statistics, sparsity, scope, structure)


def wanda_score(weights: Array, statistics: InputStatistics) -> Array:
    """abs(w) times the root of the mean square of the inputs that meet w."""
    return jnp.abs(weights) * jnp.sqrt(statistics.mean_square)


def ria(
    params: PyTree,
    statistics: Statistics,
    sparsity: Sparsities,
    *,
    power: float = 0.5,
    scope: InputScope = "layer",
    structure: Structure | None = None,
) -> PyTree:
    """Return the masks of RIA, by relative importance and activations.

    The score is (abs(w) / the sum of abs over the weights of the same input + abs(w) /
    the sum of abs over the weights of the same output) times the input norm to `power`.
    The paper's permutation of channels before N:M pruning is not included.

    Args:
      params: See `wanda`.
      statistics: See `wanda`.
      sparsity: See `wanda`.
      power: Power of the input norm, 0 or larger.
      scope: See `wanda`. The authors compare all weights of a layer.
      structure: See `wanda`.

    Returns:
      Masks, see `wanda`.

    Raises:
      ValueError, TypeError: As `wanda`, and for a power that is not 0 or larger.

    References:
      Zhang et al., Plug-and-Play: An Efficient Post-training Pruning Method for Large
      Language Models, ICLR 2024, equations 2 and 3.
    """
    check_number("power", power, least=0.0)

    def score(weights: Array, found: InputStatistics) -> Array:
        size = jnp.abs(weights)
        inputs, groups = found.input_axes, group_axes(found)
        outputs = [a for a in range(size.ndim) if a not in (*inputs, *groups)]
        relative = sum(
            size / jnp.maximum(jnp.sum(size, axis, keepdims=True), _TINY)
            for axis in (tuple(outputs), inputs)
        )
        return relative * jnp.sqrt(found.mean_square) ** power

    return choose(score, params, statistics, sparsity, scope, structure)


# Sums of no weight but zeros must not divide by zero.
_TINY = float(jnp.finfo(jnp.float32).tiny)
