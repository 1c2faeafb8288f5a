"""Cyclical pruning and AC/DC, step by step against NumPy, and their identities.

All numbers are multiples of a power of two and few are the steps, so that every sum and
product is exact and parameters, moments and masks are compared with `==`.
"""

import dataclasses
import functools
import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax import distributions, schedules
from tests.helpers.trees import assert_same

PyTree = Any
# In the order of the leaves; the bias carries no mask.
SHAPES = {"bias": (8,), "conv": (3, 3, 2, 4), "dense": (6, 8)}
MASKED = ("conv", "dense")
SIZES = {"conv": 72, "dense": 48}
RATE, MOMENTUM = 0.25, 0.5
STEPS = 12
# Compiled in less time; all numbers are exact however it is done.
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}


def draw(step: int) -> dict[str, np.ndarray]:
    """Multiples of 1/8, none of them zero; other ones each step."""
    rng = np.random.default_rng(step)
    return {
        name: rng.choice([-1, 1], shape) * rng.integers(1, 17, shape) / np.float32(8)
        for name, shape in SHAPES.items()
    }


def history(
    method: granet_jax.Method,
    inner: optax.GradientTransformation | None = None,
    steps: int = STEPS,
) -> list[tuple[PyTree, PyTree, PyTree]]:
    """Parameters, masks and moments from step 0 on, compiled as one scan."""
    inner = optax.sgd(RATE, momentum=MOMENTUM) if inner is None else inner
    tx = granet_jax.transform(method, inner)
    grads = [draw(t) for t in range(1, steps + 1)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params: PyTree, grads: PyTree) -> PyTree:
        def step(carry: PyTree, grad: PyTree) -> PyTree:
            params, state = carry
            updates, state = tx.update(grad, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (params, state)

        state = tx.init(params)
        if method.weights != "dense":
            params = granet_jax.apply_masks(params, state.masks)
        return (params, state), jax.lax.scan(step, (params, state), grads)[1]

    first, others = jax.device_get(run(draw(0), stacked))
    rows = [first, *(jax.tree.map(lambda x: x[i], others) for i in range(steps))]  # noqa: B023
    trace = optax.tree_utils.tree_get
    return [
        (params, state.masks, trace(state.inner_state, "trace", default=()))
        for params, state in rows
    ]


def top(scores: list[np.ndarray], k: int) -> list[np.ndarray]:
    """The k largest of all, equal ones in order; -inf is no candidate."""
    flat = np.concatenate([s.reshape(-1) for s in scores])
    chosen = np.zeros(flat.size, bool)
    chosen[np.argsort(-flat, kind="stable")[:k]] = True
    chosen &= flat > -np.inf
    parts = np.split(chosen, np.cumsum([s.size for s in scores])[:-1])
    return [p.reshape(s.shape) for p, s in zip(parts, scores, strict=True)]


class Simulation:
    """SGD with momentum under a schedule of numbers of weights, by NumPy."""

    def __init__(self, targets: dict[int, Any], recovery: str, start: Any):
        """`targets`: by step, how many weights of all, or of each leaf, are active."""
        self.targets, self.recovery = targets, recovery
        self.params, self.moments = draw(0), dict.fromkeys(SHAPES, np.float32(0))
        self.keep = start
        self.masks = {name: np.ones(SHAPES[name], bool) for name in MASKED}
        self.count = 0

    def select(self, scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if isinstance(self.keep, int):
            chosen = top([scores[name] for name in MASKED], self.keep)
        else:
            chosen = [
                top([scores[name]], k)[0]
                for name, k in zip(MASKED, self.keep, strict=True)
            ]
        return dict(zip(MASKED, chosen, strict=True))

    def step(self, resets: bool = False) -> None:
        if resets:
            self.moments = {n: np.zeros(s, np.float32) for n, s in SHAPES.items()}
        self.count += 1
        grads = draw(self.count)
        old = self.masks
        if self.recovery == "hard":
            for name in MASKED:
                grads[name] = np.where(old[name], grads[name], np.float32(0))
        for name in SHAPES:
            moment = MOMENTUM * self.moments[name] + grads[name]
            self.moments[name] = moment.astype(np.float32)
            self.params[name] = self.params[name] - RATE * self.moments[name]
        due = self.count in self.targets
        self.keep = self.targets.get(self.count, self.keep)
        size = {name: abs(self.params[name]) for name in MASKED}
        if self.recovery != "hard":
            self.masks = self.select(size)
        elif due:
            active = [int(old[name].sum()) for name in MASKED]
            wanted = self.keep
            if np.sum(wanted) <= sum(active):
                inside = {n: np.where(old[n], size[n], -np.inf) for n in MASKED}
                self.masks = self.select(inside)
            else:
                # As many more, by the dense gradient among the inactive.
                dense = draw(self.count)
                outside = {n: np.where(old[n], -np.inf, abs(dense[n])) for n in MASKED}
                whole = isinstance(wanted, int)
                self.keep = (
                    wanted - sum(active)
                    if whole
                    else [w - a for w, a in zip(wanted, active, strict=True)]
                )
                entered = self.select(outside)
                self.masks = {n: old[n] | entered[n] for n in MASKED}
        if self.recovery == "straight_through":
            return
        for name in MASKED:
            moved = self.masks[name]
            if self.recovery == "hard":
                moved = moved & old[name]  # What enters starts at zero.
            self.params[name] = np.where(moved, self.params[name], np.float32(0))
            self.moments[name] = np.where(moved, self.moments[name], np.float32(0))

    def agrees(self, found: tuple[PyTree, PyTree, PyTree]) -> None:
        params, masks, moments = found
        for name in SHAPES:
            np.testing.assert_array_equal(params[name], self.params[name])
            np.testing.assert_array_equal(moments[name], self.moments[name])
        for name in MASKED:
            np.testing.assert_array_equal(masks[name], self.masks[name])


def cubic_targets(sparsity: float, start: float) -> dict[int, float]:
    """Two cycles of six steps; prunings at steps 2 and 4 of each."""
    half = sparsity + (start - sparsity) / 8
    return {2: half, 4: sparsity, 6: start, 8: half, 10: sparsity}


def of_all(sparsity: float) -> int:
    return math.floor((1 - sparsity) * 120 + 0.5)


def of_each(sparsity: float) -> list[int]:
    # The densities here leave whole numbers in both leaves.
    numbers = [(1 - sparsity) * size for size in SIZES.values()]
    assert all(abs(n - round(n)) < 1e-9 for n in numbers)
    return [round(n) for n in numbers]


@pytest.mark.parametrize("recovery", ["hard", "projected", "straight_through"])
@pytest.mark.parametrize(
    ("scope", "sparsity", "start"),
    # 0.75 of the way from 0.25 to 11/12 is 0.8333: ten of the weights of each dozen.
    [("global", 0.9, 0.0), ("layer", 2 / 3, 0.0), ("layer", 0.75, 1 / 12)],
)
def test_cyclical_is_what_numpy_makes_of_it(recovery, scope, sparsity, start) -> None:
    if scope == "layer" and start:
        # Halfway 2/3: of 72 and 48 weights 24 and 16.
        sparsity = start + 8 / 7 * (2 / 3 - start)
        half = of_each(2 / 3)
        final = distributions.counts([(72,), (48,)], sparsity, "uniform")
        targets = {2: half, 4: final, 6: of_each(start), 8: half, 10: final}
    elif scope == "layer":
        # In one pruning a cycle.
        targets = {4: of_each(sparsity), 6: of_each(0), 10: of_each(sparsity)}
    else:
        targets = {t: of_all(s) for t, s in cubic_targets(sparsity, start).items()}
    interval = 4 if len(targets) == 3 else 2
    method = granet_jax.cyclical(
        sparsity,
        STEPS,
        cycles=2,
        initial_sparsity=start,
        ramp=0.75,
        interval=interval,
        recovery=recovery,
        scope=scope,
    )
    assert method.updates.steps() == tuple(targets)
    keep = of_each(start) if scope == "layer" else of_all(start)
    simulation = Simulation(targets, recovery, keep)
    found = history(method)
    if start:
        # Initial masks are drawn, or chosen among the weights.
        if recovery == "hard":
            simulation.masks = found[0][1]
        else:
            size = {name: abs(simulation.params[name]) for name in MASKED}
            simulation.masks = simulation.select(size)
        if recovery != "straight_through":
            for name in MASKED:
                mask = simulation.masks[name]
                simulation.params[name] = np.where(mask, draw(0)[name], np.float32(0))
    for t in range(1, STEPS + 1):
        simulation.step()
        simulation.agrees(found[t])
        params, masks, _ = found[t]
        counts = [int(masks[name].sum()) for name in MASKED]
        due = [step for step in targets if step <= t]
        if due:
            wanted = targets[due[-1]]
            assert (sum(counts) if scope == "global" else counts) == wanted
        view = granet_jax.apply_masks(params, masks)
        for name in MASKED:
            assert not np.any(np.asarray(view[name])[~masks[name]])
    # Something came back in the second cycle that the first had pruned.
    assert any((found[12][1][n] & ~found[5][1][n]).any() for n in MASKED)


@pytest.mark.parametrize(
    ("inner", "ramp"),
    [(optax.sgd(0.1, momentum=0.9), 0.75), (optax.adamw(0.01), 1.0)],
)
def test_one_cycle_is_gradual_pruning_to_the_bit(inner, ramp) -> None:
    cyclical = granet_jax.cyclical(0.9, STEPS, cycles=1, ramp=ramp, interval=2)
    gmp = granet_jax.gmp(0.9, int(ramp * STEPS), interval=2)
    assert list(cyclical.updates.steps()) == list(gmp.updates.steps())
    assert not cyclical.grows
    for ours, theirs in zip(history(cyclical, inner), history(gmp, inner), strict=True):
        assert_same(ours[0], theirs[0])
        assert_same(ours[1], theirs[1])
        assert_same(ours[2], theirs[2])


def test_acdc_against_numpy() -> None:
    method = granet_jax.acdc(0.8, (2, 5, 7, 9, 10))
    simulation = Simulation({2: 24, 5: 120, 7: 24, 9: 120, 10: 24}, "hard", 120)
    found = history(method)
    for t in range(1, STEPS + 1):
        simulation.step(resets=t - 1 in (5, 9))
        simulation.agrees(found[t])
    # Masks of compressed phases are fixed, and zeros are exact.
    assert sum(int((found[12][0][n] != 0).sum()) for n in MASKED) <= 24


def test_a_square_wave_is_acdc_to_the_bit() -> None:
    wave = granet_jax.cyclical(0.8, STEPS, cycles=3, ramp=0.5, interval=2)
    acdc = dataclasses.replace(
        granet_jax.acdc(0.8, (2, 4, 6, 8, 10)), resets=schedules.NEVER
    )
    assert wave.updates.steps() == acdc.updates.steps()
    inner = optax.adam(0.01)
    for ours, theirs in zip(history(wave, inner), history(acdc, inner), strict=True):
        assert_same(ours[0], theirs[0])
        assert_same(ours[1], theirs[1])


def test_acdc_follows_its_timeline() -> None:
    # Epochs of ImageNet: sparse from 10, 20, ..., 70 and 85 on, dense in between.
    method = granet_jax.acdc(0.9, (*range(10, 80, 5), 85))
    sparse = [e for e in range(100) if method.sparsity(e) == 0.9]
    expected = [e for start in range(10, 71, 10) for e in range(start, start + 5)]
    assert sparse == [*expected, *range(85, 100)]
    assert method.resets.steps() == tuple(range(15, 76, 10))
    cifar = granet_jax.acdc(0.9, range(10, 171, 20))
    assert [e for e in cifar.updates.steps() if cifar.sparsity(e)] == [
        *range(10, 171, 40)
    ]
    assert cifar.resets.steps() == (30, 70, 110, 150)


def test_resets_take_what_init_makes_of_the_parameters() -> None:
    # The base iterate of schedule-free optimizers is no zero, but the parameters.
    inner = optax.contrib.schedule_free(optax.sgd(0.25), learning_rate=0.25, b1=0.5)
    tx = granet_jax.transform(granet_jax.acdc(0.5, (1, 2, 9)), inner)
    params = draw(0)
    state = tx.init(params)
    update = jax.jit(tx.update, compiler_options=QUICK)
    for t in range(1, 4):
        before = params, state
        updates, state = update(draw(t), state, params)
        params = optax.apply_updates(params, updates)
    # The second step ends with the old one, and the third begins with the new.
    params, state = before
    fresh = state._replace(inner_state=state.inner_state._replace(z=params))
    assert not np.array_equal(state.inner_state.z["bias"], params["bias"])
    expected = update(draw(3), fresh._replace(count=fresh.count + 1), params)
    found = update(draw(3), state, params)
    assert_same(found[1].inner_state, expected[1].inner_state)
    # An accumulator that does not start from zero is zero where pruned all the same.
    method = dataclasses.replace(
        granet_jax.gmp(0.5, 2, interval=2), resets=schedules.listed((2,))
    )
    tx = granet_jax.transform(method, optax.adagrad(0.25))
    params, state = draw(0), tx.init(draw(0))
    update = jax.jit(tx.update, compiler_options=QUICK)
    none = jax.tree.map(np.zeros_like, params)
    for grads in (draw(1), draw(2), none):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    sums = state.inner_state[0].sum_of_squares
    for name in MASKED:
        expected = np.where(state.masks[name], np.float32(0.1), np.float32(0))
        np.testing.assert_array_equal(sums[name], expected)
    np.testing.assert_array_equal(sums["bias"], np.float32(0.1))


def test_as_the_last_link_values_and_masks_are_the_same() -> None:
    # Plain SGD has no moments, so that both forms agree.
    for recovery in ("hard", "projected"):
        method = granet_jax.cyclical(
            0.8, 8, cycles=2, interval=1, ramp=0.5, recovery=recovery
        )
        ends = []
        for tx in (
            granet_jax.transform(method, optax.sgd(RATE)),
            optax.chain(optax.sgd(RATE), granet_jax.transform(method)),
        ):
            params, state = draw(0), tx.init(draw(0))
            update = jax.jit(tx.update, compiler_options=QUICK)
            for t in range(1, 9):
                updates, state = update(draw(t), state, params)
                params = optax.apply_updates(params, updates)
            ends.append((params, granet_jax.get_masks(state)))
        assert_same(ends[0], ends[1])


def test_revival_from_given_masks_reaches_the_number_of_the_schedule() -> None:
    # Eight weights are given, fewer than the first pruning keeps.
    masks = {"bias": None, "conv": np.zeros(SHAPES["conv"], bool), "dense": None}
    masks["conv"][0, 0] = True
    method = granet_jax.cyclical(0.75, 4, cycles=2, interval=1, ramp=0.5)
    tx = granet_jax.transform(method, optax.sgd(RATE), masks=masks)
    params, state = draw(0), tx.init(draw(0))
    counts = []
    update = jax.jit(tx.update, compiler_options=QUICK)
    for t in range(1, 5):
        updates, state = update(draw(t), state, params)
        params = optax.apply_updates(params, updates)
        counts.append(int(state.masks["conv"].sum()))
    assert counts == [18, 72, 18, 18]


def test_schedule_of_two_cycles() -> None:
    method = granet_jax.cyclical(0.9, 2000, cycles=2, interval=1)
    for start in (0, 1000):
        assert method.sparsity(start) == 0.0
        assert math.isclose(method.sparsity(start + 375), 0.7875, rel_tol=1e-15)
        assert {method.sparsity(start + t) for t in range(750, 1000)} == {0.9}
    assert method.sparsity(2000) == 0.9
    assert 1000 in method.updates.steps()
    assert 2000 not in method.updates.steps()


@hypothesis.given(st.integers(1, 5), st.integers(4, 60), st.data())
def test_every_run_ends_at_its_sparsity(cycles, period, data) -> None:
    interval = data.draw(st.integers(1, period // 2))
    ramp = data.draw(st.floats(0.5, 0.95))
    hypothesis.assume(math.floor(ramp * period) >= interval)
    method = granet_jax.cyclical(
        0.8,
        cycles * period,
        cycles=cycles,
        interval=interval,
        ramp=ramp,
        initial_sparsity=0.1,
    )
    total = cycles * period
    assert method.sparsity(total) == method.sparsity(total - 1) == 0.8
    starts = [c * period for c in range(cycles)]
    assert all(math.isclose(method.sparsity(t), 0.1) for t in starts)
    steps = method.updates.steps()
    assert set(starts[1:]) <= set(steps)
    assert max(steps) < total
    # Nothing changes between updates.
    for t in range(1, total + 1):
        if t not in steps:
            assert method.sparsity(t) == method.sparsity(t - 1)


@hypothesis.given(st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_listed_steps_agree_with_the_list(gaps: list[int]) -> None:
    at = tuple(int(x) for x in np.cumsum(gaps))
    steps = schedules.listed(at)
    assert (steps.first, steps.last, steps.steps()) == (at[0], at[-1], at)
    assert steps.interval == min(gaps[1:], default=at[0])
    for t in range(at[-1] + 3):
        assert bool(steps.contains(jnp.int32(t))) == (t in at)
        assert int(steps.done(jnp.int32(t))) == sum(s <= t for s in at)
        index = int(steps.update_index(jnp.int32(t)))
        assert index == at.index(t) if t in at else 0 <= index < len(at)


@pytest.mark.parametrize("updates", [schedules.UpdateSteps(4, 20, 4), schedules.NEVER])
def test_updates_done_so_far(updates: schedules.UpdateSteps) -> None:
    for t in range(30):
        expected = sum(s <= t for s in updates.steps())
        assert int(updates.done(jnp.int32(t))) == expected


@hypothesis.given(
    st.lists(st.integers(1, 30), min_size=1, max_size=5), st.floats(0, 1), st.data()
)
def test_counts_above_floors(sizes, sparsity, data) -> None:
    floors = [data.draw(st.integers(0, n)) for n in sizes]
    shapes = [(n, 1) for n in sizes]
    total = distributions.total_count(sum(sizes), sparsity)
    if sum(floors) > total:
        with pytest.raises(ValueError, match=r"keep .* at least"):
            distributions.counts(shapes, sparsity, floors=floors)
        return
    counts = distributions.counts(shapes, sparsity, floors=floors)
    assert sum(counts) == total
    assert all(f <= c <= n for f, c, n in zip(floors, counts, sizes, strict=True))


def test_restarted_rate() -> None:
    cosine = optax.cosine_decay_schedule(0.4, decay_steps=8, alpha=0.25)
    rate = jax.jit(schedules.restarted(cosine, period=8))
    for t in range(20):
        exact = 0.1 + 0.3 * (1 + math.cos(math.pi * (t % 8) / 8)) / 2
        assert math.isclose(rate(t), exact, rel_tol=1e-6)
    # As an optimizer uses it: the first step of a cycle has the first rate again.
    tx = optax.sgd(schedules.restarted(cosine, period=2))
    state = tx.init(jnp.zeros(()))
    taken = []
    for _ in range(4):
        update, state = tx.update(jnp.ones(()), state)
        taken.append(-float(update))
    assert taken[:2] == taken[2:]
    assert taken[0] > taken[1]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"total_steps": 1001}, ValueError, "multiple of the 4 cycles, got 1001"),
        ({"total_steps": 3}, ValueError, "Take 4 steps"),
        ({"cycles": 0}, ValueError, "cycles must be at least 1"),
        ({"cycles": 2.0}, TypeError, "cycles must be an integer"),
        ({"ramp": 0.0}, ValueError, r"ramp must be a number in \(0, 1\]"),
        ({"ramp": 1.0, "interval": 50}, ValueError, "ramp must end before the cycle"),
        ({"interval": 188}, ValueError, "interval must be at most the 187 steps"),
        ({"interval": 0}, ValueError, "interval must be at least 1"),
        ({"recovery": "soft"}, ValueError, "recovery must be one of 'hard'"),
        ({"initial_sparsity": 0.95}, ValueError, "initial_sparsity must be at most"),
        ({"sparsity": 1.0}, ValueError, r"sparsity must be in \[0, 1\)"),
        ({"scope": "unit"}, ValueError, "scope must be"),
    ],
)
def test_bad_arguments_of_cyclical(changes, error, message) -> None:
    arguments = {"sparsity": 0.9, "total_steps": 1000, "interval": 10, **changes}
    with pytest.raises(error, match=message):
        granet_jax.cyclical(**arguments)


@pytest.mark.parametrize(
    ("switches", "error", "message"),
    [
        ((), ValueError, "switches must hold one or more"),
        ((10, 20), ValueError, "switches must be odd in number"),
        ((10, 30, 20), ValueError, "switches must increase"),
        ((0, 10, 20), ValueError, "switches must be at least 1"),
        ((1.5,), TypeError, "switches must be an integer"),
    ],
)
def test_bad_arguments_of_acdc(switches, error, message) -> None:
    with pytest.raises(error, match=message):
        granet_jax.acdc(0.9, switches)


def test_bad_records_and_uses() -> None:
    acdc = granet_jax.acdc(0.9, (1, 2, 3))
    with pytest.raises(ValueError, match="acdc resets the optimizer's moments"):
        granet_jax.transform(acdc)
    rigl = granet_jax.rigl(0.5, 10, interval=1)
    with pytest.raises(ValueError, match="grow must be None with weights"):
        dataclasses.replace(rigl, weights="projected")
    with pytest.raises(ValueError, match="weights must be one of 'sparse'"):
        dataclasses.replace(rigl, weights="soft")
    with pytest.raises(TypeError, match="revive must be a function or None"):
        dataclasses.replace(acdc, revive="magnitude")
    with pytest.raises(ValueError, match="refresh must be at least 1"):
        dataclasses.replace(acdc, refresh=0)
    with pytest.raises(TypeError, match="schedule must be a function"):
        schedules.restarted(0.1, 10)  # pyright: ignore
    with pytest.raises(ValueError, match="period must be at least 1"):
        schedules.restarted(optax.constant_schedule(0.1), 0)
    projected = granet_jax.cyclical(
        0.9, 100, interval=1, initial_sparsity=0.5, recovery="projected"
    )
    shapes = {"w": jax.ShapeDtypeStruct((4, 4), jnp.float32)}
    with pytest.raises(TypeError, match="params must be arrays: cyclical chooses"):
        granet_jax.init_masks(projected, shapes)
    # Abstract values are fine where all are traced.
    masks = jax.eval_shape(granet_jax.transform(projected).init, shapes).masks
    assert masks["w"].shape == (4, 4)
    assert masks["w"].dtype == bool
