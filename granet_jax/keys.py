"""Integers that order as scores do."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def sort_keys(
    scores: Sequence[Array],
    among: Sequence[Array] | None = None,
    *,
    width: int = 2,
) -> list[Array]:
    """Signed integers that order as the scores do; the lowest two are reserved.

    The lowest is for entries that are no candidates, the next for NaN. The keys have
    the width in bytes of the scores, or `width` where that is more. See
    `granet_jax.selection.top_k` for the arguments and the errors.
    """
    scores = [jnp.asarray(x) for x in scores]
    common = _common_dtype([x.dtype for x in scores], width)
    if jnp.issubdtype(common, jnp.floating):
        keys = [_float_key(x.astype(common)) for x in scores]
    else:
        ends = jnp.iinfo(common)
        keys = [jnp.clip(x.astype(common), ends.min + 2, ends.max - 1) for x in scores]
    if among is None:
        return keys
    lowest = jnp.asarray(jnp.iinfo(keys[0].dtype).min, keys[0].dtype)
    return [
        jnp.where(candidate, key, lowest)
        for key, candidate in zip(keys, among, strict=True)
    ]


def key_dtype(dtypes: Sequence[Any], *, width: int = 2) -> jnp.dtype:
    """The dtype of the keys of scores of these dtypes, see `sort_keys`."""
    return jnp.dtype(f"int{8 * _common_dtype(dtypes, width).itemsize}")


def _common_dtype(dtypes: Sequence[Any], width: int) -> jnp.dtype:
    """What scores are compared in."""
    distinct = {jnp.dtype(x) for x in dtypes}
    if all(jnp.issubdtype(x, jnp.floating) for x in distinct):
        common = jnp.result_type(*distinct)
        if width <= common.itemsize:
            return common
        return jnp.promote_types(common, f"float{8 * width}")
    (first, *others) = distinct
    if not others and jnp.issubdtype(first, jnp.signedinteger):
        return jnp.promote_types(first, f"int{8 * width}")
    raise TypeError(
        "scores must all be floating, or all of one signed integer dtype; got "
        f"{sorted(map(str, distinct))}."
    )


@jax.jit
def _float_key(x: Array) -> Array:
    dtype = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    lowest = jnp.asarray(jnp.iinfo(dtype).min, dtype)
    bits = lax.bitcast_convert_type(x, dtype)
    # Sign and magnitude to two's complement; both zeros become 0.
    key = jnp.where(bits < 0, lowest - bits, bits)
    return jnp.where(jnp.isnan(x), lowest + jnp.ones((), dtype), key)
