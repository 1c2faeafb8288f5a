"""Which leaves of an optimizer's state are moments, and where these are zero."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax.moments import matching_masks, renew_moments
from tests.core.test_contract import DTYPES, INNERS
from tests.helpers import trees

PyTree = Any

# How many leaves of the state have the shape of dense/kernel, and how many that of
# conv/kernel, by the optimizers' definitions. (Factors have other shapes.)
MOMENTS: dict[tuple[int, int], str] = {
    (0, 0): "sgd",
    (0, 2): "masked",
    (1, 1): "momentum nesterov lion adagrad adafactor adafactor_dense lars sm3 "
    "apply_if_finite",
    (1, 2): "muon",  # Matrices use muon, all else adam.
    (2, 2): "adam adamw nadamw rprop lamb radam inject_hyperparams "
    "multi_transform_tree multi_transform_function",
    # Three means; adam's two and another iterate; adam's two and a sum of gradients.
    (3, 3): "rmsprop schedule_free multi_steps",
    # Three moments and the last gradient; adam's two, first parameters and a sum.
    (4, 4): "adan prodigy",
}


def random_masks(params: PyTree, seed: int = 0, where: Any = None) -> PyTree:
    return granet_jax.init_masks(granet_jax.static(0.5), params, where=where, seed=seed)


def filled(inner: optax.GradientTransformation, params: PyTree, value: float) -> PyTree:
    """The optimizer's state with one value in all inexact leaves, ones elsewhere."""
    return jax.tree.map(
        lambda x: np.full(x.shape, value if x.dtype.kind in "fV" else 1, x.dtype),
        jax.eval_shape(inner.init, params),
    )


def zero_moments(state: PyTree, keep: PyTree) -> PyTree:
    """The state, with zeros in place of fresh moments."""
    return renew_moments(state, jax.tree.map(np.zeros_like, state), keep)


@pytest.mark.parametrize(
    ("inner", "dtype"), list(zip(INNERS, itertools.cycle(DTYPES), strict=False))
)
def test_moments_of_every_inner_optimizer(inner: str, dtype: str) -> None:
    params = trees.parameters(dtype)
    keep = random_masks(params)
    # NaN times zero would stay NaN.
    state = filled(INNERS[inner](), params, np.nan)
    zeroed = zero_moments(state, keep)
    assert jax.tree.structure(zeroed) == jax.tree.structure(state)
    # No shape occurs twice in this tree, so the shape says whose moment it is.
    masks = {m.shape: np.asarray(m) for m in jax.tree.leaves(keep)}
    found = dict.fromkeys(masks, 0)
    matched = jax.tree.map(
        lambda _, mask: not isinstance(mask, optax.MaskedNode),
        state,
        matching_masks(state, keep),
    )
    pairs = zip(
        jax.tree.leaves(state),
        jax.tree.leaves(zeroed),
        jax.tree.leaves(matched),
        strict=True,
    )
    for before, after, has_mask in pairs:
        mask = masks.get(before.shape)
        assert has_mask == (mask is not None)
        if mask is not None:
            found[before.shape] += 1
            before = np.where(mask, before, np.zeros_like(before))
        trees.assert_same(after, before)
    assert inner in MOMENTS[found[6, 8], found[3, 3, 2, 4]].split()


def test_moments_of_pruned_weights_where_an_epsilon_rounds_to_zero() -> None:
    # In float16 the epsilon of rmsprop does, and 0 / 0 is NaN.
    params = trees.parameters("float16")
    tx = granet_jax.transform(granet_jax.static(0.5), optax.rmsprop(0.1, momentum=0.5))
    state = tx.init(params)
    _, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
    found = granet_jax.get_state(state).inner_state
    trees.assert_same(found, zero_moments(found, granet_jax.get_masks(state)))


# --- Names and shapes that are easy to confuse ------------------------------------


class Names(NamedTuple):
    """Parameters in fields with the names of Adam's state."""

    mu: Any
    count: Any


A, B, C = (jnp.full((4, 4), x, jnp.float32) for x in (1, 2, 3))
WIDE, TALL = jnp.ones((4, 6)), jnp.ones((6, 4))

# Parameters whose names or shapes are easy to confuse.
TRAPS: dict[str, PyTree] = {
    "equal_shapes": {"a": A, "b": B},
    "transposed_shapes": {"a": WIDE, "b": TALL},
    "transposed_names": {"x": {"y": A}, "y": {"x": B}},
    "one_name_ends_the_other": {"kernel": A, "dense": {"kernel": B}},
    "three_deep": {"k": A, "d": {"k": B, "d": {"k": C}}},
    "names_of_fields": {"mu": A, "nu": B, "0": C},
    "ends_like_a_moment": {"w": A, "mu": {"w": B}, "trace": {"w": C}},
    "ends_like_a_branch": {"w": A, "inner_state": [{"w": B}], "0": {"nu": {"w": C}}},
    "ends_like_a_moment_of_another_shape": {"w": WIDE, "mu": {"w": TALL}, "x": A},
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


def all_leaves(label: Any) -> Any:
    return lambda tree: jax.tree.map(lambda _: label, tree)


# With the number of moments that each keeps.
TRAP_INNERS: list[tuple[optax.GradientTransformation, int]] = [
    (optax.adam(0.1), 2),
    (optax.chain(optax.trace(0.5), optax.chain(optax.scale_by_adam())), 3),
    (optax.masked(optax.adam(0.1), all_leaves(True)), 2),
    (optax.multi_transform({"kernel": optax.adam(0.1)}, all_leaves("kernel")), 2),
]


def subtrees_like(params: PyTree, state: PyTree) -> list[PyTree]:
    """The subtrees of a state with the structure of the parameters."""
    structure, found = jax.tree.structure(params), []

    def is_moment(x: Any) -> bool:
        return jax.tree.structure(x) == structure and all(
            y.ndim > 0 for y in jax.tree.leaves(x)
        )

    jax.tree.map(
        lambda x: found.append(x) if is_moment(x) else None, state, is_leaf=is_moment
    )
    return found


@pytest.mark.parametrize("trap", TRAPS)
def test_traps(trap: str) -> None:
    params = TRAPS[trap]
    keep = random_masks(params)
    # If two masks were equal, confusing them would not show.
    masks = [np.asarray(m).tobytes() for m in jax.tree.leaves(keep)]
    assert len(set(masks)) == len(masks)
    expected = jax.tree.map(
        lambda m, p: (
            jnp.ones_like(p) if isinstance(m, optax.MaskedNode) else m.astype(p.dtype)
        ),
        keep,
        params,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    for inner, number in TRAP_INNERS:
        zeroed = zero_moments(filled(inner, params, 1.0), keep)
        moments = subtrees_like(params, zeroed)
        assert len(moments) == number
        for moment in moments:
            trees.assert_same(moment, expected)
        counters = [x for x in jax.tree.leaves(zeroed) if x.ndim == 0]
        assert counters
        assert all(x == 1 for x in counters)


def test_branches_with_the_names_of_parameters() -> None:
    params = {"w": A, "mu": {"w": B}, "nu": {"w": C}}
    labels = {"w": "nu", "mu": "w", "nu": "w"}
    inner = optax.multi_transform({x: optax.adam(0.1) for x in ("w", "nu")}, labels)
    keep = random_masks(params)
    branches = zero_moments(filled(inner, params, 1.0), keep).inner_states
    for label, branch in branches.items():
        for moment in (branch.inner_state[0].mu, branch.inner_state[0].nu):
            for name, x in moment.items():
                if labels[name] == label:
                    trees.assert_same(x, jax.tree.map(jnp.float32, keep[name]))
                else:
                    assert x == optax.MaskedNode()


@pytest.mark.parametrize("masked", ["kernel", "dense/kernel"])
def test_a_dense_leaf_whose_name_ends_like_a_masked_one(masked: str) -> None:
    params = {"kernel": A, "dense": {"kernel": B}}
    keep = random_masks(params, where=lambda name, _: name == masked)
    zeroed = zero_moments(filled(optax.trace(0.5), params, 1.0), keep).trace
    sums = {
        "kernel": zeroed["kernel"].sum(),
        "dense/kernel": zeroed["dense"]["kernel"].sum(),
    }
    assert sums == {"kernel": 16, "dense/kernel": 16, masked: 8}


def test_a_factored_moment_with_the_shape_of_another_parameter() -> None:
    # The factors of dense/kernel over its rows have the shape of the parameter
    # "kernel", and their name ends like its name. They belong to many weights.
    params = {"kernel": jnp.ones((8,)), "dense": {"kernel": jnp.ones((6, 8))}}
    state = filled(optax.adafactor(0.1, min_dim_size_to_factor=2), params, 1.0)
    keep = granet_jax.init_masks(
        granet_jax.static(0.5, distribution="uniform"), params, where=lambda *_: True
    )
    zeros = {
        jax.tree_util.keystr(path): int((x == 0).sum())
        for path, x in jax.tree_util.tree_leaves_with_path(zero_moments(state, keep))
        if x.shape == (8,)
    }
    assert [n for path, n in zeros.items() if "dense" in path] == [0]
    (own,) = (n for path, n in zeros.items() if "dense" not in path)
    assert own == 8 - int(keep["kernel"].sum()) > 0


def test_a_state_restored_as_dicts() -> None:
    # A checkpoint read without a target has dicts in place of NamedTuples.
    params = trees.parameters()
    keep = random_masks(params)
    state = filled(optax.scale_by_adam(), params, 1.0)
    zeroed = zero_moments(state, keep)
    as_dict = zero_moments({"inner": [state._asdict()]}, keep)
    trees.assert_same(as_dict, {"inner": [zeroed._asdict()]})


def test_a_statistic_of_each_layer_is_no_moment() -> None:
    # The state has one array where the parameters have two, so it is not their copy.
    keep = random_masks({"a": A, "b": {"c": B, "d": C}})
    state = {"a": A, "b": B}
    trees.assert_same(zero_moments(state, keep), state)


# --- optax.flatten ----------------------------------------------------------------


def with_array_as_state() -> optax.GradientTransformation:
    return optax.GradientTransformation(
        lambda params: jnp.zeros(()), lambda grads, state, params=None: (grads, state)
    )


@pytest.mark.parametrize(
    "inner",
    [
        optax.flatten(optax.adam(0.1)),
        optax.chain(
            optax.clip(1.0), optax.flatten(optax.trace(0.9)), optax.scale(-0.1)
        ),
        # Its state looks like a pair of parameters, of which one has moments.
        optax.chain(optax.flatten(optax.trace(0.9)), with_array_as_state()),
        optax.apply_if_finite(optax.flatten(optax.adam(0.1)), 3),
        optax.inject_hyperparams(lambda rate: optax.flatten(optax.adam(rate)))(0.1),
    ],
)
def test_a_flattened_optimizer_is_refused(inner: Any) -> None:
    method = granet_jax.static(0.5)
    with pytest.raises(ValueError, match=r"one flat vector.*\(128,\).*optax\.flatten"):
        jax.eval_shape(granet_jax.transform(method, inner).init, trees.shape_tree())
    # Also where the flat vector has the shape of the only parameter, and where
    # parameters are named like the optimizer's state or have its structure.
    for params in ({"w": jnp.ones((6,))}, {"mu": A, "trace": B, "0": C}, (A, B), A):
        tx = granet_jax.transform(method, inner, where=lambda *_: True)
        with pytest.raises(ValueError, match=r"without optax\.flatten"):
            tx.init(params)


@pytest.mark.parametrize(
    ("inner", "params"),
    [
        # It has no moments.
        (optax.flatten(optax.sgd(0.1)), {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}),
        # The vector is a parameter's own moment.
        (optax.adam(0.1), {"w": jnp.ones((6,))}),
        (optax.adam(0.1), jnp.ones((6,))),
        (
            optax.masked(optax.adam(0.1), {"w": True, "empty": False}),
            {"w": jnp.ones(6), "empty": jnp.ones((0, 2))},
        ),
        # The vector has one number for each row of the only parameter.
        (optax.sm3(0.1), {"w": jnp.ones((6, 1))}),
        (optax.adafactor(0.1, min_dim_size_to_factor=1), {"w": jnp.ones((6, 1))}),
    ],
)
def test_other_vectors_are_accepted(inner: Any, params: PyTree) -> None:
    where = jax.tree.map(lambda p: p.size == 6, params)
    tx = granet_jax.transform(granet_jax.static(0.5), inner, where=where)
    assert granet_jax.sparsity(tx.init(params).masks).active == 3
