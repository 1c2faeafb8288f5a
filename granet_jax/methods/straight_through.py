"""Straight-through magnitude pruning: pruned weights live on (Bengio et al. 2013)."""

from granet_jax import penalties
from granet_jax.checks import check_number
from granet_jax.distributions import Distribution
from granet_jax.methods.arguments import cubic_schedule
from granet_jax.methods.method import Method
from granet_jax.schedules import UpdateSteps
from granet_jax.selection import Scope
from granet_jax.structures import Structure


def straight_through(
    sparsity: float,
    end_step: int,
    *,
    initial_sparsity: float = 0.0,
    begin_step: int = 0,
    interval: int = 100,
    penalty: float = 0.0,
    scope: Scope = "layer",
    distribution: Distribution = "uniform",
    structure: Structure | None = None,
) -> Method:
    """Magnitude pruning with a straight-through estimator: pruned weights live on.

    After every step the weights of largest magnitude, among all, are the mask, as many
    as the cubic schedule of `gmp` says; the gradient at the sparse weights moves all of
    them, as if the mask were the identity. A weight comes back with the value it has
    come to meanwhile.

    With `penalty` (SR-STE; 2e-4 in its code) weights outside the mask are held back,
    which keeps the masks from chattering.

    Args:
      sparsity: final sparsity, in [0, 1).
      end_step: last step of pruning; the last update up to it reaches `sparsity`.
      initial_sparsity: sparsity at the start, in [0, sparsity].
      begin_step: step at which pruning begins.
      interval: steps between changes of the sparsity; masks are chosen in every step.
      penalty: L2 coefficient of weights outside the mask, from 0 on.
      scope: "layer": weights compete within each, at the sparsity that `distribution`
        gives it; "global": across layers.
      distribution: with scope "layer".
      structure: of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform`; `sparse_view` gives the sparse parameters.

    Raises:
      ValueError, TypeError: an argument out of range or of the wrong type.

    References:
      Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons,
      2013. google-research/jaxpruner, `ste.py`. Zhou et al., Learning N:M Fine-grained
      Structured Sparse Neural Networks From Scratch, ICLR 2021 (SR-STE).
    """
    pruning = cubic_schedule(sparsity, initial_sparsity, begin_step, end_step, interval)
    check_number("penalty", penalty, least=0.0)
    return Method(
        name="straight_through",
        sparsity=pruning,
        updates=UpdateSteps(begin_step + interval, end_step, interval),
        distribution=distribution,
        structure=structure,
        scope=scope,
        weights="dense",
        penalty=penalties.outside(penalty) if penalty else None,
    )
