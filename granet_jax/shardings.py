"""Arrays whose type includes their sharding: those on Explicit mesh axes."""

from typing import Any

import jax
from jax import Array


def is_explicit(sharding: Any) -> bool:
    """Whether an array's type includes its sharding: some mesh axis is Explicit."""
    types = getattr(sharding.mesh, "axis_types", ())
    return jax.sharding.AxisType.Explicit in types


def whole_along(x: Array, axis: int) -> Array:
    """`x`, with its sharding along an axis removed."""
    sharding = jax.typeof(x).sharding
    if not is_explicit(sharding) or sharding.spec[axis] is None:
        return x
    spec = jax.sharding.PartitionSpec(
        *(
            None if i == axis % x.ndim else names
            for i, names in enumerate(sharding.spec)
        )
    )
    return jax.sharding.reshard(x, sharding.update(spec=spec))
