"""What compiled optimizer steps communicate, copy and allocate.

The steps are compiled from shapes and shardings alone; nothing is allocated or run.
"""

import functools
import math

import jax
import pytest

import granet_jax
from benchmarks import scale
from benchmarks.tools import parameter_trees
from experiments.reports import compiled_programs
from tests.helpers import layouts

# A collective carries counts: at most 16 integers of four bytes per leaf.
COUNT_BYTES = 16 * 4
# Temporary arrays whose size does not depend on the size of the leaves.
SMALL = 32 * 2**10
# Eight devices divide the first two leaves, and two devices the third one.
SMALL_TREE = {**layouts.SHAPES, "stem": {"kernel": (7, 7, 3, 8)}}
# Every array is 64 times as large, along its last axis.
LARGE_TREE = jax.tree.map(
    lambda shape: (*shape[:-1], 64 * shape[-1]),
    SMALL_TREE,
    is_leaf=parameter_trees.is_shape,
)
LEAVES = len(parameter_trees.masked_sizes(SMALL_TREE))


@functools.cache
def compiled(
    size: str, method: str, axes: str, *mesh_shape: int
) -> tuple[jax.stages.Compiled, str]:
    """The compiled step for the small or the large tree, and its text."""
    mesh = jax.make_mesh(
        mesh_shape,
        ("fsdp", "tensor"),
        axis_types=(scale.AXES[axes],) * 2,
        devices=jax.devices()[: math.prod(mesh_shape)],
    )
    with jax.set_mesh(mesh):
        shapes = {"small": SMALL_TREE, "large": LARGE_TREE}[size]
        step = scale.compile_step(shapes, scale.METHODS[method], mesh)
    return step, compiled_programs.compiled_text(step)


def copied_in_every_step(text: str) -> int:
    """The bytes of all copies of arrays outside of loops, that is, of updates."""
    copies = compiled_programs.copies(text)
    return sum(c.bytes for c in copies if not c.looped and c.bytes > 8)


@pytest.mark.parametrize("axes", ["explicit", "auto"])
def test_devices_exchange_counts_only(axes: str) -> None:
    """No leaf is sorted, gathered, sent, or copied outside of a mask update."""
    _, text = compiled("large", "granet", axes, 4, 2)
    collectives = compiled_programs.collectives(text)
    assert {c.kind for c in collectives} == {"all-reduce"}
    # Only mask updates are loops, so other steps send nothing.
    assert all(c.looped and c.bytes <= COUNT_BYTES * LEAVES for c in collectives)
    # A device holds an eighth of every leaf, and the mask has a byte a weight.
    share = min(parameter_trees.masked_sizes(LARGE_TREE)) // 8
    operations = compiled_programs.operations(text)
    of_leaves = [x for x in operations if x.bytes >= share]
    assert not {"sort", "gather", "scatter"} & {x.kind for x in of_leaves}
    assert copied_in_every_step(text) == 0


def test_larger_leaves_and_more_devices_send_no_more() -> None:
    large, small, fewer = (
        sorted(compiled_programs.collectives(compiled(*case)[1]))
        for case in (
            ("large", "granet", "explicit", 4, 2),
            ("small", "granet", "explicit", 4, 2),
            ("small", "granet", "explicit", 2, 2),
        )
    )
    assert large == small == fewer


@pytest.mark.parametrize("method", ["granet", "rigl"])
def test_memory_of_a_donated_step(method: str) -> None:
    step, text = compiled("large", method, "auto", 1, 1)
    weights = parameter_trees.size(LARGE_TREE)
    masked = sum(parameter_trees.masked_sizes(LARGE_TREE))
    memory = compiled_programs.memory(step)
    # Parameters, momentum, masks and entered weights take the place of the old ones.
    assert memory.alias_size_in_bytes >= 8 * weights + 2 * masked
    assert copied_in_every_step(text) == 0
    assert memory.temp_size_in_bytes <= 10 * masked + SMALL


def test_copies_are_found_without_donation() -> None:
    """A loop must not overwrite its arguments, so XLA has to copy the masks."""
    mesh = scale.make_mesh(jax.devices()[:1], "auto")
    step = scale.compile_step(SMALL_TREE, scale.METHODS["rigl"], mesh, donate=False)
    assert compiled_programs.memory(step).alias_size_in_bytes == 0
    copies = compiled_programs.copies(compiled_programs.compiled_text(step))
    masked = sum(parameter_trees.masked_sizes(SMALL_TREE))
    assert sum(c.bytes for c in copies if not c.looped) >= masked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tree", "axes"),
    [("resnet50", "explicit"), ("resnet50", "auto"), ("7b-stacked", "explicit")],
)
def test_published_networks(tree: str, axes: str) -> None:
    """At full size: only counts are sent, of more weights than 32 bits count too."""
    shapes = parameter_trees.shapes(tree)
    sizes = parameter_trees.masked_sizes(shapes)
    wide = parameter_trees.size(shapes) >= 2**32
    mesh = scale.make_mesh(jax.devices(), axes)
    with jax.enable_x64(wide), jax.set_mesh(mesh):
        step = scale.compile_step(shapes, scale.METHODS["granet"], mesh)
    text = compiled_programs.compiled_text(step)
    collectives = compiled_programs.collectives(text)
    most = COUNT_BYTES * (1 + wide) * len(sizes)
    assert {c.kind for c in collectives} == {"all-reduce"}
    assert all(c.looped and c.bytes <= most for c in collectives)


def test_parser_of_programs() -> None:
    program = """
    %inner (p: u32[3]) -> u32[3] {
      %reduce = (u32[3]{0}, /*index=1*/u64[2]{0}) all-reduce(%p, %q), to_apply=%add
      %copy.1 = pred[4,4]{1,0} copy(%m)
    }

    %outer (p: u32[3]) -> u32[3] {
      %copy.3 = u32[3]{0} copy(%p)
      ROOT %call = u32[3]{0} fusion(%copy.3), kind=kLoop, calls=%inner
    }

    ENTRY %main (a: f32[8]) -> f32[8] {
      %start = (bf16[8]{0}, bf16[16]{0}) all-gather-start(%a), dimensions={0}
      %copy.2 = f32[8]{0} copy(%a)
      %while = u32[3]{0} while(%t), condition=%cond, body=%outer
    }
    """.replace("\n    ", "\n")
    operation = compiled_programs.Operation
    assert compiled_programs.collectives(program) == [
        operation("all-reduce", 3 * 4 + 2 * 8, True),
        operation("all-gather", 8 * 2 + 16 * 2, False),
    ]
    assert compiled_programs.copies(program) == [
        operation("copy", 12, True),  # The one inside the fused kernel is none.
        operation("copy", 32, False),
    ]


def test_trees_have_the_published_sizes() -> None:
    sizes = {
        name: parameter_trees.size(parameter_trees.shapes(name))
        for name in parameter_trees.NAMES
    }
    # Llama 2 and TinyLlama, as their authors' code counts them.
    assert sizes["7b-layers"] == sizes["7b-stacked"] == 6_738_415_616
    assert sizes["70b-layers"] == sizes["70b-stacked"] == 68_976_648_192
    assert sizes["1b-layers"] == sizes["1b-stacked"] == 1_100_048_384
    assert sizes["100m-layers"] == sizes["100m-stacked"]
    assert sizes["resnet50"] == parameter_trees.RESNET50_PARAMETERS


def test_state_is_sharded_like_its_parameters() -> None:
    mesh = scale.make_mesh(jax.devices(), "auto")
    params = parameter_trees.place(SMALL_TREE, mesh)
    tx = granet_jax.transform(scale.METHODS["rigl"])
    state = parameter_trees.place_like(jax.eval_shape(tx.init, params), params)
    masks = [
        x
        for path, x in jax.tree.leaves_with_path(state)
        if "dense" in jax.tree_util.keystr(path) and x.ndim == 2
    ]
    assert len(masks) == 2  # The mask, and the weights that entered.
    for mask in masks:
        assert mask.sharding == params["dense"]["kernel"].sharding
        assert set(mask.sharding.spec) == {"fsdp", "tensor"}
