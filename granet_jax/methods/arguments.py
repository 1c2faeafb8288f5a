"""Argument checks and fields that several methods share."""

import dataclasses
import math
from typing import Any

from granet_jax import schedules
from granet_jax.checks import (
    check_fraction,
    check_sparsity,
    check_steps,
    got,
    is_number,
)
from granet_jax.distributions import Distribution
from granet_jax.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class Jump:
    """A schedule: `before` until step `at`, and `after` from it on."""

    before: float
    after: float
    at: int

    def __call__(self, step: int) -> float:
        """The value at a step."""
        return self.after if step >= self.at else self.before


def cubic_schedule(
    final: float, initial: float, begin: int, end: int, interval: int
) -> Schedule:
    """Check the arguments of a cubic sparsity schedule, and return the schedule."""
    check_sparsity("sparsity", final)
    check_sparsity("initial_sparsity", initial)
    if initial > final:
        raise ValueError(
            "initial_sparsity must be at most sparsity, got "
            f"initial_sparsity={initial} with sparsity={final}."
        )
    check_steps("begin_step", begin, least=0)
    check_steps("end_step", end)
    check_steps("interval", interval)
    if end <= begin:
        raise ValueError(
            f"end_step must be after begin_step, got end_step={end} with "
            f"begin_step={begin}."
        )
    if end - begin < interval:
        raise ValueError(
            f"interval must fit between begin_step and end_step, got "
            f"interval={interval} with begin_step={begin} and end_step={end}: no "
            "update would prune. Take a shorter interval or a later end_step."
        )
    return schedules.cubic(initial, final, begin=begin, end=end, interval=interval)


@dataclasses.dataclass(frozen=True)
class Until:
    """A schedule that is 0 after the step `last`."""

    schedule: Schedule
    last: int

    def __call__(self, step: int) -> float:
        """The value at a step."""
        return self.schedule(step) if step <= self.last else 0.0


def constant_sparsity(
    sparsity: float,
    total_steps: int,
    interval: int,
    fraction: float,
    distribution: Distribution,
    stop: float = 1.0,
) -> dict[str, Any]:
    """Check the fields that methods of constant sparsity share, and return them.

    The last update is at step stop * total_steps at the latest, and early enough that
    `last_growth` allows it.
    """
    check_sparsity("sparsity", sparsity)
    check_steps("total_steps", total_steps)
    check_steps("interval", interval)
    check_fraction("fraction", fraction)
    if not is_number(stop) or not 0.0 < stop <= 1.0:
        raise ValueError(f"stop must be a number in (0, 1], got {got(stop)}.")
    # The small addend undoes the rounding error of a product such as 0.29 * 100.
    end = math.floor(stop * total_steps + 1e-6)
    if interval > min(end, total_steps // 2):
        raise ValueError(
            f"interval must be at most {min(end, total_steps // 2)}, got {interval}: "
            f"updates end at step {end} of {total_steps}, and one interval before the "
            "end of training, so the masks would never change. For fixed masks use "
            "static()."
        )
    last = min(end, last_growth(total_steps, interval))
    return {
        "sparsity": schedules.constant(sparsity),
        "updates": schedules.every(interval, last=last),
        "distribution": distribution,
    }


def last_growth(total_steps: int, interval: int) -> int:
    """The last step at which weights may grow: one interval before the end.

    A weight starts at zero when it grows. So every weight of the result was trained for
    one interval at least.
    """
    return total_steps - interval


def steps_per_cycle(total_steps: int, name: str, cycles: int, number: int) -> int:
    """Check the arguments of a cyclic method, and return the steps of one cycle.

    Args:
      total_steps: Optimizer steps of the whole training.
      name: Name of the argument that holds the number of cycles.
      cycles: Value of that argument.
      number: Number of cycles into which the training divides.
    """
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
