"""`transform`: a method and an inner optimizer as one optax transformation.

The only module that meets optax's protocol. Named with an underscore because the
package's `transform` is the function.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.core import Tracer

from granet_jax import activity, choices, masking, plans, structures
from granet_jax.checks import check_flag, check_seed
from granet_jax.choices import step_key, where_active
from granet_jax.elementwise import is_elementwise
from granet_jax.masking import PyTree, Where
from granet_jax.methods import Method, check_method
from granet_jax.moments import (
    masked_moments,
    refuse_flattened,
    restart_moments,
    zero_moments,
)
from granet_jax.penalties import Penalty, PenaltyInputs


class SparseState(NamedTuple):
    """State of `transform`.

    Attributes:
      count: int32 scalar, optimizer steps taken.
      activity: pytree of the structure of params: int8 arrays, positive where weights
        are active (`masks` gives the masks; 1 where a weight entered with the last
        update, 2 elsewhere), `optax.MaskedNode()` at dense leaves. With `packed`,
        `PackedMask` records.
      inner_state: state of the inner optimizer; `optax.EmptyState()` without one.
      accumulator: moving average of the dense gradient, of the structure of the masks,
        for a method with `accumulator_decay`; else the empty tuple.
      marked: a second tree of masks, of the same structure, for a method with
        `marked_sparsity`; else the empty tuple. Packed as `activity` is.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    activity: PyTree
    inner_state: optax.OptState
    accumulator: PyTree
    marked: PyTree = ()

    @property
    def masks(self) -> PyTree:
        """Boolean arrays, True where active; `PackedMask` records if they are packed.

        Computed when asked for. `get_masks` gives boolean arrays always.
        """
        return activity.masks_of(self.activity)


def transform(
    method: Method,
    inner: optax.GradientTransformation | None = None,
    *,
    where: Where = None,
    masks: PyTree | None = None,
    seed: int | Array = 0,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Makes training sparse: prune-and-regrow as an optax transformation.

    With `inner`, the optimizer it steers, this is the exact algorithm: it sees the
    dense gradient that regrowth needs, hands `inner` the masked one, and keeps the
    parameter-shaped moments of `inner` zero at pruned weights::

        tx = optax.chain(
            optax.clip_by_global_norm(1.0),
            granet_jax.transform(granet_jax.granet(0.9, 10_000), optax.sgd(0.1, 0.9)),
        )

    Without `inner` it is the last link after an optimizer, and turns its updates into
    masked ones. The moments of pruned weights are then out of reach, and a method that
    grows by gradient takes the dense gradient as an extra argument,
    `tx.update(grads, state, params, grads=grads)`.

    It must be the last link of its chain: a link after it (scaling, averaging) would
    undo the exact zeros. Clipping and weight decay go before it, or into `inner`; and
    `optax.MultiSteps` goes around it.

    A step, in order: `inner` steps with the gradient masked by the present masks; on
    an update step the masks are pruned and regrown from the stepped weights and the
    dense gradient; weights active before and after get the optimizer's update, all
    others become exactly zero. (Of the weights active before and after, those that
    gradual pruning had removed before regrowth took them back start anew: they become
    zero with zero moments. Those dropped and regrown continue.) Masks are the same on
    all replicas, without communication beyond the gradient mean.

    Methods that choose masks anew among all weights (`Method.weights` other than
    "sparse") differ: `inner` steps with the dense gradient, and the stepped weights
    decide the masks. Those that are "projected" leave exact zeros outside; those with
    "dense" weights leave `params` dense, and `sparse_view` gives the sparse ones, at
    which the gradient is to be taken.

    Under `vmap`, an update runs in all lanes whenever one of them updates.

    A gradient that is not finite goes the way of any other, and the numbers of active
    weights stay exact. As a score NaN ranks below every number: the NaN that a step has
    made of a weight is pruned first, and an inactive weight with a NaN gradient enters
    last; an infinite one ranks highest. What is pruned in that step is zero. But a
    weight that was NaN or infinite before a step cannot be made zero by adding to it
    (`apply_masks` can), and a moving average of the gradient keeps its NaN. To skip
    such steps put `optax.apply_if_finite` around: neither masks nor the step count then
    move. As `inner` it keeps the weights and the moments from them, while the step
    counts, and its gradient may still decide what grows.

    The step count stays at 2**31 - 1 once there, as optax's do: the optimizer goes on,
    schedules keep their last value, and no step beyond updates the masks, but for those
    that are chosen anew in every step.

    Args:
      method: a record from `granet`, `gmp`, `rigl`, `set_`, `snfs`, `static`, or one's
        own `Method`.
      inner: any optax optimizer that keeps moments in the parameters' shapes (not
        `optax.flatten`); None for use as the last link.
      where: which leaves carry a mask: None for every floating leaf with ndim >= 2; a
        function of (name, leaf), the name like "dense/kernel"; or a pytree of bools of
        the structure of params. Evaluated at init.
      masks: start from these masks (boolean or 0/1 arrays in the structure of params,
        None at dense leaves) instead of the method's own.
      seed: of random initial masks and random growth: an integer, or an integer scalar
        array. An array may be traced, so that one compiled step (or one `vmap`) serves
        many seeds: call `transform` inside the traced function then.
      packed: whether the state holds its masks at 1 bit a weight, instead of 1 byte.
        They are taken apart within the passes over memory that a step makes anyway.
        Orbax saves them, flax's msgpack does not.
        (Sharded in shards of the last axis that hold no multiple of eight weights, an
        update gathers the bits of a leaf.)

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `SparseState`.
      Updates have the wider of the dtypes of the inner update and the parameter.

    Raises:
      TypeError, ValueError: here or at init, an argument of the wrong type; `where`
        and `masks` both given; nothing maskable; masks of another structure or shape;
        at update, params missing, or the dense gradient missing without `inner`.

    References:
      Liu et al., Sparse Training via Boosting Pruning Plasticity with
      Neuroregeneration, NeurIPS 2021 (order within a step: their code's).
    """
    _check_arguments(method, inner, where, masks, seed)
    check_flag("packed", packed)
    wrapped = None if inner is None else optax.with_extra_args_support(inner)

    if wrapped is None and (method.resets.steps() or method.penalty is not None):
        raise ValueError(
            f"{method.name} resets the optimizer's moments or adds to its gradient, "
            "and as the last link of a chain it only sees updates: give it the "
            "optimizer, transform(method, inner=optimizer)."
        )

    # Whether weights enter: zero, with zero moments, and moved from the next step on.
    enters = method.weights == "sparse" and method.grows
    regrows = wrapped is not None and enters

    @functools.lru_cache(maxsize=8)
    def plan(shapes: tuple[tuple[int, ...], ...]) -> plans.Plan:
        return plans.plan(method, shapes)

    def update_masks(
        names: tuple[str, ...],
        leaves: list[Array],
        stepped: Callable[[list[Array]], list[Array]],
        grads: list[Array] | None,
        accumulators: list[Array] | None,
        marked: list[Array] | None,
        count: Array,
    ) -> list[Array]:
        return choices.update_masks(
            method,
            plan(tuple(tuple(x.shape) for x in leaves)),
            names,
            leaves,
            stepped,
            grads,
            accumulators,
            marked,
            count=count,
            key=step_key(seed, count),
        )

    # Compiled also for those who call `update` outside jit: op by op, its loops would
    # be compiled anew at every mask update.
    @functools.partial(jax.jit, static_argnums=0)
    def update_masks_compiled(
        names: tuple[str, ...],
        leaves: list[Array],
        stepped: list[Array],
        *rest: Any,
    ) -> list[Array]:
        def weights(active: list[Array]) -> list[Array]:
            return list(map(where_active, active, stepped))

        return update_masks(names, leaves, weights, *rest)

    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def choose_masks(
        names: tuple[str, ...],
        leaves: list[Array],
        stepped: list[Array],
        grads: list[Array] | None,
        accumulators: list[Array] | None,
        count: Array,
    ) -> tuple[list[Array], list[Array]]:
        return choices.choose_masks(
            method,
            names,
            leaves,
            stepped,
            grads,
            accumulators,
            count=count,
            key=step_key(seed, count),
        )

    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def choose_marked(
        names: tuple[str, ...],
        leaves: list[Array],
        stepped: list[Array],
        count: Array | int,
    ) -> list[Array]:
        return choices.choose_marked(
            method, names, leaves, stepped, key=step_key(seed, count)
        )

    def init(params: PyTree) -> SparseState:
        if masks is None:
            initial = init_masks(method, params, where=where, seed=seed)
        else:
            initial = masking.check_masks(masks, params)
            present = list(zip(_names(initial), jax.tree.leaves(initial), strict=True))
            structures.check_leaves(
                method.structure, [(name, m.shape) for name, m in present]
            )
            structures.check_masks(method.structure, present)
            initial = masking.map_masked(
                lambda m, _, p: masking.placed_like(m, p), initial, initial, params
            )
        if wrapped is None:
            inner_state = optax.EmptyState()
        else:
            inner_state = wrapped.init(params)
            refuse_flattened(inner_state, params)
        accumulator = ()
        if method.accumulator_decay is not None:
            accumulator = masking.map_masked(
                lambda m, _, p: jnp.zeros_like(p, _accumulator_dtype(p)),
                initial,
                initial,
                params,
            )
        count = jnp.zeros((), jnp.int32)
        marked = ()
        if method.marked_sparsity is not None:
            leaves, treedef = jax.tree.flatten(initial)
            weights = masking.maskable_leaves(params, initial)
            weights = [jnp.asarray(p) for p in weights]
            chosen = choose_marked(_names(initial), leaves, weights, 0)
            marked = treedef.unflatten(map(masking.placed_like, chosen, weights))
        if packed:
            initial, marked = masking.pack_masks((initial, marked))
        codes = activity.codes_of(initial)
        return SparseState(count, codes, inner_state, accumulator, marked)

    def update(
        updates: PyTree,
        state: optax.OptState,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, SparseState]:
        if params is None:
            raise ValueError(
                "params must be given to update: call tx.update(grads, state, params)."
            )
        if not isinstance(state, SparseState):
            raise TypeError(
                "state must be the SparseState that init returned, got "
                f"{type(state).__name__}. Restore a checkpoint onto "
                "jax.eval_shape(tx.init, params), which gives it its types back."
            )
        # As the state holds them, masks go through loops and into the next state; taken
        # apart, they are read by what is computed.
        pack = unpack = _as_it_is
        store, load = _as_it_is, _decoded
        if _is_packed(state):
            pack, store = masking.pack_masks, _packed
            unpack = load = functools.partial(_unpack_like, params)
        old = load(state.activity)
        grads = updates if wrapped is not None else extra_args.get("grads")
        if grads is None and method.needs_gradient:
            raise ValueError(
                f"{method.name} needs the dense gradient, and as the last link of a "
                "chain it only sees updates. Either give it the optimizer, "
                "transform(method, inner=optimizer), or pass the gradient along, "
                "tx.update(grads, state, params, grads=grads)."
            )
        count = jnp.asarray(optax.safe_increment(state.count))
        # Not past the last number that the counter has.
        advances = count > state.count
        accumulator = state.accumulator
        if method.accumulator_decay is not None:
            accumulator = _accumulate(method.accumulator_decay, accumulator, grads, old)

        def begun() -> optax.OptState:
            """The inner state that the step begins with; made where it is read.

            Moments start anew here, and not where the step before ends: what moved
            the parameters then would have to be computed from moments that the new
            ones take the place of, and every step would copy them.
            """
            if wrapped is None or not method.resets.steps():
                return state.inner_state
            fresh = zero_moments(wrapped.init(params), old)
            restart = method.resets.contains(state.count) & advances
            return restart_moments(state.inner_state, fresh, params, restart)

        def step_inner(
            gradient: PyTree, inner_state: optax.OptState, params_: PyTree
        ) -> tuple[PyTree, optax.OptState]:
            if wrapped is None:
                return updates, inner_state
            return wrapped.update(gradient, inner_state, params_, **extra_args)

        def change_masks(stored: PyTree, step: Callable[[PyTree], PyTree]) -> PyTree:
            """New codes of all weights, from masks and a function to updates.

            Masks are as the state holds them. The function is given the active weights,
            whose updates are asked for.
            """
            masks_ = load(stored)
            leaves, treedef = jax.tree.flatten(masks_)

            def stepped(active: list[Array]) -> list[Array]:
                found = _stepped(params, step(treedef.unflatten(active)), masks_)
                return list(map(where_active, active, found))

            rest = (
                None if grads is None else masking.maskable_leaves(grads, masks_),
                jax.tree.leaves(accumulator) or None,
                jax.tree.leaves(unpack(state.marked)) or None,
                count,
            )
            names = _names(masks_)
            if isinstance(count, Tracer):
                codes = update_masks(names, leaves, stepped, *rest)
            else:
                codes = update_masks_compiled(names, leaves, stepped(leaves), *rest)
            return treedef.unflatten(codes)

        def penalised(masks_: PyTree) -> PyTree:
            if method.penalty is None:
                return updates
            marked = unpack(state.marked)
            return _penalised(
                method.penalty, updates, masks_, marked, params, state.count
            )

        given = penalised(old)

        def finish(
            emitted: PyTree,
            new: PyTree,
            inner_state: Any,
            marked: PyTree,
        ) -> tuple[PyTree, SparseState]:
            """The result of the step; masks as the state holds them."""
            if method.marks.steps():
                stepped = list(_stepped(params, emitted, old))

                def mark(_: PyTree) -> PyTree:
                    masks_ = load(new)
                    leaves, treedef = jax.tree.flatten(masks_)
                    chosen = choose_marked(_names(masks_), leaves, stepped, count)
                    return pack(treedef.unflatten(chosen))

                marked = _if(method.marks.contains(count) & advances, mark, marked)
            return emitted, SparseState(count, new, inner_state, accumulator, marked)

        if method.weights != "sparse":
            # With dense weights, only those marked are moved, where some are.
            reach = ()
            if method.weights == "dense":
                reach = unpack(state.marked)
            if jax.tree.leaves(reach):
                given = masking.map_masked(where_active, reach, given)
            inner_updates, inner_state = step_inner(given, begun(), params)
            if jax.tree.leaves(reach):
                inner_updates = masking.map_masked(where_active, reach, inner_updates)

            # Made outside of the loop: `apply_updates` makes the same, which takes the
            # parameters' place only if nothing later reads those of before.
            stepped = list(_stepped(params, inner_updates, old))

            def choose(now: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
                leaves, treedef = jax.tree.flatten(load(now[0]))
                chosen, marked = choose_masks(
                    _names(old),
                    leaves,
                    stepped,
                    None if grads is None else masking.maskable_leaves(grads, old),
                    jax.tree.leaves(accumulator) or None,
                    count,
                )
                chosen = treedef.unflatten(chosen)
                marked = treedef.unflatten(marked) if marked else ()
                return store(activity.codes_of(chosen)), pack(marked)

            now = (state.activity, state.marked)
            if method.refresh == 1:
                new, marked = choose(now)
            else:
                due = (count % method.refresh == 0) | method.updates.contains(count)
                new, marked = _if(due, choose, now)
            if method.weights == "projected":
                keep = load(new)
                emitted = masking.map_masked(_emit, keep, inner_updates, params)
                inner_state = zero_moments(inner_state, keep)
                return finish(emitted, new, inner_state, marked)
            if jax.tree.leaves(reach):
                inner_state = zero_moments(inner_state, unpack(marked))
            return finish(inner_updates, new, inner_state, marked)

        updating = method.updates.contains(count) & advances
        if wrapped is not None and _can_mask_inputs(
            step_inner, grads, state, params, old
        ):
            # Every weight is on its own in `inner`: to zero what goes in at weights
            # that do not continue is to zero what comes out. The masks change first,
            # and nothing later reads the old ones, so that in other steps all passes
            # in place. (Penalty and inner step are computed again inside, on update
            # steps only: handing their results in would force them through memory in
            # every step.)
            def change(now: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
                again = penalised(load(now[0]))

                def step(active: PyTree) -> PyTree:
                    masked = masking.map_masked(where_active, active, again)
                    return step_inner(masked, begun(), params)[0]

                codes = change_masks(now[0], step)
                apart = jax.tree.leaves(now[1])
                return store(codes), pack(_continuing(codes)) if apart else ()

            # Bits do not say what entered: beside them what continues is made anew.
            apart = state.activity if regrows and _is_packed(state) else ()
            new = state.activity
            if method.updates.steps():
                new, apart = _if(updating, change, (new, apart))
            if jax.tree.leaves(apart):
                keep = unpack(apart)
            elif regrows:
                keep = _continuing(new, updating)
            else:
                # What never grows continues wherever it is active.
                keep = load(new)
            masked = masking.map_masked(where_active, keep, given)
            inner_updates, inner_state = step_inner(
                masked,
                zero_moments(begun(), keep),
                masking.map_masked(where_active, keep, params),
            )
            emitted = masking.map_masked(_emit, keep, inner_updates, params)
            return finish(emitted, new, inner_state, state.marked)

        masked = given
        if wrapped is not None:
            masked = masking.map_masked(where_active, old, given)
        inner_updates, inner_state = step_inner(masked, begun(), params)

        def change_last(now: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
            stored, emitted, inner_state = now
            codes = change_masks(stored, lambda _: emitted)
            keep = _continuing(codes)
            emitted = masking.map_masked(_emit, keep, emitted, params)
            return store(codes), emitted, zero_moments(inner_state, keep)

        emitted = masking.map_masked(_emit, old, inner_updates, params)
        inner_state = zero_moments(inner_state, old)
        now = (state.activity, emitted, inner_state)
        if method.updates.steps():
            now = _if(updating, change_last, now)
        new, emitted, inner_state = now
        return finish(emitted, new, inner_state, state.marked)

    return optax.GradientTransformationExtraArgs(init, update)


def init_masks(
    method: Method, params: PyTree, *, where: Where = None, seed: int | Array = 0
) -> PyTree:
    """The masks that `transform(method, where=where, seed=seed)` starts from.

    All weights active at sparsity 0; else random masks with exactly the number of
    active weights that the method's distribution gives every leaf. But the masks of a
    method that chooses them anew (`Method.weights` other than "sparse") are the choice
    among the parameters themselves.

    Args:
      method: a record of a method.
      params: pytree of arrays or `jax.ShapeDtypeStruct`; only shapes, dtypes and
        shardings are read, unless the masks are chosen among the parameters.
      where: which leaves carry a mask, as in `transform`.
      seed: of the random masks, as in `transform`.

    Returns:
      Pytree of the structure of `params`: boolean arrays, placed like the parameters,
      and `optax.MaskedNode()` at dense leaves.

    Raises:
      ValueError, TypeError: as `masking.maskable`; shapes that the method's structure
        does not divide.
    """
    _check_method_and_seed(method, seed)
    selected = masking.maskable(params, where)
    named = [
        (masking.leaf_name(path), p)
        for (path, p), s in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(selected),
            strict=True,
        )
        if s
    ]
    names, weights = tuple(name for name, _ in named), [p for _, p in named]
    drawn = iter(choices.initial_masks(method, names, weights, seed=seed))
    return jax.tree.map(
        lambda p, s: masking.placed_like(next(drawn), p) if s else optax.MaskedNode(),
        params,
        selected,
    )


def sparse_view(params: PyTree, opt_state: optax.OptState) -> PyTree:
    """The sparse parameters: those of the forward pass, and those to keep.

    For a method that keeps its weights dense (`straight_through`, `top_kast`, or any
    with `weights="dense"`) this is what the loss, its gradient, and every evaluation
    are to see; what training ends with is the view of the last state::

        sparse = granet_jax.sparse_view(params, opt_state)
        grads = jax.grad(loss)(sparse, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)

    For the others it is the parameters as they are after a step.

    Args:
      params: pytree of arrays.
      opt_state: any nest of optax states with one `SparseState`.

    Returns:
      `params` with exact zeros outside the masks of `opt_state`.

    Raises:
      ValueError: no or several sparse states; parameters of another structure.
    """
    return masking.apply_masks(params, get_masks(opt_state))


def get_state(opt_state: optax.OptState) -> SparseState:
    """The one `SparseState` inside any nest of optax states.

    Raises:
      ValueError: there is none, or more than one.
    """
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=_is_sparse) if _is_sparse(x)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state must hold one state of granet_jax.transform, got {len(found)}"
            + (
                ": pass the state of one of them."
                if found
                else ": is transform part of the optimizer?"
            )
        )
    return found[0]


def get_masks(opt_state: optax.OptState) -> PyTree:
    """The masks inside any nest of optax states, see `get_state`; never packed."""
    return masking.unpack_masks(get_state(opt_state).masks)


def set_masks(opt_state: optax.OptState, masks: PyTree) -> optax.OptState:
    """The same state with other masks.

    The next step makes the parameters and moments agree with them; `apply_masks` does
    so at once for the parameters.

    Args:
      opt_state: any nest of optax states with one `SparseState`.
      masks: pytree of masks with the structure and shapes of those in the state.

    Returns:
      The nest of states, with `masks` in place.

    Raises:
      ValueError: no or several sparse states; masks of another structure or shape.
    """
    present = get_masks(opt_state)
    like = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, jnp.float32), present)
    checked = masking.check_masks(masks, like)
    if jax.tree.structure(checked) != jax.tree.structure(present):
        raise ValueError(
            "masks must have masks at the same leaves as the state: expected "
            f"{jax.tree.structure(present)}, got {jax.tree.structure(checked)}."
        )
    checked = jax.tree.map(masking.placed_like, checked, present)

    def replace(state: SparseState) -> SparseState:
        held = masking.pack_masks(checked) if _is_packed(state) else checked
        return state._replace(activity=activity.codes_of(held))

    return jax.tree.map(
        lambda x: replace(x) if _is_sparse(x) else x, opt_state, is_leaf=_is_sparse
    )


def _check_arguments(
    method: Any, inner: Any, where: Where, masks: PyTree | None, seed: Any
) -> None:
    _check_method_and_seed(method, seed)
    if inner is not None and not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"inner must be an optax optimizer or None, got {inner!r}.")
    if where is not None and masks is not None:
        raise ValueError(
            "where and masks cannot both be given: masks already say which leaves "
            "carry one (None at the others)."
        )


def _check_method_and_seed(method: Any, seed: Any) -> None:
    check_method(method)
    check_seed(seed)


def _if(predicate: Array, change: Callable[[PyTree], PyTree], value: PyTree) -> PyTree:
    """change(value) where `predicate`, else value: a loop of one trip or none.

    A loop passes its value through in place, as `lax.cond` does too; but under `vmap`
    a cond becomes a select that runs both branches in every step, where the body of a
    loop runs only when some lane wants it.
    """
    if not isinstance(predicate, Tracer):
        # Outside jit: known, and a loop would be compiled anew in every step.
        return change(value) if predicate else value

    def body(carry: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        wanted, value = carry
        return jnp.zeros_like(wanted), change(value)

    return lax.while_loop(lambda carry: carry[0], body, (predicate, value))[1]


def _can_mask_inputs(
    step_inner: Any, grads: PyTree, state: SparseState, params: PyTree, masks: PyTree
) -> bool:
    """Whether the inner step may be masked at its inputs, see `elementwise`."""
    if not isinstance(state.count, Tracer):
        return False  # Outside jit nothing is fused, and nothing gained.
    masked_params = masking.flags(params, masks)
    masked_state = masked_moments(state.inner_state, masks)
    return is_elementwise(
        step_inner,
        (grads, state.inner_state, params),
        masked_in=[*masked_params, *masked_state, *masked_params],
        masked_out=[*masked_params, *masked_state],
    )


def _names(masks: PyTree) -> tuple[str, ...]:
    """The names of the leaves that carry a mask."""
    paths = jax.tree_util.tree_leaves_with_path(masks)
    return tuple(masking.leaf_name(path) for path, _ in paths)


def _penalised(
    penalty: Penalty,
    grads: PyTree,
    masks: PyTree,
    marked: PyTree,
    params: PyTree,
    count: Array,
) -> PyTree:
    """Gradients with that of the penalty, at leaves that carry a mask."""
    leaves, treedef = jax.tree.flatten(masks)
    marks = jax.tree.leaves(marked) or [None] * len(leaves)
    weights = masking.maskable_leaves(params, masks)
    terms = []
    for p, m, k in zip(weights, leaves, marks, strict=True):
        wide = p.astype(jnp.promote_types(p.dtype, jnp.float32))
        terms.append(penalty(PenaltyInputs(p, m, k, count)) * wide)
    return masking.map_masked(
        lambda _, g, term: g + term.astype(g.dtype),
        masks,
        grads,
        # In the order of the leaves that carry a mask.
        treedef.unflatten(terms),
    )


def _stepped(params: PyTree, inner_updates: PyTree, masks: PyTree) -> Iterator[Array]:
    """Maskable weights after the inner optimizer's step."""
    for p, u in zip(
        masking.maskable_leaves(params, masks),
        masking.maskable_leaves(inner_updates, masks),
        strict=True,
    ):
        yield (p + u).astype(p.dtype)


def _emit(keep: Array, inner_update: Array, param: Array) -> Array:
    # In the wider of both dtypes: -p must be exact for p + (-p) to be zero, and the
    # inner update must reach active weights unrounded.
    dtype = jnp.promote_types(inner_update.dtype, param.dtype)
    return jnp.where(keep, inner_update.astype(dtype), -param.astype(dtype))


def _accumulate(
    decay: float, accumulator: PyTree, grads: PyTree, masks: PyTree
) -> PyTree:
    leaves, treedef = jax.tree.flatten(accumulator)
    dense = masking.maskable_leaves(grads, masks)
    return treedef.unflatten(
        [
            decay * a + (1.0 - decay) * g.astype(a.dtype)
            for a, g in zip(leaves, dense, strict=True)
        ]
    )


def _accumulator_dtype(param: Any) -> jnp.dtype:
    return jnp.promote_types(param.dtype, jnp.float32)


def _as_it_is(tree: PyTree) -> PyTree:
    return tree


def _packed(codes: PyTree) -> PyTree:
    return masking.pack_masks(_decoded(codes))


def _continuing(codes: PyTree, updated: Array | bool = True) -> PyTree:
    return jax.tree.map(lambda x: activity.is_continuing(x, updated), codes)


def _decoded(codes: PyTree) -> PyTree:
    return jax.tree.map(activity.is_active, codes)


def _unpack_like(params: PyTree, packed: PyTree) -> PyTree:
    """Packed masks taken apart, in the shardings of the parameters."""
    masks = masking.unpack_masks(packed)
    if not jax.tree.leaves(masks):
        return masks
    return masking.map_masked(
        lambda m, _, p: masking.placed_like(m, p), masks, masks, params
    )


def _is_packed(state: SparseState) -> bool:
    leaves = jax.tree.leaves(state.activity, is_leaf=masking.is_packed)
    return any(map(masking.is_packed, leaves))


def _is_sparse(x: Any) -> bool:
    return isinstance(x, SparseState)
