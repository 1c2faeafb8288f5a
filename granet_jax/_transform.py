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
from granet_jax.boxes import merge_masks
from granet_jax.checks import check_flag, check_integer, check_seed
from granet_jax.dtypes import wider
from granet_jax.frozen import warn_of_frozen_leaves
from granet_jax.initial_masks import given_masks, init_masks
from granet_jax.layers import Stacked, check_stacked
from granet_jax.masking import PyTree, Where, map_masked
from granet_jax.methods.method import Method, check_method
from granet_jax.moments import refuse_flattened
from granet_jax.per_weight import is_per_weight
from granet_jax.phases import step_key, update_masks, update_masks_compiled
from granet_jax.state import SparseState
from granet_jax.step import (
    Setup,
    begin_step,
    continuing,
    gradient_of,
    hold,
    hold_step,
    is_due,
    mark_weights,
    names_of,
    renewed,
    run_if,
    stepped,
    storage,
    update_or_zero,
    warmed_up,
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
    warmup: int = 0,
    stacked: Stacked = None,
) -> optax.GradientTransformationExtraArgs:
    """Make training sparse: prune-and-regrow as an optax transformation.

    With `inner`, the optimizer that it steers, this is the exact algorithm. It sees the
    dense gradient that regrowth needs, gives `inner` the masked gradient, and keeps the
    moments of `inner` fresh at pruned weights, as its `init` makes them for a weight of
    zero (zero in most optimizers, the initial step size in rprop)::

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
    become exactly zero, with fresh moments. A weight continues if it was active before
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
        (not `optax.flatten`); None to use this as the last link of a chain. Optimizers
        that guard their first step by the step count, such as acprop and adopt without
        clipping, do not guard the first step of a weight that regrows later.
      where: Which leaves carry a mask: None for kernels and embeddings, which are the
        floating leaves with ndim >= 2 that are not named as biases, scales, tokens,
        positions or adapters; a regular expression that is searched for in the name of
        every leaf, such as "dense/kernel"; a function of (name, leaf); or a pytree of
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
      warmup: The number of steps over which the updates of weights that entered in the
        last update of the masks grow linearly to their full size. Under Adam with b2 =
        0.999, such weights take steps about 3 times as large as their neighbours do,
        because their second moments start at zero (Xiao et al. 2026). A warm-up longer
        than the interval between updates ends with the next update. 0 for none.
      stacked: Which axes of a leaf count layers, for networks that keep many layers in
        one array (`flax.linen.scan`, experts, ensembles): a mapping from regular
        expressions to an axis or a tuple of axes, such as {"layers/": 0}, or a function
        of (name, leaf) that returns them, or None for none. Such a leaf is treated as
        its layers would be, each a leaf of its own; see the page on stacked layers.

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
      Xiao et al., SMET, ICML 2026 (the warm-up).
    """
    _check_arguments(method, inner, where, masks, seed, packed)
    check_stacked(stacked)
    check_integer("warmup", warmup, least=0)
    if warmup and not method.grows:
        raise ValueError(
            f"warmup must be 0 for {method.name}, which never activates weights in an "
            f"update of its masks, got {warmup}."
        )
    optimizer = optax.with_extra_args_support(inner or optax.identity())
    setup = Setup(
        method,
        optimizer,
        inner is not None,
        where,
        masks,
        seed,
        packed,
        warmup,
        stacked,
    )
    step = update if method.weights == "sparse" else dense_weights.update
    return optax.GradientTransformationExtraArgs(
        functools.partial(init, setup), functools.partial(step, setup)
    )


def init(setup: Setup, params: PyTree) -> SparseState:
    """The first state: initial masks, and zeros."""
    # optax exports neither this class nor a test for it.
    if type(params).__name__ == "_ParamsPlaceholder":
        return _placeholder_state(setup, params)
    method, count = setup.method, jnp.zeros((), jnp.int32)
    if setup.masks is None:
        masks = init_masks(
            method, params, where=setup.where, seed=setup.seed, stacked=setup.stacked
        )
    else:
        masks = given_masks(method, setup.masks, params, setup.stacked)
    inner_state: Any = optax.EmptyState()
    if setup.has_inner:
        inner_state = setup.optimizer.init(params)
        refuse_flattened(inner_state, params)
        warn_of_frozen_leaves(setup.optimizer, inner_state, params, masks)
    average = ()
    if method.average_decay is not None:
        average = map_masked(
            lambda m, _, p: jnp.zeros_like(p, wider(p.dtype, jnp.float32)),
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
    entered = jax.tree.map(jnp.zeros_like, masks) if method.grows else ()
    stacks = masking.stacks_of(masks, setup.stacked)
    parts = merge_masks(method.structure, jax.tree.leaves(masks), stacks)
    phases = tuple(phase.init(parts) for phase in method.phases)
    if setup.packed:
        masks, marked, entered = masking.pack_masks((masks, marked, entered))
    return SparseState(count, masks, inner_state, average, marked, entered, phases)


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
        """The masks, the weights among them that entered, and the phases' states."""
        now, held = hold_step(now, step)
        masks, phases = load(now[0]), now[2]

        def after() -> list[Array]:
            grads = zero_outside(masks, gradient_of(setup, held, masks))
            moved, _ = optimizer.update(grads, held.inner_state, held.params, **extra)
            return stepped(masks, held.params, moved)

        key = step_key(setup.seed, step.count)
        leaves, treedef = jax.tree.flatten(masks)
        names, stacks = names_of(masks), masking.stacks_of(masks, setup.stacked)
        weights = weights_of(held, masks, after)
        run = update_masks if isinstance(step.count, Tracer) else update_masks_compiled
        new, kept, phases = run(
            method, names, leaves, phases, weights, step.count, key, stacks
        )
        entered = treedef.unflatten(n & ~k for n, k in zip(new, kept, strict=True))
        entered = store(entered) if method.grows else ()
        return store(treedef.unflatten(new)), entered, phases

    now = (state.masks, state.entered, state.phases)
    masks, entered, phases = run_if(method.updates, step, change, now)
    kept = load(masks)
    if method.grows:
        kept = continuing(kept, load(entered), is_due(method.updates, step))

    if not setup.has_inner or is_per_weight(optimizer, params, kept, extra):
        # At pruned weights, zeros and fresh moments go into the optimizer, and the same
        # moments come out of it. (To set them afterwards would give the same, but XLA
        # would copy parameters and moments for it.)
        grads = zero_outside(kept, gradient_of(setup, step, step.masks))
        weights = zero_outside(kept, params)
        inner_state = renewed(setup, step.inner_state, params, kept)
        moved, inner_state = optimizer.update(grads, inner_state, weights, **extra)
    else:
        grads = gradient_of(setup, step, step.masks)
        grads = zero_outside(step.masks, grads)
        moved, inner_state = optimizer.update(grads, step.inner_state, params, **extra)
        inner_state = renewed(setup, inner_state, params, kept)
    if setup.warmup:  # Only methods that grow have one.
        moved = warmed_up(setup, step, load(entered), moved)
    moved = map_masked(update_or_zero, kept, moved, params)

    weights = stepped(step.masks, params, moved)

    def mark(marked: PyTree) -> PyTree:
        _, present, after = hold(marked, load(masks), weights)
        return store(mark_weights(setup, present, after, step.count))

    marked = run_if(method.marks, step, mark, state.marked)
    return moved, SparseState(
        step.count, masks, inner_state, step.average, marked, entered, phases
    )


def _placeholder_state(setup: Setup, placeholder: Any) -> SparseState:
    """The state as `optax.tree_utils.tree_map_params` wants it, to see its structure.

    It has the placeholder of the parameters in place of every tree that is like them,
    and some leaf in place of every other array.
    """
    method = setup.method
    # The structure of a phase's state may depend on the leaves, so it becomes one leaf.
    phases = [phase.init([jnp.ones((1, 1), bool)]) for phase in method.phases]
    return SparseState(
        count=jnp.zeros((), jnp.int32),
        masks=placeholder,
        inner_state=setup.optimizer.init(placeholder),
        average=() if method.average_decay is None else placeholder,
        marked=() if method.marked_sparsity is None else placeholder,
        entered=placeholder if method.grows else (),
        phases=tuple(0 if jax.tree.leaves(state) else state for state in phases),
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
