"""SCULPT-ing: train a fixed mask in cycles, then prune it (Gadhikar et al. 2024).

Train a fixed mask of sparsity s_i for C cycles of P = T / (C + 1) steps each. At step
C P prune by magnitude to sparsity s_f, and train for one more cycle.
"""

from granet_jax.checks import check_sparsity, check_steps
from granet_jax.distributions import Distribution
from granet_jax.methods.arguments import Jump, steps_per_cycle
from granet_jax.methods.method import Method
from granet_jax.phases import Prune
from granet_jax.schedules import UpdateSteps
from granet_jax.selection import Scope
from granet_jax.structures import Structure


def sculpt(
    sparsity: float,
    total_steps: int,
    *,
    cycles: int,
    initial_sparsity: float = 0.8,
    scope: Scope = "global",
    distribution: Distribution = "erk",
    structure: Structure | None = None,
    floor: float = 0.0,
) -> Method:
    """SCULPT-ing: cyclic training of a fixed mask, one pruning, and another cycle.

    A mask of `initial_sparsity` is trained for `cycles` cycles. Every cycle continues
    with the weights of the last one and resets the optimizer's moments; restart the
    learning rate with `schedules.restarted`. Then the weights are pruned once, by
    magnitude, to `sparsity`, and one more cycle of the same length ends the training.

    The first mask is random, unless you pass one of `initial_sparsity` as
    `transform(masks=...)`, from SNIP or SynFlow for example.

    Args:
      sparsity: Final sparsity, in [initial_sparsity, 1).
      total_steps: Optimizer steps of the whole training, a multiple of `cycles` + 1.
      cycles: Number of cycles before the pruning. We do not know the paper's number.
      initial_sparsity: Sparsity of the fixed mask.
      scope: "global": weights compete across layers in the pruning, as in the authors'
        code. "layer": they compete within each layer, at the sparsity that
        `distribution` gives it.
      distribution: Distribution of the sparsity over layers, for the random mask and
        for scope "layer". (The authors' ERK draws every weight independently, and
        clips densities without redistributing the rest.)
      structure: Structure of the masks, one of `structures`; None for single weights.
      floor: Least density of every layer in global pruning, rounded down to whole
        weights, at most 1 - sparsity. Without it, a layer whose weights are small can
        lose them all.

    Returns:
      A record for `transform(method, inner)`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong type.

    References:
      Gadhikar et al., Cyclic Sparse Training: Is it Enough?, 2024; code:
      nelaturuharsha/TurboPrune, `sclpt_harness.py`.
    """
    check_sparsity("sparsity", sparsity)
    check_sparsity("initial_sparsity", initial_sparsity)
    if initial_sparsity > sparsity:
        raise ValueError(
            "initial_sparsity must be at most sparsity, got "
            f"initial_sparsity={initial_sparsity} with sparsity={sparsity}."
        )
    check_steps("cycles", cycles)
    period = steps_per_cycle(total_steps, "cycles", cycles, cycles + 1)
    end = cycles * period
    return Method(
        name="sculpt",
        sparsity=Jump(initial_sparsity, sparsity, end),
        updates=UpdateSteps(end, end, period),
        distribution=distribution,
        structure=structure,
        scope=scope,
        phases=(Prune(floor=floor),),
        resets=UpdateSteps(period, end, period),
    )
