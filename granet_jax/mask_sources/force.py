"""FORCE: iterative SNIP in which pruned weights may return.

The score of a weight w is abs(w g), where w is the initial value even if it is pruned,
and g is the dense gradient of the masked network (De Jorge et al., ICLR 2021).
"""

from collections.abc import Iterable
from typing import Any

from granet_jax.layers import Stacked
from granet_jax.mask_sources.layer_collapse import OnCollapse, report
from granet_jax.mask_sources.loss_gradients import LossFn
from granet_jax.mask_sources.snip import prune_by_sensitivity
from granet_jax.masking import PyTree, Where
from granet_jax.selection import Scope


def force(
    loss_fn: LossFn,
    params: PyTree,
    batches: Iterable[Any],
    sparsity: float,
    *,
    rounds: int = 60,
    scope: Scope = "global",
    where: Where = None,
    stacked: Stacked = None,
    axis_name: str | None = None,
    on_collapse: OnCollapse = "warn",
) -> PyTree:
    """Return the masks of FORCE.

    Every round scores all weights and selects among all of them. Round k of n keeps the
    density (1 - sparsity)^(k/n).

    The authors' code scores with the negated mean logit of the true class as the loss
    and trains with cross-entropy. Pass such a `loss_fn` to reproduce it.

    Args:
      loss_fn: See `snip`.
      params: See `snip`.
      batches: See `snip`.
      sparsity: Share of pruned weights, in [0, 1).
      rounds: Number of rounds. A single one is SNIP.
      scope: See `snip`.
      where: See `snip`.
      stacked: See `snip`.
      axis_name: See `snip`.
      on_collapse: See `snip`.

    Returns:
      Masks with the structure of `params`.

    Raises:
      ValueError, TypeError: As `snip`.

    References:
      De Jorge et al., Progressive Skeletonization: Trimming more fat from a network at
      initialization, ICLR 2021.
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
        revive=True,
    )
    return report(masks, on_collapse, stacked=stacked)
