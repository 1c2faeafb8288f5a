"""Lottery tickets against a plain NumPy loop; resuming; errors."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest

import granet_jax
from granet_jax import distributions, masking
from granet_jax import mask_sources as ms
from tests.helpers import trees
from tests.mask_sources.helpers import draw, largest, largest_by_leaf

KEY = jax.random.key(5)
SHAPES = {"a": (6, 7), "bias": (7,), "b": (7, 5)}
KERNELS = ("a", "b")
SIZE = 6 * 7 + 7 * 5


def train(params: Any, masks: Any, key: Any) -> Any:
    """Move every weight at random, but keep pruned weights at zero."""
    keys = dict(zip(params, jax.random.split(key, len(params)), strict=True))
    moved = {k: p + jax.random.normal(keys[k], p.shape) for k, p in params.items()}
    return granet_jax.apply_masks(moved, masks)


def shift(params: Any, masks: Any, key: Any) -> Any:
    del key
    return granet_jax.apply_masks({k: p + 0.25 for k, p in params.items()}, masks)


def simulate(
    rounds: int, fraction: float, scope: str, rewind: bool, retrain: Any
) -> list[tuple[Any, Any, Any]]:
    """The masks, start and trained weights of every round, by NumPy."""
    params = jax.device_get(draw(SHAPES))
    masks = {k: np.ones(SHAPES[k], bool) for k in KERNELS}
    start, history = params, []
    for number in range(rounds + 1):
        run = train if number == 0 else retrain
        key = jax.random.fold_in(KEY, number)
        arrays = jax.tree.map(jnp.asarray, start)
        trained = jax.device_get(run(arrays, {**masks, "bias": None}, key))
        history.append((masks, start, trained))
        sparsity = 1.0 - (1.0 - fraction) ** (number + 1)
        # Pruned weights rank below all active ones.
        ranks = [np.where(masks[k], np.abs(trained[k]), -1.0) for k in KERNELS]
        if scope == "global":
            kept = largest(ranks, math.floor((1.0 - sparsity) * SIZE + 0.5))
        else:
            caps = [int(masks[k].sum()) for k in KERNELS]
            shapes = [SHAPES[k] for k in KERNELS]
            counts = distributions.counts(shapes, sparsity, "uniform", caps=caps)
            kept = largest_by_leaf(ranks, counts)
        masks = dict(zip(KERNELS, kept, strict=True))
        source = params if rewind else trained
        start = {
            k: np.where(masks[k], p, 0) if k in masks else p for k, p in source.items()
        }
    return history


@pytest.mark.parametrize(
    ("scope", "rewind", "retrain"), [("global", True, train), ("layer", False, shift)]
)
def test_against_numpy(scope: Any, rewind: bool, retrain: Any) -> None:
    tickets = ms.lottery_tickets(
        train,
        draw(SHAPES),
        rounds=4,
        fraction=0.3,
        scope=scope,
        rewind=rewind,
        retrain=retrain,
        key=KEY,
    )
    history = simulate(4, 0.3, scope, rewind, retrain)
    for number, (ticket, expected) in enumerate(zip(tickets, history, strict=True)):
        masks, start, trained = expected
        assert ticket.round == number
        assert masking.is_masked_node(ticket.masks["bias"])
        for k in KERNELS:
            np.testing.assert_array_equal(ticket.masks[k], masks[k])
        trees.assert_same(ticket.start, start)
        trees.assert_same(ticket.trained, trained)


def test_every_round_may_have_its_own_fraction() -> None:
    def active(fraction: Any) -> list[int]:
        tickets = ms.lottery_tickets(
            shift, draw(SHAPES), rounds=3, fraction=fraction, key=KEY
        )
        return [granet_jax.sparsity(t.masks).active for t in tickets]

    densities = [1.0, 0.5, 0.5 * 0.9, 0.5 * 0.9 * 0.25]
    expected = [math.floor(d * SIZE + 0.5) for d in densities]
    assert active([0.5, 0.1, 0.75]) == active(np.array([0.5, 0.1, 0.75])) == expected
    assert active((0.2, 0.2, 0.2)) == active(0.2)


def test_resuming_is_bit_identical(tmp_path: Path) -> None:
    def tickets(rewind: bool, ticket: ms.Ticket | None = None) -> list[ms.Ticket]:
        options: Any = {"rounds": 3, "scope": "layer", "rewind": rewind, "key": KEY}
        return list(ms.lottery_tickets(train, draw(SHAPES), ticket=ticket, **options))

    whole = tickets(False)
    trees.assert_same(tickets(False, whole[1]), whole[2:])
    assert tickets(False, whole[3]) == []
    whole = tickets(True)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "ticket", whole[1])
        checkpointer.wait_until_finished()
        # A new process knows the shapes and dtypes only.
        shapes = jax.eval_shape(lambda: draw(SHAPES))
        masks = jax.eval_shape(
            lambda p: granet_jax.init_masks(granet_jax.static(0.0), p), shapes
        )
        like = ms.Ticket(0, masks, shapes, shapes)
        restored = checkpointer.restore(tmp_path / "ticket", like)
    trees.assert_same(restored, whole[1])
    # A checkpoint may return NumPy arrays, also for the round.
    for ticket in (restored, jax.tree.map(np.asarray, whole[1])):
        trees.assert_same(tickets(True, ticket), whole[2:])


def test_a_collapse_ends_the_iteration() -> None:
    params = {"a": jnp.ones((4, 4)), "b": jnp.full((4, 4), 1e-3)}
    tickets = ms.lottery_tickets(
        lambda params, masks, key: params,
        params,
        rounds=3,
        fraction=0.3,
        on_collapse="error",
        key=KEY,
    )
    assert [next(tickets).round, next(tickets).round] == [0, 1]
    with pytest.raises(ValueError, match="no active weight is left at 'b'"):
        next(tickets)


@pytest.mark.parametrize(
    ("result", "match"),
    [
        (lambda p, m, k: {**p, "a": p["a"] * jnp.nan}, r"finite.*at 'a'"),
        (lambda p, m, k: {**p, "b": p["b"] + 1}, "weights at 'b' that are not zero"),
        (lambda p, m, k: {"a": p["a"]}, "structure and shapes of params"),
        (lambda p, m, k: {**p, "a": p["a"].T}, "structure and shapes of params"),
    ],
)
def test_trained_weights_are_checked(result: Any, match: str) -> None:
    tickets = ms.lottery_tickets(train, draw(SHAPES), rounds=1, retrain=result, key=KEY)
    next(tickets)
    with pytest.raises(ValueError, match=match):
        next(tickets)
