"""FLOPs of whole training runs, against the rules by hand and published ratios."""

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


def gradual(sparsity: float) -> list[tuple[int, float]]:
    """Steps and FLOPs of the periods of gradual pruning at steps 5, 10, 15 and 20."""
    final = [sparsity * (1 - (1 - j / 4) ** 3) for j in range(5)]
    return [(n, sparse(1 - s)) for n, s in zip([5, 5, 5, 5, 20], final, strict=True)]


S80, S90 = sparse(0.2), sparse(0.1)
UNIFORM: dict[str, Any] = {"distribution": "uniform"}
CYCLICAL: dict[str, Any] = {"cycles": 2, "ramp": 0.25, "interval": 5}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (granet_jax.static(0.8, **UNIFORM), 3 * S80),
        (granet_jax.set_(0.8, T, interval=5, **UNIFORM), 3 * S80),
        # Updates at 5, 10, ..., 30 of 40 steps.
        (
            granet_jax.rigl(0.8, T, interval=5, **UNIFORM),
            0.75 * (3 * S80 * 5 + 2 * S80 + DENSE) / 6 + 0.25 * 3 * S80,
        ),
        # An update every five steps, except in the last five.
        (
            granet_jax.mest(0.8, T, interval=5, **UNIFORM),
            7 / 8 * (3 * S80 * 5 + 2 * S80 + DENSE) / 6 + 1 / 8 * 3 * S80,
        ),
        (granet_jax.dsr(0.8, T, interval=5), 3 * S80),
        (granet_jax.snfs(0.8, T, interval=5), 2 * S80 + DENSE),
        (
            granet_jax.gmp(0.8, 20, interval=5),
            sum(n * 3 * f for n, f in gradual(0.8)) / T,
        ),
        (
            granet_jax.granet(0.8, T, interval=5, **UNIFORM),
            sum(n * (3 * f * 5 + 2 * f + DENSE) / 6 for n, f in gradual(0.8)) / T
            + 1 / 8 * (3 * S80 - (3 * S80 * 5 + 2 * S80 + DENSE) / 6),
        ),
        # The moving average needs a dense gradient in every step.
        (
            granet_jax.granet(0.8, T, interval=5, grow="momentum", **UNIFORM),
            sum(n * (2 * f + DENSE) for n, f in gradual(0.8)) / T,
        ),
        (
            granet_jax.granet(0.8, T, interval=5, grow="random", **UNIFORM),
            sum(n * 3 * f for n, f in gradual(0.8)) / T,
        ),
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
            sum(n * (2 * f + DENSE) for n, f in gradual(0.8)) / T,
        ),
        (granet_jax.top_kast(0.9, backward_sparsity=0.8), 2 * S90 + S80),
        # Pruned after 10 increases of two steps and 10 steps more.
        (
            granet_jax.greg1(
                0.8, interval=2, growth=0.1, ceiling=0.95, settle_steps=10
            ),
            3 * (DENSE * 30 + S80 * 10) / T,
        ),
    ],
    ids=lambda x: getattr(x, "name", None),
)
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
