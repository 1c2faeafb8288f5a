"""The mean density of a training run, which predicts its loss at scale."""

import itertools
import math

from granet_jax.checks import check_steps
from granet_jax.methods import Method, check_method


def average_density(method: Method, total_steps: int) -> float:
    """Return the density of a method's masks, averaged over the steps of a training.

    Times the number of maskable weights, plus all others, it is the average number of
    active parameters. In the pretraining of language models, the final loss follows the
    scaling law of dense models in that number::

        early = granet_jax.gmp(0.8, 100_000)
        late = granet_jax.gmp(0.8, 75_000, begin_step=25_000)  # best in the paper

    Args:
      method: Record of the method.
      total_steps: Number of optimizer steps.

    Returns:
      The mean of 1 - sparsity over steps 0 to total_steps - 1.

    Raises:
      TypeError, ValueError: `method` is not a record, or `total_steps` is below 1.

    References:
      Jin et al., The Journey Matters: Average Parameter Count over Pre-training Unifies
      Sparse and Dense Scaling Laws, ICLR 2025.
    """
    check_method(method)
    check_steps("total_steps", total_steps)
    updates = [t for t in method.updates.steps() if t < total_steps]
    spans = itertools.pairwise((0, *updates, total_steps))
    return (
        math.fsum(
            (end - start) * (1.0 - method.sparsity(start)) for start, end in spans
        )
        / total_steps
    )
