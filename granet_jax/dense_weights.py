"""The step of methods that choose their masks among all weights.

The optimizer moves all weights, or those it can reach, by the dense gradient. Then the
highest-ranked of all weights become the masks. "projected" weights outside the masks
become zero; "dense" ones live on (`Method.weights`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from granet_jax import targets
from granet_jax.initial_masks import choose_among_all
from granet_jax.masking import PyTree, map_masked
from granet_jax.methods.method import Method
from granet_jax.moments import zero_moments
from granet_jax.penalties import penalised
from granet_jax.state import SparseState
from granet_jax.step import (
    Setup,
    begin_step,
    check_call,
    mark_weights,
    names_of,
    run_once_if,
    stepped,
    storage,
    update_or_zero,
    weights_of,
    zero_outside,
)


def update(
    setup: Setup,
    updates: PyTree,
    state: optax.OptState,
    params: PyTree | None = None,
    **extra: Any,
) -> tuple[PyTree, SparseState]:
    """One step of a method whose masks are chosen among all weights."""
    method, optimizer = setup.method, setup.optimizer
    state, params, dense = check_call(setup, updates, state, params, extra)
    step = begin_step(setup, state, params, dense)
    load, store = storage(state, params)
    before, marked = load(state.masks), load(state.marked)
    grads = penalised(method.penalty, updates, before, marked, params, state.count)

    # With dense weights, a gradient reaches the marked weights only, if there are any.
    limited = method.weights == "dense" and bool(jax.tree.leaves(marked))
    if limited:
        grads = zero_outside(marked, grads)
    moved, inner_state = optimizer.update(grads, step.inner_state, params, **extra)
    if limited:
        moved = zero_outside(marked, moved)
    after = stepped(before, params, moved)

    def choose(now: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        masks = load(now[0])
        leaves, treedef = jax.tree.flatten(masks)
        weights = weights_of(step, masks, after, dense, ())
        shapes = tuple(tuple(m.shape) for m in leaves)
        number = _number_at(method, shapes, step.count)
        chosen = choose_among_all(
            method, names_of(masks), leaves, weights, number, step.key
        )
        new_marked = ()
        if method.marked_sparsity is not None:
            new_marked = store(mark_weights(setup, masks, after, step.key))
        return store(treedef.unflatten(chosen)), new_marked

    due = (step.count % method.refresh == 0) | method.updates.contains(step.count)
    now = (state.masks, state.marked)
    always = method.refresh == 1
    masks, stored = choose(now) if always else run_once_if(due, choose, now)
    if method.weights == "projected":
        keep = load(masks)
        moved = map_masked(update_or_zero, keep, moved, params)
        inner_state = zero_moments(inner_state, keep)
    elif limited:
        inner_state = zero_moments(inner_state, load(stored))
    return moved, SparseState(
        step.count, masks, inner_state, step.average, stored, state.phases
    )


def _number_at(
    method: Method, shapes: tuple[tuple[int, ...], ...], count: Array
) -> Array:
    """How many parts are active after this step, by the schedule."""
    steps = (0, *method.updates.steps())
    rows = [targets.counts_at(method, shapes, method.sparsity(t)) for t in steps]
    return jnp.asarray(rows)[method.updates.done(count)]
