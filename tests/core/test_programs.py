"""What leaves have done to them alike, and that doing it at once changes nothing."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import granet_jax
from granet_jax import programs, scores, stacks, updates
from tests.helpers import oracle

Function = Callable[[list[Array]], list[Array]]
SHAPE = (4, 6)


def traced(function: Function, leaves: int = 4) -> Any:
    return jax.make_jaxpr(function)([jnp.zeros(SHAPE, bool)] * leaves)


def kinds(function: Function, leaves: int = 4) -> list[int]:
    """For every output, the first that has the same done to it."""
    found = [p.kind for p in programs.programs_of(traced(function, leaves).jaxpr)]
    return [found.index(kind) for kind in found]


def numbers(seed: int, leaves: int = 4) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for _ in range(leaves)]


def test_the_same_is_of_one_kind() -> None:
    a, b = numbers(0), numbers(1)
    rate = jnp.float32(0.1)

    @jax.jit
    def stepped(mask: Array, x: Array, y: Array) -> Array:
        return jnp.where(mask, x - rate * y, 0)

    def function(masks: list[Array]) -> list[Array]:
        return [jnp.abs(stepped(*x)) for x in zip(masks, a, b, strict=True)]

    assert kinds(function) == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "other",
    [
        lambda mask, x: x,
        lambda mask, x: jnp.abs(x) * 3,
        lambda mask, x: jnp.abs(x) + 2,
        lambda mask, x: jnp.abs(x * 2),
        lambda mask, x: jnp.square(x) * 2,
        lambda mask, x: jnp.abs(x.astype(jnp.bfloat16)) * 2,
        lambda mask, x: jnp.where(mask, jnp.abs(x), 0) * 2,
        lambda mask, x: jnp.ones(SHAPE),
    ],
)
def test_what_differs_is_of_another_kind(other: Any) -> None:
    x = numbers(0)

    def function(masks: list[Array]) -> list[Array]:
        usual = [jnp.abs(v) * 2 for v in x]
        return [usual[0], usual[1], other(masks[2], x[2]), usual[3]]

    assert kinds(function) == [0, 0, 2, 0]


def test_inputs_of_other_types_and_one_read_twice_are_of_another_kind() -> None:
    x = numbers(0)
    y = [*x[:2], x[2].astype(jnp.bfloat16), x[3]]
    assert kinds(lambda _: [a * a for a in y]) == [0, 0, 2, 0]
    assert kinds(lambda _: [a * b for a, b in zip(x, x[::-1], strict=True)]) == [0] * 4
    assert kinds(lambda _: [x[0] * x[1], x[0] * x[0]], 2) == [0, 1]


def test_parameters_tell_kinds_apart() -> None:
    x = numbers(0)
    assert kinds(lambda _: [x[0] ** 3, x[1] ** 5, x[2] ** 3, x[3] ** 5]) == [0, 1, 0, 1]


def test_an_argument_is_not_what_is_outside() -> None:
    x, outside = numbers(0), jnp.ones(SHAPE, bool)
    assert kinds(lambda masks: [masks[0] * x[0], outside * x[1]], 2) == [0, 1]


def test_what_reads_the_arguments_of_others_is_told() -> None:
    def by_leaf(function: Function) -> bool:
        jaxpr = traced(function).jaxpr
        return programs.is_by_leaf(jaxpr, programs.programs_of(jaxpr))

    x = numbers(0)
    assert by_leaf(lambda masks: [m * v for m, v in zip(masks, x, strict=True)])
    assert by_leaf(lambda _: x)
    assert by_leaf(lambda masks: [masks[0] * x[3], x[2], x[1], x[0]])
    assert not by_leaf(lambda masks: [m * 1.0 for m in masks[::-1]])
    assert not by_leaf(lambda masks: [masks[0] & masks[1], *masks[1:]])

    def prints(masks: list[Array]) -> list[Array]:
        jax.debug.print("{}", 1)
        return masks

    assert not by_leaf(prints)


RATE = jnp.float32(0.3)
A, B = numbers(2, 7), numbers(3, 7)
FUNCTIONS: dict[str, Function] = {
    "steps": lambda masks: [
        jnp.abs(jnp.where(m, a - RATE * b, 0))
        for m, a, b in zip(masks, A, B, strict=False)
    ],
    "arguments": list,
    "what is outside": lambda masks: A[: len(masks)],
    "the same for all": lambda masks: [A[0] * RATE] * len(masks),
    "the same array": lambda masks: [A[0]] * len(masks),
    "numbers": lambda masks: [jnp.full(SHAPE, 2.0)] * len(masks),
    "own scalars": lambda masks: [
        m * jnp.float32(i) * A[i] + i for i, m in enumerate(masks)
    ],
    "by turns": lambda masks: [
        (jnp.abs if i % 2 else jnp.square)(A[i]) * m for i, m in enumerate(masks)
    ],
    "choices": lambda masks: [
        jax.lax.cond(RATE > 0.2, lambda m=m, b=b: m * b, lambda b=b: b)
        for m, b in zip(masks, B, strict=False)
    ],
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
@pytest.mark.parametrize("leaves", [1, 2, 7])
@pytest.mark.parametrize("jitted", [False, True])
def test_done_at_once_it_is_the_same(
    function: Function, leaves: int, *, jitted: bool
) -> None:
    rng = np.random.default_rng(4)
    masks = [jnp.asarray(rng.random(SHAPE) < 0.5) for _ in range(leaves)]

    def at_once(masks: list[Array]) -> list[Array]:
        closed = jax.make_jaxpr(function)(masks)
        parts = programs.programs_of(closed.jaxpr)
        assert programs.is_by_leaf(closed.jaxpr, parts)
        made = stacks.stacks_of([jax.typeof(m) for m in masks], [p.kind for p in parts])
        found = [
            programs.of_stack(closed, parts, stack)(x)
            for stack, x in zip(made, stacks.stacked(made, masks), strict=True)
        ]
        return stacks.unstacked(made, found)

    expected = function(masks)
    found = jax.jit(at_once)(masks) if jitted else at_once(masks)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-6 if jitted else 0)


def by_place(masks: Sequence[Array], values: Sequence[Array]) -> list[Array]:
    """Leaves of one shape, of which every third is ranked the other way round."""
    del masks
    return [-jnp.abs(v) if i % 3 == 2 else jnp.abs(v) for i, v in enumerate(values)]


def by_others(masks: Sequence[Array], values: Sequence[Array]) -> list[Array]:
    """Not on its own: a weight counts less where the leaf before has one."""
    before = [masks[-1], *masks[:-1]]
    return [
        jnp.where(b, 0.5, 1.0) * jnp.abs(v) for b, v in zip(before, values, strict=True)
    ]


@pytest.mark.parametrize("ranked", [by_place, by_others])
@pytest.mark.parametrize("kind", [None, AxisType.Auto, AxisType.Explicit])
def test_scores_of_leaves_that_are_not_alike(ranked: Any, kind: Any) -> None:
    values, masks = numbers(5), [v > -0.5 for v in numbers(6)]
    expected = oracle.best_across(
        [np.asarray(x) for x in ranked(masks, values)],
        [np.asarray(m) for m in masks],
        20,
    )
    if kind is not None:
        mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2)
        place = NamedSharding(mesh, P("x", "y"))
        values, masks = jax.device_put((values, masks), place)
    phase = updates.prune_phase(lambda now: ranked(now, values), 20, scope="global")
    found = jax.block_until_ready(
        jax.jit(lambda masks: updates.run_phases(masks, [phase]))(masks)
    )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(ours) > 0, theirs)


def test_scores_of_an_update_are_made_once_a_shape() -> None:
    def made(leaves: int) -> int:
        shapes = [(16, 8), (32,)] * leaves
        values = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        masks = [jax.ShapeDtypeStruct(shape, bool) for shape in shapes]

        def update(masks: list[Array], values: list[Array]) -> list[Array]:
            def score(_: list[Array]) -> list[Array]:
                return [jnp.tanh(v) for v in values]

            phase = updates.prune_phase(score, 20, scope="global")
            return updates.run_phases(masks, [phase])

        return jax.jit(update).lower(masks, values).as_text().count("stablehlo.tanh")

    assert [made(leaves) for leaves in (1, 2, 7)] == [2, 2, 2]


def test_scores_of_mixed_kinds_are_refused_however_they_are_made() -> None:
    """In one stack, in the second phase, and random, so made leaf by leaf."""
    key, masks = jax.random.key(0), [jnp.ones(SHAPE, bool)] * 2

    def mixed(present: list[Array]) -> list[Array]:
        bits = [jax.random.bits(key, m.shape, jnp.uint32) >> 1 for m in present]
        return [bits[0].astype(jnp.int32), bits[1].astype(jnp.float32)]

    phases = [
        updates.prune_phase(lambda now: [m * 1.0 for m in now], 20, scope="global"),
        updates.prune_phase(mixed, 10, scope="global"),
    ]
    with pytest.raises(TypeError, match="all be floating, or all of one signed"):
        jax.jit(lambda m: updates.run_phases(m, phases))(masks)


def test_scores_look_at_names() -> None:
    """A user's score may tell leaves of one shape apart by their names."""

    def score(inputs: scores.ScoreInputs) -> Array:
        size = jnp.abs(inputs.param)
        return 100 * size if inputs.name == "b/kernel" else size

    params = dict(zip("abcd", ({"kernel": x} for x in numbers(7)), strict=True))
    method = granet_jax.gmp(0.5, 10, interval=1, scope="global")
    method = dataclasses.replace(method, prune=score)
    tx = granet_jax.transform(method, optax.sgd(0.0))
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(10):
        updates_, state = step(params, state, params)
        params = optax.apply_updates(params, updates_)
    masks = granet_jax.get_masks(state)
    assert masks["b"]["kernel"].all()
    active = [int(np.sum(m["kernel"])) for m in masks.values()]
    assert sum(active) == 48
