"""Structures: selection against NumPy, random masks, devices, lanes and errors.

`test_methods` compares whole trainings with structures against the reference.
"""

import dataclasses
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import granet_jax
from granet_jax import mask_sources, structures
from granet_jax.structures import Structure
from tests.helpers import numpy_reference
from tests.helpers.compiler_options import QUICK
from tests.helpers.trees import assert_same

SHAPES = {"conv": (3, 3, 8, 4), "dense": (16, 6)}
FORMS: list[tuple[Any, ...]] = [
    ("n_of_m", 2, 4),
    ("n_of_m", 1, 2, -1),
    ("n_of_m", 4, 8),
    ("constant_fan_in",),
    ("channel",),
    ("block", 2, 2),
    ("block", 4, 1),
]


def draw(seed: int, shapes: Any = None) -> dict[str, np.ndarray]:
    """Few multiples of 1/8, so that scores tie."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.integers(-6, 7, shape) / 8).astype(np.float32)
        for name, shape in (shapes or SHAPES).items()
    }


def pair(form: str, *sides: Any, norm: str = "l1") -> tuple[Structure, Any]:
    """The structure, and the reference's method that selects by it."""
    if form in ("block", "channel"):
        ours = getattr(structures, form)(*sides, norm=norm)
        theirs = getattr(numpy_reference, form)(*sides, norm=norm)
    else:
        options = {"axis": sides[2]} if len(sides) == 3 else {}
        ours = getattr(structures, form)(*sides[:2], **options)
        theirs = getattr(numpy_reference, form)(*sides[:2], **options)
    return ours, numpy_reference.ReferenceMethod(start=0.5, structure=theirs)


@hypothesis.given(
    st.sampled_from(FORMS),
    st.sampled_from(["float32", "bfloat16", "int32"]),
    st.lists(st.integers(0, 20), min_size=2, max_size=2),
    st.integers(0, 10**6),
)
@hypothesis.settings(max_examples=20)
def test_select_as_numpy_does(form: Any, dtype: str, numbers: Any, seed: int) -> None:
    # Within leaves; there may be fewer candidates than `numbers`.
    ours, reference = pair(*form)
    reference = dataclasses.replace(reference, scope="layer")
    rng = np.random.default_rng(seed)
    scores = [(8 * x).astype(dtype) for x in draw(seed).values()]
    among = [rng.random(s.shape) < (1.0 if ours.whole else 0.8) for s in scores]
    if dtype != "int32":
        scores = [np.where(s == 1, s.dtype.type("nan"), s) for s in scores]
    actual = structures.select(
        ours,
        [jnp.asarray(s) for s in scores],
        numbers,
        among=[jnp.asarray(m) for m in among],
        scope="layer",
    )
    wide = [s.astype(np.float32) for s in scores]
    for mask, expected in zip(
        actual, reference.choose(wide, among, numbers), strict=True
    ):
        np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("norm", structures.NORMS)
@pytest.mark.parametrize("form", [("block", 4, 2), ("block", 2, 2), ("channel",)])
def test_whole_boxes_by_their_norm(form: Any, norm: str) -> None:
    ours, reference = pair(*form, norm=norm)
    params = draw(3)
    # Means over boxes of different sizes are rounded, and ties across leaves with them.
    scope: Any = "layer" if form == ("channel",) else "global"
    reference = dataclasses.replace(reference, scope=scope, distribution="uniform")
    masks = mask_sources.magnitude(params, 0.6, scope=scope, structure=ours)
    sizes = [np.abs(p) for p in params.values()]
    everywhere = [np.ones(s.shape, bool) for s in sizes]
    numbers = reference.numbers(list(SHAPES.values()), 0.6)
    expected = reference.choose(sizes, everywhere, numbers)
    for actual, mask in zip(masks.values(), expected, strict=True):
        np.testing.assert_array_equal(actual, mask)


@pytest.mark.parametrize("form", FORMS[:2] + FORMS[3:6], ids=str)
def test_random_masks(form: Any) -> None:
    structure, reference = pair(*form)
    sides = reference.structure.sides
    method = granet_jax.static(0.5, distribution="uniform", structure=structure)
    masks, other = (granet_jax.init_masks(method, draw(0), seed=s) for s in (1, 2))
    drawn = mask_sources.random(
        draw(0), 0.5, key=jax.random.key(0), distribution="uniform", structure=structure
    )
    for actual in (masks, drawn):
        for mask in map(np.asarray, actual.values()):
            assert 2 * mask.sum() == mask.size
            rows = numpy_reference.boxed(mask, sides(mask.shape))
            size = rows.shape[1]
            allowed = {0, size} if structure.whole else {size // 2}
            assert set(rows.sum(axis=-1)) == allowed
    assert any(np.any(masks[name] != other[name]) for name in masks)
    # `transform` checks masks that users pass.
    granet_jax.transform(method, masks=drawn).init(draw(0))
    spoilt = {**drawn, "dense": drawn["dense"].at[0, 0].set(~drawn["dense"][0, 0])}
    with pytest.raises(ValueError, match="masks must have the structure"):
        granet_jax.transform(method, masks=spoilt).init(draw(0))


@pytest.mark.parametrize(
    "method",
    [
        granet_jax.granet(
            0.75,
            4,
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
        state: Any = tx.init(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), granet_jax.get_masks(state)

    params, grads = ([draw(s + lane) for lane in (0, 1)] for s in (0, 2))
    stacked = [jax.tree.map(lambda *x: np.stack(x), *rows) for rows in (params, grads)]
    lanes = jax.jit(jax.vmap(train), compiler_options=QUICK)(*stacked)
    alone = jax.jit(train, compiler_options=QUICK)
    for i, (start, row) in enumerate(zip(params, grads, strict=True)):
        # Multiples of a power of two are not rounded: equal means equal to the bit.
        assert_same(jax.tree.map(lambda x, i=i: x[i], lanes), alone(start, row))


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
# Boxes of 8:16 are larger than the shard of a device.
PLACED = [
    (structures.block(2, 2), EXPLICIT),
    (structures.n_of_m(8, 16), AUTO),
    (structures.constant_fan_in(), EXPLICIT),
]
PLACED_SLOW = [
    *((structures.n_of_m(2, 4), kind) for kind in (AUTO, EXPLICIT)),
    *((structures.channel(), kind) for kind in (AUTO, EXPLICIT)),
    (structures.block(2, 2), AUTO),
    (structures.n_of_m(8, 16), EXPLICIT),
    (structures.constant_fan_in(), AUTO),
]


@pytest.mark.parametrize(
    ("structure", "kind"),
    [*PLACED, *(pytest.param(*case, marks=pytest.mark.slow) for case in PLACED_SLOW)],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_on_eight_devices_as_on_one(structure: Structure, kind: AxisType) -> None:
    method = granet_jax.rigl(
        0.5, 8, interval=1, distribution="uniform", structure=structure
    )
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    specs = {"conv": P(None, None, "x", "y"), "dense": P("x", "y")}
    layout = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    shapes = {"conv": (3, 3, 16, 8), "dense": (32, 16)}
    tx = granet_jax.transform(method, optax.sgd(0.25, momentum=0.5))
    update = jax.jit(tx.update, compiler_options=QUICK)

    def train(put: Any) -> Any:
        params: Any = put(draw(0, shapes))
        state: Any = tx.init(params)
        for seed in range(1, 5):
            grads = put(draw(seed, shapes))
            updates, state = jax.block_until_ready(update(grads, state, params))
            params = optax.apply_updates(params, updates)
        masks = granet_jax.get_masks(state)
        # `transform` accepts sharded masks of the structure.
        granet_jax.transform(method, masks=masks).init(params)
        return params, masks

    alone = train(lambda tree: jax.tree.map(jnp.asarray, tree))
    shared = train(lambda tree: jax.device_put(tree, layout))
    assert shared[1]["dense"].sharding.is_equivalent_to(layout["dense"], 2)
    assert not np.all(alone[1]["dense"])
    assert_same(jax.device_get(shared), jax.device_get(alone))


def test_fill_takes_the_best_of_the_inactive() -> None:
    mask = jnp.asarray([[True], [False], [False], [False]])
    score = jnp.asarray([[0.0], [1.0], [2.0], [2.0]])
    (filled,) = structures.fill(
        structures.n_of_m(2, 4), [mask], [score], [jnp.asarray(2)], ((),)
    )
    assert filled.ravel().tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: granet_jax.gmp(0.5, 1000, structure=structures.n_of_m(2, 4)),
            'scope must be "layer" with 2:4',
        ),
        (
            lambda: granet_jax.static(0.9, structure=structures.n_of_m(2, 4)),
            "sparsity must end at 0.5 for 2:4",
        ),
        (
            lambda: granet_jax.static(0.5, structure=structures.n_of_m(2, 4)),
            'distribution must be "uniform" for 2:4',
        ),
        (
            lambda: granet_jax.snfs(0.5, 1000, structure=structures.constant_fan_in()),
            "structure must be None, block or channel for snfs",
        ),
        (
            lambda: mask_sources.magnitude(
                draw(0), 0.5, structure=structures.constant_fan_in()
            ),
            'scope must be "layer"',
        ),
        (lambda: structures.block(), "shape must be of positive sides"),
        (lambda: structures.n_of_m(4, 4), "n must be at least 1 and below"),
    ],
)
def test_arguments_that_do_not_fit(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


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
def test_outputs_on_the_first_axis(form: Any) -> None:
    # Weights (out, in, ...), as equinox has them: the transposed masks of flax kernels.
    shapes = {"dense": (8, 12), "conv": (6, 4, 3, 3)}
    rng = np.random.default_rng(0)
    params = {k: np.float32(rng.normal(size=s)) for k, s in shapes.items()}
    kernels = {k: np.moveaxis(p, 0, -1) for k, p in params.items()}
    first, last = (
        mask_sources.magnitude(p, 0.5, scope="layer", structure=form(axis=axis))
        for p, axis in ((params, 0), (kernels, -1))
    )
    for name, mask in first.items():
        np.testing.assert_array_equal(mask, np.moveaxis(last[name], -1, 0))
        inputs = np.asarray(mask).reshape(len(mask), -1).sum(1)
        size = mask[0].size
        assert set(inputs) == ({0, size} if form is structures.channel else {size // 2})
    assert form(axis=0) == form(axis=0) != form()
    with pytest.raises(ValueError, match=r"along axis 4 needs leaves of such an axis"):
        mask_sources.magnitude(params, 0.5, scope="layer", structure=form(axis=4))
