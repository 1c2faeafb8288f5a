"""AC/DC: alternating compressed and decompressed training (Peste et al. 2021)."""

import bisect
from collections.abc import Sequence

from granet_jax import schedules
from granet_jax.checks import check_sparsity
from granet_jax.distributions import Distribution
from granet_jax.methods.method import Method
from granet_jax.phases import Prune, Revive
from granet_jax.selection import Scope
from granet_jax.structures import Structure


def acdc(
    sparsity: float,
    switches: Sequence[int],
    *,
    scope: Scope = "global",
    distribution: Distribution = "uniform",
    structure: Structure | None = None,
) -> Method:
    """AC/DC: training that alternates between compressed and decompressed phases.

    Training starts dense. At the first of `switches`, and every second one after it,
    the weights of largest magnitude are kept and the others become zero, with the mask
    fixed until the next; there all take part again, the pruned ones from zero, and the
    moments of the whole optimizer start anew (the code's
    `reset_momentum_after_recycling`, on in all of its training scripts). So during a
    compressed phase it does not matter that the code lets the momentum of pruned
    weights go on.

    The code's switches, in epochs: `(*range(10, 80, 5), 85)` of 100 for ImageNet, and
    `range(10, 171, 40)` to compress with `range(30, 152, 40)` to decompress of 200 for
    CIFAR-100, that is `range(10, 171, 20)`.

    Args:
      sparsity: of compressed phases and at the end, in [0, 1).
      switches: the steps at whose end the phase changes, increasing; odd in number, so
        that training ends compressed.
      scope: "global": weights compete across layers; "layer": within each, at the
        sparsity that `distribution` gives it.
      distribution: with scope "layer".
      structure: of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform(method, inner)`.

    Raises:
      ValueError, TypeError: an argument out of range or of the wrong type.

    References:
      Peste et al., AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural
      Networks, NeurIPS 2021; code: IST-DASLab/ACDC.
    """
    check_sparsity("sparsity", sparsity)
    updates = schedules.increasing("switches", switches)
    if len(updates.at) % 2 == 0:
        raise ValueError(
            "switches must be odd in number, to compress first and last, got "
            f"{len(updates.at)}: training would end dense. Leave the last one out."
        )
    resets = updates.at[1::2]

    def alternating(step: int) -> float:
        return sparsity if bisect.bisect(updates.at, step) % 2 else 0.0

    return Method(
        name="acdc",
        sparsity=alternating,
        updates=updates,
        distribution=distribution,
        structure=structure,
        scope=scope,
        phases=(Prune(), Revive()),
        resets=schedules.listed(resets) if resets else schedules.NEVER,
    )
