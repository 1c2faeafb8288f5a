"""The loop of the iterative sources: score the pruned network, prune further, repeat.

Round k of n leaves the density d^(k/n), where d is the density after the last round
(Tanaka et al. 2020; De Jorge et al. 2021).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from granet_jax import distributions, structures
from granet_jax.distributions import Shape
from granet_jax.layers import Stacked, layer_shapes
from granet_jax.mask_sources.select import check_finite, count_array
from granet_jax.masking import PyTree, stacks_of
from granet_jax.selection import Scope, top_k


def select_in_rounds(
    score: Callable[[PyTree], PyTree],
    masks: PyTree,
    sparsity: float,
    rounds: int,
    *,
    scope: Scope,
    stacked: Stacked,
    revive: bool,
    traced: bool,
) -> PyTree:
    """Score and select repeatedly, with an exact number of active weights each round.

    Args:
      score: Function from the masks of the last round to scores.
      masks: Masks that the first round scores.
      sparsity: Sparsity after the last round.
      rounds: Number of rounds.
      scope: "global" or "layer".
      stacked: Which axes of a leaf count layers, as in `granet_jax.transform`.
      revive: Whether a round selects among all weights, so that pruned weights may
        return, or only among those that are active.
      traced: Whether this is part of a traced function. If so, the rounds are one
        compiled loop. If not, they are a loop on the host, where the scores of every
        round can be checked. (On CPU, XLA also runs convolutions much slower inside a
        compiled loop.)

    Returns:
      The masks after the last round.
    """
    first, treedef = jax.tree.flatten(masks)
    stacks = stacks_of(masks, stacked)
    shapes = layer_shapes([m.shape for m in first], stacks)
    counts = _counts_by_round(shapes, sparsity, rounds, scope)

    def one_round(masks: list[Array], keep: Any) -> list[Array]:
        scores = score(treedef.unflatten(masks))
        check_finite("scores", scores)
        among = None if revive else masks
        ranked = jax.tree.leaves(scores)
        return top_k(ranked, keep, among=among, scope=scope, stacks=stacks)

    masks = first
    if traced and rounds > 1:
        table = jnp.asarray(counts)
        masks = lax.fori_loop(0, rounds, lambda i, m: one_round(m, table[i]), masks)
    else:
        for keep in counts:
            masks = one_round(masks, keep)
    return treedef.unflatten(masks)


def _counts_by_round(
    shapes: Sequence[Shape], sparsity: float, rounds: int, scope: Scope
) -> np.ndarray:
    """Return (rounds,) active weights in all layers, or (rounds, layers) by layer."""
    size = sum(structures.parts(None, shapes))
    rows: list[Any] = []
    for k in range(1, rounds + 1):
        is_last = k == rounds
        reached = sparsity if is_last else 1.0 - (1.0 - sparsity) ** (k / rounds)
        if scope == "global":
            rows.append(distributions.total_count(size, reached))
        else:
            # Rounding must not give a layer more weights than the last round left it.
            caps = rows[-1] if rows else None
            rows.append(distributions.counts(shapes, reached, "uniform", caps))
    return count_array(rows, shapes, scope)
