"""SNIP: keep the weights whose removal would change the loss most.

The score of a weight w is abs(w dL/dw), the derivative of the loss L with respect to
the weight's mask. One round is the method of Lee et al. (ICLR 2019). Several rounds are
iterative SNIP (De Jorge et al., ICLR 2021): each scores the network that the previous
round has left, and pruned weights do not return.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from granet_jax.checks import check_integer, check_sparsity
from granet_jax.layers import Stacked
from granet_jax.mask_sources.layer_collapse import (
    OnCollapse,
    check_action,
    is_traced,
    report,
)
from granet_jax.mask_sources.loss_gradients import (
    LossFn,
    check_batches,
    check_loss,
    gradient_of,
    mean_over_batches,
    times_weights,
)
from granet_jax.mask_sources.rounds import select_in_rounds
from granet_jax.mask_sources.select import full_masks
from granet_jax.masking import PyTree, Where
from granet_jax.selection import Scope, check_scope


def snip(
    loss_fn: LossFn,
    params: PyTree,
    batches: Iterable[Any],
    sparsity: float,
    *,
    rounds: int = 1,
    scope: Scope = "global",
    where: Where = None,
    stacked: Stacked = None,
    axis_name: str | None = None,
    on_collapse: OnCollapse = "warn",
) -> PyTree:
    """Return the masks of SNIP, or of iterative SNIP if there are several rounds.

    Round k of n keeps the density (1 - sparsity)^(k/n).

    Args:
      loss_fn: Function (params, batch) -> scalar that depends on nothing else.
      params: Pytree of arrays, the initial parameters. (The authors' code draws new
        ones for the training.)
      batches: List, loader or other iterable of pytrees of arrays. Every round
        evaluates the loss on each of them. A one-shot iterator serves for one round
        only. About ten examples of every class are enough; the authors use one batch.
      sparsity: Share of pruned weights, in [0, 1).
      rounds: Number of rounds.
      scope: "global" or "layer", see `select`.
      where: Which leaves carry a mask, as in `granet_jax.transform`.
      stacked: Which axes of a leaf count layers, as in `granet_jax.transform`.
      axis_name: Mapped axis (of `pmap` or `shard_map`) whose devices hold different
        batches. Gradients are averaged over it, so that all devices get the same
        masks. Leave it None under `jit`, where sharded arrays need no name.
      on_collapse: "warn", "error" or "ignore": the reaction to a leaf that is left
        without active weights.

    Returns:
      Masks with the structure of `params`.

    Raises:
      ValueError: An argument is out of range, there is no batch, or a score is NaN or
        infinite. Also for a collapsed leaf if `on_collapse="error"`.
      TypeError: An argument has the wrong type, or several rounds got a one-shot
        iterator.

    References:
      Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity,
      ICLR 2019. De Jorge et al., Progressive Skeletonization, ICLR 2021 (several
      rounds).
    """
    masks = prune_by_sensitivity(
        loss_fn,
        params,
        batches,
        sparsity,
        rounds=rounds,
        scope=scope,
        where=where,
        stacked=stacked,
        axis_name=axis_name,
        on_collapse=on_collapse,
        revive=False,
    )
    return report(masks, on_collapse, stacked=stacked)


def snip_scores(
    loss_fn: LossFn,
    params: PyTree,
    batches: Iterable[Any],
    *,
    where: Where = None,
    stacked: Stacked = None,
    axis_name: str | None = None,
) -> PyTree:
    """Return the scores of SNIP, abs(w dL/dw), for `select`.

    Args:
      loss_fn: See `snip`.
      params: See `snip`.
      batches: See `snip`.
      where: See `snip`.
      stacked: See `snip`.
      axis_name: See `snip`.

    Returns:
      Pytree with the structure of `params`: arrays of float32 or wider at maskable
      leaves, `optax.MaskedNode()` elsewhere.

    Raises:
      ValueError, TypeError: As `snip`.
    """
    check_loss(loss_fn, axis_name)
    check_batches(batches, passes=1)
    score = _sensitivity(loss_fn, params, batches, axis_name, revive=False)
    return score(full_masks(params, where, stacked))


def prune_by_sensitivity(
    loss_fn: LossFn,
    params: PyTree,
    batches: Iterable[Any],
    sparsity: float,
    *,
    rounds: int,
    scope: Scope,
    where: Where,
    stacked: Stacked,
    axis_name: str | None,
    on_collapse: OnCollapse,
    revive: bool,
) -> PyTree:
    """Return the masks of iterative SNIP, or of FORCE if pruned weights may return."""
    check_sparsity("sparsity", sparsity)
    check_integer("rounds", rounds, least=1)
    check_scope(scope)
    check_action(on_collapse)
    check_loss(loss_fn, axis_name)
    check_batches(batches, passes=rounds)
    return select_in_rounds(
        _sensitivity(loss_fn, params, batches, axis_name, revive=revive),
        full_masks(params, where, stacked),
        sparsity,
        rounds,
        scope=scope,
        stacked=stacked,
        revive=revive,
        traced=is_traced(params, batches),
    )


def _sensitivity(
    loss_fn: LossFn,
    params: PyTree,
    batches: Iterable[Any],
    axis_name: str | None,
    *,
    revive: bool,
) -> Callable[[PyTree], PyTree]:
    """Return the score of given masks: abs(w g), with g the gradient when masked.

    With `revive`, pruned weights count with the value they had, not as zero.
    """
    mean_gradient = mean_over_batches(gradient_of(loss_fn, axis_name), axis_name)

    def score(masks: PyTree) -> PyTree:
        gradient = mean_gradient(params, masks, batches)
        counted = jax.tree.map(jnp.ones_like, masks) if revive else masks
        return jax.tree.map(jnp.abs, times_weights(params, counted, gradient))

    return score
