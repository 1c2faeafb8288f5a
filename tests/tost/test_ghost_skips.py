"""Ghost skips against loops, as flax modules, and removed from a training state."""

import collections
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax import tost
from granet_jax.tost import linen
from tests.helpers import trees

PyTree = Any

# --- The skip without parameters


def skip_by_loops(x: np.ndarray, features: int, strides: tuple[int, int]) -> np.ndarray:
    n, height, width, channels = x.shape
    s, t = strides
    result = np.zeros((n, -(-height // s), -(-width // t), features))
    for b, i, j, c in itertools.product(*map(range, result.shape)):
        if c < channels:
            window = x[b, i * s : (i + 1) * s, j * t : (j + 1) * t, c]
            result[b, i, j, c] = window.mean()
    return result


@pytest.mark.parametrize(
    ("shape", "features", "strides"),
    [
        # The last window is cut off along one axis or both, or is all there is.
        ((2, 6, 5, 3), 3, (2, 3)),
        ((2, 5, 4, 2), 4, (3, 3)),
        ((1, 1, 2, 1), 2, (2, 3)),
        # Fewer features than channels, and no strides.
        ((2, 4, 3, 3), 1, (2, 1)),
        ((2, 3, 3, 2), 5, (1, 1)),
    ],
)
def test_ghost_skip_by_loops(
    shape: tuple[int, ...], features: int, strides: tuple[int, int]
) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    y = tost.ghost_skip(jnp.asarray(x), features, strides)
    np.testing.assert_allclose(y, skip_by_loops(x, features, strides), atol=1e-6)


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("strides", [1, 2, 3])
def test_shape_is_that_of_the_convolution(size: int, strides: int) -> None:
    x = jax.ShapeDtypeStruct((2, size, size + 1, 3), jnp.bfloat16)
    skip = functools.partial(tost.ghost_skip, features=5, strides=strides)
    for padding in ("SAME", 1):
        conv = nn.Conv(5, (3, 3), strides, padding, dtype=jnp.bfloat16)
        for layer in (conv, linen.GhostSkip(5, strides, "conv", dtype=jnp.bfloat16)):
            train = {} if layer is conv else {"train": True}
            init = functools.partial(layer.init_with_output, **train)
            y, _ = jax.eval_shape(init, jax.random.key(0), x)
            assert jax.eval_shape(skip, x) == y


def test_identity_is_exact_and_transforms() -> None:
    x = jnp.asarray([[[0.0, -0.0, jnp.inf]], [[1.5, -jnp.inf, jnp.nan]]])
    trees.assert_same(tost.ghost_skip(x, 3), x)
    # Dense layers have no positions.
    trees.assert_same(tost.ghost_skip(x[:, 0], 2), x[:, 0, :2])
    x = jnp.arange(24.0).reshape(2, 3, 4, 1)
    skip = functools.partial(tost.ghost_skip, features=2, strides=2)
    lanes = jax.jit(jax.vmap(lambda y: skip(y[None])[0]))(x)
    np.testing.assert_array_equal(lanes, skip(x))
    # The gradient is 1 over the size of the window, which is 4, or 2 at the edge.
    slope = jax.grad(lambda x: jnp.sum(skip(x)))(x)
    np.testing.assert_array_equal(slope[0, :, 0, 0], [0.25, 0.25, 0.5])
    module = linen.GhostSkip(2, 2)
    trees.assert_same(module.apply({}, x, train=True), skip(x))


# --- The skip with parameters


def test_conv_skip_with_the_authors_initializer() -> None:
    skips = tost.reproduce().skips
    assert skips is not None
    x = np.random.default_rng(0).normal(size=(8, 5, 5, 3)).astype(np.float32)
    y, _ = linen.make_skip(skips, 4).init_with_output(jax.random.key(0), x, True)
    total = x.sum(-1, keepdims=True, dtype=np.float64)
    expected = 1e-4 * (total - total.mean()) / np.sqrt(1e-8 * total.var() + 1e-5)
    np.testing.assert_allclose(y, np.repeat(expected, 4, axis=-1), atol=1e-5)


def test_number_of_conv_skip_parameters_in_resnet18() -> None:
    """One skip around each 3 x 3 convolution of the residual blocks."""
    widths = np.repeat([64, 64, 128, 256, 512], [1, 4, 4, 4, 4])
    kernels, norms = 0, 0
    for channels, features in itertools.pairwise(widths):
        x = jax.ShapeDtypeStruct((1, 4, 4, channels), jnp.float32)
        ghost = linen.GhostSkip(features, kind="conv")
        init = functools.partial(ghost.init, train=True)
        params = jax.eval_shape(init, jax.random.key(0), x)["params"]
        kernels += params["ghost_conv"]["kernel"].size
        norms += sum(leaf.size for leaf in jax.tree.leaves(params["ghost_norm"]))
    assert (kernels, norms) == (1_220_608, 7_680)


# --- Networks with ghosts and without


class Net(nn.Module):
    """Two convolutions, with a norm and without, and a dense layer."""

    ghosts: bool

    @nn.compact
    def __call__(self, x: Any, train: bool = True, alpha: float = 1.0) -> Any:
        y = nn.Conv(4, (3, 3), 2, name="conv", use_bias=False)(x)
        y = nn.BatchNorm(use_running_average=not train, name="norm")(y)
        if self.ghosts:
            # The default name of the module does not begin with "ghost_".
            y = y + alpha * linen.GhostSkip(4, 2, "conv")(x, train)
        y = Inner(self.ghosts, name="inner")(nn.relu(y), train, alpha)
        return nn.Dense(3, name="output")(y.mean((1, 2)))


class Inner(nn.Module):
    """Only its ghost has statistics; the plain module has none."""

    ghosts: bool

    @nn.compact
    def __call__(self, x: Any, train: bool, alpha: float) -> Any:
        y = nn.Conv(4, (3, 3), name="conv")(x)
        if self.ghosts:
            y = y + alpha * linen.GhostSkip(4, kind="conv", name="ghost_2")(x, train)
        return y


X = jnp.asarray(np.random.default_rng(1).normal(size=(6, 5, 5, 2)), jnp.float32)
WHERE = tost.without_ghosts


@functools.cache
def variables_of(ghosts: bool) -> PyTree:
    return jax.jit(Net(ghosts).init)(jax.random.key(0), X)


def test_without_ghosts_it_is_the_plain_network() -> None:
    ghosts, plain = variables_of(True), variables_of(False)
    assert jax.tree.structure(ghosts) != jax.tree.structure(plain)
    # Initial values agree because flax draws each by its own name.
    trees.assert_same(tost.drop_ghosts(ghosts), plain)
    assert tost.drop_ghosts({"batch_stats": {"ghost_1": {"mean": X}}}) == {}
    y, without, expected = (
        Net(g).apply(variables_of(g), X, alpha=alpha, mutable=["batch_stats"])[0]
        for g, alpha in ((True, 1.0), (True, 0.0), (False, 0.0))
    )
    np.testing.assert_allclose(without, expected, atol=1e-6)
    assert float(jnp.max(jnp.abs(y - expected))) > 0.1
    # Ghosts have no masks and do not count.
    masks, plain_masks = (
        granet_jax.init_masks(granet_jax.static(0.5), v["params"], where=WHERE)
        for v in (ghosts, plain)
    )
    assert granet_jax.sparsity(masks) == granet_jax.sparsity(plain_masks)
    trees.assert_same(tost.drop_ghosts(masks), plain_masks)


def is_kernel(params: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.ndim > 1, params)


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adamw": lambda: optax.adamw(0.1),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "masked": lambda: optax.masked(optax.adam(0.1), is_kernel),
    "multi_transform": lambda: optax.multi_transform(
        {True: optax.sgd(0.1, 0.9), False: optax.adam(0.1)}, is_kernel
    ),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.1), 2),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(0.1),
    "snfs": lambda: optax.chain(
        optax.clip_by_global_norm(1.0),
        granet_jax.transform(
            granet_jax.snfs(0.5, 6, interval=2), optax.sgd(0.1, 0.9), where=WHERE
        ),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_states_without_ghosts(name: str) -> None:
    params = variables_of(True)["params"]
    tx = OPTIMIZERS[name]()
    state = tx.init(params)
    plain_params, plain_state = tost.drop_ghosts((params, state))
    expected = tx.init(variables_of(False)["params"])
    assert jax.tree.structure(plain_state) == jax.tree.structure(expected)
    assert trees.types(plain_state) == trees.types(expected)
    # The remaining leaves are the original arrays.
    before = dict(jax.tree_util.tree_leaves_with_path((params, state)))
    after = jax.tree_util.tree_leaves_with_path((plain_params, plain_state))
    assert len(after) < len(before)
    assert all(before[path] is leaf for path, leaf in after)
    # Training can continue.
    updates, state = jax.eval_shape(tx.update, plain_params, plain_state, plain_params)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    assert jax.tree.structure(updates) == jax.tree.structure(plain_params)


class Record(NamedTuple):
    ghost_1: Any
    kernel: Any


def test_drops_ghosts_from_all_containers() -> None:
    tree = {
        "a": [({"ghost_x": 1, "b": 2},), None, {}],
        "not_ghost_": 3,
        "ghostly": 4,
        "flat/ghost_1/kernel": 5,
        "ghosts only": {"ghost_1": 1, "deep": {"ghost_2": 2}},
    }
    plain = {"a": [({"b": 2},), None, {}], "not_ghost_": 3, "ghostly": 4}
    assert tost.drop_ghosts(tree) == plain
    assert tost.drop_ghosts({1: 2, 3: {"ghost_1": 4}}) == {1: 2}
    frozen = tost.drop_ghosts(flax.core.freeze({"x": {"ghost_1": 1, "y": 2}}))
    assert isinstance(frozen, flax.core.FrozenDict)
    assert frozen == {"x": {"y": 2}}
    ordered = tost.drop_ghosts(collections.OrderedDict(b=1, ghost_a=2, a=3))
    assert list(ordered.items()) == [("b", 1), ("a", 3)]
    assert tost.drop_ghosts(Record(None, 1)) == Record(None, 1)
