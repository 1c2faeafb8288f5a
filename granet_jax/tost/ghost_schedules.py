"""Schedules of the ghosts: functions of the step that can be traced.

Like the schedules of optax, they take the number of optimizer steps done, a Python int
or an int32 scalar, and return a float32 scalar, so one compiled training step serves
all steps. The last step with ghosts is `ghost_steps - 1`; from `ghost_steps` on the
network is the plain one.

The authors' code has no schedules and the paper does not publish its own. All of these
are ours; only their initial values follow the authors.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jax import Array

from granet_jax.checks import check_choice, check_number, check_steps

Schedule = Callable[[Array | int], Array]
Decay = Literal["linear", "cosine"]
DECAYS: tuple[Decay, ...] = ("linear", "cosine")


def progress(step: Array | int, ghost_steps: int) -> Array:
    """Return the progress u = step / ghost_steps of the ghost phase, in [0, 1]."""
    fraction = jnp.asarray(step).astype(jnp.float32) / ghost_steps
    return jnp.clip(fraction, 0.0, 1.0)


def constant(value: float) -> Schedule:
    """Return a schedule with the same value at every step."""
    return lambda step: jnp.float32(value)


def sharpening(
    ghost_steps: int, *, beta_0: float = 1.0, beta_1: float = 100.0
) -> Schedule:
    """Return a schedule of the sharpness of soft activations, beta_0 (beta_1/beta_0)^u.

    With "swish", the final switch to ReLU then changes an activation by at most
    0.278465 / beta_1.

    Args:
      ghost_steps: Length of the ghost phase in steps.
      beta_0: Sharpness at step 0, above 0.
      beta_1: Sharpness at `ghost_steps`, at least `beta_0`.

    Returns:
      A function from the step to the sharpness, finite at every step.

    Raises:
      TypeError, ValueError: An argument of the wrong type or out of range.
    """
    check_steps("ghost_steps", ghost_steps)
    check_number("beta_0", beta_0, above=0.0)
    check_number("beta_1", beta_1, least=float(beta_0))
    rate = math.log(beta_1 / beta_0)
    return lambda step: beta_0 * jnp.exp(rate * progress(step, ghost_steps))


def fading(
    ghost_steps: int | None, *, alpha_0: float = 1.0, decay: Decay = "linear"
) -> Schedule:
    """Return a schedule of the coefficient of ghost skips, from alpha_0 down to 0.

    It is alpha_0 (1 - u) with decay "linear", and alpha_0 (1 + cos(pi u)) / 2 with
    "cosine". It is exactly 0 from `ghost_steps` on.

    Args:
      ghost_steps: Length of the ghost phase in steps; None to keep the skips, with
        coefficient `alpha_0` at every step.
      alpha_0: Coefficient at step 0, above 0.
      decay: "linear" or "cosine".

    Returns:
      A function from the step to the coefficient.

    Raises:
      TypeError, ValueError: An argument of the wrong type or out of range.
    """
    check_number("alpha_0", alpha_0, above=0.0)
    check_choice("decay", decay, DECAYS)
    if ghost_steps is None:
        return constant(alpha_0)
    check_steps("ghost_steps", ghost_steps)

    def coefficient(step: Array | int) -> Array:
        u = progress(step, ghost_steps)
        remaining = 1.0 - u if decay == "linear" else (1.0 + jnp.cos(math.pi * u)) / 2.0
        # A rounded cosine may not be zero at the end, so compare the integer step.
        return jnp.where(step < ghost_steps, alpha_0 * remaining, 0.0)

    return coefficient


def early(alpha: float, steps: int) -> Schedule:
    """Return a schedule that smooths labels at the start: alpha before `steps`, then 0.

    Args:
      alpha: Amount of smoothing, in [0, 1].
      steps: Number of steps with smoothed labels.

    Returns:
      A function from the step to the amount of smoothing.

    Raises:
      TypeError, ValueError: An argument of the wrong type or out of range.
    """
    check_number("alpha", alpha, least=0.0, most=1.0)
    check_steps("steps", steps)
    return lambda step: jnp.where(step < steps, jnp.float32(alpha), 0.0)
