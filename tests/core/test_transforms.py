"""`transform` under JAX's transformations: jit, scan, vmap, donation, guards."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from tests.helpers.trees import assert_same

METHODS = {
    "granet": granet_jax.granet(0.8, 12, interval=2, end_step=6),
    "granet_layer": granet_jax.granet(
        0.8, 12, interval=2, end_step=6, scope="layer", grow="random"
    ),
    "gmp": granet_jax.gmp(0.8, 8, interval=2),
    "rigl": granet_jax.rigl(0.7, 12, interval=2),
    "set": granet_jax.set_(0.7, 12, interval=2),
    "snfs": granet_jax.snfs(0.7, 12, interval=2, decay=0.5),
    "static": granet_jax.static(0.7),
}
STEPS = 14
# Powers of two: whether a multiplication and an addition are fused into one rounding,
# which may differ between two compilations, makes no difference to the result.
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


def make_grads(seed: int = 1, steps: int = STEPS) -> Any:
    """Gradients of all steps, stacked."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=(steps, *p.shape)), p.dtype),
        make_params(),
    )


def at(stacked: Any, index: int) -> Any:
    return jax.tree.map(lambda x: x[index], stacked)


def make_step(tx: Any) -> Any:
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def transformation(name: str) -> Any:
    return granet_jax.transform(METHODS[name], INNER)


@functools.cache
def compiled_step(name: str) -> Any:
    return jax.jit(make_step(transformation(name)))


def loop(step: Any, params: Any, state: Any, grads: Any) -> tuple[Any, list[Any]]:
    """The final parameters and state of a host loop, and the masks of every step."""
    masks = []
    for index in range(STEPS):
        params, state = step(params, state, at(grads, index))
        masks.append(granet_jax.get_masks(state))
    return (params, state), masks


@functools.cache
def reference(name: str) -> tuple[Any, list[Any]]:
    """`loop` from the parameters and with the gradients of everywhere."""
    params = make_params()
    state = transformation(name).init(params)
    return loop(compiled_step(name), params, state, make_grads())


def changes(masks: list[Any]) -> int:
    """How often the masks differ from one step to the next."""
    return sum(
        any(
            not np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
        )
        for x, y in itertools.pairwise(masks)
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_run_compiles_once_and_transfers_nothing(name: str) -> None:
    tx = granet_jax.transform(METHODS[name], INNER)
    params, grads = make_params(), make_grads()
    state = tx.init(params)
    inputs = [at(grads, index) for index in range(STEPS)]
    traces = []

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        traces.append(None)
        return make_step(tx)(params, state, grads)

    masks = []
    # Tracing, compiling and running: no array crosses between host and device, but
    # for those that are fetched on purpose.
    with jax.transfer_guard("disallow"):
        for gradient in inputs:
            params, state = step(params, state, gradient)
            masks.append(granet_jax.get_masks(state))
    assert len(traces) == 1
    assert step._cache_size() == 1
    # The run was one worth counting: its masks moved.
    assert changes(masks) >= (0 if name == "static" else 3)


def test_transfer_guard_sees_a_transfer() -> None:
    step = jax.jit(lambda x: x + 1)
    with (
        jax.transfer_guard("disallow"),
        pytest.raises(Exception, match="Disallowed host-to-device transfer"),
    ):
        step(np.ones(3, np.float32))


@pytest.mark.parametrize("name", METHODS)
def test_no_callback_in_the_step(name: str) -> None:
    # A transfer guard cannot see a callback to the host; the program can.
    tx = granet_jax.transform(METHODS[name], INNER)
    params = make_params()
    state = tx.init(params)
    text = str(jax.make_jaxpr(make_step(tx))(params, state, params))
    assert "while" in text or name == "static"
    assert "callback" not in text
    assert "infeed" not in text


@pytest.mark.parametrize("name", ["set", "static", "granet_layer"])
def test_a_traced_seed_is_the_same_seed(name: str) -> None:
    """One compiled program serves all seeds, with the masks of each."""

    def make(seed: Any) -> Any:
        return granet_jax.transform(METHODS[name], INNER, seed=seed)

    @jax.jit
    def start(seed: Any, params: Any) -> Any:
        return make(seed).init(params)

    @jax.jit
    def step(seed: Any, params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        return make_step(make(seed))(params, state, grads)

    final = []
    for seed in (0, 7):
        params, grads = make_params(), make_grads()
        alone = jax.jit(make_step(make(seed)))
        expected, masks = loop(alone, params, make(seed).init(params), grads)
        state = start(jnp.uint32(seed), params)
        for index in range(STEPS):
            params, state = step(jnp.uint32(seed), params, state, at(grads, index))
            assert_same(granet_jax.get_masks(state), masks[index])
        assert_same((params, state), expected)
        final.append(np.asarray(state.masks["first"]["kernel"]))
    assert (start._cache_size(), step._cache_size()) == (1, 1)
    assert not np.array_equal(*final)


@pytest.mark.parametrize("name", METHODS)
def test_scan_equals_loop(name: str) -> None:
    tx = transformation(name)
    params, grads = make_params(), make_grads()
    expected, masks = reference(name)

    @jax.jit
    def run(params: Any, state: Any, grads: Any) -> Any:
        def body(carry: Any, gradient: Any) -> Any:
            carry = make_step(tx)(*carry, gradient)
            return carry, granet_jax.get_masks(carry[1])

        return jax.lax.scan(body, (params, state), grads)

    found, stacked = run(params, tx.init(params), grads)
    assert_same(found, expected)
    for index in range(STEPS):
        assert_same(at(stacked, index), masks[index])


@pytest.mark.parametrize("name", METHODS)
def test_vmap_over_seeds_equals_loop_over_seeds(name: str) -> None:
    seeds = (0, 1, 2)
    tx = transformation(name)
    starts, inputs, states = [], [], []
    for seed in seeds:
        params = make_params(seed)
        masks = granet_jax.init_masks(METHODS[name], params, seed=seed)
        starts.append(params)
        states.append(granet_jax.set_masks(tx.init(params), masks))
        inputs.append(make_grads(100 + seed))
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    params, state, grads = stack(starts), stack(states), stack(inputs)
    step = jax.jit(jax.vmap(make_step(tx)))
    for index in range(STEPS):
        params, state = step(
            params, state, jax.tree.map(lambda g, i=index: g[:, i], grads)
        )
    for lane in range(len(seeds)):
        given = (starts[lane], states[lane], inputs[lane])
        expected, _ = loop(compiled_step(name), *given)
        assert_same((at(params, lane), at(state, lane)), expected)
    # The lanes are different runs.
    assert not np.array_equal(
        params["first"]["kernel"][0], params["first"]["kernel"][1]
    )


def test_vmap_of_lanes_at_different_steps() -> None:
    # One lane updates its masks while the other does not.
    tx = transformation("granet")
    params = granet_jax.apply_masks(
        make_params(), granet_jax.get_masks(tx.init(make_params()))
    )
    grads = at(make_grads(), 0)
    counts = (2, 3, 4)
    states = [tx.init(params)._replace(count=jnp.int32(count)) for count in counts]
    both = jax.tree.map(lambda *x: jnp.stack(x), *states)
    vmapped = jax.jit(jax.vmap(make_step(tx), in_axes=(None, 0, None)))
    single = compiled_step("granet")
    found = vmapped(params, both, grads)
    for lane, state in enumerate(states):
        assert_same(at(found, lane), single(params, state, grads))
    active = [granet_jax.sparsity(at(found, i)[1].masks).active for i in range(3)]
    assert active[0] == active[2] == 88  # Steps 3 and 5: still dense.
    assert active[1] < 88


@pytest.mark.parametrize("name", METHODS)
def test_donated_buffers(name: str) -> None:
    tx = transformation(name)
    grads = make_grads()
    params, state = make_params(), tx.init(make_params())
    step = jax.jit(make_step(tx), donate_argnums=(0, 1))
    for index in range(STEPS):
        given = (params, state)
        params, state = step(params, state, at(grads, index))
        assert all(x.is_deleted() for x in jax.tree.leaves(given))
    assert_same((params, state), reference(name)[0])


def test_no_buffer_is_held_twice() -> None:
    # Two leaves of a state in one buffer cannot both be donated.
    for method in METHODS.values():
        params = make_params()
        state = granet_jax.transform(method, INNER).init(params)
        pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))]
        assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("name", METHODS)
def test_no_tracer_leaks(name: str) -> None:
    with jax.checking_leaks():
        tx = granet_jax.transform(METHODS[name], INNER)
        params = make_params()
        grads = make_grads(steps=2)
        # Twice, with a new trace each: what the first left behind would show.
        for _ in range(2):
            state = jax.jit(lambda p: tx.init(p))(params)

            @jax.jit
            def run(params: Any, state: Any, grads: Any) -> Any:
                def body(carry: Any, gradient: Any) -> Any:
                    return make_step(tx)(*carry, gradient), None

                return jax.lax.scan(body, (params, state), grads)[0]

            _, state = run(params, state, grads)
    assert state.count == 2


@pytest.mark.parametrize("name", METHODS)
def test_eager_equals_jit(name: str) -> None:
    # Outside jit the step takes another path through the code; two updates of it.
    tx = transformation(name)
    params, grads = make_params(), make_grads()
    state = tx.init(params)
    expected = (params, state)
    step, compiled = make_step(tx), compiled_step(name)
    found = expected
    for index in range(4):
        found = step(*found, at(grads, index))
        expected = compiled(*expected, at(grads, index))
    assert_same(found, expected)


def test_init_under_jit_equals_eager() -> None:
    for method in METHODS.values():
        tx = granet_jax.transform(method, INNER)
        assert_same(jax.jit(tx.init)(make_params()), tx.init(make_params()))


@pytest.mark.parametrize("name", METHODS)
def test_step_counter_saturates(name: str) -> None:
    largest = 2**31 - 1
    params = make_params()
    state = transformation(name).init(params)._replace(count=jnp.int32(largest - 2))
    masks = state.masks
    step = compiled_step(name)
    for expected in (largest - 1, largest, largest, largest):
        params, state = step(params, state, at(make_grads(), 0))
        assert state.count == expected
        assert state.count.dtype == jnp.int32
        # Long after the last update the masks stay as they are.
        assert_same(state.masks, masks)


def test_updates_near_the_largest_step() -> None:
    # The last update of a schedule that fills the whole range of the counter.
    largest = 2**31 - 1
    method = granet_jax.gmp(0.5, largest - 1, begin_step=0, interval=(largest - 1) // 2)
    tx = granet_jax.transform(method, INNER)
    params = make_params()
    step = jax.jit(make_step(tx))
    state = tx.init(params)._replace(count=jnp.int32(largest - 3))
    params, state = step(params, state, at(make_grads(), 0))
    assert granet_jax.sparsity(state.masks).active == 88
    params, state = step(params, state, at(make_grads(), 1))
    assert state.count == largest - 1
    assert granet_jax.sparsity(state.masks).active == 44
    params, state = step(params, state, at(make_grads(), 2))
    assert granet_jax.sparsity(state.masks).active == 44
