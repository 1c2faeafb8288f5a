"""`transform`: a method and an inner optimizer as one optax transformation.

`update` is the whole step. It calls `phases.update_masks` at update steps; methods with
dense weights have a step of their own, `dense_weights.update`. The module's name has an
underscore because the package's `transform` is the function.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.core import Tracer

from granet_jax import dense_weights, masking
from granet_jax.checks import check_flag, check_seed
from granet_jax.initial_masks import given_masks, init_masks
from granet_jax.masking import PyTree, Where, map_masked
from granet_jax.methods.method import Method, check_method
from granet_jax.moments import refuse_flattened, zero_moments
from granet_jax.per_weight import is_per_weight
from granet_jax.phases import step_key, update_masks, update_masks_compiled
from granet_jax.state import SparseState
from granet_jax.step import (
    Setup,
    begin_step,
    gradient_of,
    hold,
    hold_step,
    mark_weights,
    names_of,
    run_if,
    stepped,
    storage,
    update_or_zero,
    weights_of,
    zero_outside,
)


def transform(
    method: Method,
    inner: optax.GradientTransformation | None = None,
    *,
    where: Where = None,
    masks: PyTree | None = None,
    seed: int | Array = 0,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Make training sparse: prune-and-regrow as an optax transformation.

    With `inner`, the optimizer that it steers, this is the exact algorithm. It sees the
    dense gradient that regrowth needs, gives `inner` the masked gradient, and keeps the
    moments of `inner` zero at pruned weights::

        tx = optax.chain(
            optax.clip_by_global_norm(1.0),
            granet_jax.transform(granet_jax.granet(0.9, 10_000), optax.sgd(0.1, 0.9)),
        )

    Without `inner`, it is the last link after an optimizer and masks the optimizer's
    updates. It cannot reach the moments of pruned weights then. A method that grows by
    gradient takes the dense gradient as an extra argument,
    `tx.update(grads, state, params, grads=grads)`.

    It must be the last link of its chain: a later link (scaling, averaging) would undo
    the exact zeros. Clipping and weight decay go before it, or into `inner`;
    `optax.MultiSteps` goes around it.

    The order within a step: `inner` steps with the gradient masked by the present
    masks. At an update step, the masks are pruned and regrown from the stepped weights
    and the dense gradient. Weights that continue get the update of `inner`; all others
    become exactly zero, with zero moments. A weight continues if it was active before
    and is active after every phase of the update: one that was dropped and regrown by
    an exchange continues, one that gradual pruning removed before regrowth took it back
    starts again at zero. Masks are the same on all replicas, without communication
    beyond the mean of the gradients.

    Methods that choose their masks among all weights (`Method.weights` other than
    "sparse") differ: `inner` steps with the dense gradient, and the stepped weights
    decide the masks. "projected" weights outside the masks become zero; with "dense"
    weights `params` stay dense, `sparse_view` gives the sparse parameters, and the
    gradient is to be taken there.

    Under `vmap`, an update runs in all lanes whenever one of them updates.

    A gradient that is not finite is treated as any other, and the numbers of active
    weights stay exact. As a score, NaN ranks below every number: a weight that became
    NaN in this step is pruned first, and an inactive weight with a NaN gradient is
    grown last. An infinite score ranks highest. A weight that was NaN or infinite
    before a step cannot be made zero by adding an update to it (`apply_masks` can), and
    a moving average of the gradient keeps its NaN. To skip such steps, wrap the
    transformation in `optax.apply_if_finite`: then neither masks nor the step count
    move. As `inner`, it protects the weights and the moments, but the step counts, and
    its gradient may still decide what grows.

    The step count stops at 2**31 - 1, as optax's counts do. From then on the optimizer
    continues, schedules keep their last value, and the masks change no more, except
    those that are chosen again in every step.

    Args:
      method: A record from `granet`, `gmp`, `rigl` and the others, or your own
        `Method`.
      inner: Any optax optimizer that keeps its moments in the shapes of the parameters
        (not `optax.flatten`); None to use this as the last link of a chain.
      where: Which leaves carry a mask: None for every floating leaf with ndim >= 2; a
        function of (name, leaf), with names such as "dense/kernel"; or a pytree of
        bools of the structure of params. Evaluated at init.
      masks: Masks to start from instead of the method's own: boolean or 0/1 arrays in
        the structure of params, None at dense leaves. A method that prunes ends at its
        sparsity from any masks that are at least as dense. One that only exchanges
        weights needs masks of its sparsity.
      seed: Seed of random initial masks and random growth: an integer or an integer
        scalar array. An array may be traced, so that one compiled step (or one `vmap`)
        serves many seeds; then call `transform` inside the traced function.
      packed: Whether the state holds its masks at 1 bit a weight instead of 1 byte.
        Orbax saves such masks, flax's msgpack does not. (Where the last axis is divided
        among devices into shards whose length is not a multiple of eight, an update
        gathers the bits of a leaf.)

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `SparseState`. The
      updates have the wider of the dtypes of the inner update and the parameter.

    Raises:
      TypeError, ValueError: Here or at init: an argument has the wrong type; both
        `where` and `masks` are given; no leaf is maskable; masks have another structure
        or shape, or the method cannot end at its sparsity from them. At update: params
        are missing; or, without `inner`, the dense gradient is missing.

    References:
      Liu et al., Sparse Training via Boosting Pruning Plasticity with
      Neuroregeneration, NeurIPS 2021 (the order within a step is that of their code).
    """
    _check_arguments(method, inner, where, masks, seed, packed)
    optimizer = optax.with_extra_args_support(inner or optax.identity())
    setup = Setup(method, optimizer, inner is not None, where, masks, seed, packed)
    step = update if method.weights == "sparse" else dense_weights.update
    return optax.GradientTransformationExtraArgs(
        functools.partial(init, setup), functools.partial(step, setup)
    )


def init(setup: Setup, params: PyTree) -> SparseState:
    """The first state: initial masks, and zeros."""
    method, count = setup.method, jnp.zeros((), jnp.int32)
    if setup.masks is None:
        masks = init_masks(method, params, where=setup.where, seed=setup.seed)
    else:
        masks = given_masks(method, setup.masks, params)
    inner_state: Any = optax.EmptyState()
    if setup.has_inner:
        inner_state = setup.optimizer.init(params)
        refuse_flattened(inner_state, params)
    average = ()
    if method.average_decay is not None:
        average = map_masked(
            lambda m, _, p: jnp.zeros_like(p, jnp.promote_types(p.dtype, jnp.float32)),
            masks,
            masks,
            params,
        )
    marked = ()
    if method.marked_sparsity is not None:
        marked = mark_weights(
            setup,
            masks,
            [jnp.asarray(p) for p in masking.maskable_leaves(params, masks)],
            count,
        )
        marked = map_masked(
            lambda m, _, p: masking.placed_like(m, p), marked, marked, params
        )
    phases = tuple(phase.init(jax.tree.leaves(masks)) for phase in method.phases)
    if setup.packed:
        masks, marked = masking.pack_masks((masks, marked))
    return SparseState(count, masks, inner_state, average, marked, phases)


def update(
    setup: Setup,
    updates: PyTree,
    state: Any,
    params: PyTree | None = None,
    **extra: Any,
) -> tuple[PyTree, SparseState]:
    """One step of a method whose pruned weights are zero."""
    method, optimizer = setup.method, setup.optimizer
    step = begin_step(setup, updates, state, params, extra)
    load, store = storage(state, params)

    def change(now: tuple[PyTree, PyTree, Any]) -> tuple[PyTree, PyTree, Any]:
        """The masks, the weights among them that continue, and the phases' states."""
        now, held = hold_step(now, step)
        masks, phases = load(now[0]), now[2]

        def after() -> list[Array]:
            grads = zero_outside(masks, gradient_of(setup, held, masks))
            moved, _ = optimizer.update(grads, held.inner_state, held.params, **extra)
            return stepped(masks, held.params, moved)

        key = step_key(setup.seed, step.count)
        leaves, treedef = jax.tree.flatten(masks)
        names, weights = names_of(masks), weights_of(held, masks, after)
        run = update_masks if isinstance(step.count, Tracer) else update_masks_compiled
        new, kept, phases = run(method, names, leaves, phases, weights, step.count, key)
        new, kept = treedef.unflatten(new), treedef.unflatten(kept)
        return store(new), store(kept) if method.grows else (), phases

    # Where no phase grows, every weight that is active continues.
    now = (state.masks, state.masks if method.grows else (), state.phases)
    masks, kept, phases = run_if(method.updates, step, change, now)
    kept = load(kept if method.grows else masks)

    if not setup.has_inner or is_per_weight(optimizer, params, kept, extra):
        # Zeros that go into the optimizer come out of it as zeros. (To mask what comes
        # out would be the same, but XLA would copy parameters and moments for it.)
        moved, inner_state = optimizer.update(
            zero_outside(kept, gradient_of(setup, step, step.masks)),
            zero_moments(step.inner_state, kept),
            zero_outside(kept, params),
            **extra,
        )
    else:
        grads = gradient_of(setup, step, step.masks)
        grads = zero_outside(step.masks, grads)
        moved, inner_state = optimizer.update(grads, step.inner_state, params, **extra)
        inner_state = zero_moments(inner_state, kept)
    moved = map_masked(update_or_zero, kept, moved, params)

    weights = stepped(step.masks, params, moved)

    def mark(marked: PyTree) -> PyTree:
        _, present, after = hold(marked, load(masks), weights)
        return store(mark_weights(setup, present, after, step.count))

    marked = run_if(method.marks, step, mark, state.marked)
    return moved, SparseState(
        step.count, masks, inner_state, step.average, marked, phases
    )


def _check_arguments(
    method: Any,
    inner: Any,
    where: Where,
    masks: PyTree | None,
    seed: Any,
    packed: Any,
) -> None:
    check_method(method)
    check_seed(seed)
    check_flag("packed", packed)
    if inner is not None and not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"inner must be an optax optimizer or None, got {inner!r}.")
    if where is not None and masks is not None:
        raise ValueError(
            "where and masks cannot both be given: masks already say which leaves "
            "carry one (None at the others)."
        )
    if inner is None and (method.resets.steps() or method.penalty is not None):
        raise ValueError(
            f"{method.name} resets the optimizer's moments or adds to its gradient, "
            "and as the last link of a chain it only sees updates: give it the "
            "optimizer, transform(method, inner=optimizer)."
        )
