"""Masks from the user: methods end at exactly the sparsity asked for, or refuse."""

from typing import Any

import jax
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax import structures
from tests.helpers import numpy_reference

SIZES = {"a": (16, 16), "b": (8, 16), "c": (4, 4)}
STEPS = 12
LAYER: dict[str, Any] = {"scope": "layer", "interval": 2}
PRUNING = {
    "gmp": granet_jax.gmp(0.875, 8, interval=2),
    "gmp layer": granet_jax.gmp(0.875, 8, **LAYER),
    "gmp erk": granet_jax.gmp(0.875, 8, distribution="erk", **LAYER),
    "gmp blocks": granet_jax.gmp(0.875, 8, structure=structures.block(2, 2), **LAYER),
    "granet": granet_jax.granet(0.875, STEPS, interval=2),
    "granet layer": granet_jax.granet(0.875, STEPS, **LAYER),
    "granet-st": granet_jax.granet(0.875, STEPS, initial_sparsity=0.5, **LAYER),
    "sculpt": granet_jax.sculpt(0.875, STEPS, cycles=2, scope="layer"),
    "greg1": granet_jax.greg1(0.875, interval=1, growth=0.5, settle_steps=2),
    "greg2": granet_jax.greg2(
        0.875, interval=1, growth=0.5, settle_steps=2, pick_growth=0.5, pick_ceiling=0.5
    ),
}
REVIVING = {
    "cyclical": granet_jax.cyclical(0.875, STEPS, cycles=2, **LAYER),
    "acdc": granet_jax.acdc(0.875, (2, 4, 6), scope="layer"),
}
CHOOSING = {
    "projected": granet_jax.cyclical(
        0.875, STEPS, cycles=2, recovery="projected", **LAYER
    ),
    "straight_through": granet_jax.straight_through(0.875, 8, interval=2),
    "straight_through constant": granet_jax.straight_through(
        0.875, 8, interval=2, initial_sparsity=0.875
    ),
    "top_kast": granet_jax.top_kast(0.875, backward_sparsity=0.5, interval=2),
}
CONSTANT = {
    "rigl": granet_jax.rigl(0.875, STEPS, interval=2),
    "set": granet_jax.set_(0.875, STEPS, interval=2),
    "snfs": granet_jax.snfs(0.875, STEPS, interval=2),
    "mest": granet_jax.mest(0.875, STEPS, interval=2),
    "dsr": granet_jax.dsr(0.875, STEPS, interval=2),
}


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


def counts_after_training(method: granet_jax.Method, masks: Any) -> list[int]:
    tx = granet_jax.transform(method, optax.sgd(0.25), masks=masks)
    params, step = draw(0), jax.jit(tx.update)
    state = tx.init(params)
    for t in range(STEPS):
        updates, state = step(draw(t), state, params)
        params = optax.apply_updates(params, updates)
    return [int(m.sum()) for m in granet_jax.get_masks(state).values()]


@pytest.mark.parametrize("name", [*REVIVING, *CHOOSING])
def test_methods_that_add_weights_end_at_their_sparsity_from_any_masks(
    name: str,
) -> None:
    method = {**REVIVING, **CHOOSING}[name]
    assert sum(counts_after_training(method, masks_of(10, 2, 0))) == 50


@pytest.mark.parametrize("name", [*PRUNING, *REVIVING, *CHOOSING])
def test_pruning_ends_at_its_sparsity_from_masks_denser_in_all(name: str) -> None:
    method = {**PRUNING, **REVIVING, **CHOOSING}[name]
    # Of 400 weights an eighth will be active. Layer b, or c, has no active weight.
    for masks in (masks_of(64, 0, 1), masks_of(20, 20, 0)):
        # Blocks are rounded in every layer: to 8, 4 and 1.
        expected = 52 if name == "gmp blocks" else 50
        assert sum(counts_after_training(method, masks)) == expected


def test_denser_leaves_make_up_for_sparser_ones_by_hand() -> None:
    # A density of an eighth is 32, 16 and 2 weights. The last leaf has none. Of the two
    # that are missing, the first two get a share each in proportion to 96 and 32 more
    # active weights, rounded down, and what is left goes to the first.
    gmp = PRUNING["gmp layer"]
    assert counts_after_training(gmp, masks_of(32, 12, 0)) == [34, 16, 0]
    assert counts_after_training(gmp, masks_of(32, 2, 0)) == [42, 8, 0]
    assert numpy_reference.within_reach([32, 16, 2], [128, 8, 0]) == [42, 8, 0]


SPARSER = {**PRUNING, **CONSTANT}
DENSER = {**CONSTANT}
REFUSED = [
    *((name, method, (10, 2, 0), 48) for name, method in SPARSER.items()),
    *((name, method, (10, 2, 1), 52) for name, method in DENSER.items()),
]


@pytest.mark.parametrize(
    ("method", "blocks", "active"),
    [pytest.param(*rest, id=f"{name}-{rest[2]}") for name, *rest in REFUSED],
)
def test_masks_from_which_the_sparsity_is_out_of_reach_are_refused(
    method: granet_jax.Method, blocks: tuple[int, int, int], active: int
) -> None:
    tx = granet_jax.transform(method, optax.sgd(0.25), masks=masks_of(*blocks))
    wrong = f"masks have {active} of 400 weights active, .* at sparsity 0.875"
    for init in (tx.init, jax.jit(tx.init), lambda p: jax.eval_shape(tx.init, p)):
        with pytest.raises(ValueError, match=wrong):
            init(draw(0))


@pytest.mark.parametrize("name", CONSTANT)
def test_methods_of_constant_sparsity_take_masks_of_that_sparsity(name: str) -> None:
    masks = masks_of(13, 0, 0)
    masks["a"][0, :2] = False
    assert sum(counts_after_training(CONSTANT[name], masks)) == 50
    # The sparsity of any masks is one to ask for.
    masks["b"][0, :3] = True
    sparsity = granet_jax.sparsity(masks).overall
    rigl = granet_jax.rigl(sparsity, STEPS, interval=2)
    assert sum(counts_after_training(rigl, masks)) == 53


def test_a_structure_rounds_in_every_leaf() -> None:
    def method(sparsity: float) -> granet_jax.Method:
        return granet_jax.rigl(
            sparsity, STEPS, interval=2, structure=structures.constant_fan_in()
        )

    masks = {name: np.arange(s[0])[:, None] < s[0] // 4 for name, s in SIZES.items()}
    masks = {name: np.broadcast_to(m, SIZES[name]) for name, m in masks.items()}
    assert counts_after_training(method(0.75), masks) == [64, 32, 4]
    assert counts_after_training(method(0.74), masks) == [64, 32, 4]
    with pytest.raises(ValueError, match="masks have 100 of 400 weights active"):
        counts_after_training(method(0.875), masks)
    gmp = granet_jax.gmp(0.5, 8, structure=structures.constant_fan_in(), **LAYER)
    # A denser leaf does not make up for the others.
    for a in (masks["a"], np.ones(SIZES["a"], bool)):
        with pytest.raises(ValueError, match="fewer than gmp ends with"):
            counts_after_training(gmp, {**masks, "a": a})


def test_a_leaf_without_weights_may_have_a_mask() -> None:
    masks = {"w": np.eye(2, dtype=bool), "empty": np.ones((0, 2), bool)}
    tx = granet_jax.transform(granet_jax.rigl(0.5, STEPS, interval=2), masks=masks)
    state = tx.init({name: np.ones(m.shape, np.float32) for name, m in masks.items()})
    assert granet_jax.sparsity(granet_jax.get_masks(state)).active == 2


def test_traced_masks_are_not_counted() -> None:
    def init(masks: Any) -> Any:
        return granet_jax.transform(CONSTANT["rigl"], masks=masks).init(draw(0)).masks

    masks = masks_of(1, 1, 1)
    np.testing.assert_array_equal(jax.jit(init)(masks)["a"], masks["a"])
