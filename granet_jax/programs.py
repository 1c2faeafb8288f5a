"""What leaves have done to them alike, done to all of them at once.

A function of all leaves, once traced, falls apart into what makes each of its outputs.
Where small leaves of one shape have the same done to them, it is done to the array of
them all (`stacks`): the scores of a deep network then take as long to compile as its
shapes, and not as its leaves. What they are made of is copied for that, and held while
the masks change: of small leaves only, see there.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import core

from granet_jax.stacks import Stack


class Program(NamedTuple):
    """What makes one output of a traced function.

    Attributes:
      equations: in order.
      inputs: the variables that they read and do not make.
      output: what they make; or an input, or a literal.
      kind: equal for programs that do the same to their inputs.
    """

    equations: list[Any]
    inputs: list[Any]
    output: Any
    kind: Hashable


def programs_of(jaxpr: core.Jaxpr) -> list[Program]:
    """The program of every output of a function."""
    maker = {v: n for n, e in enumerate(jaxpr.eqns) for v in e.outvars}
    arguments = set(jaxpr.invars)
    programs = []
    for output in jaxpr.outvars:
        needed: set[int] = set()
        open_ = [output]
        while open_:
            atom = open_.pop()
            number = None if isinstance(atom, core.Literal) else maker.get(atom)
            if number is not None and number not in needed:
                needed.add(number)
                open_.extend(jaxpr.eqns[number].invars)
        equations = [jaxpr.eqns[n] for n in sorted(needed)]
        programs.append(_program(equations, output, arguments))
    return programs


def _program(equations: list[Any], output: Any, arguments: set[Any]) -> Program:
    numbers: dict[Any, int] = {}
    inputs: list[Any] = []

    def told(atom: Any) -> Hashable:
        if isinstance(atom, core.Literal):
            return atom.aval, np.asarray(atom.val).tobytes()
        if atom not in numbers:
            numbers[atom] = len(numbers)
            inputs.append(atom)
        return numbers[atom]

    kind: list[Hashable] = []
    for equation in equations:
        read = tuple(map(told, equation.invars))
        # (JAX holds parameters to be hashable. A jitted function's jaxpr is one object
        # for all leaves of one type.)
        params = frozenset(equation.params.items())
        kind.append((equation.primitive, params, read))
        for made in equation.outvars:
            numbers[made] = len(numbers)
    kind.append(told(output))
    kind.extend((v.aval, v in arguments) for v in inputs)
    return Program(equations, inputs, output, tuple(kind))


def is_by_leaf(jaxpr: core.Jaxpr, programs: Sequence[Program]) -> bool:
    """Whether outputs depend on no other argument than that of their number.

    And on nothing but values: a print, say, is no part of any program.
    """
    if jaxpr.effects:
        return False
    arguments = set(jaxpr.invars)
    return all(
        v not in arguments or v == own
        for own, program in zip(jaxpr.invars, programs, strict=True)
        for v in program.inputs
    )


def of_stack(
    function: core.ClosedJaxpr, programs: Sequence[Program], stack: Stack
) -> Callable[[Array], Array]:
    """The function of a stack that does what its leaves have done to them.

    Args:
      function: from one array of every leaf to another.
      programs: its, see `is_by_leaf`; those of the leaves of the stack of one kind.
      stack: the leaves.

    Returns:
      From the array of all leaves of the stack to that of their results. What the
      leaves' programs read otherwise is put into such arrays at once.
    """
    outer = dict(zip(function.jaxpr.constvars, function.consts, strict=True))
    mine = [programs[leaf] for leaf in stack.leaves]
    several = len(mine) > 1
    operands: list[Any] = []
    axes: list[int | None] = []
    for column in zip(*(program.inputs for program in mine), strict=True):
        own = column[0] not in outer
        alike = all(v is column[0] for v in column)
        if own:
            operands.append(None)
        elif alike:
            operands.append(outer[column[0]])
        else:
            operands.append(jnp.stack([outer[v] for v in column]))
        axes.append(0 if own or not alike else None)
    run = functools.partial(_run, mine[0])

    def whole(x: Array) -> Array:
        own = x if several else x[0]
        arguments = [own if operand is None else operand for operand in operands]
        if not several:
            return run(arguments)[None]
        return jax.vmap(run, in_axes=(axes,), axis_size=len(mine))(arguments)

    return whole


def _run(program: Program, arguments: Sequence[Any]) -> Any:
    known = dict(zip(program.inputs, arguments, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    for equation in program.equations:
        primitive = equation.primitive
        params = primitive.get_bind_params(equation.params)
        made = primitive.bind(*map(read, equation.invars), **params)
        made = made if primitive.multiple_results else [made]
        known.update(zip(equation.outvars, made, strict=True))
    return read(program.output)
