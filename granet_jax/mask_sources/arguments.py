"""Checks of arguments that the mask sources share."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from granet_jax import masking
from granet_jax.checks import check_integer
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
    check_integer("rounds", rounds, least=least)


def check_inputs(inputs: Any) -> None:
    """Raises TypeError or ValueError unless `inputs` holds arrays, or shapes."""
    masking.check_arrays("inputs", inputs)
    if not jax.tree.leaves(inputs):
        raise ValueError(f"inputs has no arrays, got {inputs!r}: pass one example.")
