"""Selection of the k largest of ResNet-50's weights, and whole mask updates.

    python -m benchmarks.selection            # 25.5 M weights, some minutes
    python -m benchmarks.selection --quick    # small tree: checks the masks only

Contenders, on the same scores and in the same run: `granet_jax.selection.top_k`, the
concatenate-argsort-scatter formulation of jaxpruner, the same by `jax.lax.top_k`, a
sort, and NumPy's introselect on the host; and the updates of GraNet and RigL, by this
library and by argsort. Timings are printed and never asserted; that all agree on the
masks is.

A stage of a selection reads the scores, of 4 bytes (in an update the masks, too), and
writes codes of a byte; a pass reads the codes; the end reads codes (and masks) and
writes masks. Each is counted by running the same program with counters in its loops
(`programs.count_trips`). Bandwidth is those bytes over the whole time, so what else a
selection does counts against it; beside it stands that of a copy, which reads and
writes the scores once. Memory is of the optimizer step that updates the masks (SGD with
momentum, parameters and state donated): what XLA allocates for it beyond parameters,
gradients and state.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import granet_jax
from benchmarks import commands, programs, resnet50, timing
from granet_jax import distributions, schedules, updates
from granet_jax.selection import top_k

# The state that an update in the second half of gradual pruning finds and leaves.
SPARSITY_BEFORE = 0.8
SPARSITY_AFTER = 0.9
FRACTION = 0.3
SCORE_BYTES = 4
CODE_BYTES = MASK_BYTES = 1
METHODS = {
    "granet": granet_jax.granet(0.9, 100_000, initial_sparsity=0.5),
    "rigl": granet_jax.rigl(0.9, 100_000),
}

Leaves = list[Array]


class Trips(NamedTuple):
    """How often the loops of the selections of a program ran."""

    stages: int
    passes: int
    ends: int

    @classmethod
    def of(cls, counts: Sequence[int]) -> "Trips":
        """From `count_trips`: of every selection its stages, passes and end."""
        return cls(*(sum(counts[i::3]) for i in range(3)))

    def moved(self, *, masked: bool) -> int:
        """Bytes a weight, read and written."""
        mask = MASK_BYTES * masked
        return (
            self.stages * (SCORE_BYTES + mask + CODE_BYTES)
            + self.passes * CODE_BYTES
            + self.ends * (CODE_BYTES + mask + MASK_BYTES)
        )


def select_ours(scores: Leaves, k: int) -> Leaves:
    """This library: no sort, no copy."""
    return top_k(scores, k, scope="global")


def select_argsort(scores: Leaves, k: int | Array) -> Leaves:
    """The peer's formulation: rank everything by argsort, scatter ones to the top k."""
    flat = jnp.concatenate([s.reshape(-1) for s in scores])
    order = jnp.argsort(-flat)
    chosen = jnp.arange(flat.size) < k
    return _split(jnp.zeros(flat.size, bool).at[order].set(chosen), scores)


def select_lax_top_k(scores: Leaves, k: int) -> Leaves:
    """JAX's own: ranks the top k only, and scatters ones to them."""
    flat = jnp.concatenate([s.reshape(-1) for s in scores])
    _, chosen = lax.top_k(flat, k)
    return _split(jnp.zeros(flat.size, bool).at[chosen].set(True), scores)


def select_sort(scores: Leaves, k: int) -> Leaves:
    """Threshold from a full sort; selects more than k where scores tie at it."""
    flat = jnp.concatenate([s.reshape(-1) for s in scores])
    threshold = jnp.sort(flat)[flat.size - k]
    return [s >= threshold for s in scores]


class Introselect:
    """Threshold from NumPy's `partition`, on the host; as `select_sort` with ties.

    In memory that is there already, as what JAX allocates mostly is: new memory of this
    size takes up to ten times as long to get as the selection, or next to nothing, by
    what has been allocated before.
    """

    def __init__(self, scores: Sequence[Array]) -> None:
        """Takes memory for copies of the scores, and for masks."""
        self._scores = [np.asarray(s) for s in scores]
        total = sum(s.size for s in self._scores)
        self._flat = np.empty(total, self._scores[0].dtype)
        self._masks = [np.empty(s.shape, bool) for s in self._scores]

    def __call__(self, k: int) -> list[np.ndarray]:
        """The masks, which the next call overwrites."""
        np.concatenate([s.reshape(-1) for s in self._scores], out=self._flat)
        self._flat.partition(self._flat.size - k)
        threshold = self._flat[-k]
        for score, mask in zip(self._scores, self._masks, strict=True):
            np.greater_equal(score, threshold, out=mask)
        return self._masks


def granet_ours(masks: Leaves, weights: Leaves, grads: Leaves, *, keep: int) -> Leaves:
    """GraNet's update: global prune, per-layer drop, per-layer regrow."""
    magnitude = [jnp.abs(w) for w in weights]
    pruned = updates.prune(masks, magnitude, keep, scope="global")
    return rigl_ours(pruned, weights, grads)


def rigl_ours(masks: Leaves, weights: Leaves, grads: Leaves) -> Leaves:
    """RigL's update: per-layer drop, per-layer regrow."""
    magnitude = [jnp.abs(w) for w in weights]
    gradient = [jnp.abs(g) for g in grads]
    rate = jnp.asarray(schedules.fixed_point(FRACTION), jnp.uint32)
    return updates.prune_and_regrow(masks, magnitude, gradient, rate)


def granet_argsort(
    masks: Leaves, weights: Leaves, grads: Leaves, *, keep: int
) -> Leaves:
    """The same update, every ranking by argsort."""
    magnitude = [
        jnp.where(m, jnp.abs(w), -jnp.inf) for m, w in zip(masks, weights, strict=True)
    ]
    return rigl_argsort(select_argsort(magnitude, keep), weights, grads)


def rigl_argsort(masks: Leaves, weights: Leaves, grads: Leaves) -> Leaves:
    """The same update, every ranking by argsort."""
    rate = jnp.asarray(schedules.fixed_point(FRACTION), jnp.uint32)
    new = []
    for mask, weight, grad in zip(masks, weights, grads, strict=True):
        active = jnp.sum(mask, dtype=jnp.uint32)
        dropped = schedules.ceil_of(rate, active)
        score = jnp.where(mask, jnp.abs(weight), -jnp.inf)
        (kept,) = select_argsort([score], active - dropped)
        score = jnp.where(kept, -jnp.inf, jnp.abs(grad))
        (grown,) = select_argsort([score], dropped)
        new.append(kept | grown)
    return new


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks that the contenders agree, then times them."""
    parser = commands.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="timings of each")
    options = parser.parse_args(arguments)

    shapes = resnet50.small_shapes() if options.quick else resnet50.shapes()
    weights, grads, masks, scores = _load(shapes)
    total = sum(s.size for s in scores)
    keep = distributions.total_count(total, SPARSITY_AFTER)
    _check_selection(scores, keep)
    ours = {
        "GraNet": jax.jit(partial(granet_ours, keep=keep)),
        "RigL": jax.jit(rigl_ours),
    }
    argsort = {
        "GraNet": jax.jit(partial(granet_argsort, keep=keep)),
        "RigL": jax.jit(rigl_argsort),
    }
    active = {"GraNet": keep, "RigL": _count(masks)}
    for name, update in ours.items():
        found = update(masks, weights, grads)
        assert _count(found) == active[name], (name, _count(found), active[name])
        _assert_equal(found, argsort[name](masks, weights, grads))
    print(f"{total:,} weights in {len(scores)} leaves, {keep:,} kept: all masks agree")
    if options.quick:
        return

    introselect = Introselect(scores)
    select = jax.jit(select_ours, static_argnums=1)
    select_by_argsort = jax.jit(select_argsort, static_argnums=1)
    select_by_lax_top_k = jax.jit(select_lax_top_k, static_argnums=1)
    select_by_sort = jax.jit(select_sort, static_argnums=1)
    copy = _copy(scores)
    seconds = timing.interleaved(
        {
            "select: granet_jax": lambda: select(scores, keep),
            "select: argsort": lambda: select_by_argsort(scores, keep),
            "select: lax.top_k": lambda: select_by_lax_top_k(scores, keep),
            "select: sort": lambda: select_by_sort(scores, keep),
            "select: NumPy introselect": lambda: introselect(keep),
            **{
                f"update: {name}, {how}": partial(update, masks, weights, grads)
                for how, updates_ in {"granet_jax": ours, "argsort": argsort}.items()
                for name, update in updates_.items()
            },
            "copy": copy,
        },
        rounds=options.rounds,
    )
    inputs = {"select": (partial(select_ours, k=keep), (scores,))}
    inputs |= {
        f"update: {name}": (update, (masks, weights, grads))
        for name, update in ours.items()
    }
    trips = {
        name: Trips.of(programs.count_trips(f, *args))
        for name, (f, args) in inputs.items()
    }
    memory = {name: step_memory(method, shapes) for name, method in METHODS.items()}
    _report(options, seconds, trips, memory, total)


def step_memory(method: granet_jax.Method, shapes: resnet50.Shapes) -> dict[str, float]:
    """Bytes a weight that the compiled step allocates besides its arguments."""
    tx = granet_jax.transform(method, optax.sgd(0.1, momentum=0.9))
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    state = jax.eval_shape(tx.init, params)

    def step(params: Any, state: Any, grads: Any) -> Any:
        changes, state = tx.update(grads, state, params)
        return optax.apply_updates(params, changes), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    analysis = jitted.lower(params, state, params).compile().memory_analysis()
    assert analysis is not None, "this backend reports no memory"
    weights = sum(p.size for p in jax.tree.leaves(params) if len(p.shape) >= 2)
    # Results that do not take over the memory of what was donated count, too.
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return {
        "temporary": analysis.temp_size_in_bytes / weights,
        "results": results / weights,
    }


def _load(shapes: resnet50.Shapes) -> tuple[Leaves, Leaves, Leaves, Leaves]:
    """Weights, gradients, masks before the update, and scores for one selection.

    The first three as an update of mid-training meets them: pruned weights are zero,
    the gradient is dense. The scores are of a dense network, so none is a tie by
    construction.
    """

    def kernels(seed: int) -> list[np.ndarray]:
        return [x for x in jax.tree.leaves(resnet50.draw(shapes, seed)) if x.ndim >= 2]

    dense = kernels(seed=0)
    scores = [jnp.abs(w) for w in dense]
    active = distributions.total_count(sum(w.size for w in dense), SPARSITY_BEFORE)
    masks = jax.jit(select_ours, static_argnums=1)(scores, active)
    weights = [jnp.where(m, w, 0) for m, w in zip(masks, dense, strict=True)]
    return weights, [jnp.asarray(g) for g in kernels(seed=1)], masks, scores


def _check_selection(scores: Leaves, k: int) -> None:
    ours = jax.jit(select_ours, static_argnums=1)(scores, k)
    assert _count(ours) == k, (_count(ours), k)
    for other in (select_argsort, select_lax_top_k):
        _assert_equal(ours, jax.jit(other, static_argnums=1)(scores, k))
    # The thresholds take every tie: ours, and nothing but scores equal to the lowest.
    lowest = min(
        np.asarray(s)[np.asarray(m)].min(initial=np.inf)
        for s, m in zip(scores, ours, strict=True)
    )
    for other in (
        jax.jit(select_sort, static_argnums=1)(scores, k),
        Introselect(scores)(k),
    ):
        _assert_equal([s >= lowest for s in scores], other)


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


def _copy(scores: Leaves) -> Callable[[], Leaves]:
    """Copies all scores, to memory that is there already."""
    # The results take over the memory of what is donated, so nothing is allocated.
    copy = jax.jit(
        lambda into, leaves: [-x for x in leaves], donate_argnums=0, keep_unused=True
    )
    into = [jnp.zeros_like(x) for x in scores]

    def run() -> Leaves:
        nonlocal into
        into = copy(into, scores)
        return into

    return run


def _report(
    options: argparse.Namespace,
    seconds: timing.Rounds,
    trips: dict[str, Trips],
    memory: dict[str, dict[str, float]],
    total: int,
) -> None:
    selection, update = "select: granet_jax", "update: GraNet, granet_jax"
    of = partial(timing.ratio_of_medians, seconds)
    rows = [
        [
            name,
            f"{statistics.median(times):.3f}",
            f"{of(name, selection):.2f}",
            f"{of(name, update):.2f}",
        ]
        for name, times in seconds.items()
    ]
    header = ["contender", "median s", "x one selection", "x our GraNet update"]
    tables = [timing.table(header, rows)]

    copied = 2 * SCORE_BYTES * total
    speed = copied / statistics.median(seconds["copy"])
    rows = [["copy", "-", "-", f"{copied / 1e9:.2f}", f"{speed / 1e9:.1f}", "1"]]
    shares = {}
    for name, found in trips.items():
        timed = f"{name}: granet_jax" if name == "select" else f"{name}, granet_jax"
        moved = found.moved(masked=name != "select") * total
        achieved = moved / statistics.median(seconds[timed])
        shares[name] = achieved / speed
        cells = [f"{moved / 1e9:.2f}", f"{achieved / 1e9:.1f}", f"{shares[name]:.2f}"]
        rows.append([timed, str(found.stages), str(found.passes), *cells])
    header = ["", "stages", "passes", "GB", "GB / s", "of the copy's"]
    tables.append(timing.table(header, rows))

    rows = [
        [name, f"{m['temporary']:.2f}", f"{m['results']:.2f}"]
        for name, m in memory.items()
    ]
    header = ["step with update", "temporary bytes a weight", "results not in place"]
    tables.append(timing.table(header, rows))
    commands.publish(
        options,
        "selection",
        "\n\n".join(tables),
        {
            "seconds": seconds,
            "trips": {k: t._asdict() for k, t in trips.items()},
            "bandwidth": shares,
            "memory": memory,
        },
        {
            "over_introselect": of(selection, "select: NumPy introselect"),
            "argsort_over_selection": of("select: argsort", selection),
            "argsort_over_update": of("update: GraNet, argsort", update),
            "update_over_selection": of(update, selection),
            **{f"memory_{k}": sum(m.values()) for k, m in memory.items()},
        },
    )


if __name__ == "__main__":
    main()
