"""Method records with parts of a test's own.

Tests of the core say here which parts they need, so that only this file depends on the
fields of the record.
"""

import dataclasses
from collections.abc import Sequence

import granet_jax
from granet_jax import schedules, scores
from granet_jax.phases import Exchange
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
    return granet_jax.Method(
        name="own",
        sparsity=sparsity,
        updates=updates,
        phases=(Exchange(fraction, grow=grow),),
    )


def with_resets(method: granet_jax.Method, steps: Sequence[int]) -> granet_jax.Method:
    """The method, with all moments reset after these steps."""
    return dataclasses.replace(method, resets=schedules.listed(steps))
