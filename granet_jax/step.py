"""What the steps of sparse and of dense weights have in common."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.core import Tracer

from granet_jax import masking, structures, targets
from granet_jax.boxes import merge_masks
from granet_jax.dtypes import wider
from granet_jax.initial_masks import choose_among_all
from granet_jax.layers import Stacked, layer_shapes
from granet_jax.masking import PyTree, Where, map_masked, maskable_leaves
from granet_jax.methods.method import Method
from granet_jax.moments import renew_moments, restart_moments
from granet_jax.penalties import penalised
from granet_jax.phases import Weights, active, step_key, within_reach
from granet_jax.schedules import Steps
from granet_jax.state import SparseState, is_packed_state, unpacked_like

_LAST_COUNT = 2**31 - 1


class Setup(NamedTuple):
    """The arguments of `transform`.

    Attributes:
      method: The method.
      optimizer: The inner optimizer; `optax.identity()` without one.
      has_inner: Whether there is an inner optimizer.
      where: Which leaves carry a mask.
      masks: The masks to start from, or None.
      seed: The seed of random masks and random growth.
      packed: Whether the state holds its masks at 1 bit a weight.
      warmup: The steps over which the updates of weights that entered grow.
      stacked: Which axes of a leaf count layers.
    """

    method: Method
    optimizer: optax.GradientTransformationExtraArgs
    has_inner: bool
    where: Where
    masks: PyTree | None
    seed: int | Array
    packed: bool
    warmup: int
    stacked: Stacked


class Step(NamedTuple):
    """What a step reads.

    Attributes:
      masks: The masks before the step, boolean arrays.
      params: The parameters before the step.
      updates: The gradients; without an inner optimizer, the updates to mask.
      dense: The dense gradient, or None.
      inner_state: The optimizer's state, its moments fresh after a reset.
      average: The moving average of the dense gradient, this step's included.
      marked: The marked weights, boolean arrays.
      done: int32 scalar, the number of steps before this one.
      count: int32 scalar, the number of this step, 1 for the first.
    """

    masks: PyTree
    params: PyTree
    updates: PyTree
    dense: PyTree | None
    inner_state: optax.OptState
    average: PyTree
    marked: PyTree
    done: Array
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]


def begin_step(
    setup: Setup, updates: PyTree, state: Any, params: PyTree | None, extra: Any
) -> Step:
    """Check the arguments of an update; advance the counter and the average.

    Raises:
      ValueError: `params` are missing, or a dense gradient that the method needs.
      TypeError: `state` is not a `SparseState`.
    """
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
    method = setup.method
    dense = updates if setup.has_inner else extra.get("grads")
    if dense is None and method.needs_gradient:
        raise ValueError(
            f"{method.name} needs the dense gradient, and as the last link of a chain "
            "it only sees updates. Either give it the optimizer, "
            "transform(method, inner=optimizer), or pass the gradient along, "
            "tx.update(grads, state, params, grads=grads)."
        )
    average = state.average
    if method.average_decay is not None:
        average = _averaged(method.average_decay, average, dense)
    return Step(
        masks=unpacked_like(params, state.masks),
        params=params,
        updates=updates,
        dense=dense,
        inner_state=_after_resets(setup, state, params),
        average=average,
        marked=unpacked_like(params, state.marked),
        done=state.count,
        count=jnp.asarray(optax.safe_increment(state.count)),
    )


def _after_resets(setup: Setup, state: SparseState, params: PyTree) -> optax.OptState:
    """The optimizer's state, with fresh moments if the last step reset them."""
    resets = setup.method.resets
    if not resets.steps():
        return state.inner_state
    # At the start of a step and not at the end of the one before, whose update still
    # reads the old moments: XLA would copy them.
    fresh = setup.optimizer.init(params)
    restart = resets.contains(state.count) & (state.count < _LAST_COUNT)
    return restart_moments(state.inner_state, fresh, params, restart)


def renewed(
    setup: Setup, inner_state: optax.OptState, params: PyTree, keep: PyTree
) -> optax.OptState:
    """The optimizer's state, with moments as `init` makes them outside `keep`.

    There the weights are zero, and so `init` sees zeros, which XLA knows as constants.
    """
    zeros = jax.tree.map(jnp.zeros_like, params)
    return renew_moments(inner_state, setup.optimizer.init(zeros), keep)


def _averaged(decay: float, average: PyTree, grads: PyTree) -> PyTree:
    leaves, treedef = jax.tree.flatten(average)
    return treedef.unflatten(
        decay * a + (1.0 - decay) * g.astype(a.dtype)
        for a, g in zip(leaves, maskable_leaves(grads, average), strict=True)
    )


def storage(
    state: SparseState, params: PyTree
) -> tuple[Callable[[PyTree], PyTree], Callable[[PyTree], PyTree]]:
    """Functions that read masks from a state and write them back, packed or not."""
    load = functools.partial(unpacked_like, params)
    return load, masking.pack_masks if is_packed_state(state) else lambda masks: masks


def gradient_of(setup: Setup, step: Step, masks: PyTree) -> PyTree:
    """The gradient for the optimizer: the dense one, with that of the penalty."""
    penalty = setup.method.penalty
    return penalised(penalty, step.updates, masks, step.marked, step.params, step.done)


def weights_of(step: Step, masks: PyTree, after: Callable[[], list[Array]]) -> Weights:
    """The maskable leaves that scores may read."""
    dense = step.dense
    return Weights(
        stepped=after,
        grads=None if dense is None else maskable_leaves(dense, masks),
        average=jax.tree.leaves(step.average) or None,
        marked=jax.tree.leaves(step.marked) or None,
    )


def mark_weights(
    setup: Setup, masks: PyTree, weights: list[Array], count: Array
) -> PyTree:
    """Choose the marked weights: among the active ones, or among all if dense."""
    method = setup.method
    leaves, treedef = jax.tree.flatten(masks)
    stacks = masking.stacks_of(masks, setup.stacked)
    shapes = layer_shapes([m.shape for m in leaves], stacks)
    assert method.marked_sparsity is not None
    number = targets.counts_at(method, shapes, method.marked_sparsity)
    among = None if method.weights == "dense" else leaves
    boxes = structures.has_equal_boxes(method.structure)
    if among is not None and number.ndim and not boxes:
        present = active(merge_masks(method.structure, leaves, stacks), stacks)
        number = within_reach(jnp.asarray(number), present)
    key = step_key(setup.seed, count)
    chosen = choose_among_all(
        method,
        names_of(masks),
        leaves,
        Weights(lambda: weights),
        jnp.asarray(number),
        key,
        stacks,
        among,
    )
    return treedef.unflatten(chosen)


def stepped(masks: PyTree, params: PyTree, updates: PyTree) -> list[Array]:
    """The maskable leaves after a step, in the dtypes of the parameters."""
    pairs = zip(
        maskable_leaves(params, masks), maskable_leaves(updates, masks), strict=True
    )
    return [_sum(p, u).astype(p.dtype) for p, u in pairs]


def _sum(x: Array, y: Array) -> Array:
    dtype = wider(x.dtype, y.dtype)
    return x.astype(dtype) + y.astype(dtype)


def zero_outside(masks: PyTree, tree: PyTree) -> PyTree:
    """`tree` with zeros outside the masks."""
    return map_masked(lambda m, x: jnp.where(m, x, jnp.zeros_like(x)), masks, tree)


def update_or_zero(keep: Array, update: Array, param: Array) -> Array:
    """The update where `keep`; elsewhere the one that makes the weight zero."""
    # In the wider of both dtypes: -p must be exact for p + (-p) to be zero, and the
    # update must reach active weights unrounded.
    dtype = wider(update.dtype, param.dtype)
    return jnp.where(keep, update.astype(dtype), -param.astype(dtype))


def continuing(masks: PyTree, entered: PyTree, updated: Array) -> PyTree:
    """The active weights, without those that entered if this step updated the masks."""
    return map_masked(lambda m, _, e: m & ~(e & updated), masks, masks, entered)


def warmed_up(setup: Setup, step: Step, entered: PyTree, updates: PyTree) -> PyTree:
    """The updates, smaller at weights that entered fewer than `warmup` steps ago."""
    steps = setup.method.updates
    last = jnp.asarray(steps.steps(), jnp.int32)[steps.update_index(step.count)]
    share = jnp.clip((step.count - last) / setup.warmup, 0.0, 1.0)
    return map_masked(
        lambda e, u: jnp.where(e, u * share.astype(u.dtype), u), entered, updates
    )


def names_of(masks: PyTree) -> tuple[str, ...]:
    """The names of the leaves that carry a mask."""
    paths = jax.tree_util.tree_leaves_with_path(masks)
    return tuple(masking.leaf_name(path) for path, _ in paths)


def is_due(steps: Steps, step: Step) -> Array:
    """Whether this is one of the given steps."""
    return steps.contains(step.count) & (step.count > step.done)


def run_if(
    steps: Steps, step: Step, change: Callable[[PyTree], PyTree], value: PyTree
) -> PyTree:
    """`change(value)` at the given steps, else `value`."""
    if not steps.steps():
        return value
    return run_once_if(is_due(steps, step), change, value)


def run_once_if(
    due: Array, change: Callable[[PyTree], PyTree], value: PyTree
) -> PyTree:
    """`change(value)` if `due`, else `value`: a loop of one trip or none.

    `lax.cond` would do, except that under `vmap` it runs both branches in every step,
    whereas a loop runs only when some lane wants it.

    XLA moves what does not depend on `value` out of the loop, and so computes it in
    every step. So `change` should take what it reads besides from `hold`.
    """
    if not isinstance(due, Tracer):
        return change(value) if due else value

    def body(carry: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        return jnp.zeros_like(due), change(carry[1])

    return lax.while_loop(lambda carry: carry[0], body, (due, value))[1]


def hold(value: PyTree, *inputs: Any) -> tuple[Any, ...]:
    """All arguments as they are, but such that XLA takes the others to need `value`."""
    return lax.optimization_barrier((value, *inputs))


def hold_step(value: PyTree, step: Step) -> tuple[PyTree, Step]:
    """`hold`, for those arrays of a step that an update of the masks reads.

    They have the shapes of masks. XLA would copy others, if they were held.
    """
    shapes = {m.shape for m in jax.tree.leaves(step.masks)}
    leaves, treedef = jax.tree.flatten(step._replace(masks=()))
    places = [i for i, x in enumerate(leaves) if jnp.shape(x) in shapes]
    value, held = hold(value, [leaves[i] for i in places])
    for i, x in zip(places, held, strict=True):
        leaves[i] = x
    return value, treedef.unflatten(leaves)
