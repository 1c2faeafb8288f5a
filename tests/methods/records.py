"""Users' own methods: only this file depends on the fields of `Method`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import granet_jax
from granet_jax import schedules, scores

HAS_PHASES = any(f.name == "phases" for f in dataclasses.fields(granet_jax.Method))


def own(
    *,
    start: float,
    targets: dict[int, float] | None = None,
    fractions: dict[int, float] | None = None,
    prune: Any = scores.magnitude,
    revive: Any = None,
    drop: Any = scores.magnitude,
    grow: Any = scores.gradient,
    across: bool = False,
    decay: float | None = None,
    needs_gradient: bool = True,
    **shared: Any,
) -> granet_jax.Method:
    """Returns a method from tables by step, as `numpy_reference.own` takes them."""
    targets, fractions = targets or {}, fractions or {}

    def sparsity(step: int) -> float:
        reached = [t for t in targets if t <= step]
        return targets[max(reached)] if reached else start

    def fraction(step: int) -> float:
        return fractions.get(step, 0.0)

    steps = sorted(targets | fractions)
    shared |= {"name": "own", "sparsity": sparsity}
    shared["updates"] = schedules.listed(steps) if steps else schedules.NEVER
    if not HAS_PHASES:
        return granet_jax.Method(
            **shared,
            prune=prune,
            revive=revive,
            drop=drop,
            grow=grow if fractions else None,
            fraction=fraction,
            redistribute=across,
            accumulator_decay=decay,
            needs_gradient=needs_gradient,
        )
    from granet_jax import phases

    chosen: list[Any] = [phases.Prune(by=prune)]
    if revive is not None:
        chosen.append(phases.Revive(by=revive))
    if fractions:
        chosen.append(phases.Exchange(fraction, drop=drop, grow=grow, across=across))
    return granet_jax.Method(**shared, phases=tuple(chosen), average_decay=decay)


def fraction_of(method: granet_jax.Method) -> Callable[[int], float]:
    """Returns the prune fraction of a method's exchange, as a function of the step."""
    if not HAS_PHASES:
        return method.fraction
    (fraction,) = (p.fraction for p in method.phases if hasattr(p, "fraction"))
    return fraction


def with_schedules(
    method: granet_jax.Method, *, sparsity: Any, updates: Any, fraction: Any
) -> granet_jax.Method:
    """Returns the method with other schedules."""
    if not HAS_PHASES:
        return dataclasses.replace(
            method, sparsity=sparsity, updates=updates, fraction=fraction
        )
    phases = [
        dataclasses.replace(p, fraction=fraction) if hasattr(p, "fraction") else p
        for p in method.phases
    ]
    return dataclasses.replace(
        method, sparsity=sparsity, updates=updates, phases=tuple(phases)
    )


def average_of(x: Any) -> Any:
    """Returns the moving average of the gradient, of a state or of a score's inputs."""
    return x.average if hasattr(x, "average") else x.accumulator
