"""Numbers at their limits: NaN and infinity, the last step, huge leaves.

`tests/methods/test_methods.py` compares whole runs with ties and bad gradients.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax import schedules, structures
from tests.helpers import own_methods
from tests.helpers.compiler_options import STRICT
from tests.helpers.training import compiled_step, differ, make_step

PyTree = Any
LAST = 2**31 - 1


# --- NaN and infinity -------------------------------------------------------------


def test_nan_and_infinity_by_hand() -> None:
    # Five of eight weights are active, and every step exchanges two of them.
    method = granet_jax.granet(
        *(0.4, 8),
        initial_sparsity=0.4,
        interval=1,
        end_step=8,
        fraction=0.4,
        final_fraction=0.4,
    )
    masks = {"w": np.arange(8).reshape(2, 4) < 5}
    tx = granet_jax.transform(method, optax.sgd(1.0, momentum=0.5), masks=masks)
    params = {"w": jnp.float32([[4, 3, 2, 1], [5, 0, 0, 0]])}
    step, state = compiled_step(tx), tx.init(params)
    nan, inf = math.nan, math.inf

    def from_here(*grads: float) -> tuple[Any, Any, list, list, list]:
        new, after = step(params, state, {"w": jnp.float32(grads).reshape(2, 4)})
        trees = (after.masks, new, after.inner_state[0].trace)
        return new, after, *(tree["w"].ravel().tolist() for tree in trees)

    # The first and the last active weight become NaN and are dropped. Of the inactive
    # ones that with the infinite gradient enters first, and NaN ranks below numbers.
    *_, mask, weights, trace = from_here(nan, 0, 0, 0, nan, nan, 1, -inf)
    assert mask == [False, True, True, True, False, False, True, True]
    assert weights == [0, 3, 2, 1, 0, 0, 0, 0]
    assert trace == [0] * 8
    # An infinite weight is the largest. The two dropped weights come back before any
    # with a NaN gradient, and keep their values.
    *_, mask, weights, _ = from_here(-inf, 0, 0, 0, 0, nan, nan, nan)
    assert mask == [True] * 5 + [False] * 3
    assert weights == [inf, 3, 2, 1, 5, 0, 0, 0]
    # All is NaN, so any of the inactive weights may enter.
    *_, mask, weights, trace = from_here(*[nan] * 8)
    assert sum(mask) == 5
    for values in (weights, trace):
        assert np.isnan(values).tolist() == [*mask[:5], False, False, False]
    # Adding an update cannot make a NaN zero; `apply_masks` can.
    params = {"w": jnp.float32([[nan, nan, nan, nan], [nan, 0, 0, 0]])}
    params, state, mask, weights, _ = from_here(0, 0, 0, 0, 0, 1, 2, 3)
    assert (sum(mask[:5]), mask[5:]) == (3, [False, True, True])
    assert np.isnan(weights[:5]).all()
    assert weights[5:] == [0, 0, 0]
    clean = np.asarray(granet_jax.apply_masks(params, state.masks)["w"]).ravel()
    assert np.isnan(clean).tolist() == [*mask[:5], False, False, False]


def draw(rng: np.random.Generator) -> Any:
    shapes = {"w": (8, 12), "v": (6, 4), "b": (4,)}
    return {n: (rng.integers(-8, 9, s) / 8).astype("f4") for n, s in shapes.items()}


def test_apply_if_finite_inside_keeps_weights_finite() -> None:
    # The optimizer does not move on NaN, but the step counts and may update the masks.
    inner = optax.apply_if_finite(optax.sgd(0.25, momentum=0.5), 3)
    tx = granet_jax.transform(granet_jax.rigl(0.5, 40, interval=2), inner)
    rng = np.random.default_rng(0)
    params = draw(rng)
    step, state = compiled_step(tx), tx.init(params)
    params = granet_jax.apply_masks(params, state.masks)
    for t in range(1, 13):
        before, old = params, state.masks
        grads = draw(rng)
        if t % 3 == 1:
            grads["w"][rng.random((8, 12)) < 0.1] = np.nan
        params, state = step(params, state, grads)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
        assert state.count == t
        assert differ(old, state.masks) == (t % 2 == 0)
        if t % 3 == 1:
            both = old["w"] & state.masks["w"]
            np.testing.assert_array_equal(params["w"][both], before["w"][both])
            np.testing.assert_array_equal(params["b"], before["b"])
    assert int(state.inner_state.total_notfinite) == 4


# --- The last step ----------------------------------------------------------------


def test_the_last_step_that_can_be_counted_updates_once() -> None:
    method = granet_jax.set_(0.5, LAST, interval=2**30 - 1, fraction=0.5)
    method = dataclasses.replace(method, updates=schedules.listed([LAST]))
    # No step follows the last one, so its reset never happens.
    method = own_methods.with_resets(method, (LAST - 2, LAST))
    assert list(method.updates.steps()) == [LAST]
    tx = granet_jax.transform(method, optax.sgd(0.25, momentum=0.5))
    # In the step after the last one, weights that entered outgrow the others.
    params = {"w": jnp.full((12, 10), 1.25)}
    state: Any = tx.init(params)._replace(count=jnp.int32(LAST - 3))
    step = compiled_step(tx)
    changed, reset = [], []
    for t in (LAST - 2, LAST - 1, LAST, LAST, LAST):
        before = state.masks["w"]
        params, state = step(params, state, {"w": jnp.ones((12, 10))})
        assert (state.count, state.count.dtype) == (t, jnp.int32)
        assert int(state.masks["w"].sum()) == 60
        assert not np.any(params["w"][~state.masks["w"]])
        changed.append(bool(np.any(state.masks["w"] != before)))
        # Momentum without a past is the gradient, which is one.
        moments = state.inner_state[0].trace["w"][before & state.masks["w"]]
        reset.append(bool(np.all(moments == 1)))
    # All steps after the last have its number and so its random scores: updates there
    # would move weights back and forth.
    assert changed == [False, False, True, False, False]
    assert reset == [True, True, False, False, False]
    # Weights that entered at the last step are trained.
    assert np.all(params["w"][state.masks["w"]] < 0)


@pytest.mark.parametrize(
    "method",
    [
        granet_jax.granet(0.9, LAST, interval=2**29, initial_sparsity=0.5),
        granet_jax.rigl(0.9, LAST, interval=2**29),
        granet_jax.cyclical(0.9, 2**31 - 4, cycles=4, interval=2**26),
        granet_jax.acdc(0.9, (5, 2**30, LAST)),
        granet_jax.sculpt(0.9, 2**31 - 4, cycles=3),
    ],
    ids=lambda method: method.name,
)
def test_schedules_at_the_last_step_have_their_last_value(method: Any) -> None:
    steps = method.updates.steps()
    assert method.sparsity(LAST) == 0.9
    for t in (LAST - 1, LAST):
        done = sum(s <= t for s in steps)
        assert int(method.updates.done(jnp.int32(t))) == done
        assert bool(method.updates.contains(jnp.int32(t))) == (t in steps)
        index = int(method.updates.update_index(jnp.int32(t)))
        assert index == min(max(done - 1, 0), len(steps) - 1)


# --- Leaves with more weights than 31 bits count ----------------------------------

HUGE = (2**16, 2**15 + 8)


def lowered(method: granet_jax.Method, leaves: int) -> Any:
    """A step on leaves of shape `HUGE`, without any arrays."""
    tx = granet_jax.transform(method, optax.sgd(0.25))
    leaf = jax.ShapeDtypeStruct(HUGE, jnp.bfloat16)
    params = {f"w{i}": leaf for i in range(leaves)}
    state = jax.eval_shape(tx.init, params)
    return jax.jit(tx.update).lower(params, state, params)


def test_a_leaf_of_more_than_2_31_weights_compiles() -> None:
    size = math.prod(HUGE)
    assert size > 2**31
    step = lowered(granet_jax.rigl(0.9, 10, interval=1), 1).compile(STRICT)
    updates, state = step.out_info
    assert (updates["w0"].shape, state.masks["w0"].dtype) == (HUGE, jnp.bool_)
    # Exchanges are counted without a sign.
    fraction = jnp.uint32(schedules.fixed_point(0.3))
    dropped = schedules.ceil_of(fraction, jnp.asarray([size - 1], jnp.uint32))
    assert dropped.tolist() == [math.ceil(0.3 * (size - 1))]


def test_2_32_weights_in_a_global_ranking() -> None:
    # 32 bits count the weights of one leaf, but not those of both.
    across = granet_jax.gmp(0.9, 4, interval=2)
    message = f'^{2 * math.prod(HUGE)} scores .* use scope="layer", or enable 64-bit'
    with pytest.raises(ValueError, match=message):
        lowered(across, 2)
    # Both remedies work.
    lowered(granet_jax.gmp(0.9, 4, interval=2, scope="layer"), 2)
    with jax.enable_x64(True):
        lowered(across, 2)


# --- Without implicit promotion ---------------------------------------------------

IN_PARTS = {"scope": "layer", "distribution": "uniform"}
STRICT_METHODS = {
    "granet": granet_jax.granet(0.5, 4, interval=1),
    "cyclical": granet_jax.cyclical(0.5, 8, cycles=2, interval=2),
    "projected": granet_jax.cyclical(
        0.5, 8, cycles=2, interval=2, recovery="projected"
    ),
    "acdc": granet_jax.acdc(0.5, (1, 2, 3)),
    "snfs": granet_jax.snfs(0.5, 8, interval=2),
    "dsr": granet_jax.dsr(0.5, 8, interval=2),
    "mest": granet_jax.mest(0.5, 8, interval=2),
    "greg2": granet_jax.greg2(0.5, interval=2),
    "top_kast": granet_jax.top_kast(0.75, backward_sparsity=0.5, interval=2),
    "block": granet_jax.granet(0.5, 4, interval=1, structure=structures.block(2, 1)),
    "n_of_m": granet_jax.straight_through(
        0.5, 4, interval=1, structure=structures.n_of_m(2, 4), **IN_PARTS
    ),
    "fan_in": granet_jax.granet(
        0.5, 4, interval=1, structure=structures.constant_fan_in(), **IN_PARTS
    ),
}


@pytest.mark.parametrize("method", STRICT_METHODS.values(), ids=STRICT_METHODS)
@pytest.mark.parametrize(("dtype", "packed"), [("float32", False), ("bfloat16", True)])
def test_without_implicit_promotion(method: Any, dtype: str, packed: bool) -> None:
    tx = granet_jax.transform(method, optax.sgd(0.1, momentum=0.9), packed=packed)

    def use(params: Any) -> Any:
        state = tx.init(params)
        new = granet_jax.set_masks(state, granet_jax.get_masks(state))
        return make_step(tx)(params, new, params), granet_jax.sparse_view(params, new)

    with jax.numpy_dtype_promotion("strict"):
        shapes = {"a": (8, 4), "b": (2, 3, 4, 8)}
        jax.eval_shape(
            use, {k: jax.ShapeDtypeStruct(s, dtype) for k, s in shapes.items()}
        )
