"""Lottery tickets: train, prune the smallest weights, go back, and again."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from granet_jax import distributions, masking, updates
from granet_jax.checks import check_flag, check_key, got, is_number
from granet_jax.mask_sources.arguments import (
    check_finite,
    check_rounds,
)
from granet_jax.mask_sources.layer_collapse import OnCollapse, check_action, report
from granet_jax.mask_sources.select import full_masks
from granet_jax.masking import PyTree, Where
from granet_jax.selection import Scope, check_scope

# (params, masks, key) -> trained params.
Train = Callable[[PyTree, PyTree, Array], PyTree]


class Ticket(NamedTuple):
    """One round of `lottery_tickets`; all that the next ones follow from.

    `granet_jax.sparsity(ticket.masks)` tells how sparse it is.

    Attributes:
      round: how often it has been pruned; 0 is dense.
      masks: pytree of masks it was trained with.
      start: the weights it was trained from, zero where pruned.
      trained: the weights that training returned.
    """

    round: int
    masks: PyTree
    start: PyTree
    trained: PyTree


def lottery_tickets(
    train: Train,
    params: PyTree,
    *,
    rounds: int,
    fraction: float | Sequence[float] = 0.2,
    scope: Scope = "global",
    rewind: bool = True,
    retrain: Train | None = None,
    key: Array,
    where: Where = None,
    ticket: Ticket | None = None,
    on_collapse: OnCollapse = "warn",
) -> Iterator[Ticket]:
    """Iterative magnitude pruning: trains densely, then prunes and trains, in rounds.

    Before each round but the first, the weights that are left and smallest after the
    last are pruned, so that round r has density (1 - fraction)^r (or the product over
    the rounds' fractions), exactly `distributions.total_count` of it (no rounding adds
    up); then the weights go back:

    - the original lottery ticket: `params` of initialisation, `rewind=True`;
    - weight rewinding to step k: `params` of step k, `rewind=True`, and a `train` that
      goes on from step k;
    - learning-rate rewinding: `rewind=False`, and a `retrain` with the schedule of
      `train` (its default), or the last part of it;
    - fine-tuning: `rewind=False`, and a `retrain` at the last learning rate.

    A driver on the host, which does nothing until it is iterated over::

        for ticket in lottery_tickets(train, params, rounds=10, key=key):
            print(granet_jax.sparsity(ticket.masks).overall, evaluate(ticket.trained))

    Optimizer state and batch statistics are `train`'s own, to be made anew in each
    call.

    Args:
      train: (params, masks, key) -> params: trains from `params`, which are masked, and
        keeps pruned weights zero (`granet_jax.transform(granet_jax.static(0.0), inner,
        masks=masks)` does).
      params: pytree of arrays to start from, and to go back to.
      rounds: number of prunings; trains one more time than that.
      fraction: share of the remaining weights to prune each time, in (0, 1); or one
        for every round.
      scope: "global": weights compete across leaves; "layer": within each.
      rewind: whether weights go back to `params`, or else on from where they are.
      retrain: as `train`, for all rounds but the dense one; default `train`.
      key: random key; round r trains with `jax.random.fold_in(key, r)`.
      where: which leaves carry a mask, as in `granet_jax.transform`.
      ticket: go on after this one, bit for bit as if never interrupted, instead of
        from the start; all other arguments as before.
      on_collapse: what to do about a leaf left without active weights: "warn", "error"
        or "ignore".

    Returns:
      An iterator of each `Ticket`, of rounds 0 to `rounds` (those after `ticket`).

    Raises:
      TypeError, ValueError: an argument of the wrong type or out of range; while
        iterating, weights from training that are NaN, infinite, of another structure
        or shape, or not zero where pruned; or collapse, if that is to be an error.

    References:
      Frankle & Carbin, The Lottery Ticket Hypothesis, ICLR 2019. Frankle et al., Linear
      Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020 (weight rewinding).
      Renda et al., Comparing Rewinding and Fine-tuning in Neural Network Pruning, ICLR
      2020 (learning-rate rewinding).
    """
    _check_arguments(train, retrain, rounds, ticket)
    check_flag("rewind", rewind)
    densities = _densities(fraction, int(rounds))
    check_scope(scope)
    check_action(on_collapse)
    check_key(key)
    full = full_masks(params, where)
    if ticket is not None:
        if jax.tree.structure(ticket.masks) != jax.tree.structure(full):
            raise ValueError(
                "ticket must have masks at the leaves that `params` and `where` say: "
                f"{jax.tree.structure(full)}, got {jax.tree.structure(ticket.masks)}."
            )
        masking.check_masks(ticket.masks, params)
        _check_trained(ticket.trained, ticket.masks, params, "ticket")

    def tickets() -> Iterator[Ticket]:
        last = ticket
        start = 0 if ticket is None else int(ticket.round) + 1
        for number in range(start, int(rounds) + 1):
            masks, weights = full, params
            if last is not None:
                masks = _pruned(last, 1.0 - densities[number], scope)
                weights = params if rewind else last.trained
                report(masks, on_collapse)
            weights = masking.apply_masks(weights, masks)
            run = train if retrain is None or number == 0 else retrain
            trained = run(weights, masks, jax.random.fold_in(key, number))
            _check_trained(trained, masks, params, f"round {number}: train")
            last = Ticket(number, masks, weights, trained)
            yield last

    return tickets()


def _pruned(ticket: Ticket, sparsity: float, scope: Scope) -> PyTree:
    """The ticket's masks, less the smallest of its trained weights."""
    leaves = jax.tree.leaves(ticket.masks)
    shapes = [tuple(m.shape) for m in leaves]
    keep: Any = distributions.total_count(sum(map(math.prod, shapes)), sparsity)
    if scope == "layer":
        left = [int(n) for n in jax.device_get(masking.active_counts(ticket.masks))]
        keep = distributions.counts(shapes, sparsity, "uniform", caps=left)
    weights = masking.maskable_leaves(ticket.trained, ticket.masks)
    sizes = [jnp.abs(w) for w in weights]
    return updates.prune(ticket.masks, sizes, np.asarray(keep), scope=scope)


def _check_trained(trained: PyTree, masks: PyTree, params: PyTree, what: str) -> None:
    """Raises ValueError unless these weights can be a trained form of `params`."""

    def form(tree: PyTree) -> list[Any]:
        return [jax.tree.structure(tree), *map(jnp.shape, jax.tree.leaves(tree))]

    if form(trained) != form(params):
        raise ValueError(
            f"{what} must have parameters of the structure and shapes of params, got "
            f"{jax.tree.map(jnp.shape, trained)}."
        )
    named = jax.tree_util.tree_leaves_with_path(masks)
    weights = masking.maskable_leaves(trained, masks)
    for (path, mask), w in zip(named, weights, strict=True):
        name = masking.leaf_name(path)
        check_finite(f"{what} has weights that", {name: w})
        if not bool(jnp.all(mask | (w == 0))):
            raise ValueError(
                f"{what} has weights at {name!r} that are not zero where pruned: train "
                "with granet_jax.transform(granet_jax.static(0.0), inner, masks=masks)."
            )


def _densities(fraction: float | Sequence[float], rounds: int) -> list[float]:
    """Density of every round, 1 in the first."""
    several = isinstance(fraction, Sequence | np.ndarray)
    given = list(fraction) if several else [fraction]
    for each in given:
        if not is_number(each):
            raise TypeError(
                "fraction must be a number in (0, 1), or a sequence of them, got "
                f"{got(fraction)}."
            )
        if not 0.0 < each < 1.0:
            raise ValueError(f"fraction must be in (0, 1), got {each}.")
    if not several:
        return [(1.0 - given[0]) ** number for number in range(rounds + 1)]
    if len(given) != rounds:
        raise ValueError(
            f"fraction must be one number, or one for each of the {rounds} rounds, got "
            f"{len(given)} of them."
        )
    return [math.prod(1.0 - f for f in given[:number]) for number in range(rounds + 1)]


def _check_arguments(train: Any, retrain: Any, rounds: Any, ticket: Any) -> None:
    if not callable(train) or not (retrain is None or callable(retrain)):
        raise TypeError(
            "train and retrain must be functions (params, masks, key) -> params, got "
            f"{train!r} and {retrain!r}."
        )
    check_rounds(rounds, least=0)
    if ticket is not None and not isinstance(ticket, Ticket):
        raise TypeError(
            f"ticket must be a Ticket, got {type(ticket).__name__}: restore a "
            "checkpoint onto a Ticket, or make one of its parts."
        )
