"""What the analysis of jaxprs says of a function is true of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from granet_jax import scores
from granet_jax.elementwise import is_elementwise, is_light

X = jnp.ones((4, 3))
KEY = jax.random.key(0)


def score(function: Callable[[scores.ScoreInputs], Any]) -> Callable[..., Any]:
    return lambda x: function(scores.ScoreInputs(x, x, x > 0, x, KEY))


def looped(x: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, 3, lambda _, y: y + 1.0, x)


LIGHT = {
    "magnitude": score(scores.magnitude),
    "gradient": score(scores.gradient),
    "cast": lambda x: jnp.abs(x.astype(jnp.bfloat16)),
    "a nested jit": jax.jit(lambda x: jax.jit(jnp.sqrt)(x) * 2.0),
    "a choice": lambda x: jnp.where(x > 0.5, x, -x),
    "a branch": lambda x: jax.lax.cond(jnp.ones(()) > 0, jnp.negative, jnp.abs, x),
    "sums of scalars": lambda x: x * jnp.sum(jnp.ones(1)),
}
# Entries of these need more than arithmetic on what lies at their place.
HEAVY = {
    "random": score(scores.random),
    "a sum": lambda x: x / jnp.sum(x),
    "a product": lambda x: x @ jnp.ones((3, 3)),
    "a sort": lambda x: jnp.sort(x, axis=0),
    "a transposition": lambda x: x.T,
    "a loop": looped,
    "a sum in a nested jit": jax.jit(lambda x: x - jax.jit(jnp.mean)(x)),
    "a sum in a branch": lambda x: jax.lax.cond(
        jnp.ones(()) > 0, jnp.abs, lambda x: x - jnp.sum(x), x
    ),
}


@pytest.mark.parametrize("name", LIGHT)
def test_arithmetic_by_position_is_light(name: str) -> None:
    assert is_light(jax.make_jaxpr(LIGHT[name])(X).jaxpr)


@pytest.mark.parametrize("name", HEAVY)
def test_anything_else_is_not(name: str) -> None:
    assert not is_light(jax.make_jaxpr(HEAVY[name])(X).jaxpr)


ZERO_STAYS = {
    "a product": lambda x, y: x * y,
    "a quotient": lambda x, y: x / (1.0 + jnp.abs(y)),
    "a power": lambda x, y: x**3,
    "a choice of two": lambda x, y: jnp.where(y > 0, x, 2 * x),
    "a branch": lambda x, y: jax.lax.cond(y[0, 0] > 0, jnp.tanh, jnp.negative, x),
    "a nested jit": jax.jit(lambda x, y: jax.jit(jnp.expm1)(x) + x),
    "a quotient by a root": lambda x, y: x / (jnp.sqrt(x * x) + 1e-8),
    "a product with a root": lambda x, y: x * jax.lax.rsqrt(x * x + 1e-8),
    "two that cancel": lambda x, y: jnp.cos(x) - 1.0,
    "a quotient of powers": lambda x, y: x / (2.0 + x**2) ** 3,
}
ZERO_MOVES = {
    "an exponential": lambda x, y: jnp.exp(x),
    "a cosine": lambda x, y: jnp.cos(x),
    "a sum with another": lambda x, y: x + y,
    "a quotient by it": lambda x, y: y / x,
    "a power of zero": lambda x, y: jax.lax.integer_pow(x, 0),
    "a choice of another": lambda x, y: jnp.where(y > 0, x, y),
    "a branch of another": lambda x, y: jax.lax.cond(
        y[0, 0] > 0, lambda x: x, lambda x: x + 1.0, x
    ),
    "a comparison": lambda x, y: (x >= 0).astype(x.dtype),
    # At zero these are not zero but NaN.
    "a quotient by its root": lambda x, y: x / jnp.sqrt(x * x),
    "a product with its inverse": lambda x, y: x * jax.lax.rsqrt(x * x),
    "a product with its logarithm": lambda x, y: x * jnp.log(jnp.abs(x)),
    "a product with its power": lambda x, y: x * jnp.abs(x) ** y,
    "a product with a choice of it": lambda x, y: x * jnp.where(y > 0, y, 1.0 / x),
    "an epsilon that rounds to zero": lambda x, y: (
        x * jax.lax.rsqrt(x.astype(jnp.float16) ** 2 + 1e-8).astype(x.dtype)
    ),
}
ENTRIES_MIX = {
    "a norm": lambda x, y: x / (1.0 + jnp.sum(x**2)),
    "a row's mean": lambda x, y: x - jnp.mean(x, axis=0, keepdims=True),
    "a flip": lambda x, y: x[::-1],
    "a flat one": lambda x, y: x.reshape(3, 4),
    "a branch by it": lambda x, y: jax.lax.cond(
        x[0, 0] > 0, lambda x: x, lambda x: 2 * x, x
    ),
    "a loop": lambda x, y: looped(x) - 3.0,
}


def first_masked(function: Callable[..., Any]) -> bool:
    return is_elementwise(function, (X, X), (True, False), (True,))


@pytest.mark.parametrize("name", ZERO_STAYS)
def test_zeros_that_stay(name: str) -> None:
    assert first_masked(ZERO_STAYS[name])
    x, y = jax.random.normal(KEY, (2, 4, 3)) * jnp.ones((2, 4, 3)).at[0, 1].set(0.0)
    assert not ZERO_STAYS[name](x, y)[1].any()


@pytest.mark.parametrize("name", [*ZERO_MOVES, *ENTRIES_MIX])
def test_what_is_not_proved(name: str) -> None:
    assert not first_masked({**ZERO_MOVES, **ENTRIES_MIX}[name])


def test_an_output_that_is_not_masked_must_not_depend_on_masked_ones() -> None:
    def both(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        return 2.0 * x, x + y

    assert not is_elementwise(both, (X, X), (True, False), (True, False))
    assert is_elementwise(
        lambda x, y: (2.0 * x, 2.0 * y), (X, X), (True, False), (True, False)
    )


# With float16 its epsilon of 1e-8 is zero, and the root of a moment's inverse infinite.
@pytest.mark.parametrize(("dtype", "proved"), [("float32", True), ("float16", False)])
def test_an_optimizer_whose_epsilon_may_round_to_zero(dtype: str, proved: bool) -> None:
    inner = optax.rmsprop(0.1, momentum=0.5)
    params = {"w": jnp.ones((4, 3), dtype)}
    state = inner.init(params)
    moments = [x.shape == (4, 3) for x in jax.tree.leaves(state)]
    arguments, masked = (params, state, params), [True, *moments, True]
    assert is_elementwise(inner.update, arguments, masked, [True, *moments]) == proved
    # And so it is.
    _, after = inner.update(jax.tree.map(jnp.zeros_like, params), state, params)
    assert proved == all(not x.any() for x in jax.tree.leaves(after) if x.ndim)
