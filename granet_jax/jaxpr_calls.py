"""Questions about the equations of a jaxpr, for programs that walk through one."""

from collections.abc import Sequence
from typing import Any

from jax.extend import core

# Primitives that multiply matrices.
PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})
# Primitives whose products a walk through the program does not see.
OPAQUE = frozenset({"ragged_dot_general", "scaled_matmul_wrapper", "shard_map"})


def programs_in(equation: Any) -> list[core.Jaxpr]:
    """The programs among the parameters of an equation."""
    return list(core.jaxprs_in_params(equation.params))


def is_call(equation: Any) -> bool:
    """Whether the equation calls one program on its operands, as jit and remat do."""
    programs = programs_in(equation)
    return (
        equation.primitive.name not in OPAQUE
        and len(programs) == 1
        and len(programs[0].invars) == len(equation.invars)
        and len(programs[0].outvars) == len(equation.outvars)
    )


def has_products(equation: Any) -> bool:
    """Whether the equation multiplies matrices, itself or in its programs."""
    return equation.primitive.name in PRODUCTS | OPAQUE or any(
        has_products(inner)
        for program in programs_in(equation)
        for inner in program.eqns
    )


def carry_of_scan(equation: Any) -> slice:
    """The places of the carry among the operands of a scan.

    Operands are constants, then the carry, then arrays with an axis of steps. The
    shapes tell how many there are of each; the names of the parameters that say so
    differ between versions of JAX.
    """
    (body,) = programs_in(equation)
    size = _count_unstacked(equation.outvars, body.outvars)
    start = _count_unstacked(equation.invars, body.invars) - size
    return slice(start, start + size)


def _count_unstacked(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """Count the variables of a scan that have no axis of steps."""
    pairs = zip(outside, inside, strict=True)
    return sum(a.aval.shape == b.aval.shape for a, b in pairs)
