"""Sparsity and prune fraction as functions of the step, and which steps update.

The schedules are plain functions of a step, evaluated on the host in float64 before
training; inside the step only their integer tables are indexed. A step is the number
of optimizer steps done, 1 after the first.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from granet_jax.checks import (
    check_function,
    check_number,
    check_sparsity,
    check_steps,
    got,
)

Schedule = Callable[[int], float]


class UpdateSteps(NamedTuple):
    """The steps that update the masks: first, first + interval, ..., up to last.

    No step at all where last < first.
    """

    first: int
    last: int
    interval: int

    def steps(self) -> range:
        """All update steps, in order."""
        return range(self.first, self.last + 1, self.interval)

    def contains(self, step: Array) -> Array:
        """Whether `step` (an int32 scalar, traced or not) is an update step."""
        return (
            (step >= self.first)
            & (step <= self.last)
            & ((step - self.first) % self.interval == 0)
        )

    def update_index(self, step: Array) -> Array:
        """Which update `step` is, from 0; a valid index of `steps()` at every step."""
        index = (step - self.first) // self.interval
        return jnp.clip(index, 0, max(len(self.steps()) - 1, 0))

    def done(self, step: Array) -> Array:
        """How many update steps there are up to `step`, itself included."""
        done = (step - self.first) // self.interval + 1
        return jnp.clip(done, 0, len(self.steps()))


class ListedSteps(NamedTuple):
    """The steps `at` update the masks: any increasing ones, made by `listed`.

    It serves wherever `UpdateSteps` does.
    """

    at: tuple[int, ...]

    @property
    def first(self) -> int:
        """The first of the steps."""
        return self.at[0]

    @property
    def last(self) -> int:
        """The last of the steps."""
        return self.at[-1]

    @property
    def interval(self) -> int:
        """The fewest steps from one to the next; the first itself, of only one."""
        gaps = (b - a for a, b in itertools.pairwise(self.at))
        return min(gaps, default=self.first)

    def steps(self) -> tuple[int, ...]:
        """All update steps, in order."""
        return self.at

    def contains(self, step: Array) -> Array:
        """Whether `step` (an int32 scalar, traced or not) is an update step."""
        return jnp.any(jnp.asarray(self.at, jnp.int32) == step)

    def update_index(self, step: Array) -> Array:
        """Which update `step` is, from 0; a valid index of `steps()` at every step."""
        return jnp.maximum(self.done(step) - 1, 0)

    def done(self, step: Array) -> Array:
        """How many update steps there are up to `step`, itself included."""
        return jnp.sum(jnp.asarray(self.at, jnp.int32) <= step, dtype=jnp.int32)


Steps = UpdateSteps | ListedSteps


def listed(steps: Sequence[int]) -> ListedSteps:
    """The steps given: one or more, from 1 on, increasing.

    Raises:
      TypeError, ValueError: no steps; no integers; not increasing.
    """
    return increasing("steps", steps)


def increasing(name: str, steps: Sequence[int]) -> ListedSteps:
    """As `listed`, of an argument of this name."""
    if not isinstance(steps, Iterable):
        raise TypeError(f"{name} must be a sequence of steps, got {got(steps)}.")
    at = tuple(steps)
    if not at:
        raise ValueError(f"{name} must hold one or more steps, got none.")
    for step in at:
        check_steps(name, step)
    if any(b <= a for a, b in itertools.pairwise(at)):
        raise ValueError(f"{name} must increase from one to the next, got {at}.")
    return ListedSteps(tuple(int(step) for step in at))


NEVER = UpdateSteps(first=1, last=0, interval=1)


def every(interval: int, *, begin: int = 0, last: int) -> UpdateSteps:
    """The steps from 1 to `last` that lie a multiple of `interval` from `begin`.

    Raises:
      TypeError, ValueError: an argument that is no number of steps.
    """
    check_steps("interval", interval)
    check_steps("begin", begin, least=0)
    check_steps("last", last, least=0)
    return UpdateSteps(begin % interval or interval, last, interval)


def constant(value: float) -> Schedule:
    """The same value at every step; a finite number."""
    check_number("value", value, least=-math.inf)
    return lambda step: value


def cubic(
    initial: float, final: float, *, begin: int, end: int, interval: int
) -> Schedule:
    """Cubic sparsity schedule of Zhu & Gupta (2017), in steps of `interval`.

    s(t) = final + (initial - final) (1 - j/n)^3 with j = (t - begin) // interval,
    n = (end - begin) // interval, and j held within [0, n]. At j = n the value is
    `final` to the bit. The GraNet code stops at j = n - 1 and so never quite reaches
    the final sparsity; we do, on purpose.

    Raises:
      TypeError, ValueError: sparsities that are no numbers in [0, 1), steps that are
        none, or an interval that does not fit between them.
    """
    check_sparsity("initial", initial)
    check_sparsity("final", final)
    check_steps("begin", begin, least=0)
    check_steps("end", end)
    check_steps("interval", interval)
    if interval > end - begin:
        raise ValueError(
            f"interval must fit between begin and end, got interval={interval} with "
            f"begin={begin} and end={end}."
        )
    updates = (end - begin) // interval

    def sparsity(step: int) -> float:
        done = min(max((step - begin) // interval, 0), updates)
        if done == updates:
            return final
        return final + (initial - final) * (1.0 - done / updates) ** 3

    return sparsity


def cosine(initial: float, final: float, *, steps: float) -> Schedule:
    """Cosine from `initial` at step 0 to `final` at `steps`, and `final` after.

    f(t) = final + (initial - final) (1 + cos(pi t / steps)) / 2.

    Raises:
      TypeError, ValueError: an argument that is no finite number; `steps` not above 0.
    """
    check_number("initial", initial, least=-math.inf)
    check_number("final", final, least=-math.inf)
    check_number("steps", steps, above=0.0)

    def value(step: int) -> float:
        angle = math.pi * min(step / steps, 1.0)
        return final + (initial - final) * (1.0 + math.cos(angle)) / 2.0

    return value


def repeated(schedule: Schedule, *, period: int, cycles: int) -> Schedule:
    """A schedule that starts anew every `period` steps, `cycles` times over.

    s(t) = schedule(t mod period), but after the last cycle, and so at its end
    t = cycles * period, the schedule goes on: it does not start once more.

    Args:
      schedule: of one cycle, from step 0 on.
      period: steps of a cycle.
      cycles: how often the schedule runs.

    Raises:
      TypeError, ValueError: `schedule` is no function; a period or a number of cycles
        that is no integer from 1 on.

    References:
      Srinivas et al., Cyclical Pruning for Sparse Neural Networks, 2022.
    """
    check_function("schedule", schedule, "a function of the step")
    check_steps("period", period)
    check_steps("cycles", cycles)

    def value(step: int) -> float:
        return schedule(step - min(step // period, cycles - 1) * period)

    return value


def restarted(
    schedule: Callable[[Array], ArrayLike], period: int
) -> Callable[[ArrayLike], ArrayLike]:
    """An optax schedule, of the learning rate say, that starts anew every `period`.

    eta(t) = schedule(t mod period), with t the steps taken before, as optax counts
    them: 0 in the first step of each cycle. So a cosine per cycle of P steps is::

        restarted(optax.cosine_decay_schedule(0.1, decay_steps=P), period=P)

    and SCULPT's triangle, from 0.2 to 1 to 0 of the rate, is::

        up = optax.linear_schedule(0.02, 0.1, P // 5)
        down = optax.linear_schedule(0.1, 0.0, P - P // 5)
        restarted(optax.join_schedules([up, down], [P // 5]), period=P)

    Args:
      schedule: from an int32 scalar array to a scalar; any optax schedule.
      period: steps of a cycle.

    Returns:
      A function of the step like `schedule`, for an optax optimizer.

    Raises:
      TypeError, ValueError: `schedule` is no function; a period that is no integer
        from 1 on.
    """
    if not callable(schedule):
        raise TypeError(
            f"schedule must be a function of the step, got {schedule!r}: a constant "
            "has nothing to restart."
        )
    check_steps("period", period)
    return lambda count: schedule(jnp.asarray(count) % period)


def fixed_point(fraction: float) -> int:
    """`fraction` in [0, 1] as a multiple of 2**-32, rounded down; 1 becomes 2**32 - 1.

    Rounding down keeps ceil(fraction * n) at the value meant where fraction * n is a
    whole number but the nearest double lies just above: 0.1 of 10 is 1, not 2.
    """
    return min(math.floor(fraction * 2.0**32), 2**32 - 1)


def ceil_of(fraction: Array, count: Array) -> Array:
    """ceil(fraction * count / 2**32), exactly, in 32-bit integers.

    Args:
      fraction: uint32, from `fixed_point`.
      count: uint32 (or uint64, where 64-bit types are enabled), of any shape.

    Returns:
      Integers of the dtype and shape of `count`.
    """
    if count.dtype == jnp.uint64:
        # Split so that no product exceeds 64 bits.
        fraction = fraction.astype(jnp.uint64)
        high = (count >> 32) * fraction
        low = (count & 0xFFFFFFFF) * fraction
        return high + (low >> 32) + ((low & 0xFFFFFFFF) != 0).astype(jnp.uint64)
    count = count.astype(jnp.uint32)
    # Schoolbook product of 16-bit halves: high and low word of the 64-bit product.
    a1, a0 = fraction >> 16, fraction & 0xFFFF
    b1, b0 = count >> 16, count & 0xFFFF
    low = a0 * b0
    middle = a1 * b0 + (low >> 16)
    carry = a0 * b1 + (middle & 0xFFFF)
    high = a1 * b1 + (middle >> 16) + (carry >> 16)
    remainder = (carry << 16) | (low & 0xFFFF)
    return high + (remainder != 0).astype(jnp.uint32)
