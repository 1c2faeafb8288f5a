"""Batch-norm statistics, against the mean over batches by hand."""

import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from granet_jax import analysis


class Network(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.BatchNorm(use_running_average=not train)(x * 100.0)


def test_statistics_are_the_mean_over_batches_whatever_the_momentum() -> None:
    rng = np.random.default_rng(0)
    batches = [np.float32(rng.normal(i, i + 1, (32, 4))) for i in range(3)]
    variables = Network().init(jax.random.key(0), batches[0], train=False)

    def forward(stats: Any, x: Any) -> Any:
        given = {**variables, "batch_stats": stats}
        _, new = Network().apply(given, x, train=True, mutable=["batch_stats"])
        return new["batch_stats"]

    old = variables["batch_stats"]
    found = analysis.batch_statistics(forward, old, batches)
    expected = {
        "mean": np.mean([x.mean(0) for x in batches], 0),
        "var": np.mean([x.var(0) for x in batches], 0),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found["BatchNorm_0"][name], value, rtol=1e-4)
    # The second norm sees normalised inputs, times 100.
    second = found["BatchNorm_1"]
    np.testing.assert_allclose(second["mean"], np.zeros(4), atol=1e-2)
    np.testing.assert_allclose(second["var"], np.full(4, 1e4), rtol=1e-3)
    # It is pure, and runs under jit.
    compiled = jax.jit(functools.partial(analysis.batch_statistics, forward))
    pairs = zip(*map(jax.tree.leaves, (found, compiled(old, batches))), strict=True)
    for x, y in pairs:
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-2)
