"""GraNet: gradual pruning with zero-cost neuroregeneration (Liu et al. 2021).

At every update step t:

1. Prune by magnitude, across all leaves, to the sparsity of the cubic schedule
   s(t) = s_f + (s_i - s_f) (1 - j/n)^3, where j of n pruning updates are done.
2. In every leaf, drop the fraction r(t) of the active weights by magnitude, and regrow
   as many by abs(dense gradient);
   r(t) = r_f + (r_0 - r_f) (1 + cos(pi t / T)) / 2.
"""

from granet_jax import schedules, scores
from granet_jax.checks import check_choice, check_fraction, check_steps
from granet_jax.distributions import Distribution
from granet_jax.methods.arguments import cubic_schedule
from granet_jax.methods.method import Method
from granet_jax.phases import Exchange, Prune
from granet_jax.scores import Score
from granet_jax.selection import Scope
from granet_jax.structures import Structure

_GROW: dict[str, Score] = {
    "gradient": scores.gradient,
    "momentum": scores.momentum,
    "random": scores.random,
}


def granet(
    sparsity: float,
    total_steps: int,
    *,
    initial_sparsity: float = 0.0,
    begin_step: int = 0,
    end_step: int | None = None,
    interval: int = 1000,
    fraction: float = 0.5,
    final_fraction: float = 0.005,
    distribution: Distribution = "erk",
    scope: Scope = "global",
    grow: str = "gradient",
    structure: Structure | None = None,
) -> Method:
    """GraNet: gradual magnitude pruning with zero-cost neuroregeneration.

    Every `interval` steps: prune by magnitude down to the cubic schedule's sparsity
    (until `end_step`), then in every layer drop the fraction r of the active weights
    by magnitude and regrow as many by abs(dense gradient) (until `total_steps`), with
    r(t) = final_fraction + (fraction - final_fraction)(1 + cos(pi t / total_steps))/2.

    Dense-to-sparse at `initial_sparsity=0`; sparse-to-sparse (GraNet-ST) at, say, 0.5.

    Args:
      sparsity: final sparsity, in [0, 1).
      total_steps: optimizer steps of the whole training.
      initial_sparsity: sparsity at the start, in [0, sparsity].
      begin_step: step at which gradual pruning begins.
      end_step: last step of gradual pruning; default half of `total_steps`. The last
        update up to it reaches `sparsity` exactly.
      interval: steps between mask updates.
      fraction: prune fraction at the start, in [0, 1].
      final_fraction: prune fraction at the end, in [0, 1].
      distribution: "uniform", "er", "erk" or a function; of the initial masks, and of
        pruning with scope "layer". The GraNet code's uniform variant
        (`distribution="uniform", scope="layer"`) keeps its classifier at density 0.2
        from sparsity 0.8 on; we do not, since no leaf of a pytree is known to be one.
      scope: "global" or "layer": what competes in gradual pruning.
      grow: "gradient", "momentum" or "random".
      structure: of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform`.

    Raises:
      ValueError, TypeError: an argument out of range or of the wrong type.

    References:
      Liu et al., Sparse Training via Boosting Pruning Plasticity with
      Neuroregeneration, NeurIPS 2021.
    """
    check_steps("total_steps", total_steps, least=1)
    end_step = total_steps // 2 if end_step is None else end_step
    pruning = cubic_schedule(sparsity, initial_sparsity, begin_step, end_step, interval)
    if end_step > total_steps:
        raise ValueError(
            f"end_step must be at most total_steps, got end_step={end_step} with "
            f"total_steps={total_steps}."
        )
    check_fraction("fraction", fraction)
    check_fraction("final_fraction", final_fraction)
    check_choice("grow", grow, tuple(_GROW))
    regeneration = schedules.cosine(fraction, final_fraction, steps=total_steps)
    return Method(
        name="granet",
        sparsity=pruning,
        updates=schedules.every(interval, begin=begin_step, last=total_steps),
        distribution=distribution,
        structure=structure,
        scope=scope,
        phases=(Prune(), Exchange(regeneration, grow=_GROW[grow])),
        average_decay=0.9 if grow == "momentum" else None,
        needs_gradient=grow != "random",
    )
