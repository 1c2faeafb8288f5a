"""Exact selection of the k largest scores, without sorting.

Floats order like their bit patterns, read as sign and magnitude, so the exact k-th
largest score is found by a search over integer keys (`granet_jax.keys`,
`granet_jax.search`). Nothing is sorted, concatenated, gathered or reshaped: under any
sharding a pass over memory is a local reduction and an exchange of a few small vectors
of integers (`granet_jax.counting`).
"""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from granet_jax.keys import key_dtype, sort_keys
from granet_jax.search import PhaseOfSearch, search
from granet_jax.stacks import stacked, stacks_of, unstacked

Scope = Literal["layer", "global"]

SCOPES: tuple[str, ...] = ("layer", "global")


@functools.partial(jax.jit, static_argnames="scope")
def top_k(
    scores: Sequence[Array],
    k: Array | int | Sequence[int] | np.ndarray,
    *,
    among: Sequence[Array] | None = None,
    scope: Scope = "layer",
) -> list[Array]:
    """Selects exactly the `k` largest scores.

    Ranking: larger scores first; equal scores by lowest row-major index first (in
    global scope: by leaf order, then index). -0.0 equals 0.0. NaN ranks below every
    number, -inf included.

    Args:
      scores: arrays of any shape, all floating (they are compared exactly, in the
        widest of their dtypes) or all of one signed integer dtype (where it has more
        than 8 bits, its two lowest and its highest value count as their neighbours).
      k: how many to select: with scope "layer" one integer per leaf (or one for all),
        with scope "global" a single integer. May be traced. Where fewer candidates
        than k exist, all of them are selected.
      among: boolean arrays of the shapes of `scores`; only True entries are
        candidates. Default: all are.
      scope: "layer" ranks within each leaf, "global" across all leaves together.

    Returns:
      Boolean arrays of the shapes of `scores`, True where selected.

    Raises:
      ValueError: unknown scope, or more than 2**32 - 1 scores to be counted without
        64-bit types enabled.
      TypeError: scores of mixed kinds.
    """
    check_scope(scope)
    if not scores:
        return []
    counter = counter_dtype([jnp.size(x) for x in scores], scope)
    wanted = jnp.broadcast_to(jnp.asarray(k).astype(counter), (len(scores),))
    only = PhaseOfSearch(
        maker=0,
        across=scope == "global",
        number=lambda _: wanted,
        finish=lambda _, chosen, *rest: chosen,
    )
    stacks = stacks_of([jax.typeof(x) for x in scores])
    ranked = stacked(stacks, scores)
    candidates = None if among is None else stacked(stacks, among)
    chosen = search(
        [jnp.zeros_like(x, bool) for x in ranked],
        [lambda _: sort_keys(ranked, candidates)],
        lambda *_: only,
        phases=(0, 1),
        stacks=stacks,
        key_type=key_dtype([x.dtype for x in scores]),
        counter=counter,
    )
    return unstacked(stacks, chosen)


def check_scope(scope: str) -> None:
    """Raises ValueError unless `scope` is "layer" or "global"."""
    if scope not in SCOPES:
        raise ValueError(f'scope must be "layer" or "global", got {scope!r}.')


def counter_dtype(sizes: Sequence[int], scope: Scope) -> jnp.dtype:
    """Unsigned integer type that can count what is ranked together.

    Raises:
      ValueError: that takes 64 bits, and they are not enabled.
    """
    largest = sum(sizes) if scope == "global" else max(sizes)
    if largest < 2**32:
        return jnp.dtype(jnp.uint32)
    if jax.dtypes.canonicalize_dtype(jnp.uint64) == jnp.uint64:
        return jnp.dtype(jnp.uint64)
    raise ValueError(
        f"{largest} scores to rank together are more than a 32-bit counter holds "
        '(2**32 - 1): use scope="layer", or enable 64-bit types with '
        'jax.config.update("jax_enable_x64", True).'
    )
