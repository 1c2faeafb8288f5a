"""The same run, to the bit, however its arrays are spread over eight devices."""

import contextlib
import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import granet_jax
from tests.helpers.trees import assert_same, is_shape

# Powers of two wherever a product is added to something: whether both are fused into
# one rounding, which may differ between two compilations, makes no difference.
METHODS = {
    "granet": granet_jax.granet(0.8, 12, interval=2, end_step=6),
    "granet_layer": granet_jax.granet(0.8, 12, interval=2, end_step=6, scope="layer"),
    "gmp": granet_jax.gmp(0.8, 8, interval=2),
    "rigl": granet_jax.rigl(0.75, 12, interval=2),
    "set": granet_jax.set_(0.75, 12, interval=2),
    "snfs": granet_jax.snfs(0.75, 12, interval=2, decay=0.5),
    "static": granet_jax.static(0.75),
}
INNER = optax.sgd(0.125, momentum=0.5)
STEPS = 9
DEVICES = 8
# Every leaf with a mask divides by all the meshes below, and a device's share of it is
# above `SMALL`, so that moving one between devices cannot pass for a vector of counts.
SHAPES = {
    "conv": {"kernel": (3, 3, 8, 16)},
    "dense": {"bias": (32,), "kernel": (64, 32)},
}
SMALL = 64
WEIGHTS = 3 * 3 * 8 * 16 + 32 + 64 * 32


class Layout(NamedTuple):
    """A mesh and how the parameters lie on it."""

    mesh: tuple[int, ...]
    kind: AxisType
    conv: P
    kernel: P
    bias: P

    def make_mesh(self) -> jax.sharding.Mesh:
        names = ("x", "y")[: len(self.mesh)]
        return jax.make_mesh(self.mesh, names, axis_types=(self.kind,) * len(names))

    def place(self, tree: Any) -> Any:
        mesh = self.make_mesh()
        specs = {
            "conv": {"kernel": self.conv},
            "dense": {"bias": self.bias, "kernel": self.kernel},
        }
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        return jax.device_put(tree, shardings)

    def context(self) -> Any:
        """What the mesh's kind asks for: Auto axes work without a mesh in context."""
        if self.kind == AxisType.Auto:
            return contextlib.nullcontext()
        return jax.set_mesh(self.make_mesh())


ONE = (P(None, None, None, "x"), P("x", None), P("x"))
TWO = (P(None, None, "x", "y"), P("y", "x"), P(("x", "y")))
LAYOUTS = {
    "auto_1d": Layout((8,), AxisType.Auto, *ONE),
    "auto_2d": Layout((4, 2), AxisType.Auto, *TWO),
    "explicit_1d": Layout((8,), AxisType.Explicit, *ONE),
    "explicit_2d": Layout((4, 2), AxisType.Explicit, *TWO),
}
# Compiling is what takes time: all methods on two axes, GraNet on one as well.
CASES = [
    (name, layout)
    for name in METHODS
    for layout in LAYOUTS
    if layout.endswith("2d") or name == "granet"
]


def on_grid(seed: int, most: int, *lead: int) -> Any:
    """Multiples of 1/16 up to `most` of them: sums are exact in any order."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: (
            rng.integers(-most, most + 1, size=(*lead, *shape)).astype("f4") / 16
        ),
        SHAPES,
        is_leaf=is_shape,
    )


def make_params() -> Any:
    return on_grid(0, 32)


def make_batch(step: int) -> Any:
    """A gradient for each of the devices, stacked.

    Of so few values that many a weight ties with weights on other devices.
    """
    return on_grid(1 + step, 2, DEVICES)


def mean_grads(step: int) -> Any:
    return jax.tree.map(lambda g: g.mean(axis=0, dtype=g.dtype), make_batch(step))


def make_step(tx: Any) -> Callable[..., Any]:
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def loss(params: Any, batch: Any) -> jax.Array:
    """Linear in the parameters: its gradient is the mean over the batch."""
    products = jax.tree.map(lambda p, b: jnp.sum(p[None] * b), params, batch)
    count = jax.tree.leaves(batch)[0].shape[0]
    return sum(jax.tree.leaves(products)) / count


@functools.cache
def make_transform(name: str) -> Any:
    """The method's transformation; initial masks by NumPy, which compiles nothing."""
    method, params = METHODS[name], make_params()
    rng = np.random.default_rng(99)
    active = 1 - method.sparsity(0)
    masks = jax.tree.map(lambda p: rng.random(p.shape) < active, params)
    masks["dense"]["bias"] = None
    return granet_jax.transform(method, INNER, masks=masks)


@functools.cache
def reference(name: str) -> list[Any]:
    """Parameters and state after every step on one device, as NumPy arrays."""
    tx = make_transform(name)
    params = jax.tree.map(jnp.asarray, make_params())
    state = tx.init(params)
    step = jax.jit(make_step(tx))
    states = []
    for index in range(STEPS):
        params, state = step(params, state, mean_grads(index))
        states.append(jax.device_get((params, state)))
    return states


def assert_every_shard_same(found: Any, expected: Any) -> None:
    """Every device's part of every array has the bits of that part of `expected`."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (e.shape, e.dtype)
        assert len(x.addressable_shards) == DEVICES
        for shard in x.addressable_shards:
            part = np.asarray(shard.data)
            assert part.tobytes() == e[shard.index].tobytes()


def assert_placed_like_params(params: Any, state: Any) -> None:
    """Masks, moments and accumulators have the shardings of their parameters."""
    (trace, _) = state.inner_state
    for masked in (state.masks, state.accumulator or state.masks):
        pairs = [
            (params["conv"]["kernel"], masked["conv"]["kernel"]),
            (params["dense"]["kernel"], masked["dense"]["kernel"]),
        ]
        for p, m in pairs:
            assert m.sharding.is_equivalent_to(p.sharding, p.ndim)
    for p, m in zip(jax.tree.leaves(params), jax.tree.leaves(trace), strict=True):
        assert m.sharding.is_equivalent_to(p.sharding, p.ndim)


class Collective(NamedTuple):
    kind: str
    sizes: tuple[int, ...]  # elements of every array it yields on a device


def collectives(program: str) -> list[Collective]:
    """All communication between devices in a compiled program's text."""
    kinds = (
        "all-gather|all-reduce|all-to-all|ragged-all-to-all|collective-permute"
        "|collective-broadcast|reduce-scatter|send|recv"
    )
    found = []
    for types, kind in re.findall(
        rf"= ([^=]*?) ({kinds})(?:-start)?\(", program.replace("/*index=", "/*")
    ):
        shapes = re.findall(r"[a-z]+\d*\[([\d,]*)\]", types)
        sizes = tuple(
            math.prod(int(n) for n in shape.split(",") if n) for shape in shapes
        )
        assert sizes, types
        found.append(Collective(kind, sizes))
    return found


@pytest.mark.parametrize("name", METHODS)
def test_reference_changes_its_masks(name: str) -> None:
    # What the other tests compare with is a run worth comparing with.
    states = [state for _, state in reference(name)]
    changed = sum(
        any(
            not np.array_equal(x, y)
            for x, y in zip(
                jax.tree.leaves(a.masks), jax.tree.leaves(b.masks), strict=True
            )
        )
        for a, b in itertools.pairwise(states)
    )
    assert changed == (0 if name == "static" else 4)


def test_ties_between_devices_decide_in_the_reference() -> None:
    # Whom the first update chooses is a matter of order among equal scores that lie on
    # several devices of the first layout.
    grads = [mean_grads(index)["dense"]["kernel"] for index in (0, 1)]
    (params, _), (_, state) = reference("gmp")[:2]
    stepped = params["dense"]["kernel"] - 0.125 * (grads[1] + 0.5 * grads[0])
    assert_tie_decides(np.abs(stepped), state.masks["dense"]["kernel"])

    (_, old), (_, new) = reference("rigl")[:2]
    old, new = (s.masks["dense"]["kernel"] for s in (old, new))
    assert_tie_decides(np.where(old, np.nan, np.abs(grads[1])), new)


def assert_tie_decides(scores: np.ndarray, chosen: np.ndarray) -> None:
    """The least score chosen occurs on three devices, not everywhere chosen."""
    least = np.nanmin(scores[chosen])
    rows, columns = np.nonzero(scores == least)
    assert len(set(rows // (scores.shape[0] // DEVICES))) >= 3
    assert set(chosen[rows, columns]) == {False, True}
    assert np.nanmax(scores[~chosen]) == least


@pytest.mark.parametrize("name", METHODS)
def test_pmap_equals_one_device(name: str) -> None:
    tx = make_transform(name)

    @functools.partial(jax.pmap, axis_name="data")
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        return make_step(tx)(params, state, jax.lax.pmean(grads, "data"))

    params = make_params()
    params, state = jax.tree.map(
        lambda x: np.stack([np.asarray(x)] * DEVICES), (params, tx.init(params))
    )
    # Compiled once: arrays of the host and those of a step before are placed alike.
    compiled = step.lower(params, state, make_batch(0)).compile()
    for index in range(STEPS):
        batch = make_batch(index)
        params, state = jax.block_until_ready(compiled(params, state, batch))
        replicas = jax.device_get((params, state))
        for replica in range(DEVICES):
            mine = jax.tree.map(lambda x, r=replica: x[r], replicas)
            assert_same(mine, reference(name)[index])


@pytest.mark.parametrize("name", ["granet", "snfs"])
def test_shard_map_equals_one_device(name: str) -> None:
    tx = make_transform(name)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))

    # That the results are the same on all devices is checked when this is traced.
    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        grads = jax.lax.pmean(jax.tree.map(lambda g: g[0], batch), "data")
        return make_step(tx)(params, state, grads)

    check_data_parallel(name, tx, mesh, step)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[(name, AxisType.Auto) for name in METHODS],
        ("granet", AxisType.Explicit),
    ],
)
def test_data_parallel_jit_equals_one_device(name: str, kind: AxisType) -> None:
    tx = make_transform(name)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        return make_step(tx)(params, state, jax.grad(loss)(params, batch))

    with jax.set_mesh(mesh):
        check_data_parallel(name, tx, mesh, step)


def check_data_parallel(name: str, tx: Any, mesh: Any, step: Any) -> None:
    """Replicated parameters, and a batch of one gradient per device."""
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    params = jax.device_put(make_params(), everywhere)
    state = jax.device_put(tx.init(params), everywhere)
    batch = jax.device_put(make_batch(0), split)
    compiled = step.lower(params, state, batch).compile()
    # The gradient mean is all that the devices tell each other.
    found = collectives(compiled.as_text())
    assert {c.kind for c in found} == {"all-reduce"}
    assert sum(sum(c.sizes) for c in found) == WEIGHTS
    for index in range(STEPS):
        batch = jax.device_put(make_batch(index), split)
        params, state = jax.block_until_ready(compiled(params, state, batch))
        assert_every_shard_same((params, state), reference(name)[index])


@functools.cache
def compiled_step(name: str, layout: str) -> Any:
    """The compiled step, with the first parameters and state it was compiled for."""
    where = LAYOUTS[layout]
    tx = make_transform(name)
    with where.context():
        params, grads = where.place(make_params()), where.place(mean_grads(0))
        state = tx.init(params)
        step = jax.jit(make_step(tx)).lower(params, state, grads).compile()
    return step, params, state


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_sharded_equals_one_device(name: str, layout: str) -> None:
    step, params, state = compiled_step(name, layout)
    assert_placed_like_params(params, state)
    for index in range(STEPS):
        before = params
        grads = LAYOUTS[layout].place(mean_grads(index))
        params, state = jax.block_until_ready(step(params, state, grads))
        assert_every_shard_same((params, state), reference(name)[index])
        assert_placed_like_params(before, state)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_sharded_step_moves_counts_only(name: str, layout: str) -> None:
    step, params, _ = compiled_step(name, layout)
    for leaf in ("conv", "dense"):
        (share,) = {
            math.prod(s.data.shape) for s in params[leaf]["kernel"].addressable_shards
        }
        assert SMALL < share == math.prod(SHAPES[leaf]["kernel"]) // DEVICES
    found = collectives(step.as_text())
    # Of every leaf the counts of three thresholds: all devices' shares, or their sum.
    assert bool(found) == (name != "static")
    assert {c.kind for c in found} <= {"all-reduce", "all-gather"}
    assert all(sum(c.sizes) <= SMALL for c in found)


@pytest.mark.parametrize("layout", ["auto_1d", "auto_2d"])
def test_a_sort_would_move_parameters(layout: str) -> None:
    # What the test above must be able to see.
    @jax.jit
    def select(score: jax.Array) -> jax.Array:
        order = jnp.argsort(score, axis=0)
        return jnp.argsort(order, axis=0) < 20

    where = LAYOUTS[layout]
    with where.context():
        score = where.place(make_params())["dense"]["kernel"]
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


@pytest.mark.parametrize("layout", ["auto_1d", "explicit_2d"])
def test_initial_masks_are_those_of_one_device(layout: str) -> None:
    where = LAYOUTS[layout]
    method = METHODS["snfs"]
    expected = granet_jax.init_masks(method, make_params())
    with where.context():
        params = where.place(make_params())
        state = granet_jax.transform(method, INNER).init(params)
        masks = state.masks
        counts = granet_jax.sparsity(masks)
        masked = granet_jax.apply_masks(params, masks)
    assert_placed_like_params(params, state)
    assert_every_shard_same(masks, jax.device_get(expected))
    assert counts == granet_jax.sparsity(expected)
    assert_every_shard_same(
        masked, jax.device_get(granet_jax.apply_masks(make_params(), expected))
    )


def test_a_run_may_move_from_one_mesh_to_another() -> None:
    # Two steps on each of the layouts, in turn.
    name = "granet"
    _, params, state = compiled_step(name, "auto_1d")
    for index in range(STEPS):
        layout = tuple(LAYOUTS)[index // 2 % len(LAYOUTS)]
        step, _, _ = compiled_step(name, layout)
        (places, _) = step.input_shardings
        grads = mean_grads(index)
        params, state, grads = jax.device_put(
            jax.device_get((params, state, grads)), places
        )
        params, state = jax.block_until_ready(step(params, state, grads))
        assert_every_shard_same((params, state), reference(name)[index])


def host_masks() -> Any:
    """Random masks as NumPy arrays."""
    rng = np.random.default_rng(5)
    masks = jax.tree.map(lambda p: rng.random(p.shape) < 0.5, make_params())
    masks["dense"]["bias"] = optax.MaskedNode()
    return masks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_given_masks_of_the_host(layout: str) -> None:
    where = LAYOUTS[layout]
    tx = granet_jax.transform(METHODS["granet"], INNER, masks=host_masks())
    with where.context():
        params = where.place(make_params())
        state = tx.init(params)
    assert_every_shard_same(state.masks, host_masks())
    assert_placed_like_params(params, state)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_set_masks_of_the_host(layout: str) -> None:
    where = LAYOUTS[layout]
    with where.context():
        params = where.place(make_params())
        state = granet_jax.transform(METHODS["granet"], INNER).init(params)
        state = granet_jax.set_masks(state, host_masks())
    assert_placed_like_params(params, state)
    assert_every_shard_same(state.masks, host_masks())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_apply_masks_of_the_host(layout: str) -> None:
    where = LAYOUTS[layout]
    with where.context():
        params = where.place(make_params())
        masked = granet_jax.apply_masks(params, host_masks())
    expected = granet_jax.apply_masks(make_params(), host_masks())
    assert_every_shard_same(masked, jax.device_get(expected))
    for p, m in zip(jax.tree.leaves(params), jax.tree.leaves(masked), strict=True):
        assert m.sharding.is_equivalent_to(p.sharding, p.ndim)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_masks_pack(layout: str) -> None:
    where = LAYOUTS[layout]
    expected = jax.device_get(granet_jax.pack_masks(host_masks()))
    with where.context():
        placed = where.place(make_params())
        placed["dense"]["bias"] = optax.MaskedNode()
        masks = jax.tree.map(
            lambda m, p: jax.device_put(m, p.sharding), host_masks(), placed
        )
        packed = granet_jax.pack_masks(masks)
        assert_same(jax.device_get(packed), expected)
        assert_same(jax.device_get(granet_jax.unpack_masks(packed)), host_masks())
