"""Batch-norm statistics of a network that was pruned without further training."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from granet_jax.checks import check_function
from granet_jax.masking import PyTree


def batch_statistics(
    forward: Callable[[PyTree, Any], PyTree],
    batch_stats: PyTree,
    batches: Iterable[Any],
) -> PyTree:
    """The statistics of batch norms, averaged over batches.

    Pruning in one shot changes the activations, and the running statistics of the batch
    norms remain those of the dense network. Compute them again before you evaluate the
    pruned network, without any training::

        def forward(batch_stats, images):
            variables = {"params": params, "batch_stats": batch_stats}
            _, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
            return new["batch_stats"]

        batch_stats = analysis.batch_statistics(forward, batch_stats, batches)

    All batches have the same weight, whatever the momentum of the norms.

    Args:
      forward: A function from (statistics, batch) to new statistics: a forward pass in
        training mode. The new statistics must be momentum * old + (1 - momentum) *
        those of the batch, as in flax's `BatchNorm`.
      batch_stats: Pytree of running statistics. Only shapes and dtypes are read.
      batches: One or more batches, as `forward` takes them.

    Returns:
      Pytree like `batch_stats`.

    Raises:
      TypeError: `forward` is not a function.
      ValueError: There is no batch, or `forward` returns the statistics that it gets.
    """
    check_function("forward", forward, "a function of (statistics, batch)")
    zeros = jax.tree.map(jnp.zeros_like, batch_stats)
    total, number, momentum = zeros, 0, None
    for batch in batches:
        # From zeros, the new statistics are (1 - momentum) times those of the batch.
        share = forward(zeros, batch)
        if momentum is None:
            momentum = _momentum(forward, batch, share)
        total = jax.tree.map(jnp.add, total, share)
        number += 1
    if momentum is None:
        raise ValueError("batches must hold one or more batches, got none.")
    return jax.tree.map(
        lambda t, m: (t / (number * (1.0 - m))).astype(t.dtype), total, momentum
    )


def _momentum(
    forward: Callable[[PyTree, Any], PyTree], batch: Any, share: PyTree
) -> PyTree:
    """The momentum of every leaf of the statistics, from a second pass."""
    # An old value of the size of the new one keeps the difference exact enough.
    old = jax.tree.map(lambda x: 1.0 + jnp.abs(x), share)
    new = forward(old, batch)
    momentum = jax.tree.map(lambda n, s, o: jnp.mean((n - s) / o), new, share, old)
    for m in jax.tree.leaves(momentum):
        if not isinstance(m, Tracer) and not float(m) < 1.0 - 1e-5:
            raise ValueError(
                "forward must return new statistics, and returns those that it gets: "
                'run the network in training mode, with mutable=["batch_stats"].'
            )
    return momentum
