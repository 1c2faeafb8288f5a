"""Straight-through magnitude pruning: pruned weights train on (Bengio et al. 2013).

The forward pass uses m * w, where the mask m holds the weights of largest magnitude
among all weights, and the gradient there moves all weights. For SGD:
w <- w - eta (grad L(m * w) + lambda (1 - m) w), where lambda > 0 gives SR-STE.
"""

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
    """Magnitude pruning with a straight-through estimator: pruned weights train on.

    After every step the weights of largest magnitude among all weights form the new
    mask, at the sparsity of the cubic schedule of `gmp`. The gradient at the sparse
    weights moves all weights, as if the mask were the identity. So a pruned weight
    comes back with the value that training has given it in the meantime.

    With a `penalty` (SR-STE; 2e-4 in its code), weights outside the mask decay, which
    keeps weights from moving in and out of the mask all the time.

    Args:
      sparsity: Final sparsity, in [0, 1).
      end_step: Last step of pruning; the last update up to it reaches `sparsity`
        exactly.
      initial_sparsity: Sparsity at the start, in [0, sparsity].
      begin_step: Step at which pruning begins.
      interval: Steps between changes of the sparsity. Masks are chosen in every step.
      penalty: L2 coefficient of weights outside the mask, 0 or larger.
      scope: "layer": weights compete within each layer, at the sparsity that
        `distribution` gives it. "global": they compete across layers.
      distribution: Distribution of the sparsity over layers, for scope "layer".
      structure: Structure of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform`. `sparse_view` gives the sparse parameters.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong type.

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
