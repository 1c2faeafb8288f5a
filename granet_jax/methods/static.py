"""Static sparse training: a mask that never changes (Liu et al. 2022)."""

from granet_jax import schedules
from granet_jax.checks import check_sparsity
from granet_jax.distributions import Distribution
from granet_jax.methods.method import Method
from granet_jax.structures import Structure


def static(
    sparsity: float,
    *,
    distribution: Distribution = "erk",
    structure: Structure | None = None,
) -> Method:
    """Static sparse training: a random mask that never changes.

    To train other masks, pass them as `transform(masks=...)`.

    Args:
      sparsity: Sparsity of the random mask, in [0, 1). It does not apply to masks that
        you pass to `transform`.
      distribution: Distribution of the random mask: "uniform", "er", "erk" or a
        function.
      structure: Structure of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong type.

    References:
      Liu et al., The Unreasonable Effectiveness of Random Pruning, ICLR 2022.
    """
    check_sparsity("sparsity", sparsity)
    return Method(
        name="static",
        sparsity=schedules.constant(sparsity),
        distribution=distribution,
        structure=structure,
    )
