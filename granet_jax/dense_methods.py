"""Methods whose weights stay dense: the forward pass alone is sparse.

`params` holds all weights, the masks say which of them the network uses, and
`granet_jax.sparse_view(params, opt_state)` gives the sparse parameters: to the loss,
whose gradient there moves the dense weights, to evaluation, and at the end for good.
"""

from granet_jax import penalties
from granet_jax.checks import check_number, check_sparsity, check_steps
from granet_jax.distributions import Distribution
from granet_jax.methods import Method, gradual
from granet_jax.schedules import UpdateSteps, constant
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
    pruning = gradual(sparsity, initial_sparsity, begin_step, end_step, interval)
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


def top_kast(
    sparsity: float,
    *,
    backward_sparsity: float,
    interval: int = 100,
    penalty: float = 1e-4,
    scope: Scope = "layer",
    distribution: Distribution = "uniform",
    structure: Structure | None = None,
) -> Method:
    """Top-KAST: always sparse forward, a little less sparse backward.

    The forward pass uses the weights of largest magnitude at `sparsity`, A; the
    gradient there moves the weights of largest magnitude at `backward_sparsity`, B,
    which A is part of; the others keep their values, untouched. Both are chosen anew,
    among all weights, every `interval` steps.

    The exploration penalty is lambda/2 w^2 in A and lambda/(2 D) w^2 in the rest of B,
    with D = 1 - `sparsity`: only weights worth it stay.

    We have this method from memory of the paper, and from a port that differs from it.

    Args:
      sparsity: of the forward pass, in [0, 1).
      backward_sparsity: of the weights that the gradient moves, in [0, sparsity].
      interval: steps between choices.
      penalty: lambda, the L2 coefficient of active weights, from 0 on.
      scope: "layer": weights compete within each, at the sparsity that `distribution`
        gives it; "global": across layers.
      distribution: with scope "layer".
      structure: of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform(method, inner)`; `sparse_view` gives the sparse
      parameters, and the weights in B are `get_state(opt_state).marked`.

    Raises:
      ValueError, TypeError: an argument out of range or of the wrong type.

    References:
      Jayakumar et al., Top-KAST: Top-K Always Sparse Training, NeurIPS 2020.
    """
    check_sparsity("sparsity", sparsity)
    check_sparsity("backward_sparsity", backward_sparsity)
    if backward_sparsity > sparsity:
        raise ValueError(
            "backward_sparsity must be at most sparsity, got "
            f"backward_sparsity={backward_sparsity} with sparsity={sparsity}: the "
            "gradient moves all weights that the forward pass uses."
        )
    check_steps("interval", interval)
    check_number("penalty", penalty, least=0.0)
    explored = penalties.exploration(penalty, 1.0 - sparsity)
    return Method(
        name="top_kast",
        sparsity=constant(sparsity),
        distribution=distribution,
        structure=structure,
        scope=scope,
        weights="dense",
        refresh=interval,
        marked_sparsity=backward_sparsity,
        penalty=explored if penalty else None,
    )
