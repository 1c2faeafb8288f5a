"""Which leaves of an optimizer's state are moments, and their zeros."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax.moments import masked_moments, zero_moments
from tests.core.test_contract import DTYPES, INNERS
from tests.helpers import trees

PyTree = Any

# How many leaves of the state have the shape of dense/kernel, and of conv/kernel: known
# from the optimizers' definitions.
MOMENTS: dict[str, tuple[int, int]] = {
    "sgd": (0, 0),
    "momentum": (1, 1),
    "nesterov": (1, 1),
    "adam": (2, 2),
    "adamw": (2, 2),
    "nadamw": (2, 2),
    "lion": (1, 1),
    "rmsprop": (3, 3),  # mean, mean of squares, momentum
    "adagrad": (1, 1),
    "adafactor": (1, 1),  # momentum; the second moment is factored
    "adafactor_dense": (1, 1),
    "lamb": (2, 2),
    "lars": (1, 1),
    "adan": (4, 4),  # three moments and the last gradient
    "radam": (2, 2),
    "muon": (1, 2),  # matrices by muon, the rest by adam
    "sm3": (1, 1),  # momentum; the accumulators are one a row and one a column
    "schedule_free": (3, 3),  # adam's two, and the iterate z
    "prodigy": (4, 4),  # adam's two, the start, and the sum of gradients
    "apply_if_finite": (1, 1),
    "inject_hyperparams": (2, 2),
    "multi_transform_tree": (2, 2),
    "multi_transform_function": (2, 2),
    "masked": (0, 2),
    "multi_steps": (3, 3),  # adam's two, and the sum of gradients
}


def random_masks(params: PyTree, seed: int = 0) -> PyTree:
    return granet_jax.init_masks(granet_jax.static(0.5), params, seed=seed)


def keeps_by_shape(keep: PyTree) -> dict[tuple[int, ...], np.ndarray]:
    return {m.shape: np.asarray(m) for m in jax.tree.leaves(keep)}


@pytest.mark.parametrize("value", [1.0, float("nan")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", INNERS)
def test_moments_of_every_inner_optimizer(inner: str, dtype: str, value: float) -> None:
    params = trees.parameters(dtype)
    keep = random_masks(params)
    state = INNERS[inner]().init(params)
    state = jax.tree.map(
        lambda x: (
            jnp.full_like(x, value) if jnp.issubdtype(x.dtype, jnp.inexact) else x
        ),
        state,
    )
    kinds = trees.types(state)
    zeroed = zero_moments(state, keep)
    assert jax.tree.structure(zeroed) == jax.tree.structure(state)
    assert trees.types(zeroed) == kinds

    by_shape = keeps_by_shape(keep)
    found = dict.fromkeys(by_shape, 0)
    flags = masked_moments(state, keep)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(zeroed), flags, strict=True)
    for before, after, flag in pairs:
        before, after = np.asarray(before), np.asarray(after)
        # No shape comes twice in this tree, so the shape alone tells.
        mask = by_shape.get(before.shape)
        assert flag == (mask is not None)
        expected = before
        if mask is not None:
            found[before.shape] += 1
            expected = np.where(mask, before, np.zeros_like(before))
        assert after.tobytes() == expected.tobytes()
    assert (found[6, 8], found[3, 3, 2, 4]) == MOMENTS[inner]


def test_moments_of_dense_leaves_stay() -> None:
    # A leaf that could carry a mask but does not.
    params = trees.parameters()
    keep = granet_jax.init_masks(
        granet_jax.static(0.5), params, where=lambda name, _: name == "conv/kernel"
    )
    state = jax.tree.map(jnp.ones_like, optax.adam(0.1).init(params))
    zeroed = zero_moments(state, keep)
    expected = {
        "conv": {"kernel": jnp.asarray(keep["conv"]["kernel"], jnp.float32)},
        "dense": jax.tree.map(jnp.ones_like, params["dense"]),
    }
    for moment in (zeroed[0].mu, zeroed[0].nu):
        trees.assert_same(moment, expected)
    assert zeroed[0].count == 1


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_moments_of_pruned_weights_where_an_epsilon_rounds_to_zero(dtype: str) -> None:
    # In float16 that of rmsprop does, which makes NaN of the gradient zero.
    params = trees.parameters(dtype)
    tx = granet_jax.transform(granet_jax.static(0.5), optax.rmsprop(0.1, momentum=0.5))
    state = tx.init(params)
    _, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
    found = granet_jax.get_state(state).inner_state
    trees.assert_same(found, zero_moments(found, granet_jax.get_masks(state)))


# --- Traps ------------------------------------------------------------------------


class Names(NamedTuple):
    """Parameters in a NamedTuple, named as the fields of Adam's state are."""

    mu: Any
    count: Any


A, B, C = (jnp.full((4, 4), x, jnp.float32) for x in (1, 2, 3))
WIDE, TALL = jnp.ones((4, 6)), jnp.ones((6, 4))

# Parameters whose names or shapes invite a mix-up.
TRAPS: dict[str, PyTree] = {
    "equal_shapes": {"a": A, "b": B},
    "transposed_shapes": {"a": WIDE, "b": TALL},
    "transposed_names": {"x": {"y": A}, "y": {"x": B}},
    "one_name_ends_the_other": {"kernel": A, "dense": {"kernel": B}},
    "three_deep": {"k": A, "d": {"k": B, "d": {"k": C}}},
    "names_of_fields": {"mu": A, "nu": B, "0": C},
    "fields": Names(mu=A, count={"mu": B}),
    "list": [A, B, C],
    "numbers_as_names": {"0": A, "1": [B, C]},
    "nested_lists": [[A, B], [C]],
    "same_number_below": {"a": [A, [B]], "b": [C]},
    "bare_array": A,
    "empty_name": {"": A, "b": {"": B}},
    "slash_in_a_name": {"a/b": A, "a": {"b": B}},
    "one_column": {"w": jnp.ones((4, 1)), "b": jnp.ones((4,))},
}
TRAP_INNERS: dict[str, optax.GradientTransformation] = {
    "adam": optax.adam(0.1),
    "chain": optax.chain(optax.trace(0.5), optax.chain(optax.scale_by_adam())),
    "masked": optax.masked(optax.adam(0.1), lambda t: jax.tree.map(lambda _: True, t)),
    "multi_transform": optax.multi_transform(
        {"kernel": optax.adam(0.1)}, lambda t: jax.tree.map(lambda _: "kernel", t)
    ),
}


def like_params(state: PyTree, structure: Any) -> list[PyTree]:
    """The subtrees of a state that are moments, found by their structure alone."""
    found = []

    def is_moment(x: Any) -> bool:
        return jax.tree.structure(x) == structure and all(
            y.ndim > 0 for y in jax.tree.leaves(x)
        )

    jax.tree.map(
        lambda x: found.append(x) if is_moment(x) else None, state, is_leaf=is_moment
    )
    return found


@pytest.mark.parametrize("inner", TRAP_INNERS)
@pytest.mark.parametrize("trap", TRAPS)
def test_traps(trap: str, inner: str) -> None:
    params = TRAPS[trap]
    keep = random_masks(params)
    state = jax.tree.map(jnp.ones_like, TRAP_INNERS[inner].init(params))
    zeroed = zero_moments(state, keep)
    # Each moment is a tree like the parameters', so its place alone tells the mask.
    expected = jax.tree.map(
        lambda m, p: (
            jnp.ones_like(p) if isinstance(m, optax.MaskedNode) else m.astype(p.dtype)
        ),
        keep,
        params,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    moments = like_params(zeroed, jax.tree.structure(params))
    assert len(moments) == (3 if inner == "chain" else 2)
    for moment in moments:
        trees.assert_same(moment, expected)
    # The masks differ, or a mix-up would not show.
    masks = [np.asarray(m).tobytes() for m in jax.tree.leaves(keep)]
    assert len(set(masks)) == len(masks)
    counters = [x for x in jax.tree.leaves(zeroed) if x.ndim == 0]
    assert counters
    assert all(x == 1 for x in counters)


@pytest.mark.parametrize("masked", ["kernel", "dense/kernel"])
def test_dense_leaf_whose_name_ends_as_a_masked_one(masked: str) -> None:
    params = {"kernel": A, "dense": {"kernel": B}}
    keep = granet_jax.init_masks(
        granet_jax.static(0.5), params, where=lambda name, _: name == masked
    )
    state = jax.tree.map(jnp.ones_like, optax.trace(0.5).init(params))
    zeroed = zero_moments(state, keep).trace
    sums = {
        "kernel": zeroed["kernel"].sum(),
        "dense/kernel": zeroed["dense"]["kernel"].sum(),
    }
    assert sums == {"kernel": 16, "dense/kernel": 16, masked: 8}


def test_factored_moment_of_anothers_shape() -> None:
    # The statistics of dense/kernel over its rows have the shape of the parameter
    # "kernel", whose name ends theirs; they belong to many weights all the same.
    params = {"kernel": jnp.ones((8,)), "dense": {"kernel": jnp.ones((6, 8))}}
    inner = optax.adafactor(0.1, min_dim_size_to_factor=2)
    state = jax.tree.map(jnp.ones_like, inner.init(params))
    keep = granet_jax.init_masks(
        granet_jax.static(0.5, distribution="uniform"), params, where=lambda *_: True
    )
    zeroed = zero_moments(state, keep)
    found = {
        jax.tree_util.keystr(path): int((x == 0).sum())
        for path, x in jax.tree_util.tree_leaves_with_path(zeroed)
        if x.shape == (8,)
    }
    factors = [n for path, n in found.items() if "dense" in path]
    assert factors == [0]
    (own,) = (n for path, n in found.items() if "dense" not in path)
    assert own == 8 - int(keep["kernel"].sum())
    assert own > 0


def test_state_restored_as_dicts() -> None:
    # A checkpoint read without a target has dicts where the optimizer has NamedTuples.
    params = trees.parameters()
    keep = random_masks(params)
    state = jax.tree.map(jnp.ones_like, optax.adam(0.1).init(params)[0])
    zeroed = zero_moments(state, keep)
    as_dict = zero_moments({"inner": [state._asdict()]}, keep)
    trees.assert_same(as_dict, {"inner": [zeroed._asdict()]})


# --- optax.flatten ----------------------------------------------------------------


@pytest.mark.parametrize(
    "inner",
    [
        optax.flatten(optax.adam(0.1)),
        optax.chain(
            optax.clip(1.0), optax.flatten(optax.trace(0.9)), optax.scale(-0.1)
        ),
        optax.apply_if_finite(optax.flatten(optax.adam(0.1)), 3),
        optax.inject_hyperparams(lambda rate: optax.flatten(optax.adam(rate)))(0.1),
    ],
)
def test_flattened_optimizer_is_refused(inner: Any) -> None:
    tx = granet_jax.transform(granet_jax.static(0.5), inner)
    with pytest.raises(ValueError, match=r"one flat vector.*\(128,\).*optax\.flatten"):
        tx.init(trees.parameters())
    with pytest.raises(ValueError, match=r"without optax\.flatten"):
        jax.eval_shape(tx.init, trees.shape_tree())


def test_flattened_optimizer_of_one_vector_is_refused() -> None:
    # The flat vector has the shape of the only parameter, but not its name.
    params = {"w": jnp.ones((6,))}
    tx = granet_jax.transform(
        granet_jax.static(0.5), optax.flatten(optax.adam(0.1)), where={"w": True}
    )
    with pytest.raises(ValueError, match=r"optax\.flatten"):
        tx.init(params)


@pytest.mark.parametrize(
    ("inner", "params"),
    [
        # Nothing kept, nothing to hide.
        (optax.flatten(optax.sgd(0.1)), {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}),
        # One vector that is a parameter's own moment.
        (optax.adam(0.1), {"w": jnp.ones((6,))}),
        # Statistics per row of the only parameter, which has one column.
        (optax.sm3(0.1), {"w": jnp.ones((6, 1))}),
        (optax.adafactor(0.1, min_dim_size_to_factor=1), {"w": jnp.ones((6, 1))}),
    ],
)
def test_other_vectors_are_not_refused(inner: Any, params: PyTree) -> None:
    where = jax.tree.map(lambda p: p.size == 6, params)
    state = granet_jax.transform(granet_jax.static(0.5), inner, where=where).init(
        params
    )
    assert granet_jax.sparsity(state.masks).active == 3


# --- Weights that enter -----------------------------------------------------------


@pytest.mark.parametrize("jitted", [True, False])
@pytest.mark.parametrize("first", [1, 2])
def test_entering_weights_start_with_zero_moments(first: int, jitted: bool) -> None:
    # Compiled and not, the library takes two ways: see `_can_mask_inputs`.
    method = granet_jax.rigl(0.5, 16, interval=first, fraction=0.5, stop=0.5)
    tx = granet_jax.transform(method, optax.adam(0.125, b1=0.5, b2=0.5))
    params = trees.parameters()
    state = tx.init(params)
    params = granet_jax.apply_masks(params, state.masks)
    update = jax.jit(tx.update) if jitted else tx.update
    entered = [np.zeros(m.shape, bool) for m in jax.tree.leaves(state.masks)]
    total = 0
    for count in range(1, 6):
        grads = trees.gradients(count)
        old = [np.asarray(m) for m in jax.tree.leaves(state.masks)]
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        new = [np.asarray(m) for m in jax.tree.leaves(state.masks)]
        adam = state.inner_state[0]
        for i, (o, n) in enumerate(zip(old, new, strict=True)):
            name = ("conv", "dense")[i]
            p, g, mu, nu = (
                np.asarray(t[name]["kernel"]) for t in (params, grads, adam.mu, adam.nu)
            )
            # As they enter: the weight and its moments are zero.
            enters = n & ~o
            total += enters.sum()
            for x in (p, mu, nu):
                assert np.all(x[enters] == 0)
            # A step later: nothing but this step's gradient is in them.
            last = entered[i] & n
            assert np.array_equal(mu[last], g[last] / 2)
            assert np.array_equal(nu[last], g[last] ** 2 / 2)
            assert np.all(p[last] != 0)
            entered[i] = enters
    assert total > 0


@pytest.mark.parametrize("make_inner", [optax.adam, optax.lamb])
def test_masks_set_by_hand_zero_the_moments(make_inner: Any) -> None:
    # Two ways through a step again: lamb's norms tie the weights to one another.
    inner = make_inner(0.125, b1=0.5, b2=0.5)
    tx = granet_jax.transform(granet_jax.static(0.0), inner)
    params = trees.parameters()
    state = tx.init(params)
    update = jax.jit(tx.update)
    _, state = update(trees.gradients(1), state, params)
    before = state.inner_state[0].mu
    assert all(np.all(np.asarray(x) != 0) for x in jax.tree.leaves(before))
    first, second = random_masks(params, seed=1), random_masks(params, seed=2)
    for masks in (first, second):
        state = granet_jax.set_masks(state, masks)
        _, state = update(trees.gradients(2), state, params)
        for name in ("conv", "dense"):
            mask = np.asarray(masks[name]["kernel"])
            for moment in (state.inner_state[0].mu, state.inner_state[0].nu):
                assert np.array_equal(np.asarray(moment[name]["kernel"]) != 0, mask)
    # What left with the first masks came back without its past.
    back = np.asarray(second["dense"]["kernel"]) & ~np.asarray(first["dense"]["kernel"])
    assert back.any()
    gradient = np.asarray(trees.gradients(2)["dense"]["kernel"])
    mu = np.asarray(state.inner_state[0].mu["dense"]["kernel"])
    assert np.array_equal(mu[back], gradient[back] / 2)
    assert math.prod(mu.shape) == 48
