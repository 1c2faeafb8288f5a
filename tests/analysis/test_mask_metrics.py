"""Metrics of masks and tables of networks, against counts by hand and simulations."""

import functools
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
import optax
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
    shapes = draw(
        st.lists(
            st.sampled_from([(2, 3), (4, 4), (3, 3, 2, 4), (1, 9)]),
            min_size=1,
            max_size=3,
        )
    )
    trees = []
    for _ in range(2):
        density = draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
        tree = {str(i): rng.random(s) < density for i, s in enumerate(shapes)}
        trees.append(tree)
    return trees[0], trees[1]


# --- overlap


def test_overlap_by_hand() -> None:
    a = {"x": mask("**.. ...."), "y": mask("** **")}
    b = {"x": mask("*.*. *..."), "y": mask(".. ..")}
    found = analysis.overlap(a, b)
    assert (found.leaves["x"].iou, found.leaves["x"].hamming) == (1 / 4, 3 / 8)
    assert (found.leaves["y"].iou, found.leaves["y"].hamming) == (0.0, 1.0)
    assert (found.total.iou, found.total.hamming) == (1 / 8, 7 / 12)
    none = analysis.overlap({"y": mask(".. ..")}, {"y": mask(".. ..")})
    assert none.total == none.leaves["y"] == (1.0, 1.0, 0.0)


@hypothesis.given(pairs())
def test_overlap_is_that_of_sets(given: Any) -> None:
    a, b = given
    found = analysis.overlap(granet_jax.pack_masks(jax.tree.map(jnp.asarray, a)), b)
    sets = [
        {(name, i) for name, m in tree.items() for i in np.flatnonzero(m)}
        for tree in (a, b)
    ]
    union, both = sets[0] | sets[1], sets[0] & sets[1]
    size = sum(m.size for m in a.values())
    assert found.total.iou == (len(both) / len(union) if union else 1.0)
    assert found.total.hamming == len(sets[0] ^ sets[1]) / size
    assert 0 <= found.total.chance <= 1
    back = analysis.overlap(b, a)
    assert back.total[::2] == found.total[::2]
    assert back.total.chance == pytest.approx(found.total.chance, rel=1e-12)
    same = analysis.overlap(a, a)
    assert (same.total.iou, same.total.hamming) == (1.0, 0.0)


def enumerated(size: int, first: int, second: int) -> Fraction:
    """Mean IoU over every mask of `second` weights, beside the first `first`."""
    fixed = set(range(first))
    values = [
        Fraction(len(fixed & set(other)), len(fixed | set(other)))
        for other in itertools.combinations(range(size), second)
    ]
    return sum(values, Fraction()) / len(values)


def test_chance_of_small_masks_is_exact() -> None:
    for size, first, second in itertools.product(range(1, 8), range(8), range(8)):
        if first <= size and second <= size and first + second:
            expected = float(enumerated(size, first, second))
            found = analysis.chance_iou(size, first, second)
            assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert analysis.chance_iou(5, 0, 0) == analysis.chance_iou(0, 0, 0) == 1.0


def test_chance_of_large_masks() -> None:
    # p q / (p + q - p q), but for terms in 1 / n.
    n = 25_000_000
    found = analysis.chance_iou(n, n // 10, n // 5)
    assert found == pytest.approx(0.02 / 0.28, rel=1e-6)
    # A sum over all 20,001 intersections by logarithms of factorials.
    n, a, b = 60_000, 30_000, 20_000

    def log_binomial(m: int, k: int) -> float:
        return math.lgamma(m + 1) - math.lgamma(k + 1) - math.lgamma(m - k + 1)

    expected = sum(
        i
        / (a + b - i)
        * math.exp(log_binomial(a, i) + log_binomial(n - a, b - i) - log_binomial(n, b))
        for i in range(b + 1)
    )
    assert analysis.chance_iou(n, a, b) == pytest.approx(expected, rel=1e-9)


def test_chance_of_all_leaves_is_that_of_a_simulation() -> None:
    rng = np.random.default_rng(0)
    counts = [((6, 8), 24, 12), ((5, 4), 3, 15)]

    def draw() -> tuple[dict[str, np.ndarray], ...]:
        drawn: tuple[dict[str, np.ndarray], ...] = ({}, {})
        for i, (shape, *numbers) in enumerate(counts):
            for tree, number in zip(drawn, numbers, strict=True):
                flat = np.arange(math.prod(shape)) < number
                tree[str(i)] = rng.permutation(flat).reshape(shape)
        return drawn

    found = analysis.overlap(*draw())
    assert found.leaves["0"].chance == analysis.chance_iou(48, 24, 12)
    ious = []
    for _ in range(4000):
        a, b = draw()
        both = sum(int((a[k] & b[k]).sum()) for k in a)
        ious.append(both / (27 + 27 - both))
    error = np.std(ious) / np.sqrt(len(ious))
    assert abs(np.mean(ious) - found.total.chance) < 4 * error
    assert error < 0.001  # So that the line above means something.


@pytest.mark.parametrize("given", [(4, 5, 1), (4, 1, -1)])
def test_chance_of_nonsense(given: Any) -> None:
    with pytest.raises(ValueError, match="from 0 to size"):
        analysis.chance_iou(*given)


# --- churn and exploration


def test_churn_by_hand() -> None:
    before = {"x": mask("***. ...."), "y": mask("** ..")}
    after = {"x": mask("*..* *..*"), "y": mask(".. ..")}
    found = analysis.churn(before, after)
    assert found.leaves["x"] == (2 / 3, 3 / 4)
    assert found.leaves["y"] == (1.0, 0.0)
    assert found.total == (4 / 5, 3 / 4)


@hypothesis.given(pairs())
def test_churn_keeps_the_books(given: Any) -> None:
    before, after = given
    found = analysis.churn(before, after).total
    n, m = (sum(int(x.sum()) for x in tree.values()) for tree in given)
    # What was there, without what went and with what came, is what is there.
    assert n * (1 - found.dropped) == pytest.approx(m * (1 - found.grown))
    assert analysis.churn(after, before).total == found[::-1]


def test_an_exchange_drops_and_grows_alike() -> None:
    params = trees.parameters()
    method = granet_jax.rigl(0.75, 8, interval=2, stop=1.0)
    tx = granet_jax.transform(method, optax.sgd(0.125))
    state = tx.init(params)
    update = jax.jit(tx.update)
    history = [granet_jax.get_masks(state)]
    for step in range(4):
        updates, state = update(trees.gradients(step), state, params)
        params = optax.apply_updates(params, updates)
        history.append(granet_jax.get_masks(state))
    assert analysis.churn(history[0], history[1]).total == (0.0, 0.0)
    changed = analysis.churn(history[1], history[2])
    for leaf in (changed.total, *changed.leaves.values()):
        assert leaf.dropped == leaf.grown
    assert 0 < changed.total.grown <= 0.3
    ever = jax.tree.map(lambda *m: np.any(m, axis=0), *history)
    active = sum(int(m.sum()) for m in jax.tree.leaves(ever))
    found = analysis.exploration(iter(history))
    assert found.total == active / trees.MASKABLE > 0.25
    assert set(found.leaves) == {"conv/kernel", "dense/kernel"}


def test_exploration_by_hand() -> None:
    masks = [mask("*... ...."), mask(".*.. *..."), mask("*... ....")]
    history = [{"x": m} for m in masks]
    kept = [m.copy() for m in masks]
    found = analysis.exploration(history)
    assert (found.total, found.leaves) == (3 / 8, {"x": 3 / 8})
    for after, before in zip(masks, kept, strict=True):
        np.testing.assert_array_equal(after, before)


def test_exploration_over_time_is_that_of_every_beginning() -> None:
    rng = np.random.default_rng(0)
    # Out of order: steps are, whatever the order they were kept in.
    history = {
        step: {"x": rng.random((5, 6)) < 0.2, "y": rng.random((3, 2)) < 0.3}
        for step in (40, 0, 10, 20)
    }
    found = analysis.exploration_over_time(history)
    assert [*found] == [0, 10, 20, 40]
    for step, rate in found.items():
        before = [masks for t, masks in history.items() if t <= step]
        assert rate == analysis.exploration(before)
    shares = [rate.total for rate in found.values()]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1] < 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, b: analysis.exploration_over_time({}), "got none"),
        (
            lambda a, b: analysis.exploration_over_time({0: a, 5: b}),
            "the first masks of history",
        ),
        (lambda a, b: analysis.overlap(a, b), "a and b must be masks of the same"),
        (lambda a, b: analysis.churn(a, b), "before and after must be"),
        (lambda a, b: analysis.exploration([a, b]), "the first masks of history"),
        (lambda a, b: analysis.exploration([]), "got none"),
        (lambda a, b: analysis.churn({}, b), "holds no mask"),
    ],
)
def test_masks_must_be_of_the_same_leaves(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call({"x": mask("** ..")}, {"x": mask("**. ...")})


# --- units and paths


def test_units_of_a_dense_layer() -> None:
    first = mask("*.*. ..*. *...")
    np.testing.assert_array_equal(analysis.channel_density(first), [2 / 3, 0, 2 / 3, 0])
    assert analysis.dead_units(first).tolist() == [False, True, False, True]
    following = mask(".. ** *. .*")
    # The first is read by no one.
    assert analysis.dead_units(first, following).tolist() == [True, True, False, True]


def test_units_of_a_convolution() -> None:
    kernel = np.zeros((3, 3, 2, 3), bool)
    kernel[1, 2, 0, 0] = kernel[0, 0, 1, 2] = kernel[2, 2, 1, 2] = True
    np.testing.assert_allclose(analysis.channel_density(kernel), [1 / 18, 0, 2 / 18])
    assert analysis.dead_units(kernel).tolist() == [False, True, False]
    # Flattened: two positions of three channels each.
    dense = mask(".. .* .. .. .. *.")
    assert analysis.dead_units(kernel, dense).tolist() == [True, True, False]
    # Depthwise: one filter a channel.
    depthwise = np.zeros((3, 3, 1, 3), bool)
    depthwise[0, 0, 0, 0] = True
    assert analysis.dead_units(kernel, depthwise).tolist() == [False, True, True]


def test_paths_by_hand() -> None:
    chain = [mask("**.. ...*"), mask("*.. ..* *.. ..."), mask("*. .* ..")]
    found = analysis.connectivity(chain)
    # Input 1 leads to unit 3, which leads nowhere; unit 2 has no input; unit 1 of the
    # first layer leads to unit 2 of the next, which has no output.
    assert [u.tolist() for u in found.units] == [
        [True, False],
        [True, False, False, False],
        [True, False, False],
        [True, False],
    ]
    assert (found.active, found.effective) == ([3, 3, 2], [1, 1, 1])
    assert not found.connected
    assert analysis.connectivity(chain[:1]).effective == [3]


def paths(chain: list[np.ndarray]) -> list[set[tuple[int, int]]]:
    """Weights (input, output) of every layer on some path, all paths walked."""
    used: list[set[tuple[int, int]]] = [set() for _ in chain]
    sizes = [range(chain[0].shape[0]), *(range(m.shape[1]) for m in chain)]
    for path in itertools.product(*sizes):
        steps = [*itertools.pairwise(path)]
        if all(m[step] for m, step in zip(chain, steps, strict=True)):
            for layer, step in zip(used, steps, strict=True):
                layer.add(step)
    return used


@hypothesis.given(st.integers(0, 10**6), st.sampled_from([0.2, 0.4, 0.7]))
def test_paths_are_all_paths(seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, size=4)
    chain = [rng.random(shape) < density for shape in itertools.pairwise(sizes)]
    found = analysis.connectivity(chain)
    used = paths(chain)
    assert found.effective == [len(layer) for layer in used]
    assert found.active == [int(m.sum()) for m in chain]
    reached = {j for _, j in used[-1]}
    assert found.units[-1].tolist() == [j in reached for j in range(sizes[-1])]
    assert found.connected == (len(reached) == sizes[-1])


@hypothesis.given(st.integers(0, 10**6))
def test_paths_through_groups_and_positions(seed: int) -> None:
    """A network of convolutions, as the dense one that it is."""
    rng = np.random.default_rng(seed)
    first = rng.random((2, 2, 3, 4)) < 0.2
    grouped = rng.random((2, 2, 2, 6)) < 0.2  # Two groups: of 2 channels, to 3 each.
    last = rng.random((3 * 6, 2)) < 0.1  # Three positions of 6 channels.
    wide = np.zeros((4, 6), bool)
    wide[:2, :3] = grouped[..., :3].any((0, 1))
    wide[2:, 3:] = grouped[..., 3:].any((0, 1))
    dense = [first.any((0, 1)), wide, last.reshape(3, 6, 2).any(0)]
    found = analysis.connectivity([first, grouped, last])
    expected = analysis.connectivity(dense)
    for a, b in zip(found.units, expected.units, strict=True):
        np.testing.assert_array_equal(a, b)
    useful = paths(dense)
    assert found.effective == [
        sum(int(first[:, :, i, j].sum()) for i, j in useful[0]),
        sum(int(grouped[:, :, i % 2, j].sum()) for i, j in useful[1]),
        sum(int(last[i::6, j].sum()) for i, j in useful[2]),
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: analysis.connectivity([]), "got none"),
        (
            lambda: analysis.connectivity([mask("** **"), mask("* * *")]),
            r"chain\[1\] must follow 2 units, got shape \(3, 1\)",
        ),
        (lambda: analysis.dead_units(np.ones(3, bool)), r"got shape \(3,\)"),
        (
            lambda: analysis.dead_units(np.ones((2, 4), bool), np.ones((2, 3), bool)),
            "must follow 4 units",
        ),
    ],
)
def test_units_of_nonsense(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- gradient flow


def test_gradient_flow_is_what_a_step_gains() -> None:
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
    # The slope of the loss along the step, without the bias, which has no mask.
    p = trees.parameters()
    masked = granet_jax.apply_masks(p, masks)

    def loss(q: Any) -> Any:
        return 0.5 * jnp.sum(jnp.square(q["dense"]["kernel"] - 1))

    g = jax.grad(loss)(masked)
    direction = granet_jax.apply_masks(g, masks)["dense"]["kernel"]
    _, slope = jax.jvp(
        lambda k: loss({"dense": {"kernel": k}}),
        (masked["dense"]["kernel"],),
        (direction,),
    )
    flow = analysis.gradient_flow(g, masks).leaves["dense/kernel"]
    assert float(flow) == pytest.approx(float(slope), rel=1e-5)


# --- sharpness


@pytest.mark.parametrize("top", [9.0, -9.0])
def test_sharpness_is_the_eigenvalue_of_what_is_trained(top: float) -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((4, 5)) < 0.5
    free = np.concatenate([np.ones(3, bool), mask.reshape(-1)])
    # A quadratic. Its largest curvature of all is along pruned weights; among the
    # others it is `top`, along a direction of both leaves.
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
    masks = granet_jax.pack_masks({"b": None, "w": jnp.asarray(mask)})

    @jax.jit
    def found(masks: Any, matrix: Any) -> Any:
        return analysis.sharpness(loss, params, masks, matrix, iterations=40)

    matrix = jnp.asarray(hessian, jnp.float32)
    assert float(found(masks, matrix)) == pytest.approx(top, rel=1e-4)
    none = granet_jax.pack_masks({"b": None, "w": jnp.zeros((4, 5), bool)})
    among = np.linalg.eigvalsh(hessian[:3, :3])
    assert float(found(none, matrix)) == pytest.approx(max(among, key=abs), rel=1e-3)
    assert float(found(masks, jnp.zeros((23, 23)))) == 0


def test_sharpness_of_nonsense() -> None:
    call = functools.partial(analysis.sharpness, lambda p, _: jnp.sum(p["w"]))
    w = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        call(w, w, None, iterations=0)
    with pytest.raises(ValueError, match="structure"):
        call(w, {"v": jnp.ones((2, 2))}, None)


# --- summary


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

    costs = analysis.flops(f, PARAMS, MASKS, jnp.ones((3, 4)))
    found = analysis.summary(PARAMS, MASKS, costs)
    names = [record["path"] for record in found.records]
    assert names == ["a/bias", "a/kernel", "b/0"]
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
    assert found.records[0]["sparsity"] == 0
    assert found.records[0]["masked"] is False
    assert (found.masked["weights"], found.masked["active"]) == (30, 7)
    assert (found.total["weights"], found.total["active"]) == (35, 12)
    assert found.total["flops"] == 2 * 3 * 7
    assert found.masked["sparsity"] == pytest.approx(23 / 30)
    assert sum(record["share"] for record in found.records) == pytest.approx(1)
    report = granet_jax.sparsity(MASKS)
    assert report.overall == found.masked["sparsity"]


def test_summary_as_text() -> None:
    lines = str(analysis.summary(PARAMS, MASKS)).splitlines()
    assert [line.split()[0] for line in lines] == [
        "parameter",
        "-" * max(map(len, lines)),
        "a/bias",
        "a/kernel",
        "b/0",
        "-" * max(map(len, lines)),
        "with",
        "all",
    ]
    assert lines[3].split() == ["a/kernel", "4", "x", "5", "20", "5", "75.00", "41.67"]
    assert lines[2].split() == ["a/bias", "5", "5", "dense", "41.67"]
    console = rich.console.Console(width=80, record=True, file=io.StringIO())
    console.print(analysis.summary(PARAMS, MASKS))
    text = console.export_text()
    for line in lines:
        if not line.startswith("-"):
            assert [w for w in line.split() if w in text] == line.split()


def test_records_make_a_table_of_packed_masks() -> None:
    packed = granet_jax.pack_masks(
        {
            "a": {"kernel": jnp.asarray(MASKS["a"]["kernel"]), "bias": None},
            "b": [jnp.asarray(MASKS["b"][0])],
        }
    )
    found = analysis.summary(PARAMS, packed)
    assert found == analysis.summary(PARAMS, MASKS)
    assert len({tuple(record) for record in found.records}) == 1


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"a": {"kernel": np.ones((5, 4), bool)}}, r"shape \(5, 4\) at 'a/kernel'"),
        ({"c": np.ones((5, 4), bool)}, r"\['c'\], which params has not"),
        ({"a": None}, "holds no mask"),
    ],
)
def test_summary_of_masks_that_do_not_fit(masks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        analysis.summary(PARAMS, masks)


def test_summary_of_flops_of_others() -> None:
    w = {"w": jnp.ones((4, 4))}
    costs = analysis.flops(lambda p, x: x @ p["w"], w, None, jnp.ones((1, 4)))
    half = {"w": np.arange(16).reshape(4, 4) % 2 == 0}
    with pytest.raises(ValueError, match=r"16 active weights at 'w', which has 8"):
        analysis.summary(w, half, costs)
    with pytest.raises(ValueError, match="flops must be of the leaves"):
        analysis.summary(PARAMS, MASKS, costs)
