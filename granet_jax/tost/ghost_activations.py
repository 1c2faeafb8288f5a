"""Ghost activations: smooth functions that become ReLU while the network trains.

Smooth activations help gradients through a sparse network early on; the network that
is wanted has ReLU. A ghost activation is a function of the input and of the step, so
that one compiled training step serves the whole ghost phase, and is ReLU to the bit
after it.
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
    """A smooth function that tends to ReLU as `beta` grows.

    - "swish": x sigmoid(beta x), at most 0.278465 / beta from ReLU;
    - "mish": x tanh(softplus(beta x)), at most 0.308843 / beta from it.

    Values and gradients are finite at all finite inputs.

    Args:
      x: floating array of any shape.
      beta: sharpness, a positive scalar; may be traced.
      kind: "swish" or "mish".

    Returns:
      Array of the shape and dtype of `x`.

    Raises:
      TypeError: `x` is not floating; `beta` is no number.
      ValueError: unknown `kind`; `beta` no positive scalar, as far as it is known.

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
    """A soft activation that is ReLU, to the bit, from `ghost_steps` on.

    Hand it to the network as an argument of the call, with the step in it::

        act = functools.partial(f, step=step)
        logits = model.apply(variables, x, act=act)

    After the ghost phase it gives what `jax.nn.relu` gives, but computes both: train
    on with `jax.nn.relu` itself then, in a step compiled anew.

    Args:
      kind: "swish" or "mish", see `soft_relu`.
      ghost_steps: length of the ghost phase in steps; None for a soft activation of
        sharpness `beta_0` that is kept throughout, as in the authors' code (their
        PSwish is "swish" with `beta_0=2`).
      beta_0: sharpness at step 0, above 0.
      beta_1: with form "sharpen", sharpness towards the end, at least `beta_0`.
      form: "sharpen": the sharpness grows, as `schedules.sharpening`; "blend":
        (1 - u) soft(x) + u ReLU(x) with sharpness `beta_0` and u = step / ghost_steps.

    Returns:
      A function of (x, step): x a floating array, step an int32 scalar, traced or not;
      it returns an array of the shape and dtype of x.

    Raises:
      TypeError, ValueError: an argument of the wrong type or out of range.

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
        over = jnp.asarray(step) >= ghost_steps
        relu = jax.nn.relu(x)
        # The branch not taken has a gradient of its own, which must not be NaN: after
        # the end it sees zeros, whatever x is.
        soft = soft_relu(jnp.where(over, jnp.zeros_like(x), x), sharpness(step), kind)
        if form == "blend":
            # In this form exact, and without overflow, where both are equal.
            left = 1.0 - ghost_schedules.progress(step, ghost_steps)
            soft = relu + left.astype(x.dtype) * (soft - relu)
        return jnp.where(over, relu, soft)

    return activation
