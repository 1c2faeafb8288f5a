"""Ghost activations and schedules: definitions, bounds, and exact ReLU at the end."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from granet_jax import tost
from granet_jax.tost import ghost_schedules

# Least upper bounds of beta |soft(x) - ReLU(x)|, and beta x where they are reached.
SUPREMA = {"swish": (0.278465, 1.27845), "mish": (0.308843, -1.19244)}
FORMS = [(kind, form) for kind in ("swish", "mish") for form in ("sharpen", "blend")]
GHOST_STEPS = 8


def soft_by_numpy(x: np.ndarray, beta: float, kind: str) -> np.ndarray:
    """The definitions, in float64."""
    z = beta * np.asarray(x, np.float64)
    softplus = np.logaddexp(z, 0.0)
    return x * (np.exp(z - softplus) if kind == "swish" else np.tanh(softplus))


@pytest.mark.parametrize("kind", SUPREMA)
@pytest.mark.parametrize("beta", [1.0, 10.0, 100.0])
def test_largest_distance_from_relu(kind: Any, beta: float) -> None:
    bound, place = SUPREMA[kind]
    x = np.linspace(-4 / beta, 4 / beta, 80_001)
    with jax.enable_x64(True):
        soft = np.asarray(tost.soft_relu(jnp.asarray(x), beta, kind))
    gap = np.abs(soft - np.maximum(x, 0)) * beta
    assert abs(gap.max() - bound) < 1e-6
    # Swish is as far from ReLU on either side, mish on the negative side only.
    largest = x[np.argmax(gap)] * beta
    assert abs((abs(largest) if kind == "swish" else largest) - place) < 1e-3


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_values_in_the_ghost_phase(kind: Any, form: Any) -> None:
    x = np.concatenate([np.linspace(-3, 3, 61), np.linspace(-50, 50, 21)])
    x = x.astype(np.float32)
    act = tost.ghost_activation(
        kind, ghost_steps=GHOST_STEPS, beta_0=0.5, beta_1=100.0, form=form
    )
    for step in range(GHOST_STEPS):
        u = step / GHOST_STEPS
        if form == "sharpen":
            expected = soft_by_numpy(x, 0.5 * 200.0**u, kind)
        else:
            expected = (1 - u) * soft_by_numpy(x, 0.5, kind) + u * np.maximum(x, 0)
        np.testing.assert_allclose(act(x, step), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "form", "dtype"),
    [
        *(("swish", "sharpen", "float32"), ("mish", "blend", "float32")),
        *(("swish", "blend", "bfloat16"), ("mish", "sharpen", "bfloat16")),
        *(("swish", "sharpen", "float16"), ("mish", "blend", "float16")),
    ],
)
def test_finite_in_one_program_and_then_relu_to_the_bit(
    kind: Any, form: Any, dtype: str
) -> None:
    act = tost.ghost_activation(kind, ghost_steps=GHOST_STEPS, form=form)
    large = min(1e30, float(jnp.finfo(dtype).max))
    finite = [large, -large, 0.0, -0.0, 1e-30, -1e-30, 1.5, -1.5]
    finite += list(np.random.default_rng(0).normal(size=100))
    x = jnp.asarray([*finite, np.inf, -np.inf, np.nan], dtype)
    relu, relu_slope = jax.vmap(jax.value_and_grad(jax.nn.relu))(x)
    traces = []

    @jax.jit
    def value_and_slope(x: Any, step: Any) -> Any:
        traces.append(step)
        return jax.vmap(jax.value_and_grad(act), (0, None))(x, step)

    for step in range(GHOST_STEPS):
        value, slope = (y[: len(finite)] for y in value_and_slope(x, jnp.int32(step)))
        assert bool(jnp.all(jnp.isfinite(value) & jnp.isfinite(slope))), step
        assert not np.array_equal(value, relu[: len(finite)])
        # Far from zero it is ReLU, whatever the sharpness.
        np.testing.assert_array_equal(value[:2], relu[:2])
        np.testing.assert_allclose(slope[:2].astype(jnp.float32), [1, 0], atol=1e-2)
    for step in (GHOST_STEPS, GHOST_STEPS + 1, 2**31 - 1):
        value, slope = value_and_slope(x, jnp.int32(step))
        for y in (value, act(x, step)):
            assert y.dtype == x.dtype
            assert np.asarray(y).tobytes() == np.asarray(relu).tobytes()
        np.testing.assert_array_equal(slope, relu_slope)
    assert len(traces) == 1


@pytest.mark.parametrize("decay", ghost_schedules.DECAYS)
def test_fading(decay: Any) -> None:
    alpha = jax.jit(tost.fading(1000, alpha_0=0.5, decay=decay))
    steps = np.arange(0, 1100, 50)
    values = np.asarray([alpha(t) for t in steps])
    u = np.minimum(steps / 1000, 1)
    expected = 0.5 * (1 - u if decay == "linear" else (1 + np.cos(np.pi * u)) / 2)
    np.testing.assert_allclose(values, expected, atol=1e-6)
    assert values[0] == 0.5
    assert values[20:].tolist() == [0.0, 0.0]
    assert float(alpha(999)) > 0
    assert float(tost.fading(None, alpha_0=0.5, decay=decay)(10**9)) == 0.5


def test_sharpening_and_early() -> None:
    beta = tost.sharpening(100, beta_0=2.0, beta_1=200.0)
    values = [beta(t) for t in (0, 50, 100, 1000)]
    np.testing.assert_allclose(values, [2, 20, 200, 200], rtol=1e-5)
    smoothing = jax.jit(tost.early(0.1, 3))
    expected = [float(np.float32(0.1))] * 3 + [0.0] * 2
    assert [float(smoothing(t)) for t in range(5)] == expected
