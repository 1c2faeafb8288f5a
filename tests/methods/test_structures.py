"""Structures: selection against NumPy, random masks, devices, lanes and errors.

`test_methods` compares whole trainings with structures against the reference.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import granet_jax
from granet_jax import mask_sources, structured_selection, structures
from granet_jax.structures import Structure
from tests.helpers import numpy_reference
from tests.helpers.compiler_options import QUICK
from tests.helpers.fuzzing import MethodSpec, spec
from tests.helpers.training import at, make_step, stack
from tests.helpers.trees import assert_same

SHAPES = {"conv": (3, 3, 8, 4), "dense": (16, 6)}
FORMS = [
    # Boxes of few weights, of many weights, and boxes that are kept as a whole.
    *((spec("n_of_m", 2, 4), "float32"), (spec("n_of_m", 1, 2, axis=-1), "bfloat16")),
    (spec("n_of_m", 4, 8), "int32"),
    *((spec("constant_fan_in"), x) for x in ("float32", "bfloat16", "int32")),
    *((spec("channel", norm="l2"), "bfloat16"), (spec("block", 2, 2), "int32")),
    (spec("block", 4, 1), "float32"),
    # Weights (out, in, ...), as equinox has them.
    *((spec(x, axis=0), "float32") for x in ("constant_fan_in", "channel")),
]
# Means over boxes of different sizes are rounded, and ties across leaves with them.
ACROSS = [(spec("block", 4, 2), "float32"), (spec("block", 2, 2, norm="l2"), "float32")]


def draw(seed: int, shapes: Any = None) -> dict[str, np.ndarray]:
    """Few multiples of 1/8, so that scores tie."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.integers(-6, 7, shape) / 8).astype(np.float32)
        for name, shape in (shapes or SHAPES).items()
    }


def pair(form: MethodSpec, scope: str = "layer") -> tuple[Structure, Any]:
    """The structure, and the reference's method that selects by it."""
    ours, theirs = (
        getattr(module, form.function)(*form.args, **form.kwargs)
        for module in (structures, numpy_reference)
    )
    parts: Any = {"structure": theirs, "scope": scope, "distribution": "uniform"}
    return ours, numpy_reference.ReferenceMethod(start=0.5, **parts)


@pytest.mark.parametrize(
    ("form", "dtype", "scope"),
    [*((*case, "layer") for case in FORMS), *((*case, "global") for case in ACROSS)],
)
def test_select_as_numpy_does(form: MethodSpec, dtype: str, scope: Any) -> None:
    # There may be fewer candidates than `numbers`.
    ours, reference = pair(form, scope)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def select(scores: Any, numbers: Any, among: Any) -> Any:
        return structured_selection.select(
            ours, scores, numbers, among=among, scope=scope
        )

    for seed in range(4):
        rng = np.random.default_rng(seed)
        numbers = rng.integers(0, 21, 2 if scope == "layer" else 1, np.uint32)
        scores = [(8 * x).astype(dtype) for x in draw(seed).values()]
        among = [rng.random(s.shape) < (1.0 if ours.whole else 0.8) for s in scores]
        if dtype != "int32":
            scores = [np.where(s == 1, s.dtype.type("nan"), s) for s in scores]
        wide = [s.astype(np.float32) for s in scores]
        expected = reference.choose(wide, among, numbers)
        number = numbers if scope == "layer" else numbers[0]
        for mask, e in zip(select(scores, number, among), expected, strict=True):
            np.testing.assert_array_equal(mask, e)


@pytest.mark.parametrize("form", [FORMS[1][0], FORMS[7][0]])
def test_masks_at_random_and_by_magnitude(form: MethodSpec) -> None:
    structure, reference = pair(form)
    options: Any = {"distribution": "uniform", "structure": structure}
    method = granet_jax.static(0.5, **options)
    masks, other = (granet_jax.init_masks(method, draw(0), seed=s) for s in (1, 2))
    drawn = mask_sources.random(draw(0), 0.5, key=jax.random.key(0), **options)
    for actual in (masks, drawn):
        for mask in map(np.asarray, actual.values()):
            assert 2 * mask.sum() == mask.size
            sides = reference.structure.sides(mask.shape)
            rows = numpy_reference.boxed(mask, sides)
            size = rows.shape[1]
            allowed = {0, size} if structure.whole else {size // 2}
            assert set(rows.sum(axis=-1)) == allowed
    assert any(np.any(masks[name] != other[name]) for name in masks)
    largest = mask_sources.magnitude(draw(0), 0.5, scope="layer", structure=structure)
    sizes = [np.abs(p) for p in draw(0).values()]
    everywhere = [np.ones(p.shape, bool) for p in sizes]
    numbers = reference.numbers(list(SHAPES.values()), 0.5)
    expected = reference.choose(sizes, everywhere, numbers)
    for mask, e in zip(largest.values(), expected, strict=True):
        np.testing.assert_array_equal(mask, e)
    # `transform` checks masks that users pass.
    granet_jax.transform(method, masks=drawn).init(draw(0))
    drawn["dense"] = np.array(drawn["dense"])
    drawn["dense"][0, 0] ^= True
    with pytest.raises(ValueError, match="masks must have the structure"):
        granet_jax.transform(method, masks=drawn).init(draw(0))


@pytest.mark.parametrize(
    "method",
    [
        granet_jax.granet(
            *(0.75, 4),
            interval=1,
            end_step=2,
            scope="layer",
            distribution="uniform",
            structure=structures.constant_fan_in(),
        ),
        granet_jax.snfs(0.5, 8, interval=1, structure=structures.block(2, 2)),
    ],
    ids=lambda m: m.name,
)
def test_lanes_of_vmap_are_as_alone(method: granet_jax.Method) -> None:
    tx = granet_jax.transform(method, optax.sgd(0.25, momentum=0.5))

    def train(params: Any, grads: Any) -> Any:
        params, state = make_step(tx)(params, tx.init(params), grads)
        return params, granet_jax.get_masks(state)

    params, grads = ([draw(s + lane) for lane in (0, 1)] for s in (0, 2))
    stacked = stack(params), stack(grads)
    lanes = jax.jit(jax.vmap(train), compiler_options=QUICK)(*stacked)
    alone = jax.jit(train, compiler_options=QUICK)
    for i, row in enumerate(zip(params, grads, strict=True)):
        # Multiples of a power of two are not rounded: equal means equal to the bit.
        assert_same(at(lanes, i), alone(*row))


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
# Boxes of 8:16 are larger than the shard of a device.
PLACED = [
    (structures.block(2, 2), EXPLICIT, ["dense"]),
    (structures.n_of_m(8, 16), AUTO, ["conv"]),
    (structures.constant_fan_in(), EXPLICIT, ["conv"]),
]
SLOW = itertools.product(
    [*(case[0] for case in PLACED), structures.n_of_m(2, 4), structures.channel()],
    [AUTO, EXPLICIT],
    [["conv", "dense"]],
)


@pytest.mark.parametrize(
    ("structure", "kind", "names"),
    [*PLACED, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_on_eight_devices_as_on_one(
    structure: Structure, kind: AxisType, names: list[str]
) -> None:
    method = granet_jax.rigl(
        0.5, 8, interval=1, distribution="uniform", structure=structure
    )
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    specs = {"conv": P(None, None, "x", "y"), "dense": P("x", "y")}
    layout = {name: NamedSharding(mesh, specs[name]) for name in names}
    sizes = {"conv": (3, 3, 16, 8), "dense": (32, 16)}
    shapes = {name: sizes[name] for name in names}
    tx = granet_jax.transform(method, optax.sgd(0.25, momentum=0.5))
    step = jax.jit(make_step(tx), compiler_options=QUICK)

    def train(put: Any) -> Any:
        params: Any = put(draw(0, shapes))
        state: Any = tx.init(params)
        for seed in range(1, 5):
            grads = put(draw(seed, shapes))
            params, state = jax.block_until_ready(step(params, state, grads))
        masks = granet_jax.get_masks(state)
        # `transform` accepts sharded masks of the structure.
        granet_jax.transform(method, masks=masks).init(params)
        return params, masks

    alone = train(lambda tree: jax.tree.map(jnp.asarray, tree))
    with jax.set_mesh(mesh):
        shared = train(lambda tree: jax.device_put(tree, layout))
    for name in names:
        mask = shared[1][name]
        assert mask.sharding.is_equivalent_to(layout[name], mask.ndim)
        assert not np.all(mask)
    assert_same(jax.device_get(shared), jax.device_get(alone))


TWO_OF_FOUR, FAN_IN = structures.n_of_m(2, 4), structures.constant_fan_in()


@pytest.mark.parametrize(
    ("function", "args", "structure", "message"),
    [
        (granet_jax.gmp, (0.5, 1000), TWO_OF_FOUR, 'scope must be "layer" with 2:4'),
        (granet_jax.static, (0.9,), TWO_OF_FOUR, "sparsity must end at 0.5 for 2:4"),
        (granet_jax.static, (0.5,), TWO_OF_FOUR, 'distribution must be "uniform" for'),
        (granet_jax.snfs, (0.5, 1000), FAN_IN, "must be None, block or channel for"),
        (mask_sources.magnitude, (draw(0), 0.5), FAN_IN, 'scope must be "layer"'),
    ],
)
def test_arguments_that_do_not_fit(
    function: Any, args: Any, structure: Structure, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        function(*args, structure=structure)


@pytest.mark.parametrize(
    "structure",
    [structures.n_of_m(1, 4), structures.n_of_m(1, 4, axis=2), structures.block(4, 1)],
)
def test_shapes_that_do_not_divide(structure: Structure) -> None:
    params = {"head": {"kernel": np.ones((6, 8), np.float32)}}
    method = granet_jax.static(0.75, distribution="uniform", structure=structure)
    message = r"'head/kernel' has shape \(6, 8\): leave it out"
    with pytest.raises(ValueError, match=message):
        granet_jax.transform(method).init(params)
    with pytest.raises(ValueError, match=message):
        mask_sources.magnitude(params, 0.75, scope="layer", structure=structure)


@pytest.mark.parametrize("form", [structures.channel, structures.constant_fan_in])
def test_axes_of_outputs(form: Any) -> None:
    assert form(axis=0) == form(axis=0) != form()
    with pytest.raises(ValueError, match=r"along axis 4 needs leaves of such an axis"):
        mask_sources.magnitude(draw(0), 0.5, scope="layer", structure=form(axis=4))
