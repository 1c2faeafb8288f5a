"""Which weights are active: a method's scores turned into masks.

The traced half of what `plans` counts on the host: initial masks, their update (prune,
revive, exchange), and the choice among all weights. Lists of leaves in, lists of masks
out.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from granet_jax import plans, structures
from granet_jax import updates as mask_updates
from granet_jax.activity import encode, is_active
from granet_jax.distributions import Shape
from granet_jax.methods import Method
from granet_jax.plans import Plan
from granet_jax.scores import Score, ScoreInputs
from granet_jax.scores import random as random_score
from granet_jax.selection import counter_dtype
from granet_jax.structures import Structure


def scored(
    score: Score,
    names: tuple[str, ...],
    masks: list[Array],
    params: list[Array],
    weights: list[Array],
    grads: list[Array] | None,
    accumulators: list[Array] | None,
    key: Array,
    marked: list[Array] | None = None,
) -> list[Array]:
    """The score of every leaf; see `ScoreInputs` for its arguments."""
    by_name = dict(zip(names, weights, strict=True))
    return [
        score(
            ScoreInputs(
                param=p,
                grad=None if grads is None else grads[i],
                mask=m,
                accumulator=None if accumulators is None else accumulators[i],
                key=jax.random.fold_in(key, i),
                name=name,
                weights=by_name,
                marked=None if marked is None else marked[i],
            )
        )
        for i, (name, p, m) in enumerate(zip(names, params, masks, strict=True))
    ]


def update_masks(
    method: Method,
    plan: Plan,
    names: tuple[str, ...],
    masks: list[Array],
    params: Callable[[list[Array]], list[Array]],
    grads: list[Array] | None,
    accumulators: list[Array] | None,
    marked: list[Array] | None,
    *,
    count: Array,
    key: Array,
) -> list[Array]:
    """One mask update: prune to the schedule, then exchange.

    Whole boxes of a structure are to it what weights are otherwise.

    The weights are a function, called where they are scored: made there, they fuse with
    what ranks them, where an array made before would be kept beside it all along. It is
    given the weights to count as active; the others are zero. What ranks active weights
    needs no others than those that still are: so nothing reads the masks of before, and
    the new ones take their place in memory.

    Returns the codes of all weights, see `updates.run_phases`.
    """
    index = method.updates.update_index(count)
    structure = method.structure
    whole = structure is not None and structure.whole

    @functools.cache  # Phases of one score share their code.
    def rank(score: Score, grows: bool) -> Callable[[list[Array]], list[Array]]:
        def ranked(present: list[Array]) -> list[Array]:
            if whole:
                present = _spread(structure, present, masks)
            weights = params(masks if grows else present)
            # Of leaves that the score does not look at, nothing is computed.
            left = list(map(where_active, present, weights))
            found = scored(
                score, names, present, weights, left, grads, accumulators, key, marked
            )
            return [structures.merge(structure, x) for x in found]

        return ranked

    if structure is not None and not whole:
        return _update_boxes(method, structure, plan, rank, masks, index)
    prunes, revives = bool(plan.prunes.any()), bool(plan.revives.any())
    present = [structures.merge_mask(structure, m) for m in masks]
    phases = []
    if prunes:
        keep = jnp.asarray(plan.keep)[index]
        phases.append(
            mask_updates.prune_phase(
                rank(method.prune, False), keep, scope=method.scope
            )
        )
    if revives and method.revive is not None:
        phases.append(
            mask_updates.revive_phase(
                rank(method.revive, True),
                jnp.asarray(plan.keep)[index],
                sizes=[m.size for m in present],
                scope=method.scope,
            )
        )
    if method.grow is not None:
        weights = None
        if method.redistribute:
            weights = mask_updates.mean_score(present, rank(method.grow, True)(present))
        phases += mask_updates.exchange_phases(
            rank(method.drop, False),
            rank(method.grow, True),
            jnp.asarray(plan.fraction)[index],
            layer_weights=weights,
        )
    if not phases:
        return list(map(encode, masks, masks))
    # Between updates that prune to the same number, only the exchange is left.
    first: Array | int = 0
    if revives:
        first = jnp.asarray(plans.first_phase(plan))[index]
    elif prunes and len(phases) > 1:
        first = 1 - jnp.asarray(plan.prunes)[index]
    return _spread(
        structure, mask_updates.run_phases(present, phases, first=first), masks
    )


def _update_boxes(
    method: Method,
    structure: Structure,
    plan: Plan,
    rank: Callable[[Score, bool], Callable[[list[Array]], list[Array]]],
    masks: list[Array],
    index: Array,
) -> list[Array]:
    """`update_masks` where the boxes of a leaf have equal numbers.

    What gradual pruning removes starts anew if the exchange takes it back; what is
    dropped from a leaf and grown again in its box continues.
    """
    present = kept = masks
    keep = jnp.asarray(plan.keep)[index]
    if plan.prunes.any():
        ranked = rank(method.prune, False)(present)
        present = kept = structures.select(
            structure, ranked, keep, among=present, scope="layer"
        )
    if plan.revives.any() and method.revive is not None:
        ranked = rank(method.revive, True)(present)
        present = structures.fill(structure, present, ranked, keep)
    if method.grow is not None:
        before = [structures.box_counts(structure, m) for m in present]
        drop, _ = mask_updates.exchange_phases(
            rank(method.drop, False),
            rank(method.grow, True),
            jnp.asarray(plan.fraction)[index],
        )
        present = list(map(is_active, mask_updates.run_phases(present, [drop])))
        ranked = rank(method.grow, True)(present)
        present = structures.fill(structure, present, ranked, before)
    return list(map(encode, present, kept))


def _spread(
    structure: Structure | None, chosen: Sequence[Array], like: Sequence[Array]
) -> list[Array]:
    return [
        structures.spread(structure, c, x) for c, x in zip(chosen, like, strict=True)
    ]


def choose_masks(
    method: Method,
    names: tuple[str, ...],
    masks: list[Array],
    params: list[Array],
    grads: list[Array] | None,
    accumulators: list[Array] | None,
    *,
    count: Array,
    key: Array,
) -> tuple[list[Array], list[Array]]:
    """The masks among all weights, and the marked weights (none without any)."""
    row = method.updates.done(count)
    ranked = scored(
        method.prune, names, masks, params, params, grads, accumulators, key
    )
    shapes = _shapes(masks)
    keep = jnp.asarray(plans.numbers(method, shapes))[row]
    chosen = structures.select(method.structure, ranked, keep, scope=method.scope)
    if method.marked_sparsity is None:
        return chosen, []
    number = plans.numbers(method, shapes, method.marked_sparsity)
    return chosen, structures.select(
        method.structure, ranked, number, scope=method.scope
    )


def choose_marked(
    method: Method,
    names: tuple[str, ...],
    masks: list[Array],
    params: list[Array],
    *,
    key: Array,
) -> list[Array]:
    """The marked weights among the active ones; with dense weights, among all."""
    assert method.marked_sparsity is not None
    ranked = scored(method.prune, names, masks, params, params, None, None, key)
    number = plans.numbers(method, _shapes(masks), method.marked_sparsity)
    among = None if method.weights == "dense" else masks
    return structures.select(
        method.structure, ranked, number, among=among, scope=method.scope
    )


def initial_masks(
    method: Method,
    names: tuple[str, ...],
    params: Sequence[Any],
    *,
    seed: int | Array,
) -> list[Array]:
    """The masks that a method starts from.

    Args:
      method: the record.
      names: of the maskable leaves.
      params: those leaves, arrays or `jax.ShapeDtypeStruct`.
      seed: of random masks.

    Returns:
      Boolean arrays.

    Raises:
      ValueError: shapes that the method's structure does not divide.
      TypeError: shapes only, where the masks are chosen among the weights.
    """
    shapes = _shapes(params)
    structures.check_leaves(method.structure, zip(names, shapes, strict=True))
    counts = plans.initial_counts(method, shapes)
    if counts == structures.parts(method.structure, shapes):
        return [jnp.ones(shape, bool) for shape in shapes]
    key = step_key(seed, 0)
    if method.weights == "sparse":
        counter = counter_dtype([math.prod(s) for s in shapes], "layer")
        return _draw(shapes, jnp.asarray(counts, counter), key, method.structure)
    if any(isinstance(p, jax.ShapeDtypeStruct) for p in params):
        raise TypeError(
            f"params must be arrays: {method.name} chooses its masks among them. For "
            "shapes only, use jax.eval_shape(tx.init, params)."
        )
    weights = [jnp.asarray(p) for p in params]
    masks = [jnp.ones_like(p, bool) for p in weights]
    ranked = scored(method.prune, names, masks, weights, weights, None, None, key)
    number = plans.numbers(method, shapes, method.sparsity(0))
    return structures.select(method.structure, ranked, number, scope=method.scope)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _draw(
    shapes: tuple[Shape, ...], counts: Array, key: Array, structure: Structure | None
) -> list[Array]:
    scores = [
        random_score(
            ScoreInputs(
                param=jax.ShapeDtypeStruct(shape, jnp.float32),  # pyright: ignore[reportArgumentType]
                grad=None,
                mask=None,  # pyright: ignore[reportArgumentType]
                accumulator=None,
                key=jax.random.fold_in(key, i),
            )
        )
        for i, shape in enumerate(shapes)
    ]
    return structures.select(structure, scores, counts, scope="layer")


def _shapes(leaves: Sequence[Any]) -> tuple[Shape, ...]:
    return tuple(tuple(x.shape) for x in leaves)


def step_key(seed: int | Array, count: Array | int) -> Array:
    """The random key of a step; that of step 0 is for the initial masks."""
    return jax.random.fold_in(jax.random.key(seed), count)


@jax.jit
def where_active(mask: Array, x: Array) -> Array:
    """`x`, zero where pruned."""
    return jnp.where(mask, x, jnp.zeros_like(x))
