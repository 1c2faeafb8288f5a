"""`transform` on other containers, in other transformations, and in other libraries.

Every run equals the run on a plain dict to the bit. The inner optimizer's numbers are
powers of two, so that no two compilations round differently.
"""

import functools
from collections.abc import Callable, Iterator
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
from tests.helpers.training import arrays, changes, compiled_step, mask_list, start

PyTree = Any
STEPS = 7
METHODS = {
    # Updates at steps 2 and 4, which prune, and 6.
    "granet": granet_jax.granet(0.75, 8, interval=2, end_step=4),
    "rigl": granet_jax.rigl(0.75, 8, interval=2),
    "snfs": granet_jax.snfs(0.75, 8, interval=2, decay=0.5),
}
INNER = optax.sgd(0.125, momentum=0.5)


def assert_equal_leaves(found: PyTree, expected: PyTree) -> None:
    trees.assert_same(arrays(found), arrays(expected))


def assert_sparse(params: PyTree, masks: PyTree) -> None:
    """Pruned weights are zero."""
    for mask, p in zip(mask_list(masks), arrays(params), strict=True):
        assert mask is None or np.all(p[~mask] == 0)


class Run(NamedTuple):
    """Parameters and masks at first and after every step."""

    params: list[PyTree]
    masks: list[PyTree]


def everything(tree: PyTree) -> PyTree:
    return tree


def dense_part(tree: PyTree) -> PyTree:
    return tree["dense"]


@functools.cache
def plain_run(
    name: str, pick: Callable[[PyTree], PyTree], prepare: Callable[[PyTree], PyTree]
) -> Run:
    """The run on (a part of) the plain dict, with gradients prepared beforehand."""
    tx = granet_jax.transform(METHODS[name], INNER)
    params, state = start(tx, pick(trees.parameters()))
    step = compiled_step(tx)
    run = Run([params], [granet_jax.get_masks(state)])
    for count in range(1, STEPS + 1):
        params, state = step(params, state, prepare(pick(trees.eighths(count))))
        run.params.append(params)
        run.masks.append(granet_jax.get_masks(state))
        assert_sparse(params, run.masks[-1])
    assert changes(run.masks) == 3
    return run


# --- Containers of parameters -----------------------------------------------------


class Kernel(NamedTuple):
    """A layer whose fields are in the order of the dict's keys."""

    bias: Any
    kernel: Any


class Module(nnx.Module):
    def __init__(self, tree: PyTree) -> None:
        for name, array in tree.items():
            setattr(self, name, nnx.Param(array))


CONTAINERS: dict[str, Callable[[PyTree], PyTree]] = {
    "tuples in a list": lambda t: [
        None,
        flax.core.freeze(t["conv"]),
        (Kernel(**t["dense"]), None),
        {},
    ],
    "state of nnx": lambda t: nnx.state(
        Module({"conv": t["conv"]["kernel"], "dense": Module(t["dense"])})
    ),
}


@pytest.mark.parametrize("build", CONTAINERS.values(), ids=CONTAINERS)
def test_container_of_parameters(build: Callable[[PyTree], PyTree]) -> None:
    tx = granet_jax.transform(METHODS["snfs"], INNER)
    params, state = start(tx, build(trees.parameters()))
    structure = jax.tree.structure((params, state))
    step = compiled_step(tx)
    expected = plain_run("snfs", everything, everything)
    for count in range(STEPS + 1):
        if count > 0:
            params, state = step(params, state, build(trees.eighths(count)))
        assert jax.tree.structure((params, state)) == structure
        masks = granet_jax.get_masks(state)
        assert_equal_leaves(params, expected.params[count])
        assert_equal_leaves(masks, expected.masks[count])
    assert jax.tree.structure(params) == jax.tree.structure(build(trees.parameters()))
    assert step._cache_size() <= 1


# --- Transformations around it ----------------------------------------------------


class Wrapped(NamedTuple):
    """A transformation around `transform`.

    Attributes:
      build: Function from the sparse transformation to the outer one.
      repeat: How often each gradient is passed in.
      dense_only: Whether the sparse transformation gets the subtree "dense" only, of a
        gradient that is not clipped.
    """

    build: Callable[[Any], Any]
    repeat: int = 1
    dense_only: bool = True


ONLY_DENSE = {"conv": {"kernel": False}, "dense": {"bias": True, "kernel": True}}
LABELS = jax.tree.map(lambda x: "sparse" if x else "rest", ONLY_DENSE)
CLIP = optax.clip_by_global_norm(1.0)
WRAPPED = {
    "chain": Wrapped(lambda tx: optax.chain(CLIP, tx), dense_only=False),
    # `multi_transform` passes each part through `masked`.
    "nest": Wrapped(
        lambda tx: optax.MultiSteps(
            optax.apply_if_finite(
                optax.chain(
                    optax.identity(),
                    optax.multi_transform(
                        {"sparse": optax.chain(tx), "rest": optax.adam(0.01)},
                        lambda _: LABELS,
                    ),
                ),
                3,
            ),
            2,
        ),
        repeat=2,
    ),
}


@jax.jit
def clipped(grads: PyTree) -> PyTree:
    """The gradient clipped in a compilation of its own."""
    return CLIP.update(grads, CLIP.init(grads))[0]


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_inside_another_transformation(wrapper: str) -> None:
    wrapped = WRAPPED[wrapper]
    pick = dense_part if wrapped.dense_only else everything
    tx = wrapped.build(granet_jax.transform(METHODS["granet"], INNER))
    params = trees.parameters()
    state = tx.init(params)
    sparse = granet_jax.apply_masks(pick(params), pick(granet_jax.get_masks(state)))
    params = {**params, "dense": sparse} if wrapped.dense_only else sparse
    prepare = everything if wrapped.dense_only else clipped
    expected = plain_run("granet", pick, prepare)
    step = compiled_step(tx)
    points = [(params, state)]
    for count in range(1, STEPS + 1):
        for _ in range(wrapped.repeat):
            params, state = step(params, state, trees.eighths(count))
        points.append((params, state))
        assert granet_jax.get_state(state).count == count
        masks = granet_jax.get_masks(state)
        assert_equal_leaves(pick(params), expected.params[count])
        assert_equal_leaves(masks, expected.masks[count])
    # The other branch trains all of its weights.
    conv = [p["conv"]["kernel"] for p, _ in (points[0], points[-1])]
    assert np.all(conv[0] != conv[1]) or not wrapped.dense_only

    # `set_masks` replaces the masks alone, in a copy of the state.
    params, state = points[-2]
    old = granet_jax.get_masks(state)
    new = jax.tree.map(jnp.logical_not, old)
    changed = granet_jax.set_masks(state, jax.tree.map(np.int8, new))
    assert jax.tree.structure(changed) == jax.tree.structure(state)
    trees.assert_same(granet_jax.get_masks(changed), new)
    trees.assert_same(granet_jax.set_masks(changed, old), state)
    trees.assert_same(*(granet_jax.get_state(x).inner_state for x in (changed, state)))
    trees.assert_same(granet_jax.get_masks(state), old)
    # The next step, which updates no masks, makes the parameters agree.
    for _ in range(wrapped.repeat):
        params, changed = step(params, changed, trees.eighths(STEPS))
    trees.assert_same(granet_jax.get_masks(changed), new)
    assert_sparse(pick(params), pick(new))
    assert step._cache_size() <= 1


@pytest.mark.parametrize("labels", [LABELS, {"conv": "rest", "dense": "sparse"}])
def test_two_sparse_transformations_for_two_parts(labels: PyTree) -> None:
    parts = {
        label: granet_jax.transform(granet_jax.rigl(s, 8, interval=2), INNER, packed=p)
        for label, s, p in [("sparse", 0.5, False), ("rest", 0.75, True)]
    }
    tx, params = optax.multi_transform(parts, labels), trees.parameters()
    params, state = start(tx, params)
    step = compiled_step(tx)
    for count in range(4):
        params, state = step(params, state, trees.eighths(count))
        masks = granet_jax.get_masks(state)
        assert mask_list(masks)[1] is None
        assert granet_jax.sparsity(masks).leaves == {
            "conv/kernel": 0.75,
            "dense/kernel": 0.5,
        }
        trees.assert_same(granet_jax.sparse_view(params, state), params)
    for label, name in [("sparse", "dense"), ("rest", "conv")]:
        part = granet_jax.get_masks(state.inner_states[label])
        trees.assert_same(part[name], masks[name])

    new = jax.tree.map(jnp.logical_not, masks)
    changed = granet_jax.set_masks(state, new)
    assert jax.tree.structure(changed) == jax.tree.structure(state)
    trees.assert_same(granet_jax.get_masks(changed), new)
    params, _ = step(params, changed, trees.eighths(5))
    assert_sparse(params, new)


@pytest.mark.parametrize(
    ("method", "wrap"),
    [
        (granet_jax.snfs(0.5, 8, interval=2), optax.chain),
        (granet_jax.top_kast(0.75, backward_sparsity=0.5), optax.chain),
        (granet_jax.dsr(0.5, 8, interval=2), lambda tx: optax.masked(tx, True)),
    ],
    ids=["average", "marked", "phase"],
)
def test_tree_map_params(method: Any, wrap: Any) -> None:
    tx = wrap(granet_jax.transform(method, optax.adam(0.1)))
    params = trees.parameters()
    state = tx.init(params)
    owners = jax.tree.map(lambda p: str(p.shape), params)

    is_dense = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    found = optax.tree_utils.tree_map_params(
        tx,
        lambda x, name: x if is_dense(x) else name,
        *(state, owners),
        transform_non_params=lambda x: "()",
        is_leaf=is_dense,
    )
    # Masks, averages and moments are like the parameters. Each scalar is a counter, or
    # the state of a phase.
    assert found == jax.tree.map(lambda x: str(x.shape), state)
    same = optax.tree_utils.tree_map_params(tx, lambda x: x, state)
    trees.assert_same(same, state)


def test_apply_if_finite_skips_a_step() -> None:
    # A skipped step does not count, even where the masks would have changed.
    tx = optax.apply_if_finite(granet_jax.transform(METHODS["snfs"], INNER), 3)
    params, state = start(tx, trees.parameters())
    step = compiled_step(tx)
    expected = plain_run("snfs", everything, everything)
    bad = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), trees.eighths(0))
    for count in range(1, STEPS + 1):
        before = params
        params, state = step(params, state, bad)
        trees.assert_same(params, before)
        params, state = step(params, state, trees.eighths(count))
        assert_equal_leaves(params, expected.params[count])
        assert_equal_leaves(granet_jax.get_masks(state), expected.masks[count])


# --- Other libraries --------------------------------------------------------------

INPUTS = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
TARGETS = np.tanh(INPUTS @ np.linspace(-1, 1, 12).reshape(6, 2)).astype(np.float32)
# Kernels of 6 x 10 and 10 x 2; the biases and the norm carry no mask.
WEIGHTS = 80


def loss_of(prediction: jax.Array) -> jax.Array:
    return jnp.mean((prediction - TARGETS) ** 2)


class Point(NamedTuple):
    """Parameters and masks after a step, and the step's loss and gradients."""

    params: PyTree
    masks: PyTree
    loss: Any = None
    grads: PyTree = None


class LinenModel(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x: Any) -> Any:
        x = flax.linen.LayerNorm()(flax.linen.Dense(10)(x))
        return flax.linen.Dense(2)(flax.linen.relu(x))


def linen_run(tx: Any) -> Iterator[Point]:
    model = LinenModel()
    params = model.init(jax.random.key(0), INPUTS)["params"]
    tx = optax.chain(optax.identity(), tx)
    state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    masks = granet_jax.get_masks(state.opt_state)
    # Flax starts with a Python integer, which would compile a second time.
    state = state.replace(
        step=jnp.zeros((), jnp.int32), params=granet_jax.apply_masks(params, masks)
    )
    yield Point(state.params, masks)

    @jax.jit
    def step(state: Any) -> Any:
        loss, grads = jax.value_and_grad(
            lambda p: loss_of(state.apply_fn({"params": p}, INPUTS))
        )(state.params)
        return state.apply_gradients(grads=grads), loss, grads

    for count in range(1, STEPS + 1):
        state, loss, grads = step(state)
        assert state.step == count
        masks = granet_jax.get_masks(state.opt_state)
        yield Point(state.params, masks, loss, grads)
    assert step._cache_size() <= 1


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(6, 10, rngs=rngs)
        # The running mean and variance are not parameters.
        self.norm = nnx.BatchNorm(10, rngs=rngs)
        self.second = nnx.Linear(10, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.second(nnx.relu(self.norm(self.first(x))))


def nnx_run(tx: Any) -> Iterator[Point]:
    model = NnxModel(nnx.Rngs(0))
    tx = optax.chain(optax.identity(), tx)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    masks = nnx.as_pure(granet_jax.get_masks(optimizer.opt_state))
    nnx.update(model, granet_jax.apply_masks(params, masks))
    yield Point(nnx.state(model, nnx.Param), masks)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        loss, grads = nnx.value_and_grad(lambda m: loss_of(m(INPUTS)))(model)
        optimizer.update(model, grads)
        return loss, grads

    for _ in range(STEPS):
        loss, grads = step(model, optimizer)
        masks = granet_jax.get_masks(optimizer.opt_state)
        yield Point(nnx.state(model, nnx.Param), masks, loss, grads)
    # `sparsity` accepts masks in nnx's variables.
    report = granet_jax.sparsity(masks)
    assert (report.active, report.total) == (20, WEIGHTS)


def equinox_run(tx: Any) -> Iterator[Point]:
    model = eqx.nn.MLP(6, 2, 10, 1, key=jax.random.key(0))
    # The filter replaces functions and sizes by None.
    params = eqx.filter(model, eqx.is_inexact_array)
    assert None in jax.tree.leaves(params, is_leaf=lambda x: x is None)
    params, state = start(tx, params)
    yield Point(params, granet_jax.get_masks(state))
    model = eqx.combine(params, model)

    @eqx.filter_jit
    def step(model: Any, state: Any) -> Any:
        loss, grads = eqx.filter_value_and_grad(lambda m: loss_of(jax.vmap(m)(INPUTS)))(
            model
        )
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(model, updates), state, loss, grads

    for _ in range(STEPS):
        model, state, loss, grads = step(model, state)
        params = eqx.filter(model, eqx.is_inexact_array)
        yield Point(params, granet_jax.get_masks(state), loss, grads)


LIBRARIES = {"rigl": linen_run, "granet": nnx_run, "snfs": equinox_run}


@pytest.mark.parametrize("name", LIBRARIES)
def test_in_another_library(name: str) -> None:
    """The run equals one on a flat dict that gets the library's gradients."""

    def flat(tree: PyTree) -> PyTree:
        return {f"{i:03}": x for i, x in enumerate(jax.tree.leaves(tree))}

    tx = granet_jax.transform(METHODS[name], INNER)
    step, losses = compiled_step(tx), []
    params: Any = None
    for count, point in enumerate(LIBRARIES[name](tx)):
        if count == 0:
            params, state = start(tx, flat(point.params))
        else:
            params, state = step(params, state, flat(point.grads))
            losses.append(float(point.loss))
        assert_equal_leaves(point.params, params)
        assert_equal_leaves(point.masks, granet_jax.get_masks(state))
        assert_sparse(params, state.masks)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
