"""Lottery tickets: counts, rewinding, resuming; against a plain NumPy loop."""

import itertools
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

KEY = jax.random.key(5)
STATIC = granet_jax.static(0.0)
SHAPES = {"a": (6, 7), "bias": (7,), "b": (7, 5)}
WEIGHTS = 6 * 7 + 7 * 5


def make() -> Any:
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}


def train(params: Any, masks: Any, key: Any) -> Any:
    """A training that moves every weight at random, and keeps pruned ones at zero."""
    keys = dict(zip(params, jax.random.split(key, len(params)), strict=True))
    moved = {k: p + jax.random.normal(keys[k], p.shape) for k, p in params.items()}
    return granet_jax.apply_masks(moved, masks)


def shift(params: Any, masks: Any, key: Any) -> Any:
    del key
    return granet_jax.apply_masks({k: p + 0.25 for k, p in params.items()}, masks)


def simulate(
    params: Any, rounds: int, fraction: float, scope: str, rewind: bool, retrain: Any
) -> list[tuple[Any, Any, Any]]:
    """The same by NumPy but for `train`: masks, start and trained of every round."""
    names = ("a", "b")
    masks = {k: np.ones(SHAPES[k], bool) for k in names}
    start = {k: np.asarray(p) for k, p in params.items()}
    history = []
    for number in range(rounds + 1):
        run = train if number == 0 else retrain
        given = {**masks, "bias": None}
        key = jax.random.fold_in(KEY, number)
        trained = jax.device_get(run(jax.tree.map(jnp.asarray, start), given, key))
        history.append((masks, start, trained))
        sparsity = 1.0 - (1.0 - fraction) ** (number + 1)
        # Pruned weights rank below all that are left.
        ranks = [np.where(masks[k], np.abs(trained[k]), -1.0).ravel() for k in names]
        if scope == "global":
            keep = distributions.total_count(WEIGHTS, sparsity)
            order = np.argsort(-np.concatenate(ranks), kind="stable")[:keep]
            chosen = np.isin(np.arange(WEIGHTS), order)
            parts = np.split(chosen, [42])
        else:
            counts = distributions.counts(
                [SHAPES[k] for k in names],
                sparsity,
                "uniform",
                caps=[int(masks[k].sum()) for k in names],
            )
            parts = [
                np.isin(np.arange(r.size), np.argsort(-r, kind="stable")[:n])
                for r, n in zip(ranks, counts, strict=True)
            ]
        masks = {k: p.reshape(SHAPES[k]) for k, p in zip(names, parts, strict=True)}
        back = params if rewind else trained
        start = {
            k: np.where(masks[k], p, 0) if k in masks else np.asarray(p)
            for k, p in back.items()
        }
    return history


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("rewind", [True, False])
def test_against_numpy(scope: Any, rewind: bool) -> None:
    params = make()
    tickets = ms.lottery_tickets(
        train, params, rounds=4, fraction=0.3, scope=scope, rewind=rewind, key=KEY
    )
    history = simulate(params, 4, 0.3, scope, rewind, train)
    for number, (ticket, expected) in enumerate(zip(tickets, history, strict=True)):
        masks, start, trained = expected
        assert ticket.round == number
        assert masking.is_masked_node(ticket.masks["bias"])
        for k in ("a", "b"):
            np.testing.assert_array_equal(ticket.masks[k], masks[k])
        trees.assert_same(ticket.start, start)
        trees.assert_same(ticket.trained, trained)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_counts_and_nesting(scope: Any) -> None:
    tickets = list(ms.lottery_tickets(train, make(), rounds=6, scope=scope, key=KEY))
    active = [granet_jax.sparsity(t.masks).active for t in tickets]
    assert active == [math.floor(0.8**r * WEIGHTS + 0.5) for r in range(7)]
    for before, after in itertools.pairwise(tickets):
        for k in ("a", "b"):
            assert not np.any(after.masks[k] & ~before.masks[k])
            if scope == "layer":
                assert abs(after.masks[k].mean() - 0.8**after.round) < 1 / 35


def test_every_round_may_have_a_fraction_of_its_own() -> None:
    def active(fraction: Any) -> list[int]:
        found = ms.lottery_tickets(train, make(), rounds=3, fraction=fraction, key=KEY)
        return [granet_jax.sparsity(t.masks).active for t in found]

    densities = [1.0, 0.5, 0.5 * 0.9, 0.5 * 0.9 * 0.25]
    expected = [math.floor(d * WEIGHTS + 0.5) for d in densities]
    assert active([0.5, 0.1, 0.75]) == active(np.array([0.5, 0.1, 0.75])) == expected
    assert active((0.3, 0.3, 0.3)) == active(0.3)


def test_rewinding_is_exact() -> None:
    params = make()
    tickets = list(ms.lottery_tickets(train, params, rounds=2, key=KEY))
    for ticket in tickets:
        trees.assert_same(ticket.start, granet_jax.apply_masks(params, ticket.masks))
    kept = list(ms.lottery_tickets(train, params, rounds=2, rewind=False, key=KEY))
    trees.assert_same(kept[0], tickets[0])
    for before, after in itertools.pairwise(kept):
        trees.assert_same(
            after.start, granet_jax.apply_masks(before.trained, after.masks)
        )


@pytest.mark.parametrize("rewind", [True, False])
@pytest.mark.parametrize("as_numpy", [True, False])
def test_resuming_is_bit_identical(rewind: bool, as_numpy: bool) -> None:
    def tickets(**more: Any) -> list[ms.Ticket]:
        return list(
            ms.lottery_tickets(
                train, make(), rounds=3, scope="layer", rewind=rewind, key=KEY, **more
            )
        )

    whole = tickets()
    # As a checkpoint may give it back: arrays of NumPy, the round among them.
    middle = jax.tree.map(np.asarray, whole[1]) if as_numpy else whole[1]
    trees.assert_same(tickets(ticket=middle), whole[2:])
    assert tickets(ticket=whole[3]) == []


def test_a_ticket_is_saved_by_orbax_as_it_is(tmp_path: Path) -> None:
    def tickets(**more: Any) -> Any:
        return ms.lottery_tickets(train, make(), rounds=3, key=KEY, **more)

    whole = list(tickets())
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "ticket", whole[1])
        checkpointer.wait_until_finished()
        # Onto types alone, as a new process would.
        masks = jax.eval_shape(lambda p: granet_jax.init_masks(STATIC, p), make())
        like = ms.Ticket(0, masks, jax.eval_shape(make), jax.eval_shape(make))
        restored = checkpointer.restore(tmp_path / "ticket", like)
    trees.assert_same(restored, whole[1])
    trees.assert_same(list(tickets(ticket=restored)), whole[2:])


def test_retrain_serves_all_rounds_but_the_first() -> None:
    params = make()
    tickets = list(
        ms.lottery_tickets(
            train, params, rounds=2, rewind=False, retrain=shift, key=KEY
        )
    )
    history = simulate(params, 2, 0.2, "global", False, shift)
    for ticket, (_, _, trained) in zip(tickets, history, strict=True):
        trees.assert_same(ticket.trained, trained)


def test_collapse_on_the_way() -> None:
    params = {"a": jnp.ones((4, 4)), "b": jnp.full((4, 4), 1e-3)}

    def keep(params: Any, masks: Any, key: Any) -> Any:
        del masks, key
        return params

    found = ms.lottery_tickets(
        keep, params, rounds=3, fraction=0.3, on_collapse="error", key=KEY
    )
    assert [next(found).round, next(found).round] == [0, 1]
    with pytest.raises(ValueError, match="no active weight is left at 'b'"):
        next(found)


@pytest.mark.parametrize(
    ("result", "match"),
    [
        (lambda p, m, k: {**p, "a": p["a"] * jnp.nan}, r"finite.*at 'a'"),
        (lambda p, m, k: {**p, "b": p["b"] + 1}, "weights at 'b' that are not zero"),
        (lambda p, m, k: {"a": p["a"]}, "structure and shapes of params"),
        (lambda p, m, k: {**p, "a": p["a"].T}, "structure and shapes of params"),
    ],
)
def test_bad_training(result: Any, match: str) -> None:
    found = ms.lottery_tickets(train, make(), rounds=1, retrain=result, key=KEY)
    next(found)
    with pytest.raises(ValueError, match=match):
        next(found)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"rounds": -1}, ValueError, "rounds must be at least 0"),
        ({"rounds": 1.5}, TypeError, "rounds must be an integer"),
        ({"fraction": 0.0}, ValueError, r"fraction must be in \(0, 1\)"),
        ({"fraction": "half"}, TypeError, "fraction must be a number"),
        ({"fraction": [0.2, 0.2]}, ValueError, "one for each of the 1 rounds, got 2"),
        ({"fraction": [1.0]}, ValueError, r"fraction must be in \(0, 1\), got 1.0"),
        ({"scope": "x"}, ValueError, "scope must be"),
        ({"on_collapse": "x"}, ValueError, "on_collapse must be"),
        ({"key": 3}, TypeError, "key must be one jax.random.key"),
        ({"train": None}, TypeError, "must be functions"),
        ({"retrain": 3}, TypeError, "must be functions"),
        ({"ticket": (0, {}, {}, {})}, TypeError, "ticket must be a Ticket"),
        ({"ticket": ms.Ticket(0, {}, {}, {})}, ValueError, "ticket must have masks"),
    ],
)
def test_bad_arguments(change: Any, error: type[Exception], match: str) -> None:
    # At the call, not at the first ticket.
    arguments = {"train": train, "params": make(), "rounds": 1, "key": KEY, **change}
    with pytest.raises(error, match=match):
        ms.lottery_tickets(**arguments)
