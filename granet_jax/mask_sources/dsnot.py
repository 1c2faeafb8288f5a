"""DSnoT: exchange pruned and kept weights of a pretrained network, without training."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from granet_jax import masking
from granet_jax.checks import check_integer, check_number
from granet_jax.mask_sources.by_inputs import (
    Statistics,
    as_float,
    leaves_with_statistics,
    tree_like,
)
from granet_jax.mask_sources.matrices import (
    as_matrices,
    from_matrices,
    group_length,
)
from granet_jax.mask_sources.wanda import wanda_score
from granet_jax.masking import PyTree
from granet_jax.structures import Structure


def dsnot(
    params: PyTree,
    masks: PyTree,
    statistics: Statistics,
    *,
    structure: Structure | None = None,
    swaps: int = 50,
    tolerance: float = 0.1,
) -> PyTree:
    """Return masks whose layers have nearly the mean outputs of the dense network.

    The error of an output is the sum of w times the mean input over its pruned weights.
    Each swap activates the pruned weight that reduces the error most for the variance
    of its input, and prunes the kept weight of smallest score of Wanda whose loss also
    reduces the error. An output is finished when its error is within the tolerance or
    would change its sign, or after `swaps` swaps. A weight changes at most once.

    Args:
      params: Pytree of arrays, the dense pretrained parameters.
      masks: Masks with the structure of `params`, such as those of `wanda`.
      statistics: Result of `input_statistics` for `params`.
      structure: The structure of `masks`: None, or `structures.n_of_m` along the
        inputs. Then the pruned weight is of the group of the activated one.
      swaps: The largest number of swaps of an output, 0 or more.
      tolerance: The error at which an output is finished, in units of the outputs.

    Returns:
      Masks. Every output has as many active weights as before.

    Raises:
      ValueError, TypeError: An argument is out of range, masks or statistics are of
        other parameters, or the structure is another.

    References:
      Zhang et al., Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse
      LLMs, ICLR 2024, equations 4 to 6.
    """
    check_integer("swaps", swaps, least=0)
    check_number("tolerance", tolerance, least=0.0)
    leaves = leaves_with_statistics(params, statistics)
    before = masking.check_masks(masks, params)
    named = jax.tree_util.tree_leaves_with_path(before)
    given = {masking.leaf_name(path): mask for path, mask in named}
    if list(given) != list(leaves):
        raise ValueError(
            f"masks must be of the leaves in statistics, {', '.join(leaves)}, got "
            f"{', '.join(given)}."
        )
    after = {}
    for name, leaf in leaves.items():
        found = statistics[name]
        length = group_length(structure, name, leaf.shape, found)
        weights = as_float(leaf)
        effect = weights * found.mean
        variance = found.mean_square - jnp.square(found.mean)
        tiny = jnp.finfo(variance.dtype).tiny
        rows = [
            as_matrices(x, found)
            for x in (
                given[name],
                effect,
                effect / jnp.maximum(variance, tiny),
                wanda_score(weights, found),
            )
        ]
        inputs = rows[0].shape[-1]
        exchanged = _exchange(
            *(x.reshape(-1, inputs) for x in rows),
            group=length,
            swaps=swaps,
            tolerance=tolerance,
        )
        after[name] = from_matrices(exchanged.reshape(rows[0].shape), leaf.shape, found)
    return tree_like(params, after)


class _Rows(NamedTuple):
    """The state of all rows.

    Attributes:
      mask: The masks.
      fixed: The weights that have changed, and may not change again.
      error: The error of each row.
      unfinished: Whether a row may still change.
    """

    mask: Array
    fixed: Array
    error: Array
    unfinished: Array


@functools.partial(jax.jit, static_argnames=("group", "swaps"))
def _exchange(
    mask: Array,
    effect: Array,
    growth: Array,
    score: Array,
    *,
    group: int | None,
    swaps: int,
    tolerance: float,
) -> Array:
    """Exchange weights in every row of a matrix.

    Args:
      mask: The masks before, (rows, inputs), as are all matrices.
      effect: The mean of what a weight adds to the output.
      growth: The effect divided by the variance.
      score: The score by which weights are pruned.
      group: The length of groups that keep their number of active weights, or None.
      swaps: The largest number of swaps of a row.
      tolerance: The error at which a row is finished.
    """
    place = jnp.arange(mask.shape[1])[None]

    def best(values: Array, candidates: Array) -> tuple[Array, Array]:
        """The candidate of largest value in each row, and its effect."""
        found = jnp.argmax(jnp.where(candidates, values, -jnp.inf), axis=1)[:, None]
        is_one = (place == found) & candidates
        return is_one, jnp.sum(jnp.where(is_one, effect, 0), axis=1)

    def swap(_: Array, rows: _Rows) -> _Rows:
        sign = jnp.sign(rows.error)[:, None]
        grown, gain = best(sign * growth, ~rows.mask & ~rows.fixed)
        if group is None:
            candidates = sign * effect < 0
        else:
            candidates = jnp.repeat(
                jnp.any(grown.reshape(len(grown), -1, group), axis=2), group, axis=1
            )
        pruned, loss = best(-score, candidates & rows.mask & ~rows.fixed)
        error = rows.error - gain + loss
        possible = jnp.any(grown, axis=1) & jnp.any(pruned, axis=1)
        wanted = jnp.abs(rows.error) > tolerance
        unfinished = (
            rows.unfinished
            & possible
            & wanted
            & (jnp.sign(error) == jnp.sign(rows.error))
        )
        changed = (grown | pruned) & unfinished[:, None]
        return _Rows(
            mask=rows.mask ^ changed,
            fixed=rows.fixed | changed,
            error=jnp.where(unfinished, error, rows.error),
            unfinished=unfinished,
        )

    start = _Rows(
        mask=mask,
        fixed=jnp.zeros_like(mask),
        error=jnp.sum(jnp.where(mask, 0, effect), axis=1),
        unfinished=jnp.ones(len(mask), bool),
    )
    return lax.fori_loop(0, swaps, swap, start).mask
