"""SNFS: regrow by momentum, redistribute across layers (Dettmers & Zettlemoyer 2019).

At every update step t, in every leaf, drop the fraction r(t) of the active weights by
magnitude, with r(t) = r_0/2 (1 + cos(pi t / T)). Redistribute the total number of
dropped weights over the leaves, in proportion to the mean abs(v) of each leaf's active
weights before the drop. Regrow that number in each leaf by abs(v). The momentum is
v <- beta v + (1 - beta) g, with the dense gradient g.
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

    Weights are dropped by magnitude. Their total number is redistributed over the
    layers, in proportion to the mean abs(momentum) of each layer's active weights
    before the drop, and regrown by abs(momentum) among the inactive weights. The
    library keeps the momentum itself, in at least float32: a moving average of the
    dense gradient, v <- decay v + (1 - decay) g. The prune fraction is
    r(t) = fraction/2 (1 + cos(pi t / total_steps)). The last update is one interval
    before the end of training at the latest, as in the authors' code.

    Args:
      sparsity: Constant sparsity, in [0, 1).
      total_steps: Optimizer steps of the whole training.
      interval: Steps between mask updates (an epoch in the paper).
      fraction: Prune fraction at the start, in [0, 1].
      decay: Decay of the moving average, in [0, 1).
      distribution: Distribution of the initial masks: "uniform", "er", "erk" or a
        function.
      structure: Structure of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong type.

    References:
      Dettmers & Zettlemoyer, Sparse Networks from Scratch, 2019.
    """
    check_steps("total_steps", total_steps)
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
