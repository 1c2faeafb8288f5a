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
from granet_jax.phases import Revive
from tests.helpers import layouts, own_methods, trees
from tests.helpers.layouts import LAYOUTS, collectives
from tests.helpers.training import at, changes, compiled_step, make_step, stack
from tests.helpers.trees import assert_same


def packed_leaves(tree: Any) -> list[PackedMask]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, PackedMask))
    assert all(isinstance(x, PackedMask) for x in leaves)
    return leaves


# --- The format -------------------------------------------------------------------


SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple)


@jax.jit
def there_and_back(tree: Any) -> tuple[Any, Any, Any]:
    packed = granet_jax.pack_masks(tree)
    return packed, granet_jax.unpack_masks(packed), granet_jax.pack_masks(packed)


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
    tree = {"a": [mask, optax.MaskedNode()], "b": optax.MaskedNode()}
    packed, unpacked, again = there_and_back(tree)
    found = packed["a"][0]
    assert isinstance(found, PackedMask)
    assert found.shape == mask.shape
    expected = np.packbits(np.atleast_1d(mask), axis=found.axis)
    assert_same(np.asarray(found.bits), expected)
    assert_same(unpacked, tree)
    # A packed tree may be packed again, and its leaves are the bits alone.
    assert_same(again, packed)
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

GMP = granet_jax.gmp(0.75, 8, interval=2)
SGD = optax.sgd(0.25, momentum=0.5)
STEPS = 8
# Every part of a method that reads or changes masks, and optimizers that work weight by
# weight or not.
RUNS: dict[str, tuple[granet_jax.Method, optax.GradientTransformation | None]] = {
    "sparse": (
        own_methods.with_resets(
            own_methods.prune_and_exchange(2, 6, more=(Revive(),)), (3,)
        ),
        SGD,
    ),
    "lamb": (GMP, optax.lamb(1)),
    "last link": (GMP, None),
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


def values(name: str, step: int) -> Any:
    """Rows of 4 fill half of a byte; columns of 6 leave bits, too, if they share it."""
    tree = trees.eighths(step)
    if name != "SR-STE 2:4":
        tree["dense"]["kernel"] = tree["dense"]["kernel"][:, :5]
    return tree


def unpacked(state: granet_jax.SparseState) -> dict[str, Any]:
    """All fields of a state, with boolean masks."""
    packable = ("masks", "marked", "entered")
    fields = state._asdict()
    masks = {name: granet_jax.unpack_masks(fields[name]) for name in packable}
    return {**fields, **masks}


@functools.cache
def transform(name: str, packed: bool) -> tuple[Any, Any]:
    """The transformation and a step."""
    method, inner = RUNS[name]
    tx = granet_jax.transform(method, inner, seed=3, packed=packed)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        extra = {"grads": grads} if inner is None else {}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return tx, jax.jit(step)


def run(name: str, packed: bool) -> list[tuple[Any, Any]]:
    """Parameters and state at first and after every step."""
    tx, step = transform(name, packed)
    points = [(values(name, 0), tx.init(values(name, 0)))]
    for count in range(1, STEPS + 1):
        points.append(step(*points[-1], values(name, count)))
    assert step._cache_size() <= 1
    return points


@pytest.mark.parametrize("name", RUNS)
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
            pairs = zip(packed_leaves(stored), jax.tree.leaves(masks), strict=True)
            for x, mask in pairs:
                # The bits that fill up a byte stay zero.
                assert_same(np.asarray(x.bits), np.packbits(mask, axis=x.axis))
                assert x.bits.size == min(
                    np.packbits(mask, axis=axis).size for axis in (-2, -1)
                )
    assert changes([s.masks for _, s in bare])


def test_bits_are_stored_in_the_order_in_which_they_are_read() -> None:
    # If packing transposed, XLA would keep a state's bits transposed, and every step
    # would read across them.
    params = {"w": jax.ShapeDtypeStruct((3, 3, 16, 32), jnp.float32)}
    tx = granet_jax.transform(GMP, SGD, packed=True)
    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(make_step(tx)).lower(params, state, params).compile()
    found = re.findall(r"u8\[3,3,2,32\]\{([\d,]*)", compiled.as_text() or "")
    assert set(found) == {"3,2,1,0"}


def test_masks_are_set_and_read() -> None:
    tx = functools.partial(granet_jax.transform, GMP, SGD, packed=True)
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
    (tx, step), (bare, bare_step) = (transform("sparse", x) for x in (True, False))
    lanes = [values("sparse", 0), values("sparse", 1)]
    point = stack(lanes), jax.jit(jax.vmap(tx.init))(stack(lanes))
    expected = [(params, bare.init(params)) for params in lanes]
    step = jax.jit(jax.vmap(step))
    for count in (2, 4):
        grads = [values("sparse", count + lane) for lane in range(2)]
        point = step(*point, stack(grads))
        expected = [bare_step(*x, g) for x, g in zip(expected, grads, strict=True)]
    # A packed mask's shape is the shape in one lane.
    assert {x.shape for x in packed_leaves(point[1].masks)} == {(3, 3, 2, 4), (6, 5)}
    for lane, (params, state) in enumerate(expected):
        found, found_state = at(point, lane)
        assert_same((found, unpacked(found_state)), (params, unpacked(state)))


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
