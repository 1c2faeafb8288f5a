"""`transform` inside other transformations, on other containers, in other libraries.

Whatever surrounds it, a run must be to the bit the run on a plain dict: the inner
optimizer's numbers are powers of two, so that compilations cannot round differently.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.core
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import granet_jax
from tests.helpers import trees

PyTree = Any
STEPS = 7
SPARSITY = 0.75
METHODS = {
    # Updates at steps 2, 4 (both prune) and 6.
    "granet": granet_jax.granet(SPARSITY, 8, interval=2, end_step=4),
    "rigl": granet_jax.rigl(SPARSITY, 8, interval=2),
    "snfs": granet_jax.snfs(SPARSITY, 8, interval=2, decay=0.5),
}
INNER = optax.sgd(0.125, momentum=0.5)


def target(name: str, step: int, size: int) -> int:
    """Active weights that the method prescribes after a step, among `size`."""
    sparsity = SPARSITY
    if name == "granet" and step < 4:
        sparsity -= SPARSITY * (0.125 if step >= 2 else 1.0)
    return math.floor((1 - sparsity) * size + 0.5)


def gradient(step: int) -> PyTree:
    """Eighths: exact sums of squares, and ties among them."""
    return jax.tree.map(lambda g: jnp.round(8 * g) / 8, trees.gradients(step))


def leaves(tree: PyTree) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def assert_equal_leaves(found: PyTree, expected: PyTree) -> None:
    pairs = zip(leaves(found), leaves(expected), strict=True)
    for a, b in pairs:
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.tobytes() == b.tobytes()


def assert_sparse(params: PyTree, masks: PyTree, active: int) -> None:
    """Zero where pruned, and this many active weights (none zero by accident)."""
    assert sum(int(m.sum()) for m in leaves(masks)) == active
    found = jax.tree.leaves(masks, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    for mask, p in zip(found, leaves(params), strict=True):
        if not isinstance(mask, optax.MaskedNode):
            assert np.all(p[~np.asarray(mask)] == 0)


def make_step(tx: Any) -> Callable[..., Any]:
    @jax.jit
    def step(params: PyTree, state: Any, grads: PyTree) -> tuple[PyTree, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def start(tx: Any, params: PyTree) -> tuple[PyTree, Any]:
    state = tx.init(params)
    return granet_jax.apply_masks(params, granet_jax.get_masks(state)), state


class Run(NamedTuple):
    """Parameters and masks after every step, the start included."""

    params: list[PyTree]
    masks: list[PyTree]


def everything(tree: PyTree) -> PyTree:
    return tree


def dense_part(tree: PyTree) -> PyTree:
    return tree["dense"]


@functools.cache
def plain_run(
    name: str,
    pick: Callable[[PyTree], PyTree] = everything,
    prepare: Callable[[PyTree], PyTree] = everything,
) -> Run:
    """The run on (a part of) the plain dict, with gradients prepared beforehand."""
    tx = granet_jax.transform(METHODS[name], INNER)
    params, state = start(tx, pick(trees.parameters()))
    step = make_step(tx)
    run = Run([params], [granet_jax.get_masks(state)])
    for count in range(1, STEPS + 1):
        params, state = step(params, state, prepare(pick(gradient(count))))
        run.params.append(params)
        run.masks.append(granet_jax.get_masks(state))
    return run


# --- Containers of parameters -----------------------------------------------------


class Dense(NamedTuple):
    """A layer as a NamedTuple, its fields in the order of the dict's keys."""

    bias: Any
    kernel: Any


class Network(NamedTuple):
    conv: Any
    dense: Any


class Kernel(nnx.Module):
    def __init__(self, **arrays: jax.Array) -> None:
        for name, array in arrays.items():
            setattr(self, name, nnx.Param(array))


class Pair(nnx.Module):
    def __init__(self, tree: PyTree) -> None:
        self.conv = Kernel(**tree["conv"])
        self.dense = Kernel(**tree["dense"])


CONTAINERS: dict[str, Callable[[PyTree], PyTree]] = {
    "FrozenDict": flax.core.freeze,
    "tuple": lambda t: (
        t["conv"]["kernel"],
        (t["dense"]["bias"], t["dense"]["kernel"]),
    ),
    "list_with_none": lambda t: [None, t["conv"], [t["dense"], None], {}],
    "NamedTuple": lambda t: Network(t["conv"], Dense(**t["dense"])),
    "nnx.State": lambda t: nnx.state(Pair(t)),
    "nnx.State_of_arrays": lambda t: nnx.to_pure_dict(nnx.state(Pair(t))),
}


@pytest.mark.parametrize(
    ("container", "name"),
    [*((c, "granet") for c in CONTAINERS), ("list_with_none", "snfs")],
)
def test_container_of_parameters(container: str, name: str) -> None:
    build = CONTAINERS[container]
    tx = granet_jax.transform(METHODS[name], INNER)
    params, state = start(tx, build(trees.parameters()))
    structure = jax.tree.structure((params, state))
    step = make_step(tx)
    expected = plain_run(name)
    for count in range(STEPS + 1):
        if count > 0:
            params, state = step(params, state, build(gradient(count)))
        assert jax.tree.structure((params, state)) == structure
        masks = granet_jax.get_masks(state)
        assert_sparse(params, masks, target(name, count, trees.MASKABLE))
        assert_equal_leaves(params, expected.params[count])
        assert_equal_leaves(masks, expected.masks[count])
    assert jax.tree.structure(params) == jax.tree.structure(build(trees.parameters()))
    assert step._cache_size() == 1


# --- Other transformations around -------------------------------------------------


class Wrapped(NamedTuple):
    """A transformation around `transform`.

    Attributes:
      build: the transformation for a given sparse one.
      repeat: how often each gradient is given.
      dense_only: whether it sees but the subtree "dense".
      clipped: whether it clips the gradient by its norm.
    """

    build: Callable[[Any], Any]
    repeat: int = 1
    dense_only: bool = False
    clipped: bool = False


ONLY_DENSE = {
    "conv": {"kernel": False},
    "dense": {"bias": True, "kernel": True},
}
NOT_DENSE = jax.tree.map(lambda x: not x, ONLY_DENSE)
LABELS = jax.tree.map(lambda x: "sparse" if x else "rest", ONLY_DENSE)
CLIP = optax.clip_by_global_norm(1.0)
WRAPPED = {
    "chain": Wrapped(lambda tx: optax.chain(CLIP, tx), clipped=True),
    "MultiSteps": Wrapped(lambda tx: optax.MultiSteps(tx, 2), repeat=2),
    "masked": Wrapped(
        lambda tx: optax.chain(
            optax.masked(tx, ONLY_DENSE), optax.masked(optax.adam(0.01), NOT_DENSE)
        ),
        dense_only=True,
    ),
    "multi_transform_tree": Wrapped(
        lambda tx: optax.multi_transform(
            {"sparse": tx, "rest": optax.adam(0.01)}, LABELS
        ),
        dense_only=True,
    ),
    "multi_transform_function": Wrapped(
        lambda tx: optax.multi_transform(
            {"rest": optax.adam(0.01), "sparse": tx}, lambda _: LABELS
        ),
        dense_only=True,
    ),
    "apply_if_finite": Wrapped(lambda tx: optax.apply_if_finite(tx, 3)),
    "with_extra_args": Wrapped(optax.with_extra_args_support),
    "nest": Wrapped(
        lambda tx: optax.MultiSteps(
            optax.apply_if_finite(
                optax.chain(
                    optax.identity(),
                    optax.multi_transform(
                        {"sparse": optax.chain(tx), "rest": optax.adam(0.01)}, LABELS
                    ),
                ),
                3,
            ),
            2,
        ),
        repeat=2,
        dense_only=True,
    ),
}


@jax.jit
def clipped(grads: PyTree) -> PyTree:
    """Clipped in a compilation of its own."""
    return CLIP.update(grads, CLIP.init(grads))[0]


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_inside_another_transformation(wrapper: str) -> None:
    name = "granet"
    wrapped = WRAPPED[wrapper]
    pick = dense_part if wrapped.dense_only else everything
    tx = wrapped.build(granet_jax.transform(METHODS[name], INNER))
    state = tx.init(trees.parameters())
    params = trees.parameters()
    sparse = granet_jax.apply_masks(pick(params), pick(granet_jax.get_masks(state)))
    params = {**params, "dense": sparse} if wrapped.dense_only else sparse
    expected = (
        plain_run(name, prepare=clipped) if wrapped.clipped else plain_run(name, pick)
    )
    step = make_step(tx)
    conv = params["conv"]
    for count in range(1, STEPS + 1):
        for _ in range(wrapped.repeat):
            params, state = step(params, state, gradient(count))
        found = granet_jax.get_state(state)
        assert found.count == count
        size = 48 if wrapped.dense_only else trees.MASKABLE
        masks = granet_jax.get_masks(state)
        assert_sparse(pick(params), pick(masks), target(name, count, size))
        assert_equal_leaves(pick(params), expected.params[count])
        assert_equal_leaves(masks, expected.masks[count])
    assert step._cache_size() == 1
    # What another branch trains moves, and nothing of it is pruned.
    assert np.all(params["conv"]["kernel"] != conv["kernel"]) or not wrapped.dense_only


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_set_masks_in_a_nest(wrapper: str) -> None:
    wrapped = WRAPPED[wrapper]
    # Random masks at first, all but others afterwards.
    method = granet_jax.static(0.5)
    tx = wrapped.build(granet_jax.transform(method, INNER, seed=0))
    params = trees.parameters()
    state = tx.init(params)
    old = granet_jax.get_masks(state)
    new = jax.tree.map(jnp.logical_not, old)
    changed = granet_jax.set_masks(state, new)
    assert jax.tree.structure(changed) == jax.tree.structure(state)
    trees.assert_same(granet_jax.get_masks(changed), new)
    # The masks alone changed, and only in the copy.
    trees.assert_same(granet_jax.set_masks(changed, old), state)
    trees.assert_same(granet_jax.get_masks(state), old)
    # The next step makes the parameters agree.
    state = changed
    step = make_step(tx)
    for count in range(1, wrapped.repeat + 1):
        params, state = step(params, state, gradient(count))
    trees.assert_same(granet_jax.get_masks(state), new)
    pick = dense_part if wrapped.dense_only else everything
    size = 48 if wrapped.dense_only else trees.MASKABLE
    assert_sparse(pick(params), pick(new), size // 2)


def test_no_or_several_states() -> None:
    params = trees.parameters()
    sparse = granet_jax.transform(granet_jax.static(0.5), INNER)
    none = optax.adam(0.1).init(params)
    both = optax.multi_transform({"sparse": sparse, "rest": sparse}, LABELS)
    for state, count in [(none, 0), (both.init(params), 2)]:
        for get in (granet_jax.get_state, granet_jax.get_masks):
            with pytest.raises(ValueError, match=f"got {count}"):
                get(state)
        with pytest.raises(ValueError, match=f"got {count}"):
            granet_jax.set_masks(state, params)
    # Each of the two is found in its own part.
    for label, active in [("sparse", 24), ("rest", 36)]:
        part = both.init(params).inner_states[label]
        assert granet_jax.sparsity(granet_jax.get_masks(part)).active == active


def test_apply_if_finite_around_skips_a_step() -> None:
    # A step that is skipped must not count, even where the masks would have changed.
    tx = optax.apply_if_finite(granet_jax.transform(METHODS["granet"], INNER), 3)
    params, state = start(tx, trees.parameters())
    step = make_step(tx)
    expected = plain_run("granet")
    bad = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), gradient(0))
    for count in range(1, STEPS + 1):
        before = params
        params, state = step(params, state, bad)
        trees.assert_same(params, before)
        params, state = step(params, state, gradient(count))
        assert_equal_leaves(params, expected.params[count])
        assert_equal_leaves(granet_jax.get_masks(state), expected.masks[count])


# --- Other libraries --------------------------------------------------------------

INPUTS = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
TARGETS = np.tanh(INPUTS @ np.linspace(-1, 1, 12).reshape(6, 2)).astype(np.float32)
# Kernels of 6 x 10 and 10 x 2, after which the biases and the norm are dense.
WEIGHTS = 80


def loss_of(prediction: jax.Array) -> jax.Array:
    return jnp.mean((prediction - TARGETS) ** 2)


class Plain:
    """The run on plain dicts alongside, on the other library's gradients."""

    def __init__(self, name: str, params: PyTree) -> None:
        tx = granet_jax.transform(METHODS[name], INNER)
        self.params, self.state = start(tx, params)
        self.step = make_step(tx)

    def check(
        self, name: str, count: int, grads: PyTree, params: PyTree, masks: PyTree
    ) -> None:
        """Takes a step with `grads` (of these leaves), then compares."""
        if count > 0:
            structure = jax.tree.structure(self.params)
            grads = jax.tree.unflatten(structure, jax.tree.leaves(grads))
            self.params, self.state = self.step(self.params, self.state, grads)
        assert_equal_leaves(params, self.params)
        assert_equal_leaves(masks, self.state.masks)
        assert_sparse(self.params, self.state.masks, target(name, count, WEIGHTS))


def plain_dict(tree: PyTree) -> PyTree:
    """A flat dict of the leaves, in their order."""
    return {f"{i:03}": x for i, x in enumerate(jax.tree.leaves(tree))}


class LinenModel(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x: Any) -> Any:
        x = flax.linen.LayerNorm()(flax.linen.Dense(10)(x))
        return flax.linen.Dense(2)(flax.linen.relu(x))


def test_flax_linen_train_state() -> None:
    name = "rigl"
    model = LinenModel()
    params = model.init(jax.random.key(0), INPUTS)["params"]
    tx = optax.chain(optax.identity(), granet_jax.transform(METHODS[name], INNER))
    state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    state = state.replace(
        # Flax starts with a Python integer, which compiles once more.
        step=jnp.zeros((), jnp.int32),
        params=granet_jax.apply_masks(params, granet_jax.get_masks(state.opt_state)),
    )
    plain = Plain(name, plain_dict(params))
    losses = []

    @jax.jit
    def loss_and_grads(state: Any) -> Any:
        return jax.value_and_grad(
            lambda p: loss_of(state.apply_fn({"params": p}, INPUTS))
        )(state.params)

    apply_gradients = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    plain.check(name, 0, None, state.params, granet_jax.get_masks(state.opt_state))
    for count in range(1, STEPS + 1):
        loss, grads = loss_and_grads(state)
        losses.append(float(loss))
        state = apply_gradients(state, grads)
        assert state.step == count
        masks = granet_jax.get_masks(state.opt_state)
        plain.check(name, count, grads, state.params, masks)
    assert apply_gradients._cache_size() == 1
    assert losses[-1] < losses[0]


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(6, 10, rngs=rngs)
        # Its running mean and variance are no parameters.
        self.norm = nnx.BatchNorm(10, rngs=rngs)
        self.second = nnx.Linear(10, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.second(nnx.relu(self.norm(self.first(x))))


def pure(tree: PyTree) -> PyTree:
    """The arrays in nnx's variables, in the same containers."""
    return nnx.as_pure(tree)


def test_nnx_optimizer() -> None:
    name = "granet"
    model = NnxModel(nnx.Rngs(0))
    tx = optax.chain(optax.identity(), granet_jax.transform(METHODS[name], INNER))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = pure(nnx.state(model, nnx.Param))
    plain = Plain(name, plain_dict(params))
    masks = pure(granet_jax.get_masks(optimizer.opt_state))
    nnx.update(model, granet_jax.apply_masks(params, masks))

    @nnx.jit
    def loss_and_grads(model: Any) -> Any:
        return nnx.value_and_grad(lambda m: loss_of(m(INPUTS)))(model)

    @nnx.jit
    def update(model: Any, optimizer: Any, grads: Any) -> None:
        optimizer.update(model, grads)

    losses = []
    plain.check(name, 0, None, nnx.state(model, nnx.Param), masks)
    for count in range(1, STEPS + 1):
        loss, grads = loss_and_grads(model)
        losses.append(float(loss))
        update(model, optimizer, grads)
        masks = granet_jax.get_masks(optimizer.opt_state)
        params = nnx.state(model, nnx.Param)
        plain.check(name, count, grads, params, masks)
    assert losses[-1] < losses[0]
    # Masks in nnx's variables are counted and packed as they are.
    report = granet_jax.sparsity(granet_jax.get_masks(optimizer.opt_state))
    assert (report.active, report.total) == (20, WEIGHTS)


def test_equinox_module() -> None:
    name = "snfs"
    model = eqx.nn.MLP(6, 2, 10, 1, key=jax.random.key(0))
    # Functions and sizes among its fields: None after the filter.
    params = eqx.filter(model, eqx.is_inexact_array)
    assert None in jax.tree.leaves(params, is_leaf=lambda x: x is None)
    tx = granet_jax.transform(METHODS[name], INNER)
    state = tx.init(params)
    params = granet_jax.apply_masks(params, granet_jax.get_masks(state))
    plain = Plain(name, plain_dict(params))
    model = eqx.combine(params, model)

    @eqx.filter_jit
    def loss_and_grads(model: Any) -> Any:
        return eqx.filter_value_and_grad(lambda m: loss_of(jax.vmap(m)(INPUTS)))(model)

    @eqx.filter_jit
    def update(model: Any, state: Any, grads: Any) -> Any:
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(model, updates), state

    losses = []
    for count in range(1, STEPS + 1):
        loss, grads = loss_and_grads(model)
        losses.append(float(loss))
        model, state = update(model, state, grads)
        params = eqx.filter(model, eqx.is_inexact_array)
        plain.check(name, count, grads, params, granet_jax.get_masks(state))
    assert losses[-1] < losses[0]
