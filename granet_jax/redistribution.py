"""How SNFS moves freed weights between leaves: shares by mean score, exactly."""

import jax.numpy as jnp
from jax import Array, lax

from granet_jax.selection import sum_before


def redistribute(number: Array, weights: Array, room: Array) -> Array:
    """Splits `number` over leaves in proportion to `weights`, within their `room`.

    What a full leaf cannot take goes to the others, again in proportion; what is left
    by rounding down, fewer than one per leaf, goes to the first leaves with room.
    Leaves without weight are served only when the others are full.

    Args:
      number: unsigned integer, at most the sum of `room`.
      weights: float32, non-negative, one per leaf; what is not finite counts as 0.
      room: unsigned integers, most that each leaf can take.

    Returns:
      Integers of the dtype and shape of `room` that sum to `number` exactly.
    """
    weights = jnp.where(jnp.isfinite(weights), weights, 0.0)
    count_type = room.dtype

    def total(x: Array) -> Array:
        return jnp.sum(x, dtype=count_type)

    def pour(_: int, given: Array) -> Array:
        left = number - total(given)
        space = room - given
        open_weights = jnp.where(space > 0, weights, 0.0)
        mass = jnp.sum(open_weights)
        # Without any weight left, by room.
        open_weights = jnp.where(mass > 0, open_weights, space.astype(jnp.float32))
        mass = jnp.maximum(jnp.sum(open_weights), jnp.finfo(jnp.float32).tiny)
        share = open_weights / mass * left.astype(jnp.float32)
        # In float32 a share may round above what is left: serve in order, within it.
        poured = jnp.minimum(share.astype(count_type), space)
        before = sum_before(poured)
        allowed = jnp.where(left > before, left - before, 0)
        return given + jnp.minimum(poured, allowed)

    # Each round fills at least one leaf or leaves less than one weight per leaf.
    given = lax.fori_loop(0, room.shape[0] + 1, pour, jnp.zeros_like(room))

    def unfinished(given: Array) -> Array:
        # Under `vmap` this also runs, for nothing, on numbers that no room can take.
        return (total(given) < number) & jnp.any(given < room)

    def top_up(given: Array) -> Array:
        open_leaf = (given < room).astype(count_type)
        earlier = sum_before(open_leaf)
        return given + jnp.where(earlier < number - total(given), open_leaf, 0)

    return lax.while_loop(unfinished, top_up, given)


def mean_score(masks: list[Array], scores: list[Array]) -> Array:
    """Mean score of the active weights of every leaf, the same under any sharding.

    Sums of floats depend on their order, and so on the number of devices; here every
    score is rounded down to a fraction of the power of two above the largest of all,
    and those integers are summed, in limbs that cannot overflow 32 bits.

    Args:
      masks: pytree of masks.
      scores: one array per mask, non-negative. NaN and infinite ones count as 0.

    Returns:
      float32 vector, one per leaf, up to a common positive factor; 0 for a leaf
      without active weights.
    """
    values = [
        jnp.where(m & jnp.isfinite(s), s, 0).astype(jnp.float32)
        for m, s in zip(masks, scores, strict=True)
    ]
    largest = jnp.max(jnp.stack([jnp.max(v, initial=0.0) for v in values]))
    _, exponent = jnp.frexp(largest)
    means = []
    for mask, value in zip(masks, values, strict=True):
        bits = max(32 - mask.size.bit_length(), 1)
        limbs = -(-24 // bits)
        fraction = jnp.ldexp(value, -exponent)  # in [0, 1]
        mean = jnp.zeros((), jnp.float32)
        for limb in range(1, limbs + 1):
            fraction = jnp.ldexp(fraction, bits)
            digit = jnp.floor(fraction)
            fraction -= digit
            summed = jnp.sum(digit.astype(jnp.uint32), dtype=jnp.uint32)
            mean += jnp.ldexp(summed.astype(jnp.float32), -bits * limb)
        active = jnp.sum(mask, dtype=jnp.uint32).astype(jnp.float32)
        means.append(mean / jnp.maximum(active, 1.0))
    return jnp.stack(means)
