"""The optimizer step between mask updates, sparse beside dense, on ResNet-50's tree.

    python -m benchmarks.step            # 25.5 M parameters, about three minutes
    python -m benchmarks.step --quick    # small tree: checks the results only

Each step is jitted over the whole tree with donated buffers. There is no forward pass
and next to no backward pass, so the ratio is the worst case. Gradients come in two
ways: "inside", made in the same program, as in most training loops, by a matrix product
over a batch of 32; and "argument", handed to a program that has only the optimizer
(an argument belongs to the caller, so a program that may change it copies it first).

Also printed: compile time, memory that the state adds, and XLA's temporary memory.
Timings are printed and never asserted; that active weights are updated as in the dense
step, and pruned ones are zero, is.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import granet_jax
from benchmarks import resnet50, timing
from granet_jax import distributions

PyTree = Any
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd-momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(1e-3),
}
# The state's masks at 1 byte and at 1 bit a weight.
SPARSE = ("sparse", "packed")
# Masks change at step 1,000 for the first time: every timed step is one between.
INTERVAL = 1000
STEPS_BEFORE_UPDATE = INTERVAL - 1
BATCH = 32


class Run:
    """Parameters and optimizer state under one jitted step that donates both."""

    def __init__(
        self,
        tx: optax.GradientTransformation,
        shapes: resnet50.Shapes,
        gradients: str,
    ):
        """Initialises from fixed seeds and compiles the step, timing it.

        Args:
          tx: the optimizer.
          shapes: tree of shapes of the parameters.
          gradients: where they come from, "inside" or "argument".
        """
        params = jax.tree.map(jnp.asarray, resnet50.draw(shapes, seed=0))
        factors = _gradient_factors(params)
        make_grads = partial(_gradients, jax.eval_shape(lambda: params))
        self.grads = jax.jit(make_grads)(factors)
        self._given = factors if gradients == "inside" else self.grads
        self._tx = tx
        self.opt_state = tx.init(params)
        if _is_sparse(self.opt_state):
            masks = granet_jax.get_masks(self.opt_state)
            params = granet_jax.apply_masks(params, masks)
        self.params = params
        self.steps = 0

        def step(params: PyTree, opt_state: PyTree, given: PyTree) -> PyTree:
            grads = make_grads(given) if gradients == "inside" else given
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        start = time.perf_counter()
        jitted = jax.jit(step, donate_argnums=(0, 1))
        lowered = jitted.lower(self.params, self.opt_state, self._given)
        self._step = lowered.compile()
        self.compile_seconds = time.perf_counter() - start

    def __call__(self) -> PyTree:
        """One optimizer step."""
        self.steps += 1
        assert self.steps <= STEPS_BEFORE_UPDATE, "masks would change: fewer rounds"
        self.params, self.opt_state = self._step(
            self.params, self.opt_state, self._given
        )
        return self.params

    def updates(self) -> PyTree:
        """What the optimizer would add to the parameters now."""
        updates, _ = jax.jit(self._tx.update)(self.grads, self.opt_state, self.params)
        return updates

    def state_bytes(self) -> int:
        """Memory of the optimizer state."""
        return sum(x.nbytes for x in jax.tree.leaves(self.opt_state))

    def temporary_bytes(self) -> int:
        """XLA's temporary memory of one step."""
        analysis = self._step.memory_analysis()
        assert analysis is not None, "this backend reports no memory"
        return analysis.temp_size_in_bytes


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
    inner: optax.GradientTransformation, *, packed: bool = False
) -> optax.GradientTransformation:
    """GraNet-ST around `inner`: half of the weights masked from the start."""
    method = granet_jax.granet(
        0.9, 100_000, initial_sparsity=0.5, interval=INTERVAL, distribution="erk"
    )
    return granet_jax.transform(method, inner=inner, packed=packed)


def check(dense: Run, masked: Run) -> None:
    """Asserts that active weights are updated as without masks, and pruned are zero.

    Updates are compared to the last bits rather than bit for bit: of two programs that
    compute the same, XLA may contract a product and a sum to a fused multiply-add,
    which rounds once instead of twice, in one and not in the other.
    """
    tolerance = 4 * float(jnp.finfo(jnp.float32).eps)
    masks = granet_jax.get_masks(masked.opt_state)
    expected = granet_jax.apply_masks(dense.updates(), masks)
    got = granet_jax.apply_masks(masked.updates(), masks)
    for (path, want), have in zip(
        jax.tree.leaves_with_path(expected), jax.tree.leaves(got), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(have, want, rtol=tolerance, atol=0, err_msg=name)
        assert np.any(have), f"{name} would not move"
    masked()
    state = granet_jax.get_state(masked.opt_state)
    masks = granet_jax.get_masks(masked.opt_state)
    report = granet_jax.sparsity(masks)
    assert report.active == distributions.total_count(report.total, 0.5), report
    pruned = jax.tree.map(jnp.logical_not, masks)
    for tree in (masked.params, *_moments(state.inner_state)):
        for x in jax.tree.leaves(_maskable(granet_jax.apply_masks(tree, pruned))):
            assert not np.any(x), "a pruned weight or its moment is not zero"


def _moments(inner_state: PyTree) -> list[PyTree]:
    names = ("trace", "mu", "nu")
    found = [optax.tree_utils.tree_get(inner_state, n, None) for n in names]
    return [tree for tree in found if tree is not None]


def _maskable(tree: PyTree) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(tree) if x.ndim >= 2]


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks the sparse step against the dense one, then times both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="check only, small tree")
    parser.add_argument("--rounds", type=int, default=31, help="timings of each")
    parser.add_argument("--repeats", type=int, default=3, help="steps per timing")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args(arguments)
    if options.rounds * options.repeats + 2 > STEPS_BEFORE_UPDATE:
        parser.error(f"rounds x repeats must stay below {STEPS_BEFORE_UPDATE - 1}")

    shapes = resnet50.small_shapes() if options.quick else resnet50.shapes()
    results = {}
    for (name, make), gradients in product(OPTIMIZERS.items(), ("inside", "argument")):
        runs = {
            "dense": Run(make(), shapes, gradients),
            "sparse": Run(sparse(make()), shapes, gradients),
            "packed": Run(sparse(make(), packed=True), shapes, gradients),
        }
        label = f"{name}, gradients {gradients}"
        for kind in SPARSE:
            check(runs["dense"], runs[kind])
        print(f"{label}: {resnet50.size(shapes):,} parameters, the steps agree")
        if not options.quick:
            seconds = timing.interleaved(
                runs, rounds=options.rounds, repeats=options.repeats
            )
            results[label] = _summary(seconds, runs)
    if results:
        _report(results, options.json)


def _summary(seconds: timing.Rounds, runs: dict[str, Run]) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "ratio_of_medians": {
            kind: timing.ratio_of_medians(seconds, kind, "dense") for kind in SPARSE
        },
        "median_of_ratios": {
            kind: timing.median_ratio(seconds, kind, "dense") for kind in SPARSE
        },
        "compile_seconds": {k: r.compile_seconds for k, r in runs.items()},
        "state_bytes": {k: r.state_bytes() for k, r in runs.items()},
        "temporary_bytes": {k: r.temporary_bytes() for k, r in runs.items()},
    }


def _report(results: dict[str, dict[str, Any]], path: Path | None) -> None:
    rows = []
    for name, result in results.items():
        for kind, times in result["seconds"].items():
            rows.append(
                [
                    f"{name}, {kind}",
                    f"{1e3 * statistics.median(times):.2f}",
                    _ratio(result["ratio_of_medians"], kind),
                    _ratio(result["median_of_ratios"], kind),
                    f"{result['compile_seconds'][kind]:.2f}",
                    f"{result['state_bytes'][kind] / 2**20:.1f}",
                    f"{result['temporary_bytes'][kind] / 2**20:.1f}",
                ]
            )
    header = [
        "step",
        "median ms",
        "ratio of medians",
        "median of ratios",
        "compile s",
        "state MiB",
        "temporary MiB",
    ]
    print(timing.table(header, rows))
    print(timing.environment())
    timing.write_json(path, results)


def _ratio(ratios: dict[str, float], kind: str) -> str:
    return f"{ratios[kind]:.3f}" if kind in ratios else "1"


def _is_sparse(opt_state: PyTree) -> bool:
    return isinstance(opt_state, granet_jax.SparseState)


if __name__ == "__main__":
    main()
