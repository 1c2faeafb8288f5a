"""Exact division of freed weights among layers, for SNFS and DSR."""

import math

import jax.numpy as jnp
from jax import Array, lax

from granet_jax.layers import Axes, join, layer_axes, layer_shape


def redistribute(number: Array, weights: Array, room: Array) -> Array:
    """Divide `number` among layers in proportion to `weights`, within their `room`.

    The excess of a full layer goes to the other layers, again in proportion. Rounding
    down leaves a rest of fewer than one per layer, which goes to the first layers with
    room. A layer of weight 0 gets a share only when all others are full.

    Args:
      number: Unsigned integer. Of more than the sum of `room`, only that is divided.
      weights: Non-negative float32 vector, one weight per layer. NaN and infinite
        weights count as 0.
      room: Vector of unsigned integers, the most that each layer can take.

    Returns:
      Integers of the dtype and shape of `room` that sum to `number` exactly, or to the
      sum of `room`.
    """
    weights = jnp.where(jnp.isfinite(weights), weights, 0.0)
    count_type = room.dtype

    def total(x: Array) -> Array:
        return jnp.sum(x, dtype=count_type)

    def pour(state: tuple[Array, Array]) -> tuple[Array, Array]:
        shares, _ = state
        rest = number - total(shares)
        space = room - shares
        open_weights = jnp.where(space > 0, weights, 0.0)
        mass = jnp.sum(open_weights)
        # If all layers with room have weight 0, divide in proportion to the room.
        open_weights = jnp.where(mass > 0, open_weights, space.astype(jnp.float32))
        mass = jnp.maximum(jnp.sum(open_weights), jnp.finfo(jnp.float32).tiny)
        ideal = open_weights / mass * rest.astype(jnp.float32)
        portion = jnp.minimum(ideal.astype(count_type), space)
        # In float32, the portions may sum to more than the rest. So the layers take
        # their portions one after the other, until the rest is used up.
        before = sum_before(portion)
        portion = jnp.minimum(portion, jnp.where(rest > before, rest - before, 0))
        return shares + portion, jnp.any(portion > 0)

    # Each round fills at least one layer or leaves less than one weight per layer.
    start = (jnp.zeros_like(room), jnp.asarray(True))
    shares, _ = lax.while_loop(lambda state: state[1], pour, start)

    def unfinished(shares: Array) -> Array:
        # Under `vmap`, the loop also runs in lanes that do not update the masks, where
        # `number` may exceed the room. The second condition ends it there.
        return (total(shares) < number) & jnp.any(shares < room)

    def top_up(shares: Array) -> Array:
        open_leaf = (shares < room).astype(count_type)
        earlier = sum_before(open_leaf)
        return shares + jnp.where(earlier < number - total(shares), open_leaf, 0)

    return lax.while_loop(unfinished, top_up, shares)


def sum_before(counts: Array) -> Array:
    """The exclusive cumulative sum of a short vector, in its dtype."""
    # `jnp.cumsum` takes ten times as long to compile.
    square = (counts.size, counts.size)
    row, column = (lax.broadcasted_iota(jnp.int32, square, axis) for axis in (0, 1))
    earlier = column < row
    return jnp.sum(jnp.where(earlier, counts, 0), axis=1, dtype=counts.dtype)


def mean_score(
    masks: list[Array], scores: list[Array], stacks: tuple[Axes, ...]
) -> Array:
    """Mean score of the active weights of every layer, the same under any sharding.

    A sum of floats depends on the order of its terms, and so on the number of devices.
    A sum of integers does not. So every score is divided by a power of two above the
    largest score, rounded down to a fixed-point number, and summed digit by digit, with
    digits so short that no sum overflows 32 bits.

    Args:
      masks: One boolean array per leaf.
      scores: One non-negative array per leaf. NaN and infinite scores count as 0.
      stacks: The axes of every leaf that count layers.

    Returns:
      float32 vector of the means, one per layer, times a positive factor that all
      layers share. It is 0 for a layer without active weights.
    """
    values = [
        jnp.where(m & jnp.isfinite(s), s, 0).astype(jnp.float32)
        for m, s in zip(masks, scores, strict=True)
    ]
    largest = jnp.max(jnp.stack([jnp.max(v, initial=0.0) for v in values]))
    _, exponent = jnp.frexp(largest)
    means = []
    for mask, value, stack in zip(masks, values, stacks, strict=True):
        size = math.prod(layer_shape(mask.shape, stack))
        axes = layer_axes(mask.ndim, stack)
        bits = max(32 - size.bit_length(), 1)
        limbs = -(-24 // bits)
        fraction = jnp.ldexp(value, -exponent)  # in [0, 1]
        mean = jnp.zeros((), jnp.float32)
        for limb in range(1, limbs + 1):
            fraction = jnp.ldexp(fraction, bits)
            digit = jnp.floor(fraction)
            fraction -= digit
            summed = jnp.sum(digit.astype(jnp.uint32), axis=axes, dtype=jnp.uint32)
            mean += jnp.ldexp(summed.astype(jnp.float32), -bits * limb)
        active = jnp.sum(mask, axis=axes, dtype=jnp.uint32).astype(jnp.float32)
        means.append(mean / jnp.maximum(active, 1.0))
    return join(means)
