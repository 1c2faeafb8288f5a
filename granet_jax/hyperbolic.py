"""HAM: an optimizer's step, followed by one that scales each weight."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from granet_jax.checks import check_number
from granet_jax.masking import PyTree

# The exponent is clipped to this size, as in the authors' code.
_LARGEST_EXPONENT = 5.0


class HyperbolicState(NamedTuple):
    """State of `hyperbolic`.

    Attributes:
      count: Number of steps, int32 scalar.
      inner_state: State of the inner optimizer.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    inner_state: Any


def hyperbolic(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    alpha: float = 200.0,
    beta: float = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """Add the sign-aware exponential step of HAM to an optimizer.

    After the optimizer's step, every weight w of a kernel, with gradient g, becomes ::

        w exp(clip(-lr (alpha sign(w) g + beta), -5, 5))

    So weights that should grow, grow in proportion to their size, and zeros stay zero.
    Pass it as `inner`::

        inner = granet_jax.hyperbolic(optax.sgd(0.1, momentum=0.9), 0.1)
        tx = granet_jax.transform(granet_jax.rigl(0.9, total_steps), inner)

    Leaves of fewer than two dimensions (biases, norms) take the optimizer's step only.

    Args:
      inner: The optimizer.
      learning_rate: The learning rate lr, or a schedule of it, usually that of `inner`.
      alpha: Strength of the gradient, 0 or larger.
      beta: Strength of the pull to zero, 0 or larger.

    Returns:
      An optimizer, which needs `params` in `update`.

    Raises:
      TypeError, ValueError: An argument is out of range or of the wrong type.

    References:
      Jacobs et al., HAM: A Hyperbolic Step to Regulate Implicit Bias, 2025. The authors
      clip the gradient's norm at 20; chain `optax.clip_by_global_norm` before for that.
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"inner must be an optax optimizer, got {inner!r}.")
    check_number("alpha", alpha, least=0.0)
    check_number("beta", beta, least=0.0)
    if not callable(learning_rate) and not isinstance(learning_rate, jax.Array):
        check_number("learning_rate", learning_rate, least=0.0)
    optimizer = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> HyperbolicState:
        return HyperbolicState(jnp.zeros((), jnp.int32), optimizer.init(params))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, HyperbolicState]:
        if params is None:
            raise ValueError(
                "params must be given to update: call tx.update(grads, state, params)."
            )
        given = learning_rate
        rate: Any = given(state.count) if callable(given) else given
        steps, inner_state = optimizer.update(
            updates, state.inner_state, params, **extra
        )

        def scaled(step: Array, gradient: Array, weight: Array) -> Array:
            if weight.ndim < 2:
                return step
            after = weight + step.astype(weight.dtype)
            exponent = -rate * (alpha * jnp.sign(after) * gradient + beta)
            exponent = jnp.clip(exponent, -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
            return after * jnp.exp(exponent).astype(weight.dtype) - weight

        steps = jax.tree.map(scaled, steps, updates, params)
        count = jnp.asarray(optax.safe_increment(state.count))
        return steps, HyperbolicState(count, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
