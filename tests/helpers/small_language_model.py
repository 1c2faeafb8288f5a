"""Layers like those of the pretrained language model, but small and random."""

from typing import Any

import numpy as np

_SHAPES = {
    "query": (32, 128),
    "key": (32, 64),
    "value": (32, 64),
    "output": (128, 32),
    "gate": (32, 48),
    "up": (32, 48),
    "down": (48, 32),
}


def network(
    rng: np.random.Generator, layers: int, scale: float = 1.0
) -> dict[str, Any]:
    """Parameters of layers of width 32, with 2 heads, and 40 tokens."""
    ones = {"scale": np.ones(32, np.float32)}
    params = {
        "embedding": {"embedding": rng.normal(size=(40, 32)).astype(np.float32)},
        "norm": ones,
    }
    for i in range(layers):
        kernels = {
            name: {"kernel": scale * rng.normal(size=shape).astype(np.float32)}
            for name, shape in _SHAPES.items()
        }
        params[f"layer_{i:02}"] = {**kernels, "norm_1": ones, "norm_2": ones}
    return params
