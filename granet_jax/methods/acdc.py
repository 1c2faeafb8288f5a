"""AC/DC: alternating compressed and decompressed training (Peste et al. 2021).

Let k(t) be the number of switches up to step t. The sparsity is s_f while k(t) is odd
(compressed), and 0 while k(t) is even (decompressed). A compression keeps the weights
of largest magnitude. A decompression activates all weights, at zero, and resets the
moments of the whole optimizer.
"""

import bisect
import dataclasses
from collections.abc import Sequence

from granet_jax import schedules
from granet_jax.checks import check_sparsity
from granet_jax.distributions import Distribution
from granet_jax.methods.method import Method
from granet_jax.phases import Prune, Revive
from granet_jax.selection import Scope
from granet_jax.structures import Structure


@dataclasses.dataclass(frozen=True)
class _Alternating:
    sparsity: float
    switches: tuple[int, ...]

    def __call__(self, step: int) -> float:
        return self.sparsity if bisect.bisect(self.switches, step) % 2 else 0.0


def acdc(
    sparsity: float,
    switches: Sequence[int],
    *,
    scope: Scope = "global",
    distribution: Distribution = "uniform",
    structure: Structure | None = None,
    floor: float = 0.0,
) -> Method:
    """AC/DC: training that alternates between compressed and decompressed phases.

    Training starts dense. The first switch compresses, the second decompresses, and so
    on. During a compressed phase the mask is fixed. The reset at a decompression is the
    option `reset_momentum_after_recycling` of the authors' code, which all its training
    scripts set. In their code the momentum of pruned weights continues during a
    compressed phase, and here it is zero; the reset makes both equivalent.

    The authors' switches, in epochs, are `(*range(10, 80, 5), 85)` of 100 for ImageNet
    and `range(10, 171, 20)` of 200 for CIFAR-100.

    Args:
      sparsity: Sparsity of the compressed phases and of the result, in [0, 1).
      switches: Steps at whose end the phase changes, in increasing order. Their number
        must be odd, so that training ends compressed.
      scope: "global": weights compete across layers. "layer": they compete within
        each layer, at the sparsity that `distribution` gives it.
      distribution: Distribution of the sparsity over layers, for scope "layer".
      structure: Structure of the masks, one of `structures`; None for single weights.
      floor: Least density of every layer in global pruning, rounded down to whole
        weights, at most 1 - sparsity. Without it, a layer whose weights are small can
        lose them all.

    Returns:
      A record for `transform(method, inner)`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong type.

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

    return Method(
        name="acdc",
        sparsity=_Alternating(sparsity, updates.at),
        updates=updates,
        distribution=distribution,
        structure=structure,
        scope=scope,
        phases=(Prune(floor=floor), Revive()),
        resets=schedules.listed(resets) if resets else schedules.NEVER,
    )
