"""A saved run, restored by any checkpoint library, continues to the bit.

`tests/helpers/fuzzing.py` saves random runs with Orbax's `StandardCheckpointer`.
"""

import functools
from pathlib import Path
from typing import Any

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
METHOD = granet_jax.snfs(0.5, 10, interval=2)
SAVED = (0, 4, 5)
STEPS = 9
DTYPE = jnp.bfloat16


@functools.cache
def make_tx(packed: bool) -> optax.GradientTransformationExtraArgs:
    # The state has counters, two moments, a schedule, an average, and dense leaves.
    inner = optax.adamw(optax.cosine_decay_schedule(0.1, 10), weight_decay=0.1)
    sparse = granet_jax.transform(METHOD, inner, seed=3, packed=packed)
    return optax.chain(optax.clip_by_global_norm(1.0), sparse)


@functools.cache
def make_step(packed: bool) -> Any:
    return compiled_step(make_tx(packed))


@functools.cache
def uninterrupted(packed: bool) -> list[PyTree]:
    """Parameters and state at first and after every step."""
    points = [start(make_tx(packed), trees.parameters(DTYPE))]
    for count in range(1, STEPS + 1):
        points.append(make_step(packed)(*points[-1], trees.gradients(count, DTYPE)))
    # Masks change before, between and after the points that are saved.
    masks = [granet_jax.get_masks(state) for _, state in points]
    assert all(differ(masks[a], masks[b]) for a, b in [(0, 2), (2, 4), (5, 6), (6, 8)])
    return points


def target(packed: bool) -> PyTree:
    """The types that a new process restores onto, without arrays."""
    params = trees.shape_tree(DTYPE)
    return params, jax.eval_shape(make_tx(packed).init, params)


def check_continuation(packed: bool, saved: int, point: PyTree) -> None:
    expected = uninterrupted(packed)
    kinds = trees.types(jax.tree.map(jnp.asarray, point))
    assert kinds == trees.types(expected[saved])
    trees.assert_same(point, expected[saved])
    for count in range(saved + 1, STEPS + 1):
        point = make_step(packed)(*point, trees.gradients(count, DTYPE))
        trees.assert_same(point, expected[count])


@pytest.mark.parametrize("packed", [False, True])
def test_orbax(packed: bool, tmp_path: Path) -> None:
    save, restore = (
        orbax.checkpoint.args.StandardSave,
        orbax.checkpoint.args.StandardRestore,
    )
    with orbax.checkpoint.CheckpointManager(tmp_path) as manager:
        for saved in SAVED:
            manager.save(saved, args=save(uninterrupted(packed)[saved]))
        manager.wait_until_finished()
    # A new process restores the latest, or any other.
    with orbax.checkpoint.CheckpointManager(tmp_path) as manager:
        assert manager.latest_step() == max(SAVED)
        for saved in SAVED:
            restored = manager.restore(saved, args=restore(target(packed)))
            check_continuation(packed, saved, tuple(restored))


def test_flax_msgpack() -> None:
    for saved in SAVED:
        content = flax.serialization.to_bytes(uninterrupted(False)[saved])
        assert isinstance(content, bytes)
        # Flax needs arrays to restore onto.
        like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), target(False))
        check_continuation(False, saved, flax.serialization.from_bytes(like, content))
