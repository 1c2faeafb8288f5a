"""OWL: layers with more outliers keep more weights."""

import math
from collections import defaultdict
from collections.abc import Callable

import jax
import jax.numpy as jnp

from granet_jax.checks import check_function, check_number, check_sparsity
from granet_jax.mask_sources.by_inputs import (
    Statistics,
    as_float,
    leaves_with_statistics,
)
from granet_jax.mask_sources.wanda import wanda_score
from granet_jax.masking import PyTree


def owl(
    params: PyTree,
    statistics: Statistics,
    sparsity: float,
    *,
    block: Callable[[str], str],
    outlier: float = 5.0,
    limit: float = 0.08,
) -> dict[str, float]:
    """Return the sparsity of every leaf by OWL, for `wanda`, `ria` or `sparsegpt`.

    The outliers of a block are the weights whose score of Wanda exceeds `outlier` times
    the block's mean. The density of a block grows linearly with its share of outliers.
    The highest and the lowest density differ by 2 * `limit`, and the mean over all
    weights is 1 - sparsity::

        sparsities = mask_sources.owl(
            params, statistics, 0.7, block=lambda name: name.split("/")[0]
        )
        masks = mask_sources.wanda(params, statistics, sparsities)

    Args:
      params: Pytree of arrays, the pretrained parameters.
      statistics: Result of `input_statistics` for these parameters.
      sparsity: Share of pruned weights of all leaves together, in [0, 1).
      block: Function from the name of a leaf to the name of its block. All leaves of a
        block get the same sparsity. In the paper, blocks are the transformer's.
      outlier: How many times the mean an outlier's score is, above 0 (M in the paper).
      limit: Half the range of the densities, in [0, 1] (lambda in the paper).

    Returns:
      The sparsity of each leaf in `statistics`, by its name.

    Raises:
      ValueError: An argument is out of range, or a block would lose or keep all its
        weights.
      TypeError: An argument has another type.

    References:
      Yin et al., Outlier Weighed Layerwise Sparsity (OWL), ICML 2024, section 3.
    """
    check_sparsity("sparsity", sparsity)
    check_function("block", block, "a function from the name of a leaf to its block")
    check_number("outlier", outlier, above=0.0)
    check_number("limit", limit, least=0.0, most=1.0)
    members: dict[str, list[str]] = defaultdict(list)
    leaves = leaves_with_statistics(params, statistics)
    for name in leaves:
        members[block(name)].append(name)
    shares = {}
    for key, names in members.items():
        scores = [wanda_score(as_float(leaves[x]), statistics[x]) for x in names]
        mean = sum(jnp.sum(x) for x in scores) / sum(x.size for x in scores)
        counts = jax.device_get([jnp.sum(x > outlier * mean) for x in scores])
        shares[key] = sum(map(int, counts)) / sum(x.size for x in scores)
    low, high = min(shares.values()), max(shares.values())
    scale = 2 * limit / (high - low) if high > low else 0.0
    sizes = {name: leaf.size for name, leaf in leaves.items()}
    weighted = [shares[block(name)] * size for name, size in sizes.items()]
    mean = math.fsum(weighted) / sum(sizes.values())
    result = {}
    for key, names in members.items():
        pruned = sparsity - scale * (shares[key] - mean)
        if not 0.0 <= pruned < 1.0:
            raise ValueError(
                f"limit {limit} gives block {key!r} the sparsity {pruned:.3f}, at "
                f"{sparsity} for all blocks together: choose a smaller limit."
            )
        result |= dict.fromkeys(names, pruned)
    return {name: result[name] for name in leaves}
