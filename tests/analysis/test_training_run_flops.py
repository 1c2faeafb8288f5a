"""FLOPs of whole training runs, against the rules by hand and published ratios."""

from collections.abc import Callable
from typing import Any

import pytest

import granet_jax
from granet_jax import analysis
from granet_jax.analysis import Flops, LeafFlops
from tests.analysis.resnet50 import resnet50_flops

COSTS = Flops(
    {
        "a": LeafFlops((10, 10), True, 100, 100),
        "b": LeafFlops((10, 20), True, 200, 270),
        "bias": LeafFlops((20,), False, 20, 0),
    },
    other=30,
)
DENSE = 400
T = 40


def sparse(density: float) -> float:
    """FLOPs of a forward pass with the same density in both layers."""
    return 30 + density * 370


def updating(flops: float) -> float:
    """FLOPs of a step on average, if one of six takes the dense gradient."""
    return (5 * 3 * flops + 2 * flops + DENSE) / 6


def gradual(cost: Callable[[float], float]) -> float:
    """The mean cost over the periods of gradual pruning at steps 5, 10, 15 and 20."""
    sparsities = [0.8 * (1 - (1 - j / 4) ** 3) for j in range(5)]
    periods = zip([5, 5, 5, 5, 20], sparsities, strict=True)
    return sum(n * cost(sparse(1 - s)) for n, s in periods) / T


S80, S90 = sparse(0.2), sparse(0.1)
FIVE: dict[str, Any] = {"interval": 5, "distribution": "uniform"}
UNIFORM: dict[str, Any] = {"distribution": "uniform"}
CYCLICAL: dict[str, Any] = {"cycles": 2, "ramp": 0.25, "interval": 5}
GREG: dict[str, Any] = {"growth": 0.1, "ceiling": 0.95, "settle_steps": 10}
GMP, GRANET = granet_jax.gmp, granet_jax.granet
CASES = [
    (granet_jax.static(0.8, **UNIFORM), 3 * S80),
    (granet_jax.set_(0.8, T, **FIVE), 3 * S80),
    (granet_jax.dsr(0.8, T, interval=5), 3 * S80),
    # Updates at 5, 10, ..., 30 of 40 steps.
    (granet_jax.rigl(0.8, T, **FIVE), (3 * updating(S80) + 3 * S80) / 4),
    # An update every five steps, except in the last five.
    (granet_jax.mest(0.8, T, **FIVE), (7 * updating(S80) + 3 * S80) / 8),
    (granet_jax.snfs(0.8, T, interval=5), 2 * S80 + DENSE),
    (GMP(0.8, 20, interval=5), gradual(lambda f: 3 * f)),
    (GRANET(0.8, T, **FIVE), gradual(updating) + (3 * S80 - updating(S80)) / 8),
    # The moving average needs a dense gradient in every step.
    (GRANET(0.8, T, grow="momentum", **FIVE), gradual(lambda f: 2 * f + DENSE)),
    (GRANET(0.8, T, grow="random", **FIVE), gradual(lambda f: 3 * f)),
    # Dense, pruned, dense and pruned for 10 steps each.
    (granet_jax.acdc(0.9, [10, 20, 30]), 3 * (DENSE + S90) / 2),
    (granet_jax.sculpt(0.9, T, cycles=3, **UNIFORM), 3 * (3 * S80 + S90) / 4),
    # Two cycles of twenty steps, each pruned once, at its fifth step.
    (granet_jax.cyclical(0.8, T, **CYCLICAL), 3 * (DENSE + 3 * S80) / 4),
    (
        granet_jax.cyclical(0.8, T, recovery="projected", **CYCLICAL),
        2 * (DENSE + 3 * S80) / 4 + DENSE,
    ),
    # From half: the gradient revives weights at step 20, after 15 steps.
    (
        granet_jax.cyclical(0.8, T, initial_sparsity=0.5, **CYCLICAL),
        3 * (sparse(0.5) + 3 * S80) / 4 + 15 / 40 * (DENSE - S80) / 16,
    ),
    (
        granet_jax.straight_through(0.8, 20, interval=5),
        gradual(lambda f: 2 * f + DENSE),
    ),
    (granet_jax.top_kast(0.9, backward_sparsity=0.8), 2 * S90 + S80),
    # Pruned after 10 increases of two steps and 10 steps more.
    (granet_jax.greg1(0.8, interval=2, **GREG), 3 * (DENSE * 30 + S80 * 10) / T),
]


@pytest.mark.parametrize(("method", "expected"), CASES)
def test_rules_by_hand(method: granet_jax.Method, expected: float) -> None:
    ratio = analysis.training_flops(method, T, COSTS)
    assert ratio == pytest.approx(expected / (3 * DENSE), rel=1e-12)


def test_distributions_and_measured_sparsities() -> None:
    # ERK splits 60 weights in proportion to the sums of sides, 20 and 30.
    expected = (30 + 100 * 24 / 100 + 270 * 36 / 200) / DENSE
    erk, uniform = granet_jax.static(0.8), granet_jax.static(0.8, **UNIFORM)
    assert analysis.training_flops(erk, T, COSTS) == pytest.approx(expected)
    assumed = analysis.training_flops(uniform, T, COSTS, distribution="erk")
    assert assumed == pytest.approx(expected)

    def measured(a: float, b: float) -> granet_jax.Sparsity:
        return granet_jax.Sparsity(0.0, {"a": 1 - a, "b": 1 - b}, 0, 300)

    # Updates are more frequent than measurements, so the latest measurement counts.
    history = {0: measured(1, 1), 10: measured(0.5, 0.1)}
    gmp = granet_jax.gmp(0.8, 20, interval=5)
    found = analysis.training_flops(gmp, T, COSTS, history=history)
    assert found == pytest.approx((10 * 400 + 30 * (30 + 50 + 27)) / (40 * 400))
    with pytest.raises(ValueError, match="distribution must be None with history"):
        analysis.training_flops(gmp, T, COSTS, history=history, distribution="erk")
    other = {0: granet_jax.Sparsity(0.0, {"a": 0.0}, 1, 1)}
    with pytest.raises(ValueError, match=r"\['a', 'b'\], got \['a'\] at step 0"):
        analysis.training_flops(gmp, T, COSTS, history=other)


@pytest.mark.parametrize(("sparsity", "published"), [(0.8, 0.42), (0.9, 0.24)])
def test_published_training_of_rigl(sparsity: float, published: float) -> None:
    """The README of google-research/rigl: RigL with ERK, trained for 32,000 steps."""
    method = granet_jax.rigl(sparsity, 32_000, stop=25_000 / 32_000)
    ratio = analysis.training_flops(method, 32_000, resnet50_flops())
    assert published - 0.008 < ratio < published + 0.005
