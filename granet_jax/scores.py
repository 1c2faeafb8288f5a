"""Scores by which weights are ranked: one leaf in, one array of its shape out.

A larger score is kept (when dropping) or activated (when growing). Any real number is
allowed; NaN ranks below all. A user's own score is any function of `ScoreInputs`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from granet_jax.checks import check_number
from granet_jax.masking import is_explicit


class ScoreInputs(NamedTuple):
    """What a score may look at: one maskable leaf.

    Attributes:
      param: the weights after the optimizer's step of this iteration, zero where they
        are pruned (for `grow` and `revive`, where they were before this update).
      grad: the dense gradient of this iteration; None without a gradient at hand
        (initial masks, or a method with `needs_gradient=False` without `inner`).
      mask: the mask that is being changed, boolean.
      average: moving average of the dense gradient, for a method with
        `average_decay`; else None.
      key: a typed random key of this leaf and step.
      name: of this leaf ("dense/kernel").
      weights: `param` of every maskable leaf by name, zero where pruned.
      marked: the second mask of a method with `marked_sparsity`; else None.
    """

    param: Array
    grad: Array | None
    mask: Array
    average: Array | None
    key: Array
    name: str = ""
    weights: Mapping[str, Array] = MappingProxyType({})
    marked: Array | None = None


Score = Callable[[ScoreInputs], Array]


def magnitude(inputs: ScoreInputs) -> Array:
    """abs(w) (Han et al. 2015)."""
    return jnp.abs(inputs.param)


def gradient(inputs: ScoreInputs) -> Array:
    """abs(dL/dw) of the dense gradient (RigL, Evci et al. 2020)."""
    if inputs.grad is None:
        raise ValueError("score `gradient` needs the dense gradient, and has none.")
    return jnp.abs(inputs.grad)


def momentum(inputs: ScoreInputs) -> Array:
    """abs(moving average of the dense gradient) (SNFS, Dettmers & Zettlemoyer 2019)."""
    if inputs.average is None:
        raise ValueError(
            "score `momentum` needs the method's `average_decay` to be set."
        )
    return jnp.abs(inputs.average)


def weight_and_gradient(gradient_weight: float) -> Score:
    """abs(w) + gradient_weight abs(dL/dw) (MEST, Yuan et al. 2021).

    Raises:
      TypeError, ValueError: `gradient_weight` is not a finite number from 0 on.
    """
    check_number("gradient_weight", gradient_weight, least=0.0)

    def score(inputs: ScoreInputs) -> Array:
        return magnitude(inputs) + gradient_weight * gradient(inputs)

    return score


def random(inputs: ScoreInputs) -> Array:
    """Uniformly random (SET, Mocanu et al. 2018): 31 random bits, int32."""
    bits = jax.random.bits(inputs.key, inputs.param.shape, jnp.uint32)
    return (bits >> 1).astype(jnp.int32)


def lookahead(order: Sequence[str]) -> Score:
    """Magnitude with a look at the neighbouring layers (LAP, Park et al. 2020).

    abs(w) norm(W_in) norm(W_out), where W_in are the weights of the layer before into
    the unit that w comes from, and W_out those of the layer after out of the unit that
    w leads to (Frobenius norms; 1 at the ends of the chain): the change of the product
    of the three layers when w alone becomes zero.

    Args:
      order: names of the kernels of a chain, in network order ("dense_1/kernel"). The
        last axis of a kernel is its outputs, the second to last its inputs. After a
        flattened convolution these are a multiple of its channels, which are the
        fastest axis. Other leaves are scored by plain magnitude.

    Returns:
      A score, for a `Method` or for `mask_sources.from_score`. It raises ValueError
      when traced for names that are no maskable leaf, or kernels that do not chain.

    Raises:
      TypeError: `order` is not a sequence of names.
      ValueError: fewer than two names, or one twice.

    References:
      Park et al., Lookahead: A Far-Sighted Alternative of Magnitude-based Pruning, ICLR
      2020.
    """
    several = isinstance(order, Iterable) and not isinstance(order, str)
    if not several or not all(isinstance(name, str) for name in order):
        raise TypeError(f"order must be a sequence of leaf names, got {order!r}.")
    chain = tuple(order)
    if len(chain) < 2 or len(set(chain)) < len(chain):
        raise ValueError(
            f"order must hold two or more leaf names, none twice, got {chain}: without "
            "neighbours the score is `magnitude`."
        )

    def score(inputs: ScoreInputs) -> Array:
        missing = [name for name in chain if name not in inputs.weights]
        if missing:
            raise ValueError(
                f"order names {', '.join(map(repr, missing))}, which is no maskable "
                f"leaf: there are {', '.join(map(repr, inputs.weights))}."
            )
        if inputs.name not in chain:
            return jnp.abs(inputs.param)
        place, ndim = chain.index(inputs.name), inputs.param.ndim
        size = jnp.abs(inputs.param)
        size = size.astype(jnp.promote_types(size.dtype, jnp.float32))
        if place > 0:
            before = chain[place - 1]
            squares = _sum_of_squares(before, inputs.weights[before], axis=-1)
            repeats = _repeats(before, squares.size, inputs.name, inputs.param)
            into = jnp.sqrt(jnp.tile(squares, repeats))
            size *= jnp.expand_dims(into, (*range(ndim - 2), ndim - 1))
        if place < len(chain) - 1:
            after = chain[place + 1]
            kernel = inputs.weights[after]
            squares = _sum_of_squares(after, kernel, axis=-2)
            units = inputs.param.shape[-1]
            repeats = _repeats(inputs.name, units, after, kernel)
            out = jnp.sqrt(jnp.sum(squares.reshape(repeats, units), axis=0))
            size *= jnp.expand_dims(out, tuple(range(ndim - 1)))
        return size

    return score


def _sum_of_squares(name: str, kernel: Array, axis: int) -> Array:
    """Over all axes of a kernel but one, a vector in at least float32."""
    if kernel.ndim < 2:
        raise ValueError(
            f"order names {name!r} of shape {kernel.shape}: a kernel has an axis of "
            "inputs and one of outputs."
        )
    kernel = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    others = tuple(i for i in range(kernel.ndim) if i != axis % kernel.ndim)
    squares = jnp.sum(jnp.square(kernel), axis=others)
    sharding = jax.typeof(squares).sharding
    if is_explicit(sharding):
        # On Explicit mesh axes a product has one sharding, that of the leaf scored.
        whole = jax.sharding.PartitionSpec()
        squares = jax.sharding.reshard(
            squares, jax.sharding.NamedSharding(sharding.mesh, whole)
        )
    return squares


def _repeats(before: str, units: int, after: str, kernel: Array) -> int:
    """How many inputs of the kernel `after` each unit of the layer before feeds."""
    inputs = kernel.shape[-2] if kernel.ndim > 1 else 0
    if units == 0 or inputs == 0 or inputs % units:
        raise ValueError(
            f"order has {after!r} of shape {kernel.shape} after {before!r} of {units} "
            "outputs, which is not a divisor of its inputs: are they neighbours?"
        )
    return inputs // units
