"""Users' own methods, by hand; `test_methods` compares whole trainings of them."""

import dataclasses
import itertools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax import schedules, scores, structures
from granet_jax.phases import Phase
from tests.helpers.fuzzing import spec
from tests.helpers.training import compiled_step
from tests.methods.records import own
from tests.methods.test_methods import METHODS, smallest


def exchange(**parts: Any) -> granet_jax.Method:
    return own(start=1 / 3, fractions={1: 0.5}, **parts)


def gaps(inputs: Any) -> Any:
    """A score that is NaN where the weight is positive."""
    return jnp.where(inputs.param > 0, jnp.nan, inputs.param)


@pytest.mark.parametrize(
    ("drop", "weights", "gradient", "mask", "after"),
    [
        # Stepped to 4, 1, 1.5, 2: the two of largest magnitude go, and the two largest
        # gradients come.
        (
            smallest,
            [4.0, 1.0, 3.0, 2.0, 0.0, 0.0],
            [0.0, 0.0, 6.0, 0.0, 5.0, -7.0],
            [0, 1, 1, 0, 1, 1],
            [0.0, 1.0, 1.5, 0.0, 0.0, 0.0],
        ),
        # A score of NaN goes first.
        (
            gaps,
            [-1.0, 3.0, -2.0, 9.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0, 1.0, 1.0],
            [1, 0, 1, 0, 1, 1],
            [-1.0, 0.0, -2.0, 0.0, 0.0, 0.0],
        ),
    ],
)
def test_own_drop_score_by_hand(
    drop: Any, weights: Any, gradient: Any, mask: Any, after: Any
) -> None:
    params, grads = ({"w": np.float32([x])} for x in (weights, gradient))
    masks = {"w": params["w"] != 0}
    tx = granet_jax.transform(exchange(drop=drop), optax.sgd(0.25), masks=masks)
    new, state = compiled_step(tx)(params, tx.init(params), grads)
    assert granet_jax.get_masks(state)["w"].astype(int).tolist() == [mask]
    assert new["w"].tolist() == [after]


def test_own_average() -> None:
    params = {"w": jnp.asarray([[4.0, 1.0, 2.0]], jnp.bfloat16)}
    without = granet_jax.transform(exchange()).init(params)
    assert without.average == ()
    method = exchange(grow=lambda x: x.average, decay=0.5)
    tx = granet_jax.transform(method, optax.sgd(0.5))
    grads = {"w": jnp.asarray([[1.0, -2.0, 3.0]], jnp.bfloat16)}
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    # In float32 whatever the dtype of the parameters is.
    average = state.average["w"]
    assert average.dtype == np.float32
    assert average.tolist() == [[0.5, -1.0, 1.5]]


def test_own_random_score_has_a_key_per_leaf_step_and_seed() -> None:
    def uniform(inputs: granet_jax.ScoreInputs) -> Any:
        return jax.random.uniform(inputs.key, inputs.param.shape)

    method = own(
        start=0.5,
        fractions=dict.fromkeys((1, 2), 0.5),
        drop=uniform,
        grow=smallest,
        needs_gradient=False,
    )
    # Both leaves have the same weights and masks: only the keys tell them apart.
    params = {"a": jnp.ones((4, 8)), "b": jnp.ones((4, 8))}
    half = np.zeros((4, 8), bool)
    half[:, :4] = True

    def masks_after(seed: int, counts: tuple[int, ...]) -> Any:
        tx = granet_jax.transform(method, masks={"a": half, "b": half}, seed=seed)
        state, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, params)
        update = jax.jit(tx.update)
        for count in counts:
            _, after = update(zeros, state._replace(count=jnp.int32(count)), params)
            yield [m.tobytes() for m in jax.device_get(after.masks).values()]

    first, second, again = masks_after(0, (0, 1, 0))
    (other,) = masks_after(1, (0,))
    assert len({*first, *second, *other}) == 6
    assert again == first


def test_own_method_without_gradient_as_the_last_link() -> None:
    # The scores read weights only, so that `update` needs no gradient.
    method = exchange(grow=smallest, needs_gradient=False)
    params = {"w": jnp.asarray([[4.0, 1.0, 2.0, 8.0, 0.0, 0.0]])}
    masks = {"w": params["w"] != 0}
    tx = optax.chain(optax.sgd(0.5), granet_jax.transform(method, masks=masks))
    grads = {"w": jnp.asarray([[0.0, 0.0, 0.0, 0.0, 2.0, 2.0]])}
    new, state = compiled_step(tx)(params, tx.init(params), grads)
    # 1 and 2 are dropped; of the weights that are then inactive, the zeros come.
    expected = [[True, False, False, True, True, True]]
    assert granet_jax.get_masks(state)["w"].tolist() == expected
    assert new["w"].tolist() == [[4.0, 0.0, 0.0, 8.0, 0.0, 0.0]]


# --- Methods as values ------------------------------------------------------------


def test_methods_of_equal_arguments_are_equal() -> None:
    # Every method, with each kind of schedule, score, penalty and structure.
    specs = [
        *itertools.chain(*(METHODS[name] for name in METHODS if name != "own")),
        spec("granet", 0.5, 8, interval=2, grow="momentum"),
        spec("rigl", 0.5, 8, interval=2, structure=("channel",)),
        spec("set_", 0.5, 8, interval=2),
    ]

    def built() -> list[granet_jax.Method]:
        methods = [method.build()[0] for method in specs]
        lookahead = scores.lookahead(("a", "b"))
        return [*methods, dataclasses.replace(methods[0], rank=lookahead)]

    methods = built()
    assert len(set(methods)) == len(methods)
    for first, second in zip(methods, built(), strict=True):
        assert first == second
        assert hash(first) == hash(second)
        assert pickle.loads(pickle.dumps(first)) == first
    # So a method may be a static argument.
    traces = []
    compiled = jax.jit(lambda m: traces.append(m), static_argnums=0)
    for method in (methods[0], built()[0], methods[1]):
        compiled(method)
    assert traces == methods[:2]


def test_a_part_that_has_no_hash_is_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Listed(Phase):
        sizes: list[int]

    with pytest.raises(TypeError, match=r"hashable.*tuples instead of lists"):
        granet_jax.Method(
            name="own", sparsity=schedules.constant(0.5), phases=(Listed([1]),)
        )


@pytest.mark.parametrize("structure", [None, structures.constant_fan_in()])
def test_weights_without_gradient_grow_anywhere(structure: Any) -> None:
    # An embedding of which few rows have a gradient: the other rows tie at zero.
    table = {"e": jax.random.normal(jax.random.key(0), (200, 16))}
    grads = {"e": jnp.zeros((200, 16)).at[100:104].set(1.0)}
    method = granet_jax.rigl(0.9, 40, interval=1, fraction=0.5, structure=structure)
    tx = granet_jax.transform(method, optax.sgd(0.1))
    state = tx.init(table)
    params = granet_jax.apply_masks(table, granet_jax.get_masks(state))
    _, after = jax.jit(tx.update)(grads, state, params)
    old, new = (granet_jax.get_masks(s)["e"] for s in (state, after))
    grown = np.asarray(new & ~old)
    assert new[100:104].all()
    elsewhere = np.delete(grown, np.s_[100:104], axis=0)
    rows, columns = elsewhere.nonzero()
    # Uniform, to five standard deviations.
    for place, size in ((rows, 196), (columns, 16)):
        error = size / np.sqrt(12 * len(place))
        assert abs(place.mean() - (size - 1) / 2) < 5 * error
    # Every unit of constant fan-in has an order of its own.
    assert elsewhere.any(axis=1).sum() > 0.7 * len(rows)
