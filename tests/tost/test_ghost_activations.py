"""Ghost activations: their distance from ReLU, exactly ReLU at the end, no NaN."""

import functools
import re
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from granet_jax import tost
from granet_jax.tost import ghost_schedules as schedules

# Least upper bounds of |soft(x) - ReLU(x)|, times beta, and where they are reached.
SUPREMA = {"swish": (0.278465, 1.27845), "mish": (0.308843, -1.19244)}
FORMS = [(kind, form) for kind in ("swish", "mish") for form in ("sharpen", "blend")]
GHOST_STEPS = 8


def extremes(dtype: str) -> list[float]:
    """Small numbers, and then 1e30, or the largest there is if that is less."""
    large = min(1e30, float(jnp.finfo(dtype).max))
    return [0.0, -0.0, 1e-30, -1e-30, 1.5, -1.5, large, -large]


def numpy_soft(x: np.ndarray, beta: float, kind: str) -> np.ndarray:
    """The definitions, in float64."""
    z = beta * np.asarray(x, np.float64)
    softplus = np.logaddexp(z, 0.0)
    return x * (np.exp(z - softplus) if kind == "swish" else np.tanh(softplus))


@hypothesis.given(
    st.floats(-50, 50, width=32), st.floats(0.25, 100), st.sampled_from([*SUPREMA])
)
def test_soft_relu_is_its_definition(x: float, beta: float, kind: Any) -> None:
    found = jax.jit(tost.soft_relu, static_argnums=2)(jnp.float32(x), beta, kind)
    expected = numpy_soft(np.float64(x), beta, kind)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("kind", SUPREMA)
@pytest.mark.parametrize("beta", [1.0, 10.0, 100.0])
def test_largest_distance_from_relu(kind: Any, beta: float) -> None:
    bound, at = SUPREMA[kind]
    grid = np.linspace(-4 / beta, 4 / beta, 80_001)
    with jax.enable_x64(True):
        gap = np.abs(
            tost.soft_relu(jnp.asarray(grid), beta, kind) - np.maximum(grid, 0)
        )
    assert abs(gap.max() * beta - bound) < 1e-6
    where = grid[np.argmax(gap)] * beta
    # Swish is as far on either side; mish is so on the negative side only.
    assert abs((abs(where) if kind == "swish" else where) - at) < 1e-3


@pytest.mark.parametrize(("kind", "form"), FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_relu_to_the_bit_from_the_end_on(kind: Any, form: Any, dtype: str) -> None:
    act = tost.ghost_activation(kind, ghost_steps=GHOST_STEPS, form=form)
    values = [*extremes(dtype), np.inf, -np.inf, np.nan]
    values += list(np.random.default_rng(0).normal(size=100))
    x = jnp.asarray(values, dtype)
    expected = np.asarray(jax.nn.relu(x))
    wanted = jax.vmap(jax.grad(jax.nn.relu))(x)
    slope = jax.jit(jax.vmap(jax.value_and_grad(act), (0, None)))
    for step in (GHOST_STEPS, GHOST_STEPS + 1, 2**31 - 1):
        compiled, gradient = slope(x, jnp.int32(step))
        for found in (act(x, step), compiled):
            assert found.dtype == x.dtype
            assert np.asarray(found).tobytes() == expected.tobytes()
        np.testing.assert_array_equal(gradient, wanted)
    # One step before it is not ReLU yet.
    before = act(x, GHOST_STEPS - 1)
    assert not np.array_equal(before, jax.nn.relu(x), equal_nan=True)


@pytest.mark.parametrize(("kind", "form"), FORMS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_finite_at_every_step(kind: Any, form: Any, dtype: str) -> None:
    act = jax.jit(tost.ghost_activation(kind, ghost_steps=GHOST_STEPS, form=form))
    x = jnp.asarray(extremes(dtype), dtype)
    slope = jax.vmap(jax.value_and_grad(act), (0, None))
    for step in range(GHOST_STEPS + 2):
        value, gradient = slope(x, jnp.int32(step))
        assert bool(jnp.all(jnp.isfinite(value))), step
        assert bool(jnp.all(jnp.isfinite(gradient))), step
        # Far out it is ReLU, whatever the sharpness.
        np.testing.assert_array_equal(value[6:], jax.nn.relu(x)[6:])
        np.testing.assert_allclose(gradient[6:].astype(jnp.float32), [1, 0], atol=1e-2)


@pytest.mark.parametrize("kind", SUPREMA)
def test_values_on_the_way(kind: Any) -> None:
    x = np.linspace(-3, 3, 61, dtype=np.float32)
    sharpen = tost.ghost_activation(
        kind, ghost_steps=GHOST_STEPS, beta_0=0.5, beta_1=50.0
    )
    blend = tost.ghost_activation(
        kind, ghost_steps=GHOST_STEPS, beta_0=0.5, form="blend"
    )
    for step in range(GHOST_STEPS):
        u = step / GHOST_STEPS
        expected = numpy_soft(x, 0.5 * 100.0**u, kind)
        np.testing.assert_allclose(sharpen(x, step), expected, rtol=1e-4, atol=1e-6)
        expected = (1 - u) * numpy_soft(x, 0.5, kind) + u * np.maximum(x, 0)
        np.testing.assert_allclose(blend(x, step), expected, rtol=1e-4, atol=1e-6)


def test_kept_is_the_same_at_every_step() -> None:
    # The authors' PSwish: x sigmoid(2 x), to the end.
    act = tost.ghost_activation("swish", ghost_steps=None, beta_0=2.0)
    x = jnp.linspace(-3.0, 3.0, 7)
    expected = np.asarray(x) / (1 + np.exp(-2 * np.asarray(x)))
    for step in (0, 10**6):
        np.testing.assert_allclose(act(x, step), expected, rtol=1e-5)


def test_one_compilation_for_all_steps() -> None:
    traces = []
    act = tost.ghost_activation(ghost_steps=GHOST_STEPS)

    @jax.jit
    def loss(x: jax.Array, step: jax.Array) -> jax.Array:
        traces.append(step)
        return jnp.sum(jax.vmap(functools.partial(act, step=step))(x))

    x = jnp.ones((3, 4))
    values = [float(loss(x, jnp.int32(step))) for step in range(GHOST_STEPS + 2)]
    assert len(traces) == 1
    # At 1 it grows with the sharpness, and is ReLU's from the end on.
    assert sorted(set(values[: GHOST_STEPS - 4])) == values[: GHOST_STEPS - 4]
    assert values[GHOST_STEPS:] == [12.0, 12.0]


@pytest.mark.parametrize("decay", schedules.DECAYS)
def test_fading(decay: Any) -> None:
    steps = 1000
    alpha = jax.jit(tost.fading(steps, alpha_0=0.5, decay=decay))
    found = np.asarray([alpha(t) for t in range(0, steps + 100, 50)])
    u = np.minimum(np.arange(0, steps + 100, 50) / steps, 1)
    expected = 0.5 * (1 - u if decay == "linear" else (1 + np.cos(np.pi * u)) / 2)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found[0] == 0.5
    assert found.tolist()[20:] == [0.0, 0.0]
    assert float(alpha(steps - 1)) > 0


def test_kept_skips_and_early_labels() -> None:
    assert float(tost.fading(None, alpha_0=0.5)(10**9)) == 0.5
    smoothing = jax.jit(tost.early(0.1, 3))
    expected = [np.float32(0.1)] * 3 + [0.0, 0.0]
    assert [float(smoothing(t)) for t in range(5)] == [float(x) for x in expected]


def test_sharpening_is_geometric() -> None:
    beta = tost.sharpening(100, beta_0=2.0, beta_1=200.0)
    np.testing.assert_allclose(
        [beta(t) for t in (0, 50, 100, 1000)], [2, 20, 200, 200], rtol=1e-5
    )


ghosts = functools.partial(tost.ghost_activation, ghost_steps=8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ghosts("relu"), ValueError, "kind must be one of 'swish', 'mish'"),
        (lambda: ghosts(form="x"), ValueError, "form must be one of 'sharpen', 'blen"),
        (lambda: ghosts(beta_0=0.0), ValueError, "beta_0 must be above 0 and finite"),
        (lambda: ghosts(beta_0=np.inf), ValueError, "above 0 and finite, got inf."),
        (lambda: ghosts(beta_0=np.nan), ValueError, "beta_0 must be above 0"),
        (lambda: ghosts(beta_0="1"), TypeError, "beta_0 must be a number, got '1'."),
        (lambda: ghosts(beta_1=0.5), ValueError, "beta_1 must be at least 1"),
        (lambda: ghosts(ghost_steps=0), ValueError, "ghost_steps must be at least 1"),
        (lambda: ghosts(ghost_steps=2.5), TypeError, "ghost_steps must be an integer"),
        (lambda: ghosts(ghost_steps=True), TypeError, "an integer number of steps"),
        (
            lambda: tost.soft_relu(jnp.arange(3)),
            TypeError,
            "x must be floating, got dtype int32: convert it.",
        ),
        (lambda: tost.fading(8, decay="x"), ValueError, "decay must be one of 'linea"),
        (lambda: tost.fading(8, alpha_0=-1), ValueError, "alpha_0 must be above 0"),
        (lambda: tost.fading(0), ValueError, "ghost_steps must be at least 1"),
        (
            lambda: tost.early(1.5, 8),
            ValueError,
            "alpha must be at least 0 and at most",
        ),
        (lambda: tost.early(0.1, 0), ValueError, "steps must be at least 1"),
    ],
)
def test_refused(call: Callable[[], Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
