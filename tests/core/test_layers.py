"""A leaf that stacks layers behaves as its layers do, each a leaf of its own."""

import functools
import warnings
from collections.abc import Callable
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
from benchmarks.tools import parameter_trees
from granet_jax import analysis, layers, mask_sources, masking, structures
from granet_jax.methods.dsr import Reallocate
from tests.helpers import own_methods
from tests.helpers.layouts import collectives
from tests.helpers.training import make_step
from tests.helpers.trees import assert_same

# A layer by itself, layers along a later axis, and layers along two axes.
SHAPES = {"a": (16, 16), "b": (16, 2, 16), "c": (2, 8, 2, 16)}
STACKED = {"b": -2, "c": (0, 2)}
STEPS = 6
METHODS = {
    "every phase": own_methods.prune_and_exchange(
        2, 4, floor=0.05, more=(Reallocate(0.1, 0.05),)
    ),
    "block": granet_jax.granet(
        *(0.8, STEPS),
        initial_sparsity=0.5,
        interval=2,
        scope="layer",
        grow="random",
        structure=structures.block(2, 2),
    ),
    "fan-in": granet_jax.rigl(
        0.5, STEPS, interval=2, structure=structures.constant_fan_in(axis=0)
    ),
    "dense fan-in": granet_jax.top_kast(
        0.75, backward_sparsity=0.5, structure=structures.constant_fan_in()
    ),
}


def values(seed: int) -> dict[str, np.ndarray]:
    """Multiples of 1/8, of which many are equal."""
    rng = np.random.default_rng(seed)
    return {n: (rng.integers(-8, 9, s) / 8).astype("f4") for n, s in SHAPES.items()}


def parameters() -> dict[str, np.ndarray]:
    """Layers of different scales, which one threshold would not treat alike."""
    params = values(0)
    params["b"][:, 0] /= 8
    params["c"][1] /= 8
    return params


apart = jax.jit(lambda tree: analysis.by_layer(tree, STACKED))


def train(
    name: str, view: Any = lambda tree: tree, *, place: Any = None, **options: Any
) -> tuple[Any, str]:
    """The masks and the parameters after training, and the program of a step."""
    tx = granet_jax.transform(
        METHODS[name], optax.sgd(0.125, momentum=0.5), seed=3, **options
    )
    place = place or (lambda tree: tree)
    params = place(view(parameters()))
    state = place(jax.jit(tx.init)(view(parameters())))
    step = jax.jit(make_step(tx)).lower(params, state, params).compile()
    for count in range(1, STEPS + 1):
        after = step(params, state, place(view(values(count))))
        params, state = place(jax.device_get(after))
    return (granet_jax.get_masks(state), params), step.as_text() or ""


trained_apart = functools.cache(lambda name: train(name, apart)[0])


@pytest.mark.parametrize("name", METHODS)
def test_training_is_that_of_the_layers_apart(name: str) -> None:
    (masks, params), _ = train(name, stacked=STACKED, packed=name == "every phase")
    assert_same((apart(masks), apart(params)), trained_apart(name))


def loss(params: Any, batch: Any) -> Any:
    return sum(jnp.sum(jnp.cos(batch * x)) for x in jax.tree.leaves(params))


KEY = {"key": jax.random.key(1)}
SOURCES: dict[str, Callable[..., Any]] = {
    "random": lambda p, **stacked: mask_sources.random(p, 0.7, **KEY, **stacked),
    "magnitude": lambda p, **stacked: mask_sources.magnitude(
        p, 0.7, scope="layer", structure=structures.channel(), **stacked
    ),
    "snip": lambda p, **stacked: mask_sources.snip(
        loss, p, [np.float32(1.5)], 0.7, rounds=2, scope="layer", **stacked
    ),
    "shuffle": lambda p, **stacked: mask_sources.shuffle(
        jax.tree.map(lambda x: np.abs(x) > 0.7, p), **KEY, **stacked
    ),
    "ticket": lambda p, **stacked: (
        list(
            mask_sources.lottery_tickets(
                lambda params, masks, key: params,
                p,
                rounds=2,
                scope="layer",
                **KEY,
                **stacked,
            )
        )[-1].masks
    ),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_mask_sources_are_those_of_the_layers_apart(source: Callable[..., Any]) -> None:
    params = jax.tree.map(lambda x: x + np.float32(1 / 16), parameters())
    together = source(params, stacked=STACKED)
    assert_same(apart(together), source(apart(params)))


# A stack axis of "c" is divided among devices, and other axes of the others.
SPECS = {"a": P("x", None), "b": P("y", None, None), "c": P("x", None, None, "y")}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_training_is_that_on_one_device(kind: Any) -> None:
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))
    like = {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, SPECS[name])
        )
        for name, shape in SHAPES.items()
    }

    def place(tree: Any) -> Any:
        found = parameter_trees.place_like(tree, like)
        return jax.device_put(tree, jax.tree.map(lambda x: x.sharding, found))

    with jax.set_mesh(mesh):
        found, program = train("every phase", place=place, stacked=STACKED)
    found = jax.device_get(found)
    assert_same(tuple(map(apart, found)), trained_apart("every phase"))
    # Devices send at most six numbers for each of the seven layers. A device's part of
    # a leaf is larger.
    for collective in collectives(program):
        assert sum(collective.sizes) <= 6 * 7, collective


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
        nn.MultiHeadDotProductAttention(num_heads=4), jnp.ones((2, 5, 16))
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


def zeros(shapes: Any) -> Any:
    return jax.tree.map(np.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize(
    ("shapes", "warned"),
    [
        *(pytest.param(x, False, id=name) for name, x in SINGLE.items()),
        *(pytest.param(x, True, id=name) for name, x in SEVERAL.items()),
    ],
)
def test_several_layers_in_one_array_warn(shapes: Any, warned: bool) -> None:
    params = shapes() if callable(shapes) else zeros(shapes)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        masking.maskable(params)
        # Not where the user says that there are none.
        masking.maskable(params, stacked={})
    assert ["several layers in one array" in str(w.message) for w in found] == (
        [True] * warned
    )


def test_which_leaves_are_masked_does_not_count_stack_axes() -> None:
    params = {"w": np.ones((3, 4, 4)), "v": np.ones((3, 4))}
    assert masking.maskable(params, stacked={"": 0}) == {"w": True, "v": False}


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
    grouped: dict[str, Any] = {
        "distribution": "uniform",
        "structure": structures.n_of_m(2, 4),
    }
    shape: Any
    for stacked, shape, options, message in [
        ({"q": 0}, (2, 8, 4), {}, "'q', which is found in no name"),
        (lambda name, x: 7, (2, 8), {}, r"gives 7 for 'w' of shape \(2, 8\)"),
        ({"w": 1}, (3, 4, 4), grouped, r"layers of shape \(3, 4\)"),
    ]:
        tx = granet_jax.transform(granet_jax.static(0.5, **options), stacked=stacked)
        with pytest.raises(ValueError, match=message):
            tx.init({"w": np.ones(shape)})
