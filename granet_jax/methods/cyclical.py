"""Cyclical pruning: gradual pruning, repeated in cycles (Srinivas et al. 2022).

In every cycle the sparsity follows the cubic schedule of GMP; at the start of the next
cycle it falls back to its initial value, and pruned weights take part again.
"""

import math
from typing import Literal

from granet_jax import schedules, scores
from granet_jax.checks import check_choice, check_steps, got, is_number
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
) -> Method:
    """Cyclical pruning: gradual magnitude pruning, again and again from dense.

    In every cycle of P = total_steps / cycles steps the sparsity goes by the cubic
    schedule of `gmp` from `initial_sparsity` to `sparsity`, in updates `interval`
    steps apart, up to step ramp * P of the cycle, and stays there; the end of a cycle
    takes it back to `initial_sparsity`, the end of the last does not. What was pruned
    by mistake in one cycle can so come back in the next. One cycle is `gmp`, to the
    bit.

    What becomes of pruned weights, `recovery` (the paper's own reading is not known to
    us; these are three that its text admits):

    - "hard": they are zero and see no gradient. Within a cycle masks are nested; where
      the next begins all weights take part again, those that were pruned from zero,
      with zero moments. (With `initial_sparsity` above zero, as many come back as that
      allows, by abs(dense gradient).)
    - "projected": projected gradient descent. In every step the optimizer moves all
      weights by the dense gradient at the sparse ones, and the largest of all are
      kept, the others become zero. A pruned weight enters with what one step moves it
      from zero, where that exceeds a weight that is kept. (The moments of weights that
      are not kept become zero. An optimizer that divides by the gradient's size, as
      Adam does, moves all of them about equally far.)
    - "straight_through": weights outside the mask live on. The forward pass takes
      `granet_jax.sparse_view(params, opt_state)`, the gradient there moves all
      weights, and in every step the largest of all are the mask.

    Args:
      sparsity: final sparsity, in [0, 1).
      total_steps: optimizer steps of the whole training, a multiple of `cycles`.
      cycles: number of cycles.
      initial_sparsity: sparsity at the start of each cycle, in [0, sparsity].
      ramp: share of a cycle after which the sparsity no longer rises, in (0, 1].
      interval: steps between changes of the sparsity.
      recovery: "hard", "projected" or "straight_through".
      scope: "global": weights compete across layers; "layer": within each, at the
        sparsity that `distribution` gives it.
      distribution: with scope "layer"; and of the initial masks.
      structure: of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform`.

    Raises:
      ValueError, TypeError: an argument out of range or of the wrong type; a cycle
        whose last pruning would fall on the start of the next.

    References:
      Srinivas et al., Cyclical Pruning for Sparse Neural Networks, CVPR workshops,
      2022. Zhu & Gupta, To Prune, or Not to Prune, 2017 (the schedule of a cycle).
    """
    period = steps_per_cycle(total_steps, "cycles", cycles, cycles)
    check_choice("recovery", recovery, tuple(_WEIGHTS))
    if not is_number(ramp) or not 0.0 < ramp <= 1.0:
        raise ValueError(f"ramp must be a number in (0, 1], got {got(ramp)}.")
    check_steps("interval", interval)
    # Above the rounding of a product such as 0.29 * 100.
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
    phases = (Prune(), Revive(scores.gradient if partial else scores.magnitude))
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
