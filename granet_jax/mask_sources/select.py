"""From scores to masks: exact selection, and the sources that need only parameters.

A tree of scores has the structure of the parameters, with an array at every maskable
leaf and `optax.MaskedNode()` at every dense leaf, as a tree of masks has.
"""

import contextlib
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from granet_jax import distributions, masking, scores, structures, updates
from granet_jax.checks import check_function, check_key, check_sparsity
from granet_jax.distributions import Distribution, Shape
from granet_jax.mask_sources.arguments import (
    check_finite,
)
from granet_jax.mask_sources.layer_collapse import OnCollapse, check_action, report
from granet_jax.masking import PyTree, Where
from granet_jax.scores import Score, ScoreInputs
from granet_jax.selection import Scope, check_scope, top_k
from granet_jax.structures import Structure


def select(
    scores: PyTree,
    sparsity: float,
    *,
    scope: Scope = "global",
    structure: Structure | None = None,
) -> PyTree:
    """Masks of the largest scores, with the number of active weights met exactly.

    Equal scores go by leaf order, then by row-major index, the first being kept. The
    control of Frankle et al. (2021) that keeps the smallest scores instead is
    `select(jax.tree.map(jnp.negative, scores), sparsity)`.

    Args:
      scores: pytree of arrays, `optax.MaskedNode()` at dense leaves; larger is kept.
        float64 scores are ranked in float64, whether or not JAX has it enabled.
      sparsity: share of pruned weights, in [0, 1).
      scope: "global": weights compete across leaves; "layer": within each, all leaves
        at the same sparsity, rounded by largest remainder to the exact total.
      structure: of the masks, one of `granet_jax.structures` (which says how its
        numbers are rounded); None for single weights.

    Returns:
      Masks, of the structure of `scores`.

    Raises:
      ValueError: sparsity out of range, unknown scope, no scores, a structure that they
        cannot have, or scores that are NaN or infinite (inside a traced function, where
        values cannot be looked at, NaN ranks below all).
      TypeError: sparsity that is no number.

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
    structures.check_leaves(structure, _named_shapes(scores))
    with _precision_of(leaves):
        check_finite("scores", scores)
        shapes = [x.shape for x in leaves]
        if structure is None:
            (keep,) = round_counts(shapes, sparsity, 1, scope)
        elif scope == "global":
            parts = structures.parts(structure, shapes)
            keep = distributions.total_count(sum(parts), sparsity)
        else:
            keep = structures.counts(structure, shapes, sparsity, "uniform")
            keep = _as_counts(keep, shapes)
        return treedef.unflatten(
            structures.select(structure, leaves, keep, scope=scope)
        )


def from_score(
    score: Score,
    params: PyTree,
    sparsity: float,
    *,
    scope: Scope = "global",
    structure: Structure | None = None,
    where: Where = None,
    key: Array | None = None,
    on_collapse: OnCollapse = "warn",
) -> PyTree:
    """Masks by a score that needs the weights only, such as `scores.lookahead(...)`.

    Args:
      score: a function of `ScoreInputs`, as the parts of a `Method` are; `grad` and
        `accumulator` are None, and all is active.
      params: pytree of arrays.
      sparsity: share of pruned weights, in [0, 1).
      scope: "global" or "layer", see `select`.
      structure: of the masks, see `select`.
      where: which leaves carry a mask, as in `granet_jax.transform`.
      key: for a score that draws random numbers; default `jax.random.key(0)`. Every
        leaf has its own, which follows from its name.
      on_collapse: what to do about a leaf left without active weights: "warn", "error"
        or "ignore".

    Returns:
      Masks, of the structure of `params`.

    Raises:
      ValueError, TypeError: as `select` and `masking.maskable`; or collapse, if that
        is to be an error.
    """
    check_sparsity("sparsity", sparsity)
    check_scope(scope)
    check_action(on_collapse)
    check_function("score", score, "a function of ScoreInputs, as granet_jax.scores")
    key = jax.random.key(0) if key is None else key
    check_key(key)
    present = full_masks(params, where)
    named = jax.tree_util.tree_leaves_with_path(present)
    names = [masking.leaf_name(path) for path, _ in named]
    weights = masking.maskable_leaves(params, present)
    by_name = dict(zip(names, weights, strict=True))
    found = [
        score(
            ScoreInputs(
                param=by_name[name],
                grad=None,
                mask=mask,
                accumulator=None,
                key=_leaf_key(key, name),
                name=name,
                weights=by_name,
            )
        )
        for name, (_, mask) in zip(names, named, strict=True)
    ]
    tree = jax.tree.unflatten(jax.tree.structure(present), found)
    masks = select(tree, sparsity, scope=scope, structure=structure)
    return report(masks, on_collapse)


def magnitude(
    params: PyTree,
    sparsity: float,
    *,
    scope: Scope = "global",
    structure: Structure | None = None,
    where: Where = None,
    on_collapse: OnCollapse = "warn",
) -> PyTree:
    """Masks of the largest abs(w): magnitude pruning, at any time.

    At initialisation, with global scope, the layers of largest fan-in are emptied
    first, since their weights are drawn smallest; then the network is cut through at
    moderate sparsity already (ResNet-18 for CIFAR at about 92%).

    Args:
      params: pytree of arrays.
      sparsity: share of pruned weights, in [0, 1).
      scope: "global" or "layer", see `select`.
      structure: of the masks, see `select`.
      where: which leaves carry a mask, as in `granet_jax.transform`.
      on_collapse: see `from_score`.

    Returns:
      Masks, of the structure of `params`.

    Raises:
      ValueError, TypeError: see `from_score`.

    References:
      Han et al., Learning Both Weights and Connections, NeurIPS 2015.
    """
    return from_score(
        scores.magnitude,
        params,
        sparsity,
        scope=scope,
        structure=structure,
        where=where,
        on_collapse=on_collapse,
    )


def random(
    params: PyTree,
    sparsity: float,
    *,
    key: Array,
    distribution: Distribution = "erk",
    structure: Structure | None = None,
    where: Where = None,
    on_collapse: OnCollapse = "warn",
) -> PyTree:
    """Random masks, with exactly the number of weights the distribution gives a leaf.

    A leaf's mask follows from the key, the leaf's name, its shape and its count alone,
    not from what other leaves there are.

    Args:
      params: pytree of arrays or `jax.ShapeDtypeStruct`; values are not read.
      sparsity: share of pruned weights, in [0, 1).
      key: random key.
      distribution: "uniform", "er", "erk" or a function, see
        `distributions.densities`.
      structure: of the masks, see `select`.
      where: which leaves carry a mask, as in `granet_jax.transform`.
      on_collapse: see `from_score`.

    Returns:
      Masks, of the structure of `params`, placed like the parameters.

    Raises:
      ValueError, TypeError: an argument out of range or of the wrong type.

    References:
      Liu et al., The Unreasonable Effectiveness of Random Pruning, ICLR 2022.
    """
    check_sparsity("sparsity", sparsity)
    check_action(on_collapse)
    check_key(key)
    structures.check_use(
        structure, sparsity=sparsity, scope="layer", distribution=distribution
    )
    present = full_masks(params, where)
    shapes = [tuple(m.shape) for m in jax.tree.leaves(present)]
    structures.check_leaves(structure, _named_shapes(present))
    counts = structures.counts(structure, shapes, sparsity, distribution)
    drawn = _draw(present, _as_counts(counts, shapes), key, structure)
    return report(drawn, on_collapse)


def shuffle(masks: PyTree, key: Array) -> PyTree:
    """Random masks with as many active weights in every leaf as `masks` have.

    A control: a source whose masks train no better than their shuffled form has found
    how many weights each layer should have, and not which (Frankle et al. 2021).

    Args:
      masks: pytree of masks.
      key: random key.

    Returns:
      Masks, of the structure of `masks`, placed like them.

    Raises:
      TypeError: `key` is no random key.

    References:
      Frankle et al., Pruning Neural Networks at Initialization: Why Are We Missing the
      Mark?, ICLR 2021.
    """
    check_key(key)
    masks = masking.given_masks(masks)
    return _draw(masks, jnp.stack(masking.active_counts(masks)), key)


def _draw(
    like: PyTree, counts: Any, key: Array, structure: Structure | None = None
) -> PyTree:
    """Masks shaped and placed as `like`, with `counts` weights each, by leaf name."""

    def draw(path: tuple[Any, ...], mask: Array) -> Array:
        inputs = ScoreInputs(
            param=mask,  # Only its shape is read.
            grad=None,
            mask=mask,
            accumulator=None,
            key=_leaf_key(key, masking.leaf_name(path)),
        )
        return scores.random(inputs)

    drawn = jax.tree_util.tree_map_with_path(draw, like)
    leaves, treedef = jax.tree.flatten(drawn)
    chosen = treedef.unflatten(
        structures.select(structure, leaves, counts, scope="layer")
    )
    return jax.tree.map(masking.placed_like, chosen, like)


def _named_shapes(tree: PyTree) -> list[tuple[str, Shape]]:
    named = jax.tree_util.tree_leaves_with_path(tree)
    return [(masking.leaf_name(path), tuple(x.shape)) for path, x in named]


def _leaf_key(key: Array, name: str) -> Array:
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def full_masks(params: PyTree, where: Where) -> PyTree:
    """Masks that prune nothing, placed like the parameters."""
    return jax.tree.map(
        lambda p, chosen: (
            masking.placed_like(jnp.ones(p.shape, bool), p)
            if chosen
            else optax.MaskedNode()
        ),
        params,
        masking.maskable(params, where),
    )


def take(params: PyTree, masks: PyTree) -> PyTree:
    """The maskable leaves of `params`, zero where pruned; `MaskedNode` elsewhere."""
    return jax.tree.map(
        lambda m, p: m if masking.is_masked_node(m) else jnp.where(m, p, 0),
        masks,
        params,
        is_leaf=masking.is_masked_node,
    )


def put(params: PyTree, chosen: PyTree) -> PyTree:
    """`params` with its maskable leaves replaced by those of `chosen`."""
    return masking.map_masked(lambda new, _: new, chosen, params)


def round_counts(
    shapes: Sequence[Shape], sparsity: float, rounds: int, scope: Scope
) -> np.ndarray:
    """Active weights after every round of an exponential schedule of density.

    Density d^(k/n) after round k of n, the last exactly d = 1 - `sparsity`. No leaf
    has more than the round before left it.

    Args:
      shapes: shapes of the maskable leaves.
      sparsity: after the last round, in [0, 1).
      rounds: number of rounds, positive.
      scope: "global" or "layer".

    Returns:
      Unsigned integers, (rounds,) with global scope, (rounds, leaves) with layer scope.
    """
    size = sum(math.prod(s) for s in shapes)
    rows: list[Any] = []
    for k in range(1, rounds + 1):
        share = sparsity if k == rounds else 1.0 - (1.0 - sparsity) ** (k / rounds)
        if scope == "global":
            rows.append(distributions.total_count(size, share))
        else:
            caps = rows[-1] if rows else None
            rows.append(distributions.counts(shapes, share, "uniform", caps))
    return _as_counts(rows, shapes)


def _as_counts(counts: Any, shapes: Sequence[Shape]) -> np.ndarray:
    size = sum(math.prod(s) for s in shapes)
    return np.asarray(counts, np.uint32 if size < 2**32 else np.uint64)


def select_in_rounds(
    score: Callable[[PyTree], PyTree],
    masks: PyTree,
    keeps: np.ndarray,
    *,
    scope: Scope,
    revive: bool,
    traced: bool,
) -> PyTree:
    """Scores and selects again and again: the loop of the iterative sources.

    Args:
      score: from the present masks to scores.
      masks: to start from.
      keeps: from `round_counts`.
      scope: "global" or "layer".
      revive: whether every round selects among all weights, or else among those that
        are left.
      traced: whether this is part of a traced function: the rounds are one compiled
        loop then. Otherwise they are a loop on the host, which checks the scores of
        every round (and on CPU, XLA runs convolutions inside loops many times slower).

    Returns:
      The masks after the last round.
    """

    def one(masks: PyTree, keep: Any) -> PyTree:
        found = score(masks)
        check_finite("scores", found)
        if not revive:
            return updates.prune(masks, found, keep, scope=scope)
        leaves, treedef = jax.tree.flatten(found)
        return treedef.unflatten(top_k(leaves, keep, scope=scope))

    if traced and len(keeps) > 1:
        table = jnp.asarray(keeps)
        return lax.fori_loop(0, len(keeps), lambda i, m: one(m, table[i]), masks)
    for keep in keeps:
        masks = one(masks, keep)
    return masks


def _precision_of(leaves: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """Where float64 scores are compared as they are: elsewhere JAX rounds them."""
    wide = any(jnp.dtype(x.dtype) == jnp.float64 for x in leaves)
    return jax.enable_x64(True) if wide else contextlib.nullcontext()
