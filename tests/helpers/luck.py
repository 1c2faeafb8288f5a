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
