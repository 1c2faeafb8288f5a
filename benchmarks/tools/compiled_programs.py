"""What can be read off programs: their loops, copies and passes over memory."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core

_ITEM_BYTES = {"pred": 1, "token": 0}


class Copy(NamedTuple):
    """One copy in a program: its bytes, and whether it is within a loop."""

    bytes: int
    looped: bool


def copies(program: str) -> list[Copy]:
    """All copies in a compiled program's text."""
    return [
        Copy(type_bytes(match[1]), looped)
        for looped, line in in_loops(program)
        if (match := re.search(r"= (\S+) copy\(", line))
    ]


def in_loops(program: str) -> list[tuple[bool, str]]:
    """The instructions of a compiled program's text, and whether a loop has them."""
    bodies: dict[str, list[str]] = {}
    current: list[str] = []
    for line in program.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = bodies.setdefault(header[1], [])
        elif " = " in line:
            current.append(line)
    looped: set[str] = set()
    waiting = re.findall(r"(?:body|condition)=%?([\w.\-]+)", program)
    while waiting:
        name = waiting.pop()
        if name in looped:
            continue
        looped.add(name)
        for line in bodies.get(name, ()):
            waiting += _called(line)
    return [(name in looped, line) for name in bodies for line in bodies[name]]


def _called(line: str) -> list[str]:
    single = r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    found = re.findall(single, line)
    for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
        found += [name.strip().lstrip("%") for name in group.split(",")]
    return found


def type_bytes(types: str) -> int:
    """Bytes of all arrays of a type in a program's text: "(f32[8,2]{1,0}, u8[])"."""
    total = 0
    for kind, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", types):
        width = _ITEM_BYTES.get(kind)
        if width is None:
            width = int(re.sub(r"\D", "", kind)) // 8
        total += width * math.prod(int(n) for n in dims.split(",") if n)
    return total


def count_trips(f: Callable[..., Any], *args: Any) -> list[int]:
    """How often each `lax.while_loop` of f(*args) runs, in all.

    The jaxpr of `f` is run with counters added to what each loop carries, so the loops
    are those of `f` itself. Those within a scan or a branch of a cond are not counted.

    Returns:
      The number of trips of every loop, one before those within it.
    """
    closed = jax.make_jaxpr(f)(*args)

    def counted(leaves: Sequence[Array]) -> list[Array]:
        return _run(closed.jaxpr, closed.consts, leaves)[1]

    return [int(trips) for trips in jax.jit(counted)(jax.tree.leaves(args))]


def _run(
    jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]
) -> tuple[list[Any], list[Array]]:
    """Results of a jaxpr, and the trips of its loops."""
    known: dict[core.Var, Any] = {}
    known |= zip(jaxpr.constvars, consts, strict=True)
    known |= zip(jaxpr.invars, args, strict=True)
    trips: list[Array] = []
    for eqn in jaxpr.eqns:
        values = [
            x.val if isinstance(x, core.Literal) else known[x] for x in eqn.invars
        ]
        name = eqn.primitive.name
        if name == "while":
            results, more = _run_loop(eqn.params, values)
            trips += more
        elif name in ("jit", "pjit"):
            inner = eqn.params["jaxpr"]
            results, more = _run(inner.jaxpr, inner.consts, values)
            trips += more
        else:
            results = eqn.primitive.bind(*values, **eqn.params)
            results = results if eqn.primitive.multiple_results else [results]
        known |= zip(eqn.outvars, results, strict=True)
    results = [
        x.val if isinstance(x, core.Literal) else known[x] for x in jaxpr.outvars
    ]
    return results, trips


def _loops(jaxpr: core.Jaxpr) -> int:
    """How many loops `_run` finds."""
    found = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "while":
            found += 1 + _loops(eqn.params["body_jaxpr"].jaxpr)
        elif eqn.primitive.name in ("jit", "pjit"):
            found += _loops(eqn.params["jaxpr"].jaxpr)
    return found


def _run_loop(
    params: dict[str, Any], values: Sequence[Any]
) -> tuple[list[Any], list[Array]]:
    """A `lax.while_loop`, its trips, and those of the loops within it."""
    first, second = params["cond_nconsts"], params["body_nconsts"]
    of_test, of_body = values[:first], values[first : first + second]
    test, body = params["cond_jaxpr"], params["body_jaxpr"]

    def goes_on(carry: tuple[list[Any], list[Array]]) -> Array:
        return _run(test.jaxpr, test.consts, [*of_test, *carry[0]])[0][0]

    def trip(carry: tuple[list[Any], list[Array]]) -> tuple[list[Any], list[Array]]:
        state, trips = carry
        state, within = _run(body.jaxpr, body.consts, [*of_body, *state])
        more = [jnp.ones((), jnp.int32), *within]
        return state, [a + b for a, b in zip(trips, more, strict=True)]

    none = [jnp.zeros((), jnp.int32)] * (1 + _loops(body.jaxpr))
    return lax.while_loop(goes_on, trip, (list(values[first + second :]), none))
