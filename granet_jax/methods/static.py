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
    """A fixed random mask; or the masks given to `transform(masks=...)`.

    Args:
      sparsity: sparsity of the random mask, in [0, 1). Given masks have their own.
      distribution: "uniform", "er", "erk" or a function.
      structure: of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform`.

    Raises:
      ValueError, TypeError: an argument out of range or of the wrong type.

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
