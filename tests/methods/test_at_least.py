"""The structure `at_least`: selection against NumPy, and whole trainings."""

import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax import mask_sources, structured_selection, structures

SHAPES = [(6, 5), (2, 3, 4)]


def expected(
    scores: list[np.ndarray], among: list[np.ndarray], numbers: list[int], least: int
) -> list[np.ndarray]:
    """The best `least` of every column first, then the best of the group's others.

    There is one number for each leaf, or a single one for all leaves together.
    """
    first = []
    for score, candidates in zip(scores, among, strict=True):
        columns = np.where(candidates, score, -np.inf).reshape(-1, score.shape[-1])
        order = np.argsort(-columns, axis=0, kind="stable")[:least]
        best = np.zeros(columns.shape, bool)
        np.put_along_axis(best, order, True, axis=0)
        first.append(best.reshape(score.shape) & candidates)
    groups = (
        [[i] for i in range(len(scores))]
        if len(numbers) > 1
        else [[*range(len(scores))]]
    )
    for group, number in zip(groups, numbers, strict=True):
        flat = np.concatenate(
            [np.where(among[i] & ~first[i], scores[i], -np.inf).ravel() for i in group]
        )
        free = max(0, number - sum(int(first[i].sum()) for i in group))
        order = np.argsort(-flat, kind="stable")[:free]
        chosen = np.zeros(flat.size, bool)
        chosen[order[np.isfinite(flat[order])]] = True
        parts = np.split(chosen, np.cumsum([scores[i].size for i in group])[:-1])
        for i, part in zip(group, parts, strict=True):
            first[i] = first[i] | part.reshape(scores[i].shape)
    return first


@hypothesis.given(
    st.sampled_from([[10, 9], [17]]), st.integers(1, 3), st.integers(0, 10**6)
)
def test_select_as_numpy_does(numbers: list[int], least: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = [rng.integers(-4, 5, s).astype(np.float32) for s in SHAPES]
    among = [rng.random(s) < 0.8 for s in SHAPES]
    scope = "layer" if len(numbers) > 1 else "global"
    actual = structured_selection.select(
        structures.at_least(least),
        [jnp.asarray(s) for s in scores],
        np.asarray(numbers if scope == "layer" else numbers[0], np.uint32),
        among=[jnp.asarray(m) for m in among],
        scope=scope,
    )
    for a, b in zip(actual, expected(scores, among, numbers, least), strict=True):
        np.testing.assert_array_equal(a, b)


METHODS: dict[str, Any] = {
    "granet": lambda s: granet_jax.granet(0.8, 12, interval=2, structure=s),
    "gmp": lambda s: granet_jax.gmp(0.8, 12, interval=2, structure=s),
    "cyclical": lambda s: granet_jax.cyclical(
        0.8, 12, cycles=2, interval=1, structure=s
    ),
    "rigl": lambda s: granet_jax.rigl(0.8, 12, interval=2, structure=s),
    "set": lambda s: granet_jax.set_(0.8, 12, interval=2, structure=s),
    "snfs": lambda s: granet_jax.snfs(0.8, 12, interval=2, structure=s),
    "straight_through": lambda s: granet_jax.straight_through(
        0.8, 12, interval=2, structure=s
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_unit_keeps_inputs_and_the_total_is_exact(name: str) -> None:
    """Half of the units have no gradient, and small weights."""
    method = METHODS[name](structures.at_least(2))
    rng = np.random.default_rng(0)
    live = np.arange(8) < 4
    params = {
        "first": jnp.asarray(rng.normal(size=(20, 8)) * np.where(live, 1, 0.01)),
        "second": jnp.asarray(rng.normal(size=(3, 3, 8, 8)) * np.where(live, 1, 0.01)),
    }
    tx = granet_jax.transform(method, optax.sgd(0.01))
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(13):
        grads = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape) * live, x.dtype), params
        )
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        masks = granet_jax.get_masks(state)
        for mask in jax.tree.leaves(masks):
            assert np.min(np.sum(mask, axis=tuple(range(mask.ndim - 1)))) >= 2
    total = 20 * 8 + 9 * 8 * 8
    assert granet_jax.sparsity(masks).active == math.floor(0.2 * total + 0.5)


def test_units_without_inputs_get_their_best_ones_back() -> None:
    mask = np.ones((6, 4), bool)
    mask[:, 1] = False
    mask[:3, 2] = False
    masks = {"w": jnp.asarray(mask)}
    params = granet_jax.apply_masks({"w": jnp.ones((6, 4))}, masks)
    grads = {"w": jnp.asarray(np.arange(24.0).reshape(6, 4) * [1, 0.001, 1, 1])}
    method = granet_jax.rigl(
        granet_jax.sparsity(masks).overall,
        *(10,),
        interval=1,
        fraction=0.3,
        structure=structures.at_least(2),
    )
    tx = granet_jax.transform(method, optax.sgd(0.0), masks=masks)
    state = tx.init(params)
    for _ in range(2):  # Updates begin after the first step.
        _, state = tx.update(grads, state, params)
    after = np.asarray(granet_jax.get_masks(state)["w"])
    np.testing.assert_array_equal(np.flatnonzero(after[:, 1]), [4, 5])
    assert after.sum() == mask.sum()


def test_stacked_layers_have_units_of_their_own() -> None:
    rng = np.random.default_rng(1)
    w = jnp.asarray(rng.normal(size=(3, 6, 5)), jnp.float32)
    structure = structures.at_least(1)
    stack = mask_sources.magnitude(
        {"w": w}, 0.7, scope="layer", structure=structure, stacked={"w": 0}
    )["w"]
    for i in range(3):
        one = mask_sources.magnitude(
            {"w": w[i]}, 0.7, scope="layer", structure=structure
        )["w"]
        np.testing.assert_array_equal(stack[i], one)


def test_what_does_not_fit_is_an_error() -> None:
    params = {"w": jnp.ones((6, 4))}
    few = structures.at_least(3)
    for method, message in (
        (granet_jax.gmp(0.9, 10, interval=1, structure=few), "keeps 12 weights"),
        (granet_jax.rigl(0.9, 10, interval=1, structure=few), "keeps 12 weights"),
        (
            granet_jax.static(0.1, structure=structures.at_least(7)),
            "units of as many inputs, and 'w'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            granet_jax.transform(method, optax.sgd(0.1)).init(params)
    with pytest.raises(ValueError, match="floor must be 0 with the structure"):
        granet_jax.gmp(0.5, 10, interval=1, floor=0.1, structure=few)
    with pytest.raises(ValueError, match="number must be at least 1"):
        structures.at_least(0)
