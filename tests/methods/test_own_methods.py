"""A user's own method: every part of the record replaced, against NumPy."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax import distributions, schedules
from granet_jax.schedules import UpdateSteps
from tests.helpers.trees import assert_same

SHAPES = {"conv": (3, 3, 2, 4), "dense": (6, 8)}  # In the order of the leaves.
SIZE = 72 + 48
RATE = 0.5  # Power of two: p - RATE g rounds once, fused or not.
STEPS = 9
RIGL = granet_jax.rigl(0.5, 12, interval=2, fraction=0.5)


def draw(step: int, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Multiples of 1/8, none of them zero: every product below is exact."""
    rng = np.random.default_rng(step)
    return {
        name: (
            rng.choice([-1, 1], shape) * rng.integers(1, 17, shape) / np.float32(8)
        ).astype(dtype)
        for name, shape in SHAPES.items()
    }


def draw_masks() -> dict[str, np.ndarray]:
    """Half of all weights: 40 and 20 of the leaves'."""
    rng = np.random.default_rng(77)
    return {
        name: (rng.permutation(math.prod(SHAPES[name])) < number).reshape(SHAPES[name])
        for name, number in (("conv", 40), ("dense", 20))
    }


def top(score: Any, candidates: list[np.ndarray], k: int) -> list[np.ndarray]:
    """The k best-scored candidates of all leaves; equal ones by order, NaN last."""
    score = np.concatenate([np.asarray(s).reshape(-1) for s in score])
    open_ = np.concatenate([c.reshape(-1) for c in candidates])
    rank = np.lexsort((-np.nan_to_num(score), np.isnan(score), ~open_))
    chosen = np.zeros(score.shape, bool)
    chosen[rank[: min(k, open_.sum())]] = True
    parts = np.split(chosen, np.cumsum([c.size for c in candidates])[:-1])
    return [p.reshape(c.shape) for p, c in zip(parts, candidates, strict=True)]


class Simulation:
    """What a method should do, by NumPy: plain SGD, one step at a time."""

    def __init__(self, method: granet_jax.Method, params: Any, masks: Any):
        self.method = method
        self.params = [params[name] for name in SHAPES]
        self.masks = [masks[name] for name in SHAPES]
        self.averages = [np.zeros(s, np.float32) for s in SHAPES.values()]
        self.count = 0

    def score(self, function: Callable, stepped: Any, grads: Any) -> list[Any]:
        decay = self.method.accumulator_decay
        return [
            function(
                granet_jax.ScoreInputs(
                    param=stepped[i],
                    grad=grads[i],
                    mask=self.masks[i],
                    accumulator=None if decay is None else self.averages[i],
                    key=None,  # pyright: ignore
                )
            )
            for i in range(len(SHAPES))
        ]

    def step(self, gradient: Any) -> None:
        method, old = self.method, self.masks
        self.count += 1
        grads = [gradient[name] for name in SHAPES]
        stepped = [
            np.where(m, p - p.dtype.type(RATE) * g, p.dtype.type(0))
            for p, g, m in zip(self.params, grads, old, strict=True)
        ]
        if method.accumulator_decay is not None:
            decay = np.float32(method.accumulator_decay)
            self.averages = [
                decay * a + (1 - decay) * g.astype(np.float32)
                for a, g in zip(self.averages, grads, strict=True)
            ]
        survivors = old
        if self.count in method.updates.steps():
            self.prune(stepped, grads)
            # Pruned for good: what comes back in the same update starts at zero.
            survivors = self.masks
            if method.grow is not None:
                self.exchange(stepped, grads)
        self.params = [
            np.where(a & b, p, p.dtype.type(0))
            for a, b, p in zip(survivors, self.masks, stepped, strict=True)
        ]

    def prune(self, stepped: Any, grads: Any) -> None:
        method = self.method
        sparsity = method.sparsity(self.count)
        total = math.floor((1 - sparsity) * SIZE + 0.5)
        active = [int(m.sum()) for m in self.masks]
        if total >= sum(active):
            return
        score = self.score(method.prune, stepped, grads)
        if method.scope == "global":
            self.masks = top(score, self.masks, total)
            return
        numbers = distributions.counts(
            list(SHAPES.values()), sparsity, method.distribution, caps=active
        )
        self.masks = [
            top([s], [m], k)[0]
            for s, m, k in zip(score, self.masks, numbers, strict=True)
        ]

    def exchange(self, stepped: Any, grads: Any) -> None:
        method = self.method
        share = min(math.floor(method.fraction(self.count) * 2**32), 2**32 - 1)
        active = [int(m.sum()) for m in self.masks]
        dropped = [-(-share * a // 2**32) for a in active]
        # Of what this update has pruned already `drop` sees zeros, `grow` the weights.
        present = [p * m for p, m in zip(stepped, self.masks, strict=True)]
        score = self.score(method.drop, present, grads)
        self.masks = [
            top([s], [m], a - d)[0]
            for s, m, a, d in zip(score, self.masks, active, dropped, strict=True)
        ]
        score = self.score(method.grow, stepped, grads)
        self.masks = [
            m | top([s], [~m], d)[0]
            for s, m, d in zip(score, self.masks, dropped, strict=True)
        ]


def start(method: granet_jax.Method, dtype: Any = np.float32) -> Any:
    """Parameters, and masks as the method would start with (these drawn by NumPy)."""
    params = draw(0, dtype)
    masks = draw_masks()
    if method.sparsity(0) == 0:
        masks = {name: np.ones(shape, bool) for name, shape in SHAPES.items()}
    params = {k: np.where(masks[k], p, p.dtype.type(0)) for k, p in params.items()}
    return params, masks


def compiled(method: granet_jax.Method, masks: Any) -> tuple[Any, Any]:
    tx = granet_jax.transform(method, optax.sgd(RATE), masks=masks)

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx, step


def run(method: granet_jax.Method, dtype: Any = np.float32) -> list[Any]:
    """Trains with the library, compares each step with NumPy; the masks of each."""
    params, masks = start(method, dtype)
    simulation = Simulation(method, params, masks)
    tx, step = compiled(method, masks)
    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params)
    history = [masks]
    for index in range(1, STEPS + 1):
        grads = draw(index, dtype)
        params, state = step(params, state, grads)
        simulation.step(grads)
        found = jax.device_get((params, state))
        history.append(found[1].masks)
        expected = dict(zip(SHAPES, simulation.masks, strict=True))
        assert_same(found[1].masks, expected)
        for name, value in zip(SHAPES, simulation.params, strict=True):
            np.testing.assert_array_equal(found[0][name], value)
        if method.accumulator_decay is not None:
            averages = dict(zip(SHAPES, simulation.averages, strict=True))
            assert_same(found[1].accumulator, averages)
    return history


def active(masks: Any) -> int:
    return sum(int(m.sum()) for m in jax.tree.leaves(masks))


def moved(history: list[Any]) -> list[int]:
    """The steps that changed the masks."""
    return [
        t
        for t in range(1, len(history))
        if any((history[t][k] != history[t - 1][k]).any() for k in SHAPES)
    ]


def magnitude(inputs: granet_jax.ScoreInputs) -> Any:
    return abs(inputs.param)


def saliency(inputs: granet_jax.ScoreInputs) -> Any:
    return abs(inputs.param * inputs.grad)


def descent(inputs: granet_jax.ScoreInputs) -> Any:
    """Negative numbers too, and ties."""
    return -inputs.grad


def crowded(inputs: granet_jax.ScoreInputs) -> Any:
    """Integers: how many of the weight's output's inputs are active."""
    axes = tuple(range(inputs.mask.ndim - 1))
    return inputs.mask.sum(axes, keepdims=True, dtype="int32") + inputs.mask * 0


def strength(inputs: granet_jax.ScoreInputs) -> Any:
    """The sum of the output's weights: looks at pruned ones, too. Without ties."""
    axes = tuple(range(inputs.param.ndim - 1))
    return abs(inputs.param).sum(axes, keepdims=True) + abs(inputs.param) / 32


def largest_first(inputs: granet_jax.ScoreInputs) -> Any:
    return -abs(inputs.param)


def steady(inputs: granet_jax.ScoreInputs) -> Any:
    """Reads the accumulator, with its sign."""
    return inputs.accumulator * 2


def gaps(inputs: granet_jax.ScoreInputs) -> Any:
    """NaN where the weight is positive."""
    return jnp.where(inputs.param > 0, jnp.nan, inputs.param)


STAIRS = {0: 0.0, 3: 0.3, 5: 0.2, 7: 0.77}


def stairs(step: int) -> float:
    return STAIRS[step]


def halving(step: int) -> float:
    return 2.0**-step


def test_the_base_follows_the_simulation() -> None:
    assert moved(run(RIGL)) == [2, 4, 6, 8]


@pytest.mark.parametrize("drop", [saliency, largest_first, descent, crowded])
def test_own_drop_score(drop: Any) -> None:
    history = run(dataclasses.replace(RIGL, drop=drop))
    assert moved(history) == [2, 4, 6, 8]
    for masks in history:
        assert active(masks) == active(history[0])


@pytest.mark.parametrize(
    ("grow", "steps"),
    # The last update by the second regrows just what it drops.
    [(descent, [2, 4, 6, 8]), (crowded, [2, 4, 6])],
)
def test_own_grow_score(grow: Any, steps: list[int]) -> None:
    assert moved(run(dataclasses.replace(RIGL, grow=grow))) == steps


def test_own_drop_score_by_hand() -> None:
    # Of four active weights the two of largest magnitude go, and come back by gradient
    # only if theirs is among the two largest.
    method = dataclasses.replace(
        RIGL, drop=largest_first, updates=UpdateSteps(1, 1, 1), fraction=lambda _: 0.5
    )
    params = {"w": np.array([[4.0, 1.0, 3.0, 2.0, 0.0, 0.0]], np.float32)}
    masks = {"w": np.array([[True, True, True, True, False, False]])}
    grads = {"w": np.array([[0.0, 0.0, 6.0, 0.0, 5.0, -7.0]], np.float32)}
    tx = granet_jax.transform(method, optax.sgd(0.25), masks=masks)
    # Stepped: 4, 1, 1.5, 2; the first and the fourth are dropped. The gradient grows
    # the fifth and sixth.
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert state.masks["w"].tolist() == [[False, True, True, False, True, True]]
    new = optax.apply_updates(params, updates)
    assert new["w"].tolist() == [[0.0, 1.0, 1.5, 0.0, 0.0, 0.0]]


def test_nan_scores_go_first() -> None:
    method = dataclasses.replace(RIGL, drop=gaps, updates=UpdateSteps(1, 1, 1))
    params = {"w": np.array([[-1.0, 3.0, -2.0, 9.0, 0.0, 0.0]], np.float32)}
    masks = {"w": np.array([[True, True, True, True, False, False]])}
    grads = {"w": np.array([[0.0, 0.0, 0.0, 0.0, 1.0, 1.0]], np.float32)}
    method = dataclasses.replace(method, fraction=lambda _: 0.5)
    tx = granet_jax.transform(method, optax.sgd(0.0), masks=masks)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert state.masks["w"].tolist() == [[True, False, True, False, True, True]]


def test_own_schedules() -> None:
    # A sparsity that falls in between prunes nothing there, and grows nothing.
    method = dataclasses.replace(
        RIGL,
        sparsity=stairs,
        fraction=halving,
        updates=UpdateSteps(3, 7, 2),
        prune=saliency,
    )
    history = run(method)
    assert [active(m) for m in history] == [120] * 3 + [84] * 4 + [28] * 3
    assert moved(history) == [3, 5, 7]


@pytest.mark.parametrize("part", ["drop", "grow"])
def test_what_a_score_sees_of_weights_that_this_update_has_pruned(part: str) -> None:
    method = dataclasses.replace(
        RIGL,
        sparsity=stairs,
        updates=UpdateSteps(3, 7, 2),
        prune=largest_first,
        **{part: strength},
    )
    history = run(method)
    assert [active(m) for m in history] == [120] * 3 + [84] * 4 + [28] * 3


def test_own_pruning_within_layers() -> None:
    def densities(shapes: Any, sparsity: float) -> list[float]:
        # Everything from the first leaf, until it is gone.
        first, second = (math.prod(s) for s in shapes)
        wanted = (1 - sparsity) * (first + second)
        return [max(wanted - second, 0) / first, min(wanted / second, 1)]

    method = granet_jax.Method(
        name="first leaf first",
        sparsity=stairs,
        updates=UpdateSteps(3, 7, 2),
        distribution=densities,
        scope="layer",
        prune=largest_first,
    )
    history = run(method)
    assert [int(m["conv"].sum()) for m in history[2:8:2]] == [72, 36, 36]
    assert [int(m["dense"].sum()) for m in history[2:8:2]] == [48, 48, 48]
    assert [int(m.sum()) for m in history[7].values()] == [0, 28]


def test_own_pruning_score_across_leaves() -> None:
    # The dense leaf's weights count tenfold: pruning takes the others first.
    def weighted(inputs: granet_jax.ScoreInputs) -> Any:
        return abs(inputs.param) + (100 if inputs.param.ndim == 2 else 0)

    base = granet_jax.gmp(0.5, 8, interval=4)
    history = run(dataclasses.replace(base, prune=weighted))
    assert [int(m.sum()) for m in history[8].values()] == [12, 48]


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_own_accumulator(dtype: Any) -> None:
    method = dataclasses.replace(
        granet_jax.set_(0.5, 12, interval=2, fraction=0.5),
        name="steady",
        grow=steady,
        accumulator_decay=0.5,
        needs_gradient=True,
    )
    # In float32 whatever the parameters' dtype: the simulation's is.
    assert moved(run(method, dtype)) == [2, 4, 6, 8]


def test_no_accumulator_unless_wanted() -> None:
    state = granet_jax.transform(RIGL, masks=draw_masks()).init(draw(0))
    assert state.accumulator == ()
    method = dataclasses.replace(RIGL, accumulator_decay=0.5)
    state = granet_jax.transform(method, masks=draw_masks()).init(draw(0))
    assert_same(
        state.accumulator, {k: np.zeros(s, np.float32) for k, s in SHAPES.items()}
    )


def test_own_random_score_has_a_key_per_leaf_step_and_seed() -> None:
    def luck(inputs: granet_jax.ScoreInputs) -> Any:
        return jax.random.uniform(inputs.key, inputs.param.shape)

    method = dataclasses.replace(
        RIGL,
        drop=luck,
        grow=largest_first,
        updates=schedules.every(1, last=4),
        fraction=schedules.constant(0.5),
        needs_gradient=False,
    )
    # All is active, two leaves are alike: what is dropped is luck, and regrown in
    # part: masks differ only because of keys.
    params = {"a": jnp.ones((4, 8)), "b": jnp.ones((4, 8))}
    half = np.zeros((4, 8), bool)
    half[:, :4] = True
    masks = {"a": half, "b": half}

    def first_masks(seed: int, counts: tuple[int, ...]) -> Any:
        tx = granet_jax.transform(method, masks=masks, seed=seed)
        state, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, params)
        update = jax.jit(tx.update)
        for count in counts:
            _, after = update(zeros, state._replace(count=jnp.int32(count)), params)
            yield jax.device_get(after.masks)

    first, second, again = first_masks(0, (0, 1, 0))
    (other,) = first_masks(1, (0,))
    drawn = [m.tobytes() for x in (first, second, other) for m in x.values()]
    assert len(set(drawn)) == 6
    assert_same(again, first)


def test_without_inner_or_gradient() -> None:
    # Last link of a chain, with scores that look at weights only.
    method = dataclasses.replace(RIGL, grow=largest_first, needs_gradient=False)
    params, masks = start(method)
    tx = optax.chain(
        optax.sgd(RATE), granet_jax.transform(method, inner=None, masks=masks)
    )
    simulation = Simulation(method, params, masks)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for index in range(1, 5):
        updates, state = update(draw(index), state, params)
        params = optax.apply_updates(params, updates)
        simulation.step(draw(index))
        expected = dict(zip(SHAPES, simulation.masks, strict=True))
        assert_same(granet_jax.get_masks(state), expected)
        for name, value in zip(SHAPES, simulation.params, strict=True):
            np.testing.assert_array_equal(params[name], value)


def test_records_are_values() -> None:
    # A replaced part leaves the record it came from as it was.
    own = dataclasses.replace(RIGL, drop=saliency, name="own")
    assert (own.name, own.drop, own.grow) == ("own", saliency, RIGL.grow)
    assert (RIGL.name, RIGL.drop) == (
        "rigl",
        granet_jax.Method(name="any", sparsity=lambda _: 0.0).drop,
    )
    assert own == dataclasses.replace(own)
    with pytest.raises(dataclasses.FrozenInstanceError):
        own.drop = magnitude  # pyright: ignore
