"""Selection of the k largest of ResNet-50's weights, and steps that change masks.

    python -m benchmarks.selection            # 25.5 M weights, some minutes
    python -m benchmarks.selection --quick    # small tree: only checks the masks

The selections rank the same scores in the same run: `granet_jax.selection.top_k`, the
concatenate-argsort-scatter formulation of jaxpruner, the same with `jax.lax.top_k`, a
full sort, and NumPy's introselect. The steps are whole optimizer steps (SGD with
momentum, parameters and state donated) that change the masks each time, by GraNet and
by RigL. Next to them stand the mask updates alone, with every ranking by argsort.

The benchmark asserts that all contenders agree on the masks. It prints times and the
memory that XLA allocates for a step beyond parameters, gradients and state, and
asserts nothing about either.
"""

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import granet_jax
from benchmarks.tools import (
    command_line,
    parameter_trees,
    results,
    timing,
)
from experiments.reports import compiled_programs
from granet_jax import distributions, masking, schedules
from granet_jax.selection import top_k

PyTree = Any
Leaves = list[Array]
SPARSITY = 0.9
FRACTION = 0.3
STEPS = 1000
# The masks change in every step. A power of two makes the first step exact, so that
# argsort ranks the same weights to the bit.
METHODS = {
    "GraNet": granet_jax.granet(
        SPARSITY,
        STEPS,
        initial_sparsity=0.8,
        interval=1,
        fraction=FRACTION,
        final_fraction=FRACTION,
    ),
    "RigL": granet_jax.rigl(SPARSITY, STEPS, interval=1, fraction=FRACTION, stop=1.0),
}
FRACTIONS = {
    "GraNet": schedules.constant(FRACTION),
    "RigL": schedules.cosine(FRACTION, 0.0, steps=STEPS),
}
LEARNING_RATE = 2**-6


def select_ours(scores: Leaves, k: int) -> Leaves:
    """Selects with this library."""
    return top_k(scores, k, scope="global")


def select_argsort(scores: Leaves, k: int | Array) -> Leaves:
    """Ranks everything by argsort and scatters ones to the top k, like jaxpruner."""
    flat = jnp.concatenate([s.reshape(-1) for s in scores])
    order = jnp.argsort(-flat)
    chosen = jnp.arange(flat.size) < k
    return _split(jnp.zeros(flat.size, bool).at[order].set(chosen), scores)


def select_lax_top_k(scores: Leaves, k: int) -> Leaves:
    """Ranks the top k only, and scatters ones to them."""
    flat = jnp.concatenate([s.reshape(-1) for s in scores])
    _, chosen = lax.top_k(flat, k)
    return _split(jnp.zeros(flat.size, bool).at[chosen].set(True), scores)


def select_sort(scores: Leaves, k: int) -> Leaves:
    """Takes a threshold from a full sort; selects more than k if scores tie at it."""
    flat = jnp.concatenate([s.reshape(-1) for s in scores])
    threshold = jnp.sort(flat)[flat.size - k]
    return [s >= threshold for s in scores]


class Introselect:
    """Takes a threshold from NumPy's `partition`; treats ties like `select_sort`.

    It works in memory allocated once, as JAX mostly does. Fetching new memory of this
    size from the system may take ten times as long as the selection.
    """

    def __init__(self, scores: Sequence[Array]) -> None:
        self._scores = [np.asarray(s) for s in scores]
        total = sum(s.size for s in self._scores)
        self._flat = np.empty(total, self._scores[0].dtype)
        self._masks = [np.empty(s.shape, bool) for s in self._scores]

    def __call__(self, k: int) -> list[np.ndarray]:
        """Returns the masks, which the next call overwrites."""
        np.concatenate([s.reshape(-1) for s in self._scores], out=self._flat)
        self._flat.partition(self._flat.size - k)
        threshold = self._flat[-k]
        for score, mask in zip(self._scores, self._masks, strict=True):
            np.greater_equal(score, threshold, out=mask)
        return self._masks


def update_argsort(
    masks: Leaves, weights: Leaves, grads: Leaves, keep: int, rate: Array
) -> Leaves:
    """Prunes to `keep` weights, then drops and regrows per leaf, all by argsort.

    Args:
      masks: Masks before the update.
      weights: Weights after the optimizer step.
      grads: Dense gradients.
      keep: Number of weights to keep, of all leaves together.
      rate: Fraction of the active weights to exchange, in fixed point.
    """
    candidates = zip(masks, weights, strict=True)
    pruned = select_argsort(
        [jnp.where(m, jnp.abs(w), -jnp.inf) for m, w in candidates], keep
    )
    new = []
    for mask, weight, grad in zip(pruned, weights, grads, strict=True):
        active = jnp.sum(mask, dtype=jnp.uint32)
        dropped = schedules.ceil_of(rate, active)
        score = jnp.where(mask, jnp.abs(weight), -jnp.inf)
        (kept,) = select_argsort([score], active - dropped)
        score = jnp.where(kept, -jnp.inf, jnp.abs(grad))
        (grown,) = select_argsort([score], dropped)
        new.append(kept | grown)
    return new


class Step:
    """Parameters and state under one compiled optimizer step that donates both."""

    def __init__(
        self, tx: optax.GradientTransformation, params: PyTree, grads: PyTree
    ) -> None:
        self.params = jax.tree.map(jnp.array, params)
        self.state = tx.init(self.params)
        self._grads = grads

        def step(params: PyTree, state: PyTree, grads: PyTree) -> tuple[PyTree, PyTree]:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        jitted = jax.jit(step, donate_argnums=(0, 1))
        self.compiled = jitted.lower(self.params, self.state, grads).compile()

    def __call__(self) -> PyTree:
        self.params, self.state = self.compiled(self.params, self.state, self._grads)
        return self.params

    def allocated_bytes(self) -> int:
        """Counts what XLA allocates beyond arguments and the results in their place."""
        memory = compiled_programs.memory(self.compiled)
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return memory.temp_size_in_bytes + results


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks that the contenders agree, then times them."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="timings of each")
    options = parser.parse_args(arguments)

    quick = options.quick
    shapes = parameter_trees.small_resnet() if quick else parameter_trees.resnet50()
    params, grads = (
        jax.tree.map(jnp.asarray, parameter_trees.draw(shapes, seed)) for seed in (0, 1)
    )
    scores = [jnp.abs(w) for w in _kernels(params)]
    total = sum(s.size for s in scores)
    keep = distributions.total_count(total, SPARSITY)
    _check_selection(scores, keep)
    inner = optax.sgd(LEARNING_RATE, momentum=0.9)
    steps = {"dense": Step(inner, params, grads)}
    updates: dict[str, Any] = {}
    for name, method in METHODS.items():
        steps[name] = Step(granet_jax.transform(method, inner), params, grads)
        updates[name] = _check_update(name, steps[name], params, grads)
    print(f"{total:,} weights in {len(scores)} leaves, {keep:,} kept: all masks agree")
    if quick:
        return

    introselect = Introselect(scores)
    seconds = timing.interleaved(
        {
            "select: NumPy introselect": lambda: introselect(keep),
            **{
                f"select: {name}": partial(
                    jax.jit(select, static_argnums=1), scores, keep
                )
                for name, select in {
                    "granet_jax": select_ours,
                    "argsort": select_argsort,
                    "lax.top_k": select_lax_top_k,
                    "sort": select_sort,
                }.items()
            },
            **{f"step: {name}": step for name, step in steps.items()},
            **{f"mask update: {k}, argsort": f for k, f in updates.items()},
        },
        rounds=options.rounds,
    )
    memory = {name: step.allocated_bytes() / total for name, step in steps.items()}
    _report(options, seconds, memory)


def _check_selection(scores: Leaves, k: int) -> None:
    ours = jax.jit(select_ours, static_argnums=1)(scores, k)
    assert _count(ours) == k, (_count(ours), k)
    for other in (select_argsort, select_lax_top_k):
        _assert_equal(ours, jax.jit(other, static_argnums=1)(scores, k))
    # Contenders with a threshold take all scores that tie with the lowest of ours.
    lowest = min(
        np.asarray(s)[np.asarray(m)].min(initial=np.inf)
        for s, m in zip(scores, ours, strict=True)
    )
    for other in (
        jax.jit(select_sort, static_argnums=1)(scores, k),
        Introselect(scores)(k),
    ):
        _assert_equal([s >= lowest for s in scores], other)


def _check_update(name: str, step: Step, params: PyTree, grads: PyTree) -> Any:
    """Compares the masks after the first step with those by argsort.

    Returns:
      The same update by argsort, as a function without arguments.
    """
    masks = jax.tree.map(jnp.array, granet_jax.get_masks(step.state))
    moved = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, grads)
    stepped = granet_jax.apply_masks(moved, masks)
    before = jax.tree.leaves(masks)
    total = sum(m.size for m in before)
    keep = distributions.total_count(total, METHODS[name].sparsity(1))
    rate = jnp.asarray(schedules.fixed_point(FRACTIONS[name](1)), jnp.uint32)
    by_argsort = partial(
        jax.jit(update_argsort),
        before,
        _kernels(stepped),
        _kernels(grads),
        keep,
        rate,
    )
    step()
    after = jax.tree.leaves(masking.unpack_masks(granet_jax.get_masks(step.state)))
    assert _count(after) == keep, (name, _count(after), keep)
    _assert_equal(after, by_argsort())
    return by_argsort


def _kernels(tree: PyTree) -> Leaves:
    return [x for x in jax.tree.leaves(tree) if x.ndim >= 2]


def _assert_equal(ours: Sequence[Any], others: Sequence[Any]) -> None:
    for i, (a, b) in enumerate(zip(ours, others, strict=True)):
        different = int(np.sum(np.asarray(a) != np.asarray(b)))
        assert different == 0, f"leaf {i}: {different} entries differ"


def _count(masks: Leaves) -> int:
    return sum(int(m.sum()) for m in masks)


def _split(flat: Array, like: Leaves) -> Leaves:
    ends = np.cumsum([x.size for x in like])[:-1].tolist()
    parts = jnp.split(flat, ends)
    return [p.reshape(x.shape) for p, x in zip(parts, like, strict=True)]


def _report(
    options: argparse.Namespace, seconds: timing.Rounds, memory: dict[str, float]
) -> None:
    ratio = partial(timing.ratio_of_medians, seconds)
    ours, introselect = "select: granet_jax", "select: NumPy introselect"
    rows = [
        [name, f"{statistics.median(times):.3f}", f"{ratio(name, introselect):.2f}"]
        for name, times in seconds.items()
    ]
    times = results.table(["contender", "median s", "of introselect's"], rows)
    rows = [[name, f"{m:.2f}"] for name, m in memory.items()]
    allocated = results.table(["step", "allocated bytes a weight"], rows)
    results.publish(
        options,
        "selection",
        f"{times}\n\n{allocated}",
        {"seconds": seconds, "memory": memory},
        {
            "over_introselect": ratio(ours, introselect),
            "argsort_over_selection": ratio("select: argsort", ours),
            **{
                f"{name} over introselect": ratio(f"step: {name}", introselect)
                for name in METHODS
            },
            **{f"memory {name}": memory[name] for name in METHODS},
        },
    )


if __name__ == "__main__":
    main()
