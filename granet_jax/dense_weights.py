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

from granet_jax import masking, targets
from granet_jax.initial_masks import choose_among_all
from granet_jax.layers import layer_shapes
from granet_jax.masking import PyTree, map_masked
from granet_jax.methods.method import Method
from granet_jax.moments import renew_moments
from granet_jax.phases import step_key
from granet_jax.state import SparseState
from granet_jax.step import (
    Setup,
    begin_step,
    gradient_of,
    hold,
    mark_weights,
    names_of,
    renewed,
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
    state: Any,
    params: PyTree | None = None,
    **extra: Any,
) -> tuple[PyTree, SparseState]:
    """One step of a method whose masks are chosen among all weights."""
    method, optimizer = setup.method, setup.optimizer
    step = begin_step(setup, updates, state, params, extra)
    load, store = storage(state, params)
    grads = gradient_of(setup, step, step.masks)

    # With dense weights, a gradient reaches the marked weights only, if there are any.
    limited = method.weights == "dense" and bool(jax.tree.leaves(step.marked))
    if limited:
        grads = zero_outside(step.marked, grads)
    moved, inner_state = optimizer.update(grads, step.inner_state, params, **extra)
    if limited:
        moved = zero_outside(step.marked, moved)
    after = stepped(step.masks, params, moved)

    def choose(now: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        (now_masks, _), weights, average = hold(now, after, step.average)
        masks, held = load(now_masks), step._replace(average=average)
        leaves, treedef = jax.tree.flatten(masks)
        stacks = masking.stacks_of(masks, setup.stacked)
        shapes = layer_shapes([m.shape for m in leaves], stacks)
        chosen = choose_among_all(
            method,
            names_of(masks),
            leaves,
            weights_of(held, masks, lambda: weights),
            _number_at(method, shapes, step.count),
            step_key(setup.seed, step.count),
            stacks,
        )
        marked = ()
        if method.marked_sparsity is not None:
            marked = store(mark_weights(setup, masks, weights, step.count))
        return store(treedef.unflatten(chosen)), marked

    now = (state.masks, state.marked)
    if method.refresh == 1:
        masks, marked = choose(now)
    else:
        due = (step.count % method.refresh == 0) | method.updates.contains(step.count)
        masks, marked = run_once_if(due, choose, now)
    if method.weights == "projected":
        keep = load(masks)
        moved = map_masked(update_or_zero, keep, moved, params)
        inner_state = renewed(setup, inner_state, params, keep)
    elif limited:
        fresh = optimizer.init(optax.apply_updates(step.params, moved))
        inner_state = renew_moments(inner_state, fresh, load(marked))
    return moved, SparseState(
        step.count, masks, inner_state, step.average, marked, (), state.phases
    )


def _number_at(
    method: Method, shapes: tuple[tuple[int, ...], ...], count: Array
) -> Array:
    """How many parts are active after this step, by the schedule."""
    steps = (0, *method.updates.steps())
    rows = [targets.counts_at(method, shapes, method.sparsity(t)) for t in steps]
    return jnp.asarray(rows)[method.updates.done(count)]
