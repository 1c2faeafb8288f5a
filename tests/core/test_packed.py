"""States with masks at one bit a weight: every run as with masks of one byte."""

import functools
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import granet_jax
from granet_jax import structures
from tests.core.test_sharding import (
    LAYOUTS,
    collectives,
    make_params,
    make_step,
    mean_grads,
)
from tests.core.test_sharding import SHAPES as LEAVES
from tests.helpers.trees import assert_same
from tests.methods.test_cyclic import QUICK, SHAPES, draw

SGD = optax.sgd(0.25, momentum=0.5)
# Every part of a method that holds masks, or makes them; and the way of optimizers that
# look at more than one weight at a time.
RUNS: dict[str, tuple[granet_jax.Method, optax.GradientTransformation | None]] = {
    "granet": (granet_jax.granet(0.75, 8, interval=2, end_step=6), SGD),
    "granet, lamb": (granet_jax.granet(0.75, 8, interval=2, end_step=6), optax.lamb(1)),
    "granet, last link": (granet_jax.granet(0.75, 8, interval=2, end_step=6), None),
    "gmp": (granet_jax.gmp(0.75, 8, interval=2), SGD),
    "gmp, lamb": (granet_jax.gmp(0.75, 8, interval=2), optax.lamb(1)),
    "snfs": (granet_jax.snfs(0.75, 8, interval=2, decay=0.5), SGD),
    "static": (granet_jax.static(0.75), SGD),
    "acdc": (granet_jax.acdc(0.75, (2, 4, 6)), SGD),
    "cyclical, projected": (
        granet_jax.cyclical(0.75, 8, cycles=2, interval=1, recovery="projected"),
        SGD,
    ),
    "SR-STE 2:4": (
        granet_jax.straight_through(
            0.5, 2, interval=1, penalty=0.25, structure=structures.n_of_m(2, 4, axis=-1)
        ),
        SGD,
    ),
    "top_kast": (
        granet_jax.top_kast(0.75, backward_sparsity=0.5, interval=2, penalty=0.25),
        SGD,
    ),
    "greg1": (
        granet_jax.greg1(0.75, interval=1, growth=0.5, ceiling=1.0, settle_steps=1),
        SGD,
    ),
}
STEPS = 8


def unpacked(state: granet_jax.SparseState) -> granet_jax.SparseState:
    """Of codes their masks: bits do not say which weights entered last."""
    masks, marked = granet_jax.unpack_masks((state.masks, state.marked))
    return state._replace(activity=masks, marked=marked)


def run(name: str, packed: bool, steps: int = STEPS) -> Any:
    """Yields parameters and state at first and after every step."""
    method, inner = RUNS[name]
    tx = granet_jax.transform(method, inner, seed=3, packed=packed)
    params: Any = jax.tree.map(jnp.asarray, draw(0))
    state: Any = tx.init(params)
    if method.weights == "sparse":
        params = granet_jax.apply_masks(params, granet_jax.get_masks(state))

    def one(params: Any, state: Any, grads: Any) -> Any:
        extra = {"grads": grads} if inner is None else {}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    step: Any = jax.jit(one, compiler_options=QUICK)
    yield params, state
    for t in range(1, steps + 1):
        params, state = step(params, state, draw(t))
        yield params, state
    assert step._cache_size() == 1


def packed_leaves(tree: Any) -> list[granet_jax.PackedMask]:
    leaves = jax.tree.leaves(
        tree, is_leaf=lambda x: isinstance(x, granet_jax.PackedMask)
    )
    assert all(isinstance(x, granet_jax.PackedMask) for x in leaves)
    return leaves


@pytest.mark.parametrize("name", RUNS)
def test_every_run_is_as_with_bytes(name: str) -> None:
    changed = False
    masks = None
    for found, expected in zip(run(name, True), run(name, False), strict=True):
        (params, state), (want, wanted) = found, expected
        assert_same((params, unpacked(state)), (want, unpacked(wanted)))
        assert_same(granet_jax.get_masks(state), wanted.masks)
        trees = (state.activity, state.marked)
        for stored, bare in zip(trees, (wanted.masks, wanted.marked), strict=True):
            # Along the axis that takes fewer bytes.
            sizes = [
                min(np.packbits(m, axis=axis).size for axis in (-2, -1))
                for m in jax.tree.leaves(bare)
            ]
            assert [x.bits.size for x in packed_leaves(stored)] == sizes
        changed |= masks is not None and any(
            np.any(a != b)
            for a, b in zip(
                jax.tree.leaves(masks), jax.tree.leaves(wanted.masks), strict=True
            )
        )
        masks = wanted.masks
    assert changed == (name != "static")


def test_rows_that_are_no_multiple_of_eight() -> None:
    params = {"a": draw(0)["conv"][..., :3], "b": draw(0)["dense"][:, :5]}
    method = granet_jax.rigl(0.5, 4, interval=1)
    results = []
    for packed in (True, False):
        tx = granet_jax.transform(method, SGD, packed=packed)
        step = jax.jit(make_step(tx), compiler_options=QUICK)
        now: Any = (params, tx.init(params))
        for t in range(1, 4):
            grads = {"a": draw(t)["conv"][..., :3], "b": draw(t)["dense"][:, :5]}
            now = step(*now, grads)
        results.append((now[0], unpacked(now[1])))
        if packed:
            for x in packed_leaves(now[1].masks):
                # What pads a row is no weight, and stays zero.
                digits = np.unpackbits(np.asarray(x.bits), axis=x.axis)
                assert not np.moveaxis(digits, x.axis, -1)[..., x.shape[x.axis] :].any()
    assert_same(*results)


def test_bits_lie_in_memory_as_they_are_read() -> None:
    # If packing transposed, XLA would keep the bits of a state that way, and every step
    # would read them across.
    params = {"w": jax.ShapeDtypeStruct((3, 3, 16, 32), jnp.float32)}
    tx = granet_jax.transform(RUNS["granet"][0], SGD, packed=True)
    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(make_step(tx)).lower(params, state, params).compile()
    layouts = re.findall(r"u8\[3,3,2,32\]\{([\d,]*)", compiled.as_text() or "")
    assert set(layouts) == {"3,2,1,0"}


def test_masks_are_set_and_read() -> None:
    method, inner = RUNS["granet"]
    *_, (_, state) = run("granet", True, steps=5)
    other = jax.tree.map(jnp.logical_not, granet_jax.get_masks(state))
    new: Any = jax.jit(granet_jax.set_masks)(state, other)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert_same(granet_jax.get_masks(new), other)
    given = granet_jax.transform(method, inner, masks=other, packed=True)
    assert_same(granet_jax.get_masks(given.init(draw(0))), other)
    view = granet_jax.sparse_view(draw(0), new)
    assert_same(view, granet_jax.apply_masks(draw(0), other))


def test_lanes_of_vmap() -> None:
    method, inner = RUNS["granet"]

    def train(packed: bool, params: Any, grads: Any) -> Any:
        tx = granet_jax.transform(method, inner, packed=packed)
        state: Any = tx.init(params)
        for t in range(2):
            params, state = make_step(tx)(
                params, state, jax.tree.map(lambda g, t=t: g[t], grads)
            )
        return params, state

    params = jax.tree.map(lambda *x: np.stack(x), draw(0), draw(1))
    grads = jax.tree.map(lambda *x: np.stack([x[:2], x[2:]]), *map(draw, (2, 3, 4, 5)))
    found, expected = (
        jax.jit(jax.vmap(functools.partial(train, packed)), compiler_options=QUICK)(
            params, grads
        )
        for packed in (True, False)
    )
    # The lanes are stacked: a packed mask's shape is that of one of them.
    assert {x.shape for x in packed_leaves(found[1].masks)} == {
        SHAPES["conv"],
        SHAPES["dense"],
    }
    assert_same((found[0], unpacked(found[1])), (expected[0], unpacked(expected[1])))


def test_a_checkpoint_goes_on_to_the_bit(tmp_path: Path) -> None:
    method, inner = RUNS["granet"]
    tx = granet_jax.transform(method, inner, seed=3, packed=True)
    points = list(run("granet", True))
    like = jax.eval_shape(lambda: (draw(0), tx.init(draw(0))))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", points[5])
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", like)
    assert_same(restored, points[5])
    step = jax.jit(make_step(tx), compiler_options=QUICK)
    for t in range(6, STEPS + 1):
        restored = step(*restored, draw(t))
        assert_same(restored, points[t])


# Most that a step on eight devices moves at once, in elements. On one axis counts, one
# a device. On two axes, a device's share of the convolution's inputs is two weights,
# and no byte holds these alone: along that axis the bits of that leaf are added up, or
# its mask is gathered.
MOVED = {
    "auto_1d": 8,
    "explicit_1d": 8,
    "auto_2d": math.prod(LEAVES["conv"]["kernel"]) // 8 // 2,
    "explicit_2d": math.prod(LEAVES["conv"]["kernel"]) // 2,
}


@pytest.mark.parametrize("layout", MOVED)
def test_on_eight_devices_as_on_one(layout: str) -> None:
    method = granet_jax.granet(0.75, 4, interval=2, end_step=2)
    tx = granet_jax.transform(method, optax.sgd(0.125, momentum=0.5), packed=True)

    def place(tree: Any) -> Any:
        return LAYOUTS[layout].place(tree)

    step = jax.jit(make_step(tx), compiler_options=QUICK)
    alone: Any = jax.tree.map(jnp.asarray, make_params())
    alone = (alone, tx.init(alone))
    with LAYOUTS[layout].context():
        spread: Any = place(make_params())
        spread = (spread, tx.init(spread))
        compiled = step.lower(*spread, place(mean_grads(0))).compile()
        program = compiled.as_text() or ""
        found = collectives(program)
        for x in packed_leaves(spread[1].masks):
            shards = x.bits.sharding.shard_shape(x.bits.shape)
            divided = x.bits.size // math.prod(shards)
            alone_in_bytes = layout.endswith("1d") or x.shape == (64, 32)
            assert divided == (8 if alone_in_bytes else 2)
    assert 0 < max(max(c.sizes) for c in found) <= MOVED[layout]
    # And of floats nothing.
    assert not re.search(r"= [^=]*f32\[\d[^=]* (all-|collective-)", program)
    for t in range(3):
        alone = step(*alone, mean_grads(t))
        with LAYOUTS[layout].context():
            spread = jax.block_until_ready(step(*spread, place(mean_grads(t))))
        assert_same(jax.device_get(spread), jax.device_get(alone))


@pytest.mark.parametrize(
    ("shape", "spec", "expected"),
    [
        ((16, 4), P("x", "y"), P("x", "y")),
        ((32, 4), P("x", "y"), P("x", "y")),
        ((12, 6), P("x", "y"), P(None, "y")),
        ((14, 6), P("x", "y"), P(None, "y")),
        ((18, 6), P("x", "y"), P(None, "y")),
        ((24, 4), P("x", "y"), P(None, "y")),
        ((15, 6), P(None, "y"), P(None, "y")),
        ((2, 32), P("x", "y"), P("x", "y")),
        ((2, 24), P("x", "y"), P("x", None)),
        ((32,), P("y"), P("y")),
        ((24,), P("y"), P(None)),
    ],
    ids=str,
)
def test_explicit_axes_stay_where_shards_hold_whole_bytes(
    shape: tuple[int, ...], spec: P, expected: P
) -> None:
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    mask = np.random.default_rng(0).random(shape) < 0.5
    placed = jax.device_put(mask, NamedSharding(mesh, spec))
    packed = jax.jit(granet_jax.pack_masks)(placed)
    assert packed.bits.sharding == NamedSharding(mesh, expected)
    np.testing.assert_array_equal(
        packed.bits, np.packbits(mask, axis=packed.axis), strict=True
    )
    np.testing.assert_array_equal(granet_jax.unpack_masks(packed), mask, strict=True)
