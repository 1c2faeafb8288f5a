"""The optimizer step between mask updates on ResNet-50's tree, sparse and dense.

    python -m benchmarks.optimizer_step            # 25.5 M parameters, some minutes
    python -m benchmarks.optimizer_step --quick    # small tree: only checks the results

Each step is jitted over the whole tree with donated buffers. There is no forward pass
and hardly any backward pass, so the ratios are the worst case. Gradients come in two
ways. "inside": the same program computes them by a matrix product over a batch of 32,
as most training loops do. "argument": the program has only the optimizer, and receives
gradients that it must not overwrite.

"by hand" is the least that a step with these semantics can do: masks that never change,
one `jnp.where` for the gradients and one for the updates. Its distance from the dense
step is the cost of reading masks. The distance of GraNet from "by hand" is the cost of
this library.

GraNet runs with every optimizer, the other methods with SGD and gradients from inside.
Of the methods with dense weights, straight_through chooses its 2:4 masks in every step,
and top_kast every thousand steps.

The benchmark asserts that active weights move as in the dense step, that pruned weights
and their moments are zero, and that steps between updates copy no leaf. It prints
times, compile times and memory, and asserts nothing about these.
"""

import argparse
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
from benchmarks.tools import (
    command_line,
    parameter_trees,
    results,
    timing,
)
from experiments.reports import compiled_programs
from granet_jax import distributions, masking, structures

PyTree = Any
# The masks first change at step 1,000, so no timed step changes them.
INTERVAL = 1000
STEPS_BEFORE_UPDATE = INTERVAL - 1
BATCH = 32
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd-momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(1e-3),
}
CASES = [(name, source) for name in OPTIMIZERS for source in ("inside", "argument")]
# Two programs that compute the same step may round differently: XLA may contract a
# product and a sum to one fused multiply-add in one of them. Two steps differ by a few
# last bits then.
TOLERANCE = 8 * float(np.finfo(np.float32).eps)
# The most that a penalty moves a weight in two steps, relative to the weight: the
# coefficient of top_kast, which is the largest, times the learning rate and 1 + 1.9 for
# momentum.
MOST_PENALTY = 1e-3 * 0.1 * 2.9


class Contender(NamedTuple):
    """A method, and what the benchmark expects of its first steps.

    Attributes:
      method: Record of the method.
      sparsity: Sparsity of the masks before the first update.
      packed: Whether the state holds masks at one bit a weight.
      where: Leaves that carry a mask, as in `granet_jax.transform`.
      still: For methods that keep pruned weights: the fraction of weights that do not
        move. None for methods that set pruned weights to zero.
      penalised: Whether the method adds a penalty to the gradient.
    """

    method: granet_jax.Method
    sparsity: float
    packed: bool = False
    where: masking.Where = None
    still: float | None = None
    penalised: bool = False


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
        # The stem has three input channels, which four does not divide.
        where=lambda _, leaf: leaf.ndim >= 2 and leaf.shape[-2] % 4 == 0,
        still=0.0,
        penalised=True,
    ),
    "top_kast": Contender(
        granet_jax.top_kast(0.9, backward_sparsity=0.8, interval=INTERVAL),
        0.9,
        still=0.8,
        penalised=True,
    ),
    "greg2": Contender(granet_jax.greg2(0.9, interval=INTERVAL), 0.0, penalised=True),
}


class Run:
    """Parameters and optimizer state under one compiled step that donates both."""

    def __init__(
        self,
        tx: optax.GradientTransformation,
        shapes: parameter_trees.Shapes,
        gradients: str,
    ) -> None:
        """Initialises from fixed seeds, and compiles the step.

        Args:
          tx: Optimizer.
          shapes: Tree of shapes of the parameters.
          gradients: Where gradients come from, "inside" or "argument".
        """
        self._tx, self._shapes = tx, shapes
        self.restart()
        factors = _gradient_factors(self.params)
        compute_grads = partial(_gradients, jax.eval_shape(lambda: self.params))
        inside = gradients == "inside"
        self._source = factors if inside else jax.jit(compute_grads)(factors)

        def step(params: PyTree, opt_state: PyTree, source: PyTree) -> PyTree:
            grads = compute_grads(source) if inside else source
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        start = time.perf_counter()
        jitted = jax.jit(step, donate_argnums=(0, 1))
        lowered = jitted.lower(self.params, self.opt_state, self._source)
        self._step = lowered.compile()
        self.compile_seconds = time.perf_counter() - start

    def restart(self) -> None:
        """Starts again from the initial parameters, in newly allocated memory."""
        self.params = jax.tree.map(
            jnp.asarray, parameter_trees.draw(self._shapes, seed=0)
        )
        self.opt_state = self._tx.init(self.params)
        self.steps = 0

    def __call__(self) -> PyTree:
        self.steps += 1
        assert self.steps <= STEPS_BEFORE_UPDATE, "masks would change: fewer rounds"
        self.params, self.opt_state = self._step(
            self.params, self.opt_state, self._source
        )
        return self.params

    def state_bytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self.opt_state))

    def temporary_bytes(self) -> int:
        return compiled_programs.memory(self._step).temp_size_in_bytes

    def copied_bytes(self) -> int:
        """Counts the bytes of whole leaves that a step between updates copies."""
        smallest = min(x.nbytes for x in jax.tree.leaves(self.opt_state) if x.ndim >= 2)
        copies = compiled_programs.copies(compiled_programs.compiled_text(self._step))
        return sum(c.bytes for c in copies if not c.looped and c.bytes >= smallest)


def _gradient_factors(params: PyTree) -> PyTree:
    """Draws activations and errors of a batch of `BATCH`, for every kernel."""
    rng = np.random.default_rng(1)

    def factors(p: jax.Array) -> tuple[jax.Array, ...]:
        if p.ndim < 2:
            return (jnp.asarray(rng.standard_normal(p.shape, np.float32)),)
        rows, columns = p.size // p.shape[-1], p.shape[-1]
        shapes = ((BATCH, rows), (BATCH, columns))
        return tuple(jnp.asarray(rng.standard_normal(s, np.float32)) for s in shapes)

    return jax.tree.map(factors, params)


def _gradients(like: PyTree, factors: PyTree) -> PyTree:
    """Multiplies the factors of every kernel, as a dense layer's backward pass does."""

    def gradient(p: jax.ShapeDtypeStruct, pair: tuple[jax.Array, ...]) -> jax.Array:
        if len(pair) == 1:
            return pair[0]
        activations, errors = pair
        return (activations.T @ errors).reshape(p.shape)

    return jax.tree.map(gradient, like, factors)


def sparse(
    contender: Contender, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
    return granet_jax.transform(
        contender.method, inner, where=contender.where, packed=contender.packed
    )


def by_hand(
    masks: PyTree, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Wraps `inner` in masks that never change."""

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
    """Takes two steps, and asserts that they are the dense steps where weights move.

    All other weights must be zero, as must their moments, or must stay where they were
    if the method keeps pruned weights.

    Args:
      name: Name for messages.
      contender: Method to check.
      run: Its run, before the first step.
      moved: Parameters after two dense steps.
      start: Parameters before the first step.
    """
    run()
    run()
    state = granet_jax.get_state(run.opt_state)
    masks = granet_jax.get_masks(run.opt_state)
    report = granet_jax.sparsity(masks)
    active = distributions.total_count(report.total, contender.sparsity)
    assert report.active == active, (name, report)
    expected = moved
    if contender.still is not None:
        expected = _check_moving(name, contender.still, masks, run.params, moved, start)
    elif report.active < report.total:
        expected = granet_jax.apply_masks(moved, masks)
        pruned = jax.tree.map(jnp.logical_not, masks)
        for tree in _moments(state.inner_state):
            for x in _kernels(granet_jax.apply_masks(tree, pruned)):
                assert not np.any(x), f"{name}: the moment of a pruned weight"
    penalty = MOST_PENALTY if contender.penalised else 0.0
    check_params(name, run.params, expected, start, TOLERANCE + penalty)
    # A method that regrows copies its masks in every step, as the state stores them.
    copied = run.copied_bytes()
    stored = granet_jax.pack_masks(masks) if contender.packed else masks
    most = sum(x.nbytes for x in jax.tree.leaves(stored))
    assert copied <= most, f"{name}: copies {copied} bytes"


def _check_moving(
    name: str,
    still: float,
    masks: PyTree,
    params: PyTree,
    moved: PyTree,
    start: PyTree,
) -> PyTree:
    """Counts pruned weights that stayed; returns `moved` with these at the start."""
    moving = 0

    def expected(mask: Any, after: Any, have: Any, before: Any) -> np.ndarray:
        nonlocal moving
        stays = ~np.asarray(mask) & (np.asarray(have) == before)
        moving += stays.size - int(stays.sum())
        return np.where(stays, before, after)

    result = masking.map_masked(expected, masks, moved, params, start)
    total = granet_jax.sparsity(masks).total
    # Counts are rounded in every leaf, and a step may be too small to move a weight.
    tolerance = 1e-3 * total + len(_kernels(masks))
    assert abs(moving - distributions.total_count(total, still)) <= tolerance, name
    return result


def check_params(
    name: str, params: PyTree, expected: PyTree, start: PyTree, tolerance: float
) -> None:
    """Asserts that parameters are as expected, and that every leaf changed."""
    for (path, want), have, before in zip(
        jax.tree.leaves_with_path(expected),
        jax.tree.leaves(params),
        jax.tree.leaves(start),
        strict=True,
    ):
        have, want = np.asarray(have), np.asarray(want)
        size = np.abs(want) + np.abs(before) * (want != 0)
        close = np.abs(have - want) <= tolerance * size
        leaf = f"{name}{jax.tree_util.keystr(path)}"
        assert close.all(), f"{leaf}: differs from the dense step"
        assert np.any(have != before), f"{leaf} does not change"


def _moments(inner_state: PyTree) -> list[PyTree]:
    names = ("trace", "mu", "nu")
    moments = [optax.tree_utils.tree_get(inner_state, n, None) for n in names]
    return [tree for tree in moments if tree is not None]


def _kernels(tree: PyTree) -> list[Any]:
    return [x for x in jax.tree.leaves(tree) if x.ndim >= 2]


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks the sparse steps against the dense one, then times them."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--starts", type=int, default=3, help="times to start again")
    parser.add_argument(
        "--rounds", type=int, default=15, help="timings of each per start"
    )
    parser.add_argument("--repeats", type=int, default=3, help="steps per timing")
    options = parser.parse_args(arguments)
    if (options.rounds + 1) * options.repeats + 3 > STEPS_BEFORE_UPDATE:
        parser.error(f"rounds x repeats must stay below {STEPS_BEFORE_UPDATE - 6}")

    quick = options.quick
    shapes = parameter_trees.small_resnet() if quick else parameter_trees.resnet50()
    cases: dict[str, Any] = {}
    for name, gradients in CASES[::3] if quick else CASES:
        label = f"{name}, gradients {gradients}"
        runs = _checked_runs(label, OPTIMIZERS[name], shapes, gradients)
        print(f"{label}: {', '.join(list(runs)[1:])} agree with dense", flush=True)
        if not quick:
            cases[label] = _summary(_timed(runs, options), runs)
    if cases:
        _report(options, cases, sum(parameter_trees.masked_sizes(shapes)))


def _checked_runs(
    label: str,
    create_inner: Callable[[], optax.GradientTransformation],
    shapes: parameter_trees.Shapes,
    gradients: str,
) -> dict[str, Run]:
    """Compiles all contenders of a case, and checks their first two steps."""
    contenders = dict(SPARSE)
    if label == "sgd-momentum, gradients inside":
        contenders |= METHODS
    runs = {"dense": Run(create_inner(), shapes, gradients)}
    for kind, contender in contenders.items():
        runs[kind] = Run(sparse(contender, create_inner()), shapes, gradients)
    for _ in range(2):
        runs["dense"]()
    # Copies, because the next step overwrites the donated memory.
    moved = jax.tree.map(np.array, runs["dense"].params)
    start = parameter_trees.draw(shapes, seed=0)
    for kind, contender in contenders.items():
        check(f"{label}, {kind}", contender, runs[kind], moved, start)
    masks = granet_jax.get_masks(runs["sparse"].opt_state)
    masks, expected = jax.tree.map(np.array, (masks, runs["sparse"].params))
    runs["by hand"] = hand = Run(by_hand(masks, create_inner()), shapes, gradients)
    hand()
    check_params(f"{label}, by hand", hand(), expected, start, TOLERANCE)
    return runs


def _timed(runs: dict[str, Run], options: argparse.Namespace) -> timing.Rounds:
    """Times the steps from several starts.

    The speed of a pass over an array also depends on where the array lies. From one
    start, one of two runs of the same program may be some percent slower throughout.
    """
    seconds: timing.Rounds = {name: [] for name in runs}
    for _ in range(options.starts):
        for run in runs.values():
            run.restart()
        rounds = timing.interleaved(
            runs, rounds=options.rounds, repeats=options.repeats
        )
        for name, times in rounds.items():
            seconds[name] += times
    return seconds


def _summary(seconds: timing.Rounds, runs: dict[str, Run]) -> dict[str, Any]:
    def ratios(ratio: Callable[[timing.Rounds, str, str], float]) -> dict[str, float]:
        return {kind: ratio(seconds, kind, "dense") for kind in runs if kind != "dense"}

    return {
        "seconds": seconds,
        "ratio_of_medians": ratios(timing.ratio_of_medians),
        "median_of_ratios": ratios(timing.median_ratio),
        "compile_seconds": {k: r.compile_seconds for k, r in runs.items()},
        "state_bytes": {k: r.state_bytes() for k, r in runs.items()},
        "temporary_bytes": {k: r.temporary_bytes() for k, r in runs.items()},
        "copied_bytes": {k: r.copied_bytes() for k, r in runs.items()},
    }


def _report(
    options: argparse.Namespace, cases: dict[str, dict[str, Any]], weights: int
) -> None:
    rows = []
    figures: dict[str, float] = {}
    for name, result in cases.items():
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
    first = next(iter(cases.values()))
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
    table = results.table(header, rows)
    results.publish(options, "optimizer_step", table, {"cases": cases}, figures)


def _ratio(ratios: dict[str, float], kind: str) -> str:
    return f"{ratios[kind]:.3f}" if kind in ratios else "1"


if __name__ == "__main__":
    main()
