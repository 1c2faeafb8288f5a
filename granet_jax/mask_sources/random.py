"""Random masks with exact counts (Liu et al., ICLR 2022), and shuffled masks."""

from typing import Any

import jax
from jax import Array

from granet_jax import masking, scores, structured_selection, structures
from granet_jax.checks import check_key, check_sparsity
from granet_jax.distributions import Distribution
from granet_jax.layers import Stacked, layer_shapes
from granet_jax.mask_sources.layer_collapse import OnCollapse, check_action, report
from granet_jax.mask_sources.select import (
    count_array,
    evaluate,
    full_masks,
    named_shapes,
)
from granet_jax.masking import PyTree, Where
from granet_jax.phases import active
from granet_jax.structures import Structure


def random(
    params: PyTree,
    sparsity: float,
    *,
    key: Array,
    distribution: Distribution = "erk",
    structure: Structure | None = None,
    where: Where = None,
    stacked: Stacked = None,
    on_collapse: OnCollapse = "warn",
) -> PyTree:
    """Return random masks with exactly the counts that the distribution gives.

    A layer's mask depends only on the key, the layer's name, its shape and its count.
    It does not depend on the other layers.

    Args:
      params: Pytree of arrays or `jax.ShapeDtypeStruct`; the values are not read.
      sparsity: Share of pruned weights, in [0, 1).
      key: Random key.
      distribution: "uniform", "er", "erk" or a function, see
        `distributions.densities`.
      structure: Structure of the masks, see `select`.
      where: Which leaves carry a mask, as in `granet_jax.transform`.
      stacked: Which axes of a leaf count layers, as in `granet_jax.transform`.
      on_collapse: Reaction to a leaf without active weights, see `from_score`.

    Returns:
      Masks with the structure and shardings of `params`.

    Raises:
      ValueError, TypeError: An argument is out of range or has the wrong type.

    References:
      Liu et al., The Unreasonable Effectiveness of Random Pruning, ICLR 2022.
    """
    check_sparsity("sparsity", sparsity)
    check_action(on_collapse)
    check_key(key)
    structures.check_use(
        structure, sparsity=sparsity, scope="layer", distribution=distribution
    )
    full = full_masks(params, where, stacked)
    stacks = masking.stacks_of(full, stacked)
    shapes = layer_shapes([tuple(m.shape) for m in jax.tree.leaves(full)], stacks)
    structures.check_leaves(structure, named_shapes(full), stacks)
    counts = structures.counts(structure, shapes, sparsity, distribution)
    numbers = count_array(counts, shapes, "layer")
    masks = _draw(full, numbers, key, stacked, structure)
    return report(masks, on_collapse, stacked=stacked)


def shuffle(masks: PyTree, key: Array, *, stacked: Stacked = None) -> PyTree:
    """Return random masks with as many active weights in every layer as `masks`.

    This is a control experiment. If a source's masks train no better than their
    shuffled form, the source has only found how many weights each layer needs, not
    which ones (Frankle et al. 2021).

    Args:
      masks: Pytree of masks.
      key: Random key.
      stacked: Which axes of a leaf count layers, as in `granet_jax.transform`.

    Returns:
      Masks with the structure and shardings of `masks`.

    Raises:
      TypeError: `key` is not a random key.

    References:
      Frankle et al., Pruning Neural Networks at Initialization: Why Are We Missing the
      Mark?, ICLR 2021.
    """
    check_key(key)
    masks = masking.given_masks(masks)
    numbers = active(jax.tree.leaves(masks), masking.stacks_of(masks, stacked))
    return _draw(masks, numbers, key, stacked)


def _draw(
    like: PyTree,
    counts: Any,
    key: Array,
    stacked: Stacked,
    structure: Structure | None = None,
) -> PyTree:
    """Draw masks like `like`, with `counts` active weights."""
    leaves, treedef = jax.tree.flatten(like)
    # The score reads the shapes of the weights only, so the masks stand in for them.
    random_scores = evaluate(scores.random, like, leaves, key, stacked)
    masks = structured_selection.select(
        structure,
        jax.tree.leaves(random_scores),
        counts,
        scope="layer",
        stacks=masking.stacks_of(like, stacked),
    )
    return treedef.unflatten(map(masking.placed_like, masks, leaves))
