"""GraSP: keep the weights whose removal would lower the gradient norm most.

Removing a weight w changes norm(g)^2 by about -2 w (H g), where g is the gradient and H
the Hessian of the loss. The score is w (H g), signed (Wang et al., ICLR 2020).
"""

from collections.abc import Iterable
from typing import Any

import jax

from granet_jax.checks import check_sparsity
from granet_jax.layers import Stacked
from granet_jax.mask_sources.layer_collapse import OnCollapse, check_action, report
from granet_jax.mask_sources.loss_gradients import (
    LossFn,
    check_batches,
    check_loss,
    gradient_of,
    mean_over_batches,
    per_device,
    times_weights,
)
from granet_jax.mask_sources.select import (
    full_masks,
    masked_weights,
    select,
    with_weights,
)
from granet_jax.masking import PyTree, Where
from granet_jax.selection import Scope, check_scope


def grasp(
    loss_fn: LossFn,
    params: PyTree,
    batches: Iterable[Any],
    sparsity: float,
    *,
    scope: Scope = "global",
    where: Where = None,
    stacked: Stacked = None,
    axis_name: str | None = None,
    on_collapse: OnCollapse = "warn",
) -> PyTree:
    """Return the masks of GraSP.

    The batches are read twice: for the gradient, then for the product of the Hessian
    with it. Use parameters in float32.

    Args:
      loss_fn: See `snip`. The authors use `cross_entropy(apply_fn, temperature=200)`.
      params: See `snip`.
      batches: See `snip`. A one-shot iterator is refused.
      sparsity: Share of pruned weights, in [0, 1).
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
      Wang et al., Picking Winning Tickets Before Training by Preserving Gradient Flow,
      ICLR 2020.
    """
    check_sparsity("sparsity", sparsity)
    check_scope(scope)
    check_action(on_collapse)
    scores = grasp_scores(
        loss_fn, params, batches, where=where, stacked=stacked, axis_name=axis_name
    )
    masks = select(scores, sparsity, scope=scope, stacked=stacked)
    return report(masks, on_collapse, stacked=stacked)


def grasp_scores(
    loss_fn: LossFn,
    params: PyTree,
    batches: Iterable[Any],
    *,
    where: Where = None,
    stacked: Stacked = None,
    axis_name: str | None = None,
) -> PyTree:
    """Return the scores of GraSP, w (H g) with their signs, for `select`.

    Args:
      loss_fn: See `grasp`.
      params: See `grasp`.
      batches: See `grasp`.
      where: See `grasp`.
      stacked: See `grasp`.
      axis_name: See `grasp`.

    Returns:
      Pytree with the structure of `params`: arrays of float32 or wider at maskable
      leaves, `optax.MaskedNode()` elsewhere.

    Raises:
      ValueError, TypeError: As `grasp`.
    """
    check_loss(loss_fn, axis_name)
    check_batches(batches, passes=2)
    masks = full_masks(params, where, stacked)
    gradient = gradient_of(loss_fn, axis_name)

    def hessian_product(
        params: PyTree, masks: PyTree, batch: Any, direction: PyTree
    ) -> PyTree:
        # Forward over reverse differentiation: one linearized backward pass.
        weights = per_device(masked_weights(params, masks), axis_name)
        direction = jax.tree.map(
            lambda d, w: d.astype(w.dtype), per_device(direction, axis_name), weights
        )
        return jax.jvp(
            lambda w: gradient(with_weights(params, w), masks, batch),
            (weights,),
            (direction,),
        )[1]

    mean_gradient = mean_over_batches(gradient, axis_name)(params, masks, batches)
    mean_product = mean_over_batches(hessian_product, axis_name)
    product = mean_product(params, masks, batches, mean_gradient)
    return times_weights(params, masks, product)
