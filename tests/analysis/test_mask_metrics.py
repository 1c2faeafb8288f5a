"""Metrics of masks and tables of networks, against sets, enumeration and hand."""

import io
import itertools
import math
from fractions import Fraction
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

import granet_jax
from granet_jax import analysis
from tests.helpers import trees


def mask(text: str) -> np.ndarray:
    """A mask (inputs, outputs) from rows of dots and stars."""
    return np.asarray([[c == "*" for c in row] for row in text.split()])


@st.composite
def pairs(draw: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Two trees of masks of the same leaves."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = st.sampled_from([(2, 3), (4, 4), (3, 3, 2, 4), (1, 9)])
    shapes = draw(st.lists(shape, min_size=1, max_size=3))
    densities = [draw(st.sampled_from([0.0, 0.2, 0.7, 1.0])) for _ in range(2)]
    first, second = (
        {str(i): rng.random(s) < density for i, s in enumerate(shapes)}
        for density in densities
    )
    return first, second


def active_set(tree: dict[str, np.ndarray]) -> set[tuple[str, int]]:
    return {(name, int(i)) for name, m in tree.items() for i in np.flatnonzero(m)}


# --- Overlap, churn, exploration


@hypothesis.given(pairs())
def test_overlap_and_churn_are_those_of_sets(drawn: Any) -> None:
    a, b = drawn
    overlap = analysis.overlap(granet_jax.pack_masks(jax.tree.map(jnp.asarray, a)), b)
    churn = analysis.churn(a, b)
    assert overlap.leaves.keys() == churn.leaves.keys() == a.keys()
    for name in (None, *a):
        one, other = (
            active_set(tree if name is None else {name: tree[name]}) for tree in drawn
        )
        size = sum(m.size for n, m in a.items() if name in (None, n))
        similarity = overlap.total if name is None else overlap.leaves[name]
        union, both = one | other, one & other
        assert similarity.iou == (len(both) / len(union) if union else 1.0)
        assert similarity.hamming == len(one ^ other) / size
        assert 0 <= similarity.chance <= 1
        change = churn.total if name is None else churn.leaves[name]
        assert change.dropped == (len(one - other) / len(one) if one else 0)
        assert change.grown == (len(other - one) / len(other) if other else 0)
    swapped = analysis.overlap(b, a).total.chance
    assert swapped == pytest.approx(overlap.total.chance, rel=1e-12)


def enumerated_iou(size: int, first: int, second: int) -> Fraction:
    """Mean IoU of a mask with `first` active weights and every mask with `second`."""
    fixed = set(range(first))
    values = [
        Fraction(len(fixed & set(other)), len(fixed | set(other)))
        for other in itertools.combinations(range(size), second)
    ]
    return sum(values, Fraction()) / len(values)


def test_chance_of_small_masks_is_exact() -> None:
    for size, first, second in itertools.product(range(1, 8), range(8), range(8)):
        if first <= size and second <= size and first + second:
            expected = float(enumerated_iou(size, first, second))
            found = analysis.chance_iou(size, first, second)
            assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert analysis.chance_iou(5, 0, 0) == analysis.chance_iou(0, 0, 0) == 1.0


def intersections(n: int, a: int, b: int) -> dict[int, float]:
    """Probability of each intersection of random masks with a and b of n active."""

    def log_binomial(m: int, k: int) -> float:
        return math.lgamma(m + 1) - math.lgamma(k + 1) - math.lgamma(m - k + 1)

    return {
        i: math.exp(
            log_binomial(a, i) + log_binomial(n - a, b - i) - log_binomial(n, b)
        )
        for i in range(max(0, a + b - n), min(a, b) + 1)
    }


def test_chance_of_large_masks_and_of_several_leaves() -> None:
    # p q / (p + q - p q), up to terms in 1 / n.
    n = 25_000_000
    found = analysis.chance_iou(n, n // 10, n // 5)
    assert found == pytest.approx(0.02 / 0.28, rel=1e-6)
    n, a, b = 60_000, 30_000, 20_000
    expected = sum(p * i / (a + b - i) for i, p in intersections(n, a, b).items())
    assert analysis.chance_iou(n, a, b) == pytest.approx(expected, rel=1e-9)

    def tree(x: int, y: int) -> dict[str, np.ndarray]:
        return {"x": np.arange(48) < x, "y": np.arange(20) < y}

    found = analysis.overlap(tree(24, 3), tree(12, 15))
    assert found.leaves["x"].chance == analysis.chance_iou(48, 24, 12)
    pairs = itertools.product(
        intersections(48, 24, 12).items(), intersections(20, 3, 15).items()
    )
    expected = sum(p * q * (i + j) / (54 - i - j) for (i, p), (j, q) in pairs)
    # The total is a second-order expansion.
    assert found.total.chance == pytest.approx(expected, rel=1e-4)


def test_exploration() -> None:
    rng = np.random.default_rng(0)
    history = {
        step: {"x": rng.random((5, 6)) < 0.2, "y": rng.random((3, 2)) < 0.3}
        for step in (40, 0, 10, 20)
    }
    originals = {
        step: {k: m.copy() for k, m in t.items()} for step, t in history.items()
    }
    rates = analysis.exploration_over_time(history)
    assert [*rates] == [0, 10, 20, 40]
    for step, rate in rates.items():
        past = [masks for t, masks in history.items() if t <= step]
        seen = set().union(*map(active_set, past))
        assert rate.total == len(seen) / 36
        assert rate.leaves["x"] == sum(name == "x" for name, _ in seen) / 30
        assert rate == analysis.exploration(iter(past))
    assert 0 < rates[0].total < rates[40].total < 1
    trees.assert_same(history, originals)


# --- Units and paths


def test_density_and_dead_units() -> None:
    first = mask("*.*. ..*. *...")
    np.testing.assert_array_equal(analysis.channel_density(first), [2 / 3, 0, 2 / 3, 0])
    assert analysis.dead_units(first).tolist() == [False, True, False, True]
    # Nothing reads the first unit.
    following = mask(".. ** *. .*")
    assert analysis.dead_units(first, following).tolist() == [True, True, False, True]

    kernel = np.zeros((3, 3, 2, 3), bool)
    kernel[1, 2, 0, 0] = kernel[0, 0, 1, 2] = kernel[2, 2, 1, 2] = True
    np.testing.assert_allclose(analysis.channel_density(kernel), [1 / 18, 0, 2 / 18])
    assert analysis.dead_units(kernel).tolist() == [False, True, False]
    # A dense layer reads two positions of three channels each.
    dense = mask(".. .* .. .. .. *.")
    assert analysis.dead_units(kernel, dense).tolist() == [True, True, False]
    depthwise = np.zeros((3, 3, 1, 3), bool)
    depthwise[0, 0, 0, 0] = True
    assert analysis.dead_units(kernel, depthwise).tolist() == [False, True, True]


def weights_on_paths(chain: list[np.ndarray]) -> list[set[tuple[int, int]]]:
    """Weights (input, output) of each layer on some path, by walking all paths."""
    used: list[set[tuple[int, int]]] = [set() for _ in chain]
    sizes = [range(chain[0].shape[0]), *(range(m.shape[1]) for m in chain)]
    for path in itertools.product(*sizes):
        steps = [*itertools.pairwise(path)]
        if all(m[step] for m, step in zip(chain, steps, strict=True)):
            for layer, step in zip(used, steps, strict=True):
                layer.add(step)
    return used


@hypothesis.given(st.integers(0, 10**6), st.sampled_from([0.2, 0.4, 0.7]))
def test_connectivity_is_that_of_all_paths(seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    sizes = [int(n) for n in rng.integers(1, 5, size=4)]
    chain = [rng.random(shape) < density for shape in itertools.pairwise(sizes)]
    found = analysis.connectivity(chain)
    used = weights_on_paths(chain)
    assert found.effective == [len(layer) for layer in used]
    assert found.active == [int(m.sum()) for m in chain]
    alive = [{i for i, _ in used[0]}, *({j for _, j in layer} for layer in used)]
    for units, expected, size in zip(found.units, alive, sizes, strict=True):
        assert units.tolist() == [j in expected for j in range(size)]
    assert found.connected == (len(alive[-1]) == sizes[-1])


@hypothesis.given(st.integers(0, 10**6))
def test_connectivity_through_groups_and_positions(seed: int) -> None:
    """A network of convolutions equals a dense network with the same connections."""
    rng = np.random.default_rng(seed)
    first = rng.random((2, 2, 3, 4)) < 0.2
    grouped = rng.random((2, 2, 2, 6)) < 0.2  # Two groups of 2 inputs and 3 outputs.
    last = rng.random((3 * 6, 2)) < 0.1  # Three positions of 6 channels.
    block_diagonal = np.zeros((4, 6), bool)
    block_diagonal[:2, :3] = grouped[..., :3].any((0, 1))
    block_diagonal[2:, 3:] = grouped[..., 3:].any((0, 1))
    dense = [first.any((0, 1)), block_diagonal, last.reshape(3, 6, 2).any(0)]
    found = analysis.connectivity([first, grouped, last])
    expected = analysis.connectivity(dense)
    for a, b in zip(found.units, expected.units, strict=True):
        np.testing.assert_array_equal(a, b)
    used = weights_on_paths(dense)
    assert found.effective == [
        sum(int(first[:, :, i, j].sum()) for i, j in used[0]),
        sum(int(grouped[:, :, i % 2, j].sum()) for i, j in used[1]),
        sum(int(last[i::6, j].sum()) for i, j in used[2]),
    ]


# --- Gradient flow and sharpness


def test_gradient_flow_is_the_sum_of_squares() -> None:
    grads = trees.gradients(0)
    masks = granet_jax.init_masks(granet_jax.static(0.5), grads)
    found = jax.jit(analysis.gradient_flow)(grads, granet_jax.pack_masks(masks))
    expected = {}
    for name in ("conv", "dense"):
        active = np.asarray(masks[name]["kernel"])
        values = np.asarray(grads[name]["kernel"], np.float64)[active]
        expected[f"{name}/kernel"] = float(np.sum(values**2))
    assert {k: float(v) for k, v in found.leaves.items()} == pytest.approx(expected)
    assert float(found.total) == pytest.approx(sum(expected.values()))


@pytest.mark.parametrize("top", [9.0, -9.0])
def test_sharpness_is_the_eigenvalue_over_trained_weights(top: float) -> None:
    rng = np.random.default_rng(0)
    active = rng.random((4, 5)) < 0.5
    free = np.concatenate([np.ones(3, bool), active.reshape(-1)])
    # A quadratic whose largest curvature is along pruned weights. Among the trained
    # weights it is `top`, in a direction that both leaves share.
    rotation = np.linalg.qr(rng.normal(size=(free.sum(), free.sum())))[0]
    values = np.linspace(-5, 5, free.sum())
    values[0] = top
    hessian = 50 * np.eye(23)
    hessian[np.ix_(free, free)] = rotation * values @ rotation.T
    mixed = rng.normal(size=(23, 23)) * np.logical_xor.outer(free, free)
    hessian += mixed + mixed.T

    def loss(params: Any, matrix: Any) -> Any:
        flat = jnp.concatenate([params["b"], params["w"].reshape(-1)])
        return 0.5 * flat @ matrix @ flat

    params = {"b": jnp.ones(3), "w": jnp.ones((4, 5))}
    masks = granet_jax.pack_masks({"b": None, "w": jnp.asarray(active)})

    @jax.jit
    def sharpness(masks: Any, matrix: Any) -> Any:
        return analysis.sharpness(loss, params, masks, matrix, iterations=40)

    matrix = jnp.asarray(hessian, jnp.float32)
    assert float(sharpness(masks, matrix)) == pytest.approx(top, rel=1e-4)
    pruned = granet_jax.pack_masks({"b": None, "w": jnp.zeros((4, 5), bool)})
    of_biases = max(np.linalg.eigvalsh(hessian[:3, :3]), key=abs)
    assert float(sharpness(pruned, matrix)) == pytest.approx(of_biases, rel=1e-3)
    assert float(sharpness(masks, jnp.zeros((23, 23)))) == 0


# --- Summary

PARAMS: Any = {
    "a": {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)},
    "b": [jax.ShapeDtypeStruct((5, 2), jnp.float32)],
}
MASKS: Any = {
    "a": {"kernel": np.arange(20).reshape(4, 5) < 5, "bias": None},
    "b": [np.arange(10).reshape(5, 2) < 2],
}


def test_summary_by_hand() -> None:
    def f(p: Any, x: Any) -> Any:
        return (x @ p["a"]["kernel"] + p["a"]["bias"][None]) @ p["b"][0]

    flops = analysis.flops(f, PARAMS, MASKS, jnp.ones((3, 4)))
    found = analysis.summary(PARAMS, MASKS, flops)
    assert [record["path"] for record in found.records] == ["a/bias", "a/kernel", "b/0"]
    assert found.records[1] == {
        "path": "a/kernel",
        "shape": (4, 5),
        "masked": True,
        "weights": 20,
        "active": 5,
        "sparsity": 0.75,
        "share": 5 / 12,
        "dense_flops": 2 * 3 * 20,
        "flops": 2 * 3 * 5,
    }
    assert (found.records[0]["sparsity"], found.records[0]["masked"]) == (0, False)
    assert (found.masked["weights"], found.masked["active"]) == (30, 7)
    assert (found.total["weights"], found.total["active"]) == (35, 12)
    assert found.total["flops"] == 2 * 3 * 7
    assert sum(record["share"] for record in found.records) == pytest.approx(1)
    assert found.masked["sparsity"] == pytest.approx(23 / 30)
    assert found.masked["sparsity"] == granet_jax.sparsity(MASKS).overall
    packed = granet_jax.pack_masks(jax.tree.map(jnp.asarray, MASKS))
    assert analysis.summary(PARAMS, packed, flops) == found
    other = {"a": {"kernel": ~MASKS["a"]["kernel"]}, "b": MASKS["b"]}
    with pytest.raises(ValueError, match=r"5 active weights at 'a/kernel', .* has 15"):
        analysis.summary(PARAMS, other, flops)


def test_summary_as_text() -> None:
    table = analysis.summary(PARAMS, MASKS)
    lines = str(table).splitlines()
    rule = "-" * max(map(len, lines))
    first_words = [line.split()[0] for line in lines]
    assert first_words == [
        *("parameter", rule, "a/bias", "a/kernel", "b/0", rule, "with", "all")
    ]
    assert lines[3].split() == ["a/kernel", "4", "x", "5", "20", "5", "75.00", "41.67"]
    assert lines[2].split() == ["a/bias", "5", "5", "dense", "41.67"]
    console = rich.console.Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()
    words = {word for line in lines if line != rule for word in line.split()}
    assert all(word in text for word in words)
