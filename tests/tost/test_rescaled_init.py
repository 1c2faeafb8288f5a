"""LRsI against NumPy: backpropagation written out, derivatives by differences."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from granet_jax import tost
from granet_jax.tost import scale_descent
from granet_jax.tost.scale_descent import ScaleDescent
from tests.helpers.trees import assert_same

PyTree = Any
LAYERS = ("a", "b", "c")
# Tensors in the order of JAX: bias before kernel in every layer.
TENSORS = [f"{layer}_{leaf}" for layer in LAYERS for leaf in ("bias", "kernel")]


def make_params() -> PyTree:
    rng = np.random.default_rng(0)
    shapes = zip(TENSORS, [(5,), (3, 5), (4,), (5, 4), (3,), (4, 3)], strict=True)
    params = {name: rng.normal(size=shape) for name, shape in shapes}
    params["b_bias"][:] = 0.0  # Its scale has no effect.
    return params


def make_masks() -> PyTree:
    rng = np.random.default_rng(1)
    return {
        name: rng.random(x.shape) < 0.6 if "kernel" in name else None
        for name, x in make_params().items()
    }


def make_batches(number: int = 5) -> list[Any]:
    rng = np.random.default_rng(2)
    return [
        (rng.normal(size=(4, 3)), rng.integers(0, 3, 4, np.int32))
        for _ in range(number)
    ]


def loss_fn(params: PyTree, batch: Any) -> jax.Array:
    x, labels = batch
    for layer in LAYERS:
        z = x @ params[f"{layer}_kernel"] + params[f"{layer}_bias"][None]
        x = jnp.tanh(z) if layer != "c" else z
    return optax.softmax_cross_entropy_with_integer_labels(x, labels).mean()


# --- The oracle


def numpy_loss_and_grads(params: PyTree, batch: Any) -> tuple[float, PyTree]:
    x, labels = batch
    inputs = {}
    for layer in LAYERS:
        inputs[layer] = x
        z = x @ params[f"{layer}_kernel"] + params[f"{layer}_bias"]
        x = np.tanh(z) if layer != "c" else z
    probabilities = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    loss = -np.log(probabilities[np.arange(len(labels)), labels]).mean()
    back = (probabilities - np.eye(3)[labels]) / len(labels)
    grads = {}
    for layer in reversed(LAYERS):
        grads[f"{layer}_bias"] = back.sum(0)
        grads[f"{layer}_kernel"] = inputs[layer].T @ back
        back = (back @ params[f"{layer}_kernel"].T) * (1 - inputs[layer] ** 2)
    return loss, grads


def scaled(params: PyTree, scales: np.ndarray) -> PyTree:
    return {name: s * params[name] for name, s in zip(TENSORS, scales, strict=True)}


def masked(tree: PyTree, masks: PyTree | None) -> PyTree:
    masks = masks or dict.fromkeys(TENSORS)
    return {n: x if masks[n] is None else x * masks[n] for n, x in tree.items()}


def concatenated(first: Any, second: Any) -> Any:
    return tuple(np.concatenate(pair) for pair in zip(first, second, strict=True))


def numpy_direction(
    base: PyTree, masks: PyTree | None, scales: np.ndarray, batch: Any
) -> tuple[PyTree, float]:
    grads = masked(numpy_loss_and_grads(scaled(base, scales), batch)[1], masks)
    norm = math.sqrt(sum(np.sum(g**2) for g in grads.values()))
    return {name: g / norm for name, g in grads.items()}, norm


def numpy_objective(
    base: PyTree, scales: np.ndarray, direction: PyTree, batch: Any, eta: float
) -> float:
    theta = scaled(base, scales)
    ahead = {name: theta[name] - eta * direction[name] for name in TENSORS}
    return numpy_loss_and_grads(ahead, batch)[0] / eta


def differences(f: Any, x: np.ndarray, h: float = 1e-5) -> np.ndarray:
    steps = h * np.eye(len(x))
    return np.asarray([(f(x + e) - f(x - e)) / (2 * h) for e in steps])


def numpy_lrsi(
    params: PyTree, masks: PyTree | None, batches: list[Any], config: tost.LRsI
) -> tuple[np.ndarray, list[tuple[float, float, bool]]]:
    """Return the scales, and (norm, objective, is constraint step) by iteration."""
    base = masked(params, masks)
    lookahead_masks = masks if config.mask_lookahead else None
    scales, second = np.ones(len(TENSORS)), np.zeros(len(TENSORS))
    first, count = np.zeros((2, len(TENSORS))), np.zeros(2)
    source = itertools.cycle(batches)
    history = []
    for _ in range(config.iterations):
        half = next(source)
        batch = concatenated(half, next(source))
        direction, norm = numpy_direction(base, lookahead_masks, scales, batch)
        kind = int(norm > config.gamma)
        if kind:
            f = lambda s, b=batch: numpy_direction(base, lookahead_masks, s, b)[1]  # noqa: E731
        else:
            f = functools.partial(
                numpy_objective,
                base,
                direction=direction,
                batch=concatenated(half, next(source)),
                eta=config.eta,
            )
        history.append((norm, f(scales), bool(kind)))
        slope = differences(f, scales)
        count[kind] += 1
        for i, name in enumerate(TENSORS):
            if not np.any(base[name]) or scales[i] == 0:
                continue
            d = min(max(slope[i], -config.clip), config.clip)
            first[kind][i] = 0.9 * first[kind][i] + 0.1 * d
            second[i] = 0.999 * second[i] + 0.001 * d * d
            mean = first[kind][i] / (1 - 0.9 ** count[kind])
            square = second[i] / (1 - 0.999 ** count.sum())
            scales[i] -= config.learning_rate * mean / (math.sqrt(square) + 1e-8)
            scales[i] = max(scales[i], config.min_scale if "kernel" in name else 0.0)
    return scales, history


CASES: dict[str, tuple[tost.LRsI, bool]] = {
    "both": (tost.LRsI(gamma=0.9, iterations=12, learning_rate=0.05), True),
    "authors": (tost.LRsI(gamma=1.05, iterations=8, mask_lookahead=False), True),
    "dense": (tost.LRsI(gamma=1.0, iterations=8, clip=0.1, eta=0.5), False),
    "floors": (tost.LRsI(gamma=0.5, iterations=8, learning_rate=0.4), True),
}


@pytest.mark.parametrize("case", CASES)
def test_follows_the_oracle(case: str) -> None:
    config, is_masked = CASES[case]
    params, masks = make_params(), make_masks() if is_masked else None
    batches = make_batches()
    expected, history = numpy_lrsi(params, masks, batches, config)
    with jax.enable_x64(True):
        found, scales, info = jax.device_get(
            tost.rescale_init(loss_fn, params, masks, batches, config)
        )
    assert jax.tree.structure(scales) == jax.tree.structure(params)
    np.testing.assert_allclose(jax.tree.leaves(scales), expected, rtol=1e-6)
    norms, values, kinds = zip(*history, strict=True)
    np.testing.assert_allclose(info.norm, norms, rtol=1e-6)
    np.testing.assert_allclose(info.objective, values, rtol=1e-6)
    assert info.constrained.tolist() == list(kinds)
    wanted = scaled(masked(params, masks), jax.tree.leaves(scales))
    for tensor in TENSORS:
        np.testing.assert_allclose(found[tensor], wanted[tensor], rtol=1e-12)
        if masks is not None and masks[tensor] is not None:
            pruned = np.asarray(found[tensor])[~masks[tensor]]
            assert pruned.tobytes() == bytes(pruned.nbytes)  # No -0.0.
    assert scales["b_bias"] == 1.0
    if is_masked:
        assert 0 < sum(kinds) < len(kinds)
    if case == "floors":
        assert {0.0, 0.01} <= set(expected)


def test_a_scale_at_zero_stays() -> None:
    params, config = {"bias": jnp.ones(2), "kernel": jnp.ones(2)}, CASES["both"][0]
    problem, state = scale_descent.start(params, None, config)
    state = state._replace(scales=jnp.asarray([0.0, 0.01]))
    descent = ScaleDescent(loss_fn, config)
    state = descent.adam_step(problem, state, jnp.asarray([-1.0, -1.0]), False)
    np.testing.assert_allclose(state.scales, [0.0, 0.06], rtol=1e-5)


# --- On several devices, and in traced functions


def in_float32(tree: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else x.dtype),
        tree,
    )


BOTH = tost.LRsI(gamma=0.9, iterations=6, learning_rate=0.05)
RUN = functools.partial(tost.rescale_init, loss_fn, config=BOTH)


@functools.cache
def on_host() -> tost.Rescaled:
    return RUN(*map(in_float32, (make_params(), make_masks(), make_batches())))


def jitted(params: PyTree, masks: PyTree, batches: Any) -> Any:
    return jax.jit(RUN)(params, masks, batches)


def sharded(params: PyTree, masks: PyTree, batches: Any) -> Any:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    params, masks = jax.device_put((params, masks), replicated)
    return RUN(params, masks, jax.device_put(batches, split))


def in_shard_map(params: PyTree, masks: PyTree, batches: Any) -> Any:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    run = functools.partial(RUN, axis_name="data")
    # Tracing checks that the results are equal on all devices.
    specs = (P(), P(), P("data"))
    mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P())
    return jax.jit(mapped)(params, masks, batches)


def compiled_vmap(run: Any, **options: Any) -> Any:
    return jax.jit(jax.vmap(run, **options))


def mapped_by(transform: Any, params: PyTree, masks: PyTree, batches: Any) -> Any:
    halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batches)
    run = functools.partial(RUN, axis_name="data")
    mapped = transform(run, axis_name="data", in_axes=(None, None, 0))
    results = mapped(params, masks, halves)
    first, second = (jax.tree.map(lambda x, i=i: x[i], results) for i in range(2))
    assert_same(first, second)
    return first


WAYS: dict[str, Any] = {
    "jit": jitted,
    "sharded arrays": sharded,
    "shard_map": in_shard_map,
    "pmap": functools.partial(mapped_by, jax.pmap),
    "vmap": functools.partial(mapped_by, compiled_vmap),
}


@pytest.mark.parametrize("way", WAYS)
def test_other_ways_to_run_agree_with_the_host(way: str) -> None:
    """Each of two devices has half of every batch."""
    expected = on_host()
    assert set(np.asarray(expected.info.constrained)) == {True, False}
    found = WAYS[way](*map(in_float32, (make_params(), make_masks(), make_batches())))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


# --- Dtypes, batches, errors


def test_bfloat16_and_a_pruned_layer() -> None:
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), make_params())
    masks = make_masks()
    masks["b_kernel"][:] = False
    config, batches = tost.LRsI(iterations=2), in_float32(make_batches())
    found = tost.rescale_init(loss_fn, params, masks, batches, config)
    assert {x.dtype for x in jax.tree.leaves(found.params)} == {jnp.dtype("bfloat16")}
    scales = jax.tree.leaves(found.scales)
    assert {x.dtype for x in scales} == {jnp.dtype("float32")}
    # Nothing reaches the layers before the pruned one.
    unscaled = [tensor for tensor, s in zip(TENSORS, scales, strict=True) if s == 1.0]
    assert unscaled == TENSORS[:4]


@pytest.mark.parametrize(("gamma", "each"), [(1e-3, 2), (math.inf, 3)])
def test_number_of_batches_of_a_step(gamma: float, each: int) -> None:
    config = tost.LRsI(gamma=gamma, iterations=2)
    batches = iter(in_float32(make_batches(2 * each + 3)))
    tost.rescale_init(loss_fn, in_float32(make_params()), None, batches, config)
    assert len(list(batches)) == 3


def test_errors() -> None:
    params, batches = in_float32((make_params(), make_batches(1)))
    run = functools.partial(tost.rescale_init, loss_fn)
    with pytest.raises(ValueError, match=r"norm nan and an objective .* iteration 0"):
        tost.rescale_init(lambda p, b: loss_fn(p, b) * jnp.nan, params, None, batches)
    with pytest.raises(ValueError, match="batches ran out after 1, and cannot be iter"):
        run(params, None, iter(batches))
    with pytest.raises(ValueError, match="batches is empty: LRsI needs at least one"):
        jax.jit(lambda p: run(p, None, []))(params)
