"""Masks at one bit a weight: their format, and runs that keep their masks packed."""

import functools
import itertools
import math
import re
from typing import Any

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import granet_jax
from granet_jax import PackedMask, export, masking, structures
from tests.helpers import layouts, trees
from tests.helpers.layouts import LAYOUTS, collectives
from tests.helpers.training import changes, compiled_step, make_step, stack
from tests.helpers.trees import assert_same


def packed_leaves(tree: Any) -> list[PackedMask]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, PackedMask))
    assert all(isinstance(x, PackedMask) for x in leaves)
    return leaves


# --- The format -------------------------------------------------------------------


def packed_by_hand(mask: np.ndarray, axis: int) -> np.ndarray:
    """Eight weights a byte, the first in the highest bit, zeros at an axis' end."""
    mask = np.moveaxis(np.atleast_1d(mask), axis, -1)
    *rows, last = mask.shape
    found = []
    for row in mask.reshape(math.prod(rows), last):
        digits = "".join("01"[int(x)] for x in row)
        digits += "0" * (-len(digits) % 8)
        found += [int(digits[i : i + 8], 2) for i in range(0, len(digits), 8)]
    bits = np.array(found, np.uint8).reshape(*rows, math.ceil(last / 8))
    return np.moveaxis(bits, -1, axis)


SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple)


@hypothesis.given(
    mask=SHAPES.flatmap(lambda shape: hypothesis.extra.numpy.arrays(bool, shape))
)
@hypothesis.example(mask=np.array(True))
@hypothesis.example(mask=np.array(False))
@hypothesis.example(mask=np.ones((0,), bool))
@hypothesis.example(mask=np.ones((3, 0, 5), bool))
@hypothesis.example(mask=np.ones((8,), bool))
@hypothesis.example(mask=np.eye(9, 7, dtype=bool))
@hypothesis.example(mask=np.eye(7, 9, dtype=bool))
def test_round_trip(mask: np.ndarray) -> None:
    tree = {"a": [jnp.asarray(mask), optax.MaskedNode()], "b": optax.MaskedNode()}
    packed = granet_jax.pack_masks(tree)
    found = packed["a"][0]
    assert isinstance(found, PackedMask)
    assert found.shape == mask.shape
    assert_same(np.asarray(found.bits), packed_by_hand(mask, found.axis))
    assert_same(granet_jax.unpack_masks(packed), tree)
    # A packed tree may be packed again, and its leaves are the bits alone.
    assert_same(granet_jax.pack_masks(packed), packed)
    assert [x.dtype for x in jax.tree.leaves(packed)] == [jnp.uint8]


def test_the_format_by_hand() -> None:
    mask = np.array([[1, 0, 0, 0, 0], [0, 0, 1, 1, 0]], bool)
    packed = granet_jax.pack_masks(mask)
    assert packed.bits.tolist() == [[0b10000000], [0b00110000]]
    assert (packed.shape, packed.axis) == ((2, 5), -1)
    packed = granet_jax.pack_masks(mask.T)
    assert packed.bits.tolist() == [[0b10000000, 0b00110000]]
    assert (packed.shape, packed.axis) == ((5, 2), -2)


def test_the_axis_that_takes_fewer_bytes_shares_them() -> None:
    for shape in itertools.product(range(1, 35), repeat=2):
        columns, rows = (
            np.packbits(np.zeros(shape, bool), axis=axis).size for axis in (-2, -1)
        )
        for lead in ((), (3,)):
            packed = PackedMask(jnp.zeros(()), (*lead, *shape))
            assert packed.axis == (-2 if columns <= rows else -1), shape
    for shape in ((), (9,)):
        assert PackedMask(jnp.zeros(()), shape).axis == -1


def test_packing_under_jit() -> None:
    masks = granet_jax.init_masks(granet_jax.static(0.7), trees.parameters(), seed=1)
    packed = jax.jit(granet_jax.pack_masks)(masks)
    assert_same(packed, granet_jax.pack_masks(masks))
    assert_same(jax.jit(granet_jax.unpack_masks)(packed), masks)
    # Rows of 8 fill their bytes; rows of 4 in the convolution half fill them.
    assert sum(x.nbytes for x in jax.tree.leaves(packed)) == 48 // 8 + 72 // 4


@pytest.mark.parametrize(
    ("shape", "spec", "expected"),
    [
        ((16, 4), P("x", "y"), P("x", "y")),
        ((12, 6), P("x", "y"), P(None, "y")),
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
def test_explicit_axes_stay_where_each_device_has_whole_bytes(
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


# --- Runs -------------------------------------------------------------------------

GRANET = granet_jax.granet(0.75, 8, interval=2, end_step=6)
SGD = optax.sgd(0.25, momentum=0.5)
STEPS = 8
# Every part of a method that reads or changes masks, and optimizers that work weight by
# weight or not.
RUNS: dict[str, tuple[granet_jax.Method, optax.GradientTransformation | None]] = {
    "granet": (GRANET, SGD),
    "granet, lamb": (GRANET, optax.lamb(1)),
    "granet, last link": (GRANET, None),
    "gmp, lamb": (granet_jax.gmp(0.75, 8, interval=2), optax.lamb(1)),
    "snfs": (granet_jax.snfs(0.75, 8, interval=2, decay=0.5), SGD),
    "acdc": (granet_jax.acdc(0.75, (2, 4, 6)), SGD),
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
}
QUICK = ("granet, lamb", "snfs", "SR-STE 2:4", "top_kast")


def unpacked(state: granet_jax.SparseState) -> dict[str, Any]:
    """All fields of a state, with boolean masks."""
    packable = ("masks", "marked", "entered")
    fields = state._asdict()
    masks = {name: granet_jax.unpack_masks(fields[name]) for name in packable}
    return {**fields, **masks}


@functools.cache
def run(name: str, packed: bool) -> list[tuple[Any, Any]]:
    """Parameters and state at first and after every step."""
    method, inner = RUNS[name]
    tx = granet_jax.transform(method, inner, seed=3, packed=packed)
    params, state = trees.eighths(0), tx.init(trees.eighths(0))

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        extra = {"grads": grads} if inner is None else {}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    points = [(params, state)]
    for count in range(1, STEPS + 1):
        points.append(step(*points[-1], trees.eighths(count)))
    assert step._cache_size() <= 1
    return points


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in RUNS
    ],
)
def test_a_run_does_not_depend_on_packing(name: str) -> None:
    bare = run(name, False)
    for (params, state), (expected, expected_state) in zip(
        run(name, True), bare, strict=True
    ):
        assert_same((params, unpacked(state)), (expected, unpacked(expected_state)))
        for stored, masks in (
            (state.masks, expected_state.masks),
            (state.marked, expected_state.marked),
        ):
            sizes = [
                min(np.packbits(m, axis=axis).size for axis in (-2, -1))
                for m in jax.tree.leaves(masks)
            ]
            assert [x.bits.size for x in packed_leaves(stored)] == sizes
    assert changes([s.masks for _, s in bare])


def test_rows_whose_length_is_no_multiple_of_eight() -> None:
    def cut(step: int) -> Any:
        tree = trees.eighths(step)
        return {
            "a": tree["conv"]["kernel"][..., :3],
            "b": tree["dense"]["kernel"][:, :5],
        }

    method = granet_jax.rigl(0.5, 4, interval=1)
    results = []
    for packed in (True, False):
        tx = granet_jax.transform(method, SGD, packed=packed)
        step = compiled_step(tx)
        params, state = cut(0), tx.init(cut(0))
        for count in range(1, 4):
            params, state = step(params, state, cut(count))
        results.append((params, unpacked(state)))
        for x in packed_leaves(state.masks) if packed else []:
            # The bits that fill up a row stay zero.
            digits = np.unpackbits(np.asarray(x.bits), axis=x.axis)
            assert not np.moveaxis(digits, x.axis, -1)[..., x.shape[x.axis] :].any()
    assert_same(*results)


def test_bits_are_stored_in_the_order_in_which_they_are_read() -> None:
    # If packing transposed, XLA would keep a state's bits transposed, and every step
    # would read across them.
    params = {"w": jax.ShapeDtypeStruct((3, 3, 16, 32), jnp.float32)}
    tx = granet_jax.transform(GRANET, SGD, packed=True)
    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(make_step(tx)).lower(params, state, params).compile()
    found = re.findall(r"u8\[3,3,2,32\]\{([\d,]*)", compiled.as_text() or "")
    assert set(found) == {"3,2,1,0"}


def test_masks_are_set_and_read() -> None:
    tx = functools.partial(granet_jax.transform, GRANET, SGD, packed=True)
    params = trees.eighths(0)
    state = tx(masks=granet_jax.init_masks(granet_jax.static(0.5), params)).init(params)
    other = jax.tree.map(jnp.logical_not, granet_jax.get_masks(state))
    new: Any = jax.jit(granet_jax.set_masks)(state, other)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert_same(granet_jax.get_masks(new), other)
    assert_same(granet_jax.get_masks(tx(masks=other).init(params)), other)
    view = granet_jax.sparse_view(params, new)
    assert_same(view, granet_jax.apply_masks(params, other))
    # Functions of masks take packed ones.
    packed = granet_jax.pack_masks(other)
    assert granet_jax.sparsity(packed) == granet_jax.sparsity(other)
    assert granet_jax.sparsity(packed).total == trees.MASKABLE
    assert_same(granet_jax.apply_masks(params, packed), view)
    assert_same(masking.check_masks(packed, params), other)
    assert export.mask_entropy(packed) == export.mask_entropy(other)


def test_vmap_over_packed_states() -> None:
    def train(packed: bool, params: Any, grads: list[Any]) -> Any:
        tx = granet_jax.transform(GRANET, SGD, packed=packed)
        state: Any = tx.init(params)
        for gradient in grads:
            params, state = make_step(tx)(params, state, gradient)
        return params, state

    params = stack([trees.eighths(0), trees.eighths(1)])
    grads = [stack(list(map(trees.eighths, pair))) for pair in ((2, 4), (3, 5))]
    found, expected = (
        jax.jit(jax.vmap(functools.partial(train, packed)))(params, grads)
        for packed in (True, False)
    )
    # A packed mask's shape is the shape in one lane.
    assert {x.shape for x in packed_leaves(found[1].masks)} == {(3, 3, 2, 4), (6, 8)}
    for lane in range(2):
        (p, state), (q, expected_state) = (
            jax.tree.map(lambda x, i=lane: x[i], run) for run in (found, expected)
        )
        assert_same((p, unpacked(state)), (q, unpacked(expected_state)))


# The most elements that a step on eight devices sends at once. On one axis these are
# counts, one a device. On two axes a device has two of the convolution's inputs and
# thus no whole byte of its mask, so bits of that leaf are added up or gathered.
CONV = math.prod(layouts.SHAPES["conv"]["kernel"])
SENT = {"auto_1d": 8, "explicit_1d": 8, "auto_2d": CONV // 16, "explicit_2d": CONV // 2}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, marks=() if layout == "auto_2d" else pytest.mark.slow)
        for layout in SENT
    ],
)
def test_on_eight_devices(layout: str) -> None:
    method = granet_jax.granet(0.75, 4, interval=2, end_step=2)
    tx = granet_jax.transform(method, optax.sgd(0.125, momentum=0.5), packed=True)
    where, step = LAYOUTS[layout], compiled_step(tx)
    alone: Any = jax.tree.map(jnp.asarray, layouts.exact_parameters())
    alone = (alone, tx.init(alone))
    with where.context():
        params = where.place(layouts.exact_parameters())
        spread: Any = (params, tx.init(params))
        grads = where.place(layouts.mean_gradient(0))
        program = step.lower(*spread, grads).compile().as_text() or ""
        for x in packed_leaves(spread[1].masks):
            shard = x.bits.sharding.shard_shape(x.bits.shape)
            whole_bytes = layout.endswith("1d") or x.shape == (64, 32)
            assert x.bits.size // math.prod(shard) == (8 if whole_bytes else 2)
    assert 0 < max(max(c.sizes) for c in collectives(program)) <= SENT[layout]
    # No floats are sent.
    assert not re.search(r"= [^=]*f32\[\d[^=]* (all-|collective-)", program)
    for index in range(3):
        grads = layouts.mean_gradient(index)
        alone = step(*alone, grads)
        with where.context():
            spread = jax.block_until_ready(step(*spread, where.place(grads)))
        assert_same(jax.device_get(spread), jax.device_get(alone))
