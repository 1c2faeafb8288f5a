"""`transform` under JAX's transformations: jit, scan, vmap, donation, guards."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from tests.helpers.training import at, changes, compiled_step, make_step, stack
from tests.helpers.trees import assert_same

METHODS = {
    "granet": granet_jax.granet(0.8, 12, interval=2, end_step=6),
    "granet_layer_random": granet_jax.granet(
        0.8, 12, interval=2, end_step=6, scope="layer", grow="random"
    ),
    "gmp": granet_jax.gmp(0.8, 8, interval=2),
    "rigl": granet_jax.rigl(0.7, 12, interval=2),
    "set": granet_jax.set_(0.7, 12, interval=2),
    "snfs": granet_jax.snfs(0.7, 12, interval=2, decay=0.5),
    "static": granet_jax.static(0.7),
}
# Each transformation of each method compiles a program, so pull requests run two
# methods, which between them use all parts of a state and all scores but GraNet's.
QUICK = ("granet_layer_random", "snfs")
each_method = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in METHODS
    ],
)
STEPS = 14
# All numbers are powers of two, so that fusing a product into a sum rounds nothing.
INNER = optax.sgd(0.125, momentum=0.5)


def make_params(seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return {
        "first": {
            "kernel": jnp.asarray(rng.normal(size=(6, 8)), jnp.float32),
            "bias": jnp.zeros((8,), jnp.float32),
        },
        "second": (
            jnp.asarray(rng.normal(size=(8, 5)), jnp.bfloat16),
            jnp.asarray(rng.normal(size=()), jnp.float32),
        ),
    }


@functools.cache
def make_grads(seed: int = 1) -> list[Any]:
    rng = np.random.default_rng(seed)
    stacked = jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=(STEPS, *p.shape)), p.dtype),
        make_params(),
    )
    return [at(stacked, index) for index in range(STEPS)]


@functools.cache
def transformation(name: str) -> Any:
    return granet_jax.transform(METHODS[name], INNER)


@functools.cache
def step_of(name: str) -> Any:
    return compiled_step(transformation(name))


def loop(step: Any, params: Any, state: Any, grads: list[Any]) -> tuple[Any, list[Any]]:
    """The final parameters and state, and the masks after every step."""
    masks = []
    for gradient in grads:
        params, state = step(params, state, gradient)
        masks.append(granet_jax.get_masks(state))
    return (params, state), masks


@functools.cache
def reference(name: str) -> tuple[Any, list[Any]]:
    params = make_params()
    state = transformation(name).init(params)
    return loop(step_of(name), params, state, make_grads())


@each_method
def test_a_run_compiles_once_and_transfers_nothing(name: str) -> None:
    traces = []
    params, grads = make_params(), make_grads()
    state = transformation(name).init(params)

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        traces.append(None)
        return make_step(transformation(name))(params, state, grads)

    with jax.transfer_guard("disallow"):
        final, masks = loop(step, params, state, grads)
    assert len(traces) == 1
    assert_same(final, reference(name)[0])
    # All other runs are compared with this one, so its masks must change.
    assert changes(masks) >= (0 if name == "static" else 3)


def test_the_transfer_guard_sees_a_transfer() -> None:
    step = jax.jit(lambda x: x + 1)
    with (
        jax.transfer_guard("disallow"),
        pytest.raises(Exception, match="Disallowed host-to-device transfer"),
    ):
        step(np.ones(3, np.float32))


@pytest.mark.parametrize(
    "name",
    [
        "granet_layer_random",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("set", "static")),
    ],
)
def test_a_traced_seed(name: str) -> None:
    """One program serves all seeds, and each seed has the masks it has untraced."""

    def make(seed: Any) -> Any:
        return granet_jax.transform(METHODS[name], INNER, seed=seed)

    @jax.jit
    def start(seed: Any, params: Any) -> Any:
        return make(seed).init(params)

    @jax.jit
    def step(seed: Any, params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        return make_step(make(seed))(params, state, grads)

    masks = []
    for seed in (0, 7):
        params, grads = make_params(), make_grads()
        expected = loop(
            compiled_step(make(seed)), params, make(seed).init(params), grads
        )
        traced = jnp.uint32(seed)
        with_seed = functools.partial(step, traced)
        found = loop(with_seed, params, start(traced, params), grads)
        assert_same(found, expected)
        masks.append(np.asarray(found[1][-1]["first"]["kernel"]))
    assert (start._cache_size(), step._cache_size()) == (1, 1)
    assert not np.array_equal(*masks)


@each_method
def test_scan(name: str) -> None:
    tx = transformation(name)
    params = make_params()
    expected, masks = reference(name)

    @jax.jit
    def run(params: Any, state: Any, grads: Any) -> Any:
        def body(carry: Any, gradient: Any) -> Any:
            carry = make_step(tx)(*carry, gradient)
            return carry, granet_jax.get_masks(carry[1])

        return jax.lax.scan(body, (params, state), grads)

    found, stacked = run(params, tx.init(params), stack(make_grads()))
    assert_same(found, expected)
    for index in range(STEPS):
        assert_same(at(stacked, index), masks[index])


@each_method
def test_vmap_over_seeds(name: str) -> None:
    seeds = (0, 1, 2)
    tx, method = transformation(name), METHODS[name]
    starts = list(map(make_params, seeds))
    states = [
        granet_jax.set_masks(
            tx.init(params), granet_jax.init_masks(method, params, seed=seed)
        )
        for seed, params in zip(seeds, starts, strict=True)
    ]
    grads = [make_grads(100 + seed) for seed in seeds]
    by_step = [stack(lanes) for lanes in zip(*grads, strict=True)]
    step = jax.jit(jax.vmap(make_step(tx)))
    (params, state), _ = loop(step, stack(starts), stack(states), by_step)
    for lane in range(len(seeds)):
        expected, _ = loop(step_of(name), starts[lane], states[lane], grads[lane])
        assert_same((at(params, lane), at(state, lane)), expected)
    kernels = params["first"]["kernel"]
    assert not np.array_equal(kernels[0], kernels[1])


def test_vmap_over_lanes_at_different_steps() -> None:
    # One lane updates its masks while the others do not.
    tx = transformation("granet")
    params = granet_jax.apply_masks(
        make_params(), granet_jax.get_masks(tx.init(make_params()))
    )
    grads = make_grads()[0]
    states = [tx.init(params)._replace(count=jnp.int32(n)) for n in (2, 3, 4)]
    step = jax.jit(jax.vmap(make_step(tx), in_axes=(None, 0, None)))
    found = step(params, stack(states), grads)
    for lane, state in enumerate(states):
        assert_same(at(found, lane), step_of("granet")(params, state, grads))
    active = [granet_jax.sparsity(at(found, i)[1].masks).active for i in range(3)]
    # Steps 3 and 5 are no updates, and the network is still dense.
    assert active[0] == active[2] == 88
    assert active[1] < 88


@each_method
def test_donated_buffers(name: str) -> None:
    tx = transformation(name)
    params, state = make_params(), tx.init(make_params())
    # Two leaves in one buffer could not both be donated.
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))]
    assert len(set(pointers)) == len(pointers)
    step = jax.jit(make_step(tx), donate_argnums=(0, 1))
    for gradient in make_grads():
        donated = (params, state)
        params, state = step(params, state, gradient)
        assert all(x.is_deleted() for x in jax.tree.leaves(donated))
    assert_same((params, state), reference(name)[0])


@each_method
def test_no_tracer_leaks(name: str) -> None:
    with jax.checking_leaks():
        tx = granet_jax.transform(METHODS[name], INNER)
        params, grads = make_params(), stack(make_grads()[:2])
        # A second trace would meet what the first one left behind.
        for _ in range(2):
            state = jax.jit(lambda p: tx.init(p))(params)

            @jax.jit
            def run(params: Any, state: Any, grads: Any) -> Any:
                def body(carry: Any, gradient: Any) -> Any:
                    return make_step(tx)(*carry, gradient), None

                return jax.lax.scan(body, (params, state), grads)[0]

            _, state = run(params, state, grads)
    assert state.count == 2


@each_method
def test_eager(name: str) -> None:
    # Four steps, two of which update the masks.
    tx = transformation(name)
    state = tx.init(make_params())
    assert_same(jax.jit(tx.init)(make_params()), state)
    grads = make_grads()[:4]
    found = loop(make_step(tx), make_params(), state, grads)
    assert_same(found, loop(step_of(name), make_params(), state, grads))
