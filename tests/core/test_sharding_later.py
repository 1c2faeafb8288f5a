"""Methods of the later kinds, and structures, on eight devices: as on one, to the bit.

`test_sharding.py` has the layouts, and the numbers whose sums are exact in any order.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax import structures
from tests.core.test_sharding import LAYOUTS, make_params, make_step, mean_grads
from tests.helpers.trees import assert_same
from tests.methods.test_cyclic import QUICK

METHODS = {
    "cyclical": granet_jax.cyclical(0.75, 4, cycles=2, ramp=0.5, interval=1),
    "straight_through 2:4": granet_jax.straight_through(
        0.5, 1, interval=1, structure=structures.n_of_m(2, 4)
    ),
    "greg1 block": granet_jax.greg1(
        0.75,
        interval=1,
        growth=0.5,
        ceiling=0.25,
        settle_steps=1,
        structure=structures.block(4, 2),
    ),
    "rigl fan-in": granet_jax.rigl(
        0.75, 4, interval=1, stop=1.0, structure=structures.constant_fan_in()
    ),
    "granet channel": granet_jax.granet(
        0.5,
        4,
        interval=1,
        end_step=2,
        scope="layer",
        distribution="uniform",
        structure=structures.channel(),
    ),
}
STEPS = 3
# What splits no axis, also where an array's sharding is part of its type.
CASES = [
    ("cyclical", "auto_2d"),
    ("straight_through 2:4", "auto_2d"),
    ("greg1 block", "auto_2d"),
    ("rigl fan-in", "auto_2d"),
    ("granet channel", "explicit_2d"),
]


def run(name: str, layout: str | None) -> list[Any]:
    """Parameters, masks and moments, at first and after every step."""
    tx = granet_jax.transform(METHODS[name], optax.sgd(0.125, momentum=0.5))
    step = jax.jit(make_step(tx), compiler_options=QUICK)
    place: Any = (lambda x: x) if layout is None else LAYOUTS[layout].place
    params = place(jax.tree.map(jnp.asarray, make_params()))
    state: Any = tx.init(params)
    if METHODS[name].weights == "sparse":
        params = granet_jax.apply_masks(params, state.masks)
    found = [jax.device_get((params, state.masks, state.inner_state))]
    for t in range(STEPS):
        placed = [x.sharding for x in jax.tree.leaves((params, state.masks))]
        params, state = step(params, state, place(mean_grads(t)))
        after = jax.tree.leaves((params, state.masks))
        for x, sharding in zip(after, placed, strict=True):
            assert x.sharding.is_equivalent_to(sharding, x.ndim)
        found.append(jax.device_get((params, state.masks, state.inner_state)))
    return found


@functools.cache
def on_one_device(name: str) -> list[Any]:
    return run(name, None)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_sharded_equals_one_device(name: str, layout: str) -> None:
    expected = on_one_device(name)
    with LAYOUTS[layout].context():
        found = run(name, layout)
    assert_same(found, expected)
    masks = [jax.tree.leaves(masks) for _, masks, _ in expected]
    assert any(
        np.any(a != b)
        for before, after in itertools.pairwise(masks)
        for a, b in zip(before, after, strict=True)
    )
