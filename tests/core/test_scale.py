"""What the compiled step of many devices, or of large trees, communicates and keeps.

Only shapes and shardings go in: nothing is allocated but in the test of passes.
"""

import functools
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

import granet_jax
from benchmarks import programs, resnet50, scale, trees
from granet_jax import search, selection

DEVICES = 8
KIB = 2**10
# What a device has of the counts of a leaf: three of 4 bytes.
COUNTS = 3 * 4
# What is not of leaves' size: less than the keys of even the smallest tree's weights.
SLACK = 24 * KIB


def enlarged(tree: Any) -> Any:
    """Every array four times as large, along its last axis; those of a norm too."""
    return jax.tree.map(
        lambda shape: (*shape[:-1], 4 * shape[-1]), tree, is_leaf=trees.is_shape
    )


@functools.cache
def compiled(
    tree: str, method: str, axes: str, mesh_shape: tuple[int, int] = (DEVICES // 2, 2)
) -> Any:
    shapes = {
        "resnet50": resnet50.shapes,
        "small": resnet50.small_shapes,
        "large": lambda: enlarged(resnet50.small_shapes()),
        "7b": lambda: trees.shapes("7b-stacked"),
    }[tree]()
    mesh = jax.make_mesh(
        mesh_shape,
        ("fsdp", "tensor"),
        axis_types=(scale.AXES[axes],) * 2,
        devices=jax.devices()[: math.prod(mesh_shape)],
    )
    with jax.set_mesh(mesh):
        step, _ = scale.compile_step(shapes, scale.METHODS[method], mesh)
    return shapes, step, step.as_text()


def masked_sizes(shapes: Any) -> list[int]:
    leaves = jax.tree.leaves(shapes, is_leaf=trees.is_shape)
    return [math.prod(shape) for shape in leaves if len(shape) >= 2]


def bytes_per_update(shapes: Any, text: str, method: str) -> int:
    found = scale.collectives(text)
    assert found
    assert all(c.looped for c in found)
    passes = scale.search_passes(max(masked_sizes(shapes)))
    return scale.PHASES[method] * passes * sum(c.bytes for c in found)


@pytest.mark.parametrize(
    # On Auto axes XLA knows that of the first convolution, whose 3 inputs do not divide
    # by 8, every device has all.
    ("axes", "mesh_shape", "leaves"),
    [("explicit", (4, 2), 54), ("auto", (8, 1), 53)],
)
def test_resnet50_sends_less_than_64_kib_an_update(
    axes: str, mesh_shape: tuple[int, int], leaves: int
) -> None:
    shapes, _, text = compiled("resnet50", "granet", axes, mesh_shape)
    (found,) = scale.collectives(text)
    # The counts of three thresholds of every leaf, in one all-reduce.
    assert found == scale.Collective("all-reduce", leaves * COUNTS, True)
    assert bytes_per_update(shapes, text, "granet") < 64 * KIB


def test_what_is_sent_does_not_depend_on_the_number_of_devices() -> None:
    leaves = len(masked_sizes(resnet50.small_shapes()))
    # The first convolution has 3 inputs, which the mesh does not divide.
    one = scale.Collective("all-reduce", (leaves - 1) * COUNTS, True)
    both = scale.Collective("all-reduce", leaves * COUNTS, True)

    def sent(axes: str, *mesh_shape: int) -> list[scale.Collective]:
        return sorted(scale.collectives(compiled("small", "rigl", axes, mesh_shape)[2]))

    assert sent("auto", 1, 1) == []
    assert sent("auto", 2, 1) == sent("auto", 4, 1) == sent("auto", 8, 1) == [one]
    # On CPU one along each axis of a mesh; all leaves divide along the second.
    assert sent("auto", 2, 2) == sent("auto", 4, 2) == sorted([one, both])
    # (One device to itself.)
    for mesh_shape in ((1, 1), (2, 1), (4, 1), (2, 2), (8, 1), (4, 2)):
        assert sent("explicit", *mesh_shape) == [both], mesh_shape


@pytest.mark.parametrize("method", scale.METHODS)
@pytest.mark.parametrize("axes", scale.AXES)
def test_what_is_sent_does_not_depend_on_the_size_of_leaves(
    method: str, axes: str
) -> None:
    (small, _, text), (large, _, text_of_large) = (
        compiled(tree, method, axes) for tree in ("small", "large")
    )
    assert sum(masked_sizes(large)) == 4 * sum(masked_sizes(small))
    found = scale.collectives(text)
    assert found == scale.collectives(text_of_large)
    # Counts alone, in one all-reduce, or one along each axis of the mesh.
    assert {c.kind for c in found} == {"all-reduce"}
    assert len(found) <= {"explicit": 1, "auto": 2}[axes]
    assert all(c.bytes <= len(masked_sizes(small)) * COUNTS for c in found)


def test_seven_billion_parameters_send_less_than_a_mib_an_update() -> None:
    shapes = trees.shapes("7b-stacked")
    assert trees.size(shapes) == 6_738_415_616
    # More weights than 32 bits count.
    with jax.enable_x64(True):
        _, step, text = compiled("7b", "granet", "explicit")
    (found,) = scale.collectives(text)
    assert found == scale.Collective("all-reduce", 9 * 3 * 8, True)
    assert bytes_per_update(shapes, text, "granet") < KIB**2
    # A code of a byte, of the weights of a device.
    shares = trees.size(shapes) / DEVICES
    assert step.memory_analysis().temp_size_in_bytes < 1.1 * shares


def copied_bytes(shapes: Any) -> int:
    """What an update copies of small leaves of one shape (`granet_jax.programs`).

    Parameters, gradients and momentum, in float32, and their masks.
    """
    sizes = masked_sizes(shapes)
    leaves = jax.tree.leaves(shapes, is_leaf=trees.is_shape)
    masked = [shape for shape in leaves if len(shape) >= 2]
    pairs = zip(masked, sizes, strict=True)
    return sum(13 * n for x, n in pairs if masked.count(x) > 1 and n <= 2**14)


@pytest.mark.parametrize("method", scale.METHODS)
def test_a_donated_step_copies_nothing_between_updates(method: str) -> None:
    shapes, step, text = compiled("large", method, "auto", (1, 1))
    weights, masked = trees.size(shapes), sum(masked_sizes(shapes))
    memory = step.memory_analysis()
    # Parameters, momentum and masks are all taken over, and nothing else is held.
    assert memory.alias_size_in_bytes >= 8 * weights + masked
    assert memory.alias_size_in_bytes <= 8 * weights + masked + KIB
    smallest = min(masked_sizes(shapes))
    assert not [
        c for c in programs.copies(text) if not c.looped and c.bytes >= smallest
    ]
    # At an update: a code of a byte a weight; neither keys nor the stepped weights.
    assert memory.temp_size_in_bytes <= masked + copied_bytes(shapes) + SLACK


def test_an_update_that_only_prunes_needs_a_byte_a_weight_too() -> None:
    shapes = enlarged(resnet50.small_shapes())
    step, _ = scale.compile_step(
        shapes, granet_jax.gmp(0.9, 1000, interval=100), scale.make_mesh(1, "auto")
    )
    memory, masked = step.memory_analysis(), sum(masked_sizes(shapes))
    assert memory is not None
    most = masked + copied_bytes(shapes) + SLACK
    assert masked < memory.temp_size_in_bytes <= most


def test_without_donation_the_copies_are_seen() -> None:
    # What the test above must be able to see.
    shapes = resnet50.small_shapes()
    mesh = scale.make_mesh(1, "auto")
    step, _ = scale.compile_step(shapes, scale.METHODS["rigl"], mesh, donate=False)
    memory, text = step.memory_analysis(), step.as_text()
    assert memory is not None
    assert text is not None
    assert memory.alias_size_in_bytes == 0
    copied = [c.bytes for c in programs.copies(text) if not c.looped]
    # Masks go through a loop, which must not change arguments.
    assert sum(copied) >= sum(masked_sizes(shapes))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for every pass over memory of what is traced in the test."""
    passes = []
    count = search.count_leaves

    def counted(*arguments: Any) -> list[Array]:
        jax.debug.callback(lambda: passes.append(1))
        return count(*arguments)

    monkeypatch.setattr(search, "count_leaves", counted)
    return passes


def untraced(scope: str) -> Any:
    """`top_k`, not to be found among what is compiled without the counter."""
    return jax.jit(functools.partial(inspect.unwrap(selection.top_k), scope=scope))


@pytest.mark.parametrize("scope", selection.SCOPES)
def test_passes_stay_within_their_bound(scope: str, passes: list[int]) -> None:
    rng = np.random.default_rng(0)
    heavy = rng.standard_cauchy((2, 500)).astype("f4")
    tied = np.where(rng.random((30, 30)) < 0.5, np.float32(1e-30), np.float32(3e30))
    huge = rng.uniform(3e38, 3.4e38, (30, 30)).astype("f4")
    cases = {
        "heavy tails": [heavy, 1e-20 * heavy[:, :90]],
        "ties": [tied, np.float32(1e-30) * np.ones((7, 5), np.float32)],
        "both": [tied, heavy],
        "largest keys": [huge, np.full((30, 30), np.inf, "f4")],
    }
    most = []
    select = untraced(scope)
    for leaves in cases.values():
        for k in (1, 17, 34):
            passes.clear()
            jax.block_until_ready(select([jnp.asarray(x) for x in leaves], k))
            jax.effects_barrier()
            assert len(passes) <= scale.search_passes(max(x.size for x in leaves))
            most.append(len(passes))
    # Counting and the search over keys take 22 where nothing ends them early.
    assert max(most) > 22


@pytest.mark.parametrize("scope", selection.SCOPES)
def test_the_bound_of_passes_is_reached(scope: str, passes: list[int]) -> None:
    """Where the last wanted is never where it is expected, and ties."""
    # Of negative numbers of which half the bits are the same: the others, counted from
    # the lowest. Most are at the ends, of all and of those of one code in its stage.
    wanted = 238 * 256 + 71
    ends = [0, 2**16 - 1] * 300 + [238 * 256, 238 * 256 + 255] * 80
    low_bits = np.array(ends + [wanted] * 256 + [0] * 8)
    magnitude = 2**31 - (0x479C << 16) - low_bits
    scores = (magnitude + 2**31).astype(np.uint32).view(np.float32)
    assert np.all(np.diff(scores[np.argsort(low_bits)]) >= 0)
    larger = low_bits > wanted
    (chosen,) = untraced(scope)([jnp.asarray(scores)], int(larger.sum()) + 1)
    jax.effects_barrier()
    # All but the one of the largest scores.
    assert len(passes) == scale.search_passes(scores.size) - 1
    expected = larger | (np.arange(scores.size) == len(ends))
    np.testing.assert_array_equal(chosen, expected)


@pytest.mark.parametrize("scope", selection.SCOPES)
def test_few_passes_where_entries_lie_evenly(scope: str, passes: list[int]) -> None:
    """The last wanted is near where it is expected in the last two stages."""
    rng = np.random.default_rng(0)
    scores = [jnp.asarray(rng.random(2**18, "f4")) for _ in range(2)]
    select = untraced(scope)
    most = []
    for density in (0.05, 0.1, 0.2, 0.5, 0.7):
        passes.clear()
        jax.block_until_ready(select(scores, round(density * 2**18)))
        jax.effects_barrier()
        most.append(len(passes))
    # Four in each of the first two stages, about two in each of the others; a quarter
    # of the range a pass would take 16.
    assert max(most) <= 14
    assert sum(most) <= 12 * len(most)


def test_search_passes() -> None:
    # A quarter of the range a pass, half in the first; four for two that guess twice;
    # one more for the largest keys.
    assert scale.search_passes(1) == 1 + 16 + 4 + 1
    assert scale.search_passes(1, bits=16) == 1 + 8 + 1
    assert scale.search_passes(4**5) == 1 + 16 + 4 + 1 + 5
    assert scale.search_passes(4**5 + 1) == 1 + 16 + 4 + 1 + 6


def test_parser_of_programs() -> None:
    program = """
    %inner (p: u32[3]) -> u32[3] {
      %reduce = (u32[3]{0}, u64[2]{0}) all-reduce(%p, %q), to_apply=%add
      %copy.1 = pred[4,4]{1,0} copy(%m)
    }

    %outer (p: u32[3]) -> u32[3] {
      ROOT %call = u32[3]{0} fusion(%p), kind=kLoop, calls=%inner
    }

    ENTRY %main (a: f32[8]) -> f32[8] {
      %start = (bf16[8]{0}, bf16[16]{0}) all-gather-start(%a), dimensions={0}
      %copy.2 = f32[8]{0} copy(%a)
      %while = u32[3]{0} while(%t), condition=%cond, body=%outer
    }
    """.replace("\n    ", "\n")
    assert scale.collectives(program) == [
        scale.Collective("all-reduce", 3 * 4 + 2 * 8, True),
        scale.Collective("all-gather", 48, False),
    ]
    assert programs.copies(program) == [
        programs.Copy(16, True),
        programs.Copy(32, False),
    ]


def test_trees_have_the_published_sizes() -> None:
    sizes = {name: trees.size(trees.shapes(name)) for name in trees.TREES}
    # Llama 2 and TinyLlama, as their authors' code counts them.
    assert sizes["7b-layers"] == sizes["7b-stacked"] == 6_738_415_616
    assert sizes["70b-layers"] == sizes["70b-stacked"] == 68_976_648_192
    assert sizes["1b-layers"] == sizes["1b-stacked"] == 1_100_048_384
    assert sizes["100m-layers"] == sizes["100m-stacked"]
    assert sizes["resnet50"] == resnet50.PARAMETERS


def test_state_lies_with_its_parameters() -> None:
    mesh = scale.make_mesh(DEVICES, "auto")
    params = trees.place(resnet50.small_shapes(), mesh)
    tx = granet_jax.transform(scale.METHODS["rigl"])
    masks = trees.place_like(jax.eval_shape(tx.init, params), params).masks
    head = masks["head"]["kernel"]
    assert head.dtype == bool
    assert head.sharding == params["head"]["kernel"].sharding
    assert set(head.sharding.spec) == {"fsdp", "tensor"}
