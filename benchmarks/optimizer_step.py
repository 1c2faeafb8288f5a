"""The optimizer step between mask updates, sparse beside dense, on ResNet-50's tree.

    python -m benchmarks.step            # 25.5 M parameters, some minutes
    python -m benchmarks.step --quick    # small tree: checks the results only

Each step is jitted over the whole tree with donated buffers, and timed from several
starts, each in other memory. There is no forward pass and next to no backward pass, so
the ratio is the worst case. Gradients come in two ways: "inside", made in the same
program, as in most training loops, by a matrix product over a batch of 32; and
"argument", handed to a program that has only the optimizer (an argument belongs to the
caller, so a program that may change it copies it first).

"by hand" is the least that a step with these semantics can do: masks that never change,
one `jnp.where` for gradients and one for updates. What it takes longer than the dense
step is reading masks; what GraNet takes longer than it is this library's.

Other methods than GraNet are timed with SGD and gradients from inside. Those with dense
weights choose the masks anew: straight_through in every step, N:M here, and top_kast in
every thousandth.

Also printed: compile time, memory that the state adds, and XLA's temporary memory.
Timings are printed and never asserted; that active weights are updated as in the dense
step, that pruned ones are zero, and that steps between updates copy no leaf, is.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import granet_jax
from benchmarks import commands, programs, resnet50, timing
from granet_jax import distributions, masking, structures

PyTree = Any
# Masks change at step 1,000 for the first time: every timed step is one between.
INTERVAL = 1000
STEPS_BEFORE_UPDATE = INTERVAL - 1
BATCH = 32
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd-momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(1e-3),
}
# Gradients inside or as argument.
CASES = [
    (name, gradients) for name in OPTIMIZERS for gradients in ("inside", "argument")
]
# A last bit or two in each of two steps.
TOLERANCE = 8 * float(np.finfo(np.float32).eps)
# Of top_kast, with momentum and learning rate over two steps, in weights.
MOST_PENALTY = 1e-3 * 0.1 * 2.9


class Contender(NamedTuple):
    """A method, and what its masks are before the first update.

    Attributes:
      method: its record.
      sparsity: of the masks in the steps that are timed.
      packed: whether the state holds masks at 1 bit a weight.
      where: which leaves carry a mask.
    """

    method: granet_jax.Method
    sparsity: float
    packed: bool = False
    where: masking.Where = None


GRANET = granet_jax.granet(
    0.9, 100_000, initial_sparsity=0.5, interval=INTERVAL, distribution="erk"
)
SPARSE = {"sparse": Contender(GRANET, 0.5), "packed": Contender(GRANET, 0.5, True)}
METHODS = {
    "cyclical": Contender(granet_jax.cyclical(0.9, 100_000, interval=INTERVAL), 0.0),
    "acdc": Contender(granet_jax.acdc(0.9, [INTERVAL * i for i in (1, 2, 3)]), 0.0),
    "straight_through 2:4": Contender(
        granet_jax.straight_through(
            0.5, 1, interval=1, penalty=2e-4, structure=structures.n_of_m(2, 4)
        ),
        0.5,
        # Of the network's inputs there are three.
        where=lambda _, leaf: leaf.ndim >= 2 and leaf.shape[-2] % 4 == 0,
    ),
    "top_kast": Contender(
        granet_jax.top_kast(0.9, backward_sparsity=0.8, interval=INTERVAL), 0.9
    ),
    "greg2": Contender(granet_jax.greg2(0.9, interval=INTERVAL), 0.0),
}


class Run:
    """Parameters and optimizer state under one jitted step that donates both."""

    def __init__(
        self,
        tx: optax.GradientTransformation,
        shapes: resnet50.Shapes,
        gradients: str,
    ) -> None:
        """Initialises from fixed seeds and compiles the step, timing it.

        Args:
          tx: the optimizer.
          shapes: tree of shapes of the parameters.
          gradients: where they come from, "inside" or "argument".
        """
        self._tx, self._shapes = tx, shapes
        self.begin()
        factors = _gradient_factors(self.params)
        make_grads = partial(_gradients, jax.eval_shape(lambda: self.params))
        inside = gradients == "inside"
        self._given = factors if inside else jax.jit(make_grads)(factors)

        def step(params: PyTree, opt_state: PyTree, given: PyTree) -> PyTree:
            grads = make_grads(given) if inside else given
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        start = time.perf_counter()
        jitted = jax.jit(step, donate_argnums=(0, 1))
        lowered = jitted.lower(self.params, self.opt_state, self._given)
        self._step = lowered.compile()
        self.compile_seconds = time.perf_counter() - start

    def begin(self) -> None:
        """Begins from the start, in other memory than before."""
        params = jax.tree.map(jnp.asarray, resnet50.draw(self._shapes, seed=0))
        self.opt_state = self._tx.init(params)
        # The first step prunes.
        self.params = params
        self.steps = 0

    def __call__(self) -> PyTree:
        """One optimizer step."""
        self.steps += 1
        assert self.steps <= STEPS_BEFORE_UPDATE, "masks would change: fewer rounds"
        self.params, self.opt_state = self._step(
            self.params, self.opt_state, self._given
        )
        return self.params

    def state_bytes(self) -> int:
        """Memory of the optimizer state."""
        return sum(x.nbytes for x in jax.tree.leaves(self.opt_state))

    def temporary_bytes(self) -> int:
        """XLA's temporary memory of one step."""
        analysis = self._step.memory_analysis()
        assert analysis is not None, "this backend reports no memory"
        return analysis.temp_size_in_bytes

    def copied_bytes(self) -> int:
        """Bytes of the copies, of a leaf or more, that a step between updates makes."""
        text = self._step.as_text()
        assert text is not None
        # As small as the state holds any.
        leaf = min(x.nbytes for x in jax.tree.leaves(self.opt_state) if x.ndim >= 2)
        found = programs.copies(text)
        return sum(c.bytes for c in found if not c.looped and c.bytes >= leaf)


def _gradient_factors(params: PyTree) -> PyTree:
    """Activations and errors of a batch of `BATCH`, for every kernel."""
    rng = np.random.default_rng(1)

    def factors(p: jax.Array) -> tuple[jax.Array, ...]:
        if p.ndim < 2:
            return (jnp.asarray(rng.standard_normal(p.shape, np.float32)),)
        rows, columns = p.size // p.shape[-1], p.shape[-1]
        shapes = ((BATCH, rows), (BATCH, columns))
        return tuple(jnp.asarray(rng.standard_normal(s, np.float32)) for s in shapes)

    return jax.tree.map(factors, params)


def _gradients(like: PyTree, factors: PyTree) -> PyTree:
    """Of a kernel the product of both factors, as a dense layer's backward pass."""

    def gradient(p: jax.ShapeDtypeStruct, pair: tuple[jax.Array, ...]) -> jax.Array:
        if len(pair) == 1:
            return pair[0]
        activations, errors = pair
        return (activations.T @ errors).reshape(p.shape)

    return jax.tree.map(gradient, like, factors)


def sparse(
    contender: Contender, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The method around `inner`."""
    return granet_jax.transform(
        contender.method, inner, where=contender.where, packed=contender.packed
    )


def by_hand(
    masks: PyTree, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The masks around `inner`, with nothing that would ever change them."""

    def init(params: PyTree) -> PyTree:
        return jax.tree.map(jnp.array, masks), inner.init(params)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        masks, inner_state = state
        updates = masking.map_masked(lambda m, g: jnp.where(m, g, 0), masks, updates)
        updates, inner_state = inner.update(updates, inner_state, params)
        updates = masking.map_masked(
            lambda m, u, p: jnp.where(m, u, -p), masks, updates, params
        )
        return updates, (masks, inner_state)

    return optax.GradientTransformation(init, update)


def check(
    name: str, contender: Contender, run: Run, moved: PyTree, start: PyTree
) -> None:
    """Asserts that two steps are the dense ones at the weights that are to move.

    The others are zero, as their moments are, or where a method leaves them (`marked`)
    where they were. Compared to the last bits rather than bit for bit: of two programs
    that compute the same, XLA may contract a product and a sum to a fused multiply-add,
    which rounds once instead of twice, in one and not in the other. Penalties, of at
    most `MOST_PENALTY` times a weight, are within the tolerance.

    Args:
      name: for messages.
      contender: what is run.
      run: fresh.
      moved: parameters after two dense steps.
      start: parameters before.
    """
    run()
    run()
    method, state = contender.method, granet_jax.get_state(run.opt_state)
    masks = granet_jax.get_masks(run.opt_state)
    report = granet_jax.sparsity(masks)
    active = distributions.total_count(report.total, contender.sparsity)
    assert report.active == active, (name, report)
    reach, rest = masks, jax.tree.map(jnp.zeros_like, start)
    if method.weights == "dense":
        reach, rest = granet_jax.unpack_masks(state.marked), start
    elif report.active < report.total:
        pruned = jax.tree.map(jnp.logical_not, masks)
        for tree in _moments(state.inner_state):
            for x in _maskable(granet_jax.apply_masks(tree, pruned)):
                assert not np.any(x), f"{name}: the moment of a pruned weight"
    expected = moved
    if jax.tree.leaves(reach):
        expected = masking.map_masked(jnp.where, reach, moved, rest)
    penalty = 0.0 if method.penalty is None else MOST_PENALTY
    check_params(name, run.params, expected, start, TOLERANCE + penalty)
    copied, most = run.copied_bytes(), 0
    if contender.packed and method.grows:
        # Bits do not say what has entered: what continues has bits of its own.
        most = sum(x.nbytes for x in jax.tree.leaves(state.activity))
    assert copied <= most, f"{name}: copies {copied} bytes"


def check_params(
    name: str, params: PyTree, expected: PyTree, start: PyTree, tolerance: float
) -> None:
    """Asserts that parameters are as expected, and that all leaves left the start."""
    for (path, want), have, before in zip(
        jax.tree.leaves_with_path(expected),
        jax.tree.leaves(params),
        jax.tree.leaves(start),
        strict=True,
    ):
        have, want = np.asarray(have), np.asarray(want)
        size = np.abs(want) + np.abs(before) * (want != 0)
        close = np.abs(have - want) <= tolerance * size
        assert close.all(), f"{name}{jax.tree_util.keystr(path)}: not the dense step's"
        assert np.any(have != before), f"{name}{jax.tree_util.keystr(path)} stays"


def _moments(inner_state: PyTree) -> list[PyTree]:
    names = ("trace", "mu", "nu")
    found = [optax.tree_utils.tree_get(inner_state, n, None) for n in names]
    return [tree for tree in found if tree is not None]


def _maskable(tree: PyTree) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(tree) if x.ndim >= 2]


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks the sparse steps against the dense one, then times them."""
    parser = commands.parser(__doc__)
    parser.add_argument("--starts", type=int, default=3, help="times to start anew")
    parser.add_argument(
        "--rounds", type=int, default=15, help="timings of each, a start"
    )
    parser.add_argument("--repeats", type=int, default=3, help="steps per timing")
    options = parser.parse_args(arguments)
    if (options.rounds + 1) * options.repeats + 3 > STEPS_BEFORE_UPDATE:
        parser.error(f"rounds x repeats must stay below {STEPS_BEFORE_UPDATE - 6}")

    shapes = resnet50.small_shapes() if options.quick else resnet50.shapes()
    results: dict[str, Any] = {}
    for name, gradients in CASES[::3] if options.quick else CASES:
        make, label = OPTIMIZERS[name], f"{name}, gradients {gradients}"
        contenders = SPARSE | (
            METHODS if label == "sgd-momentum, gradients inside" else {}
        )
        runs = {"dense": Run(make(), shapes, gradients)}
        for kind, contender in contenders.items():
            runs[kind] = Run(sparse(contender, make()), shapes, gradients)
        for _ in range(2):
            runs["dense"]()
        # Copies, since the next step takes over the memory.
        moved = jax.tree.map(np.array, runs["dense"].params)
        start = resnet50.draw(shapes, seed=0)
        for kind, contender in contenders.items():
            check(f"{label}, {kind}", contender, runs[kind], moved, start)
        masks = granet_jax.get_masks(runs["sparse"].opt_state)
        masks, expected = jax.tree.map(np.array, (masks, runs["sparse"].params))
        runs["by hand"] = hand = Run(by_hand(masks, make()), shapes, gradients)
        hand()
        check_params(f"{label}, by hand", hand(), expected, start, TOLERANCE)
        print(f"{label}: {', '.join(list(runs)[1:])} agree with dense", flush=True)
        if not options.quick:
            seconds = _timed(runs, options)
            results[label] = _summary(seconds, runs)
    if results:
        _report(options, results, _maskable_size(shapes))


def _timed(runs: dict[str, Run], options: argparse.Namespace) -> timing.Rounds:
    """Seconds of a step, in every round of every start.

    How fast a pass over an array is also depends on where it lies: from one start, one
    of two runs of the same program may be some percent slower throughout.
    """
    seconds: timing.Rounds = {name: [] for name in runs}
    for _ in range(options.starts):
        for run in runs.values():
            run.begin()
        found = timing.interleaved(runs, rounds=options.rounds, repeats=options.repeats)
        for name, times in found.items():
            seconds[name] += times
    return seconds


def _summary(seconds: timing.Rounds, runs: dict[str, Run]) -> dict[str, Any]:
    def ratios(of: Callable[[timing.Rounds, str, str], float]) -> dict[str, float]:
        return {kind: of(seconds, kind, "dense") for kind in runs if kind != "dense"}

    return {
        "seconds": seconds,
        "ratio_of_medians": ratios(timing.ratio_of_medians),
        "median_of_ratios": ratios(timing.median_ratio),
        "compile_seconds": {k: r.compile_seconds for k, r in runs.items()},
        "state_bytes": {k: r.state_bytes() for k, r in runs.items()},
        "temporary_bytes": {k: r.temporary_bytes() for k, r in runs.items()},
        "copied_bytes": {k: r.copied_bytes() for k, r in runs.items()},
    }


def _maskable_size(shapes: resnet50.Shapes) -> int:
    leaves = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))
    return sum(math.prod(s) for s in leaves if len(s) >= 2)


def _report(
    options: argparse.Namespace, results: dict[str, dict[str, Any]], weights: int
) -> None:
    rows = []
    figures: dict[str, float] = {}
    for name, result in results.items():
        state = result["state_bytes"]
        for kind, times in result["seconds"].items():
            rows.append(
                [
                    f"{name}, {kind}",
                    f"{1e3 * statistics.median(times):.2f}",
                    _ratio(result["ratio_of_medians"], kind),
                    _ratio(result["median_of_ratios"], kind),
                    f"{result['compile_seconds'][kind]:.2f}",
                    f"{state[kind] / 2**20:.1f}",
                    f"{result['temporary_bytes'][kind] / 2**20:.1f}",
                    f"{result['copied_bytes'][kind] / 2**20:.1f}",
                ]
            )
        for kind in SPARSE:
            figures[f"{name}, {kind}"] = result["ratio_of_medians"][kind]
            figures[f"state bytes a weight, {kind}"] = (
                state[kind] - state["dense"]
            ) / weights
    first = next(iter(results.values()))
    figures["compile seconds"] = first["compile_seconds"]["sparse"]
    header = [
        "step",
        "median ms",
        "ratio of medians",
        "median of ratios",
        "compile s",
        "state MiB",
        "temporary MiB",
        "copied MiB",
    ]
    commands.publish(
        options, "step", timing.table(header, rows), {"cases": results}, figures
    )


def _ratio(ratios: dict[str, float], kind: str) -> str:
    return f"{ratios[kind]:.3f}" if kind in ratios else "1"


if __name__ == "__main__":
    main()
