"""The masks that a method starts from, and masks chosen among all weights."""

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer

from granet_jax import boxes, masking, structured_selection, structures, targets
from granet_jax.checks import check_seed
from granet_jax.distributions import Shape
from granet_jax.layers import (
    Axes,
    Stacked,
    layer_keys,
    layer_shapes,
    over_layers,
    stack_axes,
)
from granet_jax.masking import PyTree, Where, map_masked
from granet_jax.methods.method import Method, check_method
from granet_jax.phases import Masks, Prune, Weights, active, evaluate, step_key
from granet_jax.scores import ScoreInputs, random
from granet_jax.selection import counter_dtype
from granet_jax.structures import Structure


def init_masks(
    method: Method,
    params: PyTree,
    *,
    where: Where = None,
    seed: int | Array = 0,
    stacked: Stacked = None,
) -> PyTree:
    """The masks that `transform(method, where=where, seed=seed)` starts from.

    At sparsity 0 all weights are active. Otherwise the masks are random, with exactly
    the number of active weights that the method's distribution gives to every leaf. A
    method that chooses its masks among all weights (`Method.weights` other than
    "sparse") starts from that choice among the parameters.

    Args:
      method: A record of a method.
      params: Pytree of arrays or `jax.ShapeDtypeStruct`. Only shapes, dtypes and
        shardings are read, unless the masks are chosen among the parameters.
      where: Which leaves carry a mask, as in `transform`.
      seed: Seed of the random masks, as in `transform`.
      stacked: Which axes of a leaf count layers, as in `transform`.

    Returns:
      Pytree of the structure of `params`: boolean arrays, placed like the parameters,
      and `optax.MaskedNode()` at dense leaves.

    Raises:
      ValueError, TypeError: As `masking.maskable`; or the method's structure does not
        divide a shape; or only shapes are given where weights are needed.
    """
    check_method(method)
    check_seed(seed)
    selected = masking.maskable(params, where, stacked)
    named = [
        (masking.leaf_name(path), p)
        for (path, p), is_selected in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(selected),
            strict=True,
        )
        if is_selected
    ]
    names = tuple(name for name, _ in named)
    stacks = tuple(stack_axes(stacked, name, p) for name, p in named)
    masks = iter(_initial_masks(method, names, [p for _, p in named], seed, stacks))
    return jax.tree.map(
        lambda p, s: masking.placed_like(next(masks), p) if s else optax.MaskedNode(),
        params,
        selected,
    )


def _initial_masks(
    method: Method,
    names: tuple[str, ...],
    params: list[Any],
    seed: int | Array,
    stacks: tuple[Axes, ...],
) -> Masks:
    leaves = tuple(tuple(p.shape) for p in params)
    named = zip(names, leaves, strict=True)
    structures.check_leaves(method.structure, named, stacks)
    shapes = layer_shapes(leaves, stacks)
    targets.check_least(method, shapes)
    counts = targets.initial_counts(method, shapes)
    if counts == structures.parts(method.structure, shapes):
        return [jnp.ones(shape, bool) for shape in leaves]
    key = step_key(seed, 0)
    if method.weights == "sparse":
        counter = counter_dtype([math.prod(s) for s in shapes], "layer")
        counts = jnp.asarray(counts, counter)
        return _draw(leaves, counts, key, method.structure, stacks)
    if any(isinstance(p, jax.ShapeDtypeStruct) for p in params):
        raise TypeError(
            f"params must be arrays: {method.name} chooses its masks among them. For "
            "shapes only, use jax.eval_shape(tx.init, params)."
        )
    weights = [jnp.asarray(p) for p in params]
    number = targets.counts_at(method, shapes, method.sparsity(0))
    masks = [jnp.ones_like(p, bool) for p in weights]
    return choose_among_all(
        method, names, masks, Weights(lambda: weights), jnp.asarray(number), key, stacks
    )


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _draw(
    shapes: tuple[Shape, ...],
    counts: Array,
    key: Array,
    structure: Structure | None,
    stacks: tuple[Axes, ...],
) -> Masks:
    def score(key: Array, like: Array) -> Array:
        # The random score reads the shape and the key only.
        return random(ScoreInputs(like, grad=None, mask=like, average=None, key=key))

    zeros = [jnp.zeros(shape, bool) for shape in shapes]
    keys = layer_keys(key, shapes, stacks)
    leaves = zip(zeros, keys, stacks, strict=True)
    ranked = [over_layers(score, axes)(k, x) for x, k, axes in leaves]
    return structured_selection.select(
        structure, ranked, counts, scope="layer", stacks=stacks
    )


def given_masks(
    method: Method, masks: PyTree, params: PyTree, stacked: Stacked
) -> PyTree:
    """The masks that a user passes to `transform`, checked and placed like `params`."""
    traced = any(isinstance(m, Tracer) for m in jax.tree.leaves(masks))
    # Masks that are known can be counted even if `params` are traced.
    with contextlib.nullcontext() if traced else jax.ensure_compile_time_eval():
        checked = masking.check_masks(masks, params)
        paths = jax.tree_util.tree_leaves_with_path(checked)
        named = [(masking.leaf_name(path), m) for path, m in paths]
        stacks = tuple(stack_axes(stacked, name, m) for name, m in named)
        leaves = [(name, m.shape) for name, m in named]
        structures.check_leaves(method.structure, leaves, stacks)
        boxes.check_masks(method.structure, named, stacks)
        targets.check_least(method, layer_shapes([m.shape for _, m in named], stacks))
        if not traced:
            shapes = layer_shapes([m.shape for _, m in named], stacks)
            numbers = jax.device_get(active([m for _, m in named], stacks))
            _check_numbers(method, shapes, numbers.tolist())
    return map_masked(
        lambda m, _, p: masking.placed_like(m, p), checked, checked, params
    )


def _check_numbers(
    method: Method, shapes: tuple[Shape, ...], numbers: Sequence[int]
) -> None:
    """Raise ValueError if the method cannot end at its sparsity from given masks.

    Args:
      method: The method.
      shapes: The shapes of all layers.
      numbers: The number of active weights of every layer.
    """
    steps = method.updates.steps()
    if not steps or method.weights != "sparse" or method.revives:
        return
    sizes = [math.prod(s) for s in shapes]
    parts = structures.parts(method.structure, shapes)
    # The number of weights that a part stands for.
    units = [n // k if k else 1 for n, k in zip(sizes, parts, strict=True)]
    present = [a // u for a, u in zip(numbers, units, strict=True)]
    final, number, size = method.sparsity(steps[-1]), sum(numbers), sum(sizes)
    if any(isinstance(phase, Prune) for phase in method.phases):
        wanted = targets.active_counts(method, shapes)[-1]
        if structures.has_equal_boxes(method.structure):
            fits = all(np.asarray(present) >= wanted)
        else:
            fits = sum(present) >= sum(wanted.ravel().tolist())
        problem = f"fewer than {method.name} ends with, and it does not add any"
    elif method.sparsity(0) == final:
        own = targets.initial_counts(method, shapes)
        fits = number == sum(k * u for k, u in zip(own, units, strict=True))
        if method.structure is not None:  # Every layer is rounded to whole parts.
            fits |= abs(number - (1.0 - final) * size) <= sum(units) / 2
        problem = f"and {method.name} keeps their number"
    else:
        return
    if not fits:
        raise ValueError(
            f"masks have {number} of {size} weights active, {problem}: they cannot end "
            f"at sparsity {final:g}. Pass denser or sparser masks, or ask for their "
            f"sparsity, granet_jax.sparsity(masks).overall ({1.0 - number / size:.6g})."
        )


def choose_among_all(
    method: Method,
    names: tuple[str, ...],
    masks: Masks,
    weights: Weights,
    number: Array,
    key: Array,
    stacks: tuple[Axes, ...],
    among: Masks | None = None,
) -> Masks:
    """The `number` weights of highest `rank` score, among all or among some.

    Args:
      method: The method, for its score, structure and scope.
      names: The names of the maskable leaves.
      masks: The masks that the score may read.
      weights: The weights to choose from, and what else the score may read.
      number: How many parts of the structure to choose: per layer, or of all layers.
      key: The random key of the step.
      stacks: The axes of every leaf that count layers.
      among: The candidates; None for all weights.
    """
    params = weights.stepped()
    ranked = evaluate(method.rank, names, masks, params, params, weights, key, stacks)
    return structured_selection.select(
        method.structure,
        ranked,
        number,
        among=among,
        scope=method.scope,
        stacks=stacks,
    )
