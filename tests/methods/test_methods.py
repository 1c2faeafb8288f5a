"""Every method against the NumPy reference, bit for bit after every step.

Labs compile each method once, for whole schedules and for random runs. In a random run
a state machine steps, saves and restores, moves between devices, sets masks, changes
the method and the step count. Every step compares parameters, updates, masks, moments
and counters with the reference, and checks by themselves:

1. Pruned weights and their moments are exactly zero.
2. The number of active weights is the method's target, to the unit, and masks do not
   change between updates.
3. Active weights, and leaves without a mask, get the inner optimizer's update.
4. Masks do not depend on the number of devices.
5. The step compiles once for each number of devices, and keeps its types.
6. Parameters that nobody masked are exactly sparse after the first step.
"""

import functools
import itertools
import math
import random
import zlib
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import optax
import pytest
from hypothesis import stateful

import granet_jax
from tests.helpers import fuzzing, numpy_reference
from tests.helpers.compiler_options import DEFAULT, QUICK
from tests.helpers.fuzzing import (
    KERNELS,
    Lab,
    MethodSpec,
    Run,
    rich_tree,
    run_schedule,
    spec,
)
from tests.helpers.profile import NIGHTLY
from tests.helpers.training import make_step
from tests.methods.records import fraction_of

T = 40  # Steps of a long schedule.


# Scores of users' own methods. The library and the reference call the same functions.
def saliency(x: Any) -> Any:
    return abs(x.param * x.grad)


def descent(x: Any) -> Any:
    return -x.grad


def crowded(x: Any) -> Any:
    """The number of active inputs of the weight's output, an integer."""
    axes = tuple(range(x.mask.ndim - 1))
    return x.mask.sum(axes, keepdims=True, dtype="int32") + x.mask * 0


def strength(x: Any) -> Any:
    """The sum of the output's weights: it also reads weights that are pruned."""
    axes = tuple(range(x.param.ndim - 1))
    return abs(x.param).sum(axes, keepdims=True) + abs(x.param) / 32


def smallest(x: Any) -> Any:
    return -abs(x.param)


def kernels_first(x: Any) -> Any:
    return abs(x.param) + (100 if x.param.ndim == 2 else 0)


def average(x: Any) -> Any:
    return x.average * 2


def first_leaf_first(shapes: Any, sparsity: float) -> list[float]:
    """A distribution that prunes the first leaf until it is empty."""
    first, second = (float(np.prod(shape)) for shape in shapes)
    wanted = (1 - sparsity) * (first + second)
    return [max(wanted - second, 0) / first, min(wanted / second, 1)]


STAIRS = {3: 0.3, 5: 0.2, 7: 0.77}  # The sparsity falls at step 5: none return.
PRUNE: dict[str, Any] = {"start": 0.0, "targets": STAIRS}
EXCHANGE: dict[str, Any] = {"start": 0.5, "fractions": dict.fromkeys((2, 4, 6, 8), 0.5)}
BOTH: dict[str, Any] = {**PRUNE, "fractions": dict.fromkeys(STAIRS, 0.5)}
REVIVE: dict[str, Any] = {"start": 0.2, "targets": {2: 0.5, 4: 0.3, 6: 0.8}}
LAYER: dict[str, Any] = {"scope": "layer"}
UNIFORM: dict[str, Any] = {"distribution": "uniform"}
CYCLES: dict[str, Any] = {"cycles": 5, "interval": 2}
SHORT: dict[str, Any] = {"cycles": 2, "interval": 1, "ramp": 0.5}
EVERY: dict[str, Any] = {"interval": 1}
FREE: dict[str, Any] = {"penalty": 0.0, **EVERY}
HALF: dict[str, Any] = {"initial_sparsity": 0.5}
FIFTH: dict[str, Any] = {"initial_sparsity": 0.2}
FAN_IN: dict[str, Any] = {"structure": ("constant_fan_in",), **UNIFORM}
TWO_OF_FOUR: dict[str, Any] = {"structure": ("n_of_m", 2, 4)}
BLOCKS: dict[str, Any] = {"structure": ("block", 2, 2)}
GREG: dict[str, Any] = {"interval": 2, "growth": 0.25, "settle_steps": 1}
PICK: dict[str, Any] = {"pick_growth": 0.125, "pick_ceiling": 0.25}

LABS: dict[str, dict[str, Any]] = {
    "kernels": {"tree": KERNELS, "inner": "momentum", "options": DEFAULT},
    "mixed dtypes": {
        "tree": rich_tree("float32", "bfloat16", "float16"),
        "inner": "clipped",
    },
    "packed": {
        "tree": rich_tree("float32"),
        "inner": "adam",
        "packed": True,
        "options": QUICK,
    },
    "bfloat16": {
        "tree": rich_tree("bfloat16", "float32"),
        # After the first step of Adam all magnitudes nearly tie: nothing is revived.
        "inner": "adamw",
        # The bias carries a mask, and the kernel of one weight does not.
        "flags": [True, False, True, False, False, True, True, False],
    },
    "last link": {"tree": rich_tree("float16"), "inner": "lion", "steers": False},
    "structures": {"tree": KERNELS, "inner": "sgd", "coarse": True, "options": QUICK},
    "own": {"tree": KERNELS, "inner": "sgd", "coarse": True, "options": QUICK},
}
METHODS: dict[str, list[MethodSpec]] = {
    "kernels": [
        spec("granet", 0.9, T, interval=2),
        spec("gmp", 0.95, T, interval=2, begin_step=1),
        spec("set_", 0.6, T, interval=3, distribution="er"),
        spec("snfs", 0.15, T, interval=3, decay=0.5, fraction=0.9),
        spec("static", 0.8),
        spec("cyclical", 0.9, T, **CYCLES),
        spec("cyclical", 0.9, T, recovery="projected", **CYCLES, **LAYER),
        spec("cyclical", 0.9, T, recovery="straight_through", **CYCLES, **FIFTH),
        spec("straight_through", 0.9, T, interval=3, penalty=2.0**-6),
        spec("top_kast", 0.75, scope="global", backward_sparsity=0.2, **FREE),
    ],
    "mixed dtypes": [
        spec("granet", 0.8, 14, begin_step=1, end_step=8, interval=3),
        spec("acdc", 0.75, (2, 4, 5, 7, 9), floor=0.1),
        spec("cyclical", 0.8, 12, **SHORT, **FIFTH),
        # The density divides the penalty: a quarter, so that products are exact.
        spec("top_kast", 0.75, backward_sparsity=0.5, interval=2, penalty=2.0**-5),
        spec("greg1", 0.75, ceiling=0.25, **GREG),
    ],
    "packed": [
        spec("granet", 0.8, 11, grow="random", end_step=8, interval=2, **HALF, **LAYER),
        spec("sculpt", 0.75, 9, cycles=2, **HALF),
        spec("dsr", 0.7, 9, interval=2, fraction=0.125, threshold=0.125, **UNIFORM),
    ],
    "bfloat16": [
        spec("rigl", 0.7, 12, interval=2),
        spec("greg2", 0.75, ceiling=0.5, weight_decay=2.0**-4, **GREG, **PICK),
    ],
    "last link": [
        spec("gmp", 0.8, 9, **HALF, **LAYER, **EVERY),
        spec("granet", 0.8, 10, interval=2, **HALF),
        spec("cyclical", 0.8, 12, recovery="projected", **SHORT, **FIFTH),
        spec("mest", 0.7, 12, interval=2, gradient_weight=0.5),
    ],
    "structures": [
        spec("gmp", 0.75, 9, interval=2, structure=("n_of_m", 1, 4), **LAYER),
        spec("straight_through", 0.5, 8, penalty=0.25, **TWO_OF_FOUR, **EVERY),
        spec("cyclical", 0.5, 16, structure=("n_of_m", 4, 8), **SHORT, **LAYER),
        spec("granet", 0.75, 10, **EVERY, **FAN_IN, **LAYER),
        spec("acdc", 0.5, (2, 4, 6, 8, 9), structure=("channel",), **LAYER),
        spec("granet", 0.75, 10, floor=0.2, **EVERY, **BLOCKS),
        spec("snfs", 0.5, 10, decay=0.5, **EVERY, **BLOCKS),
        spec("top_kast", 0.75, backward_sparsity=0.5, **FREE, **BLOCKS),
    ],
    "own": [
        spec("own", drop=crowded, grow=descent, **EXCHANGE),
        spec("own", drop=saliency, grow=crowded, **EXCHANGE),
        spec("own", drop=smallest, grow=average, decay=0.5, **EXCHANGE),
        # What pruning has removed is zero to `drop`, and is not yet to `grow`.
        spec("own", prune=saliency, drop=strength, grow=strength, **BOTH),
        spec("own", prune=smallest, distribution=first_leaf_first, **LAYER, **PRUNE),
        spec("own", prune=kernels_first, revive=descent, **REVIVE),
    ],
}
lab_of = functools.cache(lambda name: Lab(methods=METHODS[name], **LABS[name]))
SINGLE = [
    pytest.param(name, i, id=f"{name}-{method.function}-{i}")
    for name, methods in METHODS.items()
    for i, method in enumerate(methods)
]
# Random runs set other masks, which have no structure.
RANDOM = [name for name in LABS if name not in ("structures", "own")]
# Only runs of these methods move between devices: each number of devices compiles the
# step again.
MOVING = {"mixed dtypes": (0,)}
SEED = st.integers(0, 2**20)
KIND = st.sampled_from(["normal", "ties", "zeros"])


def test_schedules_follow_the_reference() -> None:
    trained = ("granet", "gmp", "rigl", "set_", "snfs", "mest", "dsr", "cyclical")
    defaults = [
        *(spec(name, 0.9, 9000) for name in trained),
        *(spec(name, 0.9) for name in ("static", "greg1", "greg2")),
        spec("sculpt", 0.9, 9000, cycles=2),
        spec("straight_through", 0.9, 9000),
        spec("top_kast", 0.9, backward_sparsity=0.5),
    ]
    drawn = [
        fuzzing.drawn_method(random.Random(seed), steers=True, penalised=True)
        for seed in range(100)
    ]
    for method in [*defaults, *itertools.chain(*METHODS.values()), *drawn]:
        ours, reference = method.build()
        for name in ("weights", "scope", "distribution", "refresh"):
            assert getattr(ours, name) == getattr(reference, name)
        assert ours.marked_sparsity == reference.marked
        assert set(ours.resets.steps()) == reference.resets
        assert set(ours.marks.steps()) <= reference.marks
        assert list(ours.updates.steps()) == reference.update_steps
        for t in (0, *reference.update_steps):
            assert math.isclose(ours.sparsity(t), reference.sparsity(t), abs_tol=1e-12)
        if reference.fractions and reference.threshold is None:
            for t in reference.update_steps:
                expected = reference.fractions.get(t, 0.0)
                assert math.isclose(fraction_of(ours)(t), expected, abs_tol=1e-12)


FLOORS: dict[str, dict[str, Any]] = {
    "gmp": {"end_step": 8, "interval": 2},
    "granet": {"total_steps": 16, "interval": 2},
    "cyclical": {"total_steps": 16, "cycles": 2, "interval": 2},
    "acdc": {"switches": (2, 4, 6)},
    "sculpt": {"total_steps": 12, "cycles": 2, "initial_sparsity": 0.0},
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.slow] * (x != "gmp")) for x in FLOORS],
)
def test_a_floor_keeps_layers_of_small_weights(name: str) -> None:
    rng = np.random.default_rng(0)
    large, small = np.float32(rng.normal(size=(2, 20, 20)))
    weights = {"large": large, "small": small / 100}
    # The product 0.0725 * 400 is a little below 29.
    for floor, kept in ((0.0, 0), (0.0725, 29), (0.1, 40)):
        method = getattr(granet_jax, name)(0.9, floor=floor, **FLOORS[name])
        tx = granet_jax.transform(method, optax.sgd(0.0))
        state, step = tx.init(weights), jax.jit(tx.update, compiler_options=QUICK)
        for _ in range(16):
            _, state = step(weights, state, weights)
        masks = granet_jax.get_masks(state)
        assert [int(m.sum()) for m in masks.values()] == [80 - kept, kept]
        assert granet_jax.sparsity(masks).empty == (() if kept else ("small",))


def test_floors_that_do_not_fit() -> None:
    for name, args in FLOORS.items():
        method = getattr(granet_jax, name)
        with pytest.raises(ValueError, match="floor must be at most the density"):
            method(0.9, floor=0.11, **args)
        with pytest.raises(ValueError, match='floor must be 0 with scope="layer"'):
            method(0.9, floor=0.01, scope="layer", **args)
    for recovery in ("projected", "straight_through"):
        with pytest.raises(ValueError, match=f'floor must be 0 with .*"{recovery}"'):
            granet_jax.cyclical(0.9, 400, recovery=recovery, floor=0.01, interval=10)


LATE: list[MethodSpec] = [
    # The interval divides the number of steps, and one more than it.
    *(
        spec(name, 0.5, total, interval=4, **options)
        for total in (24, 25)
        for name, options in {
            "granet": {"end_step": 24},
            **{name: {"stop": 1.0} for name in ("rigl", "set_", "dsr")},
            "mest": {},
            "snfs": {},
        }.items()
    ),
    spec("cyclical", 0.5, 24, interval=4, cycles=2),
]


def may_grow(method: granet_jax.Method, step: int) -> bool:
    shares = [getattr(phase, "fraction", 0.0) for phase in method.phases]
    exchanges = any(x(step) if callable(x) else x for x in shares)
    return exchanges or method.sparsity(step) < method.sparsity(step - 1)


def test_no_schedule_grows_in_the_last_interval() -> None:
    # What is delivered holds no weight that has not been trained.
    for method in LATE:
        ours, _ = method.build()
        growing = [t for t in ours.updates.steps() if may_grow(ours, t)]
        assert 4 < max(growing) <= method.args[1] - 4


@pytest.mark.parametrize("method", LATE[:1] + LATE[3:4], ids=lambda m: m.function)
def test_nothing_grows_in_the_last_interval(method: MethodSpec) -> None:
    ours, _ = method.build()
    grads = np.float32(np.random.default_rng(0).normal(size=(24, 16, 16)))
    tx = granet_jax.transform(ours, optax.sgd(0.25))
    step = jax.jit(make_step(tx), compiler_options=QUICK)
    params = {"w": grads[0]}
    state = tx.init(params)
    active = [np.asarray(granet_jax.get_masks(state)["w"])]
    for g in grads:
        params, state = step(params, state, {"w": g})
        active.append(np.asarray(granet_jax.get_masks(state)["w"]))
    assert any((m & ~before).any() for before, m in itertools.pairwise(active))
    assert all(not (active[-1] & ~m).any() for m in active[-4:])
    assert active[-1].sum() == 128


@pytest.mark.parametrize(("name", "method"), SINGLE)
def test_every_method_follows_the_reference(name: str, method: int) -> None:
    changed, run = run_schedule(lab_of(name), method)
    # Nearly every update changes masks in nearly every run.
    assert changed >= len(run.compiled.reference.update_steps)


class Machine(stateful.RuleBasedStateMachine):
    """A random run.

    Attributes:
      lab: Lab of the run.
      moving: Methods whose runs may move between devices.
    """

    lab: Lab
    moving: tuple[int, ...] = ()
    saved = False

    @stateful.initialize(
        data=st.data(), seed=SEED, kind=KIND, apply_first=st.booleans()
    )
    def begin(self, data: Any, seed: int, kind: str, apply_first: bool) -> None:
        self.method = data.draw(st.integers(0, len(self.lab.methods) - 1))
        self.run = Run(self.lab, self.method, seed, kind, apply_first)

    @stateful.rule(seed=SEED, kind=KIND | st.just("bad"))
    def step(self, seed: int, kind: str) -> None:
        self.run.step(seed, kind)

    @stateful.rule(number=st.integers(2, 8), seed=SEED, kind=KIND)
    def steps(self, number: int, seed: int, kind: str) -> None:
        for i in range(number):
            self.run.step(seed + i, kind)

    # It takes as long as ten steps, so it happens once.
    @stateful.precondition(lambda self: not self.saved)
    @stateful.rule()
    def save_and_restore(self) -> None:
        self.saved = True
        self.run.save_and_restore()

    @stateful.rule(devices=st.sampled_from([8, 4, 1, *[2][:NIGHTLY]]))
    def reshard(self, devices: int) -> None:
        if self.method in self.moving:
            self.run.reshard(devices)
            self.run.step(devices, "ties")

    @stateful.rule(
        density=st.lists(st.sampled_from([0.5, 0.1, 1.0, 0.0]), min_size=1, max_size=3),
        seed=SEED,
    )
    def set_masks(self, density: list[float], seed: int) -> None:
        self.run.set_masks(self.lab.masks(density, seed))

    @stateful.rule(data=st.data())
    def switch(self, data: st.DataObject) -> None:
        self.method = data.draw(st.integers(0, len(self.lab.methods) - 1))
        if self.method not in self.moving:
            self.run.reshard(1)
        self.run.switch(self.method)

    @stateful.rule(count=st.integers(0, 16) | st.integers(2**31 - 4, 2**31 - 1))
    def jump(self, count: int) -> None:
        self.run.jump(count)


def check_runs(name: str, lab: Lab, number: int, steps: int = 10, **parts: Any) -> None:
    machine = type("Machine", (Machine,), {"lab": lab, **parts})
    default = hypothesis.settings()
    settings = hypothesis.settings(
        max_examples=number,
        stateful_step_count=steps,
        suppress_health_check=list(hypothesis.HealthCheck),
        # Shrinking a failure takes long. Without it the run is printed as it was.
        phases=[hypothesis.Phase.generate] if default.derandomize else default.phases,
    )
    if default.derandomize:
        # Each lab draws other runs.
        hypothesis.seed(zlib.crc32(name.encode()))(machine)
    stateful.run_state_machine_as_test(machine, settings=settings)


@pytest.mark.parametrize("name", RANDOM)
def test_random_runs_follow_the_reference(name: str) -> None:
    check_runs(name, lab_of(name), 20, moving=MOVING.get(name, ()))


@pytest.mark.slow
@pytest.mark.parametrize("name", RANDOM)
def test_many_long_random_runs_follow_the_reference(name: str) -> None:
    moving = (0, 2) if name in MOVING else ()
    check_runs(f"{name}, long", lab_of(name), 500, 20, moving=moving)


@pytest.mark.parametrize(
    ("seed", "methods", "number"),
    [
        (0, 1, 10),
        *(pytest.param(i, 4, 100, marks=pytest.mark.slow) for i in range(1, 80)),
    ],
)
def test_random_labs_follow_the_reference(seed: int, methods: int, number: int) -> None:
    check_runs(f"lab {seed}", fuzzing.drawn_lab(seed, methods), number)


def test_boxes_of_the_reference_by_hand() -> None:
    leaf = np.arange(16).reshape(4, 4)
    rows = numpy_reference.boxed(leaf, (2, 2))
    assert rows.tolist()[:2] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    np.testing.assert_array_equal(numpy_reference.unboxed(rows, (4, 4), (2, 2)), leaf)
