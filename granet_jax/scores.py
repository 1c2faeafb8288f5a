"""Scores by which weights are ranked: one leaf in, one array of its shape out.

A larger score is kept (when dropping) or activated (when growing). Any real number is
allowed; NaN ranks below all. A user's own score is any function of `ScoreInputs`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class ScoreInputs(NamedTuple):
    """What a score may look at: one maskable leaf.

    Attributes:
      param: the weights after the optimizer's step of this iteration.
      grad: the dense gradient of this iteration; None without a gradient at hand
        (initial masks, or a method with `needs_gradient=False` without `inner`).
      mask: the mask that is being changed, boolean.
      accumulator: moving average of the dense gradient, for a method with
        `accumulator_decay`; else None.
      key: a typed random key of this leaf and step.
    """

    param: Array
    grad: Array | None
    mask: Array
    accumulator: Array | None
    key: Array


Score = Callable[[ScoreInputs], Array]


def magnitude(inputs: ScoreInputs) -> Array:
    """|w| (Han et al. 2015)."""
    return jnp.abs(inputs.param)


def gradient(inputs: ScoreInputs) -> Array:
    """|dL/dw| of the dense gradient (RigL, Evci et al. 2020)."""
    if inputs.grad is None:
        raise ValueError("score `gradient` needs the dense gradient, and has none.")
    return jnp.abs(inputs.grad)


def momentum(inputs: ScoreInputs) -> Array:
    """|moving average of the dense gradient| (SNFS, Dettmers & Zettlemoyer 2019)."""
    if inputs.accumulator is None:
        raise ValueError(
            "score `momentum` needs the method's `accumulator_decay` to be set."
        )
    return jnp.abs(inputs.accumulator)


def random(inputs: ScoreInputs) -> Array:
    """Uniformly random (SET, Mocanu et al. 2018): 31 random bits, int32."""
    bits = jax.random.bits(inputs.key, inputs.param.shape, jnp.uint32)
    return (bits >> 1).astype(jnp.int32)
