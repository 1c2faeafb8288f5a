"""MEST: drop by magnitude and gradient, regrow at random (Yuan et al. 2021).

At every update step t, in every leaf, drop the fraction r(t) of the active weights with
the smallest abs(w) + lambda abs(dense gradient), and regrow the same number at random,
with r(t) = r_0/2 (1 + cos(pi t / T)).
"""

from granet_jax import schedules, scores
from granet_jax.checks import check_fraction, check_number, check_steps
from granet_jax.distributions import Distribution
from granet_jax.methods.arguments import constant_sparsity
from granet_jax.methods.method import Method
from granet_jax.phases import Exchange
from granet_jax.structures import Structure


def mest(
    sparsity: float,
    total_steps: int,
    *,
    interval: int = 100,
    fraction: float = 0.3,
    gradient_weight: float = 0.01,
    distribution: Distribution = "erk",
    structure: Structure | None = None,
) -> Method:
    """MEST: constant sparsity, drop by weight and gradient together, regrow at random.

    A weight that is small but has a large gradient is about to grow, and stays. The
    last update is one interval before the end of training at the latest.

    Args:
      sparsity: Constant sparsity, in [0, 1).
      total_steps: Optimizer steps of the whole training.
      interval: Steps between mask updates.
      fraction: Prune fraction at the start, in [0, 1].
      gradient_weight: Weight lambda of abs(gradient) in the score, 0 or larger.
      distribution: Distribution of the initial masks: "uniform", "er", "erk" or a
        function.
      structure: Structure of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong type.

    References:
      Yuan et al., MEST: Accurate and Fast Memory-Economic Sparse Training Framework on
      the Edge, NeurIPS 2021. (We take the schedule of r from RigL. The paper's elastic
      variant, which starts denser than it ends, is not included.)
    """
    check_steps("total_steps", total_steps)
    check_number("gradient_weight", gradient_weight, least=0.0)
    check_fraction("fraction", fraction)
    decaying = schedules.cosine(fraction, 0.0, steps=total_steps)
    drop = scores.weight_and_gradient(gradient_weight)
    return Method(
        name="mest",
        **constant_sparsity(sparsity, total_steps, interval, fraction, distribution),
        structure=structure,
        phases=(Exchange(decaying, drop=drop, grow=scores.random),),
        needs_gradient=True,
    )
