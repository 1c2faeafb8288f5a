"""Every method with every inner optimizer, in float32 or bfloat16.

After each of four steps, in which the masks change:

- pruned weights are exactly zero, and the moments of all weights that were not active
  throughout the step are those that the optimizer's `init` makes;
- everything else (updates of active weights, their moments, shared statistics,
  counters) equals, to the bit, what the inner optimizer alone computes from the same
  state, masked gradient and parameters;
- the state keeps the structure and types that `init` gave it and `jax.eval_shape`
  predicts, and the step compiles once.

No tolerance is needed: the optimizers' numbers are powers of two and gradients have
eight bits, so most products are exact, and `STRICT` settles the rest.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import granet_jax
from tests.helpers import trees
from tests.helpers.compiler_options import STRICT
from tests.helpers.training import arrays, differ, mask_list

PyTree = Any
STEPS = 4


class Case(NamedTuple):
    """A method, and the steps that change its masks.

    With pruned weights that do not stay zero, other steps may change them too.
    """

    method: granet_jax.Method
    updates: tuple[int, ...] = ()


REVIVED: dict[str, Any] = {"cycles": 2, "ramp": 0.5, "interval": 1}
# (Penalties are part of the runs in `tests/methods`.)
METHODS: dict[str, Case] = {
    "granet": Case(granet_jax.granet(0.75, 6, interval=2, end_step=4), (2, 4)),
    "granet_layer_random": Case(
        granet_jax.granet(
            *(0.75, 4),
            initial_sparsity=0.5,
            interval=1,
            end_step=2,
            scope="layer",
            grow="random",
        ),
        (1, 2, 3),
    ),
    "gmp": Case(granet_jax.gmp(0.75, 4, interval=2), (2, 4)),
    "gmp_layer": Case(granet_jax.gmp(0.75, 3, interval=1, scope="layer"), (1, 2, 3)),
    "rigl": Case(granet_jax.rigl(0.5, 8, interval=2), (2, 4)),
    "set": Case(granet_jax.set_(0.5, 4, interval=1), (1, 2, 3)),
    "snfs": Case(granet_jax.snfs(0.5, 6, interval=2), (2, 4)),
    "static": Case(granet_jax.static(0.5)),
    # All masks are True, so by induction its runs are the inner optimizer's own.
    "dense": Case(granet_jax.static(0.0)),
    "cyclical": Case(granet_jax.cyclical(0.75, 4, **REVIVED), (1, 2, 3)),
    "cyclical_projected": Case(
        granet_jax.cyclical(0.75, 4, recovery="projected", scope="layer", **REVIVED),
        (1, 2, 3),
    ),
    "acdc": Case(granet_jax.acdc(0.75, (1, 2, 3)), (1, 2, 3)),
    "straight_through": Case(granet_jax.straight_through(0.75, 2, interval=1), (1, 2)),
    "top_kast": Case(
        granet_jax.top_kast(0.75, backward_sparsity=0.5, interval=2, penalty=0.0)
    ),
    "sculpt": Case(granet_jax.sculpt(0.75, 3, cycles=2, initial_sparsity=0.5), (2,)),
}


def decay_mask(params: PyTree) -> PyTree:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def by_rank(params: PyTree) -> PyTree:
    return jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "vector", params)


def is_conv(params: PyTree) -> PyTree:
    return jax.tree.map(lambda p: p.ndim == 4, params)


RATE, DECAY = 2.0**-6, 2.0**-4
BETAS = {"b1": 0.5, "b2": 0.75}
BRANCHES = {
    "matrix": optax.adam(RATE, **BETAS),
    "vector": optax.sgd(RATE, momentum=0.5),
}

INNERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(RATE),
    "momentum": lambda: optax.sgd(RATE, momentum=0.5),
    "nesterov": lambda: optax.sgd(RATE, momentum=0.5, nesterov=True),
    "adam": lambda: optax.adam(RATE, **BETAS),
    "adamw": lambda: optax.adamw(RATE, **BETAS, weight_decay=DECAY, mask=decay_mask),
    "nadamw": lambda: optax.nadamw(RATE, **BETAS, weight_decay=DECAY),
    "lion": lambda: optax.lion(RATE, **BETAS, weight_decay=DECAY),
    "rprop": lambda: optax.rprop(RATE, eta_plus=1.25),
    "rmsprop": lambda: optax.rmsprop(RATE, decay=0.5, momentum=0.5, centered=True),
    "adagrad": lambda: optax.adagrad(RATE),
    "adafactor": lambda: optax.adafactor(RATE, min_dim_size_to_factor=2, momentum=0.5),
    "adafactor_dense": lambda: optax.adafactor(RATE, factored=False),
    "lamb": lambda: optax.lamb(RATE, **BETAS, weight_decay=DECAY),
    "lars": lambda: optax.lars(RATE, weight_decay=DECAY, momentum=0.5),
    "adan": lambda: optax.adan(RATE, **BETAS, b3=0.75, weight_decay=DECAY),
    "radam": lambda: optax.radam(RATE, **BETAS),
    "muon": lambda: optax.contrib.muon(RATE, beta=0.5),
    "sm3": lambda: optax.sm3(RATE, momentum=0.5),
    "schedule_free": lambda: optax.contrib.schedule_free(
        optax.adamw(RATE, b1=0.0, b2=0.75), learning_rate=RATE, b1=0.5
    ),
    "prodigy": lambda: optax.contrib.prodigy(RATE, betas=(0.5, 0.75)),
    "apply_if_finite": lambda: optax.apply_if_finite(
        optax.sgd(RATE, momentum=0.5), max_consecutive_errors=3
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(
        learning_rate=optax.piecewise_constant_schedule(RATE, {2: 0.5}), **BETAS
    ),
    "multi_transform_tree": lambda: optax.multi_transform(
        BRANCHES, by_rank(trees.shape_tree())
    ),
    "multi_transform_function": lambda: optax.multi_transform(BRANCHES, by_rank),
    "masked": lambda: optax.masked(optax.adam(RATE, **BETAS), is_conv),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(RATE, **BETAS), 2),
}
DTYPES = ("float32", "bfloat16")


class Step(NamedTuple):
    """The inputs and the results of one step."""

    params: PyTree
    grads: PyTree
    state: granet_jax.SparseState
    updates: PyTree
    new_state: granet_jax.SparseState


def masked(masks: PyTree, tree: PyTree) -> PyTree:
    """The tree with zeros outside the masks, computed by NumPy."""
    out = [
        x if m is None else np.where(m, x, np.zeros_like(x))
        for x, m in zip(arrays(tree), mask_list(masks), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), map(jnp.asarray, out))


def largest(size: np.ndarray, among: np.ndarray, number: int) -> np.ndarray:
    """A mask of the `number` largest, ties by index."""
    order = np.lexsort((np.arange(size.size), -size.ravel(), ~among.ravel()))
    chosen = np.zeros(size.size, bool)
    chosen[order[:number]] = True
    return chosen.reshape(size.shape)


@functools.cache
def reference_step(inner: str) -> Callable[..., Any]:
    """The inner optimizer's step, compiled without any method."""
    return jax.jit(INNERS[inner]().update, compiler_options=STRICT)


def with_new_moments(inner: str, step: Step) -> PyTree:
    """The inner state with every parameter's moments as `init` makes them."""
    new = INNERS[inner]().init(step.params)
    shapes = {
        jax.tree_util.keystr(path): p.shape
        for path, p in jax.tree_util.tree_leaves_with_path(step.params)
    }
    return jax.tree_util.tree_map_with_path(
        lambda path, x, y: (
            y if shapes.get(jax.tree_util.keystr(path[-2:])) == x.shape else x
        ),
        step.state.inner_state,
        new,
    )


def check_step(name: str, record: granet_jax.Method, inner: str, step: Step) -> None:
    masks, new_masks = step.state.masks, step.new_state.masks
    # The weights that the gradient may move.
    reach = masks
    if record.weights != "sparse":
        reach = jax.tree.map(jnp.ones_like, masks)
    if record.weights == "dense" and record.marked_sparsity is not None:
        reach = step.state.marked
    inner_state = step.state.inner_state
    if int(step.state.count) in record.resets.steps():
        inner_state = with_new_moments(inner, step)
    grads = masked(reach, step.grads)
    expected_updates, expected_state = reference_step(inner)(
        grads, inner_state, step.params
    )
    moved = optax.apply_updates(step.params, step.updates)
    after, fresh = arrays(moved), arrays(INNERS[inner]().init(moved))
    # By shape, since no shape occurs twice in the tree: weights that have moments.
    keeps = {}
    for p, a, u, e, old, new, r, marked in zip(
        arrays(step.params),
        after,
        arrays(step.updates),
        arrays(expected_updates),
        *map(mask_list, (masks, new_masks, reach, step.new_state.marked or new_masks)),
        strict=True,
    ):
        assert a.dtype == p.dtype
        if old is None or r is None:
            assert (u.dtype, u.tobytes()) == (e.dtype, e.tobytes())
            continue
        if record.weights == "dense":
            # Weights that the gradient does not reach keep their values.
            assert u.dtype == e.dtype
            assert u[r].tobytes() == e[r].tobytes()
            assert not np.any(u[~r])
            keeps[p.shape] = r if record.marked_sparsity is None else marked
            continue
        keep = old & new if record.weights == "sparse" else new
        if name.startswith("granet"):
            # A weight that gradual pruning removes starts again at zero even if
            # regrowth takes it back. The exchange keeps the size of every leaf, so
            # pruning kept the `new.sum()` largest.
            stepped = np.abs((p + e).astype(p.dtype).astype(np.float64))
            keep = new & largest(stepped, old, int(new.sum()))
        keeps[p.shape] = keep
        assert u.dtype == jnp.promote_types(e.dtype, p.dtype)
        assert np.all(np.isfinite(u.astype(np.float32)))
        assert np.all(u[~keep] == -p[~keep])
        assert np.all(a[~new] == 0)
        assert np.all(a[~keep] == 0)
        # The wider dtype holds every value of the narrower one.
        assert u[keep].tobytes() == e[keep].astype(u.dtype).tobytes()
        # These do not move the weights in every step.
        assert np.any(u[keep] != 0) or inner in ("multi_steps", "rprop")

    inner_state = step.new_state.inner_state
    assert jax.tree.structure(inner_state) == jax.tree.structure(expected_state)
    for (path, x), e, new in zip(
        jax.tree_util.tree_leaves_with_path(inner_state),
        arrays(expected_state),
        fresh,
        strict=True,
    ):
        name, x = jax.tree_util.keystr(path), np.asarray(x)
        assert (x.shape, x.dtype) == (e.shape, e.dtype), name
        keep = keeps.get(x.shape)
        if keep is not None:
            assert np.all(x[~keep] == new[~keep]), name
            x, e = x[keep], e[keep]
        assert x.tobytes() == e.tobytes(), name


# Every method meets inner optimizers that work weight by weight or not, that start with
# moments other than zero, that factor or wrap them. GraNet meets all others.
OTHER_INNERS = ("momentum", "adamw", "adagrad", "muon", "adafactor", "schedule_free")
ALL = [*itertools.product(METHODS, OTHER_INNERS), *(("granet", x) for x in INNERS)]
# Every method occurs in a case for pull requests, and every kind of inner optimizer.
QUICK = [
    *(("granet", "adamw"), ("granet_layer_random", "lamb"), ("gmp", "multi_steps")),
    *(("gmp_layer", "prodigy"), ("rigl", "sm3"), ("set", "multi_transform_function")),
    *(("rigl", "rprop"), ("snfs", "rmsprop"), ("static", "lion")),
    *(("dense", "apply_if_finite"), ("cyclical", "schedule_free")),
    *(("cyclical_projected", "adagrad"), ("acdc", "adagrad")),
    *(("straight_through", "muon"), ("top_kast", "adafactor"), ("sculpt", "momentum")),
]


def cases() -> list[Any]:
    pairs = list(dict.fromkeys([*QUICK, *ALL]))
    return [
        pytest.param(
            *(method, inner, DTYPES[i % 2]),
            id=f"{inner}-{method}-{DTYPES[i % 2]}",
            marks=() if (method, inner) in QUICK else pytest.mark.slow,
        )
        for i, (method, inner) in enumerate(pairs)
    ]


@pytest.mark.parametrize(("name", "inner", "dtype"), cases())
def test_contract(name: str, inner: str, dtype: str) -> None:
    record, updates_masks = METHODS[name]
    tx = granet_jax.transform(record, INNERS[inner](), seed=1)
    params = trees.parameters(dtype)
    state: Any = tx.init(params)
    kinds = trees.types(state)
    predicted = jax.eval_shape(tx.init, trees.shape_tree(dtype))
    assert jax.tree.structure(predicted) == jax.tree.structure(state)
    assert trees.types(predicted) == kinds
    shardings = [x.sharding for x in jax.tree.leaves(state)]

    if record.weights != "dense":
        params = granet_jax.apply_masks(params, granet_jax.get_masks(state))
    update = jax.jit(tx.update, compiler_options=STRICT)
    changed = set()
    for count in range(1, STEPS + 1):
        # Gradients of eight bits, whose squares are exact in float32.
        grads = trees.gradients(count, jnp.bfloat16)
        grads = jax.tree.map(lambda g: g.astype(dtype), grads)
        updates, new_state = update(grads, state, params)
        check_step(name, record, inner, Step(params, grads, state, updates, new_state))
        assert new_state.count == count
        assert jax.tree.structure(new_state) == jax.tree.structure(state)
        assert trees.types(new_state) == kinds
        assert [x.sharding for x in jax.tree.leaves(new_state)] == shardings
        if differ(state.masks, new_state.masks):
            changed.add(count)
        params, state = optax.apply_updates(params, updates), new_state
    assert update._cache_size() == 1
    assert changed >= set(updates_masks)
    assert changed == set(updates_masks) or record.weights != "sparse"


@pytest.mark.parametrize("dtype", DTYPES)
def test_strict_compilation_rounds_as_numpy_does(dtype: str) -> None:
    rng = np.random.default_rng(0)
    a, b, c = (jnp.asarray(np.exp(rng.normal(size=(40, 25))), dtype) for _ in range(3))
    x, y, z = np.asarray(a), np.asarray(b), np.asarray(c)
    strict = functools.partial(jax.jit, compiler_options=STRICT)
    assert np.array_equal(strict(lambda a, b, c: a * b - c)(a, b, c), x * y - z)
    chosen = strict(lambda a, b, c: jnp.where(a > 1, a * b + c * c, a - b))(a, b, c)
    assert np.array_equal(chosen, np.where(x > 1, x * y + z * z, x - y))
    if dtype == "float32":
        assert np.array_equal(strict(jax.lax.rsqrt)(a), 1 / np.sqrt(x))
