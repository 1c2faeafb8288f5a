"""The dtype in which values of several dtypes can be compared or added."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def wider(*dtypes: Any) -> jnp.dtype:
    """`jnp.promote_types`, also where `jax_numpy_dtype_promotion` is "strict"."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, map(jnp.dtype, dtypes))
