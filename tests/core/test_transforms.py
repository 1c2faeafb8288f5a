"""`transform` under JAX's transformations: jit, scan, vmap, donation, guards."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from tests.helpers import own_methods
from tests.helpers.training import at, changes, compiled_step, make_step, stack
from tests.helpers.trees import assert_same

METHOD = own_methods.prune_and_exchange(interval=2, last=6)
STEPS = 8
SHAPES = {
    "first": {"kernel": (6, 8, "float32"), "bias": (8, "float32")},
    "second": ((8, 5, "bfloat16"), ("float32",)),
}


def transform(seed: Any = 0) -> optax.GradientTransformationExtraArgs:
    # All numbers are powers of two, so that fusing a product into a sum rounds nothing.
    return granet_jax.transform(METHOD, optax.sgd(0.125, momentum=0.5), seed=seed)


TX = transform()
# All tests whose runs need no other program share this one.
STEP: Any = compiled_step(TX)


def make_params(seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x[:-1]), x[-1]),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple) and isinstance(x[-1], str),
    )


@functools.cache
def make_grads(seed: int = 100) -> list[Any]:
    return [make_params(seed + step) for step in range(STEPS)]


def run(step: Any, params: Any, state: Any, grads: list[Any]) -> list[tuple[Any, Any]]:
    """Parameters and state after every step."""
    points = []
    for gradient in grads:
        params, state = step(params, state, gradient)
        points.append((params, state))
    return points


@functools.cache
def reference() -> list[tuple[Any, Any]]:
    params, state, grads = make_params(), TX.init(make_params()), make_grads()
    with jax.transfer_guard("disallow"):
        return run(STEP, params, state, grads)


def test_a_run_compiles_once_and_transfers_nothing() -> None:
    # All other runs are compared with this one, so its masks must change.
    assert changes([state.masks for _, state in reference()]) == 3
    assert STEP._cache_size() == 1


def test_the_transfer_guard_sees_a_transfer() -> None:
    step = jax.jit(lambda x: x + 1)
    with (
        jax.transfer_guard("disallow"),
        pytest.raises(Exception, match="Disallowed host-to-device transfer"),
    ):
        step(np.ones(3, np.float32))


def test_a_traced_seed() -> None:
    """One program serves all seeds, and each seed has the masks it has untraced."""

    @jax.jit
    def start(seed: Any, params: Any) -> Any:
        return transform(seed).init(params)

    @jax.jit
    def step(seed: Any, params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        return make_step(transform(seed))(params, state, grads)

    params, grads = make_params(), make_grads()
    other = transform(7)
    expected = [
        reference(),
        run(compiled_step(other), params, other.init(params), grads),
    ]
    for seed, points in zip((0, 7), expected, strict=True):
        traced = jnp.uint32(seed)
        state = start(traced, params)
        assert_same(run(functools.partial(step, traced), params, state, grads), points)
    assert (start._cache_size(), step._cache_size()) == (1, 1)
    masks = [np.asarray(p[-1][1].masks["first"]["kernel"]) for p in expected]
    assert not np.array_equal(*masks)


def test_scan_leaks_no_tracer() -> None:
    with jax.checking_leaks():
        tx = transform()
        # A second trace would meet what the first one left behind.
        for _ in range(2):
            state = jax.jit(lambda params: tx.init(params))(make_params())

            @jax.jit
            def scan(params: Any, state: Any, grads: Any) -> Any:
                def body(carry: Any, gradient: Any) -> Any:
                    carry = make_step(tx)(*carry, gradient)
                    return carry, carry

                return jax.lax.scan(body, (params, state), grads)[1]

            found = scan(make_params(), state, stack(make_grads()))
    for index, point in enumerate(reference()):
        assert_same(at(found, index), point)


def test_vmap_over_seeds_at_different_steps() -> None:
    lanes = range(3)
    params = list(map(make_params, lanes))
    states: list[Any] = [
        granet_jax.set_masks(
            TX.init(p)._replace(count=jnp.int32(lane)),
            granet_jax.init_masks(METHOD, p, seed=lane),
        )
        for lane, p in enumerate(params)
    ]
    grads = [make_grads(100 * lane) for lane in lanes]
    step = jax.jit(jax.vmap(make_step(TX)))
    by_step = [stack(gradients) for gradients in zip(*grads, strict=True)]
    found = run(step, stack(params), stack(states), by_step)
    active = []
    for lane in lanes:
        expected = run(STEP, params[lane], states[lane], grads[lane])
        assert_same([at(point, lane) for point in found], expected)
        active.append(granet_jax.sparsity(expected[0][1].masks).active)
    # The first step is an update, which prunes, in the second lane alone.
    assert active == [44, 22, 44]
    kernels = found[-1][0]["first"]["kernel"]
    assert not np.array_equal(kernels[0], kernels[1])


def test_donated_buffers() -> None:
    params, state = make_params(), TX.init(make_params())
    # Two leaves in one buffer could not both be donated.
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))]
    assert len(set(pointers)) == len(pointers)
    step = jax.jit(make_step(TX), donate_argnums=(0, 1))
    for gradient, expected in zip(make_grads(), reference(), strict=True):
        donated = (params, state)
        params, state = step(params, state, gradient)
        assert all(x.is_deleted() for x in jax.tree.leaves(donated))
        assert_same((params, state), expected)


def test_eager() -> None:
    # Four steps, two of which update the masks.
    state = TX.init(make_params())
    assert_same(jax.jit(TX.init)(make_params()), state)
    found = run(make_step(TX), make_params(), state, make_grads()[:4])
    assert_same(found, reference()[:4])
