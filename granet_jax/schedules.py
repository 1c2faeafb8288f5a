"""Sparsity and prune fraction as functions of the step, and which steps update.

The schedules are plain functions of a step, evaluated on the host in float64 before
training; inside the step only their integer tables are indexed. A step is the number
of optimizer steps done, 1 after the first.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

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


NEVER = UpdateSteps(first=1, last=0, interval=1)


def every(interval: int, *, begin: int = 0, last: int) -> UpdateSteps:
    """The steps from 1 to `last` that lie a multiple of `interval` from `begin`."""
    return UpdateSteps(begin % interval or interval, last, interval)


def constant(value: float) -> Schedule:
    """The same value at every step."""
    return lambda step: value


def cubic(
    initial: float, final: float, *, begin: int, end: int, interval: int
) -> Schedule:
    """Cubic sparsity schedule of Zhu & Gupta (2017), in steps of `interval`.

    s(t) = final + (initial - final) (1 - j/n)^3 with j = (t - begin) // interval,
    n = (end - begin) // interval, and j held within [0, n]. At j = n the value is
    `final` to the bit. The GraNet code stops at j = n - 1 and so never quite reaches
    the final sparsity; we do, on purpose.
    """
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
    """

    def value(step: int) -> float:
        angle = math.pi * min(step / steps, 1.0)
        return final + (initial - final) * (1.0 + math.cos(angle)) / 2.0

    return value


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
