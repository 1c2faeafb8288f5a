"""Checks of arguments that the mask sources share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from granet_jax import masking
from granet_jax.masking import PyTree


def is_traced(*trees: PyTree) -> bool:
    """Whether some leaf is a tracer, so that values cannot be looked at."""
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(trees))


def check_finite(what: str, tree: PyTree) -> None:
    """Raises ValueError for NaN or infinite values, where they can be looked at."""
    if is_traced(tree):
        return
    named = jax.tree_util.tree_leaves_with_path(tree)
    finite = jax.device_get([jnp.all(jnp.isfinite(x)) for _, x in named])
    bad = [
        repr(masking.leaf_name(path))
        for (path, _), ok in zip(named, finite, strict=True)
        if not ok
    ]
    if bad:
        raise ValueError(
            f"{what} must be finite, but has NaN or infinite values at "
            f"{', '.join(bad)}: the loss or the network overflows. Check the "
            "parameters and the data, or compute in a wider dtype."
        )


def check_rounds(rounds: Any, *, least: int = 1) -> None:
    """Raises TypeError or ValueError unless `rounds` is an integer, `least` or more."""
    if not isinstance(rounds, int | np.integer) or isinstance(rounds, bool):
        raise TypeError(f"rounds must be an integer, got {rounds!r}.")
    if rounds < least:
        raise ValueError(f"rounds must be at least {least}, got {rounds}.")


def check_key(key: Any) -> None:
    """Raises TypeError unless `key` is one random key."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (typed and shape == ()) and not (dtype == jnp.uint32 and shape == (2,)):
        raise TypeError(f"key must be one jax.random.key(seed), got {key!r}.")
