"""SCULPT-ing: train a fixed mask in cycles, then prune it (Gadhikar et al. 2024)."""

from granet_jax.checks import check_sparsity, check_steps
from granet_jax.distributions import Distribution
from granet_jax.methods.arguments import steps_per_cycle
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
) -> Method:
    """SCULPT-ing: cyclic training of a fixed mask, one pruning, and another cycle.

    A mask of `initial_sparsity` is trained for `cycles` cycles, each with an optimizer
    of its own (moments start anew; the learning rate by `schedules.restarted`) and all
    with the weights carried on; then magnitude prunes what is left to `sparsity`, once,
    and one more cycle of the same length ends the training.

    The mask is a random one, or that given as `transform(masks=...)`: of
    `initial_sparsity`, by SNIP or SynFlow for instance.

    Args:
      sparsity: at the end, in [initial_sparsity, 1).
      total_steps: optimizer steps of the whole training, a multiple of `cycles` + 1.
      cycles: number of cycles before the pruning. (The paper's is not known to us.)
      initial_sparsity: of the fixed mask.
      scope: of the pruning: "global", as in the code, or "layer".
      distribution: of the random mask; and of the pruning with scope "layer". (The
        code's ERK draws every weight by itself and clips without redistributing.)
      structure: of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform(method, inner)`.

    Raises:
      ValueError, TypeError: an argument out of range or of the wrong type.

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
        sparsity=lambda step: sparsity if step >= end else initial_sparsity,
        updates=UpdateSteps(end, end, period),
        distribution=distribution,
        structure=structure,
        scope=scope,
        phases=(Prune(),),
        resets=UpdateSteps(period, end, period),
    )
