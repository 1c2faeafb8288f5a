"""Masks as trees: which leaves carry one, applying, counting, packing, making."""

import itertools
import math
from typing import Any

import flax.struct
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import granet_jax
from granet_jax import distributions, masking
from tests.helpers.trees import Layer, assert_same, parameters, shape_tree

DENSE = optax.MaskedNode()


@flax.struct.dataclass
class Block:
    """A layer as a registered dataclass."""

    kernel: Any
    bias: Any


def mixed_tree() -> Any:
    """Leaves of many kinds, in many kinds of containers."""
    return {
        "embed": jnp.ones((4, 3), jnp.bfloat16),
        "layers": [
            Layer(kernel=jnp.ones((3, 2)), bias=jnp.ones(2)),
            Block(kernel=jnp.ones((3, 3, 1, 2), jnp.float16), bias=jnp.ones(2)),
        ],
        "none": None,
        "steps": jnp.ones((2, 2), jnp.int32),
        "temperature": jnp.ones(()),
        "used": jnp.ones((2, 2), bool),
        "phase": jnp.ones((2, 2), jnp.complex64),
        "stacked": (jnp.ones((2, 3)),),
    }


NAMES = [
    "embed",
    "layers/0/kernel",
    "layers/0/bias",
    "layers/1/kernel",
    "layers/1/bias",
    "phase",
    "stacked/0",
    "steps",
    "temperature",
    "used",
]


def selected(tree: Any) -> list[str]:
    """Names of the leaves that are True."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    assert all(type(x) is bool for _, x in leaves)
    return [masking.leaf_name(path) for path, x in leaves if x]


# Which leaves carry a mask.


def test_default_takes_floating_leaves_with_two_dimensions() -> None:
    tree = masking.maskable(mixed_tree())
    assert jax.tree.structure(tree) == jax.tree.structure(mixed_tree())
    assert selected(tree) == [
        "embed",
        "layers/0/kernel",
        "layers/1/kernel",
        "stacked/0",
    ]


def test_default_on_shapes_alone() -> None:
    shapes = jax.eval_shape(mixed_tree)
    assert selected(masking.maskable(shapes)) == selected(
        masking.maskable(mixed_tree())
    )


def test_where_is_called_with_name_and_leaf() -> None:
    seen = []

    def where(name: str, leaf: Any) -> bool:
        seen.append((name, leaf.shape, leaf.dtype))
        return name.endswith("bias")

    tree = masking.maskable(mixed_tree(), where)
    assert selected(tree) == ["layers/0/bias", "layers/1/bias"]
    leaves = jax.tree.leaves(mixed_tree())
    assert seen == [
        (name, x.shape, x.dtype) for name, x in zip(NAMES, leaves, strict=True)
    ]


def test_where_may_return_any_truth_value() -> None:
    def where(name: str, leaf: Any) -> Any:
        return np.bool_(leaf.ndim == 2 and leaf.dtype == jnp.float32)

    expected = ["layers/0/kernel", "stacked/0"]
    assert selected(masking.maskable(mixed_tree(), where)) == expected


def test_where_as_a_tree() -> None:
    params = parameters()
    where = {"dense": {"kernel": False, "bias": True}, "conv": {"kernel": 1}}
    assert selected(masking.maskable(params, where)) == ["conv/kernel", "dense/bias"]
    masks = granet_jax.init_masks(granet_jax.static(0.5), params, where=where)
    assert masks["dense"]["kernel"] == DENSE
    assert masks["dense"]["bias"].shape == (8,)


def test_where_in_transform() -> None:
    tx = granet_jax.transform(
        granet_jax.static(0.25), where=lambda name, _: name == "dense/bias"
    )
    masks = tx.init(parameters()).masks
    assert (masks["dense"]["kernel"], masks["conv"]["kernel"]) == (DENSE, DENSE)
    assert granet_jax.sparsity(masks) == (0.25, {"dense/bias": 0.25}, 6, 8)


def test_leaf_names() -> None:
    leaves = jax.tree_util.tree_leaves_with_path(mixed_tree())
    assert [masking.leaf_name(path) for path, _ in leaves] == NAMES


# Applying.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_apply_masks(dtype: str) -> None:
    params = parameters(dtype)
    # Whatever is pruned becomes zero; whatever is active stays, negative zeros too.
    values = [jnp.nan, jnp.inf, -jnp.inf, -0.0, jnp.nan, jnp.inf, -jnp.inf, -0.0]
    params["dense"]["kernel"] = (
        params["dense"]["kernel"].at[0].set(jnp.asarray(values, dtype))
    )
    kernel = np.arange(48).reshape(6, 8) % 3 == 0
    kernel[0] = [False] * 4 + [True] * 4
    masks = {"dense": {"kernel": kernel, "bias": None}, "conv": {"kernel": DENSE}}
    found = granet_jax.apply_masks(params, masks)
    given = np.asarray(params["dense"]["kernel"])
    expected = {
        "dense": {
            "kernel": np.where(kernel, given, np.zeros_like(given)),
            "bias": params["dense"]["bias"],
        },
        "conv": params["conv"],
    }
    assert_same(found, expected)
    assert_same(jax.jit(granet_jax.apply_masks)(params, masks), expected)


def test_apply_masks_keeps_containers() -> None:
    params = mixed_tree()
    masks = granet_jax.init_masks(granet_jax.static(0.5), params)
    found = granet_jax.apply_masks(params, masks)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for name, x in zip(NAMES, jax.tree.leaves(found), strict=True):
        zeros = int(jnp.sum(x == 0))
        assert (zeros > 0) == (name in granet_jax.sparsity(masks).leaves), name


# Counting.


def test_sparsity_by_hand() -> None:
    masks = {
        "a": np.array([[True, False, False, False]]),
        "b": DENSE,
        "c": [np.ones((2, 3), bool), np.zeros((5,), bool)],
        "d": np.ones((0, 3), bool),
    }
    found = granet_jax.sparsity(masks)
    assert found == granet_jax.Sparsity(
        overall=1 - 7 / 15,
        leaves={"a": 0.75, "c/0": 0.0, "c/1": 1.0, "d": 0.0},
        active=7,
        total=15,
    )
    # Numbers of the host.
    assert [type(x) for x in found] == [float, dict, int, int]
    assert {type(x) for x in found.leaves.values()} == {float}


def test_sparsity_of_no_masks() -> None:
    assert granet_jax.sparsity({"a": DENSE}) == (0.0, {}, 0, 0)
    assert granet_jax.sparsity({"a": np.ones((0, 3), bool)}).overall == 0.0


def test_sparsity_names_are_those_of_containers() -> None:
    masks = granet_jax.init_masks(granet_jax.static(0.5), mixed_tree())
    assert list(granet_jax.sparsity(masks).leaves) == [
        "embed",
        "layers/0/kernel",
        "layers/1/kernel",
        "stacked/0",
    ]


def test_sparsity_counts_exactly_beyond_float32() -> None:
    # 2**24 + 1 is no float32.
    mask = jnp.ones((2**24 + 3,), bool).at[:2].set(False)
    found = granet_jax.sparsity({"a": mask})
    assert (found.active, found.total) == (2**24 + 1, 2**24 + 3)


def test_active_counts() -> None:
    masks = {"a": np.eye(5, dtype=bool), "b": DENSE, "c": np.zeros((0,), bool)}
    for counts in (masking.active_counts(masks), jax.jit(masking.active_counts)(masks)):
        assert [int(x) for x in counts] == [5, 0]
        assert [(x.shape, x.dtype) for x in counts] == [((), jnp.uint32)] * 2


# Masks from a user.


@pytest.mark.parametrize(
    "dtype",
    ["bool", "int8", "uint8", "int32", "float32", "float64", "float16", "bfloat16"],
)
@pytest.mark.parametrize("library", [np, jnp])
def test_check_masks_takes_zeros_and_ones(library: Any, dtype: str) -> None:
    if library is jnp and dtype == "float64":
        dtype = "float32"  # Without 64-bit types that is what becomes of it.
    expected = np.arange(48).reshape(6, 8) % 3 == 0
    kernel = library.asarray(expected.astype(jnp.dtype(dtype)))
    masks = {"dense": {"kernel": kernel, "bias": None}, "conv": {"kernel": DENSE}}
    found = masking.check_masks(masks, parameters())
    assert isinstance(found["dense"]["kernel"], jax.Array)
    assert_same(
        found,
        {"dense": {"kernel": expected, "bias": DENSE}, "conv": {"kernel": DENSE}},
    )


def test_check_masks_takes_negative_zero_and_nested_containers() -> None:
    params = [Layer(kernel=jnp.ones((1, 2)), bias=jnp.ones(2))]
    masks = [Layer(kernel=np.array([[-0.0, 1.0]]), bias=None)]
    expected = [Layer(kernel=np.array([[False, True]]), bias=DENSE)]
    assert_same(masking.check_masks(masks, params), expected)
    assert_same(masking.check_masks(masks, jax.eval_shape(lambda: params)), expected)


def test_check_masks_under_jit_takes_booleans() -> None:
    masks = granet_jax.init_masks(granet_jax.static(0.5), parameters())
    found = jax.jit(lambda m, p: masking.check_masks(m, p))(masks, parameters())
    assert_same(found, masks)


# Packing.


@st.composite
def mask_trees(draw: Any) -> Any:
    shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))

    def make(shape: tuple[int, ...]) -> Any:
        return rng.random(shape) < density

    return {
        "a": [make(s) for s in draw(st.lists(shapes, max_size=3))],
        "b": DENSE,
        "c": Layer(kernel=make(draw(shapes)), bias=DENSE),
    }


@hypothesis.given(masks=mask_trees())
def test_packing_gives_every_mask_back(masks: Any) -> None:
    packed = granet_jax.pack_masks(masks)
    for x, m in zip(
        jax.tree.leaves(packed, is_leaf=lambda x: isinstance(x, granet_jax.PackedMask)),
        jax.tree.leaves(masks),
        strict=True,
    ):
        m = np.atleast_1d(m)
        # The smaller of both, or along the last axis but one.
        ways = [np.packbits(m, axis=axis) for axis in (-2, -1)[-m.ndim :]]
        assert x.shape == (m.shape if x.shape else ())
        assert x.bits.dtype == jnp.uint8
        smaller = min(ways, key=lambda bits: math.prod(bits.shape[-2:]))
        assert_same(np.asarray(x.bits), smaller)
    assert_same(granet_jax.unpack_masks(packed), masks)


def test_packed_by_hand() -> None:
    mask = np.array([[1, 0, 0, 0, 0], [0, 0, 1, 1, 0]], bool)
    packed = granet_jax.pack_masks({"a": mask})["a"]
    # The first weight is the highest bit, and rows are padded with zeros.
    assert packed.bits.tolist() == [[0b10000000], [0b00110000]]
    assert (packed.shape, packed.axis) == ((2, 5), -1)
    # Columns, where these take fewer bytes, or as many.
    packed = granet_jax.pack_masks(mask.T)
    assert packed.bits.tolist() == [[0b10000000, 0b00110000]]
    assert (packed.shape, packed.axis) == ((5, 2), -2)
    packed = granet_jax.pack_masks(np.eye(16, dtype=bool)[::2])
    assert packed.axis == -2
    expected = [1 << (7 - i // 2) if i % 2 == 0 else 0 for i in range(16)]
    assert packed.bits.tolist() == [expected]


def test_the_axis_that_shares_bytes() -> None:
    for shape in itertools.product(range(1, 35), repeat=2):
        rows, columns = (
            np.packbits(np.zeros(shape, bool), axis=axis).size for axis in (-2, -1)
        )
        for lead in ((), (3,)):
            packed = granet_jax.PackedMask(jnp.zeros(()), (*lead, *shape))
            assert packed.axis == (-2 if rows <= columns else -1), shape
    for shape in ((), (9,)):
        assert granet_jax.PackedMask(jnp.zeros(()), shape).axis == -1


def test_packing_under_jit() -> None:
    masks = granet_jax.init_masks(granet_jax.static(0.5), parameters())
    packed = jax.jit(granet_jax.pack_masks)(masks)
    assert_same(packed, granet_jax.pack_masks(masks))
    assert_same(jax.jit(granet_jax.unpack_masks)(packed), masks)
    # The leaves of a packed tree are its bits: it can be saved and moved as it is.
    assert [x.dtype for x in jax.tree.leaves(packed)] == [jnp.uint8] * 2


# Initial masks.


def sizes_of(masks: Any) -> list[int]:
    return [int(np.sum(m)) for m in jax.tree.leaves(masks)]


@pytest.mark.parametrize("distribution", ["uniform", "erk", lambda *_: [1, 0.25]])
def test_initial_masks_have_the_counts_of_the_distribution(distribution: Any) -> None:
    shapes = [(3, 3, 2, 4), (6, 8)]
    method = granet_jax.static(0.5, distribution=distribution)
    masks = granet_jax.init_masks(method, parameters())
    expected = distributions.counts(shapes, 0.5, distribution)
    assert sizes_of(masks) == expected
    assert sum(expected) == 60
    assert_same(masks["dense"]["bias"], DENSE)
    assert [m.dtype for m in jax.tree.leaves(masks)] == [jnp.bool_] * 2
    assert_same(granet_jax.transform(method).init(parameters()).masks, masks)


def test_initial_sparsity_is_the_method_s_at_step_zero() -> None:
    params = parameters()
    gradual = granet_jax.granet(0.9, 100, interval=10, initial_sparsity=0.5)
    assert sum(sizes_of(granet_jax.init_masks(gradual, params))) == 60
    dense = granet_jax.granet(0.9, 100, interval=10)
    assert sizes_of(granet_jax.init_masks(dense, params)) == [72, 48]


def test_initial_masks_depend_on_seed_and_leaf_alone() -> None:
    method = granet_jax.static(0.5, distribution="uniform")
    shapes = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}

    def make(seed: int, params: Any = shapes) -> Any:
        return granet_jax.init_masks(method, params, seed=seed)

    drawn = [make(seed) for seed in (0, -1)]
    masks = [np.asarray(m) for x in drawn for m in (x["a"], x["b"])]
    for x, y in itertools.combinations(masks, 2):
        assert not np.array_equal(x, y)
    assert_same(make(0), drawn[0])
    # Values and dtypes make no difference.
    other = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.bfloat16), shapes)
    assert_same(make(0, other), drawn[0])
    # And `transform` passes its seed on.
    assert_same(granet_jax.transform(method, seed=-1).init(shapes).masks, drawn[1])


def test_initial_masks_are_uniformly_random() -> None:
    # Half of 400 x 64: columns have 200 with a standard deviation of 10, rows 32 with
    # one of 4. Six of those are out of reach.
    method = granet_jax.static(0.5, distribution="uniform")
    params = [jnp.ones((400, 64))]
    (mask,) = granet_jax.init_masks(method, params)
    by_column = np.asarray(mask).sum(axis=0)
    by_row = np.asarray(mask).sum(axis=1)
    assert by_column.sum() == 400 * 32
    assert np.abs(by_column - 200).max() < 60
    assert np.abs(by_row - 32).max() < 24
    # Neighbours are independent: as often equal as not.
    equal = np.asarray(mask[:, 1:] == mask[:, :-1]).mean()
    assert abs(equal - 0.5) < 0.02


def test_initial_masks_on_shapes_alone() -> None:
    method = granet_jax.static(0.5)
    found = granet_jax.init_masks(method, shape_tree())
    assert_same(found, granet_jax.init_masks(method, parameters()))
    abstract = jax.eval_shape(lambda p: granet_jax.init_masks(method, p), parameters())
    kernel = abstract["dense"]["kernel"]
    assert (kernel.shape, kernel.dtype) == ((6, 8), jnp.bool_)
    assert abstract["dense"]["bias"] == DENSE
    state = jax.eval_shape(granet_jax.transform(method).init, shape_tree())
    assert jax.tree.structure(state.masks) == jax.tree.structure(found)


@pytest.mark.parametrize("sparsity", [0.0, 1e-9, 1 - 2**-53])
def test_initial_masks_at_extreme_sparsities(sparsity: float) -> None:
    masks = granet_jax.init_masks(granet_jax.static(sparsity), parameters())
    assert sum(sizes_of(masks)) == math.floor((1 - sparsity) * 120 + 0.5)


def test_leaves_without_entries() -> None:
    params = {"empty": jnp.ones((0, 4)), "w": jnp.ones((4, 4)), "one": jnp.ones((1, 1))}
    masks = granet_jax.init_masks(granet_jax.static(0.5), params)
    assert masks["empty"].shape == (0, 4)
    assert sum(sizes_of(masks)) == 9  # Half of 17, rounded up.
    assert granet_jax.sparsity(masks).leaves["empty"] == 0.0


# Setting.


def test_set_masks() -> None:
    tx = granet_jax.transform(granet_jax.static(0.5), optax.sgd(0.5, momentum=0.5))
    chain = optax.chain(optax.clip_by_global_norm(1.0), tx)
    params = parameters()
    state = chain.init(params)
    kernel = np.arange(48).reshape(6, 8) % 2
    conv = np.ones((3, 3, 2, 4), np.float32)
    conv[0] = 0
    given = {"dense": {"kernel": kernel, "bias": None}, "conv": {"kernel": conv}}
    new = granet_jax.set_masks(state, given)
    expected = {
        "dense": {"kernel": kernel == 1, "bias": DENSE},
        "conv": {"kernel": conv == 1},
    }
    assert_same(granet_jax.get_masks(new), expected)
    # Nothing else has changed, and the state given has not at all.
    assert jax.tree.structure(new) == jax.tree.structure(state)
    back = granet_jax.set_masks(new, granet_jax.get_masks(state))
    assert_same(back, state)
    assert (
        granet_jax.get_state(new).inner_state is granet_jax.get_state(state).inner_state
    )
    assert not np.array_equal(
        granet_jax.get_masks(state)["dense"]["kernel"], kernel == 1
    )
    # The next step makes the parameters agree.
    updates, after = jax.jit(chain.update)(params, new, params)
    stepped = optax.apply_updates(params, updates)
    assert_same(granet_jax.get_masks(after), expected)
    np.testing.assert_array_equal(stepped["dense"]["kernel"] == 0, kernel == 0)
    np.testing.assert_array_equal(stepped["conv"]["kernel"] == 0, conv == 0)
    # And packed masks come back as they went.
    packed = granet_jax.pack_masks(granet_jax.get_masks(new))
    unpacked = granet_jax.unpack_masks(packed)
    assert_same(granet_jax.set_masks(state, unpacked), new)


def test_set_masks_under_jit() -> None:
    tx = granet_jax.transform(granet_jax.static(0.5))
    state = tx.init(parameters())
    flipped = jax.jit(
        lambda s: granet_jax.set_masks(s, jax.tree.map(jnp.logical_not, s.masks))
    )(state)
    assert_same(flipped.masks, jax.tree.map(lambda m: ~np.asarray(m), state.masks))


def test_a_none_among_the_parameters_is_kept() -> None:
    params = {"w": jnp.ones((2, 3)), "none": None, "bias": jnp.ones(3)}
    given = {"w": np.eye(2, 3), "none": None, "bias": None}
    tx = granet_jax.transform(granet_jax.static(0.5), optax.sgd(0.5), masks=given)
    state = tx.init(params)
    expected = {"w": jnp.eye(2, 3, dtype=bool), "none": None, "bias": DENSE}
    assert_same(granet_jax.get_masks(state), expected)
    assert_same(granet_jax.set_masks(state, granet_jax.get_masks(state)), state)
    updates, state = tx.update(params, state, params)
    new = optax.apply_updates(params, updates)
    assert new["w"].tolist() == [[0.5, 0.0, 0.0], [0.0, 0.5, 0.0]]
