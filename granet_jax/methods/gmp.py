"""GMP: gradual magnitude pruning without regrowth (Zhu & Gupta 2017).

At every update step, prune by magnitude to the sparsity of the cubic schedule
s(t) = s_f + (s_i - s_f) (1 - j/n)^3, where j of n updates are done.
"""

from granet_jax.distributions import Distribution
from granet_jax.methods.arguments import cubic_schedule
from granet_jax.methods.method import Method
from granet_jax.phases import Prune
from granet_jax.schedules import UpdateSteps
from granet_jax.selection import Scope
from granet_jax.structures import Structure


def gmp(
    sparsity: float,
    end_step: int,
    *,
    initial_sparsity: float = 0.0,
    begin_step: int = 0,
    interval: int = 1000,
    scope: Scope = "global",
    distribution: Distribution = "uniform",
    structure: Structure | None = None,
) -> Method:
    """Gradual magnitude pruning: cubic schedule, no regrowth.

    s(t) = sparsity + (initial_sparsity - sparsity)(1 - (t - begin)/(n interval))^3 at
    t = begin + j interval, j = 1..n, n = (end - begin) // interval.

    Args:
      sparsity: final sparsity, in [0, 1).
      end_step: last step of pruning; the last update up to it reaches `sparsity`
        exactly.
      initial_sparsity: sparsity at the start, in [0, sparsity].
      begin_step: step at which pruning begins.
      interval: steps between mask updates.
      scope: "global": weights compete across layers; "layer": within each, at the
        sparsity that `distribution` gives it (the uniform variant).
      distribution: of the initial masks, and of pruning with scope "layer".
      structure: of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform`.

    Raises:
      ValueError, TypeError: an argument out of range or of the wrong type.

    References:
      Zhu & Gupta, To Prune, or Not to Prune, 2017.
    """
    pruning = cubic_schedule(sparsity, initial_sparsity, begin_step, end_step, interval)
    return Method(
        name="gmp",
        sparsity=pruning,
        updates=UpdateSteps(begin_step + interval, end_step, interval),
        distribution=distribution,
        structure=structure,
        scope=scope,
        phases=(Prune(),),
    )
