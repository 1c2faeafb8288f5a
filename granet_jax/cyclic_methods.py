"""Methods whose sparsity rises and falls, or whose training starts over, in cycles.

Records of the same parts as those of `methods`. The learning rate belongs to the
optimizer: `schedules.restarted` starts one anew in every cycle.
"""

import bisect
import math
from collections.abc import Sequence
from typing import Literal

from granet_jax import schedules, scores
from granet_jax.checks import (
    check_choice,
    check_sparsity,
    check_steps,
    got,
    is_number,
)
from granet_jax.distributions import Distribution
from granet_jax.methods import Method, Weights, gradual
from granet_jax.schedules import UpdateSteps
from granet_jax.selection import Scope
from granet_jax.structures import Structure

Recovery = Literal["hard", "projected", "straight_through"]
_WEIGHTS: dict[str, Weights] = {
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
    period = _period(total_steps, "cycles", cycles, cycles)
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
    rise = gradual(sparsity, initial_sparsity, 0, end, interval)
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
    return Method(
        name="cyclical",
        sparsity=schedules.repeated(rise, period=period, cycles=cycles),
        updates=schedules.listed(steps),
        distribution=distribution,
        structure=structure,
        scope=scope,
        revive=scores.gradient if partial else scores.magnitude,
        needs_gradient=partial,
        weights=_WEIGHTS[recovery],
    )


def acdc(
    sparsity: float,
    switches: Sequence[int],
    *,
    scope: Scope = "global",
    distribution: Distribution = "uniform",
    structure: Structure | None = None,
) -> Method:
    """AC/DC: training that alternates between compressed and decompressed phases.

    Training starts dense. At the first of `switches`, and every second one after it,
    the weights of largest magnitude are kept and the others become zero, with the mask
    fixed until the next; there all take part again, the pruned ones from zero, and the
    moments of the whole optimizer start anew (the code's
    `reset_momentum_after_recycling`, on in all of its training scripts). So during a
    compressed phase it does not matter that the code lets the momentum of pruned
    weights go on.

    The code's switches, in epochs: `(*range(10, 80, 5), 85)` of 100 for ImageNet, and
    `range(10, 171, 40)` to compress with `range(30, 152, 40)` to decompress of 200 for
    CIFAR-100, that is `range(10, 171, 20)`.

    Args:
      sparsity: of compressed phases and at the end, in [0, 1).
      switches: the steps at whose end the phase changes, increasing; odd in number, so
        that training ends compressed.
      scope: "global": weights compete across layers; "layer": within each, at the
        sparsity that `distribution` gives it.
      distribution: with scope "layer".
      structure: of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform(method, inner)`.

    Raises:
      ValueError, TypeError: an argument out of range or of the wrong type.

    References:
      Peste et al., AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural
      Networks, NeurIPS 2021; code: IST-DASLab/ACDC.
    """
    check_sparsity("sparsity", sparsity)
    updates = schedules.increasing("switches", switches)
    if len(updates.at) % 2 == 0:
        raise ValueError(
            "switches must be odd in number, to compress first and last, got "
            f"{len(updates.at)}: training would end dense. Leave the last one out."
        )
    resets = updates.at[1::2]

    def alternating(step: int) -> float:
        return sparsity if bisect.bisect(updates.at, step) % 2 else 0.0

    return Method(
        name="acdc",
        sparsity=alternating,
        updates=updates,
        distribution=distribution,
        structure=structure,
        scope=scope,
        revive=scores.magnitude,
        resets=schedules.listed(resets) if resets else schedules.NEVER,
    )


def sculpt(
    sparsity: float,
    total_steps: int,
    *,
    cycles: int,
    initial_sparsity: float = 0.8,
    scope: Scope = "global",
    distribution: Distribution = "erk",
    structure: Structure | None = None,
) -> Method:
    """SCULPT-ing: cyclic training of a fixed mask, one pruning, and another cycle.

    A mask of `initial_sparsity` is trained for `cycles` cycles, each with an optimizer
    of its own (moments start anew; the learning rate by `schedules.restarted`) and all
    with the weights carried on; then magnitude prunes what is left to `sparsity`, once,
    and one more cycle of the same length ends the training.

    The mask is a random one, or that given as `transform(masks=...)`: of
    `initial_sparsity`, by SNIP or SynFlow for instance.

    Args:
      sparsity: at the end, in [initial_sparsity, 1).
      total_steps: optimizer steps of the whole training, a multiple of `cycles` + 1.
      cycles: number of cycles before the pruning. (The paper's is not known to us.)
      initial_sparsity: of the fixed mask.
      scope: of the pruning: "global", as in the code, or "layer".
      distribution: of the random mask; and of the pruning with scope "layer". (The
        code's ERK draws every weight by itself and clips without redistributing.)
      structure: of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform(method, inner)`.

    Raises:
      ValueError, TypeError: an argument out of range or of the wrong type.

    References:
      Gadhikar et al., Cyclic Sparse Training: Is it Enough?, 2024; code:
      nelaturuharsha/TurboPrune, `sclpt_harness.py`.
    """
    check_sparsity("sparsity", sparsity)
    check_sparsity("initial_sparsity", initial_sparsity)
    if initial_sparsity > sparsity:
        raise ValueError(
            "initial_sparsity must be at most sparsity, got "
            f"initial_sparsity={initial_sparsity} with sparsity={sparsity}."
        )
    check_steps("cycles", cycles)
    period = _period(total_steps, "cycles", cycles, cycles + 1)
    end = cycles * period
    return Method(
        name="sculpt",
        sparsity=lambda step: sparsity if step >= end else initial_sparsity,
        updates=UpdateSteps(end, end, period),
        distribution=distribution,
        structure=structure,
        scope=scope,
        resets=UpdateSteps(period, end, period),
    )


def _period(total_steps: int, name: str, cycles: int, number: int) -> int:
    """Steps of each of `number` cycles, checked; `name` and `cycles` as given."""
    check_steps("total_steps", total_steps)
    check_steps(name, cycles)
    if total_steps % number:
        lower, upper = total_steps // number * number, -(-total_steps // number)
        raise ValueError(
            f"total_steps must be a multiple of the {number} cycles, got "
            f"{total_steps}: training would end within a cycle, away from its final "
            f"sparsity. Take {f'{lower} or ' if lower else ''}{upper * number} steps."
        )
    return total_steps // number
