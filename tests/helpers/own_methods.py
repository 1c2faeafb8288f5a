"""Method records with parts of a test's own.

Tests of the core say here which parts they need, so that only this file depends on the
fields of the record.
"""

import dataclasses
from collections.abc import Sequence

import jax

import granet_jax
from granet_jax import schedules, scores
from granet_jax.phases import Exchange, Phase, Prune
from granet_jax.schedules import Schedule, Steps
from granet_jax.scores import Score

HALF = schedules.constant(0.5)


def exchange(
    *,
    updates: Steps,
    sparsity: Schedule = HALF,
    fraction: Schedule = HALF,
    grow: Score = scores.random,
) -> granet_jax.Method:
    """A method that drops a fraction by magnitude and grows as many weights by `grow`.

    The record does not announce that `grow` reads the dense gradient, even if it does.
    """
    phases = (Exchange(fraction, grow=grow),)
    return granet_jax.Method(
        name="own", sparsity=sparsity, updates=updates, phases=phases
    )


def prune_and_exchange(
    interval: int, last: int, *, floor: float = 0.0, more: tuple[Phase, ...] = ()
) -> granet_jax.Method:
    """A method that reads each part of a state, and moves weights between leaves.

    Args:
      interval: Steps between updates.
      last: The last step with an update.
      floor: The density that every layer keeps.
      more: Further phases. The sparsity rises and falls.
    """
    exchange = Exchange(HALF, grow=_by_both_gradients, across=True)
    return granet_jax.Method(
        name="prune and exchange",
        sparsity=lambda step: 0.75 if step // interval % 2 else 0.5,
        updates=schedules.every(interval, last=last),
        phases=(Prune(floor=floor), exchange, *more),
        average_decay=0.5,
        needs_gradient=True,
    )


def _by_both_gradients(x: granet_jax.ScoreInputs) -> jax.Array:
    return scores.gradient(x) + scores.momentum(x)


def with_resets(method: granet_jax.Method, steps: Sequence[int]) -> granet_jax.Method:
    """The method, with all moments reset after these steps."""
    return dataclasses.replace(method, resets=schedules.listed(steps))
