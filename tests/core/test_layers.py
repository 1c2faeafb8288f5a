"""A leaf that stacks layers behaves as its layers do, each a leaf of its own."""

import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import granet_jax
from granet_jax import analysis, layers, mask_sources, masking, structures
from tests.helpers.layouts import collectives
from tests.helpers.trees import assert_same, normal

# Layers along the first axis, along a later one, and along two axes.
SHAPES = {"a": (8, 8), "b": (2, 8, 4), "c": (8, 2, 4), "d": (2, 4, 2, 8)}
STACKED = {"b": 0, "c": -2, "d": (0, 2)}
STEPS = 6
METHODS = {
    "granet block": granet_jax.granet(
        0.8,
        STEPS,
        initial_sparsity=0.5,
        interval=2,
        scope="layer",
        grow="random",
        structure=structures.block(2, 2),
    ),
    "granet floor": granet_jax.granet(0.9, STEPS, interval=2, floor=0.05),
    "snfs": granet_jax.snfs(0.8, STEPS, interval=2),
    "dsr": granet_jax.dsr(0.8, STEPS, interval=2, fraction=0.1),
    "rigl fan-in": granet_jax.rigl(
        0.5, STEPS, interval=2, structure=structures.constant_fan_in()
    ),
    "cyclical fan-in": granet_jax.cyclical(
        0.5,
        STEPS,
        cycles=1,
        interval=2,
        scope="layer",
        structure=structures.constant_fan_in(axis=0),
    ),
    "top_kast": granet_jax.top_kast(0.8, backward_sparsity=0.5, scope="layer"),
}


def parameters() -> dict[str, Any]:
    shapes = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in SHAPES.items()}
    params = normal(shapes, seed=0)
    # Layers of different scales, which one threshold would not treat alike.
    scales = {"b": np.float32([1, 0.1])[:, None, None], "c": np.float32([[0.1], [1]])}
    return {
        name: jnp.asarray(np.asarray(p) * scales.get(name, np.float32(1)))
        for name, p in params.items()
    }


def gradient(params: Any, step: int) -> Any:
    """A gradient with many equal values."""
    return jax.tree.map(lambda p: jnp.round(jnp.sin(37 * p + step), 1), params)


def train(method: Any, params: Any, stacked: Any, packed: bool = False) -> Any:
    """The masks and the parameters after training."""
    inner = optax.sgd(0.125, momentum=0.5)
    tx = granet_jax.transform(method, inner, seed=3, stacked=stacked, packed=packed)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(STEPS):
        updates, state = update(gradient(params, step), state, params)
        params = optax.apply_updates(params, updates)
        jax.block_until_ready(params)  # Collectives on virtual devices need it.
    return granet_jax.get_masks(state), params


@pytest.mark.parametrize("name", METHODS)
def test_training_is_that_of_the_layers_apart(name: str) -> None:
    params = parameters()
    together = train(METHODS[name], params, STACKED, packed=name == "snfs")
    apart = train(METHODS[name], analysis.by_layer(params, STACKED), None)
    assert_same([analysis.by_layer(x, STACKED) for x in together], list(apart))


def loss(params: Any, batch: Any) -> Any:
    return sum(jnp.sum(jnp.cos(batch * x)) for x in jax.tree.leaves(params))


SOURCES = {
    "random": lambda p, s: mask_sources.random(
        p, 0.7, key=jax.random.key(1), stacked=s
    ),
    "magnitude": lambda p, s: mask_sources.magnitude(
        p, 0.7, scope="layer", structure=structures.channel(), stacked=s
    ),
    "snip": lambda p, s: mask_sources.snip(
        loss, p, [np.float32(1.5)], 0.7, rounds=2, scope="layer", stacked=s
    ),
    "shuffle": lambda p, s: mask_sources.shuffle(
        mask_sources.magnitude(p, 0.7, on_collapse="ignore"),
        jax.random.key(1),
        stacked=s,
    ),
    "ticket": lambda p, s: (
        list(
            mask_sources.lottery_tickets(
                lambda params, masks, key: params,
                p,
                rounds=2,
                scope="layer",
                key=jax.random.key(1),
                stacked=s,
            )
        )[-1].masks
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_mask_sources_are_those_of_the_layers_apart(name: str) -> None:
    params = parameters()
    together = SOURCES[name](params, STACKED)
    apart = SOURCES[name](analysis.by_layer(params, STACKED), None)
    assert_same(analysis.by_layer(together, STACKED), apart)


# The stack axis of "b" is divided among devices, and other axes of the others.
SPECS = {
    "a": P("x", None),
    "b": P("x", None, "y"),
    "c": P("y", None, None),
    "d": P(None, "y", None, "x"),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", ["granet floor", "snfs"])
def test_sharded_training_is_that_on_one_device(name: str, kind: Any) -> None:
    params = parameters()
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        placed = {
            key: jax.device_put(p, NamedSharding(mesh, SPECS[key]))
            for key, p in params.items()
        }
        sharded = jax.device_get(train(METHODS[name], placed, STACKED))
        tx = granet_jax.transform(METHODS[name], optax.sgd(0.1), stacked=STACKED)
        state = tx.init(placed)
        program = jax.jit(tx.update).lower(placed, state, placed).compile()
    assert_same(sharded, jax.device_get(train(METHODS[name], params, STACKED)))
    # Devices send at most four numbers for each of the nine layers, and no weights.
    for collective in collectives(program.as_text()):
        assert sum(collective.sizes) <= 4 * 9, collective


class Block(nn.Module):
    """A dense layer and a norm, as a step of a scan."""

    @nn.compact
    def __call__(self, x: Any, _: None) -> tuple[Any, None]:
        """Apply the block."""
        return nn.LayerNorm()(nn.Dense(x.shape[-1])(x)), None


def flax_shapes(module: nn.Module, *inputs: Any) -> Any:
    """The shapes of a module's parameters."""
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def scanned() -> Any:
    """The shapes of four blocks in one array, and of a head."""
    scan = nn.scan(
        Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4
    )
    layers = flax_shapes(scan(), jnp.ones((2, 8)), None)
    return {"layers": layers, "head": {"kernel": jnp.ones((8, 3))}}


SINGLE = {
    "attention": lambda: flax_shapes(
        nn.MultiHeadDotProductAttention(num_heads=4, use_bias=True),
        jnp.ones((2, 5, 16)),
    ),
    "a convolution of equinox, of one pixel": {
        "weight": (6, 4, 1, 1),
        "bias": (6, 1, 1),
    },
    "norms": {"w": (4, 8), "a": {"scale": (8,)}, "b": {"scale": (1, 8)}},
    "a bias of another module": {"a": {"w": (5, 4, 8)}, "b": {"bias": (5, 4)}},
    "not a bias": {"w": (5, 4, 8), "table": (5, 4)},
    "another number of layers": {"w": (4, 8, 4), "bias": (5, 4)},
    "another number of outputs": {"w": (5, 8, 6), "bias": (5, 4)},
}
SEVERAL = {
    "scan": scanned,
    "linear layers of equinox": {"weight": (5, 4, 8), "bias": (5, 4)},
    "nnx": {"kernel": {"value": (5, 8, 2)}, "bias": {"value": (5, 2)}},
    "several kernels": {"w": (5, 8, 4), "v": (3, 3, 8), "b": (5, 4)},
    "heads of one number": {"w": (5, 8, 1, 4), "bias": (5, 1, 4)},
    "norms": {"w": (4, 8), "scale": (2, 8)},
}


@pytest.mark.parametrize(
    ("shapes", "warned"),
    [
        *(pytest.param(x, False, id=name) for name, x in SINGLE.items()),
        *(pytest.param(x, True, id=name) for name, x in SEVERAL.items()),
    ],
)
def test_several_layers_in_one_array_warn(shapes: Any, warned: bool) -> None:
    if callable(shapes):
        params = shapes()
    else:
        params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        masking.maskable(params)
        # Not where the user says that there are none.
        masking.maskable(params, stacked={})
    assert ["several layers in one array" in str(w.message) for w in found] == (
        [True] * warned
    )


def test_erk_sees_the_layers_of_a_scan() -> None:
    stacked = {"layers/": 0}
    method = granet_jax.rigl(0.9, 100, interval=10)
    masks = granet_jax.init_masks(method, scanned(), stacked=stacked)
    # Only kernels carry masks.
    kernels = [(8, 3), *[(8, 8)] * 4]
    expected = granet_jax.distributions.counts(kernels, 0.9, "erk")
    found = analysis.by_layer(masks, stacked)
    assert [int(m.sum()) for m in jax.tree.leaves(found)] == expected


def test_which_leaves_are_masked_does_not_count_stack_axes() -> None:
    params = {"layers": {"w": jnp.ones((3, 4, 4)), "v": jnp.ones((3, 4))}}
    masks = granet_jax.init_masks(granet_jax.static(0.5), params, stacked={"layers": 0})
    assert isinstance(masks["layers"]["v"], optax.MaskedNode)


def test_collapse_names_the_layer() -> None:
    weights = {"w": jnp.asarray([np.full((4, 4), 1.0), np.full((4, 4), 0.1)])}
    with pytest.warns(UserWarning, match="no active weight is left at 'w/1'"):
        masks = mask_sources.magnitude(weights, 0.6, stacked={"w": 0})

    def apply(params: Any, x: Any) -> Any:
        for i in range(2):
            x = jax.nn.relu(x @ params["w"][i])
        return x

    found = mask_sources.collapse(
        masks, apply_fn=apply, params=weights, inputs=jnp.ones((1, 4)), stacked={"w": 0}
    )
    assert found == mask_sources.Collapse(("w/1",), connected=False)


def test_flops_of_a_scan() -> None:
    shapes = {"first": (16, 8), "layers": (3, 8, 8)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}

    def apply(params: Any, x: Any) -> Any:
        step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        return jax.lax.scan(step, x @ params["first"], params["layers"])[0]

    def apply_apart(params: Any, x: Any) -> Any:
        x = x @ params["first"]
        for i in range(3):
            x = jnp.tanh(x @ params["layers"][str(i)])
        return x

    method = granet_jax.rigl(0.8, 100, interval=10)
    stacked = {"layers": 0}
    apart = analysis.by_layer(params, stacked)
    ratios = []
    for tree, run, stacks in ((params, apply, stacked), (apart, apply_apart, None)):
        masks = granet_jax.init_masks(method, tree, stacked=stacks)
        flops = analysis.flops(run, tree, masks, jnp.ones((1, 16)))
        ratios.append(analysis.training_flops(method, 100, flops, stacked=stacks))
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-12)


def test_axes_come_in_rising_order_and_once() -> None:
    leaf = jnp.ones((2,) * 9)
    assert layers.stack_axes({"w": (8, 1, -1)}, "w", leaf) == (1, 8)


def test_errors() -> None:
    params, method = parameters(), granet_jax.static(0.5)
    with pytest.raises(ValueError, match="'q', which is found in no name"):
        granet_jax.transform(method, stacked={"q": 0}).init(params)
    with pytest.raises(ValueError, match=r"gives 7 for 'b' of shape \(2, 8, 4\)"):
        granet_jax.transform(method, stacked=lambda name, x: 7).init({"b": params["b"]})
    grouped = granet_jax.static(
        0.5, distribution="uniform", structure=structures.n_of_m(2, 4)
    )
    with pytest.raises(ValueError, match=r"layers of shape \(3, 4\)"):
        granet_jax.transform(grouped, stacked={"w": 1}).init({"w": jnp.ones((3, 4, 4))})
