"""SNFS: regrow by momentum, redistribute across layers (Dettmers & Zettlemoyer 2019).

At every update step t: in every leaf, drop the fraction r(t) of the active weights by
magnitude; give the freed weights of all leaves to the leaves in proportion to the mean
abs(momentum) of their active weights; regrow there by abs(momentum).
"""

from granet_jax import schedules, scores
from granet_jax.checks import check_decay, check_fraction, check_steps
from granet_jax.distributions import Distribution
from granet_jax.methods.arguments import constant_sparsity
from granet_jax.methods.method import Method
from granet_jax.phases import Exchange
from granet_jax.structures import Structure


def snfs(
    sparsity: float,
    total_steps: int,
    *,
    interval: int = 100,
    fraction: float = 0.5,
    decay: float = 0.9,
    distribution: Distribution = "uniform",
    structure: Structure | None = None,
) -> Method:
    """SNFS: regrowth by momentum, with redistribution across layers.

    Drop by magnitude; the weights freed in all layers are redistributed in proportion
    to the mean abs(momentum) of each layer's active weights (those before the drop),
    and regrown there by abs(momentum) among the inactive. The momentum is a moving
    average of the dense gradient kept by this library: m = decay m + (1 - decay) g, in
    at least float32. Prune fraction r(t) = fraction/2 (1 + cos(pi t / total_steps)).

    Args:
      sparsity: constant sparsity, in [0, 1).
      total_steps: optimizer steps of the whole training.
      interval: steps between mask updates (an epoch in the paper).
      fraction: prune fraction at the start, in [0, 1].
      decay: of the moving average, in [0, 1).
      distribution: "uniform", "er", "erk" or a function, of the initial masks.
      structure: of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform`.

    Raises:
      ValueError, TypeError: an argument out of range or of the wrong type.

    References:
      Dettmers & Zettlemoyer, Sparse Networks from Scratch, 2019.
    """
    check_steps("total_steps", total_steps, least=1)
    check_decay("decay", decay)
    check_fraction("fraction", fraction)
    decaying = schedules.cosine(fraction, 0.0, steps=total_steps)
    return Method(
        name="snfs",
        **constant_sparsity(sparsity, total_steps, interval, fraction, distribution),
        structure=structure,
        phases=(Exchange(decaying, grow=scores.momentum, across=True),),
        average_decay=decay,
        needs_gradient=True,
    )
