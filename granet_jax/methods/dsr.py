"""DSR: one adaptive threshold for all layers (Mostafa & Wang 2019).

At every update step, drop the active weights with abs(w) < H, where the threshold H is
the same in all layers. Regrow the same number at random, divided among the layers in
proportion to the active weights that remain in each. With A active weights before the
update and the fraction r to drop, the threshold doubles if fewer than 0.9 r A weights
were dropped, and halves if more than 1.1 r A were.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from granet_jax import scores
from granet_jax.checks import check_number
from granet_jax.distributions import Distribution
from granet_jax.dtypes import wider
from granet_jax.methods.arguments import constant_sparsity
from granet_jax.methods.method import Method
from granet_jax.phases import Masks, Phase, UpdateInputs, active, grow
from granet_jax.redistribution import redistribute


@dataclasses.dataclass(frozen=True)
class Reallocate(Phase):
    """Drops weights below a threshold, and regrows the same number across layers.

    Attributes:
      fraction: The share of the active weights that an update should drop.
      threshold: The threshold of the first update. The phase's state holds later ones.
    """

    fraction: float
    threshold: float

    def init(self, masks: Masks) -> Any:
        """The threshold, a float32 scalar."""
        return jnp.float32(self.threshold)

    def __call__(self, masks: Masks, state: Any, at: UpdateInputs) -> tuple[Masks, Any]:
        """Drop and regrow; double or halve the threshold."""
        threshold = state
        size = at.score(scores.magnitude, masks)
        large = [_at_least(s, threshold) for s in size]
        stay = [m & s for m, s in zip(masks, large, strict=True)]
        remaining = active(stay, at.stacks)
        total = jnp.sum(active(masks, at.stacks), dtype=remaining.dtype)
        dropped = total - jnp.sum(remaining, dtype=remaining.dtype)

        room = active([~m for m in stay], at.stacks)
        share = redistribute(dropped, remaining.astype(jnp.float32), room)
        ranked = at.score(scores.random, stay, growing=True)

        target = self.fraction * total.astype(jnp.float32)
        count = dropped.astype(jnp.float32)
        factor = jnp.where(count < 0.9 * target, 2.0, 1.0)
        factor = jnp.where(count > 1.1 * target, 0.5, factor)
        return grow(stay, ranked, share, at.stacks), threshold * factor


def _at_least(size: Array, threshold: Array) -> Array:
    dtype = wider(size.dtype, threshold.dtype)
    return size.astype(dtype) >= threshold.astype(dtype)


def dsr(
    sparsity: float,
    total_steps: int,
    *,
    interval: int = 1000,
    fraction: float = 0.01,
    threshold: float = 1e-3,
    stop: float = 0.75,
    distribution: Distribution = "uniform",
) -> Method:
    """DSR: constant overall sparsity, with an adaptive threshold and adaptive layers.

    Updates end at step stop * total_steps, as those of RigL and SET do, and one
    interval before the end of training in any case.

    Args:
      sparsity: Constant overall sparsity, in [0, 1).
      total_steps: Optimizer steps of the whole training.
      interval: Steps between mask updates.
      fraction: Share of the active weights that an update should drop, in [0, 1]. The
        threshold doubles below 0.9 times this share and halves above 1.1 times it.
      threshold: Threshold of the first update, larger than 0.
      stop: Share of the training after which masks no longer change, in (0, 1].
      distribution: Distribution of the initial masks: "uniform", "er", "erk" or a
        function.

    Returns:
      A record for `transform`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong type.

    References:
      Mostafa & Wang, Parameter Efficient Training of Deep Convolutional Neural Networks
      by Dynamic Sparse Reparameterization, ICML 2019.
    """
    check_number("threshold", threshold, above=0.0)
    shared = constant_sparsity(
        sparsity, total_steps, interval, fraction, distribution, stop
    )
    return Method(
        name="dsr",
        **shared,
        phases=(Reallocate(fraction, threshold),),
    )
