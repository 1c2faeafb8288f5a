"""Which leaves a search reads as one array, and that each stays itself there."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from granet_jax import selection, stacks
from tests.helpers import oracle


def leaves_of(arrays: Any) -> list[list[int]]:
    """The leaves of each stack, from the types that arrays have under `jit`."""
    found: list[list[int]] = []

    def look(arrays: Any) -> None:
        made = stacks.stacks_of([jax.typeof(x) for x in arrays])
        found.extend(stack.leaves for stack in made)

    jax.eval_shape(look, arrays)
    return found


def test_leaves_of_one_shape_are_a_stack() -> None:
    shapes = [(2, 3), (3, 2), (2, 3), (), (6,), (), (2, 3), (0, 4), (0, 4)]
    arrays = [jnp.zeros(shape) for shape in shapes]
    assert leaves_of(arrays) == [[0, 2, 6], [1], [3, 5], [4], [7, 8]]


def test_large_leaves_are_not_stacked() -> None:
    shapes = [(2, 2**13), (1, 2**14 + 1), (2, 2**13), (1, 2**14 + 1)]
    assert leaves_of([jnp.zeros(shape) for shape in shapes]) == [[0, 2], [1], [3]]


def placed(mesh: jax.sharding.Mesh, specs: list[P]) -> list[jax.Array]:
    zeros = jnp.zeros((8, 8))
    return [jax.device_put(zeros, NamedSharding(mesh, spec)) for spec in specs]


SPECS = [P("x", "y"), P("y", "x"), P("x"), P("x", "y"), P(), P("x", None)]


def test_on_explicit_axes_those_sharded_alike() -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    found = leaves_of(placed(mesh, SPECS))
    assert found == [[0, 3], [1], [2, 5], [4]]


@pytest.mark.parametrize("context", [False, True], ids=["", "a mesh is set"])
@pytest.mark.parametrize("other", [AxisType.Auto, AxisType.Explicit])
def test_on_auto_axes_none(other: AxisType, *, context: bool) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto, other))
    if not context:
        specs = [P("x"), P(None, "x"), P("x")]
        assert leaves_of(placed(mesh, specs)) == [[0], [1], [2]]
        return
    with jax.set_mesh(mesh):
        assert leaves_of([np.zeros((8, 8), np.float32)] * 3) == [[0], [1], [2]]


def test_on_an_auto_axis_of_two_devices_none() -> None:
    mesh = jax.make_mesh((2, 1), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    assert leaves_of(placed(mesh, [P("x"), P(None, "x")])) == [[0], [1]]


def test_on_auto_axes_of_one_device_as_on_none() -> None:
    mesh = jax.make_mesh((1, 1), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    assert leaves_of(placed(mesh, SPECS)) == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("scope", selection.SCOPES)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_selections_are_those_of_leaves(kind: AxisType, scope: selection.Scope) -> None:
    """Some stacked, some not: in the order of the leaves, ties across them also."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    rng = np.random.default_rng(0)
    values = [rng.integers(0, 3, (8, 8)).astype(np.float32) for _ in SPECS]
    arrays = [
        jax.device_put(value, NamedSharding(mesh, spec))
        for value, spec in zip(values, SPECS, strict=True)
    ]
    candidates = [np.ones((8, 8), bool) for _ in values]
    for k in (0, 1, 30, 63) if scope == "layer" else (0, 1, 100, 200, 383):
        found = jax.block_until_ready(selection.top_k(arrays, k, scope=scope))
        if scope == "layer":
            expected = oracle.best_per_leaf(values, candidates, [k] * len(values))
        else:
            expected = oracle.best_across(values, candidates, k)
        for ours, theirs, array in zip(found, expected, arrays, strict=True):
            np.testing.assert_array_equal(ours, theirs)
            if kind == AxisType.Explicit:
                assert ours.sharding.is_equivalent_to(array.sharding, 2)


def test_a_pass_is_as_many_kernels_as_there_are_shapes() -> None:
    def reductions(leaves: int) -> int:
        shapes = [(16, 8), (32,)] * leaves
        scores = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        wanted = jax.ShapeDtypeStruct((), jnp.uint32)
        text = selection.top_k.lower(scores, wanted, scope="layer").as_text()
        return text.count("stablehlo.reduce")

    assert reductions(1) > 0
    assert len({reductions(n) for n in (1, 2, 7)}) == 1


def test_leaves_of_another_kind_or_dtype_are_another_stack() -> None:
    like = [jax.typeof(jnp.zeros((2, 3), jnp.int8))] * 5
    like[3] = jax.typeof(jnp.zeros((2, 3), bool))
    made = stacks.stacks_of(like, ["a", "b", "a", "a", "b"])
    assert [stack.leaves for stack in made] == [[0, 2], [1, 4], [3]]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_what_is_stacked_is_found_again(kind: AxisType) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    rng = np.random.default_rng(0)
    values = [rng.normal(size=(8, 8)) for _ in SPECS] + [rng.normal(size=3)] * 2
    places = [NamedSharding(mesh, spec) for spec in [*SPECS, P(), P()]]
    arrays = jax.device_put(values, places)

    @jax.jit
    def again(arrays: list[jax.Array]) -> tuple[Any, Any]:
        made = stacks.stacks_of([jax.typeof(x) for x in arrays])
        together = stacks.stacked(made, arrays)
        for stack, x in zip(made, together, strict=True):
            blank = stacks.blank(stack, jnp.int8)
            assert x.shape == blank.shape == (len(stack.leaves), *stack.like.shape)
            if kind == AxisType.Explicit:
                assert jax.typeof(x).sharding == jax.typeof(blank).sharding
        return together, stacks.unstacked(made, together)

    _, found = jax.block_until_ready(again(arrays))
    for ours, theirs, array in zip(found, values, arrays, strict=True):
        np.testing.assert_array_equal(ours, np.asarray(array))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        if kind == AxisType.Explicit:
            assert ours.sharding.is_equivalent_to(array.sharding, ours.ndim)


def test_large_leaves_of_one_shape_take_a_byte_a_score() -> None:
    shapes = [(256, 256)] * 6
    scores = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    wanted = jax.ShapeDtypeStruct((), jnp.uint32)
    compiled = selection.top_k.lower(scores, wanted, scope="global").compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    size = sum(map(math.prod, shapes))
    assert size <= memory.temp_size_in_bytes < 1.1 * size
