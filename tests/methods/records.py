"""Users' own methods, made of phases."""

import dataclasses
from collections.abc import Callable
from typing import Any

import granet_jax
from granet_jax import schedules, scores
from granet_jax.phases import Exchange, Phase, Prune, Revive


def own(
    *,
    start: float,
    targets: dict[int, float] | None = None,
    fractions: dict[int, float] | None = None,
    prune: Any = scores.magnitude,
    revive: Any = None,
    drop: Any = scores.magnitude,
    grow: Any = scores.gradient,
    decay: float | None = None,
    needs_gradient: bool = True,
    **shared: Any,
) -> granet_jax.Method:
    """Returns a method from tables by step, as `numpy_reference.own` takes them."""
    targets, fractions = targets or {}, fractions or {}

    def sparsity(step: int) -> float:
        reached = [t for t in targets if t <= step]
        return targets[max(reached)] if reached else start

    phases: list[Phase] = [Prune(prune)] if targets else []
    if revive is not None:
        phases.append(Revive(revive))
    if fractions:
        phases.append(Exchange(lambda step: fractions.get(step, 0.0), drop, grow))
    return granet_jax.Method(
        name="own",
        sparsity=sparsity,
        updates=schedules.listed(sorted(targets | fractions)),
        phases=tuple(phases),
        average_decay=decay,
        needs_gradient=needs_gradient,
        **shared,
    )


def fraction_of(method: granet_jax.Method) -> Callable[[int], float]:
    """Returns the prune fraction of a method's exchange, as a function of the step."""
    (fraction,) = (p.fraction for p in method.phases if isinstance(p, Exchange))
    return fraction


def with_schedules(
    method: granet_jax.Method, *, fraction: Any, **schedules: Any
) -> granet_jax.Method:
    """Returns the method with other schedules."""
    phases = [
        dataclasses.replace(p, fraction=fraction) if isinstance(p, Exchange) else p
        for p in method.phases
    ]
    return dataclasses.replace(method, phases=tuple(phases), **schedules)
