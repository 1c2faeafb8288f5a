"""A run on eight devices is the run on one, to the bit, however it is sharded."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import granet_jax
from granet_jax import structures
from tests.helpers import own_methods
from tests.helpers.layouts import (
    DEVICES,
    LAYOUTS,
    SHAPES,
    SMALL,
    WEIGHTS,
    Collective,
    collectives,
    exact_parameters,
    gradient_batch,
    mean_gradient,
)
from tests.helpers.training import at, changes, compiled_step, make_step
from tests.helpers.trees import assert_same

# All numbers are powers of two, so that fusing a product into a sum rounds nothing.
INNER = optax.sgd(0.125, momentum=0.5)
PLAIN_STEPS, OTHER_STEPS = 9, 3
PLAIN = {
    "prune and exchange": own_methods.prune_and_exchange(2, 8),
    "gmp": granet_jax.gmp(0.8, 8, interval=2),
    "rigl": granet_jax.rigl(0.75, 12, interval=2),
    "static": granet_jax.static(0.75),
}
# Structures, and a method that keeps pruned weights. (`tests/methods` has others.)
OTHERS = {
    "straight_through 2:4": granet_jax.straight_through(
        0.5, 1, interval=1, structure=structures.n_of_m(2, 4)
    ),
    "granet channel": granet_jax.granet(
        *(0.5, 4),
        interval=1,
        end_step=2,
        scope="layer",
        distribution="uniform",
        structure=structures.channel(),
    ),
}
METHODS = PLAIN | OTHERS


def host_masks(seed: int, density: float) -> Any:
    """Random masks as NumPy arrays, with the density in every leaf."""
    rng = np.random.default_rng(seed)

    def draw(p: Any) -> np.ndarray:
        return rng.permutation(p.size).reshape(p.shape) < density * p.size

    masks = jax.tree.map(draw, exact_parameters())
    masks["dense"]["bias"] = optax.MaskedNode()
    return masks


@functools.cache
def make_transform(name: str) -> Any:
    """The transformation; plain methods start from masks that compile nothing."""
    method = METHODS[name]
    masks = host_masks(99, 1 - method.sparsity(0)) if name in PLAIN else None
    return granet_jax.transform(method, INNER, masks=masks)


@functools.cache
def reference(name: str) -> list[Any]:
    """Parameters and state after every step on one device, as NumPy arrays."""
    tx = make_transform(name)
    params = jax.tree.map(jnp.asarray, exact_parameters())
    state = tx.init(params)
    step, states = compiled_step(tx), []
    for index in range(PLAIN_STEPS if name in PLAIN else OTHER_STEPS):
        params, state = step(params, state, mean_gradient(index))
        states.append(jax.device_get((params, state)))
    # Runs are worth comparing with this one only if its masks change.
    number = changes([state.masks for _, state in states])
    assert number >= 1 if name in OTHERS else number == (0 if name == "static" else 4)
    return states


def assert_every_shard_same(found: Any, expected: Any) -> None:
    """Every device holds its part of `expected`, to the bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (e.shape, e.dtype)
        assert len(x.addressable_shards) == DEVICES
        for shard in x.addressable_shards:
            assert np.asarray(shard.data).tobytes() == e[shard.index].tobytes()


def assert_sharded_like(tree: Any, params: Any) -> None:
    """The arrays of `tree` are sharded as the parameters at their places."""

    def check(x: Any, p: Any) -> None:
        if not isinstance(x, optax.MaskedNode):
            assert x.sharding.is_equivalent_to(p.sharding, p.ndim)

    is_dense = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    jax.tree.map(check, tree, params, is_leaf=is_dense)


def assert_state_sharded_like(state: Any, params: Any) -> None:
    """Masks, moments and the average gradient are sharded as their parameters."""
    trees = (state.masks, state.average or state.masks, state.inner_state[0].trace)
    for tree in trees:
        assert_sharded_like(tree, params)


# --- The reference run ------------------------------------------------------------


def test_ties_between_devices_decide_in_the_reference() -> None:
    # Which weights the first update keeps depends on the order of equal scores that lie
    # on several devices.
    grads = [mean_gradient(index)["dense"]["kernel"] for index in (0, 1)]
    (params, _), (_, state) = reference("gmp")[:2]
    stepped = params["dense"]["kernel"] - 0.125 * (grads[1] + 0.5 * grads[0])
    assert_tie_decides(np.abs(stepped), state.masks["dense"]["kernel"])

    (_, old), (_, new) = reference("rigl")[:2]
    old, new = (s.masks["dense"]["kernel"] for s in (old, new))
    assert_tie_decides(np.where(old, np.nan, np.abs(grads[1])), new)


def assert_tie_decides(scores: np.ndarray, chosen: np.ndarray) -> None:
    """The lowest chosen score occurs on three devices, and is not always chosen."""
    least = np.nanmin(scores[chosen])
    rows, columns = np.nonzero(scores == least)
    assert len(set(rows // (scores.shape[0] // DEVICES))) >= 3
    assert set(chosen[rows, columns]) == {False, True}
    assert np.nanmax(scores[~chosen]) == least


# --- Data parallelism -------------------------------------------------------------


def test_pmap() -> None:
    tx = make_transform("rigl")

    @functools.partial(jax.pmap, axis_name="data")
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        return make_step(tx)(params, state, jax.lax.pmean(grads, "data"))

    params = exact_parameters()
    params, state = jax.tree.map(
        lambda x: np.stack([np.asarray(x)] * DEVICES), (params, tx.init(params))
    )
    # Compiled ahead of time, the step accepts arrays on the host and on devices.
    compiled = step.lower(params, state, gradient_batch(0)).compile()
    for index, expected in enumerate(reference("rigl")):
        params, state = jax.block_until_ready(
            compiled(params, state, gradient_batch(index))
        )
        replicas = jax.device_get((params, state))
        for replica in range(DEVICES):
            assert_same(at(replicas, replica), expected)


def check_data_parallel(name: str, mesh: Any, step: Any) -> None:
    """Replicated parameters, and a batch of one gradient per device."""
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    params = jax.device_put(exact_parameters(), everywhere)
    state = jax.device_put(make_transform(name).init(params), everywhere)
    batch = jax.device_put(gradient_batch(0), split)
    compiled = step.lower(params, state, batch).compile()
    # The devices exchange the mean gradient and nothing else.
    found = collectives(compiled.as_text())
    assert {c.kind for c in found} == {"all-reduce"}
    assert sum(sum(c.sizes) for c in found) == WEIGHTS
    for index, expected in enumerate(reference(name)):
        batch = jax.device_put(gradient_batch(index), split)
        params, state = jax.block_until_ready(compiled(params, state, batch))
        assert_every_shard_same((params, state), expected)


def test_shard_map() -> None:
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))

    # Tracing checks that the results are the same on all devices.
    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        grads = jax.lax.pmean(at(batch, 0), "data")
        return make_step(make_transform("gmp"))(params, state, grads)

    check_data_parallel("gmp", mesh, step)


def loss(params: Any, batch: Any) -> jax.Array:
    """Linear in the parameters, so its gradient is the mean over the batch."""
    products = jax.tree.map(lambda p, b: jnp.sum(p[None] * b), params, batch)
    return sum(jax.tree.leaves(products)) / DEVICES


@pytest.mark.parametrize(
    ("name", "kind"),
    [("prune and exchange", AxisType.Auto), ("gmp", AxisType.Explicit)],
)
def test_jit_of_a_sharded_batch(name: str, kind: AxisType) -> None:
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        grads = jax.grad(loss)(params, batch)
        return make_step(make_transform(name))(params, state, grads)

    with jax.set_mesh(mesh):
        check_data_parallel(name, mesh, step)


# --- Sharded parameters -----------------------------------------------------------

CASES = [
    *(("prune and exchange", "auto_2d"), ("prune and exchange", "explicit_2d")),
    *(("rigl", "auto_1d"), ("gmp", "explicit_1d"), ("static", "explicit_2d")),
    *(("straight_through 2:4", "auto_2d"), ("granet channel", "explicit_2d")),
]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_sharded_parameters(name: str, layout: str) -> None:
    where, tx = LAYOUTS[layout], make_transform(name)
    with where.context():
        params, grads = where.place(exact_parameters()), where.place(mean_gradient(0))
        state = tx.init(params)
        step: Any = jax.jit(make_step(tx)).lower(params, state, grads).compile()
    assert_state_sharded_like(state, params)
    for index, expected in enumerate(reference(name)):
        before = params
        grads = where.place(mean_gradient(index))
        params, state = jax.block_until_ready(step(params, state, grads))
        assert_every_shard_same((params, state), expected)
        assert_sharded_like(params, before)
        assert_state_sharded_like(state, before)
    if name in PLAIN:
        # The devices exchange counts for every leaf: of each device, or their sums.
        sent = collectives(step.as_text())
        assert bool(sent) == (name != "static")
        assert {c.kind for c in sent} <= {"all-reduce", "all-gather"}
        assert all(sum(c.sizes) <= SMALL for c in sent)
        for leaf in ("conv", "dense"):
            part = math.prod(SHAPES[leaf]["kernel"]) // DEVICES
            shards = params[leaf]["kernel"].addressable_shards
            assert {math.prod(s.data.shape) for s in shards} == {part}
            assert part > SMALL


def test_a_sort_would_move_parameters() -> None:
    # The check of collectives above can fail.
    @jax.jit
    def select(score: jax.Array) -> jax.Array:
        order = jnp.argsort(score, axis=0)
        return jnp.argsort(order, axis=0) < 20

    score = LAYOUTS["auto_2d"].place(exact_parameters())["dense"]["kernel"]
    found = collectives(select.lower(score).compile().as_text())
    assert any(c.kind != "all-reduce" and sum(c.sizes) > SMALL for c in found)


def test_parser_of_collectives() -> None:
    program = """
      %all-reduce.1 = u32[2]{0} all-reduce(%x), channel_id=1, to_apply=%add
      %all-reduce.2 = (u32[], /*index=5*/f32[3,4]{1,0}) all-reduce(%x, %y)
      %start = (f32[8,32]{1,0}, f32[64,32]{1,0}) all-gather-start(%z), dimensions={0}
      %done = f32[64,32]{1,0} all-gather-done(%start)
      %permute = pred[7]{0} collective-permute(%m), source_target_pairs={{0,1}}
      ROOT %a2a = bf16[2,3]{1,0} all-to-all(%b), metadata={op_name="all-reduce(x)"}
    """
    assert collectives(program) == [
        Collective("all-reduce", (2,)),
        Collective("all-reduce", (1, 12)),
        Collective("all-gather", (256, 2048)),
        Collective("collective-permute", (7,)),
        Collective("all-to-all", (6,)),
    ]


# --- Masks ------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["auto_1d", "explicit_2d"])
def test_initial_masks_do_not_depend_on_devices(layout: str) -> None:
    where, method = LAYOUTS[layout], PLAIN["prune and exchange"]
    expected = granet_jax.init_masks(method, exact_parameters())
    with where.context():
        params = where.place(exact_parameters())
        state = granet_jax.transform(method, INNER).init(params)
        counts = granet_jax.sparsity(state.masks)
    assert_state_sharded_like(state, params)
    assert_every_shard_same(state.masks, jax.device_get(expected))
    assert counts == granet_jax.sparsity(expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_of_the_host(layout: str) -> None:
    """Masks given as NumPy arrays are sharded as the parameters."""
    where, masks = LAYOUTS[layout], host_masks(5, 0.5)
    expected = granet_jax.apply_masks(exact_parameters(), masks)
    with where.context():
        params = where.place(exact_parameters())
        tx = granet_jax.transform(PLAIN["gmp"], INNER, masks=masks)
        given = tx.init(params)
        other = granet_jax.transform(PLAIN["gmp"], INNER).init(params)
        replaced = granet_jax.set_masks(other, masks)
        masked = granet_jax.apply_masks(params, masks)
        packed = granet_jax.pack_masks(given.masks)
        unpacked = granet_jax.unpack_masks(packed)
    for state in (given, replaced):
        assert_every_shard_same(state.masks, masks)
        assert_state_sharded_like(state, params)
    assert_every_shard_same(masked, jax.device_get(expected))
    assert_sharded_like(masked, params)
    assert_same(jax.device_get(packed), jax.device_get(granet_jax.pack_masks(masks)))
    assert_same(jax.device_get(unpacked), masks)
