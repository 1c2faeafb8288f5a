"""RigL: constant sparsity, drop by magnitude, regrow by gradient (Evci et al. 2020).

At every update step t, in every leaf, drop the fraction r(t) of the active weights by
magnitude, and regrow the same number by abs(dense gradient), with
r(t) = r_0/2 (1 + cos(pi t / T_stop)).
"""

from granet_jax import schedules
from granet_jax.distributions import Distribution
from granet_jax.methods.arguments import constant_sparsity
from granet_jax.methods.method import Method
from granet_jax.phases import Exchange
from granet_jax.structures import Structure


def rigl(
    sparsity: float,
    total_steps: int,
    *,
    interval: int = 100,
    fraction: float = 0.3,
    stop: float = 0.75,
    distribution: Distribution = "erk",
    structure: Structure | None = None,
) -> Method:
    """RigL: constant sparsity, drop by magnitude, regrow by abs(dense gradient).

    The prune fraction is r(t) = fraction/2 (1 + cos(pi t / (stop total_steps))), and
    updates end at step stop * total_steps, and one interval before the end of training
    in any case. The optimizer also steps on update steps, as in the GraNet code. RigL's
    own code skips the optimizer there.

    RigL-ITOP (Liu et al. 2021) has a larger fraction and longer intervals, and updates
    throughout: `rigl(s, total_steps, interval=1500, fraction=0.5, stop=1.0)`. Its
    intervals are 1000 to 1500 steps for CIFAR and 4000 for ImageNet.

    Args:
      sparsity: Constant sparsity, in [0, 1).
      total_steps: Optimizer steps of the whole training.
      interval: Steps between mask updates.
      fraction: Prune fraction at the start, in [0, 1].
      stop: Share of the training after which masks no longer change, in (0, 1].
      distribution: Distribution of the initial masks: "uniform", "er", "erk" or a
        function.
      structure: Structure of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong type.

    References:
      Evci et al., Rigging the Lottery, ICML 2020. Liu et al., Do We Actually Need
      Dense Over-Parameterization?, ICML 2021.
    """
    shared = constant_sparsity(
        sparsity, total_steps, interval, fraction, distribution, stop
    )
    return Method(
        name="rigl",
        **shared,
        structure=structure,
        phases=(Exchange(schedules.cosine(fraction, 0.0, steps=stop * total_steps)),),
        needs_gradient=True,
    )
