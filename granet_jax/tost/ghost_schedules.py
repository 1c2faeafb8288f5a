"""Schedules of the ghosts: functions of the step that are traced with it.

As optax's schedules they take a step, a Python int or an int32 scalar, and give a
float32 scalar; one compiled training step serves all steps. A step is the number of
optimizer steps done. The last step of the ghosts is `ghost_steps - 1`: from
`ghost_steps` on the network is the plain one.

The authors' published code has no schedule at all, and the paper's could not be had:
all of these are ours, but for what they start from.
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
    """How far the ghost phase is, u = step / ghost_steps in [0, 1], float32."""
    done = jnp.asarray(step).astype(jnp.float32) / ghost_steps
    return jnp.clip(done, 0.0, 1.0)


def constant(value: float) -> Schedule:
    """The same value at every step."""
    return lambda step: jnp.float32(value)


def sharpening(
    ghost_steps: int, *, beta_0: float = 1.0, beta_1: float = 100.0
) -> Schedule:
    """The sharpness of soft activations: beta_0 (beta_1 / beta_0)^u.

    With x sigmoid(beta x), the step to ReLU at the end is then 0.278465 / beta_1 a
    unit at most.

    Args:
      ghost_steps: length of the ghost phase in steps.
      beta_0: sharpness at step 0, above 0.
      beta_1: sharpness that `ghost_steps` would have, at least `beta_0`.

    Returns:
      A function from the step to the sharpness, finite at every step.

    Raises:
      TypeError, ValueError: an argument of the wrong type or out of range.
    """
    check_steps("ghost_steps", ghost_steps)
    check_number("beta_0", beta_0, above=0.0)
    check_number("beta_1", beta_1, least=float(beta_0))
    rate = math.log(beta_1 / beta_0)
    return lambda step: beta_0 * jnp.exp(rate * progress(step, ghost_steps))


def fading(
    ghost_steps: int | None, *, alpha_0: float = 1.0, decay: Decay = "linear"
) -> Schedule:
    """The coefficient of ghost skips: from alpha_0 to exactly 0 at `ghost_steps`.

    Linear, alpha_0 (1 - u), or cosine, alpha_0 (1 + cos(pi u)) / 2.

    Args:
      ghost_steps: length of the ghost phase in steps; None for skips that are kept,
        with the coefficient `alpha_0` throughout.
      alpha_0: coefficient at step 0, above 0.
      decay: "linear" or "cosine".

    Returns:
      A function from the step to the coefficient.

    Raises:
      TypeError, ValueError: an argument of the wrong type or out of range.
    """
    check_number("alpha_0", alpha_0, above=0.0)
    check_choice("decay", decay, DECAYS)
    if ghost_steps is None:
        return constant(alpha_0)
    check_steps("ghost_steps", ghost_steps)

    def coefficient(step: Array | int) -> Array:
        u = progress(step, ghost_steps)
        left = 1.0 - u if decay == "linear" else (1.0 + jnp.cos(math.pi * u)) / 2.0
        # By the integer, since a rounded cosine need not be zero at the end.
        return jnp.where(step < ghost_steps, alpha_0 * left, 0.0)

    return coefficient


def early(alpha: float, steps: int) -> Schedule:
    """The smoothing of labels at the start only: alpha before `steps`, then 0.

    Args:
      alpha: amount of smoothing, in [0, 1].
      steps: how many steps are smoothed.

    Returns:
      A function from the step to the amount.

    Raises:
      TypeError, ValueError: an argument of the wrong type or out of range.
    """
    check_number("alpha", alpha, least=0.0, most=1.0)
    check_steps("steps", steps)
    return lambda step: jnp.where(step < steps, jnp.float32(alpha), 0.0)
