"""Schedules of sparsity and prune fraction, and the steps that update masks.

A schedule is a plain function of the step. It is evaluated on the host, in float64,
before training; a training step only indexes tables of integers. The first optimizer
step is step 1, and step 0 is the state before it.

The schedules here are records with a `__call__`, and not closures, so that equal ones
compare as equal, and can be pickled.
"""

import dataclasses
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
    """Regular steps: first, first + interval, and so on, up to last.

    There are no steps if last < first.
    """

    first: int
    last: int
    interval: int

    def steps(self) -> range:
        """All update steps, in order."""
        return range(self.first, self.last + 1, self.interval)

    def contains(self, step: Array) -> Array:
        """Whether `step`, an int32 scalar, is an update step."""
        return (
            (step >= self.first)
            & (step <= self.last)
            & ((step - self.first) % self.interval == 0)
        )

    def update_index(self, step: Array) -> Array:
        """The index of the last update up to `step`, clipped to a valid index."""
        index = (step - self.first) // self.interval
        return jnp.clip(index, 0, max(len(self.steps()) - 1, 0))

    def done(self, step: Array) -> Array:
        """The number of update steps up to and including `step`."""
        number = (step - self.first) // self.interval + 1
        return jnp.clip(number, 0, len(self.steps()))


class ListedSteps(NamedTuple):
    """Steps from a list, as `listed` returns them.

    Attributes:
      at: The steps, in increasing order.
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
        """The smallest distance between two steps; the step itself if there is one."""
        gaps = (b - a for a, b in itertools.pairwise(self.at))
        return min(gaps, default=self.first)

    def steps(self) -> tuple[int, ...]:
        """All update steps, in order."""
        return self.at

    def contains(self, step: Array) -> Array:
        """Whether `step`, an int32 scalar, is an update step."""
        return jnp.any(jnp.asarray(self.at, jnp.int32) == step)

    def update_index(self, step: Array) -> Array:
        """The index of the last update up to `step`, clipped to a valid index."""
        return jnp.maximum(self.done(step) - 1, 0)

    def done(self, step: Array) -> Array:
        """The number of update steps up to and including `step`."""
        return jnp.sum(jnp.asarray(self.at, jnp.int32) <= step, dtype=jnp.int32)


Steps = UpdateSteps | ListedSteps


def listed(steps: Sequence[int]) -> ListedSteps:
    """The steps of a list.

    Args:
      steps: One or more positive integers, in increasing order.

    Raises:
      TypeError, ValueError: `steps` is empty, does not increase, or does not consist of
        positive integers.
    """
    return increasing("steps", steps)


def increasing(name: str, steps: Sequence[int]) -> ListedSteps:
    """`listed`, with the name of the argument in error messages."""
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
    """The steps from 1 to `last` whose distance to `begin` is a multiple of `interval`.

    Raises:
      TypeError, ValueError: An argument is not a number of steps.
    """
    check_steps("interval", interval)
    check_steps("begin", begin, least=0)
    check_steps("last", last, least=0)
    return UpdateSteps(begin % interval or interval, last, interval)


def constant(value: float) -> Schedule:
    """The same finite value at every step."""
    check_number("value", value)
    return _Constant(value)


@dataclasses.dataclass(frozen=True)
class _Constant:
    value: float

    def __call__(self, step: int) -> float:
        return self.value


def cubic(
    initial: float, final: float, *, begin: int, end: int, interval: int
) -> Schedule:
    """Cubic sparsity schedule of Zhu & Gupta (2017).

    s(t) = final + (initial - final) (1 - j/n)^3 with n = (end - begin) // interval and
    j = (t - begin) // interval, clipped to [0, n]. At j = n the value is `final` to the
    bit. The GraNet code stops at j = n - 1 and never quite reaches the final sparsity.
    We reach it on purpose.

    Args:
      initial: Sparsity at the start, in [0, 1).
      final: Sparsity from the last update on, in [0, 1).
      begin: Step at which the sparsity begins to change.
      end: Last step at which it may change.
      interval: Steps between changes.

    Raises:
      TypeError, ValueError: An argument is out of range or of the wrong type, or
        `interval` does not fit between `begin` and `end`.
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
    return _Cubic(initial, final, begin, end, interval)


@dataclasses.dataclass(frozen=True)
class _Cubic:
    initial: float
    final: float
    begin: int
    end: int
    interval: int

    def __call__(self, step: int) -> float:
        updates = (self.end - self.begin) // self.interval
        index = min(max((step - self.begin) // self.interval, 0), updates)
        if index == updates:
            return self.final
        rest = (1.0 - index / updates) ** 3
        return self.final + (self.initial - self.final) * rest


def cosine(initial: float, final: float, *, steps: float) -> Schedule:
    """Cosine from `initial` at step 0 to `final` at step `steps`; `final` from then on.

    f(t) = final + (initial - final) (1 + cos(pi t / steps)) / 2.

    Raises:
      TypeError, ValueError: An argument is not a finite number, or `steps` is not
        larger than 0.
    """
    check_number("initial", initial)
    check_number("final", final)
    check_number("steps", steps, above=0.0)
    return _Cosine(initial, final, steps)


@dataclasses.dataclass(frozen=True)
class _Cosine:
    initial: float
    final: float
    steps: float

    def __call__(self, step: int) -> float:
        angle = math.pi * min(step / self.steps, 1.0)
        return self.final + (self.initial - self.final) * (1.0 + math.cos(angle)) / 2.0


def repeated(schedule: Schedule, *, period: int, cycles: int) -> Schedule:
    """Repeat a schedule every `period` steps, for `cycles` cycles.

    s(t) = schedule(t mod period) before the last cycle. The last cycle does not end: at
    t = cycles * period and after, the schedule continues instead of starting again.

    Args:
      schedule: Schedule of one cycle, from step 0 on.
      period: Steps of a cycle.
      cycles: Number of cycles.

    Raises:
      TypeError, ValueError: `schedule` is not a function, or `period` or `cycles` is
        not a positive integer.

    References:
      Srinivas et al., Cyclical Pruning for Sparse Neural Networks, 2022.
    """
    check_function("schedule", schedule, "a function of the step")
    check_steps("period", period)
    check_steps("cycles", cycles)
    return _Repeated(schedule, period, cycles)


@dataclasses.dataclass(frozen=True)
class _Repeated:
    schedule: Schedule
    period: int
    cycles: int

    def __call__(self, step: int) -> float:
        cycle = min(step // self.period, self.cycles - 1)
        return self.schedule(step - cycle * self.period)


def restarted(
    schedule: Callable[[Array], ArrayLike], period: int
) -> Callable[[ArrayLike], ArrayLike]:
    """Restart an optax schedule, such as a learning rate, every `period` steps.

    eta(t) = schedule(t mod period), where t counts the steps before the present one, as
    in optax: 0 in the first step of a cycle. A cosine for each cycle of P steps is::

        restarted(optax.cosine_decay_schedule(0.1, decay_steps=P), period=P)

    The triangle of SCULPT, from 0.2 to 1 to 0 of the learning rate, is::

        up = optax.linear_schedule(0.02, 0.1, P // 5)
        down = optax.linear_schedule(0.1, 0.0, P - P // 5)
        restarted(optax.join_schedules([up, down], [P // 5]), period=P)

    Args:
      schedule: Any optax schedule: a function from an int32 scalar array to a scalar.
      period: Steps of a cycle.

    Returns:
      An optax schedule.

    Raises:
      TypeError, ValueError: `schedule` is not a function, or `period` is not a positive
        integer.
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

    The double nearest to 0.1 lies just above 0.1, so that the ceiling of 0.1 * 10 in
    exact arithmetic would be 2. Rounding down makes ceil(fraction * n) the whole number
    that the user means, 1.
    """
    return min(math.floor(fraction * 2.0**32), 2**32 - 1)


def ceil_of(fraction: Array, count: Array) -> Array:
    """ceil(fraction * count / 2**32), exactly, in 32-bit integers.

    Args:
      fraction: uint32 scalar from `fixed_point`.
      count: uint32 array of any shape; uint64 where 64-bit types are enabled.

    Returns:
      Integers of the dtype and shape of `count`.
    """
    if count.dtype == jnp.uint64:
        # Halves of 32 bits keep every product within 64 bits.
        fraction = fraction.astype(jnp.uint64)
        high = (count >> 32) * fraction
        low = (count & 0xFFFFFFFF) * fraction
        return high + (low >> 32) + ((low & 0xFFFFFFFF) != 0).astype(jnp.uint64)
    count = count.astype(jnp.uint32)
    # Long multiplication by 16-bit halves gives both words of the 64-bit product.
    a1, a0 = fraction >> 16, fraction & 0xFFFF
    b1, b0 = count >> 16, count & 0xFFFF
    low = a0 * b0
    middle = a1 * b0 + (low >> 16)
    carry = a0 * b1 + (middle & 0xFFFF)
    high = a1 * b1 + (middle >> 16) + (carry >> 16)
    remainder = (carry << 16) | (low & 0xFFFF)
    return high + (remainder != 0).astype(jnp.uint32)
