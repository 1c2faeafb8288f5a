"""Cyclical pruning: gradual pruning, repeated in cycles (Srinivas et al. 2022).

In every cycle of P steps the sparsity follows the cubic schedule of GMP,
s(t) = s_f + (s_i - s_f) (1 - j/n)^3, where j of the cycle's n updates are done. At the
start of the next cycle it falls back to s_i, and pruned weights become active again.
"""

import math
from typing import Literal

from granet_jax import schedules, scores
from granet_jax.checks import check_choice, check_fraction, check_steps, got, is_number
from granet_jax.distributions import Distribution
from granet_jax.methods.arguments import cubic_schedule, steps_per_cycle
from granet_jax.methods.method import Method, PrunedWeights
from granet_jax.phases import Prune, Revive
from granet_jax.selection import Scope
from granet_jax.structures import Structure

Recovery = Literal["hard", "projected", "straight_through"]
_WEIGHTS: dict[str, PrunedWeights] = {
    "hard": "sparse",
    "projected": "projected",
    "straight_through": "dense",
}


def cyclical(
    sparsity: float,
    total_steps: int,
    *,
    cycles: int = 4,
    initial_sparsity: float = 0.0,
    ramp: float = 0.75,
    interval: int = 100,
    recovery: Recovery = "hard",
    scope: Scope = "global",
    distribution: Distribution = "uniform",
    structure: Structure | None = None,
    floor: float = 0.0,
) -> Method:
    """Cyclical pruning: gradual magnitude pruning, repeated in cycles.

    A cycle has P = total_steps / cycles steps. The sparsity rises from
    `initial_sparsity` to `sparsity` until step ramp * P of the cycle, by the cubic
    schedule of `gmp`, and then stays there. Every cycle but the last ends by returning
    to `initial_sparsity`. So a weight that one cycle pruned by mistake can come back in
    the next. One cycle is `gmp`, to the bit.

    `recovery` says what happens to pruned weights. The paper's text admits three
    readings, and we do not know which one the authors used:

    - "hard": Pruned weights are zero and see no gradient. Within a cycle, masks are
      nested. At the start of the next cycle all weights become active again; those that
      were pruned start at zero, with fresh moments. With `initial_sparsity` above zero,
      only the weights of largest abs(dense gradient) come back.
    - "projected": Projected gradient descent. In every step the optimizer moves all
      weights by the dense gradient at the sparse weights. Then the largest weights are
      kept, and the others become zero, with fresh moments. A pruned weight enters when
      one step moves it from zero beyond a weight that would be kept. An optimizer that
      divides by the size of the gradient, such as Adam, moves all pruned weights about
      equally far.
    - "straight_through": Weights outside the mask keep their values and train on. The
      forward pass takes `granet_jax.sparse_view(params, opt_state)`, the gradient there
      moves all weights, and after every step the largest weights form the new mask.

    Args:
      sparsity: Final sparsity, in [0, 1).
      total_steps: Optimizer steps of the whole training, a multiple of `cycles`.
      cycles: Number of cycles.
      initial_sparsity: Sparsity at the start of each cycle, in [0, sparsity].
      ramp: Share of a cycle after which the sparsity no longer rises, in (0, 1].
      interval: Steps between changes of the sparsity.
      recovery: "hard", "projected" or "straight_through".
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
      ValueError, TypeError: An argument is out of range or of the wrong type; or the
        last pruning of a cycle would fall on the start of the next cycle.

    References:
      Srinivas et al., Cyclical Pruning for Sparse Neural Networks, CVPR workshops,
      2022. Zhu & Gupta, To Prune, or Not to Prune, 2017 (the schedule of a cycle).
    """
    period = steps_per_cycle(total_steps, "cycles", cycles, cycles)
    check_choice("recovery", recovery, tuple(_WEIGHTS))
    check_fraction("floor", floor)
    if floor and recovery != "hard":
        raise ValueError(f'floor must be 0 with recovery="{recovery}", got {floor}.')
    if not is_number(ramp) or not 0.0 < ramp <= 1.0:
        raise ValueError(f"ramp must be a number in (0, 1], got {got(ramp)}.")
    check_steps("interval", interval)
    # The small addend undoes the rounding error of a product such as 0.29 * 100.
    end = math.floor(ramp * period + 1e-6)
    if end < interval:
        raise ValueError(
            f"interval must be at most the {end} steps in which a cycle prunes (ramp "
            f"times total_steps / cycles), got {interval}: no update would prune. Take "
            "a shorter interval or fewer cycles."
        )
    rise = cubic_schedule(sparsity, initial_sparsity, 0, end, interval)
    prunings = range(interval, end + 1, interval)
    if cycles > 1 and prunings[-1] == period:
        raise ValueError(
            f"ramp must end before the cycle does, got ramp={ramp} with cycles of "
            f"{period} steps and interval={interval}: a cycle's last pruning would "
            "fall on the start of the next. Take a smaller ramp."
        )
    steps = [
        cycle * period + step
        for cycle in range(cycles)
        for step in (0, *prunings)
        if cycle or step
    ]
    partial = initial_sparsity > 0 and recovery == "hard" and cycles > 1
    phases = (
        Prune(floor=floor),
        Revive(scores.gradient if partial else scores.magnitude),
    )
    return Method(
        name="cyclical",
        sparsity=schedules.repeated(rise, period=period, cycles=cycles),
        updates=schedules.listed(steps),
        distribution=distribution,
        structure=structure,
        scope=scope,
        phases=phases if recovery == "hard" else (),
        needs_gradient=partial,
        weights=_WEIGHTS[recovery],
    )
