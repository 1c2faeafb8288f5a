"""Whole runs of every method against the plain NumPy oracle, step by step, bit for bit.

Learning rate, momentum and decays are powers of two and gradients lie on a grid, so
that parameters and moments can be compared with `==`, and so that magnitudes and
gradients tie often.
"""

import functools
import random
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax import _transform
from tests.core.test_contract import STRICT
from tests.helpers import fuzzing, luck, oracle
from tests.nightly import NIGHTLY

# In tree order; only those with two or more dimensions carry a mask.
SHAPES = {
    "conv": {"bias": (4,), "kernel": (3, 3, 2, 4)},
    "dense": {"kernel": (12, 10)},
    "empty": (0, 3),
    "head": {"kernel": (10, 5)},
    "one": (1, 1),
    "scale": (),
}
MASKED = ("conv.kernel", "dense.kernel", "empty", "head.kernel", "one")
T = 630  # Optimizer steps of a run.
S = 66  # Of a short one.

METHODS = {
    "granet": ("granet", (0.9, T), {"interval": 3, "end_step": 400}),
    "granet_st": ("granet", (0.9, T), {"interval": 3, "initial_sparsity": 0.5}),
    "granet_layer": (
        "granet",
        (0.85, T),
        {
            "interval": 3,
            "initial_sparsity": 0.3,
            "scope": "layer",
            "distribution": "erk",
        },
    ),
    "granet_from_11": (
        "granet",
        (0.8, T),
        {
            "interval": 3,
            "begin_step": 11,
            "end_step": 50,
            "fraction": 0.3,
            "final_fraction": 0.1,
        },
    ),
    "granet_random": ("granet", (0.9, T), {"interval": 2, "grow": "random"}),
    "granet_every_step": ("granet", (0.9, 240), {"interval": 1, "end_step": 180}),
    "gmp": ("gmp", (0.95, T), {"interval": 3}),
    "gmp_st": (
        "gmp",
        (0.95, T),
        {"interval": 3, "begin_step": 1, "initial_sparsity": 0.5},
    ),
    "gmp_layer": ("gmp", (0.9, T), {"interval": 3, "scope": "layer"}),
    "rigl": ("rigl", (0.8, T), {"interval": 2}),
    "rigl_itop": ("rigl", (0.8, T), {"interval": 3, "fraction": 0.5, "stop": 1.0}),
    "set": ("set_", (0.6, T), {"interval": 3, "distribution": "er"}),
    "snfs": ("snfs", (0.8, T), {"interval": 3, "decay": 0.5}),
    "snfs_full": ("snfs", (0.15, T), {"interval": 3, "decay": 0.5, "fraction": 0.9}),
    "static": ("static", (0.8,), {}),
    "cyclical": ("cyclical", (0.9, T), {"cycles": 15, "interval": 2}),
    "cyclical_partial": (
        "cyclical",
        (0.8, T),
        {"cycles": 15, "interval": 2, "initial_sparsity": 0.3, "scope": "layer"},
    ),
    "cyclical_projected": (
        "cyclical",
        (0.9, T),
        {"cycles": 15, "interval": 2, "recovery": "projected", "scope": "layer"},
    ),
    "cyclical_dense": (
        "cyclical",
        (0.9, T),
        {
            "cycles": 15,
            "interval": 2,
            "initial_sparsity": 0.2,
            "recovery": "straight_through",
        },
    ),
    "acdc": ("acdc", (0.8, tuple(range(3, T, 3))), {}),
    "sculpt": ("sculpt", (0.9, T), {"cycles": 209, "initial_sparsity": 0.5}),
    "straight_through": (
        "straight_through",
        (0.9, T),
        {"interval": 3, "penalty": 2.0**-6},
    ),
    # The density divides the penalty: a quarter, so that products are exact.
    "top_kast": (
        "top_kast",
        (0.75,),
        {"backward_sparsity": 0.5, "interval": 3, "penalty": 2.0**-6},
    ),
    "top_kast_global": (
        "top_kast",
        (0.75,),
        {"backward_sparsity": 0.2, "interval": 1, "penalty": 0.0, "scope": "global"},
    ),
    "greg1": (
        "greg1",
        (0.8,),
        {"interval": 3, "growth": 2.0**-9, "ceiling": 0.25, "settle_steps": 20},
    ),
    "greg2": (
        "greg2",
        (0.8,),
        {
            "interval": 3,
            "growth": 2.0**-9,
            "ceiling": 0.25,
            "settle_steps": 20,
            "pick_growth": 2.0**-10,
            "pick_ceiling": 2.0**-6,
            "weight_decay": 2.0**-10,
            "scope": "global",
        },
    ),
}
# With few updates: one pruning, and the choice of what it is to remove.
RARE = ("sculpt", "greg1", "greg2")
# A coefficient of several bits times a weight is rounded, before it is added.
ROUNDED = ("greg1", "greg2")


def leaves_of(tree):
    """The maskable leaves as NumPy arrays, in tree order."""
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    return [flat[name] for name in MASKED]


def random_tree(rng, *, grid, dtypes=None, lead=()):
    """Random multiples of `grid` in every leaf, after the axes of `lead`."""
    dtypes = dtypes or {}

    def draw(path, shape):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        x = grid * np.round(rng.normal(size=(*lead, *shape)) / grid)
        return x.astype(dtypes.get(name, jnp.float32))

    return jax.tree_util.tree_map_with_path(
        draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


@jax.jit
def random_scores(seed, counts):
    """The library's random scores of every step, for the maskable leaves."""
    shapes = [leaf.shape for leaf in leaves_of(random_tree(np.random, grid=1.0))]
    return jax.vmap(lambda count: luck.random_scores(shapes, seed, count))(counts)


class Snapshot(NamedTuple):
    """What a step leaves behind: lists with an array per maskable leaf."""

    masks: list
    params: list
    moments: list
    marked: list
    accumulators: list


def assert_same(ours, expected):
    """Two snapshots of all steps are equal to the bit, types included."""
    for what, found, wanted in zip(Snapshot._fields, ours, expected, strict=True):
        assert len(found) == len(wanted) in (0, len(MASKED)), what
        for name, x, y in zip(MASKED, found, wanted, strict=False):
            assert x.dtype == y.dtype, (what, name)
            if not np.array_equal(x, y):
                first = next(t for t in range(len(x)) if not np.array_equal(x[t], y[t]))
                raise AssertionError(f"{what} of {name} differ from step {first + 1}")


QUICK = {"xla_llvm_disable_expensive_passes": True}


def run_both(
    name,
    *,
    seed=0,
    steers=True,
    mixing=False,
    rate=2.0**-4,
    momentum=0.5,
    nesterov=False,
    weight_decay=0.0,
    grid=2.0**-6,
    steps=S,
    jit=True,
    options=QUICK,
    dtypes=None,
    corrupt=None,
    apply_first=True,
):
    """Trains with the oracle and with the library, and compares every step.

    name: of one of `METHODS`, or a method as they are.
    mixing: the optimizer contains a link that looks at all weights at once.
    options: of the compiler; `QUICK` for few of LLVM's optimizations, in half the time.
    corrupt: changes the dense gradients, given (rng, gradients, masks) as lists.

    Returns how many masks changed, counted over leaves and steps, and the oracle.
    """
    function, args, kwargs = METHODS[name] if isinstance(name, str) else name
    method = getattr(granet_jax, function)(*args, **kwargs)
    recipe = getattr(oracle, function)(*args, **kwargs)
    rng = np.random.default_rng(seed)
    inner = optax.chain(
        # Far above the gradients' norm: changes nothing, to the bit.
        *([optax.clip_by_global_norm(2.0**20)] if mixing else []),
        optax.add_decayed_weights(weight_decay),
        optax.sgd(rate, momentum=momentum or None, nesterov=nesterov),
    )
    if steers:
        tx = granet_jax.transform(method, inner, seed=seed)
    else:
        tx = optax.chain(inner, granet_jax.transform(method, seed=seed))
    params = random_tree(rng, grid=grid, dtypes=dtypes)
    grads = random_tree(rng, grid=grid, dtypes=dtypes, lead=(steps,))
    state = tx.init(params)

    # Drawn and selected by the oracle, from the library's random numbers.
    drawn = leaves_of(params)
    drawings = jax.device_get(random_scores(seed, jnp.arange(steps + 1)))
    masks = oracle.initial_masks(recipe, [x[0] for x in drawings], drawn)
    for x, y in zip(leaves_of(granet_jax.get_masks(state)), masks, strict=True):
        np.testing.assert_array_equal(x, y)
    if apply_first and recipe.weights != "dense":
        params = granet_jax.apply_masks(params, granet_jax.get_masks(state))
    optimizer = oracle.Sgd(
        leaves_of(params),
        rate=rate,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
    )
    theirs = oracle.Trainer(
        recipe, leaves_of(params), masks, optimizer, steers=steers, drawn=drawn
    )
    expected = []
    changed = 0
    for t in range(steps):
        dense = [g[t] for g in leaves_of(grads)]
        if corrupt is not None:
            dense = corrupt(rng, dense, theirs.masks)
            for g, x in zip(leaves_of(grads), dense, strict=True):
                g[t] = x
        before = theirs.masks
        theirs.step(dense, lambda count: [x[count] for x in drawings])
        changed += sum(
            not np.array_equal(x, y) for x, y in zip(before, theirs.masks, strict=True)
        )
        expected.append(
            Snapshot(
                theirs.masks,
                theirs.params,
                list(optimizer.moments) if momentum else [],
                theirs.marked if recipe.marked is not None else [],
                theirs.accumulators if recipe.decay is not None else [],
            )
        )

    def step(carry, grad):
        params, state = carry
        extra = {} if steers else {"grads": grad}
        changes, state = tx.update(grad, state, params, **extra)
        params = optax.apply_updates(params, changes)
        return (params, state), (params, state)

    start = (jax.tree.map(jnp.asarray, params), state)
    if jit:
        run = jax.jit(functools.partial(jax.lax.scan, step), compiler_options=options)
        _, rows = run(start, grads)
    else:
        found = []
        for t in range(steps):
            start, row = step(
                start, jax.tree.map(lambda g, t=t: jnp.asarray(g[t]), grads)
            )
            found.append(row)
        rows = jax.tree.map(lambda *x: np.stack(x), *found)
    params, state = jax.device_get(rows)
    sparse = granet_jax.get_state(state)
    np.testing.assert_array_equal(sparse.count, np.arange(1, steps + 1))
    moments = optax.tree_utils.tree_get(state, "trace") if momentum else ()
    ours = Snapshot(
        *(
            leaves_of(tree) if jax.tree.leaves(tree) else []
            for tree in (
                sparse.masks,
                params,
                moments,
                sparse.marked,
                sparse.accumulator,
            )
        )
    )
    assert_same(ours, jax.tree.map(lambda *x: np.stack(x), *expected))
    return changed, theirs


@pytest.mark.parametrize("name", METHODS)
def test_every_method_follows_the_oracle(name, monkeypatch):
    # The transform has two ways through a step, and takes the lean one for sgd.
    lean = []
    decide = _transform._can_mask_inputs
    monkeypatch.setattr(
        _transform,
        "_can_mask_inputs",
        lambda *args: lean.append(decide(*args)) or lean[-1],
    )
    # Past the last update, to see that it was the last.
    changed, theirs = run_both(
        name,
        steps=5 if name == "static" else T + 3,
        nesterov=True,
        weight_decay=2.0**-10,
        options=STRICT if name in ROUNDED else None,
    )
    recipe = theirs.recipe
    assert lean == ([True] if recipe.weights == "sparse" else [])
    if name == "static":
        assert len(recipe.update_steps) == changed == 0
    elif name in RARE:
        assert changed >= 1
    else:
        chosen = T // recipe.refresh if recipe.weights != "sparse" else 0
        assert max(len(recipe.update_steps), chosen) >= 200
        # Masks move all along; by gradual pruning as often as there are weights.
        assert changed >= 100


@pytest.mark.parametrize("seed", range(200 if NIGHTLY else 3))
def test_any_configuration_follows_the_oracle(seed):
    # With schedules of two hundred updates, drawn with all else.
    rng = random.Random(seed)
    method = fuzzing.drawn_method(rng, updates=200)
    run_both(
        method,
        seed=seed,
        steps=rng.choice([250, 450]),
        momentum=rng.choice([0.0, 0.5]),
        mixing=rng.random() < 0.3,
        grid=rng.choice([0.25, 2.0**-6]),
        options=STRICT,
    )


@pytest.mark.parametrize("name", ["granet", "granet_layer", "rigl", "snfs_full"])
def test_ties_in_the_general_way(name):
    # Plain SGD on a coarse grid: most magnitudes and gradients tie. The clipping link
    # sees all weights, so that the lean way is closed.
    changed, theirs = run_both(
        name, seed=1, mixing=True, momentum=0.0, rate=0.25, grid=0.5
    )
    sizes = np.abs(np.concatenate([p.ravel() for p in theirs.params]))
    assert len(np.unique(sizes[sizes > 0])) < 0.8 * np.sum(sizes > 0)
    assert changed >= 25


@pytest.mark.parametrize("name", ["granet_st", "rigl", "snfs"])
def test_as_the_last_link(name):
    changed, _ = run_both(name, seed=2, steers=False, weight_decay=2.0**-10)
    assert changed >= 40


def test_outside_jit():
    changed, _ = run_both("rigl", steps=4, jit=False)
    assert changed >= 4


def test_random_growth_depends_on_seed_and_step():
    counts = jnp.arange(3)
    first, other = random_scores(0, counts)[1], random_scores(1, counts)[1]
    drawn = {tuple(x.ravel().tolist()) for x in (first[1], first[2], other[1])}
    assert len(drawn) == 3


def test_nan_and_infinite_gradients_of_inactive_weights():
    # Grown last (NaN) and first (infinite), and they reach no parameter.
    def corrupt(rng, grads, masks):
        out = []
        for g, m in zip(grads, masks, strict=True):
            kind = rng.integers(4, size=g.shape)
            g = np.where(~m & (kind == 0), np.float32(np.nan), g)
            out.append(np.where(~m & (kind == 1), np.float32(-np.inf), g))
        return out

    changed, theirs = run_both("granet", seed=3, corrupt=corrupt)
    assert changed >= 40
    assert all(np.isfinite(p).all() for p in theirs.params)


def test_leaves_of_several_dtypes():
    # Ranked across leaves: scores of stepped weights, rounded to their own dtype.
    dtypes = {"conv.kernel": jnp.bfloat16, "head.kernel": jnp.float16}
    changed, theirs = run_both(
        "granet", seed=4, momentum=0.0, rate=2.0**-7, grid=2.0**-5, dtypes=dtypes
    )
    assert changed >= 40
    assert [p.dtype.name for p in theirs.params[:4:3]] == ["bfloat16", "float16"]


@pytest.mark.parametrize(
    ("name", "mixing"),
    [("granet_every_step", False), ("rigl", False), ("rigl", True)],
)
def test_parameters_that_nobody_masked(name, mixing):
    changed, _ = run_both(name, seed=5, steps=12, apply_first=False, mixing=mixing)
    assert changed >= 10


# --- The oracle itself, by hand -----------------------------------------------------


def test_oracle_selection_by_hand():
    score = np.float32([1, np.nan, 0.0, -0.0, np.inf, 1, -np.inf])
    everything = np.ones(7, bool)
    ranks = [4, 0, 5, 2, 3, 6, 1]
    for k in range(8):
        chosen = oracle.best(score, everything, k)
        assert np.flatnonzero(chosen).tolist() == sorted(ranks[:k])
    some = np.arange(7) > 3
    assert np.flatnonzero(oracle.best(score, some, 2)).tolist() == [4, 5]
    assert np.flatnonzero(oracle.best(score, some, 9)).tolist() == [4, 5, 6]
    across = oracle.best_across([score[:2], score[2:]], [some[:2], some[2:]], 1)
    assert [c.tolist() for c in across] == [
        [False] * 2,
        [False] * 2 + [True] + [False] * 2,
    ]


def test_oracle_numbers_by_hand():
    assert oracle.total_count(10, 0.75) == 3  # 2.5, half up
    assert oracle.number_dropped(0.1, 10) == 1
    assert oracle.number_dropped(0.1, 11) == 2
    assert oracle.number_dropped(1.0, 7) == 7
    assert oracle.number_dropped(0.0, 7) == 0
    recipe = oracle.gmp(0.8, 20, interval=5)
    assert list(recipe.targets) == [5, 10, 15, 20]
    assert recipe.targets[10] == pytest.approx(0.8 - 0.8 / 8)
    assert recipe.targets[20] == 0.8


def test_oracle_trains_by_hand():
    # One leaf of four, RigL with one exchange of half the weights at step 1.
    recipe = oracle.Recipe(start=0.5, fractions={1: 0.5})
    params = [np.float32([[4, 1, 0, 0]])]
    optimizer = oracle.Sgd(params, rate=0.5, momentum=0.5)
    trainer = oracle.Trainer(
        recipe, params, [np.array([[True, True, False, False]])], optimizer
    )
    trainer.step([np.float32([[2, 1, -4, 8]])])
    # Stepped to 3 and 0.5; 0.5 is dropped, and the last has the largest gradient.
    assert trainer.masks[0].tolist() == [[True, False, False, True]]
    assert trainer.params[0].tolist() == [[3, 0, 0, 0]]
    assert optimizer.moments[0].tolist() == [[2, 0, 0, 0]]
    trainer.step([np.float32([[0, 1, 1, 8]])])
    assert trainer.params[0].tolist() == [[2.5, 0, 0, -4]]
    assert optimizer.moments[0].tolist() == [[1, 0, 0, 8]]
