"""Selection of the k largest of ResNet-50's weights, and the whole GraNet update.

    python -m benchmarks.selection            # 25.5 M weights, about two minutes
    python -m benchmarks.selection --quick    # small tree: checks the masks only

Contenders, on the same scores and in the same run: `granet_jax.selection.top_k`, the
concatenate-argsort-scatter formulation of jaxpruner, a sort, and NumPy's introselect on
the host. Timings are printed and never asserted; that all agree on the masks is.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks import resnet50, timing
from granet_jax import distributions, schedules, updates
from granet_jax.selection import top_k

# The state that an update in the second half of gradual pruning finds and leaves.
SPARSITY_BEFORE = 0.8
SPARSITY_AFTER = 0.9
FRACTION = 0.3

Leaves = list[Array]
Update = Callable[[Leaves, Leaves, Leaves], Leaves]


def select_ours(scores: Leaves, k: int) -> Leaves:
    """This library: no sort, no copy."""
    return top_k(scores, k, scope="global")


def select_argsort(scores: Leaves, k: int | Array) -> Leaves:
    """The peer's formulation: rank everything by argsort, scatter ones to the top k."""
    flat = jnp.concatenate([s.reshape(-1) for s in scores])
    order = jnp.argsort(-flat)
    chosen = jnp.arange(flat.size) < k
    return _split(jnp.zeros(flat.size, bool).at[order].set(chosen), scores)


def select_sort(scores: Leaves, k: int) -> Leaves:
    """Threshold from a full sort; selects more than k where scores tie at it."""
    flat = jnp.concatenate([s.reshape(-1) for s in scores])
    threshold = jnp.sort(flat)[flat.size - k]
    return [s >= threshold for s in scores]


def select_introselect(scores: Sequence[np.ndarray], k: int) -> list[np.ndarray]:
    """Threshold from `numpy.partition`, on the host; as `select_sort` with ties."""
    flat = np.concatenate([s.reshape(-1) for s in scores])
    threshold = np.partition(flat, flat.size - k)[flat.size - k]
    return [s >= threshold for s in scores]


def update_ours(
    masks: Leaves, weights: Leaves, grads: Leaves, *, keep: int, fraction: float
) -> Leaves:
    """GraNet's update: global prune, per-layer drop, per-layer regrow."""
    magnitude = [jnp.abs(w) for w in weights]
    gradient = [jnp.abs(g) for g in grads]
    pruned = updates.prune(masks, magnitude, keep, scope="global")
    rate = jnp.asarray(schedules.fixed_point(fraction), jnp.uint32)
    return updates.prune_and_regrow(pruned, magnitude, gradient, rate)


def update_argsort(
    masks: Leaves, weights: Leaves, grads: Leaves, *, keep: int, fraction: float
) -> Leaves:
    """The same update, every ranking by argsort."""
    magnitude = [
        jnp.where(m, jnp.abs(w), -jnp.inf) for m, w in zip(masks, weights, strict=True)
    ]
    rate = jnp.asarray(schedules.fixed_point(fraction), jnp.uint32)
    new = []
    for pruned, weight, grad in zip(
        select_argsort(magnitude, keep), weights, grads, strict=True
    ):
        active = jnp.sum(pruned, dtype=jnp.uint32)
        dropped = schedules.ceil_of(rate, active)
        score = jnp.where(pruned, jnp.abs(weight), -jnp.inf)
        (kept,) = select_argsort([score], active - dropped)
        score = jnp.where(kept, -jnp.inf, jnp.abs(grad))
        (grown,) = select_argsort([score], dropped)
        new.append(kept | grown)
    return new


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks that the contenders agree, then times them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="check only, small tree")
    parser.add_argument("--rounds", type=int, default=3, help="timings of each")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args(arguments)

    shapes = resnet50.small_shapes() if options.quick else resnet50.shapes()
    weights, grads, masks, scores = _load(shapes)
    total = sum(s.size for s in scores)
    keep = distributions.total_count(total, SPARSITY_AFTER)
    _check_selection(scores, keep)
    settings: dict[str, Any] = {"keep": keep, "fraction": FRACTION}
    ours = jax.jit(partial(update_ours, **settings))
    argsort = jax.jit(partial(update_argsort, **settings))
    _check_update(ours, argsort, masks, weights, grads, keep)
    print(f"{total:,} weights in {len(scores)} leaves, {keep:,} kept: all masks agree")
    if options.quick:
        return

    host = [np.asarray(s) for s in scores]
    select = jax.jit(select_ours, static_argnums=1)
    select_by_argsort = jax.jit(select_argsort, static_argnums=1)
    select_by_sort = jax.jit(select_sort, static_argnums=1)
    seconds = timing.interleaved(
        {
            "select: granet_jax": lambda: select(scores, keep),
            "select: argsort": lambda: select_by_argsort(scores, keep),
            "select: sort": lambda: select_by_sort(scores, keep),
            "select: NumPy introselect": lambda: select_introselect(host, keep),
            "update: granet_jax": lambda: ours(masks, weights, grads),
            "update: argsort": lambda: argsort(masks, weights, grads),
        },
        rounds=options.rounds,
    )
    _report(seconds, options.json)


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
    _assert_equal(ours, jax.jit(select_argsort, static_argnums=1)(scores, k))
    # The thresholds take every tie: ours, and nothing but scores equal to the lowest.
    lowest = min(
        np.asarray(s)[np.asarray(m)].min(initial=np.inf)
        for s, m in zip(scores, ours, strict=True)
    )
    for other in (
        jax.jit(select_sort, static_argnums=1)(scores, k),
        select_introselect([np.asarray(s) for s in scores], k),
    ):
        _assert_equal([s >= lowest for s in scores], other)


def _check_update(
    update: Update,
    argsort: Update,
    masks: Leaves,
    weights: Leaves,
    grads: Leaves,
    keep: int,
) -> None:
    ours = update(masks, weights, grads)
    assert _count(ours) == keep, (_count(ours), keep)
    _assert_equal(ours, argsort(masks, weights, grads))


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


def _report(seconds: timing.Rounds, path: Path | None) -> None:
    selection, update = "select: granet_jax", "update: granet_jax"
    rows = []
    for name, times in seconds.items():
        rows.append(
            [
                name,
                f"{statistics.median(times):.3f}",
                f"{timing.ratio_of_medians(seconds, name, selection):.2f}",
                f"{timing.ratio_of_medians(seconds, name, update):.2f}",
            ]
        )
    header = ["contender", "median s", "x one selection", "x our update"]
    print(timing.table(header, rows))
    print(timing.environment())
    timing.write_json(
        path,
        {
            "seconds": seconds,
            "selection_speedup_over_argsort": timing.ratio_of_medians(
                seconds, "select: argsort", selection
            ),
            "update_speedup_over_argsort": timing.ratio_of_medians(
                seconds, "update: argsort", update
            ),
            "update_per_selection": timing.ratio_of_medians(seconds, update, selection),
        },
    )


if __name__ == "__main__":
    main()
