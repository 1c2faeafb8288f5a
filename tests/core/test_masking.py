"""Masks as trees: which leaves carry one, applying, counting, making, setting."""

import itertools
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax import masking
from tests.helpers.training import arrays
from tests.helpers.trees import Layer, assert_same, gradients, parameters, shape_tree

DENSE = optax.MaskedNode()
HALF = granet_jax.static(0.5)


@flax.struct.dataclass
class Block:
    """A layer as a registered dataclass."""

    kernel: Any
    bias: Any


def mixed_tree() -> Any:
    """Leaves of many dtypes, in many containers."""
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
    *("embed", "layers/0/kernel", "layers/0/bias", "layers/1/kernel", "layers/1/bias"),
    *("phase", "stacked/0", "steps", "temperature", "used"),
]
# Floating leaves with two dimensions or more.
BY_DEFAULT = ["embed", "layers/0/kernel", "layers/1/kernel", "stacked/0"]


def selected(tree: Any) -> list[str]:
    """Names of the leaves that are True."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    assert all(type(x) is bool for _, x in leaves)
    return [masking.leaf_name(path) for path, x in leaves if x]


# --- Which leaves carry a mask ----------------------------------------------------


def test_default_leaves() -> None:
    for params in (mixed_tree(), jax.eval_shape(mixed_tree)):
        tree = masking.maskable(params)
        assert jax.tree.structure(tree) == jax.tree.structure(params)
        assert selected(tree) == BY_DEFAULT
    params = mixed_tree()
    masks = granet_jax.init_masks(HALF, params)
    assert list(granet_jax.sparsity(masks).leaves) == BY_DEFAULT
    found = granet_jax.apply_masks(params, masks)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for name, x in zip(NAMES, jax.tree.leaves(found), strict=True):
        assert np.any(np.asarray(x) == 0) == (name in BY_DEFAULT), name


def test_default_leaves_of_flax_models() -> None:
    """Biases, scales, tokens and positions are dense, whatever their dimensions."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
            x = nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
            return nn.Dense(8)(x), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens: jax.Array) -> jax.Array:
            first = self.param("cls_token", nn.initializers.ones, (1, 1, 8))
            x = nn.Embed(5, 8)(tokens)
            x = x + self.param("pos_embedding", nn.initializers.ones, (1, 3, 8)) + first
            layers = nn.scan(
                Block, {"params": 0}, split_rngs={"params": True}, length=2
            )
            return layers(name="layers")(x, None)[0]

    tokens = jnp.zeros((1, 3), int)
    params = jax.eval_shape(Model().init, jax.random.key(0), tokens)["params"]
    attention = "layers/MultiHeadDotProductAttention_0"
    assert selected(masking.maskable(params, stacked={"layers/": 0})) == [
        "Embed_0/embedding",
        "layers/Dense_0/kernel",
        *(f"{attention}/{part}/kernel" for part in ("key", "out", "query", "value")),
    ]
    leaf = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    tables = ("token_embedding", "token_embedder/embedding", "wte/embedding")
    # nnx names the attribute of a parameter last.
    for name in (*tables, "linear/kernel/value"):
        assert masking.default_where(name, leaf), name
    positions = ("position_embeddings/embedding", "wpe/embedding", "pos_embed")
    for name in (*positions, "attention/bias/value", "cls", "dense/lora_a"):
        assert not masking.default_where(name, leaf), name


def test_where_as_a_regular_expression() -> None:
    chosen = masking.maskable(mixed_tree(), r"layers/\d+/bias$")
    assert selected(chosen) == ["layers/0/bias", "layers/1/bias"]


def test_where_as_a_function() -> None:
    seen = []

    def where(name: str, leaf: Any) -> Any:
        seen.append((name, leaf.shape, leaf.dtype))
        # Any truth value will do.
        return np.bool_(name.endswith("bias"))

    assert selected(masking.maskable(mixed_tree(), where)) == [
        *("layers/0/bias", "layers/1/bias")
    ]
    leaves = jax.tree.leaves(mixed_tree())
    expected = [(n, x.shape, x.dtype) for n, x in zip(NAMES, leaves, strict=True)]
    assert seen == expected
    tx = granet_jax.transform(
        granet_jax.static(0.25), where=lambda name, _: name == "dense/bias"
    )
    masks = tx.init(parameters()).masks
    assert (masks["dense"]["kernel"], masks["conv"]["kernel"]) == (DENSE, DENSE)
    assert granet_jax.sparsity(masks) == (0.25, {"dense/bias": 0.25}, 6, 8)


def test_where_as_a_tree() -> None:
    params = parameters()
    where = {"dense": {"kernel": False, "bias": True}, "conv": {"kernel": 1}}
    assert selected(masking.maskable(params, where)) == ["conv/kernel", "dense/bias"]
    masks = granet_jax.init_masks(HALF, params, where=where)
    assert masks["dense"]["kernel"] == DENSE
    assert masks["dense"]["bias"].shape == (8,)


# --- Applying ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_apply_masks(dtype: str) -> None:
    params = jax.tree.map(np.array, parameters(dtype))
    # Every pruned value becomes zero, and every active one stays, negative zero too.
    params["dense"]["kernel"][0] = [np.nan, np.inf, -np.inf, -0.0] * 2
    kernel = np.arange(48).reshape(6, 8) % 3 == 0
    kernel[0] = [False] * 4 + [True] * 4
    masks = {"dense": {"kernel": kernel, "bias": None}, "conv": {"kernel": DENSE}}
    expected = jax.tree.map(np.array, params)
    expected["dense"]["kernel"][~kernel] = 0
    assert_same(granet_jax.apply_masks(params, masks), expected)
    assert_same(jax.jit(granet_jax.apply_masks)(params, masks), expected)


# --- Counting ---------------------------------------------------------------------


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
    assert found.empty == ("c/1",)
    # The numbers are Python's.
    assert [type(x) for x in found] == [float, dict, int, int]
    assert {type(x) for x in found.leaves.values()} == {float}
    assert granet_jax.sparsity({"a": DENSE}) == (0.0, {}, 0, 0)
    assert granet_jax.sparsity({"a": np.ones((0, 3), bool)}).overall == 0.0


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


# --- Masks from a user ------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    ["bool", "int8", "uint8", "int32", "float32", "float64", "float16", "bfloat16"],
)
def test_check_masks_accepts_zeros_and_ones(dtype: str) -> None:
    expected = np.arange(48).reshape(6, 8) % 3 == 0
    for library in (np, jnp):
        if library is jnp and dtype == "float64":
            continue
        kernel = library.asarray(expected.astype(jnp.dtype(dtype)))
        masks = {"dense": {"kernel": kernel, "bias": None}, "conv": {"kernel": DENSE}}
        found = masking.check_masks(masks, parameters())
        assert isinstance(found["dense"]["kernel"], jax.Array)
        dense = {"kernel": expected, "bias": DENSE}
        assert_same(found, {"dense": dense, "conv": {"kernel": DENSE}})


def test_check_masks_accepts_negative_zero_and_nested_containers() -> None:
    params = [Layer(kernel=jnp.ones((1, 2)), bias=jnp.ones(2))]
    masks = [Layer(kernel=np.array([[-0.0, 1.0]]), bias=None)]
    expected = [Layer(kernel=np.array([[False, True]]), bias=DENSE)]
    assert_same(masking.check_masks(masks, params), expected)
    assert_same(masking.check_masks(masks, jax.eval_shape(lambda: params)), expected)


def test_check_masks_under_jit_accepts_booleans() -> None:
    masks = granet_jax.init_masks(HALF, parameters())
    found = jax.jit(lambda m, p: masking.check_masks(m, p))(masks, parameters())
    assert_same(found, masks)


# --- Initial masks ----------------------------------------------------------------


# `tests/methods` compares the masks of every method with a reference.
@pytest.mark.parametrize("sparsity", [0.0, 1e-9, 1 - 2**-53])
def test_initial_masks_at_extreme_sparsities(sparsity: float) -> None:
    masks = granet_jax.init_masks(granet_jax.static(sparsity), parameters())
    active = granet_jax.sparsity(masks).active
    assert active == math.floor((1 - sparsity) * 120 + 0.5)


def test_initial_masks_depend_on_seed_and_leaf_alone() -> None:
    method = granet_jax.static(0.5, distribution="uniform")
    params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}

    def make(seed: int, params: Any = params) -> Any:
        return granet_jax.init_masks(method, params, seed=seed)

    drawn = [make(seed) for seed in (0, -1)]
    for x, y in itertools.combinations(arrays(drawn), 2):
        assert not np.array_equal(x, y)
    assert_same(make(0), drawn[0])
    # Values and dtypes make no difference.
    other = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.bfloat16), params)
    assert_same(make(0, other), drawn[0])
    # `transform` passes its seed on.
    assert_same(granet_jax.transform(method, seed=-1).init(params).masks, drawn[1])


def test_initial_masks_are_uniformly_random() -> None:
    # Half of 400 x 64 weights: a column has 200 with a standard deviation of 10, a row
    # 32 with one of 4. The bounds are six of these.
    method = granet_jax.static(0.5, distribution="uniform")
    mask = np.asarray(granet_jax.init_masks(method, [jnp.ones((400, 64))])[0])
    assert mask.sum() == 400 * 32
    assert np.abs(mask.sum(axis=0) - 200).max() < 60
    assert np.abs(mask.sum(axis=1) - 32).max() < 24
    # Neighbours are independent, so half of them are equal.
    assert abs((mask[:, 1:] == mask[:, :-1]).mean() - 0.5) < 0.02


def test_initial_masks_from_shapes_alone() -> None:
    found = granet_jax.init_masks(HALF, shape_tree())
    assert_same(found, granet_jax.init_masks(HALF, parameters()))
    abstract = jax.eval_shape(lambda p: granet_jax.init_masks(HALF, p), parameters())
    kernel = abstract["dense"]["kernel"]
    assert (kernel.shape, kernel.dtype) == ((6, 8), jnp.bool_)
    assert abstract["dense"]["bias"] == DENSE
    state = jax.eval_shape(granet_jax.transform(HALF).init, shape_tree())
    assert jax.tree.structure(state.masks) == jax.tree.structure(found)


# --- Setting ----------------------------------------------------------------------


def test_none_may_stand_for_a_subtree() -> None:
    params = parameters()
    mask = np.arange(48).reshape(6, 8) % 3 == 0
    masks = {"conv": None, "dense": {"kernel": mask, "bias": None}}
    tx = granet_jax.transform(HALF, optax.sgd(0.1, momentum=0.9), masks=masks)
    state = tx.init(params)
    full = jax.tree.map(lambda _: optax.MaskedNode(), params)
    full["dense"]["kernel"] = mask
    assert_same(granet_jax.get_masks(state), full)
    _, state = jax.jit(tx.update)(gradients(1), state, params)
    trace = granet_jax.get_state(state).inner_state[0].trace
    np.testing.assert_array_equal(trace["dense"]["kernel"] != 0, mask)
    assert np.all(np.asarray(trace["conv"]["kernel"]) != 0)


def test_a_none_among_the_parameters_is_kept() -> None:
    params = {"w": jnp.ones((2, 3)), "none": None, "bias": jnp.ones(3)}
    masks = {"w": np.eye(2, 3), "none": None, "bias": None}
    tx = granet_jax.transform(HALF, optax.sgd(0.5), masks=masks)
    state = tx.init(params)
    expected = {"w": jnp.eye(2, 3, dtype=bool), "none": None, "bias": DENSE}
    assert_same(granet_jax.get_masks(state), expected)
    assert_same(granet_jax.set_masks(state, masks), state)
    updates, state = tx.update(params, state, params)
    new = optax.apply_updates(params, updates)
    assert new["w"].tolist() == [[0.5, 0.0, 0.0], [0.0, 0.5, 0.0]]
