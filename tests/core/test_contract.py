"""The contract: every method x every inner optimizer, in float32 or bfloat16.

As optax has a matrix of checks for its own optimizers, this is ours. A case runs a few
steps over which the masks change, and after each of them checks that

- pruned weights are exactly zero, and so are the moments of all weights that were not
  active throughout;
- all else (updates of active weights, their moments, shared statistics, counters) is
  to the bit what the inner optimizer makes of the same state, masked gradient and
  parameters in a compilation of its own;
- types and structure of the state stay as `init` made them and as `jax.eval_shape`
  foretells them, and the step compiles once.

The method "dense" has masks that are all True: its runs are the inner optimizer's, by
induction over the steps.

XLA leaves free between two compilations of one program whether a * b + c is rounded
once or twice (LLVM contracts them where both land in one loop: a last bit or two, here
and there, in most optimizers), how rsqrt is approximated, and whether bfloat16 is
rounded between two operations of a loop. The comparisons need no tolerance, because

- the numbers of the optimizers are powers of two and gradients have eight bits, so that
  most products are exact and a contraction changes nothing; and
- `STRICT` settles the other two, and keeps LLVM from most contractions. On it alone
  stand adafactor, muon, prodigy and schedule_free, whose factors depend on the step,
  and the norms in lamb and lars.

With XLA's default options, `test_fuzz.py` compares Adam and `test_oracle.py` SGD.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import granet_jax
from tests.helpers import oracle, trees
from tests.nightly import NIGHTLY

PyTree = Any
STEPS = 4
# Level 0 is LLVM's alone: XLA fuses loops as ever.
STRICT: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_enable_platform_dependent_math": False,
    "xla_allow_excess_precision": False,
}

# Masks change from step 1 on in some, later in others.
METHODS: dict[str, granet_jax.Method] = {
    "granet": granet_jax.granet(0.75, 6, interval=2, end_step=4),
    "granet_layer_random": granet_jax.granet(
        0.75,
        4,
        initial_sparsity=0.5,
        interval=1,
        end_step=2,
        scope="layer",
        grow="random",
    ),
    "gmp": granet_jax.gmp(0.75, 4, interval=2),
    "gmp_layer": granet_jax.gmp(0.75, 3, interval=1, scope="layer"),
    "rigl": granet_jax.rigl(0.5, 8, interval=2),
    "set": granet_jax.set_(0.5, 4, interval=1),
    "snfs": granet_jax.snfs(0.5, 6, interval=2),
    "static": granet_jax.static(0.5),
    "dense": granet_jax.static(0.0),
}
# Whose masks grow by the schedule, or are chosen among all weights, or whose moments or
# gradients are not the optimizer's alone.
LATER_METHODS: dict[str, granet_jax.Method] = {
    "cyclical": granet_jax.cyclical(0.75, 4, cycles=2, ramp=0.5, interval=1),
    "cyclical_projected": granet_jax.cyclical(
        0.75, 4, cycles=2, ramp=0.5, interval=1, recovery="projected", scope="layer"
    ),
    "acdc": granet_jax.acdc(0.75, (1, 2, 3)),
    "straight_through": granet_jax.straight_through(0.75, 2, interval=1),
    "top_kast": granet_jax.top_kast(
        0.75, backward_sparsity=0.5, interval=2, penalty=0.0
    ),
    "sculpt": granet_jax.sculpt(0.75, 3, cycles=2, initial_sparsity=0.5),
    "greg2": granet_jax.greg2(
        0.75,
        interval=1,
        growth=0.75,
        ceiling=0.5,
        settle_steps=1,
        pick_growth=0.25,
        pick_ceiling=0.25,
        weight_decay=0.0625,
    ),
}
# The steps that change the masks.
UPDATES: dict[str, tuple[int, ...]] = {
    "granet": (2, 4),
    "granet_layer_random": (1, 2, 3, 4),
    "gmp": (2, 4),
    "gmp_layer": (1, 2, 3),
    "rigl": (2, 4),
    "set": (1, 2, 3, 4),
    "snfs": (2, 4),
    "static": (),
    "dense": (),
    "cyclical": (1, 2, 3),
    "acdc": (1, 2, 3),
    # Those that choose anew may change the masks in others too, or not.
    "cyclical_projected": (1, 2, 3),
    "straight_through": (1, 2),
    "top_kast": (),
    "sculpt": (2,),
    "greg2": (3,),
}


def extra_coefficients(method: str, count: int, marked: np.ndarray) -> np.ndarray:
    """By hand, the L2 coefficients in the step after `count` others.

    GReg-2 presses all weights in the first step, and in two more those not picked at
    its end; then they are gone.
    """
    if method != "greg2" or count > 2:
        return np.zeros(marked.shape, np.float32)
    if count == 0:
        return np.full(marked.shape, 0.25, np.float32)
    return np.where(marked, np.float32(-0.0625), np.float32(1.0))


def penalised(method: str, grads: PyTree, state: Any, params: PyTree) -> PyTree:
    """The gradients that the optimizer is to see, but for the masks."""
    if (METHODS | LATER_METHODS)[method].penalty is None:
        return grads
    count = int(state.count)
    out = []
    for g, p, m in zip(
        leaves(grads), leaves(params), mask_list(state.marked), strict=True
    ):
        if m is not None:
            term = extra_coefficients(method, count, m) * p.astype(np.float32)
            g = g + term.astype(g.dtype)
        out.append(jnp.asarray(g))
    return jax.tree.unflatten(jax.tree.structure(grads), out)


def decay_mask(params: PyTree) -> PyTree:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def by_rank(params: PyTree) -> PyTree:
    """Labels for `multi_transform`."""
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


def gradients(count: int, dtype: str) -> PyTree:
    """Of eight bits each, so that their squares are exact in float32."""
    grads = trees.gradients(count, jnp.bfloat16)
    return jax.tree.map(lambda g: g.astype(dtype), grads)


class Snapshot(NamedTuple):
    """What goes into a step, and what comes out of it."""

    params: PyTree
    grads: PyTree
    state: granet_jax.SparseState
    updates: PyTree
    new_state: granet_jax.SparseState


def leaves(tree: PyTree) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def mask_list(masks: PyTree) -> list[np.ndarray | None]:
    """A mask for each parameter, None at dense ones."""
    found = jax.tree.leaves(masks, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    return [None if isinstance(m, optax.MaskedNode) else np.asarray(m) for m in found]


def masked(masks: PyTree, tree: PyTree) -> PyTree:
    """Arrays of `tree` with zeros outside the masks (by hand, on the host)."""
    out = [
        x if m is None else np.where(m, x, np.zeros_like(x))
        for x, m in zip(leaves(tree), mask_list(masks), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), map(jnp.asarray, out))


@functools.cache
def reference_step(inner: str) -> Callable[..., Any]:
    """The inner optimizer's step, compiled apart from any method."""
    return jax.jit(INNERS[inner]().update, compiler_options=STRICT)


def check_step(method: str, inner: str, step: Snapshot) -> None:
    record = (METHODS | LATER_METHODS)[method]
    old, new = mask_list(step.state.masks), mask_list(step.new_state.masks)
    # What the gradient moves.
    reach = step.state.masks
    if record.weights != "sparse":
        reach = jax.tree.map(jnp.ones_like, step.state.masks)
    if record.weights == "dense" and record.marked_sparsity is not None:
        reach = step.state.marked
    inner_state = step.state.inner_state
    if int(step.state.count) in record.resets.steps():
        fresh = INNERS[inner]().init(step.params)
        shapes = {
            jax.tree_util.keystr(path): p.shape
            for path, p in jax.tree_util.tree_leaves_with_path(step.params)
        }
        inner_state = jax.tree_util.tree_map_with_path(
            lambda path, x, new: (
                new if shapes.get(jax.tree_util.keystr(path[-2:])) == x.shape else x
            ),
            inner_state,
            fresh,
        )
    expected_updates, expected_state = reference_step(inner)(
        masked(reach, penalised(method, step.grads, step.state, step.params)),
        inner_state,
        step.params,
    )
    after = leaves(optax.apply_updates(step.params, step.updates))
    before, updates = leaves(step.params), leaves(step.updates)
    keeps = {}
    marked = step.new_state.marked or step.new_state.masks
    for p, a, u, e, o, n, r, m in zip(
        before,
        after,
        updates,
        leaves(expected_updates),
        old,
        new,
        mask_list(reach),
        mask_list(marked),
        strict=True,
    ):
        assert a.dtype == p.dtype
        if o is None or r is None:
            assert (u.dtype, u.tobytes()) == (e.dtype, e.tobytes())
            continue
        if record.weights == "dense":
            # Weights out of reach keep their values, and have no moments.
            assert u.dtype == e.dtype
            assert u[r].tobytes() == e[r].tobytes()
            assert not np.any(u[~r])
            keeps[p.shape] = m if record.marked_sparsity is not None else r
            continue
        keep = o & n if record.weights == "sparse" else n
        if method.startswith("granet"):
            # What gradual pruning removes starts anew even if regrowth takes it back.
            stepped = np.where(o, (p + e).astype(p.dtype), p.dtype.type(0))
            keep = oracle.continuing(stepped, o, n)
        keeps[p.shape] = keep
        assert u.dtype == jnp.promote_types(e.dtype, p.dtype)
        assert np.all(np.isfinite(u.astype(np.float32)))
        # Pruned weights, and those that have just come in.
        assert np.all(u[~keep] == -p[~keep])
        assert np.all(a[~n] == 0)
        assert np.all(a[~keep] == 0)
        # Active ones. The wider dtype holds every value of the narrower.
        assert u[keep].tobytes() == e[keep].astype(u.dtype).tobytes()
        assert np.any(u[keep] != 0) or inner == "multi_steps"

    inner_state = step.new_state.inner_state
    assert jax.tree.structure(inner_state) == jax.tree.structure(expected_state)
    for (path, x), e in zip(
        jax.tree_util.tree_leaves_with_path(inner_state),
        leaves(expected_state),
        strict=True,
    ):
        name, x = jax.tree_util.keystr(path), np.asarray(x)
        assert (x.shape, x.dtype) == (e.shape, e.dtype), name
        # Only by shape: no shape in the tree comes twice.
        keep = keeps.get(x.shape)
        if keep is not None:
            assert np.all(x[~keep] == 0), name
            x, e = x[keep], e[keep]
        assert x.tobytes() == e.tobytes(), name


# Inner optimizers with one of the methods each, in turns (more of them in
# `test_fuzz.py`); all with all in both dtypes with HYPOTHESIS_PROFILE=nightly.


def cases(methods: Iterable[str], inners: Iterable[str], one_of: int) -> list[Any]:
    """Inner optimizers outermost: a worker meets a reference step many times."""
    return [
        pytest.param(method, inner, dtype, id=f"{inner}-{method}-{dtype}")
        for (i, inner), (j, method), (k, dtype) in itertools.product(
            enumerate(inners), enumerate(methods), enumerate(DTYPES)
        )
        if NIGHTLY or ((i + j) % one_of == 0 and (i // one_of + j + k) % 2 == 0)
    ]


CASES = cases(METHODS, INNERS, 9)
# Inner optimizers that are elementwise or not, with moments that are no zeros at first,
# factored, wrapped.
LATER_INNERS = ("momentum", "adamw", "muon", "adafactor", "schedule_free")
LATER_CASES = cases(LATER_METHODS, LATER_INNERS, 4)


@pytest.mark.parametrize(("method", "inner", "dtype"), CASES + LATER_CASES)
def test_contract(method: str, inner: str, dtype: str) -> None:
    record = (METHODS | LATER_METHODS)[method]
    tx = granet_jax.transform(record, INNERS[inner](), seed=1)
    params = trees.parameters(dtype)
    state = tx.init(params)
    kinds = trees.types(state)
    foretold = jax.eval_shape(tx.init, trees.shape_tree(dtype))
    assert jax.tree.structure(foretold) == jax.tree.structure(state)
    assert trees.types(foretold) == kinds
    shardings = [x.sharding for x in jax.tree.leaves(state)]

    if record.weights != "dense":
        params = granet_jax.apply_masks(params, granet_jax.get_masks(state))
    update = jax.jit(tx.update, compiler_options=STRICT)
    changed = []
    for count in range(1, STEPS + 1):
        grads = gradients(count, dtype)
        updates, new_state = update(grads, state, params)
        check_step(method, inner, Snapshot(params, grads, state, updates, new_state))
        assert new_state.count == count
        assert jax.tree.structure(new_state) == jax.tree.structure(state)
        assert trees.types(new_state) == kinds
        assert [x.sharding for x in jax.tree.leaves(new_state)] == shardings
        assert update._cache_size() == 1
        if any(
            np.any(a != b)
            for a, b in zip(leaves(state.masks), leaves(new_state.masks), strict=True)
        ):
            changed.append(count)
        params, state = optax.apply_updates(params, updates), new_state
    if record.weights == "sparse":
        assert tuple(changed) == UPDATES[method]
    else:
        assert set(changed) >= set(UPDATES[method])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strict_compilation(dtype: str) -> None:
    # What the comparisons above stand on: one rounding an operation, as NumPy does it.
    rng = np.random.default_rng(0)
    a, b, c = (jnp.asarray(np.exp(rng.normal(size=(40, 25))), dtype) for _ in range(3))
    x, y, z = np.asarray(a), np.asarray(b), np.asarray(c)
    strict = functools.partial(jax.jit, compiler_options=STRICT)
    assert np.array_equal(strict(lambda a, b, c: a * b - c)(a, b, c), x * y - z)
    chosen = strict(lambda a, b, c: jnp.where(a > 1, a * b + c * c, a - b))(a, b, c)
    assert np.array_equal(chosen, np.where(x > 1, x * y + z * z, x - y))
    if dtype == "float32":
        assert np.array_equal(strict(jax.lax.rsqrt)(a), 1 / np.sqrt(x))
