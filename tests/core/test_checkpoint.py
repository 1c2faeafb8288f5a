"""Saving a run and taking it up again; masks at one bit a weight."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

import granet_jax
from tests.helpers import trees

PyTree = Any
# Updates at 2, 4, 6 and 8. What is saved lies between two of them (5, while GraNet
# still prunes), right after one (4), and before the first step.
METHODS = {
    "granet": granet_jax.granet(0.75, 10, interval=2, end_step=8),
    "snfs": granet_jax.snfs(0.5, 10, interval=2),
}
SAVED = (0, 4, 5)
STEPS = 9
DTYPE = jnp.bfloat16


class Point(NamedTuple):
    """A run after some steps."""

    params: PyTree
    state: optax.OptState


def make_tx(name: str) -> optax.GradientTransformationExtraArgs:
    # Counters, two moments, a schedule, and dense leaves.
    inner = optax.adamw(optax.cosine_decay_schedule(0.1, 10), weight_decay=0.1)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        granet_jax.transform(METHODS[name], inner, seed=3),
    )


@functools.cache
def make_step(name: str) -> Callable[..., Any]:
    tx = make_tx(name)

    @jax.jit
    def step(params: PyTree, state: Any, grads: PyTree) -> tuple[PyTree, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def start(name: str) -> Point:
    params = trees.parameters(DTYPE)
    state = make_tx(name).init(params)
    return Point(granet_jax.apply_masks(params, granet_jax.get_masks(state)), state)


@functools.cache
def uninterrupted(name: str) -> list[Point]:
    points = [start(name)]
    for count in range(1, STEPS + 1):
        grads = trees.gradients(count, DTYPE)
        points.append(Point(*make_step(name)(*points[-1], grads)))
    masks = [granet_jax.get_masks(p.state) for p in points]
    # Masks change before, between and after the points that are saved.
    for a, b in [(0, 2), (2, 4), (5, 6), (6, 8)]:
        pairs = zip(jax.tree.leaves(masks[a]), jax.tree.leaves(masks[b]), strict=True)
        assert any(np.any(x != y) for x, y in pairs)
    return points


def target(name: str) -> Point:
    """What a new process restores onto: types alone, nothing of the run."""
    params = trees.shape_tree(DTYPE)
    return Point(params, jax.eval_shape(make_tx(name).init, params))


def check_continuation(name: str, saved: int, restored: Point) -> None:
    expected = uninterrupted(name)
    trees.assert_same(restored, expected[saved])
    assert trees.types(jax.tree.map(jnp.asarray, restored)) == trees.types(
        expected[saved]
    )
    point = restored
    for count in range(saved + 1, STEPS + 1):
        grads = trees.gradients(count, DTYPE)
        point = Point(*make_step(name)(*point, grads))
        trees.assert_same(point, expected[count])


@pytest.mark.parametrize("name", METHODS)
def test_orbax_checkpointer(name: str, tmp_path: Path) -> None:
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        for saved in SAVED:
            path = tmp_path / str(saved)
            checkpointer.save(path, uninterrupted(name)[saved])
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(path, target(name))
            check_continuation(name, saved, restored)


@pytest.mark.parametrize("name", METHODS)
def test_orbax_manager(name: str, tmp_path: Path) -> None:
    save, restore = (
        orbax.checkpoint.args.StandardSave,
        orbax.checkpoint.args.StandardRestore,
    )
    with orbax.checkpoint.CheckpointManager(tmp_path) as manager:
        for saved in SAVED:
            manager.save(saved, args=save(uninterrupted(name)[saved]))
        manager.wait_until_finished()
    # As a new process would, which takes the latest.
    with orbax.checkpoint.CheckpointManager(tmp_path) as manager:
        latest = manager.latest_step()
        assert latest == max(SAVED)
        restored = manager.restore(latest, args=restore(target(name)))
    check_continuation(name, latest, restored)


@pytest.mark.parametrize("name", METHODS)
def test_flax_msgpack(name: str) -> None:
    for saved in SAVED:
        content = flax.serialization.to_bytes(uninterrupted(name)[saved])
        assert isinstance(content, bytes)
        # Flax restores onto arrays.
        like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), target(name))
        check_continuation(name, saved, flax.serialization.from_bytes(like, content))


def test_packed_masks_in_a_checkpoint(tmp_path: Path) -> None:
    # The masks alone, at one bit a weight, in another run: as a ticket.
    masks = granet_jax.get_masks(uninterrupted("granet")[8].state)
    packed = granet_jax.pack_masks(masks)
    like = jax.eval_shape(granet_jax.pack_masks, masks)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "masks", packed)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "masks", like)
    ticket = granet_jax.unpack_masks(restored)
    trees.assert_same(ticket, masks)
    tx = granet_jax.transform(granet_jax.static(0.0), optax.sgd(0.1), masks=ticket)
    trees.assert_same(tx.init(trees.parameters()).masks, masks)


# --- Packing ----------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple)
MASK = SHAPES.flatmap(lambda shape: hypothesis.extra.numpy.arrays(bool, shape))


def packed_by_hand(mask: np.ndarray, axis: int) -> np.ndarray:
    """Eight weights a byte, the first in the highest bit, zeros at an axis' end."""
    mask = np.moveaxis(np.atleast_1d(mask), axis, -1)
    *rows, last = mask.shape
    found = []
    for row in mask.reshape(math.prod(rows), last):
        digits = "".join("01"[int(x)] for x in row)
        digits += "0" * (-len(digits) % 8)
        found += [int(digits[i : i + 8], 2) for i in range(0, len(digits), 8)]
    bits = np.array(found, np.uint8).reshape(*rows, math.ceil(last / 8))
    return np.moveaxis(bits, -1, axis)


@hypothesis.given(mask=MASK)
@hypothesis.example(mask=np.array(True))
@hypothesis.example(mask=np.array(False))
@hypothesis.example(mask=np.ones((0,), bool))
@hypothesis.example(mask=np.ones((3, 0, 5), bool))
@hypothesis.example(mask=np.ones((8,), bool))
@hypothesis.example(mask=np.ones((3, 3), bool))
@hypothesis.example(mask=np.eye(9, 7, dtype=bool))
@hypothesis.example(mask=np.eye(7, 9, dtype=bool))
def test_pack_round_trip(mask: np.ndarray) -> None:
    tree = {"a": [jnp.asarray(mask), optax.MaskedNode()], "b": optax.MaskedNode()}
    packed = granet_jax.pack_masks(tree)
    found = packed["a"][0]
    assert isinstance(found, granet_jax.PackedMask)
    assert found.shape == mask.shape
    trees.assert_same(np.asarray(found.bits), packed_by_hand(mask, found.axis))
    trees.assert_same(granet_jax.unpack_masks(packed), tree)


def test_pack_under_jit() -> None:
    # The shape is static: a packed mask can go in and out of compiled functions.
    masks = granet_jax.init_masks(granet_jax.static(0.7), trees.parameters(), seed=1)
    packed = jax.jit(granet_jax.pack_masks)(masks)
    trees.assert_same(packed, granet_jax.pack_masks(masks))
    trees.assert_same(jax.jit(granet_jax.unpack_masks)(packed), masks)
    bits = sum(x.nbytes for x in jax.tree.leaves(packed))
    # The rows of 8 of the dense kernel, and those of 4 of the convolution, half empty.
    assert bits == 48 // 8 + 72 // 4
