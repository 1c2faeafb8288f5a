"""The integers of a method on given leaves: how many weights are active, and when.

Plain Python and NumPy on the host, in float64 and Python integers, from the shapes of
the leaves; the step looks them up. They count what a method's structure makes one part
(see `structures.parts`): weights, or boxes of them.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from granet_jax import distributions, schedules, structures
from granet_jax.distributions import Shape
from granet_jax.methods import Method


class Plan(NamedTuple):
    """Integer tables of a method on given leaves, one row per update."""

    prunes: np.ndarray  # bool (J,): whether this update prunes
    revives: np.ndarray  # bool (J,): whether weights come back
    keep: np.ndarray  # unsigned (J,) with global scope, (J, leaves) with layer scope
    fraction: np.ndarray  # uint32 (J,): prune fraction in fixed point


def plan(method: Method, shapes: Sequence[Shape]) -> Plan:
    """The integer tables of `method` on leaves of these shapes."""
    present = initial_counts(method, shapes)
    keep: list[Any] = []
    prunes: list[bool] = []
    revives: list[bool] = []
    for step in method.updates.steps():
        sparsity = method.sparsity(step)
        wanted = _counts(method, shapes, sparsity)
        if method.revive is None and sum(wanted) > sum(present):
            wanted = [sum(present)] if _is_global(method) else present
        prunes.append(sum(wanted) < sum(present))
        revives.append(sum(wanted) > sum(present))
        if _is_global(method):
            present = wanted
        elif prunes[-1]:
            present = _counts(method, shapes, sparsity, caps=present)
        elif revives[-1]:
            present = _counts(method, shapes, sparsity, floors=present)
        keep.append(_row(method, present))
    return Plan(
        prunes=np.asarray(prunes, bool),
        revives=np.asarray(revives, bool),
        keep=np.asarray(keep, _dtype(shapes)),
        fraction=np.asarray(
            [schedules.fixed_point(method.fraction(t)) for t in method.updates.steps()],
            np.uint32,
        ),
    )


def first_phase(plan: Plan) -> np.ndarray:
    """Where an update begins, of the phases that prune, revive, and exchange: (J,).

    After pruning there is nothing to revive, and the phase for it passes.
    """
    prunes = int(plan.prunes.any())
    otherwise = np.where(plan.revives, prunes, prunes + 1)
    return np.where(plan.prunes, 0, otherwise).astype(np.int32)


def initial_counts(method: Method, shapes: Sequence[Shape]) -> list[int]:
    """Active parts of every leaf, as the distribution has it at step 0."""
    return structures.counts(
        method.structure, shapes, method.sparsity(0), method.distribution
    )


def numbers(
    method: Method, shapes: Sequence[Shape], sparsity: float | None = None
) -> np.ndarray:
    """Numbers of active weights, where they are chosen among all.

    Unsigned: at one sparsity, a scalar with global scope and (leaves,) with layer
    scope; without one, as many rows of these as updates and one before, (1 + J, ...).
    """

    def row(sparsity: float) -> int | list[int]:
        return _row(method, _counts(method, shapes, sparsity))

    if sparsity is not None:
        return np.asarray(row(sparsity), _dtype(shapes))
    steps = (0, *method.updates.steps())
    return np.asarray([row(method.sparsity(t)) for t in steps], _dtype(shapes))


def _counts(
    method: Method,
    shapes: Sequence[Shape],
    sparsity: float,
    caps: Sequence[int] | None = None,
    floors: Sequence[int] | None = None,
) -> list[int]:
    """Active parts of every leaf; with global scope one number, of all together."""
    structure = method.structure
    if _is_global(method):
        parts = structures.parts(structure, shapes)
        return [distributions.total_count(sum(parts), sparsity)]
    return structures.counts(
        structure, shapes, sparsity, method.distribution, caps, floors
    )


def _row(method: Method, counts: list[int]) -> int | list[int]:
    return counts[0] if _is_global(method) else counts


def _is_global(method: Method) -> bool:
    if method.structure is not None and not method.structure.whole:
        return False  # The numbers are those of a box, and a leaf's own.
    return method.scope == "global"


def _dtype(shapes: Sequence[Shape]) -> type[np.unsignedinteger]:
    total = sum(math.prod(s) for s in shapes)
    return np.uint32 if total < 2**32 else np.uint64
