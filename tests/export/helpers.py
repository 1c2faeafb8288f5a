"""An example of sparse parameters."""

from typing import Any

import jax
import numpy as np
import optax

import granet_jax
from tests.helpers.trees import parameters

DENSE = optax.MaskedNode()


def random_mask(shape: tuple[int, ...], density: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < density


def example() -> tuple[Any, Any]:
    """Parameters in nested dicts, one of whose active weights is zero, and masks."""
    masks = {
        "conv": {"kernel": random_mask((3, 3, 2, 4), 0.3, 1)},
        "dense": {"bias": DENSE, "kernel": random_mask((6, 8), 0.1, 2)},
    }
    params = jax.device_get(granet_jax.apply_masks(parameters(), masks))
    params["dense"]["kernel"] = params["dense"]["kernel"].copy()
    first = tuple(np.argwhere(masks["dense"]["kernel"])[0])
    params["dense"]["kernel"][first] = 0.0
    return params, masks
