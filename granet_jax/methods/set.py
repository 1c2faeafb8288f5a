"""SET: constant sparsity, drop by magnitude, regrow at random (Mocanu et al. 2018).

At every update step, in every leaf, drop the fraction r of the active weights by
magnitude, and regrow the same number, chosen uniformly among the inactive weights.
"""

from granet_jax import schedules, scores
from granet_jax.distributions import Distribution
from granet_jax.methods.arguments import constant_sparsity
from granet_jax.methods.method import Method
from granet_jax.phases import Exchange
from granet_jax.structures import Structure


def set_(
    sparsity: float,
    total_steps: int,
    *,
    interval: int = 100,
    fraction: float = 0.3,
    stop: float = 0.75,
    distribution: Distribution = "erk",
    structure: Structure | None = None,
) -> Method:
    """SET: constant sparsity, drop by magnitude, regrow at random.

    The prune fraction is constant. Updates end at step stop * total_steps, as those of
    RigL do, so that the network recovers from the last one. In the paper they end one
    epoch before the end of training: with `stop=1.0`, they end one interval before it.

    Args:
      sparsity: Constant sparsity, in [0, 1).
      total_steps: Optimizer steps of the whole training.
      interval: Steps between mask updates (an epoch in the paper).
      fraction: Prune fraction, in [0, 1].
      stop: Share of the training after which masks no longer change, in (0, 1].
      distribution: Distribution of the initial masks: "uniform", "er", "erk" or a
        function.
      structure: Structure of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong type.

    References:
      Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive
      Sparse Connectivity, Nature Communications 2018.
    """
    shared = constant_sparsity(
        sparsity, total_steps, interval, fraction, distribution, stop
    )
    return Method(
        name="set",
        **shared,
        structure=structure,
        phases=(Exchange(schedules.constant(fraction), grow=scores.random),),
    )
