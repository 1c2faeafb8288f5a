"""Optimizer steps as the compiler for TPUs makes them. No TPU is needed."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

import granet_jax
from benchmarks import scale
from benchmarks.tools import parameter_trees
from experiments.reports import compiled_programs, topologies

pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation")

# A quarter of each mask is larger than a chip's fast memory. Smaller arrays are copied
# to it before they are read.
TREE = {
    "conv": {"kernel": (3, 3, 8192, 8192), "bias": (8192,)},
    "dense": {"kernel": (32768, 16384)},
}
LAST = 100_000
# Not Top-KAST: the compiler copies its masks and weights in every step.
METHODS = {
    **{
        name: getattr(granet_jax, name)(0.9, LAST)
        for name in ("gmp", "rigl", "set_", "snfs", "mest", "dsr", "cyclical")
    },
    "acdc": granet_jax.acdc(0.9, (100, 200, 300)),
    "straight_through": granet_jax.straight_through(0.9, LAST),
    "static": granet_jax.static(0.9),
}
SIZES = parameter_trees.masked_sizes(TREE)
WEIGHTS = parameter_trees.size(TREE)


def compiled(
    tree: Any, method: granet_jax.Method, mesh: Mesh, **options: Any
) -> tuple[jax.stages.Compiled, str]:
    """The compiled step and its text, which sends counts only."""
    with jax.set_mesh(mesh):
        step = scale.compile_step(tree, method, mesh, **options)
    text = compiled_programs.compiled_text(step)
    # A pass counts 16 parts of every leaf, at four bytes.
    most = 64 * len(parameter_trees.masked_sizes(tree))
    sent = compiled_programs.collectives(text)
    assert all(x.kind == "all-reduce" and x.looped and x.bytes <= most for x in sent)
    return step, text


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler needs in the environment is taken back after each test."""
    for name in ("XLA_FLAGS", "TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.delenv(name, raising=False)


@functools.cache
def devices() -> Any:
    return np.array(topologies.devices_of("v5e:2x2")).reshape(4, 1)


def check_step(text: str, devices: int) -> None:
    """Assert that no leaf is sorted, gathered, or copied outside of a mask update."""
    share = min(SIZES) // devices
    operations = [x for x in compiled_programs.operations(text) if x.bytes >= share]
    assert not {"sort", "gather", "scatter"} & {x.kind for x in operations}
    copies = compiled_programs.copies(text)
    assert not [x for x in copies if not x.looped and x.bytes >= share]


def mesh_of(kind: AxisType) -> Mesh:
    return Mesh(devices(), ("fsdp", "tensor"), axis_types=(kind,) * 2)


def test_a_sharded_step_sends_counts_only() -> None:
    step, text = compiled(TREE, scale.METHODS["granet"], mesh_of(AxisType.Auto))
    check_step(text, 4)
    assert compiled_programs.collectives(text)
    memory = compiled_programs.memory(step)
    # Parameters, momentum and two masks take the place of the old ones.
    assert memory.alias_size_in_bytes >= (8 * WEIGHTS + 2 * sum(SIZES)) // 4


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_all_methods_on_explicit_axes(name: str, packed: bool) -> None:
    mesh = mesh_of(AxisType.Explicit)
    check_step(compiled(TREE, METHODS[name], mesh, packed=packed)[1], 4)


@pytest.mark.slow
def test_a_step_of_seven_billion_parameters() -> None:
    """More weights than 32 bits count are counted together, layer by layer."""
    mesh = scale.make_mesh(topologies.devices_of("v5e:16x16"), "explicit")
    with jax.enable_x64(True):
        shapes = parameter_trees.shapes("7b-stacked")
        _, text = compiled(shapes, scale.METHODS["granet"], mesh)
    assert compiled_programs.collectives(text)


def test_a_pmapped_step_sends_nothing() -> None:
    tx = granet_jax.transform(
        scale.METHODS["granet"],
        optax.sgd(0.1, momentum=0.9),
        where=parameter_trees.carries_mask,
    )

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        TREE["dense"],
        is_leaf=parameter_trees.is_shape,
    )
    given = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((4, *x.shape), x.dtype),
        (params, jax.eval_shape(tx.init, params), params),
    )
    mapped = jax.pmap(step, devices=list(devices().flat), donate_argnums=(0, 1))
    text = compiled_programs.compiled_text(mapped.lower(*given).compile())
    check_step(text, 1)
    assert compiled_programs.collectives(text) == []
