"""Ghost skips against loops, as flax modules, and taken out of a training's state."""

import collections
import functools
import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.core
import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import granet_jax
from granet_jax import tost
from granet_jax.tost import linen
from tests.helpers import trees

PyTree = Any


def looped_skip(x: np.ndarray, features: int, strides: tuple[int, int]) -> np.ndarray:
    """Means over windows, by loops over all indices."""
    n, height, width, channels = x.shape
    out = (n, -(-height // strides[0]), -(-width // strides[1]), features)
    result = np.zeros(out)
    for b, i, j, c in itertools.product(*map(range, out)):
        if c < channels:
            window = x[
                b,
                i * strides[0] : (i + 1) * strides[0],
                j * strides[1] : (j + 1) * strides[1],
                c,
            ]
            result[b, i, j, c] = window.mean()
    return result


@hypothesis.given(
    *(st.integers(1, 6),) * 2, *(st.integers(1, 3),) * 3, st.integers(1, 5)
)
@hypothesis.settings(max_examples=12)
def test_ghost_skip_by_loops(
    height: int, width: int, s0: int, s1: int, channels: int, features: int
) -> None:
    shape = (2, height, width, channels)
    x = np.random.default_rng(height).normal(size=shape).astype(np.float32)
    found = tost.ghost_skip(jnp.asarray(x), features, (s0, s1))
    np.testing.assert_allclose(found, looped_skip(x, features, (s0, s1)), atol=1e-6)


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("strides", [1, 2, 3])
def test_shape_of_the_convolution_beside_it(size: int, strides: int) -> None:
    x = jax.ShapeDtypeStruct((2, size, size + 1, 3), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((3, 3, 3, 5), jnp.bfloat16)
    for padding in ("SAME", [(1, 1), (1, 1)]):
        conv = functools.partial(
            lax.conv_general_dilated,
            window_strides=(strides, strides),
            padding=padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        skip = functools.partial(tost.ghost_skip, features=5, strides=strides)
        assert jax.eval_shape(skip, x) == jax.eval_shape(conv, x, kernel)
        init = linen.GhostSkip(5, strides, "conv").init_with_output
        ghost, _ = jax.eval_shape(
            functools.partial(init, train=True), jax.random.key(0), x
        )
        assert ghost.shape == jax.eval_shape(conv, x, kernel).shape


def test_identity_is_the_input_to_the_bit() -> None:
    x = jnp.asarray([[[0.0, -0.0, jnp.inf]], [[1.5, -jnp.inf, jnp.nan]]])
    trees.assert_same(tost.ghost_skip(x, 3), x)
    # Dense layers have no positions.
    trees.assert_same(tost.ghost_skip(x[:, 0], 2), x[:, 0, :2])


def test_the_identity_as_a_module_is_the_function() -> None:
    x = jnp.arange(60.0).reshape(1, 5, 4, 3)
    module = linen.GhostSkip(5, 2)
    variables = module.init(jax.random.key(0), x, train=True)
    assert not jax.tree.leaves(variables)
    trees.assert_same(module.apply(variables, x, train=True), tost.ghost_skip(x, 5, 2))


def test_ghost_skip_under_transformations() -> None:
    x = jnp.arange(24.0).reshape(2, 3, 4, 1)
    f = functools.partial(tost.ghost_skip, features=2, strides=2)
    lanes = jax.jit(jax.vmap(lambda y: f(y[None])[0]))(x)
    np.testing.assert_array_equal(lanes, f(x))
    # Every window's mean: the gradient is 1 / its size, 4 or 2 here.
    slope = jax.grad(lambda x: jnp.sum(f(x)))(x)
    np.testing.assert_array_equal(slope[0, :, 0, 0], [0.25, 0.25, 0.5])


def test_conv_ghost_at_the_authors_initialisation() -> None:
    skips = tost.reproduce().skips
    assert skips is not None
    ghost = linen.make_skip(skips, 4)
    x = np.random.default_rng(0).normal(size=(8, 5, 5, 3)).astype(np.float32)
    y, _ = ghost.init_with_output(jax.random.key(0), x, True)
    total = x.sum(-1, dtype=np.float64)
    expected = 1e-4 * (total - total.mean()) / np.sqrt(1e-8 * total.var() + 1e-5)
    for channel in range(4):
        np.testing.assert_allclose(y[..., channel], expected, atol=1e-5)


def test_size_of_conv_ghosts_in_resnet18() -> None:
    """One beside each 3 x 3 convolution of the blocks: the specification's figures."""
    kernels, norms, before = 0, 0, 64
    for features in (64, 64, 128, 128, 256, 256, 512, 512):
        for channels in (before, features):
            x = jax.ShapeDtypeStruct((1, 4, 4, channels), jnp.float32)
            ghost = linen.GhostSkip(features, kind="conv")
            shapes = jax.eval_shape(
                functools.partial(ghost.init, train=True), jax.random.key(0), x
            )["params"]
            kernels += shapes["ghost_conv"]["kernel"].size
            norms += sum(leaf.size for leaf in jax.tree.leaves(shapes["ghost_norm"]))
        before = features
    assert (kernels, norms) == (1_220_608, 7_680)


class Net(nn.Module):
    """A convolution with a norm, without one, and a dense layer; ghosts beside them."""

    ghosts: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        train: bool = True,
        alpha: jax.Array | float = 1.0,
        act: Callable[[jax.Array], jax.Array] = nn.relu,
    ) -> jax.Array:
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        y = norm(name="norm")(nn.Conv(4, (3, 3), 2, name="conv", use_bias=False)(x))
        if self.ghosts:
            # Under its own name: that of the module does not begin with "ghost_".
            y = y + alpha * linen.GhostSkip(4, 2, "conv")(x, train)
        x = act(y)
        y = Inner(self.ghosts, name="inner")(x, train, alpha)
        return nn.Dense(3, name="output")(y.mean((1, 2)))


class Inner(nn.Module):
    """Holds statistics of a ghost only: the plain one has none at all."""

    ghosts: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, alpha: jax.Array | float
    ) -> jax.Array:
        y = nn.Conv(4, (3, 3), name="conv")(x)
        if self.ghosts:
            ghost = linen.GhostSkip(4, kind="conv", name="ghost_2")
            y = y + alpha * ghost(x, train)
        return y


X = jnp.asarray(np.random.default_rng(1).normal(size=(6, 5, 5, 2)), jnp.float32)
WHERE = tost.without_ghosts
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adamw": lambda: optax.adamw(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "masked": lambda: optax.masked(
        optax.adam(0.1), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
    "multi_transform": lambda: optax.multi_transform(
        {"kernel": optax.sgd(0.1, 0.9), "rest": optax.adam(0.1)},
        lambda p: jax.tree.map(lambda x: "kernel" if x.ndim > 1 else "rest", p),
    ),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.1), 2),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(0.1),
    "granet": lambda: optax.chain(
        optax.clip_by_global_norm(1.0),
        granet_jax.transform(
            granet_jax.granet(0.75, 6, interval=2, end_step=4),
            optax.adamw(0.1),
            where=WHERE,
        ),
    ),
    "snfs": lambda: granet_jax.transform(
        granet_jax.snfs(0.5, 6, interval=2), optax.sgd(0.1, 0.9), where=WHERE
    ),
}


@functools.cache
def ghost_variables() -> PyTree:
    return jax.jit(Net(ghosts=True).init)(jax.random.key(0), X)


@functools.cache
def plain_variables() -> PyTree:
    return jax.jit(Net(ghosts=False).init)(jax.random.key(0), X)


def test_variables_without_ghosts_are_the_plain_networks() -> None:
    with_ghosts, plain = ghost_variables(), plain_variables()
    assert jax.tree.structure(with_ghosts) != jax.tree.structure(plain)
    dropped = tost.drop_ghosts(with_ghosts)
    # Also the initial values, since flax draws each by its own name.
    trees.assert_same(dropped, plain)
    # Their statistics at the top: the plain network has none then.
    assert tost.drop_ghosts({"batch_stats": {"ghost_1": {"mean": X}}}) == {}


def test_the_ghost_network_without_coefficient_is_the_plain_one() -> None:
    y, _ = Net(ghosts=True).apply(
        ghost_variables(), X, alpha=0.0, mutable=["batch_stats"]
    )
    plain, _ = Net(ghosts=False).apply(plain_variables(), X, mutable=["batch_stats"])
    np.testing.assert_allclose(y, plain, atol=1e-6)
    y, _ = Net(ghosts=True).apply(ghost_variables(), X, mutable=["batch_stats"])
    assert float(jnp.max(jnp.abs(y - plain))) > 0.1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_states_without_ghosts(name: str) -> None:
    params = ghost_variables()["params"]
    tx = OPTIMIZERS[name]()
    state = tx.init(params)
    plain_params, plain_state = tost.drop_ghosts((params, state))
    expected = tx.init(plain_variables()["params"])
    assert jax.tree.structure(plain_state) == jax.tree.structure(expected)
    assert trees.types(plain_state) == trees.types(expected)
    # What is left are the arrays that were there.
    before = dict(jax.tree_util.tree_leaves_with_path((params, state)))
    after = jax.tree_util.tree_leaves_with_path((plain_params, plain_state))
    assert len(after) < len(before)
    assert all(before[path] is leaf for path, leaf in after)
    # And the training can go on.
    updates, state = jax.eval_shape(tx.update, plain_params, plain_state, plain_params)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    assert jax.tree.structure(updates) == jax.tree.structure(plain_params)


def test_a_training_with_ghosts_and_without() -> None:
    config = tost.ToST(
        neurons=tost.Neurons(), skips=tost.Skips(kind="conv"), ghost_fraction=0.5
    )
    total = 6
    length = tost.ghost_steps(config, total)
    act, alpha = tost.activation(config, total), tost.skip_alpha(config, total)
    assert length == 3
    assert act is not None
    assert alpha is not None
    tx = granet_jax.transform(
        granet_jax.static(0.5), optax.sgd(0.05, momentum=0.9), where=WHERE
    )
    compiled = []

    @functools.partial(jax.jit, static_argnames="ghosts")
    def train(variables: PyTree, state: Any, step: jax.Array, ghosts: bool) -> Any:
        compiled.append(ghosts)
        more = {}
        if ghosts:
            more = {"alpha": alpha(step), "act": functools.partial(act, step=step)}

        def loss(params: PyTree) -> Any:
            now = {**variables, "params": params}
            y, changed = Net(ghosts).apply(now, X, mutable=["batch_stats"], **more)
            return jnp.mean(jnp.square(y - 1.0)), changed

        (value, changed), grads = jax.value_and_grad(loss, has_aux=True)(
            variables["params"]
        )
        updates, state = tx.update(grads, state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {**changed, "params": params}, state, value

    variables = ghost_variables()
    state = tx.init(variables["params"])
    losses = []
    for step in range(total):
        if step == length:
            variables, state = tost.drop_ghosts((variables, state))
            assert jax.tree.structure(variables) == jax.tree.structure(
                plain_variables()
            )
        variables, state, value = train(
            variables, state, jnp.int32(step), ghosts=step < length
        )
        losses.append(float(value))
    assert compiled == [True, False]
    assert losses[-1] < losses[0]
    trees.assert_same(
        granet_jax.apply_masks(variables["params"], granet_jax.get_masks(state)),
        variables["params"],
    )
    assert granet_jax.sparsity(granet_jax.get_masks(state)).overall == 0.5


def test_ghosts_carry_no_mask_and_do_not_count() -> None:
    method = granet_jax.static(0.5)
    masks = granet_jax.init_masks(method, ghost_variables()["params"], where=WHERE)
    plain = granet_jax.init_masks(method, plain_variables()["params"], where=WHERE)
    assert granet_jax.sparsity(masks) == granet_jax.sparsity(plain)
    trees.assert_same(tost.drop_ghosts(masks), plain)


class Record(NamedTuple):
    ghost_1: Any
    kernel: Any


def test_containers() -> None:
    tree = {
        "a": [({"ghost_x": 1, "b": 2},), None, {}],
        "not_ghost_": 3,
        "ghostly": 4,
        "flat/ghost_1/kernel": 5,
        "only": {"ghost_1": 1, "deep": {"ghost_2": 2}},
    }
    assert tost.drop_ghosts(tree) == {
        "a": [({"b": 2},), None, {}],
        "not_ghost_": 3,
        "ghostly": 4,
    }
    assert tost.drop_ghosts({1: 2, 3: {"ghost_1": 4}}) == {1: 2}
    frozen = tost.drop_ghosts(flax.core.freeze({"x": {"ghost_1": 1, "y": 2}}))
    assert isinstance(frozen, flax.core.FrozenDict)
    assert frozen == {"x": {"y": 2}}
    ordered = tost.drop_ghosts(collections.OrderedDict(b=1, ghost_a=2, a=3))
    assert list(ordered.items()) == [("b", 1), ("a", 3)]
    # A record whose ghost is gone is fine; one that still has it is not.
    assert tost.drop_ghosts(Record(None, 1)) == Record(None, 1)
    with pytest.raises(ValueError, match=r"tree has the ghost 'x/ghost_1' in a record"):
        tost.drop_ghosts({"x": Record(1, 2)})


IMAGE = jnp.ones((1, 4, 4, 2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tost.ghost_skip(IMAGE, 0), ValueError, "features must be at least 1"),
        (lambda: tost.ghost_skip(IMAGE, 2.0), TypeError, "features must be an integer"),
        (
            lambda: tost.ghost_skip(IMAGE, 2, 0),
            ValueError,
            "strides must be at least 1",
        ),
        (lambda: tost.ghost_skip(IMAGE, 2, 1.5), TypeError, "strides must be an integ"),
        (
            lambda: tost.ghost_skip(IMAGE, 2, (2,)),
            ValueError,
            "strides must be one integer or 2 (for x of shape (1, 4, 4, 2)), got (2,).",
        ),
        (
            lambda: tost.ghost_skip(IMAGE[0, 0, 0], 2),
            ValueError,
            "x must have shape (n",
        ),
        (
            lambda: linen.GhostSkip(2, kind="pool").init(
                jax.random.key(0), IMAGE, True
            ),
            ValueError,
            "kind must be one of 'identity', 'conv', got 'pool'.",
        ),
    ],
)
def test_refused(call: Callable[[], Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
