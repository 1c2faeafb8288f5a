"""Batch-norm statistics, against the mean over batches by hand."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from granet_jax import analysis


class Network(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.BatchNorm(use_running_average=not train)(x * 100.0)


def example() -> tuple[Any, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    batches = [np.float32(rng.normal(i, i + 1, (32, 4))) for i in range(3)]
    return Network().init(jax.random.key(0), batches[0], train=False), batches


def forward_of(variables: Any, *, train: bool = True) -> Any:
    def forward(stats: Any, x: Any) -> Any:
        given = {**variables, "batch_stats": stats}
        _, new = Network().apply(given, x, train=train, mutable=["batch_stats"])
        return {**stats, **new.get("batch_stats", {})}

    return forward


def test_statistics_are_the_mean_over_batches_whatever_the_momentum() -> None:
    variables, batches = example()
    old = variables["batch_stats"]
    found = analysis.batch_statistics(forward_of(variables), old, batches)
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
    compiled = jax.jit(
        lambda stats, x: analysis.batch_statistics(forward_of(variables), stats, x)
    )(old, batches)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(compiled), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-2)


def test_no_batch_and_no_training_mode_are_refused() -> None:
    variables, batches = example()
    stats = variables["batch_stats"]
    with pytest.raises(ValueError, match="batches must hold one or more"):
        analysis.batch_statistics(forward_of(variables), stats, [])
    with pytest.raises(ValueError, match="forward must return new statistics"):
        analysis.batch_statistics(forward_of(variables, train=False), stats, batches)
