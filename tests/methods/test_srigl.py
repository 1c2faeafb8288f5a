"""SRigL beside a plain NumPy version, and what its masks must always be."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import granet_jax

SHAPES = {
    "conv/kernel": (3, 3, 4, 6),
    "dense/kernel": (24, 10),
    "output/kernel": (10, 5),
}
STEPS = 100


def best(scores: np.ndarray, number: int, among: np.ndarray) -> np.ndarray:
    """The `number` largest scores among some, as a mask."""
    order = np.argsort(np.where(among, -scores, np.inf), axis=None, kind="stable")
    chosen = np.zeros(scores.size, bool)
    chosen[order[:number]] = True
    return chosen.reshape(scores.shape) & among


def numpy_update(
    weight: np.ndarray,
    grad: np.ndarray,
    mask: np.ndarray,
    *,
    fraction: float,
    min_salient: float,
    target: int,
    spared: bool,
) -> np.ndarray:
    """One update of one layer (inputs, units), by loops over units."""
    inputs, units = mask.shape
    magnitude, gradient = np.abs(weight), np.abs(grad)
    active = int(mask.sum())
    freed = math.ceil(fraction * active)
    stay = best(magnitude, active - freed, mask)
    salient = stay | best(gradient, freed, ~stay)
    counts = salient.sum(0)
    least = max(1, math.floor(min_salient * mask.sum(0).max()))
    kept = units if spared else int((counts >= least).sum())
    kept = max(kept, -(-target * units // inputs))
    alive = sorted(np.argsort(-counts, kind="stable")[:kept])
    fan_in = min(max((target * units + kept // 2) // kept, 1), inputs)
    new = np.zeros_like(mask)
    for unit in alive:
        column = best(magnitude[:, unit], fan_in, stay[:, unit])
        missing = fan_in - int(column.sum())
        new[:, unit] = column | best(gradient[:, unit], missing, ~column)
    return new


def flat(x: Any) -> np.ndarray:
    return np.asarray(x).reshape(-1, x.shape[-1])


def trained(tx: Any, grads: list[Any], params: Any) -> list[tuple[Any, Any]]:
    """Parameters and masks after every step."""
    state = jax.jit(tx.init)(params)
    step = jax.jit(tx.update)
    history = [(params, granet_jax.get_masks(state))]
    for grad in grads:
        updates, state = step(grad, state, params)
        params = optax.apply_updates(params, updates)
        history.append((params, granet_jax.get_masks(state)))
    return history


def problem(seed: int, steps: int) -> tuple[Any, list[Any]]:
    """Parameters, and gradients that leave some units without any signal."""
    rng = np.random.default_rng(seed)
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
    scale = {k: rng.uniform(size=s[-1:]) ** 6 for k, s in SHAPES.items()}
    params = {k: x * scale[k].astype(np.float32) for k, x in params.items()}
    grads = [
        {
            k: (rng.normal(size=s) * scale[k]).astype(np.float32)
            for k, s in SHAPES.items()
        }
        for _ in range(steps)
    ]
    return jax.tree.map(jnp.asarray, (params, grads))


@pytest.mark.parametrize("min_salient", [0.0, 0.3, 0.95])
def test_masks_are_those_of_a_loop_over_units(min_salient: float) -> None:
    method = granet_jax.srigl(
        0.8, STEPS, keep_units="output/", interval=2, min_salient=min_salient
    )
    params, grads = problem(0, 12)
    history = trained(granet_jax.transform(method, optax.sgd(0.01)), grads, params)
    initial = history[0][1]
    ablated = 0
    for count, (grad, before, after) in enumerate(
        zip(grads, history, history[1:], strict=False), 1
    ):
        for name in SHAPES:
            mask = flat(before[1][name])
            if count % 2:
                np.testing.assert_array_equal(flat(after[1][name]), mask)
                continue
            step = np.where(mask, flat(grad[name]), 0)
            expected = numpy_update(
                flat(before[0][name]) * mask - np.float32(0.01) * step,
                flat(grad[name]),
                mask,
                fraction=0.15 * (1 + math.cos(math.pi * count / (0.75 * STEPS))),
                min_salient=min_salient,
                target=int(flat(initial[name]).sum(0)[0]),
                spared=name.startswith("output"),
            )
            np.testing.assert_array_equal(flat(after[1][name]), expected)
            ablated += int((~expected.any(0)).sum())
    assert ablated


def test_units_share_the_weights_of_their_layer() -> None:
    method = granet_jax.srigl(
        0.8, STEPS, keep_units="output/", interval=1, min_salient=0.95
    )
    params, grads = problem(1, 10)
    history = trained(granet_jax.transform(method, optax.adam(0.01)), grads, params)
    assert flat(history[-1][1]["output/kernel"]).any(0).all()
    for weights, masks in history[1:]:
        for name in SHAPES:
            mask, units = flat(masks[name]), flat(masks[name]).any(0)
            fan_in = mask.sum(0)[units]
            assert (fan_in == fan_in[0]).all()
            total = flat(history[0][1][name]).sum()
            assert abs(int(mask.sum()) - int(total)) <= units.sum() / 2
            np.testing.assert_array_equal(flat(weights[name])[~mask], 0)


def test_layers_of_a_stack_are_ablated_each_by_itself() -> None:
    method = granet_jax.srigl(0.8, STEPS, keep_units="output/", interval=1)
    params, grads = problem(2, 3)
    single = trained(granet_jax.transform(method, optax.sgd(0.01)), grads, params)

    def doubled(tree: Any) -> Any:
        first, second = tree["dense/kernel"], tree["dense/kernel"][::-1]
        return {**tree, "dense/kernel": jnp.stack([first, second], 1)}

    stack = granet_jax.transform(
        method, optax.sgd(0.01), masks=doubled(single[0][1]), stacked={"dense/": 1}
    )
    together = trained(stack, list(map(doubled, grads)), doubled(params))
    expected = doubled(single[-1][1])["dense/kernel"]
    np.testing.assert_array_equal(together[-1][1]["dense/kernel"], expected)


def test_on_explicit_axes_as_on_one_device() -> None:
    method = granet_jax.srigl(0.8, STEPS, keep_units="output", interval=1)
    tx = granet_jax.transform(method, optax.sgd(0.01))
    rng = np.random.default_rng(3)
    shapes = {"conv": (3, 3, 4, 8), "output": (16, 8)}
    start, *grads = [
        {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
        for _ in range(3)
    ]
    alone = trained(tx, grads, start)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    layout = {"conv": P(None, None, "x", "y"), "output": P("x", "y")}
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, layout) for x in (start, *grads)]
        shared = trained(tx, placed[1:], placed[0])
    for name in shapes:
        np.testing.assert_array_equal(shared[-1][1][name], alone[-1][1][name])


def test_a_name_that_no_leaf_has_is_refused() -> None:
    tx = granet_jax.transform(
        granet_jax.srigl(0.8, STEPS, keep_units="head", interval=1), optax.sgd(0.1)
    )
    params, grads = problem(0, 1)
    with pytest.raises(ValueError, match=re.escape("keep_units is 'head'")):
        tx.update(grads[0], tx.init(params), params)
