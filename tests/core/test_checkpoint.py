"""A saved run, restored by any checkpoint library, continues to the bit."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

import granet_jax
from tests.helpers import trees
from tests.helpers.training import compiled_step, differ, start

PyTree = Any
# Updates at 2, 4, 6 and 8. Runs are saved before the first step, right after an update,
# and between two updates.
METHODS = {
    "granet": granet_jax.granet(0.75, 10, interval=2, end_step=8),
    "snfs": granet_jax.snfs(0.5, 10, interval=2),
    "snfs packed": granet_jax.snfs(0.5, 10, interval=2),
}
SAVED = (0, 4, 5)
STEPS = 9
DTYPE = jnp.bfloat16


class Point(NamedTuple):
    """A run after some steps."""

    params: PyTree
    state: optax.OptState


@functools.cache
def make_tx(name: str) -> optax.GradientTransformationExtraArgs:
    # The state has counters, two moments, a schedule, and dense leaves.
    inner = optax.adamw(optax.cosine_decay_schedule(0.1, 10), weight_decay=0.1)
    packed = "packed" in name
    sparse = granet_jax.transform(METHODS[name], inner, seed=3, packed=packed)
    return optax.chain(optax.clip_by_global_norm(1.0), sparse)


@functools.cache
def make_step(name: str) -> Any:
    return compiled_step(make_tx(name))


@functools.cache
def uninterrupted(name: str) -> list[Point]:
    points = [Point(*start(make_tx(name), trees.parameters(DTYPE)))]
    for count in range(1, STEPS + 1):
        grads = trees.gradients(count, DTYPE)
        points.append(Point(*make_step(name)(*points[-1], grads)))
    # Masks change before, between and after the points that are saved.
    masks = [granet_jax.get_masks(p.state) for p in points]
    assert all(differ(masks[a], masks[b]) for a, b in [(0, 2), (2, 4), (5, 6), (6, 8)])
    return points


def target(name: str) -> Point:
    """The types that a new process restores onto, without arrays."""
    params = trees.shape_tree(DTYPE)
    return Point(params, jax.eval_shape(make_tx(name).init, params))


def check_continuation(name: str, saved: int, restored: Point) -> None:
    expected = uninterrupted(name)
    trees.assert_same(restored, expected[saved])
    kinds = trees.types(jax.tree.map(jnp.asarray, restored))
    assert kinds == trees.types(expected[saved])
    point = restored
    for count in range(saved + 1, STEPS + 1):
        grads = trees.gradients(count, DTYPE)
        point = Point(*make_step(name)(*point, grads))
        trees.assert_same(point, expected[count])


@pytest.mark.parametrize("name", ["granet", "snfs packed"])
def test_orbax_checkpointer(name: str, tmp_path: Path) -> None:
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        for saved in SAVED:
            path = tmp_path / str(saved)
            checkpointer.save(path, uninterrupted(name)[saved])
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(path, target(name))
            check_continuation(name, saved, restored)


@pytest.mark.parametrize("name", ["granet", "snfs packed"])
def test_orbax_manager(name: str, tmp_path: Path) -> None:
    save, restore = (
        orbax.checkpoint.args.StandardSave,
        orbax.checkpoint.args.StandardRestore,
    )
    with orbax.checkpoint.CheckpointManager(tmp_path) as manager:
        for saved in SAVED:
            manager.save(saved, args=save(uninterrupted(name)[saved]))
        manager.wait_until_finished()
    # A new process restores the latest.
    with orbax.checkpoint.CheckpointManager(tmp_path) as manager:
        latest = manager.latest_step()
        assert latest == max(SAVED)
        restored = manager.restore(latest, args=restore(target(name)))
    check_continuation(name, latest, restored)


@pytest.mark.parametrize("name", ["granet", "snfs"])
def test_flax_msgpack(name: str) -> None:
    for saved in SAVED:
        content = flax.serialization.to_bytes(uninterrupted(name)[saved])
        assert isinstance(content, bytes)
        # Flax needs arrays to restore onto.
        like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), target(name))
        check_continuation(name, saved, flax.serialization.from_bytes(like, content))


def test_packed_masks_in_a_checkpoint(tmp_path: Path) -> None:
    # Masks are saved alone, at one bit a weight, to start another run from.
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
