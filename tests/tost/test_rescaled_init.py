"""LRsI against NumPy: gradients written out, derivatives by differences."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import granet_jax
from granet_jax import tost
from granet_jax.tost import scale_descent
from tests.helpers.trees import assert_same

PyTree = Any
LAYERS = ("first", "second", "third")
# Leaves in the order of JAX: bias before kernel in every layer.
LEAVES = [(layer, leaf) for layer in LAYERS for leaf in ("bias", "kernel")]


def make_params(seed: int = 0, size: float = 1.0) -> PyTree:
    rng = np.random.default_rng(seed)
    sizes = (3, 5, 4, 3)
    params = {
        layer: {
            "bias": rng.normal(size=n) * size,
            "kernel": rng.normal(size=(m, n)) * size,
        }
        for layer, (m, n) in zip(LAYERS, itertools.pairwise(sizes), strict=True)
    }
    params["second"]["bias"][:] = 0.0  # Its scale has nothing to act on.
    return params


def make_masks(seed: int = 1) -> PyTree:
    rng = np.random.default_rng(seed)
    params = make_params()
    return {
        layer: {"bias": None, "kernel": rng.random(params[layer]["kernel"].shape) < 0.6}
        for layer in LAYERS
    }


def make_batches(number: int = 5, examples: int = 4) -> list[Any]:
    rng = np.random.default_rng(2)
    return [
        (rng.normal(size=(examples, 3)), rng.integers(0, 3, examples, np.int32))
        for _ in range(number)
    ]


def loss_fn(params: PyTree, batch: Any) -> jax.Array:
    x, labels = batch
    for layer in LAYERS[:-1]:
        x = jnp.tanh(x @ params[layer]["kernel"] + params[layer]["bias"][None])
    logits = x @ params["third"]["kernel"] + params["third"]["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# The oracle.


def numpy_loss_and_grads(params: PyTree, batch: Any) -> tuple[float, PyTree]:
    """The loss and, by backpropagation written out, its gradient."""
    x, labels = batch
    inputs = []
    for layer in LAYERS:
        inputs.append(x)
        z = x @ params[layer]["kernel"] + params[layer]["bias"]
        x = np.tanh(z) if layer != "third" else z
    shifted = x - x.max(1, keepdims=True)
    probabilities = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    rows = np.arange(len(labels))
    loss = -np.log(probabilities[rows, labels]).mean()
    back = probabilities.copy()
    back[rows, labels] -= 1
    back /= len(labels)
    grads = {}
    for layer, entered in zip(reversed(LAYERS), reversed(inputs), strict=True):
        grads[layer] = {"bias": back.sum(0), "kernel": entered.T @ back}
        back = (back @ params[layer]["kernel"].T) * (1 - entered**2)
    return loss, grads


def tree_of(f: Any) -> PyTree:
    return {
        layer: {leaf: f(layer, leaf) for leaf in ("bias", "kernel")} for layer in LAYERS
    }


def times_scales(params: PyTree, scales: np.ndarray) -> PyTree:
    return tree_of(lambda a, b: params[a][b] * scales[LEAVES.index((a, b))])


def masked(tree: PyTree, masks: PyTree | None) -> PyTree:
    if masks is None:
        return tree
    return tree_of(
        lambda a, b: tree[a][b] * masks[a][b] if b == "kernel" else tree[a][b]
    )


def joined(first: Any, second: Any) -> Any:
    return tuple(np.concatenate(pair) for pair in zip(first, second, strict=True))


def numpy_direction(
    base: PyTree, masks: PyTree | None, scales: np.ndarray, batch: Any
) -> tuple[PyTree, float]:
    grads = masked(numpy_loss_and_grads(times_scales(base, scales), batch)[1], masks)
    norm = math.sqrt(sum(np.sum(grads[a][b] ** 2) for a, b in LEAVES))
    return tree_of(lambda a, b: grads[a][b] / norm), norm


def numpy_objective(
    base: PyTree, scales: np.ndarray, direction: PyTree, batch: Any, eta: float
) -> float:
    theta = times_scales(base, scales)
    ahead = tree_of(lambda a, b: theta[a][b] - eta * direction[a][b])
    return numpy_loss_and_grads(ahead, batch)[0] / eta


def differences(f: Any, at: np.ndarray, h: float = 1e-5) -> np.ndarray:
    return np.asarray(
        [(f(at + h * e) - f(at - h * e)) / (2 * h) for e in np.eye(len(at))]
    )


def numpy_lrsi(
    params: PyTree, masks: PyTree | None, batches: list[Any], config: tost.LRsI
) -> tuple[np.ndarray, list[tuple[float, float, bool]]]:
    """The algorithm of the specification, tensor by tensor and number by number."""
    base = masked(params, masks)
    seen = masks if config.mask_lookahead else None
    scales = np.ones(len(LEAVES))
    first = {True: np.zeros(len(LEAVES)), False: np.zeros(len(LEAVES))}
    count = {True: 0, False: 0}
    second = np.zeros(len(LEAVES))
    drawn = itertools.cycle(batches)
    trace = []
    for _ in range(config.iterations):
        half = next(drawn)
        batch = joined(half, next(drawn))
        direction, norm = numpy_direction(base, seen, scales, batch)
        kind = norm > config.gamma
        if kind:
            value = norm
            slope = differences(
                lambda s, b=batch: numpy_direction(base, seen, s, b)[1], scales
            )
        else:
            other = joined(half, next(drawn))
            value = numpy_objective(base, scales, direction, other, config.eta)
            slope = differences(
                lambda s, d=direction, b=other: numpy_objective(
                    base, s, d, b, config.eta
                ),
                scales,
            )
        trace.append((norm, value, kind))
        count[kind] += 1
        for i, (layer, leaf) in enumerate(LEAVES):
            if not np.any(base[layer][leaf]) or scales[i] == 0:
                continue
            d = min(max(slope[i], -config.clip), config.clip)
            first[kind][i] = 0.9 * first[kind][i] + 0.1 * d
            second[i] = 0.999 * second[i] + 0.001 * d * d
            mean = first[kind][i] / (1 - 0.9 ** count[kind])
            square = second[i] / (1 - 0.999 ** sum(count.values()))
            scales[i] -= config.learning_rate * mean / (math.sqrt(square) + 1e-8)
            scales[i] = max(scales[i], config.min_scale if leaf == "kernel" else 0.0)
    return scales, trace


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("mask_lookahead", [True, False])
def test_both_gradients_by_differences(dense: bool, mask_lookahead: bool) -> None:
    params, masks = make_params(), None if dense else make_masks()
    base = masked(params, masks)
    seen = masks if mask_lookahead else None
    config = tost.LRsI(mask_lookahead=mask_lookahead)
    scales = np.random.default_rng(3).uniform(0.5, 1.5, len(LEAVES))
    batch, other = make_batches(2)

    @jax.jit
    def run(scales: Any, batch: Any, other: Any) -> Any:
        problem, _ = lrsi.start(params, masks, config)
        direction, norm = lrsi.gradient(loss_fn, problem, scales, batch, config)
        constraint = lrsi.constraint_gradient(
            loss_fn, problem, scales, direction, batch
        )
        value, objective = lrsi.objective_gradient(
            loss_fn, problem, scales, direction, other, config
        )
        return direction, norm, constraint, value, objective

    with jax.enable_x64(True):
        direction, norm, constraint, value, objective = jax.device_get(
            run(scales, batch, other)
        )
    expected, expected_norm = numpy_direction(base, seen, scales, batch)
    assert math.isclose(norm, expected_norm, rel_tol=1e-12)
    for a, b in LEAVES:
        np.testing.assert_allclose(direction[a][b], expected[a][b], atol=1e-12)
    np.testing.assert_allclose(
        constraint,
        differences(lambda s: numpy_direction(base, seen, s, batch)[1], scales),
        atol=1e-8,
    )
    # The direction is a constant in it, also where it hangs on the scales.
    f = functools.partial(
        numpy_objective, base, direction=expected, batch=other, eta=config.eta
    )
    assert math.isclose(value, f(scales), rel_tol=1e-12)
    np.testing.assert_allclose(objective, differences(f, scales), atol=1e-8)
    # The tests would not tell them apart if there were no difference.
    gap = constraint - objective
    assert np.all(np.abs(np.delete(gap, LEAVES.index(("second", "bias")))) > 1e-3)


CASES: dict[str, tuple[tost.LRsI, bool]] = {
    "both": (tost.LRsI(gamma=0.9, iterations=12, learning_rate=0.05), True),
    "authors": (tost.LRsI(gamma=1.05, iterations=8, mask_lookahead=False), True),
    "dense": (tost.LRsI(gamma=1.0, iterations=8, clip=0.1, eta=0.5), False),
    "floors": (tost.LRsI(gamma=0.5, iterations=8, learning_rate=0.4), True),
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(name: str) -> None:
    config, is_masked = CASES[name]
    params, masks = make_params(), make_masks() if is_masked else None
    batches = make_batches()
    expected, course = numpy_lrsi(params, masks, batches, config)
    with jax.enable_x64(True):
        found, scales, info = jax.device_get(
            tost.rescale_init(loss_fn, params, masks, batches, config)
        )
    assert jax.tree.structure(scales) == jax.tree.structure(params)
    np.testing.assert_allclose(jax.tree.leaves(scales), expected, rtol=1e-6)
    norms, values, kinds = zip(*course, strict=True)
    np.testing.assert_allclose(info.norm, norms, rtol=1e-6)
    np.testing.assert_allclose(info.objective, values, rtol=1e-6)
    assert info.constrained.tolist() == list(kinds)
    for a, b in LEAVES:
        wanted = masked(params, masks)[a][b] * scales[a][b]
        np.testing.assert_allclose(found[a][b], wanted, rtol=1e-12)
        if b == "kernel" and masks is not None:
            assert np.all(np.asarray(found[a][b])[~masks[a][b]] == 0.0)
    # That each case is the one it is meant to be.
    if name in ("both", "authors", "floors"):
        assert 0 < sum(kinds) < len(kinds)
    if name == "floors":
        assert 0.0 in expected
        assert 0.01 in expected
    assert scales["second"]["bias"] == 1.0


def in_float32(tree: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else x.dtype),
        tree,
    )


BOTH = tost.LRsI(gamma=0.9, iterations=6, learning_rate=0.05)


@functools.cache
def in_a_loop() -> tost.Rescaled:
    batches = [in_float32(batch) for batch in make_batches()]
    return tost.rescale_init(
        loss_fn, in_float32(make_params()), make_masks(), batches, BOTH
    )


def assert_like_the_loop(found: tost.Rescaled) -> None:
    expected = in_a_loop()
    assert set(np.asarray(expected.info.constrained)) == {True, False}
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_in_jit_as_outside() -> None:
    batches = [in_float32(batch) for batch in make_batches()]

    @jax.jit
    def run(params: PyTree, masks: PyTree, batches: Any) -> tost.Rescaled:
        return tost.rescale_init(loss_fn, params, masks, batches, BOTH)

    assert_like_the_loop(run(in_float32(make_params()), make_masks(), batches))


@pytest.mark.parametrize("kind", ["pmap", "shard_map", "vmap"])
def test_in_data_parallel(kind: str) -> None:
    """Two devices with half of every batch each: as one with all."""
    params, masks = in_float32(make_params()), make_masks()
    batches = [in_float32(batch) for batch in make_batches()]
    run = functools.partial(tost.rescale_init, loss_fn, config=BOTH, axis_name="data")
    if kind == "shard_map":
        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
        specs = (P(), P(), P("data"))
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P())
        # That the results are the same on all devices is checked when it is traced.
        assert_like_the_loop(jax.jit(run)(params, masks, batches))
        return
    halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batches)
    mapped = jax.pmap if kind == "pmap" else jax.vmap
    found = mapped(run, axis_name="data", in_axes=(None, None, 0))(
        params, masks, halves
    )
    first, second = (jax.tree.map(lambda x, i=i: x[i], found) for i in range(2))
    assert_same(first, second)
    assert_like_the_loop(first)


def test_on_sharded_arrays() -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, P("data")))
    whole = functools.partial(jax.device_put, device=NamedSharding(mesh, P()))
    batches = [place(in_float32(batch)) for batch in make_batches()]
    params, masks = whole(in_float32(make_params())), whole(make_masks())
    assert_like_the_loop(tost.rescale_init(loss_fn, params, masks, batches, BOTH))


def normed_loss(params: PyTree, batch: Any) -> jax.Array:
    """A convolution, then a norm with the statistics of the batch."""
    y = lax.conv_general_dilated(
        batch,
        params["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    mean, variance = y.mean((0, 1, 2)), y.var((0, 1, 2))
    y = (y - mean[None, None, None]) / jnp.sqrt(variance + 1e-8)[None, None, None]
    weights = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
    return jnp.mean(jnp.tanh(y * weights) ** 2 + y * weights)


def test_a_scale_before_a_norm() -> None:
    """The loss does not see it; the gradient's norm is as its inverse."""
    rng = np.random.default_rng(4)
    params = {"kernel": rng.normal(size=(3, 3, 2, 4))}
    mask = {"kernel": rng.random((3, 3, 2, 4)) < 0.5}
    batch = rng.normal(size=(4, 5, 5, 2))
    config = tost.LRsI()
    with jax.enable_x64(True):
        problem, state = lrsi.start(params, mask, config)
        losses, norms = [], []
        for scale in (1.0, 0.25, 8.0):
            scales = scale * state.scales
            theta = lrsi.scaled(problem.base, scales)
            losses.append(float(normed_loss(theta, batch)))
            direction, norm = lrsi.gradient(normed_loss, problem, scales, batch, config)
            norms.append(float(norm))
            slope = lrsi.constraint_gradient(
                normed_loss, problem, scales, direction, batch
            )
            # d(n_1 / alpha) / d alpha
            np.testing.assert_allclose(slope, [-norms[-1] / scale], rtol=1e-5)
    np.testing.assert_allclose(losses[1:], losses[:1] * 2, rtol=1e-6)
    np.testing.assert_allclose(norms, norms[0] / np.asarray([1, 0.25, 8]), rtol=1e-6)


def test_it_does_what_it_is_for() -> None:
    """Too large a start: the norm comes down to gamma, and the objective after it."""
    params = in_float32(make_params(size=3.0))
    config = tost.LRsI(gamma=0.5, learning_rate=0.05, iterations=80)
    batches = [in_float32(batch) for batch in make_batches()]
    found = tost.rescale_init(loss_fn, params, make_masks(), batches, config)
    norm, _, constrained = map(np.asarray, found.info)
    assert constrained[0]
    assert norm[-20:].mean() < 0.7 < norm[:5].mean()
    whole = jax.tree.map(lambda *xs: jnp.concatenate(xs), *batches)
    start = granet_jax.apply_masks(params, make_masks())
    assert loss_fn(found.params, whole) < loss_fn(start, whole)


def test_floors_and_zeros() -> None:
    # A first step of Adam is as long as the learning rate.
    config = tost.LRsI(min_scale=0.3, learning_rate=5.0, iterations=1)
    params, masks = in_float32(make_params()), make_masks()
    found = tost.rescale_init(loss_fn, params, masks, make_batches(), config)
    at_floor = 0
    for a, b in LEAVES:
        scale, value = np.asarray(found.scales[a][b]), np.asarray(found.params[a][b])
        assert value.dtype == np.float32
        at_floor += scale in (np.float32(0.3), 0.0)
        assert scale >= (np.float32(0.3) if b == "kernel" else 0.0)
        if b == "kernel":
            pruned = value[~masks[a][b]]
            assert pruned.tobytes() == bytes(pruned.nbytes)
    assert at_floor >= 2


def test_a_scale_at_zero_stays() -> None:
    problem, state = lrsi.start(
        {"bias": jnp.ones(2), "kernel": jnp.ones(2)}, None, BOTH
    )
    state = state._replace(scales=jnp.asarray([0.0, 0.01]))
    state = lrsi.adam_step(state, jnp.asarray([-1.0, -1.0]), False, problem, BOTH)
    np.testing.assert_allclose(state.scales, [0.0, 0.06], rtol=1e-5)


def test_bfloat16_and_a_pruned_layer() -> None:
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), make_params())
    masks = make_masks()
    masks["second"]["kernel"][:] = False
    batches = [in_float32(batch) for batch in make_batches()]
    config = tost.LRsI(iterations=2)
    found = tost.rescale_init(loss_fn, params, masks, batches, config)
    assert {x.dtype for x in jax.tree.leaves(found.params)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(found.scales)} == {jnp.dtype("float32")}
    scales = dict(zip(LEAVES, map(float, jax.tree.leaves(found.scales)), strict=True))
    assert [leaf for leaf in LEAVES if scales[leaf] == 1.0] == [
        ("first", "bias"),
        ("first", "kernel"),
        ("second", "bias"),
        ("second", "kernel"),
    ]


@pytest.mark.parametrize(("gamma", "each"), [(1e-3, 2), (math.inf, 3)])
def test_how_many_batches_a_step_draws(gamma: float, each: int) -> None:
    params = in_float32(make_params())
    config = tost.LRsI(gamma=gamma, iterations=2)
    run = functools.partial(tost.rescale_init, loss_fn, params, None, config=config)
    drawn = iter(make_batches(2 * each + 3))
    run(drawn)
    assert len(list(drawn)) == 3


def test_refused() -> None:
    params = in_float32(make_params())
    batches = [in_float32(batch) for batch in make_batches(1)]
    run = functools.partial(tost.rescale_init, loss_fn, params, None, batches)
    with pytest.raises(TypeError, match=r"config must be an LRsI, got \{'eta': 1\}"):
        run({"eta": 1})
    with pytest.raises(ValueError, match="params has no leaves, got"):
        tost.rescale_init(loss_fn, {}, None, batches)
    with pytest.raises(ValueError, match="masks must have the structure of params"):
        tost.rescale_init(loss_fn, params, {"first": None}, batches)
    with pytest.raises(
        ValueError, match=r"norm nan and an objective of .* iteration 0"
    ):
        tost.rescale_init(lambda p, b: loss_fn(p, b) * jnp.nan, params, None, batches)
    with pytest.raises(ValueError, match="batches ran out after 1, and cannot be iter"):
        tost.rescale_init(loss_fn, params, None, iter(batches))
    with pytest.raises(ValueError, match="batches is empty: LRsI needs at least one"):
        tost.rescale_init(loss_fn, params, None, [])
    with pytest.raises(ValueError, match="batches is empty: LRsI needs at least one"):
        jax.jit(lambda p: tost.rescale_init(loss_fn, p, None, []))(params)
