"""Lottery tickets: train, prune the smallest weights, rewind, and repeat.

Iterative magnitude pruning (Frankle & Carbin, ICLR 2019). Round r has the density
(1 - fraction)^r, and its training starts from the initial weights, from those of an
early step, or from the trained weights of round r - 1.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from granet_jax import distributions, masking
from granet_jax.checks import check_flag, check_integer, check_key, got, is_number
from granet_jax.layers import Stacked, layer_shapes
from granet_jax.mask_sources.layer_collapse import OnCollapse, check_action, report
from granet_jax.mask_sources.select import check_finite, count_array, full_masks
from granet_jax.masking import PyTree, Where
from granet_jax.phases import active
from granet_jax.selection import Scope, check_scope, top_k

# (params, masks, key) -> trained params.
Train = Callable[[PyTree, PyTree, Array], PyTree]


class Ticket(NamedTuple):
    """One round of `lottery_tickets`. The later rounds depend on nothing else.

    `granet_jax.sparsity(ticket.masks)` returns its sparsity.

    Attributes:
      round: Number of prunings so far; round 0 is dense.
      masks: Pytree of masks that the round trained with.
      start: Weights that training started from, zero where pruned.
      trained: Weights that training returned.
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
    stacked: Stacked = None,
    ticket: Ticket | None = None,
    on_collapse: OnCollapse = "warn",
) -> Iterator[Ticket]:
    """Train densely, then prune and train again in every round.

    Each round but the first prunes the smallest of the weights that were active in the
    previous one. Round r keeps exactly `distributions.total_count` weights at density
    (1 - fraction)^r, or at the product over the rounds' fractions; rounding errors do
    not accumulate. The weights that training starts from decide the variant:

    - Original lottery ticket: `params` at initialization and `rewind=True`.
    - Weight rewinding to step k: `params` at step k, `rewind=True`, and a `train` that
      continues from step k.
    - Learning-rate rewinding: `rewind=False` and a `retrain` that repeats the schedule
      of `train` (the default) or its last part.
    - Fine-tuning: `rewind=False` and a `retrain` at the last learning rate.

    The function runs on the host, and nothing happens until the result is iterated::

        for ticket in lottery_tickets(train, params, rounds=10, key=key):
            print(granet_jax.sparsity(ticket.masks).overall, evaluate(ticket.trained))

    `train` owns the optimizer state and the batch statistics, and initializes them in
    every call.

    Args:
      train: Function (params, masks, key) -> trained params. The given params are
        masked, and pruned weights must stay zero, as they do with
        `granet_jax.transform(granet_jax.static(0.0), inner, masks=masks)`.
      params: Pytree of arrays to start from and to rewind to.
      rounds: Number of prunings. There is one more training than that.
      fraction: Share of the active weights to prune in each round, in (0, 1), or a
        sequence with one share per round.
      scope: "global" ranks the weights of all layers together, "layer" within each.
      rewind: Whether training starts from `params` in each round, or from the trained
        weights.
      retrain: Function like `train` for all rounds but the dense one; `train` by
        default.
      key: Random key. Round r trains with `jax.random.fold_in(key, r)`.
      where: Which leaves carry a mask, as in `granet_jax.transform`.
      stacked: Which axes of a leaf count layers, as in `granet_jax.transform`.
      ticket: Ticket to continue after. The result is bit-identical to an uninterrupted
        run if the other arguments are the same.
      on_collapse: "warn", "error" or "ignore": the reaction to a leaf that is left
        without active weights.

    Returns:
      An iterator over the tickets of rounds 0 to `rounds`, or of those after `ticket`.

    Raises:
      TypeError, ValueError: An argument has the wrong type or is out of range. During
        iteration, ValueError for trained weights that are NaN or infinite, have another
        structure or shape, or are not zero where pruned, and for a collapsed leaf if
        `on_collapse="error"`.

    References:
      Frankle & Carbin, The Lottery Ticket Hypothesis, ICLR 2019. Frankle et al., Linear
      Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020 (weight rewinding).
      Renda et al., Comparing Rewinding and Fine-tuning in Neural Network Pruning, ICLR
      2020 (learning-rate rewinding).
    """
    _check_functions(train, retrain)
    check_integer("rounds", rounds, least=0)
    check_flag("rewind", rewind)
    densities = _densities(fraction, int(rounds))
    check_scope(scope)
    check_action(on_collapse)
    check_key(key)
    full = full_masks(params, where, stacked)
    if ticket is not None:
        _check_ticket(ticket, params, full)

    def tickets() -> Iterator[Ticket]:
        last = ticket
        start = 0 if ticket is None else int(ticket.round) + 1
        for number in range(start, int(rounds) + 1):
            masks, weights = full, params
            if last is not None:
                masks = _prune(last, 1.0 - densities[number], scope, stacked)
                weights = params if rewind else last.trained
                report(masks, on_collapse, stacked=stacked)
            weights = masking.apply_masks(weights, masks)
            train_round = train if retrain is None or number == 0 else retrain
            trained = train_round(weights, masks, jax.random.fold_in(key, number))
            _check_trained(trained, masks, params, f"round {number}: train")
            last = Ticket(number, masks, weights, trained)
            yield last

    return tickets()


def _prune(ticket: Ticket, sparsity: float, scope: Scope, stacked: Stacked) -> PyTree:
    """Return the ticket's masks without the smallest of its trained weights."""
    masks, treedef = jax.tree.flatten(ticket.masks)
    stacks = masking.stacks_of(ticket.masks, stacked)
    shapes = layer_shapes([tuple(m.shape) for m in masks], stacks)
    if scope == "global":
        keep = distributions.total_count(sum(map(math.prod, shapes)), sparsity)
    else:
        caps = jax.device_get(active(masks, stacks)).tolist()
        keep = distributions.counts(shapes, sparsity, "uniform", caps=caps)
    weights = masking.maskable_leaves(ticket.trained, ticket.masks)
    kept = top_k(
        [jnp.abs(w) for w in weights],
        count_array(keep, shapes, scope),
        among=masks,
        scope=scope,
        stacks=stacks,
    )
    return treedef.unflatten(kept)


def _densities(fraction: float | Sequence[float], rounds: int) -> list[float]:
    """Return the density of every round, 1 for the first."""
    is_sequence = isinstance(fraction, Sequence | np.ndarray)
    fractions = list(fraction) if is_sequence else [fraction]
    for value in fractions:
        if not is_number(value):
            raise TypeError(
                "fraction must be a number in (0, 1), or a sequence of them, got "
                f"{got(fraction)}."
            )
        if not 0.0 < value < 1.0:
            raise ValueError(f"fraction must be in (0, 1), got {value}.")
    if not is_sequence:
        return [(1.0 - fractions[0]) ** number for number in range(rounds + 1)]
    if len(fractions) != rounds:
        raise ValueError(
            f"fraction must be one number, or one for each of the {rounds} rounds, got "
            f"{len(fractions)} of them."
        )
    kept = [1.0 - value for value in fractions]
    return [math.prod(kept[:number]) for number in range(rounds + 1)]


def _check_functions(train: Any, retrain: Any) -> None:
    if not callable(train) or not (retrain is None or callable(retrain)):
        raise TypeError(
            "train and retrain must be functions (params, masks, key) -> params, got "
            f"{train!r} and {retrain!r}."
        )


def _check_ticket(ticket: Any, params: PyTree, full: PyTree) -> None:
    """Raise an error unless `ticket` can be a round of this run."""
    if not isinstance(ticket, Ticket):
        raise TypeError(
            f"ticket must be a Ticket, got {type(ticket).__name__}: restore a "
            "checkpoint into a Ticket, or build one from its parts."
        )
    if jax.tree.structure(ticket.masks) != jax.tree.structure(full):
        raise ValueError(
            "ticket must have masks at the leaves that `params` and `where` select: "
            f"{jax.tree.structure(full)}, got {jax.tree.structure(ticket.masks)}."
        )
    masking.check_masks(ticket.masks, params)
    _check_trained(ticket.trained, ticket.masks, params, "ticket")


def _check_trained(trained: PyTree, masks: PyTree, params: PyTree, what: str) -> None:
    """Raise ValueError unless these weights can result from training `params`."""

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
