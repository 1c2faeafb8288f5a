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
from tests.test_cyclic import QUICK
from tests.test_sharding import LAYOUTS, make_params, make_step, mean_grads
from tests.trees import assert_same

METHODS = {
    "cyclical": granet_jax.cyclical(0.75, 4, cycles=2, ramp=0.5, interval=1),
    "projected": granet_jax.cyclical(
        0.75, 4, cycles=2, ramp=0.5, interval=1, recovery="projected"
    ),
    "top_kast 2:4": granet_jax.top_kast(
        0.5,
        backward_sparsity=0.25,
        interval=1,
        penalty=0.0,
        structure=structures.n_of_m(2, 4),
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
# What splits no axis, on axes whose sharding is part of an array's type as well.
CASES = [(name, "auto_2d") for name in METHODS] + [
    (name, "explicit_2d") for name in ("rigl fan-in", "granet channel")
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
