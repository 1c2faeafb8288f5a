"""Numbers at their limits: ties, what is not finite, the last step, huge leaves."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax import counting, plans, schedules
from tests.core.test_contract import STRICT
from tests.helpers import oracle
from tests.helpers.fuzzing import Lab, Run, leaf, recorded
from tests.helpers.trees import assert_same

PyTree = Any
LAST = 2**31 - 1


def compiled(tx: Any) -> Any:
    @jax.jit
    def step(params: PyTree, state: PyTree, grads: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


# --- Ties -------------------------------------------------------------------------


def first(shapes: list[tuple[int, ...]], number: int) -> list[np.ndarray]:
    """Masks of so many weights, in the order of leaves and indices."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    flat = np.arange(ends[-1]) < number
    parts = np.split(flat, ends[:-1])
    return [p.reshape(shape) for p, shape in zip(parts, shapes, strict=True)]


@pytest.mark.parametrize("dtypes", [("bfloat16", "float16"), ("float16", "bfloat16")])
def test_where_all_tie_the_first_stay(dtypes: tuple[str, str]) -> None:
    shapes = [(40, 24), (3, 3, 8, 5)]
    params = {
        name: jnp.full(shape, 1.0, dtype)
        for name, shape, dtype in zip("ab", shapes, dtypes, strict=True)
    }
    method = granet_jax.gmp(0.9, 4, interval=1)
    tx = granet_jax.transform(method, optax.sgd(0.25))
    step, state = compiled(tx), tx.init(params)
    for t in range(1, 5):
        # All step from 1 to 1/2 and so on, inactive ones in thought alone.
        params, state = step(params, state, jax.tree.map(jnp.ones_like, params))
        number = oracle.total_count(960 + 360, method.sparsity(t))
        for name, mask in zip("ab", first(shapes, number), strict=True):
            np.testing.assert_array_equal(state.masks[name], mask)
            expected = np.where(mask, 1 - t / 4, 0)
            np.testing.assert_array_equal(params[name].astype("f4"), expected)


def test_runs_of_many_ties_are_exact() -> None:
    # Weights of seven values, in half precision, exchanged in every step.
    lab = Lab(
        {"a": leaf("bfloat16", 24, 30), "b": leaf("float16", 3, 3, 8, 8)},
        [recorded("granet", 0.8, 24, interval=1, end_step=12)],
        inner="sgd",
    )
    run = Run(lab, 0, 0, "ties", apply_first=True)
    for t in range(1, 26):
        run.step(t, "ties")
        sizes = np.abs(
            np.concatenate([p.ravel().astype("f4") for p in run.host(run.params)])
        )
        assert len(np.unique(sizes)) < 150
    assert sum(int(m.sum()) for m in run.trainer.masks) == round(0.2 * 1296)


# --- What is not finite -----------------------------------------------------------


def test_nan_and_infinity_by_hand() -> None:
    # Five of eight weights are active, and two of them are exchanged in every step.
    method = dataclasses.replace(
        granet_jax.set_(0.4, 8, interval=1, fraction=0.4),
        grow=granet_jax.rigl(0.4, 8, interval=1).grow,
        needs_gradient=True,
    )
    masks = {"w": np.arange(8).reshape(2, 4) < 5}
    tx = granet_jax.transform(method, optax.sgd(1.0, momentum=0.5), masks=masks)
    step, state = compiled(tx), tx.init({"w": np.ones((2, 4))})
    params = {"w": jnp.float32([[4, 3, 2, 1, 5, 0, 0, 0]]).reshape(2, 4)}
    nan, inf = math.nan, math.inf

    def go_on(*grads: float) -> tuple[Any, Any, list, list, list]:
        now = {"w": jnp.float32(grads).reshape(2, 4)}
        new, after = step(params, state, now)
        mask, weights = after.masks["w"].ravel(), new["w"].ravel()
        trace = after.inner_state[0].trace["w"].ravel()
        return new, after, mask.tolist(), weights.tolist(), trace.tolist()

    # The first and the last active weight become NaN and go; of the inactive ones the
    # infinite gradient comes first, and NaN after all numbers.
    on = go_on(nan, 0, 0, 0, nan, nan, 1, -inf)
    assert on[2] == [False, True, True, True, False, False, True, True]
    assert on[3] == [0, 3, 2, 1, 0, 0, 0, 0]
    assert on[4] == [0] * 8
    # An infinite weight is the largest of all. Those dropped come back, rather than one
    # with a NaN gradient: and go on as they are.
    on = go_on(-inf, 0, 0, 0, 0, nan, nan, nan)
    assert on[2] == [True] * 5 + [False] * 3
    assert on[3] == [inf, 3, 2, 1, 5, 0, 0, 0]
    # Nothing but NaN: the first two by index are dropped last, the first two enter.
    params, state, mask, weights, trace = go_on(*[nan] * 8)
    assert mask == [True] * 5 + [False] * 3
    assert np.isnan(weights[:5]).all()
    assert weights[5:] == trace[5:] == [0, 0, 0]
    # What was NaN before a step cannot be made zero by adding to it.
    params, state, mask, weights, _ = go_on(0, 0, 0, 0, 0, 1, 2, 3)
    assert mask == [True, True, True, False, False, False, True, True]
    assert np.isnan(weights[:5]).all()
    assert weights[5:] == [0, 0, 0]
    clean = granet_jax.apply_masks(params, state.masks)
    assert np.asarray(clean["w"]).ravel()[3:].tolist() == [0] * 5


@pytest.mark.parametrize(
    "method",
    [
        recorded("granet", 0.8, 12, interval=1, end_step=6),
        recorded("snfs", 0.5, 12, interval=2, decay=0.5),
        recorded("top_kast", 0.75, backward_sparsity=0.5, interval=2, penalty=2.0**-5),
    ],
    ids=lambda method: method.function,
)
def test_numbers_stay_exact_whatever_the_gradients(method: Any) -> None:
    # Against the oracle: half of the steps have gradients that are not finite, in one
    # of ten weights, active ones and others.
    tree = {"a": leaf("float32", 12, 20), "b": leaf("bfloat16", 3, 3, 4, 6)}
    lab = Lab(tree, [method], inner="momentum")
    run = Run(lab, 0, 3, "normal", apply_first=True)
    for t in range(1, 13):
        run.step(t, "bad" if t % 4 in (1, 2) else "normal")
    weights = np.concatenate([p.ravel().astype("f4") for p in run.host(run.params)])
    assert not np.isfinite(weights).all()
    active = sum(int(m.sum()) for m in run.trainer.masks if m is not None)
    assert active == oracle.total_count(weights.size, run.now.recipe.sparsity(12))


def test_apply_if_finite_as_inner_keeps_weights_finite() -> None:
    # The step counts and may update the masks, by a gradient partly NaN; the optimizer
    # does not move.
    lab = Lab(
        {"a": leaf("float32", 12, 20), "b": leaf("float32", 8)},
        [recorded("rigl", 0.5, 40, interval=2)],
        inner="apply_if_finite",
    )
    run = Run(lab, 0, 4, "normal", apply_first=True)
    for t in range(1, 13):
        before, masks = run.host(run.params), run.trainer.masks
        run.step(t, "bad" if t % 3 == 1 else "normal")
        after, new = run.host(run.params), run.trainer.masks
        assert all(np.isfinite(x).all() for x in after)
        assert run.sparse().count == t
        assert np.any(masks[0] != new[0]) == (t % 2 == 0)
        if t % 3 == 1:
            both = masks[0] & new[0]
            np.testing.assert_array_equal(after[0][both], before[0][both])
            np.testing.assert_array_equal(after[1], before[1])
    assert int(run.sparse().inner_state.total_notfinite) == 4


def test_steps_that_loss_scaling_skips_are_as_if_they_were_not() -> None:
    # Gradients in half precision, of a loss that is scaled: where they overflow, the
    # step is skipped and the scale halved. Updates fall on such steps too.
    method = granet_jax.granet(0.8, 10, interval=2, end_step=8)
    inner = granet_jax.transform(method, optax.sgd(0.25, momentum=0.5), seed=1)
    tx = optax.apply_if_finite(inner, max_consecutive_errors=5)
    rng = np.random.default_rng(0)

    def draw() -> Any:
        sizes = {"w": (8, 12), "v": (6, 4), "b": (4,)}
        return {n: (rng.integers(-8, 9, s) / 8).astype("f4") for n, s in sizes.items()}

    start, grads = draw(), [draw() for _ in range(10)]
    grads[1]["v"][2, 1], grads[4]["b"][0] = 7.0, -9.0

    @jax.jit
    def step(params: Any, state: Any, grads: Any, scale: jax.Array) -> Any:
        half = jax.tree.map(lambda g: (g * scale).astype(jnp.float16), grads)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / scale, half)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    plain = scaled = (start, tx.init(start))
    scale, skipped = 2.0**14, []
    for t, grad in enumerate(grads, start=1):
        plain = step(*plain, grad, jnp.float32(1))
        while True:
            before = scaled
            scaled = step(*scaled, grad, jnp.float32(scale))
            if scaled[1].last_finite:
                break
            assert_same(scaled[0], before[0])
            assert_same(scaled[1].inner_state, before[1].inner_state)
            skipped.append(t)
            scale /= 2
        assert_same(
            (scaled[0], scaled[1].inner_state), (plain[0], plain[1].inner_state)
        )
        assert granet_jax.get_state(scaled[1]).count == t
    assert skipped == [2, 5]
    assert granet_jax.sparsity(granet_jax.get_masks(scaled[1])).active == 24


# --- The last step ----------------------------------------------------------------


def test_the_last_step_that_can_be_counted_updates_once() -> None:
    method = granet_jax.set_(0.5, LAST, interval=LAST, fraction=0.5)
    # After the last there is no step that could begin anew.
    ends = schedules.listed((LAST - 2, LAST))
    method = dataclasses.replace(method, resets=ends)
    assert list(method.updates.steps()) == [LAST]
    tx = granet_jax.transform(method, optax.sgd(0.25, momentum=0.5))
    params = {"w": jnp.ones((12, 10))}
    state = tx.init(params)._replace(count=jnp.int32(LAST - 3))
    step = compiled(tx)
    changed, fresh = [], []
    for t in (LAST - 2, LAST - 1, LAST, LAST, LAST):
        before = state.masks["w"]
        params, state = step(params, state, {"w": jnp.ones((12, 10))})
        assert state.count == t
        assert state.count.dtype == jnp.int32
        assert int(state.masks["w"].sum()) == 60
        assert not np.any(params["w"][~state.masks["w"]])
        changed.append(bool(np.any(state.masks["w"] != before)))
        # Momentum of 1/2 on gradients of 1, or the gradient alone.
        moments = state.inner_state[0].trace["w"][before & state.masks["w"]]
        fresh.append(bool(np.all(moments == 1)))
    # The same random scores in every step after: it would go back and forth.
    assert changed == [False, False, True, False, False]
    assert fresh == [True, True, False, False, False]
    # What has entered is trained on.
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


# --- Leaves of more weights than 31 bits count ----------------------------------------

HUGE = (2**16, 2**15 + 8)


def lowered(method: granet_jax.Method, *shapes: tuple[int, ...]) -> Any:
    """A step on leaves of these shapes, of which there is nothing but the shapes."""
    tx = granet_jax.transform(method, optax.sgd(0.25))
    params = {
        f"w{i}": jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for i, shape in enumerate(shapes)
    }
    state = jax.eval_shape(tx.init, params)
    return jax.jit(tx.update).lower(params, state, params)


def test_a_leaf_of_more_than_2_31_weights_compiles() -> None:
    method = granet_jax.rigl(0.9, 10, interval=1)
    size = math.prod(HUGE)
    assert size > 2**31
    assert plans.initial_counts(method, [HUGE]) == [oracle.total_count(size, 0.9)]
    step = lowered(method, HUGE).compile(STRICT)
    updates, state = step.out_info
    assert (updates["w0"].shape, state.masks["w0"].dtype) == (HUGE, jnp.bool_)
    # Positions and exchanges are counted without a sign.
    starts = counting.places(jax.ShapeDtypeStruct(HUGE, jnp.bfloat16)).start
    assert starts.dtype == jnp.uint32
    assert starts.shape == (2**16, 1)
    assert int(starts[-1, 0]) == size - HUGE[1]
    dropped = schedules.ceil_of(
        jnp.uint32(schedules.fixed_point(0.3)), jnp.asarray([size - 1], jnp.uint32)
    )
    assert dropped.tolist() == [oracle.number_dropped(0.3, size - 1)]


def test_2_32_weights_in_a_global_ranking() -> None:
    # Each leaf is within what 32 bits count, both are not.
    across = granet_jax.gmp(0.9, 4, interval=2)
    within = granet_jax.gmp(0.9, 4, interval=2, scope="layer")
    message = f'^{2 * math.prod(HUGE)} scores .* use scope="layer", or enable 64-bit'
    with pytest.raises(ValueError, match=message):
        lowered(across, HUGE, HUGE)
    total = oracle.total_count(2 * math.prod(HUGE), 0.9)
    layers = plans.plan(within, [HUGE, HUGE]).keep
    assert layers.dtype == np.uint64
    assert layers[-1].sum() == total
    lowered(within, HUGE, HUGE)
    with jax.enable_x64(True):
        keep = plans.plan(across, [HUGE, HUGE]).keep
        assert (keep.dtype, int(keep[-1])) == (np.uint64, total)
        lowered(across, HUGE, HUGE)
