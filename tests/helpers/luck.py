"""The library's random scores, computed here so that the reference can take them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def random_scores(
    shapes: Sequence[tuple[int, ...]], seed: int, count: jax.Array | int
) -> list[jax.Array]:
    """Returns 31 random bits for every weight of the masks of `shapes`, at one step."""
    step = jax.random.fold_in(jax.random.key(seed), count)
    keys = [jax.random.fold_in(step, i) for i in range(len(shapes))]
    bits = [
        jax.random.bits(k, s, jnp.uint32) for k, s in zip(keys, shapes, strict=True)
    ]
    return [(b >> 1).astype(jnp.int32) for b in bits]


def odd_factors(leaves: int, seed: int, count: int) -> dict[str, jax.Array]:
    """Returns the odd numbers that put equal scores in a random order, at one step."""
    step = jax.random.fold_in(jax.random.key(seed), count)
    update = jax.random.fold_in(step, leaves)
    selections = {"drop": (0, leaves), "grow": (1, leaves), "revive": (2, leaves)}
    selections["revive across"] = (2, 1)
    return {
        name: jax.random.bits(jax.random.fold_in(update, i), (rows, 3), jnp.uint32) | 1
        for name, (i, rows) in selections.items()
    }
