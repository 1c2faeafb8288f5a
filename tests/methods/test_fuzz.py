"""Any run of any method, whatever happens to it on the way, is the oracle's run.

A state machine steps, saves and restores, moves between devices, sets masks, changes
the method and the step count; after every step parameters, updates, masks, moments and
counters are compared with a simulation, to the bit, and what the design promises of
every step is asserted by itself:

1. Pruned weights are exactly zero; so are their moments.
2. The number of active weights is the method's target, to the unit, and between updates
   masks do not change.
3. Active weights, and leaves without a mask, get the inner optimizer's update.
4. Masks do not depend on the number of devices.
5. The step compiles once for each number of devices, and keeps its types.
6. Parameters that nobody masked are exactly sparse after the first step.

Compiling takes nearly all of the time. So a few labs are compiled, and have many runs;
the nightly run draws eighty more of them, ten thousand runs in all.
"""

import functools
import zlib

import hypothesis
import hypothesis.strategies as st
import pytest
from hypothesis import stateful

from tests.helpers import fuzzing
from tests.helpers.fuzzing import Lab, Run, recorded, rich_tree
from tests.helpers.profile import NIGHTLY

# Each method in one of them, early and late updates, both scopes.
LABS = {
    "mixed dtypes": lambda: Lab(
        rich_tree("float32", "bfloat16", "float16"),
        [
            recorded("granet", 0.8, 14, begin_step=1, end_step=8, interval=3),
            recorded("set_", 0.7, 12, interval=2),
            recorded("acdc", 0.75, (2, 4, 5, 7, 9)),
            recorded(
                "top_kast", 0.75, backward_sparsity=0.5, interval=2, penalty=2.0**-5
            ),
            recorded("static", 0.6),
        ],
        inner="momentum",
    ),
    # As users compile it.
    "packed": lambda: Lab(
        rich_tree("float32"),
        [
            recorded(
                "granet",
                0.8,
                11,
                interval=2,
                end_step=8,
                initial_sparsity=0.4,
                scope="layer",
                grow="random",
            ),
            recorded("snfs", 0.7, 9, interval=2, decay=0.5),
            recorded("straight_through", 0.75, 8, interval=2, penalty=2.0**-4),
            recorded("sculpt", 0.75, 9, cycles=2, initial_sparsity=0.5),
        ],
        inner="adam",
        packed=True,
        options=None,
    ),
    "bfloat16": lambda: Lab(
        rich_tree("bfloat16", "float32"),
        [
            recorded("gmp", 0.9, 9, interval=2),
            recorded("rigl", 0.7, 12, interval=2),
            recorded(
                "cyclical",
                0.8,
                12,
                cycles=2,
                ramp=0.5,
                interval=1,
                initial_sparsity=0.2,
            ),
            recorded(
                "greg2",
                0.75,
                interval=2,
                growth=0.25,
                ceiling=0.5,
                settle_steps=1,
                pick_growth=0.125,
                pick_ceiling=0.25,
                weight_decay=2.0**-4,
            ),
        ],
        inner="adamw",
        # The bias too, and not that of one weight.
        flags=[True, False, True, False, False, True, True, False],
    ),
    "last link": lambda: Lab(
        rich_tree("float16"),
        [
            recorded("gmp", 0.8, 9, interval=1, scope="layer", initial_sparsity=0.3),
            recorded("granet", 0.8, 10, interval=2, initial_sparsity=0.5),
            recorded(
                "cyclical",
                0.8,
                12,
                cycles=3,
                ramp=0.5,
                interval=1,
                recovery="projected",
            ),
        ],
        inner="lion",
        steers=False,
    ),
}
lab_of = functools.cache(lambda name: LABS[name]())
# Where runs move between devices: each number of them compiles a method's step again.
MOVING = {"mixed dtypes": (0, 3) if NIGHTLY else (0,)}
SEED = st.integers(0, 2**20)
KIND = st.sampled_from(["normal", "ties", "zeros"])


class Machine(stateful.RuleBasedStateMachine):
    """A run, and what may happen to it.

    Attributes:
      lab: in which it happens.
      moving: the methods whose runs may move between devices.
    """

    lab: Lab
    moving: tuple[int, ...] = ()
    saved = False

    @stateful.initialize(
        data=st.data(), seed=SEED, kind=KIND, apply_first=st.booleans()
    )
    def begin(
        self, data: st.DataObject, seed: int, kind: str, apply_first: bool
    ) -> None:
        self.method = data.draw(st.integers(0, len(self.lab.methods) - 1))
        self.run = Run(self.lab, self.method, seed, kind, apply_first)

    @stateful.rule(seed=SEED, kind=KIND | st.just("bad"))
    def step(self, seed: int, kind: str) -> None:
        self.run.step(seed, kind)

    @stateful.rule(number=st.integers(2, 8), seed=SEED, kind=KIND)
    def steps(self, number: int, seed: int, kind: str) -> None:
        for i in range(number):
            self.run.step(seed + i, kind)

    # Once a run: it takes as long as ten steps.
    @stateful.precondition(lambda self: not self.saved)
    @stateful.rule()
    def save_and_restore(self) -> None:
        self.saved = True
        self.run.save_and_restore()

    @stateful.rule(devices=st.sampled_from([8, 2, 4, 1]))
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
        method = data.draw(st.integers(0, len(self.lab.methods) - 1))
        if method not in self.moving:
            self.run.reshard(1)
        self.method = method
        self.run.switch(method)

    @stateful.rule(count=st.integers(0, 16) | st.integers(2**31 - 4, 2**31 - 1))
    def jump(self, count: int) -> None:
        self.run.jump(count)


def check(name: str, lab: Lab, examples: int, moving: tuple[int, ...] = ()) -> None:
    machine = type("Machine", (Machine,), {"lab": lab, "moving": moving})
    default = hypothesis.settings()
    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=20 if NIGHTLY else 10,
        suppress_health_check=list(hypothesis.HealthCheck),
        # To shrink a failure takes long; without it the run is printed as it was.
        phases=default.phases if NIGHTLY else [hypothesis.Phase.generate],
    )
    if default.derandomize:
        # Each lab sees other runs.
        hypothesis.seed(zlib.crc32(name.encode()))(machine)
    stateful.run_state_machine_as_test(machine, settings=settings)


@pytest.mark.parametrize("name", LABS)
def test_any_run_is_the_oracles(name: str) -> None:
    check(name, lab_of(name), 500 if NIGHTLY else 20, MOVING.get(name, ()))


@pytest.mark.parametrize("seed", range(80 if NIGHTLY else 1))
def test_any_run_in_any_lab_is_the_oracles(seed: int) -> None:
    lab = fuzzing.drawn_lab(seed, methods=4 if NIGHTLY else 1)
    check(f"lab {seed}", lab, 100 if NIGHTLY else 10)
