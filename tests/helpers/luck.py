"""The library's random scores, which the oracle takes as an input."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from granet_jax import choices, scores


def random_scores(
    shapes: Sequence[tuple[int, ...]], seed: int, count: jax.Array | int
) -> list[jax.Array]:
    """Those of a step, for the leaves of `shapes` that carry a mask."""
    key = choices.step_key(seed, count)
    return [
        scores.random(
            scores.ScoreInputs(
                param=jnp.zeros(shape),
                grad=None,
                mask=jnp.ones(shape, bool),
                accumulator=None,
                key=jax.random.fold_in(key, i),
            )
        )
        for i, shape in enumerate(shapes)
    ]
