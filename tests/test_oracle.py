"""Whole runs of every method against the plain NumPy oracle, step by step, bit for bit.

Learning rate, momentum and decays are powers of two and gradients lie on a grid, so
that parameters and moments can be compared with `==`, and so that magnitudes and
gradients tie often.
"""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax import _transform, choices, scores, updates
from granet_jax.scores import ScoreInputs
from tests import oracle

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
T = 66  # Optimizer steps of a run.

METHODS = {
    "granet": ("granet", (0.9, T), {"interval": 3, "end_step": 40}),
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
    "granet_every_step": ("granet", (0.9, 25), {"interval": 1, "end_step": 18}),
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
}


def leaves_of(tree):
    """The maskable leaves as NumPy arrays, in tree order."""
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    return [flat[name] for name in MASKED]


def with_leaves(tree, arrays):
    """The tree with other maskable leaves."""
    arrays = dict(zip(MASKED, arrays, strict=True))
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray(
            arrays.get(jax.tree_util.keystr(path, simple=True, separator="."), x)
        ),
        tree,
    )


def random_tree(rng, *, grid, dtypes=None):
    """Random multiples of `grid` in every leaf."""
    dtypes = dtypes or {}

    def draw(path, shape):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        x = grid * np.round(rng.normal(size=shape) / grid)
        return jnp.asarray(x, dtypes.get(name, jnp.float32))

    return jax.tree_util.tree_map_with_path(
        draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def random_scores(seed, count):
    """The library's random scores of one step, for the maskable leaves."""
    shapes = [leaf.shape for leaf in leaves_of(random_tree(np.random, grid=1.0))]
    key = choices.step_key(seed, count)
    return [
        np.asarray(
            scores.random(
                ScoreInputs(
                    param=jnp.zeros(shape),
                    grad=None,
                    mask=jnp.ones(shape, bool),
                    accumulator=None,
                    key=jax.random.fold_in(key, i),
                )
            )
        )
        for i, shape in enumerate(shapes)
    ]


def assert_same(ours, expected, what):
    for name, x, y in zip(MASKED, ours, expected, strict=True):
        assert x.dtype == y.dtype, (what, name)
        np.testing.assert_array_equal(x, y, err_msg=f"{what} of {name}")


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
    steps=T,
    jit=True,
    quick=True,
    dtypes=None,
    corrupt=None,
    apply_first=True,
):
    """Trains with the library and with the oracle, comparing after every step.

    mixing: the optimizer contains a link that looks at all weights at once.
    quick: compile with few of LLVM's optimizations, in half the time.
    corrupt: changes the dense gradients, given (rng, gradients, masks) as lists.

    Returns how many masks changed, counted over leaves and steps, and the oracle.
    """
    function, args, kwargs = METHODS[name]
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
    state = tx.init(params)

    # Drawn and selected by the oracle, from the library's random numbers.
    masks = oracle.initial_masks(recipe, random_scores(seed, 0))
    assert_same(leaves_of(granet_jax.get_masks(state)), masks, "initial mask")
    if apply_first:
        params = granet_jax.apply_masks(params, granet_jax.get_masks(state))
    theirs = oracle.Trainer(
        recipe,
        leaves_of(params),
        masks,
        rate=rate,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        steers=steers,
    )

    def step(params, state, grads):
        extra = {} if steers else {"grads": grads}
        changes, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, changes), state

    if jit:
        options = {"xla_llvm_disable_expensive_passes": True} if quick else None
        step = jax.jit(step, compiler_options=options)
    changed = 0
    for t in range(1, steps + 1):
        grads = random_tree(rng, grid=grid, dtypes=dtypes)
        if corrupt is not None:
            grads = with_leaves(grads, corrupt(rng, leaves_of(grads), theirs.masks))
        before = theirs.masks
        theirs.step(leaves_of(grads), lambda count: random_scores(seed, count))
        params, state = step(params, state, grads)
        sparse = granet_jax.get_state(state)
        assert int(sparse.count) == t
        assert_same(leaves_of(sparse.masks), theirs.masks, f"mask at step {t}")
        assert_same(leaves_of(params), theirs.params, f"parameters at step {t}")
        if momentum:
            trace = optax.tree_utils.tree_get(state, "trace")
            assert_same(leaves_of(trace), theirs.moments, f"momentum at step {t}")
        if recipe.decay is not None:
            assert_same(
                leaves_of(sparse.accumulator),
                theirs.accumulators,
                f"moving average at step {t}",
            )
        changed += sum(
            not np.array_equal(x, y) for x, y in zip(before, theirs.masks, strict=True)
        )
    return changed, theirs


def length(name):
    """Steps of a run: past the last update, to see that it was the last."""
    args = METHODS[name][1]
    return args[1] + 3 if len(args) > 1 else 5


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
    changed, theirs = run_both(
        name,
        steps=length(name),
        nesterov=True,
        weight_decay=2.0**-10,
        quick=False,
    )
    assert lean == [True]
    number = len(theirs.recipe.update_steps)
    if name == "static":
        assert number == changed == 0
    else:
        assert number >= 20
        # Every update moved some mask, several leaves at times.
        assert changed > number


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
    drawn = {
        tuple(x[1].ravel().tolist())
        for x in (random_scores(0, 1), random_scores(0, 2), random_scores(1, 1))
    }
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


# --- The parts of SNFS's redistribution ---------------------------------------------


@st.composite
def pouring(draw):
    """Weights, room and a number that fits, for four leaves."""
    room = draw(st.lists(st.integers(0, 2000), min_size=4, max_size=4))
    weight = st.floats(0, 1e6, width=32) | st.sampled_from(
        [0.0, 1e-45, 3e38, math.inf, math.nan]
    )
    weights = draw(st.lists(weight, min_size=4, max_size=4))
    number = draw(st.integers(0, sum(room)))
    return number, weights, room


@hypothesis.given(pouring())
@hypothesis.example((3, [0.0, 0.0, 0.0, 0.0], [1, 0, 1, 1]))
@hypothesis.example((2000, [math.inf, math.nan, 3e38, 3e38], [900, 900, 900, 900]))
def test_redistribution_fills_exactly_and_within_room(case):
    number, weights, room = case
    given = np.asarray(
        updates.redistribute(
            jnp.uint32(number),
            jnp.asarray(weights, jnp.float32),
            jnp.asarray(room, jnp.uint32),
        )
    )
    assert given.dtype == np.uint32
    assert given.sum() == number
    assert (given <= room).all()


@hypothesis.given(
    st.lists(st.integers(1, 2**10), min_size=4, max_size=4), st.integers(0, 2**12)
)
def test_redistribution_is_proportional_where_there_is_room(weights, number):
    given = np.asarray(
        updates.redistribute(
            jnp.uint32(number),
            jnp.asarray(weights, jnp.float32),
            jnp.full(4, 2**20, jnp.uint32),
        )
    ).astype(float)
    share = number * np.asarray(weights) / sum(weights)
    # Rounding leaves fewer than four over, of which each leaf gets one at most, and
    # more only in proportion.
    assert (np.abs(given - share) < 4).all()


def test_redistribution_by_hand():
    def pour(number, weights, room):
        given = updates.redistribute(
            jnp.uint32(number),
            jnp.asarray(weights, jnp.float32),
            jnp.asarray(room, jnp.uint32),
        )
        assert oracle.redistributed(number, weights, room) == given.tolist()
        return given.tolist()

    assert pour(10, [1, 3, 1], [9, 9, 9]) == [2, 6, 2]
    # The second is full at 4: what it cannot take is halved between the others.
    assert pour(10, [1, 3, 1], [9, 4, 9]) == [3, 4, 3]
    # A leaf without weight is served only when the others are full.
    assert pour(10, [0, 1, 1], [9, 3, 3]) == [4, 3, 3]
    assert pour(9, [0, 0, 0], [6, 3, 9]) == [4, 1, 4]


def test_mean_score_is_the_mean_up_to_a_common_factor():
    rng = np.random.default_rng(0)
    masks = [rng.random(n) < 0.3 for n in (5000, 70, 1)] + [np.zeros(3, bool)]
    values = [
        np.abs(rng.normal(size=m.shape)).astype(np.float32) * 10.0**-i
        for i, m in enumerate(masks)
    ]
    masks[2][:] = True
    means = np.asarray(updates.mean_score(masks, values), np.float64)
    expected = np.asarray(
        [v[m].mean() if m.any() else 0.0 for v, m in zip(values, masks, strict=False)]
    )
    np.testing.assert_allclose(
        means / means[0], expected / expected[0], rtol=1e-5, atol=0
    )
    assert means[3] == 0.0


def test_mean_score_ignores_what_is_not_finite():
    mask = np.ones(4, bool)
    clean = updates.mean_score([mask, mask], [np.float32([1, 0, 2, 0]), np.ones(4)])
    dirty = updates.mean_score(
        [mask, mask], [np.float32([1, np.inf, 2, np.nan]), np.ones(4)]
    )
    np.testing.assert_array_equal(clean, dirty)
    assert clean[0] / clean[1] == 0.75


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
    trainer = oracle.Trainer(
        recipe,
        [np.float32([[4, 1, 0, 0]])],
        [np.array([[True, True, False, False]])],
        rate=0.5,
        momentum=0.5,
    )
    trainer.step([np.float32([[2, 1, -4, 8]])])
    # Stepped to 3 and 0.5; 0.5 is dropped, and the last has the largest gradient.
    assert trainer.masks[0].tolist() == [[True, False, False, True]]
    assert trainer.params[0].tolist() == [[3, 0, 0, 0]]
    assert trainer.moments[0].tolist() == [[2, 0, 0, 0]]
    trainer.step([np.float32([[0, 1, 1, 8]])])
    assert trainer.params[0].tolist() == [[2.5, 0, 0, -4]]
    assert trainer.moments[0].tolist() == [[1, 0, 0, 8]]
