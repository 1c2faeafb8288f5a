"""GraNet: gradual pruning with zero-cost neuroregeneration (Liu et al. 2021).

At every update step t:

1. Prune by magnitude, across all leaves, to the sparsity of the cubic schedule
   s(t) = s_f + (s_i - s_f) (1 - j/n)^3, where j of n pruning updates are done.
2. In every leaf, drop the fraction r(t) of the active weights by magnitude, and regrow
   the same number by abs(dense gradient), with
   r(t) = r_f + (r_0 - r_f) (1 + cos(pi t / T)) / 2, until one interval before the end.
"""

from granet_jax import schedules, scores
from granet_jax.checks import check_choice, check_fraction, check_steps
from granet_jax.distributions import Distribution
from granet_jax.methods.arguments import Until, cubic_schedule, last_growth
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
    floor: float = 0.0,
) -> Method:
    """GraNet: gradual magnitude pruning with zero-cost neuroregeneration.

    Every `interval` steps until `end_step`, prune by magnitude to the sparsity of the
    cubic schedule. Every `interval` steps, after the pruning, drop the fraction r of
    each layer's active weights by magnitude and regrow the same number by
    abs(dense gradient), with
    r(t) = final_fraction + (fraction - final_fraction)(1 + cos(pi t / total_steps))/2.
    The last exchange is one interval before the end of training at the latest, so that
    no weight is left untrained. (The authors' code exchanges in the last step too.) A
    pruning after that has no exchange.

    Training is dense-to-sparse with `initial_sparsity=0`, and sparse-to-sparse
    (GraNet-ST) with `initial_sparsity=0.5`, for example.

    Args:
      sparsity: Final sparsity, in [0, 1).
      total_steps: Optimizer steps of the whole training.
      initial_sparsity: Sparsity at the start, in [0, sparsity].
      begin_step: Step at which gradual pruning begins.
      end_step: Last step of gradual pruning; half of `total_steps` by default. The
        last update up to it reaches `sparsity` exactly.
      interval: Steps between mask updates.
      fraction: Prune fraction at the start, in [0, 1].
      final_fraction: Prune fraction at the end, in [0, 1].
      distribution: Distribution of the sparsity over layers, for the initial masks and
        for scope "layer": "uniform", "er", "erk" or a function. In the uniform variant
        (`distribution="uniform", scope="layer"`), the authors' code keeps the
        classifier at density 0.2 from sparsity 0.8 on. We do not, because a pytree does
        not say which leaf is the classifier.
      scope: "global": weights compete across layers in gradual pruning. "layer": they
        compete within each layer, at the sparsity that `distribution` gives it.
      grow: Score by which weights are regrown: "gradient", "momentum" or "random".
      structure: Structure of the masks, one of `structures`; None for single weights.
      floor: Least density of every layer in global pruning, rounded down to whole
        weights, at most 1 - sparsity. Without it, a layer whose weights are small can
        lose them all.

    Returns:
      A record for `transform`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong type.

    References:
      Liu et al., Sparse Training via Boosting Pruning Plasticity with
      Neuroregeneration, NeurIPS 2021.
    """
    check_steps("total_steps", total_steps)
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
    cosine = schedules.cosine(fraction, final_fraction, steps=total_steps)
    last = last_growth(total_steps, interval)
    regeneration = Until(cosine, last)
    return Method(
        name="granet",
        sparsity=pruning,
        updates=schedules.every(interval, begin=begin_step, last=max(last, end_step)),
        distribution=distribution,
        structure=structure,
        scope=scope,
        phases=(Prune(floor=floor), Exchange(regeneration, grow=_GROW[grow])),
        average_decay=0.9 if grow == "momentum" else None,
        needs_gradient=grow != "random",
    )
