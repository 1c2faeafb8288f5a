"""Structures against NumPy's sort: alone, in methods, and in mask sources."""

from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from granet_jax.keys import sort_keys
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import granet_jax
from granet_jax import distributions, mask_sources, scores, structures
from granet_jax.structures import Structure
from tests.helpers.trees import assert_same
from tests.methods.test_cyclic import QUICK

SHAPES = {"conv": (3, 3, 8, 4), "dense": (16, 6)}


def draw(seed: int) -> dict[str, np.ndarray]:
    """Few values, so that scores tie."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.integers(-6, 7, shape) / 8).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def boxes(x: np.ndarray, box: tuple[int, ...]) -> np.ndarray:
    """(boxes along each axis..., weights of a box), by hand."""
    grid = [n // b for n, b in zip(x.shape, box, strict=True)]
    return np.stack(
        [
            x[tuple(slice(g * b, (g + 1) * b) for g, b in zip(at, box, strict=True))]
            for at in np.ndindex(*grid)
        ]
    ).reshape(*grid, -1)


def sums(masks: dict[str, Any], box: Callable[[Any], Any]) -> dict[str, np.ndarray]:
    return {
        name: boxes(np.asarray(m), box(m.shape)).sum(axis=-1)
        for name, m in masks.items()
    }


def best_of_boxes(score: np.ndarray, box: tuple[int, ...], n: int) -> np.ndarray:
    """The n best of every box, by a stable sort, as boxes are listed."""
    flat = boxes(score, box)
    order = np.argsort(np.argsort(-flat, axis=-1, kind="stable"), axis=-1)
    return order < n


@hypothesis.given(
    st.sampled_from([(1, 2), (1, 4), (2, 4), (4, 8), (0, 4), (5, 4)]),
    st.sampled_from([(8, 3), (3, 3, 8, 2), (2, 8, 8)]),
    st.integers(0, 10**6),
    st.data(),
)
@hypothesis.settings(max_examples=12)
def test_best_of_every_group(numbers, shape, seed, data) -> None:
    n, m = numbers
    axis = data.draw(
        st.sampled_from([i for i in range(-len(shape), 0) if not shape[i] % m])
    )
    structure = structures.n_of_m(1, m, axis=axis)
    rng = np.random.default_rng(seed)
    score = (rng.integers(-4, 5, shape) / 4).astype(np.float32)
    (best,) = structures.select(structure, [jnp.asarray(score)], [n], scope="layer")
    box = structure.box(shape)
    expected = best_of_boxes(score, box, n)
    np.testing.assert_array_equal(boxes(np.asarray(best), box), expected)


@hypothesis.given(st.integers(0, 40), st.integers(0, 10**6))
@hypothesis.settings(max_examples=8)
def test_best_of_every_unit(n, seed) -> None:
    # By bisection: ties, NaN, and fewer candidates than asked for.
    rng = np.random.default_rng(seed)
    score = (rng.integers(-3, 4, (3, 3, 4, 5)) / 2).astype(np.float32)
    score[rng.random(score.shape) < 0.1] = np.nan
    among = rng.random(score.shape) < 0.8
    structure = structures.constant_fan_in()
    (best,) = structures.select(
        structure, [jnp.asarray(score)], [n], among=[jnp.asarray(among)], scope="layer"
    )
    ranked = np.where(np.isnan(score), -1e9, score)
    ranked = np.where(among, ranked, -2e9)
    box = (3, 3, 4, 1)
    expected = best_of_boxes(ranked, box, n) & boxes(among, box)
    np.testing.assert_array_equal(boxes(np.asarray(best), box), expected)


@pytest.mark.parametrize("norm", structures.NORMS)
@pytest.mark.parametrize("kind", ["block", "channel"])
def test_whole_boxes_across_leaves(kind: str, norm: Any) -> None:
    structure = (
        structures.block(4, 2, norm=norm)
        if kind == "block"
        else structures.channel(norm=norm)
    )
    params = draw(3)
    masks = mask_sources.magnitude(params, 0.6, structure=structure)
    size, found, active = {}, [], []
    for name, p in params.items():
        box = structure.box(p.shape)
        parts = boxes(np.abs(p).astype(np.float64), box)
        size[name] = parts.shape[-1]
        means = parts if norm == "l1" else parts**2
        found.append(means.mean(axis=-1).ravel())
        active.append(boxes(np.asarray(masks[name]), box))
        assert np.all(np.isin(active[-1].sum(axis=-1), (0, size[name])))
    score = np.concatenate(found)
    chosen = np.concatenate([a.any(axis=-1).ravel() for a in active])
    assert chosen.sum() == distributions.total_count(score.size, 0.6)
    # No box that is pruned is better than one that is kept (but for rounding).
    assert score[chosen].min() >= score[~chosen].max() - 1e-6


METHODS: dict[str, tuple[granet_jax.Method, dict[int, dict[str, int]]]] = {
    # What every box, or the boxes of each leaf, have after some steps.
    "gmp 1:4": (
        granet_jax.gmp(
            0.75, 4, interval=2, scope="layer", structure=structures.n_of_m(1, 4)
        ),
        # One of four already after the first of two prunings: 0.34 of them.
        {1: {"conv": 4, "dense": 4}, 2: {"conv": 1, "dense": 1}},
    ),
    "SR-STE 2:4": (
        granet_jax.straight_through(
            0.5, 1, interval=1, penalty=0.25, structure=structures.n_of_m(2, 4)
        ),
        {1: {"conv": 2, "dense": 2}},
    ),
    "rigl fan-in": (
        granet_jax.rigl(
            0.75,
            8,
            interval=1,
            fraction=0.5,
            distribution="uniform",
            structure=structures.constant_fan_in(),
        ),
        {0: {"conv": 18, "dense": 4}},
    ),
    "granet fan-in": (
        granet_jax.granet(
            0.75,
            4,
            interval=1,
            end_step=2,
            fraction=0.5,
            scope="layer",
            distribution="uniform",
            structure=structures.constant_fan_in(),
        ),
        # 1 - 0.75 * (1 - 1/8) = 0.34 of 72 and of 16 inputs.
        {
            0: {"conv": 72, "dense": 16},
            1: {"conv": 25, "dense": 6},
            2: {"conv": 18, "dense": 4},
        },
    ),
    "cyclical 4:8": (
        granet_jax.cyclical(
            0.5,
            4,
            cycles=2,
            ramp=0.5,
            interval=1,
            scope="layer",
            structure=structures.n_of_m(4, 8),
        ),
        {
            0: {"conv": 8, "dense": 8},
            1: {"conv": 4, "dense": 4},
            2: {"conv": 8, "dense": 8},
            3: {"conv": 4, "dense": 4},
        },
    ),
    "AC/DC 2:4": (
        granet_jax.acdc(
            0.5,
            (1, 2, 3),
            scope="layer",
            structure=structures.n_of_m(2, 4),
        ),
        {
            0: {"conv": 4, "dense": 4},
            1: {"conv": 2, "dense": 2},
            2: {"conv": 4, "dense": 4},
            3: {"conv": 2, "dense": 2},
        },
    ),
    "SCULPT 1:4": (
        granet_jax.sculpt(
            0.75,
            4,
            cycles=1,
            initial_sparsity=0.5,
            scope="layer",
            distribution="uniform",
            structure=structures.n_of_m(1, 4),
        ),
        {0: {"conv": 2, "dense": 2}, 2: {"conv": 1, "dense": 1}},
    ),
}


def run(method: granet_jax.Method, steps: int = 4) -> Any:
    """Yields params, masks and moments before and after every step."""
    tx = granet_jax.transform(method, optax.sgd(0.25, momentum=0.5), seed=3)
    params: Any = draw(0)
    state: Any = tx.init(params)
    if method.weights == "sparse":
        params = granet_jax.apply_masks(params, state.masks)
    update = jax.jit(tx.update, compiler_options=QUICK)
    for t in range(steps + 1):
        yield t, jax.device_get((params, state))
        updates, state = update(draw(t + 10), state, params)
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("name", METHODS)
def test_equal_numbers_in_methods(name: str) -> None:
    method, expected = METHODS[name]
    structure = method.structure
    assert structure is not None
    now = None
    changed = False
    before: Any = None
    for t, (params, state) in run(method):
        now = expected.get(t, now)
        found = sums(state.masks, structure.box)
        if now is not None:
            for leaf, number in found.items():
                assert set(number.ravel()) == {now[leaf]}, (t, leaf)
        for leaf, mask in state.masks.items():
            if method.weights == "sparse":
                assert not np.any(params[leaf][~mask])
                trace = state.inner_state[0].trace[leaf]
                assert not np.any(trace[~mask])
                if before is not None:
                    entered = mask & ~before[leaf]
                    assert not np.any(params[leaf][entered])
                    assert not np.any(trace[entered])
            elif t:
                box = structure.box(mask.shape)
                best = best_of_boxes(np.abs(params[leaf]), box, found[leaf].flat[0])
                np.testing.assert_array_equal(boxes(mask, box), best)
            if before is not None:
                changed |= bool(np.any(mask != before[leaf]))
        before = state.masks
    assert changed


@pytest.mark.parametrize(
    ("method", "initial", "final"),
    [
        (
            granet_jax.rigl(
                0.75, 8, interval=1, fraction=0.5, structure=structures.block(4, 1)
            ),
            0.25,
            0.25,
        ),
        (
            granet_jax.granet(
                0.75, 4, interval=1, end_step=2, structure=structures.block(2, 2)
            ),
            1.0,
            0.25,
        ),
        # Redistributed across layers in whole blocks.
        (
            granet_jax.snfs(
                0.5, 8, interval=1, fraction=0.5, structure=structures.block(2, 2)
            ),
            0.5,
            0.5,
        ),
    ],
)
def test_blocks_in_methods(
    method: granet_jax.Method, initial: float, final: float
) -> None:
    structure = method.structure
    assert structure is not None
    total = sum(np.prod(s) for s in SHAPES.values()) // 4
    previous = None
    changed = False
    for t, (params, state) in run(method):
        found = sums(state.masks, structure.box)
        numbers = np.concatenate([n.ravel() for n in found.values()])
        assert set(numbers) <= {0, 4}
        share = initial if t == 0 else final
        if t in (0, 2, 3, 4):
            # ERK's densities are rounded leaf by leaf, where the masks are drawn.
            assert abs((numbers > 0).sum() - share * total) <= len(SHAPES) / 2
        for leaf, mask in state.masks.items():
            assert not np.any(params[leaf][~mask])
            if previous is not None:
                entered = mask & ~previous[leaf]
                assert not np.any(params[leaf][entered])
                changed |= bool(np.any(entered))
        previous = state.masks
    assert changed


@pytest.mark.parametrize(
    "method",
    [
        METHODS["granet fan-in"][0],
        METHODS["SR-STE 2:4"][0],
        granet_jax.snfs(0.5, 8, interval=1, structure=structures.block(2, 2)),
    ],
    ids=lambda m: m.name,
)
def test_lanes_of_vmap_are_as_alone(method: granet_jax.Method) -> None:
    tx = granet_jax.transform(method, optax.sgd(0.25, momentum=0.5))

    def train(params: Any, grads: Any) -> Any:
        state: Any = tx.init(params)
        for grad in grads:
            updates, state = tx.update(grad, state, params)
            params = optax.apply_updates(params, updates)
        return params, state.masks

    params = [draw(seed) for seed in (0, 1)]
    grads = [[draw(seed) for seed in row] for row in ((2, 3), (4, 5))]
    stacked = jax.tree.map(lambda *x: np.stack(x), *zip(params, grads, strict=True))
    lanes = jax.jit(jax.vmap(train), compiler_options=QUICK)(*stacked)
    alone = jax.jit(train, compiler_options=QUICK)
    for i, (start, row) in enumerate(zip(params, grads, strict=True)):
        # No multiple of a power of two is rounded, so that equal means to the bit.
        assert_same(jax.tree.map(lambda x, i=i: x[i], lanes), alone(start, row))


def test_units_of_top_kast_and_greg() -> None:
    structure = structures.channel()
    params = draw(0)
    for method, active, marked in (
        (
            granet_jax.top_kast(0.5, backward_sparsity=0.25, structure=structure),
            (2, 3),
            (3, 5),
        ),
        (
            granet_jax.greg1(0.5, interval=1, growth=1.0, structure=structure),
            (4, 6),
            (2, 3),
        ),
    ):
        state: Any = granet_jax.transform(method, optax.sgd(0.1)).init(params)
        for masks, expected in ((state.masks, active), (state.marked, marked)):
            found = sums(masks, structure.box)
            assert set(found["conv"].ravel()) <= {0, 72}
            assert (found["conv"] > 0).sum() == expected[0]
            assert (found["dense"] > 0).sum() == expected[1]


@pytest.mark.parametrize("kind", list(AxisType)[:2], ids=str)
@pytest.mark.parametrize(
    "structure",
    [
        structures.block(2, 2),
        structures.n_of_m(2, 4),
        # Boxes larger than the shard of a device.
        structures.n_of_m(8, 16),
        structures.constant_fan_in(),
        structures.channel(),
    ],
    ids=lambda s: s.name,
)
def test_on_eight_devices_as_on_one(structure: Structure, kind: AxisType) -> None:
    method = granet_jax.rigl(
        0.5, 8, interval=1, distribution="uniform", structure=structure
    )
    shapes = {"conv": (3, 3, 16, 8), "dense": (32, 16)}
    specs = {"conv": P(None, None, "x", "y"), "dense": P("x", "y")}
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    layout = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    rng = np.random.default_rng(0)
    drawn = [
        {
            name: (rng.integers(-6, 7, shape) / 8).astype(np.float32)
            for name, shape in shapes.items()
        }
        for _ in range(5)
    ]

    def trained(put: Callable[[Any], Any]) -> Any:
        tx = granet_jax.transform(method, optax.sgd(0.25, momentum=0.5))
        update = jax.jit(tx.update, compiler_options=QUICK)
        params: Any = put(drawn[0])
        state: Any = tx.init(params)
        for grads in drawn[1:]:
            updates, state = jax.block_until_ready(update(put(grads), state, params))
            params = optax.apply_updates(params, updates)
        # Given masks of the structure are looked at and taken.
        granet_jax.transform(method, masks=state.masks).init(params)
        return params, state.masks

    alone = trained(lambda tree: jax.tree.map(jnp.asarray, tree))
    shared = trained(lambda tree: jax.device_put(tree, layout))
    assert shared[1]["dense"].sharding.is_equivalent_to(layout["dense"], 2)
    assert not np.all(alone[1]["dense"])
    assert_same(jax.device_get(shared), jax.device_get(alone))


@pytest.mark.parametrize("norm", structures.NORMS)
def test_whole_boxes_within_leaves(norm: Any) -> None:
    structure = structures.block(2, 2, norm=norm)
    params = draw(5)
    masks = mask_sources.magnitude(params, 0.6, scope="layer", structure=structure)
    for name, p in params.items():
        box = structure.box(p.shape)
        parts = boxes(np.abs(p).astype(np.float64), box)
        chosen = boxes(np.asarray(masks[name]), box)
        assert np.all(np.isin(chosen.sum(axis=-1), (0, 4)))
        kept = chosen.any(axis=-1)
        # Of each leaf the nearest number of boxes.
        assert abs(kept.sum() - 0.4 * kept.size) <= 0.5
        score = (parts if norm == "l1" else parts**2).mean(axis=-1)
        assert score[kept].min() >= score[~kept].max() - 1e-6


@pytest.mark.parametrize(
    "structure",
    [
        structures.n_of_m(2, 4),
        structures.n_of_m(1, 2, axis=-1),
        structures.constant_fan_in(),
        structures.channel(),
        structures.block(2, 2),
    ],
    ids=lambda s: s.name,
)
def test_random_masks(structure: Structure) -> None:
    method = granet_jax.static(0.5, distribution="uniform", structure=structure)
    masks = granet_jax.init_masks(method, draw(0), seed=1)
    other = granet_jax.init_masks(method, draw(0), seed=2)
    drawn = mask_sources.random(
        draw(0),
        0.5,
        key=jax.random.key(0),
        distribution="uniform",
        structure=structure,
    )
    for found in (masks, drawn):
        for name, m in found.items():
            assert np.sum(m) == np.prod(SHAPES[name]) // 2
            numbers = sums(found, structure.box)[name]
            size = int(np.prod(structure.box(m.shape)))
            allowed = {0, size} if structure.whole else {size // 2}
            assert set(numbers.ravel()) == allowed
    assert any(np.any(masks[name] != other[name]) for name in masks)
    # Given masks are looked at.
    granet_jax.transform(method, masks=drawn).init(draw(0))
    spoilt = {**drawn, "dense": drawn["dense"].at[0, 0].set(~drawn["dense"][0, 0])}
    with pytest.raises(ValueError, match="masks must have the structure"):
        granet_jax.transform(method, masks=spoilt).init(draw(0))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: structures.n_of_m(4, 4), ValueError, "n must be at least 1 and below"),
        (lambda: structures.n_of_m(0, 4), ValueError, "n must be at least 1 and below"),
        (lambda: structures.n_of_m(2.0, 4), TypeError, "n must be an integer"),  # pyright: ignore
        (lambda: structures.n_of_m(1, True), TypeError, "m must be an integer"),
        (lambda: structures.block(), ValueError, "shape must be of positive sides"),
        (lambda: structures.block(4, 0), ValueError, "shape must be of positive sides"),
        (lambda: structures.channel(norm="l3"), ValueError, "norm must be"),  # pyright: ignore
        (
            lambda: granet_jax.gmp(0.5, 1000, structure=structures.n_of_m(2, 4)),
            ValueError,
            'scope must be "layer" with 2:4',
        ),
        (
            lambda: granet_jax.static(0.9, structure=structures.n_of_m(2, 4)),
            ValueError,
            "sparsity must end at 0.5 for 2:4",
        ),
        (
            lambda: granet_jax.static(0.5, structure=structures.n_of_m(2, 4)),
            ValueError,
            'distribution must be "uniform" for 2:4',
        ),
        (
            lambda: granet_jax.snfs(0.5, 1000, structure=structures.constant_fan_in()),
            ValueError,
            "structure must be None, block or channel for snfs",
        ),
        (
            lambda: granet_jax.static(0.5, structure="channel"),  # pyright: ignore
            TypeError,
            "structure must be one of granet_jax.structures",
        ),
        (
            lambda: mask_sources.magnitude(
                draw(0), 0.5, structure=structures.constant_fan_in()
            ),
            ValueError,
            'scope must be "layer"',
        ),
    ],
)
def test_bad_arguments(build, error, message) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    "structure",
    [structures.n_of_m(1, 4), structures.n_of_m(1, 4, axis=2), structures.block(4, 1)],
)
def test_shapes_that_do_not_divide(structure: Structure) -> None:
    params = {"head": {"kernel": np.ones((6, 8), np.float32)}}
    method = granet_jax.static(0.75, distribution="uniform", structure=structure)
    message = r"'head/kernel' has shape \(6, 8\): leave it out"
    with pytest.raises(ValueError, match=message):
        granet_jax.transform(method).init(params)
    with pytest.raises(ValueError, match=message):
        mask_sources.magnitude(params, 0.75, scope="layer", structure=structure)


def test_fill_takes_the_best_of_the_inactive() -> None:
    structure = structures.n_of_m(2, 4)
    mask = jnp.asarray([[True], [False], [False], [False]])
    score = jnp.asarray([[0.0], [1.0], [2.0], [2.0]])
    (filled,) = structures.fill(structure, [mask], [score], jnp.asarray([2]))
    assert filled.ravel().tolist() == [True, False, True, False]


def test_keys_of_every_dtype_share_the_search() -> None:
    # bfloat16 bisects in half as many passes.
    rng = np.random.default_rng(0)
    score = jnp.asarray(rng.integers(-9, 9, (64, 3)), jnp.bfloat16)
    structure = structures.constant_fan_in()
    assert sort_keys([score])[0].dtype == jnp.int16
    (best,) = structures.select(structure, [score], [7], scope="layer")
    wide = np.asarray(score, np.float32)
    expected = best_of_boxes(wide, (64, 1), 7)
    np.testing.assert_array_equal(boxes(np.asarray(best), (64, 1)), expected)
    integers = scores.random(
        granet_jax.ScoreInputs(score, None, score > 0, None, jax.random.key(0))
    )
    (best,) = structures.select(structure, [integers], [7], scope="layer")
    expected = best_of_boxes(np.asarray(integers, np.int64), (64, 1), 7)
    np.testing.assert_array_equal(boxes(np.asarray(best), (64, 1)), expected)
