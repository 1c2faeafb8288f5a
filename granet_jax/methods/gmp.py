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
    floor: float = 0.0,
) -> Method:
    """GMP: gradual magnitude pruning by a cubic schedule, without regrowth.

    s(t) = sparsity + (initial_sparsity - sparsity)(1 - (t - begin)/(n interval))^3 at
    t = begin + j interval, j = 1..n, n = (end - begin) // interval.

    Args:
      sparsity: Final sparsity, in [0, 1).
      end_step: Last step of pruning; the last update up to it reaches `sparsity`
        exactly.
      initial_sparsity: Sparsity at the start, in [0, sparsity].
      begin_step: Step at which pruning begins.
      interval: Steps between mask updates.
      scope: "global": weights compete across layers. "layer": they compete within
        each layer, at the sparsity that `distribution` gives it.
      distribution: Distribution of the sparsity over layers, for the initial masks and
        for scope "layer".
      structure: Structure of the masks, one of `structures`; None for single weights.
      floor: Least density of every layer in global pruning, rounded down to whole
        weights, at most 1 - sparsity. Without it, a layer whose weights are small can
        lose them all.

    Returns:
      A record for `transform`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong type.

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
        phases=(Prune(floor=floor),),
    )
