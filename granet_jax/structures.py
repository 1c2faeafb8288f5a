"""Structured sparsity as a score: what must go first for the mask to have its form.

A structure needs nothing of its own in the update: it is a `prune` score, so that every
method that prunes can have it, and others are as they were.
"""

import jax.numpy as jnp
from jax import Array

from granet_jax import scores
from granet_jax.scores import Score, ScoreInputs


def n_of_m(n: int, m: int, *, axis: int = -2, score: Score = scores.magnitude) -> Score:
    """N:M sparsity: of every `m` neighbours along an axis the `n` best are left.

    The n best of every group score infinity, the others as `score` says: they are
    pruned first, the worst of all first, and at sparsity 1 - n/m just they are gone.
    So a method whose final sparsity is 1 - n/m on all maskable leaves ends N:M exactly,
    and gradual pruning gets there gradually:

        method = granet_jax.gmp(0.5, 10_000)
        method = dataclasses.replace(method, prune=structures.n_of_m(2, 4))

    At lower sparsities every group has n active weights or more. Equal scores: the
    first of the group are better. For SR-STE take `straight_through(penalty=2e-4)`.

    Args:
      n: active weights of a group, in [1, m).
      m: neighbours that are a group.
      axis: of a leaf, along which they are neighbours; -2, the inputs of a dense layer
        (in, out) and the input channels of a convolution (height, width, in, out).
      score: by which weights are ranked.

    Returns:
      A score, for a `Method`'s `prune`. It raises ValueError when traced on a leaf
      without that axis, or whose axis is no multiple of m. (It reshapes its leaf, which
      must not be sharded along `axis` on an Explicit mesh axis.)

    Raises:
      TypeError, ValueError: n or m are no integers, or out of range.

    References:
      Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From
      Scratch, ICLR 2021 (along the input channels, as here).
    """
    for name, value in (("n", n), ("m", m)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {value!r}.")
    if not 1 <= n < m:
        raise ValueError(
            f"n must be at least 1 and below m, got n={n} with m={m}: that is no "
            "sparsity."
        )

    def structured(inputs: ScoreInputs) -> Array:
        ranked = score(inputs)
        ranked = ranked.astype(jnp.promote_types(ranked.dtype, jnp.float32))
        shape = ranked.shape
        if not -len(shape) <= axis < len(shape) or shape[axis] % m:
            raise ValueError(
                f"{n}:{m} sparsity needs groups of {m} along axis {axis}, and "
                f"{inputs.name!r} has shape {shape}: leave it out by `where`, or take "
                "another axis."
            )
        place = axis % len(shape)
        groups = (*shape[:place], shape[place] // m, m, *shape[place + 1 :])
        # NaN ranks below every number.
        values = jnp.where(jnp.isnan(ranked), -jnp.inf, ranked).reshape(groups)
        members = [jnp.take(values, i, axis=place + 1) for i in range(m)]
        best = [
            sum(
                (
                    # Ties go to the first of the group.
                    (other >= own if j < i else other > own).astype(jnp.int32)
                    for j, other in enumerate(members)
                    if j != i
                ),
                jnp.zeros(own.shape, jnp.int32),
            )
            < n
            for i, own in enumerate(members)
        ]
        stays = jnp.stack(best, axis=place + 1).reshape(shape)
        return jnp.where(stays, jnp.inf, ranked)

    return structured
