"""Magnitude pruning in one shot, by the score abs(w) (Han et al., NeurIPS 2015)."""

from granet_jax import scores
from granet_jax.layers import Stacked
from granet_jax.mask_sources.layer_collapse import OnCollapse
from granet_jax.mask_sources.select import from_score
from granet_jax.masking import PyTree, Where
from granet_jax.selection import Scope
from granet_jax.structures import Structure


def magnitude(
    params: PyTree,
    sparsity: float,
    *,
    scope: Scope = "global",
    structure: Structure | None = None,
    where: Where = None,
    stacked: Stacked = None,
    on_collapse: OnCollapse = "warn",
) -> PyTree:
    """Return masks of the weights with the largest abs(w), before or after training.

    At initialization with global scope, the layers with the largest fan-in are emptied
    first, because their weights are drawn smallest. Even a moderate sparsity then
    disconnects the network (about 92% for the CIFAR version of ResNet-18).

    Args:
      params: Pytree of arrays.
      sparsity: Share of pruned weights, in [0, 1).
      scope: "global" or "layer", see `select`.
      structure: Structure of the masks, see `select`.
      where: Which leaves carry a mask, as in `granet_jax.transform`.
      stacked: Which axes of a leaf count layers, as in `granet_jax.transform`.
      on_collapse: Reaction to a leaf without active weights, see `from_score`.

    Returns:
      Masks with the structure of `params`.

    Raises:
      ValueError, TypeError: As `from_score`.

    References:
      Han et al., Learning Both Weights and Connections, NeurIPS 2015.
    """
    return from_score(
        scores.magnitude,
        params,
        sparsity,
        scope=scope,
        structure=structure,
        where=where,
        stacked=stacked,
        on_collapse=on_collapse,
    )
