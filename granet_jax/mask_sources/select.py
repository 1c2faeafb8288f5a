"""Turns scores into masks with an exact number of active weights.

A tree of scores has the structure of the parameters, with an array at every maskable
leaf and `optax.MaskedNode()` at every other leaf, as a tree of masks has.
"""

import contextlib
import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from granet_jax import distributions, masking, structured_selection, structures
from granet_jax.checks import check_function, check_key, check_sparsity
from granet_jax.distributions import Shape
from granet_jax.layers import (
    Axes,
    Stacked,
    fold_in_each,
    layer_names,
    layer_shapes,
    over_layers,
)
from granet_jax.mask_sources.layer_collapse import (
    OnCollapse,
    check_action,
    is_traced,
    report,
)
from granet_jax.masking import PyTree, Where
from granet_jax.scores import Score, ScoreInputs
from granet_jax.selection import Scope, check_scope, counter_dtype
from granet_jax.structures import Structure


def select(
    scores: PyTree,
    sparsity: float,
    *,
    scope: Scope = "global",
    structure: Structure | None = None,
    stacked: Stacked = None,
) -> PyTree:
    """Return masks of the weights with the largest scores, exactly as sparse as asked.

    Equal scores are ordered by layer, then by row-major index, and the first are kept.
    To keep the smallest scores instead, as the control experiment of Frankle et al.
    (2021) does, call `select(jax.tree.map(jnp.negative, scores), sparsity)`.

    Args:
      scores: Pytree of arrays, with `optax.MaskedNode()` at leaves without a mask.
        float64 scores are compared in float64 even where JAX has not enabled it.
      sparsity: Share of pruned weights, in [0, 1).
      scope: "global" ranks the weights of all layers together. "layer" ranks them
        within each layer. All layers then get the same sparsity, rounded by largest
        remainder so that the total is exact.
      structure: Structure of the masks, from `granet_jax.structures` (which documents
        how the counts are rounded). None prunes single weights.
      stacked: Which axes of a leaf count layers, as in `granet_jax.transform`.

    Returns:
      Masks with the structure of `scores`.

    Raises:
      ValueError: `sparsity` is out of range, `scope` is unknown, there are no scores,
        the leaves do not fit the structure, or a score is NaN or infinite. Traced
        scores cannot be checked; among them NaN ranks below every number.
      TypeError: `sparsity` is not a number.

    References:
      Frankle et al., Pruning Neural Networks at Initialization: Why Are We Missing the
      Mark?, ICLR 2021.
    """
    check_sparsity("sparsity", sparsity)
    check_scope(scope)
    structures.check_use(
        structure, sparsity=sparsity, scope=scope, distribution="uniform"
    )
    masking.check_arrays("scores", scores)
    leaves, treedef = jax.tree.flatten(scores)
    if not leaves:
        raise ValueError(f"scores holds no array, got {scores!r}: nothing to rank.")
    stacks = masking.stacks_of(scores, stacked)
    structures.check_leaves(structure, named_shapes(scores), stacks)
    shapes = layer_shapes([tuple(x.shape) for x in leaves], stacks)
    with _enough_precision(leaves):
        check_finite("scores", scores)
        if scope == "global":
            parts = structures.parts(structure, shapes)
            keep = distributions.total_count(sum(parts), sparsity)
        else:
            keep = structures.counts(structure, shapes, sparsity, "uniform")
        number = count_array(keep, shapes, scope)
        masks = select_compiled(leaves, number, structure, scope, stacks)
    return treedef.unflatten(masks)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def select_compiled(
    scores: list[Array],
    number: Array,
    structure: Structure | None,
    scope: Scope,
    stacks: tuple[Axes, ...],
) -> list[Array]:
    """`structured_selection.select`, compiled once for calls with the same shapes."""
    return structured_selection.select(
        structure, scores, number, scope=scope, stacks=stacks
    )


def from_score(
    score: Score,
    params: PyTree,
    sparsity: float,
    *,
    scope: Scope = "global",
    structure: Structure | None = None,
    where: Where = None,
    stacked: Stacked = None,
    key: Array | None = None,
    on_collapse: OnCollapse = "warn",
) -> PyTree:
    """Return masks chosen by a score that needs only the weights.

    One such score is `granet_jax.scores.lookahead(...)`.

    Args:
      score: Function of `ScoreInputs`, as in a `Method`. It sees no gradient and no
        moving average, and all weights are active.
      params: Pytree of arrays.
      sparsity: Share of pruned weights, in [0, 1).
      scope: "global" or "layer", see `select`.
      structure: Structure of the masks, see `select`.
      where: Which leaves carry a mask, as in `granet_jax.transform`.
      stacked: Which axes of a leaf count layers, as in `granet_jax.transform`.
      key: Random key for scores that draw random numbers, `jax.random.key(0)` by
        default. Each layer gets its own key, derived from its name.
      on_collapse: "warn", "error" or "ignore": the reaction to a layer that is left
        without active weights.

    Returns:
      Masks with the structure of `params`.

    Raises:
      ValueError, TypeError: As `select` and `masking.maskable`. ValueError also for a
        collapsed layer if `on_collapse="error"`.
    """
    check_sparsity("sparsity", sparsity)
    check_scope(scope)
    check_action(on_collapse)
    check_function("score", score, "a function of ScoreInputs, as granet_jax.scores")
    key = jax.random.key(0) if key is None else key
    check_key(key)
    masks = full_masks(params, where, stacked)
    weights = masking.maskable_leaves(params, masks)
    scores = evaluate(score, masks, weights, key, stacked)
    masks = select(scores, sparsity, scope=scope, structure=structure, stacked=stacked)
    return report(masks, on_collapse, stacked=stacked)


def evaluate(
    score: Score,
    masks: PyTree,
    weights: Sequence[Array],
    key: Array,
    stacked: Stacked = None,
) -> PyTree:
    """Evaluate a score on every leaf of `masks`, whose weights are listed in order."""
    named, treedef = jax.tree_util.tree_flatten_with_path(masks)
    names = [masking.leaf_name(path) for path, _ in named]
    stacks = masking.stacks_of(masks, stacked)
    leaves = list(zip(names, [m for _, m in named], weights, stacks, strict=True))
    by_name = {name: weight for name, _, weight, axes in leaves if not axes}

    def of_leaf(name: str, mask: Array, weight: Array, axes: Axes) -> Array:
        def of_layer(key: Array, values: tuple[Array, Array]) -> Array:
            param, mask = values
            return score(ScoreInputs(param, None, mask, None, key, name, by_name))

        # A layer's random numbers depend on its name, not on the other layers.
        hashes = [zlib.crc32(x.encode()) for x in layer_names(name, mask.shape, axes)]
        shape = [mask.shape[axis] for axis in axes]
        keys = fold_in_each(key, np.asarray(hashes, np.uint32).reshape(shape))
        return over_layers(of_layer, axes)(keys, (weight, mask))

    return treedef.unflatten(of_leaf(*leaf) for leaf in leaves)


def full_masks(params: PyTree, where: Where, stacked: Stacked = None) -> PyTree:
    """Return masks with every weight active, sharded like the parameters."""
    return jax.tree.map(
        lambda p, is_maskable: (
            masking.placed_like(jnp.ones(p.shape, bool), p)
            if is_maskable
            else optax.MaskedNode()
        ),
        params,
        masking.maskable(params, where, stacked),
    )


def masked_weights(params: PyTree, masks: PyTree) -> PyTree:
    """Return a tree like `masks` of the weights of `params`, zero where pruned."""
    return jax.tree.map(
        lambda m, p: m if masking.is_masked_node(m) else jnp.where(m, p, 0),
        masks,
        params,
        is_leaf=masking.is_masked_node,
    )


def with_weights(params: PyTree, weights: PyTree) -> PyTree:
    """Return `params` with its maskable leaves replaced by those of `weights`."""
    return masking.map_masked(lambda new, _: new, weights, params)


def named_shapes(tree: PyTree) -> list[tuple[str, Shape]]:
    """Return the name and shape of every leaf."""
    named = jax.tree_util.tree_leaves_with_path(tree)
    return [(masking.leaf_name(path), tuple(x.shape)) for path, x in named]


def count_array(counts: Any, shapes: Sequence[Shape], scope: Scope) -> np.ndarray:
    """Return counts of weights as unsigned integers that are wide enough for them."""
    return np.asarray(counts, counter_dtype([math.prod(s) for s in shapes], scope))


def check_finite(argument: str, tree: PyTree) -> None:
    """Raise ValueError for NaN or infinite values, unless they are traced."""
    if is_traced(tree):
        return
    named = jax.tree_util.tree_leaves_with_path(tree)
    finite = jax.device_get([jnp.all(jnp.isfinite(x)) for _, x in named])
    bad = [
        repr(masking.leaf_name(path))
        for (path, _), ok in zip(named, finite, strict=True)
        if not ok
    ]
    if bad:
        raise ValueError(
            f"{argument} must be finite, but has NaN or infinite values at "
            f"{', '.join(bad)}: the loss or the network overflows. Check the "
            "parameters and the data, or compute in a wider dtype."
        )


def _enough_precision(
    leaves: Sequence[Any],
) -> contextlib.AbstractContextManager[Any]:
    """Enable 64-bit types for float64 scores, which JAX would round to float32."""
    has_float64 = any(jnp.dtype(x.dtype) == jnp.float64 for x in leaves)
    return jax.enable_x64(True) if has_float64 else contextlib.nullcontext()
