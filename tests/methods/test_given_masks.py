"""Masks from the user: methods end at exactly the sparsity asked for, or refuse."""

import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax import structures
from tests.helpers import numpy_reference
from tests.helpers.compiler_options import QUICK
from tests.helpers.training import make_step

SIZES = {"a": (16, 16), "b": (8, 16), "c": (4, 4)}
STEPS = 12
EVERY: dict[str, Any] = {"interval": 2}
LAYER: dict[str, Any] = {"scope": "layer", **EVERY}
CYCLES: dict[str, Any] = {"cycles": 2, **LAYER}
GREG: dict[str, Any] = {"interval": 1, "growth": 0.5, "settle_steps": 2}
PRUNING = {
    "gmp": granet_jax.gmp(0.875, 8, **EVERY),
    "gmp layer": granet_jax.gmp(0.875, 8, **LAYER),
    "gmp erk": granet_jax.gmp(0.875, 8, distribution="erk", **LAYER),
    "gmp blocks": granet_jax.gmp(0.875, 8, structure=structures.block(2, 2), **LAYER),
    "granet": granet_jax.granet(0.875, STEPS, **EVERY),
    "granet-st": granet_jax.granet(0.875, STEPS, initial_sparsity=0.5, **LAYER),
    "sculpt": granet_jax.sculpt(0.875, STEPS, cycles=2, scope="layer"),
    "greg1": granet_jax.greg1(0.875, **GREG),
    "greg2": granet_jax.greg2(0.875, pick_growth=0.5, pick_ceiling=0.5, **GREG),
}
# These revive weights, or choose among all of them.
ADDING = {
    "cyclical": granet_jax.cyclical(0.875, STEPS, **CYCLES),
    "acdc": granet_jax.acdc(0.875, (2, 4, 6), scope="layer"),
    "projected": granet_jax.cyclical(0.875, STEPS, recovery="projected", **CYCLES),
    "straight_through": granet_jax.straight_through(
        0.875, 8, initial_sparsity=0.875, **EVERY
    ),
    "top_kast": granet_jax.top_kast(0.875, backward_sparsity=0.5, **EVERY),
}
CONSTANT = {
    name: getattr(granet_jax, name)(0.875, STEPS, **EVERY)
    for name in ("rigl", "set_", "snfs", "mest", "dsr")
}
METHODS = PRUNING | ADDING | CONSTANT


def draw(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {k: np.float32(rng.normal(size=shape)) for k, shape in SIZES.items()}


def masks_of(a: int, b: int, c: int) -> dict[str, np.ndarray]:
    """Masks with so many active blocks of 2 x 2 weights."""
    masks = {}
    for (name, shape), number in zip(SIZES.items(), (a, b, c), strict=True):
        rows, columns = shape[0] // 2, shape[1] // 2
        blocks = np.arange(rows * columns).reshape(rows, columns) < number
        masks[name] = blocks.repeat(2, 0).repeat(2, 1)
    return masks


@functools.cache
def step_of(name: str) -> Any:
    tx = granet_jax.transform(METHODS[name], optax.sgd(0.25))
    return jax.jit(make_step(tx), compiler_options=QUICK)


def counts(method: granet_jax.Method, masks: Any) -> list[int]:
    state = granet_jax.transform(method, optax.sgd(0.25), masks=masks).init(draw(0))
    return [int(m.sum()) for m in granet_jax.get_masks(state).values()]


def counts_after_training(name: str, masks: Any) -> list[int]:
    tx = granet_jax.transform(METHODS[name], optax.sgd(0.25), masks=masks)
    params, state = draw(0), tx.init(draw(0))
    for t in range(STEPS):
        params, state = step_of(name)(params, state, draw(t))
    return [int(m.sum()) for m in granet_jax.get_masks(state).values()]


@pytest.mark.parametrize("name", ["cyclical", "straight_through", "top_kast"])
def test_methods_that_add_weights_end_at_their_sparsity_from_any_masks(
    name: str,
) -> None:
    for masks in (masks_of(10, 2, 0), masks_of(64, 0, 1)):
        assert sum(counts_after_training(name, masks)) == 50


@pytest.mark.parametrize("name", ["gmp erk", "gmp blocks", "greg2"])
def test_pruning_ends_at_its_sparsity_from_masks_denser_in_all(name: str) -> None:
    # Of 400 weights an eighth will be active. Layer b, or c, has no active weight.
    for masks in (masks_of(64, 0, 1), masks_of(20, 20, 0)):
        # Blocks are rounded in every layer: to 8, 4 and 1.
        expected = 52 if name == "gmp blocks" else 50
        assert sum(counts_after_training(name, masks)) == expected


def test_denser_leaves_make_up_for_sparser_ones_by_hand() -> None:
    # A density of an eighth is 32, 16 and 2 weights. The last leaf has none. Of the two
    # that are missing, the first two get a share each in proportion to 96 and 32 more
    # active weights, rounded down, and what is left goes to the first.
    assert counts_after_training("gmp layer", masks_of(32, 12, 0)) == [34, 16, 0]
    assert counts_after_training("gmp layer", masks_of(32, 2, 0)) == [42, 8, 0]
    assert numpy_reference.within_reach([32, 16, 2], [128, 8, 0]) == [42, 8, 0]


@pytest.mark.parametrize("name", METHODS)
def test_masks_from_which_the_sparsity_is_out_of_reach_are_refused(name: str) -> None:
    method = METHODS[name]
    # 48 and 52 active weights. Methods of constant sparsity need 50.
    for blocks, refused in (
        ((10, 2, 0), name not in ADDING),
        ((10, 2, 1), name in CONSTANT),
    ):
        masks, number = masks_of(*blocks), 4 * sum(blocks)
        if not refused:
            assert sum(counts(method, masks)) == number
            continue
        tx = granet_jax.transform(method, optax.sgd(0.25), masks=masks)
        wrong = f"masks have {number} of 400 weights active, .* at sparsity 0.875"
        for init in (tx.init, lambda p, tx=tx: jax.eval_shape(tx.init, p)):
            with pytest.raises(ValueError, match=wrong):
                init(draw(0))


def test_methods_of_constant_sparsity_take_masks_of_that_sparsity() -> None:
    masks = masks_of(13, 0, 0)
    masks["a"][0, :2] = False
    for name in CONSTANT:
        assert sum(counts(METHODS[name], masks)) == 50
    # The sparsity of any masks is one to ask for.
    masks["b"][0, :3] = True
    sparsity = granet_jax.sparsity(masks).overall
    assert sum(counts(granet_jax.rigl(sparsity, STEPS, **EVERY), masks)) == 53


def test_a_structure_rounds_in_every_leaf() -> None:
    def method(sparsity: float) -> granet_jax.Method:
        fan_in = structures.constant_fan_in()
        return granet_jax.rigl(sparsity, STEPS, structure=fan_in, **EVERY)

    masks = {name: np.arange(s[0])[:, None] < s[0] // 4 for name, s in SIZES.items()}
    masks = {name: np.broadcast_to(m, SIZES[name]) for name, m in masks.items()}
    for sparsity in (0.75, 0.74):
        assert counts(method(sparsity), masks) == [64, 32, 4]
    with pytest.raises(ValueError, match="masks have 100 of 400 weights active"):
        counts(method(0.875), masks)
    gmp = granet_jax.gmp(0.5, 8, structure=structures.constant_fan_in(), **LAYER)
    # A denser leaf does not make up for the others.
    for a in (masks["a"], np.ones(SIZES["a"], bool)):
        with pytest.raises(ValueError, match="fewer than gmp ends with"):
            counts(gmp, {**masks, "a": a})


def test_a_leaf_without_weights_may_have_a_mask() -> None:
    masks = {"w": np.eye(2, dtype=bool), "empty": np.ones((0, 2), bool)}
    tx = granet_jax.transform(granet_jax.rigl(0.5, STEPS, **EVERY), masks=masks)
    state = tx.init({name: np.ones(m.shape, np.float32) for name, m in masks.items()})
    assert granet_jax.sparsity(granet_jax.get_masks(state)).active == 2


def test_traced_masks_are_not_counted() -> None:
    def init(masks: Any) -> Any:
        return granet_jax.transform(METHODS["rigl"], masks=masks).init(draw(0)).masks

    masks = masks_of(1, 1, 1)
    np.testing.assert_array_equal(jax.jit(init)(masks)["a"], masks["a"])
