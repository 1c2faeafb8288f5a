"""Top-KAST: sparse forward, a little less sparse backward (Jayakumar et al. 2020).

The forward pass uses the set A of the weights of largest magnitude at the sparsity s.
The gradient there moves a larger set B of the weights of largest magnitude, at a lower
sparsity. With the density D = 1 - s, the exploration penalty of a weight w is
lambda/2 w^2 in A, and lambda/(2 D) w^2 in the rest of B.
"""

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

    The forward pass uses the set A of the weights of largest magnitude at `sparsity`.
    The gradient there moves the set B of the weights of largest magnitude at
    `backward_sparsity`, which contains A. All other weights keep their values. Both
    sets are chosen again, among all weights, every `interval` steps.

    The exploration penalty is lambda/2 w^2 in A and lambda/(2 D) w^2 in the rest of B,
    with D = 1 - `sparsity`. So only weights that reduce the loss enough stay large.

    This was written from memory of the paper, and from a port that differs from it.

    Args:
      sparsity: Sparsity of the forward pass, in [0, 1).
      backward_sparsity: Sparsity of the weights that the gradient moves, in
        [0, sparsity].
      interval: Steps between choices of the sets.
      penalty: L2 coefficient lambda of the weights in A, 0 or larger.
      scope: "layer": weights compete within each layer, at the sparsity that
        `distribution` gives it. "global": they compete across layers.
      distribution: Distribution of the sparsity over layers, for scope "layer".
      structure: Structure of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform(method, inner)`. `sparse_view` gives the sparse
      parameters, and `get_state(opt_state).marked` the set B.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong type.

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
