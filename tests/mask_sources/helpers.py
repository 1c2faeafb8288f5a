"""Parameters, and the oracle for selection: a stable sort by NumPy."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np


def draw(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Any]:
    """Normal weights in float32."""
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def largest(leaves: Sequence[np.ndarray], k: int) -> list[np.ndarray]:
    """Masks of the k largest scores over all leaves; of equal ones the first."""
    flat = np.concatenate([np.ravel(x) for x in leaves])
    chosen = np.zeros(flat.size, bool)
    chosen[np.argsort(-flat, kind="stable")[:k]] = True
    parts = np.split(chosen, np.cumsum([x.size for x in leaves])[:-1])
    return [part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)]


def largest_by_leaf(
    leaves: Sequence[np.ndarray], counts: Sequence[int]
) -> list[np.ndarray]:
    """Masks of the largest scores within each leaf."""
    return [largest([x], k)[0] for x, k in zip(leaves, counts, strict=True)]
