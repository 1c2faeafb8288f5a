"""Top-KAST: sparse forward, a little less sparse backward (Jayakumar et al. 2020)."""

from granet_jax import penalties
from granet_jax.checks import check_number, check_sparsity, check_steps
from granet_jax.distributions import Distribution
from granet_jax.methods.method import Method
from granet_jax.schedules import constant
from granet_jax.selection import Scope
from granet_jax.structures import Structure


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
