"""Ghost activations: smooth functions that become ReLU while the network trains.

Smooth activations help gradients pass through a sparse network early in training, but
the trained network should have ReLU. A ghost activation is a function of the input and
the step, so one compiled training step serves the whole ghost phase. After that phase
it equals ReLU to the bit.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from granet_jax.checks import check_choice, check_number, check_steps
from granet_jax.tost import ghost_schedules

Kind = Literal["swish", "mish"]
KINDS: tuple[Kind, ...] = ("swish", "mish")
Form = Literal["sharpen", "blend"]
FORMS: tuple[Form, ...] = ("sharpen", "blend")


def soft_relu(x: Array, beta: Array | float = 1.0, kind: Kind = "swish") -> Array:
    """Apply a smooth function that tends to ReLU as `beta` grows.

    - "swish": x sigmoid(beta x), which differs from ReLU by at most 0.278465 / beta;
    - "mish": x tanh(softplus(beta x)), which differs by at most 0.308843 / beta.

    Values and gradients are finite at all finite inputs.

    Args:
      x: Floating array of any shape.
      beta: Sharpness, a positive scalar; may be traced.
      kind: "swish" or "mish".

    Returns:
      Array of the shape and dtype of `x`.

    Raises:
      TypeError: `x` is not floating, or `beta` is not a number.
      ValueError: Unknown `kind`, or a `beta` that is not a positive scalar. The value
        of a traced `beta` is not checked.

    References:
      Ramachandran et al., Searching for Activation Functions, 2017. Misra, Mish, BMVC
      2020.
    """
    check_choice("kind", kind, KINDS)
    if not hasattr(x, "dtype"):
        raise TypeError(f"x must be a floating array, got {x!r}.")
    if jnp.ndim(beta) != 0:
        raise ValueError(f"beta must be a scalar, got shape {jnp.shape(beta)}.")
    if not isinstance(beta, Tracer):
        check_number("beta", np.asarray(beta).item(), above=0.0)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating, got dtype {x.dtype}: convert it.")
    z = jnp.asarray(beta, x.dtype) * x
    if kind == "swish":
        return x * jax.nn.sigmoid(z)
    return x * jnp.tanh(jax.nn.softplus(z))


def ghost_activation(
    kind: Kind = "swish",
    *,
    ghost_steps: int | None,
    beta_0: float = 1.0,
    beta_1: float = 100.0,
    form: Form = "sharpen",
) -> Callable[[Array, Array | int], Array]:
    """Return a soft activation that equals ReLU, to the bit, from `ghost_steps` on.

    Pass it to the network as an argument of the call, together with the step::

        act = functools.partial(f, step=step)
        logits = model.apply(variables, x, act=act)

    After the ghost phase it still computes the soft activation as well, so continue
    with `jax.nn.relu` itself, in a newly compiled training step.

    Args:
      kind: "swish" or "mish", see `soft_relu`.
      ghost_steps: Length of the ghost phase in steps; None to keep a soft activation of
        sharpness `beta_0` at every step, as in the authors' code. Their PSwish is
        "swish" with `beta_0=2`.
      beta_0: Sharpness at step 0, above 0.
      beta_1: Final sharpness with form "sharpen", at least `beta_0`.
      form: "sharpen" to increase the sharpness by the schedule `sharpening`; "blend"
        for (1 - u) soft(x) + u ReLU(x) with sharpness `beta_0` and
        u = step / ghost_steps.

    Returns:
      A function of (x, step), for x a floating array and step an int32 scalar, traced
      or not. It returns an array of the shape and dtype of x.

    Raises:
      TypeError, ValueError: An argument of the wrong type or out of range.

    References:
      Jaiswal et al., Training Your Sparse Neural Network Better with Any Mask, ICML
      2022. The schedules are ours.
    """
    check_choice("kind", kind, KINDS)
    check_choice("form", form, FORMS)
    check_number("beta_0", beta_0, above=0.0)
    if ghost_steps is None:
        return lambda x, step: soft_relu(x, beta_0, kind)
    check_steps("ghost_steps", ghost_steps)
    sharpness = (
        ghost_schedules.sharpening(ghost_steps, beta_0=beta_0, beta_1=beta_1)
        if form == "sharpen"
        else lambda step: jnp.float32(beta_0)
    )

    def activation(x: Array, step: Array | int) -> Array:
        is_over = jnp.asarray(step) >= ghost_steps
        relu = jax.nn.relu(x)
        # The gradient flows through both branches of a where. Zeros keep that of the
        # soft branch from being NaN after the ghost phase, whatever x is.
        safe = jnp.where(is_over, jnp.zeros_like(x), x)
        soft = soft_relu(safe, sharpness(step), kind)
        if form == "blend":
            # This form of the blend is exact where soft and relu are equal, and it
            # cannot overflow there.
            remaining = 1.0 - ghost_schedules.progress(step, ghost_steps)
            soft = relu + remaining.astype(x.dtype) * (soft - relu)
        return jnp.where(is_over, relu, soft)

    return activation
