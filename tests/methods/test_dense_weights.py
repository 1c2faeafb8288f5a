"""Methods whose weights stay dense, and penalties, step by step against NumPy.

The gradient is taken at the sparse view, of a loss whose gradient is exact: all numbers
are multiples of a power of two, and the steps are few.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax import penalties, schedules
from granet_jax.penalties import PenaltyInputs
from tests.methods.test_cyclic import MASKED, QUICK, SHAPES, draw, top

PyTree = Any
RATE, MOMENTUM = 0.25, 0.5
STEPS = 5
SIZES = (72, 48)


def run(method: granet_jax.Method, steps: int = STEPS, *, inner: Any = None) -> Any:
    """(params, state, view) from step 0 on; the loss is |view - target|^2 / 2."""
    inner = optax.sgd(RATE, momentum=MOMENTUM) if inner is None else inner
    tx = granet_jax.transform(method, inner)
    targets = [draw(t) for t in range(1, steps + 1)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *targets)

    def loss(params: PyTree, target: PyTree) -> jax.Array:
        squares = jax.tree.map(lambda p, c: jnp.sum((p - c) ** 2) / 2, params, target)
        return sum(jax.tree.leaves(squares), jnp.zeros(()))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def train(params: PyTree, targets: PyTree) -> PyTree:
        def step(carry: PyTree, target: PyTree) -> PyTree:
            params, state = carry
            grads = jax.grad(loss)(granet_jax.sparse_view(params, state), target)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (params, state)

        start = (params, tx.init(params))
        return start, jax.lax.scan(step, start, targets)[1]

    first, rest = jax.device_get(train(draw(0), stacked))

    def at(t: int) -> PyTree:
        params, state = jax.tree.map(lambda x: x[t], rest) if t >= 0 else first
        return params, state, jax.device_get(granet_jax.sparse_view(params, state))

    return [at(t) for t in range(-1, steps)]


def moments(state: Any) -> PyTree:
    return optax.tree_utils.tree_get(state.inner_state, "trace")


def choose(params: PyTree, number: int | list[int]) -> dict[str, np.ndarray]:
    size = [abs(params[name]) for name in MASKED]
    if isinstance(number, int):
        chosen = top(size, number)
    else:
        chosen = [top([s], k)[0] for s, k in zip(size, number, strict=True)]
    return dict(zip(MASKED, chosen, strict=True))


def penalised(g: np.ndarray, coefficient: Any, p: np.ndarray) -> np.ndarray:
    return g + np.asarray(coefficient, np.float32) * p


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_straight_through(penalty: float) -> None:
    method = granet_jax.straight_through(
        0.75, 4, interval=2, scope="global", penalty=penalty
    )
    # 0.75 (1 - 1/8) of 120 are pruned at step 2, 90 from step 4 on.
    numbers = [120, 120, 41, 41, 30, 30]
    params = draw(0)
    trace = dict.fromkeys(SHAPES, np.float32(0))
    masks = {name: np.ones(SHAPES[name], bool) for name in MASKED}
    revived = 0
    for t, (found, state, view) in enumerate(run(method)):
        if t:
            target = draw(t)
            for name, p in params.items():
                mask = masks.get(name, np.ones(p.shape, bool))
                grad = np.where(mask, p, np.float32(0)) - target[name]
                if name in MASKED:
                    grad = penalised(grad, penalty * ~mask, p)
                trace[name] = np.float32(MOMENTUM) * trace[name] + grad
                params[name] = p - np.float32(RATE) * trace[name]
            before, masks = masks, choose(params, numbers[t])
            revived += sum(int((masks[n] & ~before[n]).sum()) for n in MASKED)
        for name in SHAPES:
            np.testing.assert_array_equal(found[name], params[name])
            if t:
                np.testing.assert_array_equal(moments(state)[name], trace[name])
        for name in MASKED:
            np.testing.assert_array_equal(state.masks[name], masks[name])
            # Dense parameters, a sparse view of them with the exact number.
            outside = found[name][~masks[name]]
            assert np.count_nonzero(outside) > 0.9 * outside.size or t < 2
            expected = np.where(masks[name], found[name], np.float32(0))
            np.testing.assert_array_equal(view[name], expected)
        np.testing.assert_array_equal(view["bias"], found["bias"])
        assert sum(state.masks[name].sum() for name in MASKED) == numbers[t]
    assert revived > 0


@pytest.mark.parametrize(("scope", "interval"), [("layer", 2), ("global", 1)])
def test_top_kast(scope: Any, interval: int) -> None:
    # Half of the weights forward, so that D = 1/2, and three quarters backward.
    method = granet_jax.top_kast(
        0.5, backward_sparsity=0.25, interval=interval, penalty=0.25, scope=scope
    )
    forward, backward = ([36, 24], [54, 36]) if scope == "layer" else (60, 90)
    params = draw(0)
    trace = {name: np.zeros(s, np.float32) for name, s in SHAPES.items()}
    masks, marked = choose(params, forward), choose(params, backward)
    frozen = moved = 0
    for t, (found, state, view) in enumerate(run(method, 4)):
        if t:
            target = draw(t)
            for name, p in params.items():
                everywhere = np.ones(p.shape, bool)
                a, b = masks.get(name, everywhere), marked.get(name, everywhere)
                grad = np.where(a, p, np.float32(0)) - target[name]
                if name in MASKED:
                    grad = penalised(grad, np.where(a, 0.25, np.where(b, 0.5, 0)), p)
                grad = np.where(b, grad, np.float32(0))
                trace[name] = np.float32(MOMENTUM) * trace[name] + grad
                params[name] = np.where(b, p - np.float32(RATE) * trace[name], p)
                frozen += int((~b & (params[name] == p)).sum())
                moved += int((b & ~a & (params[name] != p)).sum())
            if t % interval == 0:
                masks, marked = choose(params, forward), choose(params, backward)
                for name in MASKED:
                    trace[name] = np.where(marked[name], trace[name], np.float32(0))
        for name in SHAPES:
            np.testing.assert_array_equal(found[name], params[name])
            np.testing.assert_array_equal(moments(state)[name], trace[name])
        for name in MASKED:
            np.testing.assert_array_equal(state.masks[name], masks[name])
            np.testing.assert_array_equal(state.marked[name], marked[name])
            assert not np.any(state.masks[name] & ~state.marked[name])
            assert np.count_nonzero(found[name]) > 0.9 * found[name].size
            expected = np.where(masks[name], found[name], np.float32(0))
            np.testing.assert_array_equal(view[name], expected)
        assert sum(state.masks[name].sum() for name in MASKED) == 60
    assert frozen == 30 * 4
    assert moved > 0


def test_greg1_presses_and_removes_the_weights_of_the_start() -> None:
    # Increases at steps 0, 1 and 2 (of 1/4, above 1/2), one step to settle.
    method = granet_jax.greg1(
        0.75, interval=1, growth=0.25, ceiling=0.5, settle_steps=1
    )
    assert method.updates.steps() == range(4, 5, 4)
    params = draw(0)
    staying = choose(params, [18, 12])
    trace = dict.fromkeys(SHAPES, np.float32(0))
    for t, (found, state, view) in enumerate(run(method)):
        del view
        if t:
            size = [0.25, 0.5, 0.75, 0.75, 0.0][t - 1]
            for name, p in params.items():
                grad = p - draw(t)[name]
                if name in MASKED:
                    grad = penalised(grad, np.where(staying[name], 0, size), p)
                    if t == 5:
                        grad = np.where(staying[name], grad, np.float32(0))
                trace[name] = np.float32(MOMENTUM) * trace[name] + grad
                params[name] = p - np.float32(RATE) * trace[name]
                if name in MASKED and t >= 4:
                    for tree in (params, trace):
                        kept = np.where(staying[name], tree[name], np.float32(0))
                        tree[name] = kept
        for name in SHAPES:
            np.testing.assert_array_equal(found[name], params[name])
        for name in MASKED:
            np.testing.assert_array_equal(state.marked[name], staying[name])
            expected = staying[name] if t >= 4 else np.ones(SHAPES[name], bool)
            np.testing.assert_array_equal(state.masks[name], expected)


def test_greg2_picks_after_a_penalty_on_all() -> None:
    method = granet_jax.greg2(
        0.75,
        interval=1,
        growth=1.0,
        ceiling=2.0,
        settle_steps=0,
        pick_growth=0.5,
        pick_ceiling=1.0,
        weight_decay=0.5,
    )
    # Two increases for all, and two for those picked: to 2, and above it.
    assert method.updates.steps() == range(4, 5, 4)
    assert method.marks.steps() == range(2, 3, 2)
    decayed = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(RATE))
    params = draw(0)
    staying = {}
    for t, (found, state, _) in enumerate(run(method, inner=decayed)):
        if t:
            for name, p in params.items():
                grad = p - draw(t)[name]
                if name in MASKED:
                    if t <= 2:
                        size = 0.5 * t
                    elif t <= 4:
                        size = np.where(staying[name], -0.5, 1.0 + (t - 2))
                    else:
                        size = 0.0
                        grad = np.where(staying[name], grad, np.float32(0))
                    grad = penalised(grad, size, p)
                grad = grad + np.float32(0.5) * p
                params[name] = p - np.float32(RATE) * grad
            if t == 2:
                staying = choose(params, [18, 12])
            if t >= 4:
                for name in MASKED:
                    kept = np.where(staying[name], params[name], np.float32(0))
                    params[name] = kept
        for name in SHAPES:
            np.testing.assert_array_equal(found[name], params[name])
        for name in MASKED:
            expected = staying[name] if t >= 4 else np.ones(SHAPES[name], bool)
            np.testing.assert_array_equal(state.masks[name], expected)
            if t >= 2:
                np.testing.assert_array_equal(state.marked[name], staying[name])
    assert any((staying[n] != choose(draw(0), [18, 12])[n]).any() for n in MASKED)


def penalty_over_time(make: Callable[[], granet_jax.Method], kept: bool) -> Any:
    penalty = make().penalty
    assert penalty is not None

    @jax.jit
    def of(count: jax.Array) -> jax.Array:
        leaf = jnp.ones((1, 1))
        on = jnp.full((1, 1), True)
        marked = jnp.full((1, 1), kept)
        return jnp.broadcast_to(penalty(PenaltyInputs(leaf, on, marked, count)), (1, 1))

    return lambda count: float(of(jnp.int32(count))[0, 0])


def test_schedule_of_growing_regularisation() -> None:
    # As in the code, with the settings for CIFAR: 10,001 increases ten steps apart.
    pruned = penalty_over_time(lambda: granet_jax.greg1(0.9), kept=False)
    assert [pruned(t) for t in (0, 9, 10)] == pytest.approx([1e-4, 1e-4, 2e-4])
    assert pruned(99_999) == pytest.approx(1.0)
    assert pruned(100_000) == pruned(110_009) == pytest.approx(1.0001)
    assert pruned(110_010) == 0.0
    assert penalty_over_time(lambda: granet_jax.greg1(0.9), kept=True)(5000) == 0.0
    assert granet_jax.greg1(0.9).updates.steps() == range(110_010, 110_011, 110_010)

    # GReg-2: 1,000 increases for all weights, then 9,901.
    def make() -> granet_jax.Method:
        return granet_jax.greg2(0.9, weight_decay=1e-4)

    pruned, kept = (penalty_over_time(make, kept=k) for k in (False, True))
    assert pruned(0) == kept(0) == pytest.approx(1e-5)
    assert pruned(9_999) == kept(9_999) == pytest.approx(1e-2)
    assert pruned(10_000) == pytest.approx(1.01e-2)
    assert kept(10_000) == kept(110_000) == pytest.approx(-1e-4)
    assert pruned(10_000 + 99_010) == pytest.approx(1.0001)
    assert make().marks.steps() == range(10_000, 10_001, 10_000)
    assert list(make().updates.steps()) == [10_000 + 99_010 + 10_000]


def test_sculpt_prunes_once_and_starts_moments_anew() -> None:
    method = granet_jax.sculpt(
        0.75, 6, cycles=2, initial_sparsity=0.5, distribution="uniform"
    )
    found = run(method, 6)
    params, states = [f[0] for f in found], [f[1] for f in found]
    stepped: dict[str, np.ndarray] = {}
    for t, state in enumerate(states):
        for name in MASKED:
            assert not np.any(params[t][name][~state.masks[name]]) or t == 0
        active = [int(state.masks[name].sum()) for name in MASKED]
        assert active == [36, 24] if t < 4 else sum(active) == 30
        for name, p in params[t - 1].items() if t else ():
            # The masks and moments that the step goes by: those of the step before,
            # the moments started anew where that ended a cycle. The bias's too.
            masked = name in MASKED
            mask = states[t - 1].masks[name] if masked else np.ones(p.shape, bool)
            before = moments(states[t - 1])[name]
            assert np.any(before) or t == 1
            before = np.zeros_like(before) if t - 1 in (2, 4) else before
            grad = np.where(mask, p - draw(t)[name], np.float32(0))
            trace = np.float32(MOMENTUM) * before + grad
            stepped[name] = np.where(mask, p - np.float32(RATE) * trace, np.float32(0))
            # A step that prunes cuts its parameters and moments after that.
            mask = state.masks[name] if masked else mask
            expected = np.where(mask, stepped[name], np.float32(0))
            np.testing.assert_array_equal(params[t][name], expected)
            expected = np.where(mask, trace, np.float32(0))
            np.testing.assert_array_equal(moments(state)[name], expected)
        if 0 < t < 4:
            for name in MASKED:
                np.testing.assert_array_equal(state.masks[name], states[0].masks[name])
        if t == 4:
            # The pruning: the largest of what the step leaves, zeros no candidates.
            for name, mask in choose(stepped, 30).items():
                np.testing.assert_array_equal(state.masks[name], mask)


def test_a_sparse_view_of_sparse_weights_is_what_they_are() -> None:
    tx = granet_jax.transform(granet_jax.static(0.5), optax.sgd(RATE))
    state = tx.init(draw(0))
    params = granet_jax.apply_masks(draw(0), state.masks)
    view = granet_jax.sparse_view(params, (optax.EmptyState(), state))
    for name in SHAPES:
        np.testing.assert_array_equal(view[name], params[name])
    with pytest.raises(ValueError, match="must hold one state of"):
        granet_jax.sparse_view(params, optax.EmptyState())


def greg(**changes: Any) -> granet_jax.Method:
    return granet_jax.greg1(0.5, **changes)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: granet_jax.top_kast(0.5, backward_sparsity=0.6),
            ValueError,
            "at most",
        ),
        (lambda: granet_jax.top_kast(0.5, backward_sparsity=1), ValueError, "backward"),
        (
            lambda: granet_jax.top_kast(0.5, backward_sparsity=0.1, interval=0),
            ValueError,
            "interval must be at least 1",
        ),
        (
            lambda: granet_jax.straight_through(0.5, 100, penalty=-1.0),
            ValueError,
            "penalty must be at least 0",
        ),
        (lambda: granet_jax.straight_through(0.5, 99), ValueError, "interval must fit"),
        (lambda: granet_jax.sculpt(0.5, 10, cycles=1), ValueError, "initial_sparsity"),
        (lambda: granet_jax.sculpt(0.9, 10, cycles=2), ValueError, "the 3 cycles"),
        (lambda: granet_jax.sculpt(0.9, 10, cycles=0), ValueError, "cycles must be"),
        (lambda: greg(growth=0.0), ValueError, "growth must be above 0"),
        (lambda: greg(settle_steps=-1), ValueError, "settle_steps must be at least 0"),
        (lambda: greg(interval=2.5), TypeError, "interval must be an integer"),
        (
            lambda: granet_jax.greg2(0.5, ceiling=0.01),
            ValueError,
            "ceiling must be above 0.01",
        ),
        (
            lambda: granet_jax.greg2(0.5, weight_decay=-0.1),
            ValueError,
            "weight_decay must be at least 0",
        ),
    ],
)
def test_bad_arguments(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_bad_records_and_uses() -> None:
    kast = granet_jax.top_kast(0.5, backward_sparsity=0.1)
    with pytest.raises(ValueError, match="adds to its gradient"):
        granet_jax.transform(kast)
    with pytest.raises(ValueError, match="marked_sparsity must be in"):
        dataclasses.replace(kast, marked_sparsity=1.5)
    with pytest.raises(TypeError, match="penalty must be a function"):
        dataclasses.replace(kast, penalty=0.1)
    # A penalty that reads marked weights, of a method without.
    method = dataclasses.replace(
        granet_jax.static(0.5), penalty=penalties.exploration(0.1, 0.5)
    )
    tx = granet_jax.transform(method, optax.sgd(RATE))
    with pytest.raises(ValueError, match="set its `marked_sparsity`"):
        tx.update(draw(1), tx.init(draw(0)), draw(0))
    assert kast.marks == schedules.NEVER
