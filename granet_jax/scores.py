"""Scores by which weights are ranked.

A score is any function from the `ScoreInputs` of a leaf to an array of its shape. When
weights are pruned or dropped, the weights of larger score are kept; when weights are
activated, the weights of larger score come first. Scores may be any real numbers; NaN
ranks below all of them.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from granet_jax.checks import check_number
from granet_jax.dtypes import wider
from granet_jax.shardings import is_explicit


class ScoreInputs(NamedTuple):
    """The arguments of a score, for one maskable leaf.

    Attributes:
      param: The weights after the optimizer's step. Weights outside the mask are zero,
        except when the score ranks weights to activate: then a weight that was active
        before this update keeps its value. A score that ranks all weights
        (`Method.rank`) sees the values of all of them.
      grad: The dense gradient of this step. None where there is no gradient: for
        initial masks, or without `inner` for a method with `needs_gradient=False`.
      mask: The mask before the change that the score decides, boolean.
      average: The moving average of the dense gradient, for a method with
        `average_decay`; else None.
      key: A typed random key of this leaf and step.
      name: The name of this leaf ("dense/kernel").
      weights: The weights of all maskable leaves, by name: zero outside the masks,
        except for a score that ranks all weights.
      marked: The second mask of a method with `marked_sparsity`; else None.
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

    Args:
      gradient_weight: Weight of the gradient, 0 or larger.

    Raises:
      TypeError, ValueError: `gradient_weight` is not a finite number of 0 or more.
    """
    check_number("gradient_weight", gradient_weight, least=0.0)
    return _WeightAndGradient(gradient_weight)


# Scores with arguments are records and not closures: equal ones compare as equal.
@dataclasses.dataclass(frozen=True)
class _WeightAndGradient:
    gradient_weight: float

    def __call__(self, inputs: ScoreInputs) -> Array:
        return magnitude(inputs) + self.gradient_weight * gradient(inputs)


def random(inputs: ScoreInputs) -> Array:
    """Uniformly random int32 numbers of 31 bits (SET, Mocanu et al. 2018)."""
    bits = jax.random.bits(inputs.key, inputs.param.shape, jnp.uint32)
    return (bits >> 1).astype(jnp.int32)


def lookahead(order: Sequence[str]) -> Score:
    """Lookahead pruning: magnitude times the norms of adjacent weights.

    The score is abs(w) norm(W_in) norm(W_out), with Frobenius norms. Let w lead from
    unit i to unit j. W_in are the weights of the previous layer that lead into i, and
    W_out the weights of the next layer that lead out of j. At the ends of the chain the
    missing norm is 1. The score is how much the product of the three layers changes
    when only w becomes zero.

    Args:
      order: Names of the kernels of a chain of layers, in network order, such as
        "dense_1/kernel". The last axis of a kernel must be its outputs and the second
        to last its inputs. The inputs of a dense layer after a flattened convolution
        are a multiple of the channels, which are the fastest axis. Leaves that are not
        in `order` are scored by plain magnitude.

    Returns:
      A score for a `Method` or for `mask_sources.from_score`. When it is traced, it
      raises ValueError if a name does not belong to a maskable leaf, or if the shapes
      of neighbouring kernels do not match.

    Raises:
      TypeError: `order` is not a sequence of names.
      ValueError: `order` has fewer than two names, or one name twice.

    References:
      Park et al., Lookahead: A Far-Sighted Alternative of Magnitude-based Pruning, ICLR
      2020.
    """
    is_sequence = isinstance(order, Iterable) and not isinstance(order, str)
    if not is_sequence or not all(isinstance(name, str) for name in order):
        raise TypeError(f"order must be a sequence of leaf names, got {order!r}.")
    chain = tuple(order)
    if len(chain) < 2 or len(set(chain)) < len(chain):
        raise ValueError(
            f"order must hold two or more leaf names, none twice, got {chain}: without "
            "neighbours the score is `magnitude`."
        )
    return _Lookahead(chain)


@dataclasses.dataclass(frozen=True)
class _Lookahead:
    chain: tuple[str, ...]

    def __call__(self, inputs: ScoreInputs) -> Array:
        chain = self.chain
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
        size = size.astype(wider(size.dtype, jnp.float32))
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


def _sum_of_squares(name: str, kernel: Array, axis: int) -> Array:
    """Sums of squares over all axes of a kernel but one, in at least float32."""
    if kernel.ndim < 2:
        raise ValueError(
            f"order names {name!r} of shape {kernel.shape}: a kernel has an axis of "
            "inputs and one of outputs."
        )
    kernel = kernel.astype(wider(kernel.dtype, jnp.float32))
    others = tuple(i for i in range(kernel.ndim) if i != axis % kernel.ndim)
    squares = jnp.sum(jnp.square(kernel), axis=others)
    sharding = jax.typeof(squares).sharding
    if is_explicit(sharding):
        # With Explicit mesh axes, a product takes the sharding of its sharded factor.
        # That must be the scored leaf, so the norms are replicated.
        whole = jax.sharding.PartitionSpec()
        squares = jax.sharding.reshard(
            squares, jax.sharding.NamedSharding(sharding.mesh, whole)
        )
    return squares


def _repeats(before: str, units: int, after: str, kernel: Array) -> int:
    """The number of inputs of the kernel `after` that one unit of `before` feeds."""
    inputs = kernel.shape[-2] if kernel.ndim > 1 else 0
    if units == 0 or inputs == 0 or inputs % units:
        raise ValueError(
            f"order has {after!r} of shape {kernel.shape} after {before!r} of {units} "
            "outputs, which is not a divisor of its inputs: are they neighbours?"
        )
    return inputs // units
