"""Whether an optimizer's step treats every weight on its own, read off its jaxpr.

For such an optimizer (sgd, adam, lion, ...) a weight whose gradient, moments and value
are zero stays so, and no other weight notices: masking its inputs is then as good as
masking its outputs, and costs no memory. `transform` takes that way where this
analysis proves it right, and the general way elsewhere (muon, lamb, adafactor, ...).

And whether a function is nothing but arithmetic by position, so that it may as well be
computed several times as once and kept.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core


class _Fact(NamedTuple):
    """What is known of a value.

    Attributes:
      shape: None if the value does not depend on masked arrays at all; else the shape
        of the masked array on whose entries it depends, position by position.
      zero: whether it is zero wherever the masked arrays are.
      mixed: it depends on masked arrays in some other way.
    """

    shape: tuple[int, ...] | None = None
    zero: bool = False
    mixed: bool = False


_CLEAN = _Fact()
_MIXED = _Fact(mixed=True)

_ZERO_IF_ALL = frozenset(
    [
        "add",
        "sub",
        "add_any",
        "max",
        "min",
        "neg",
        "abs",
        "sign",
        "sqrt",
        "cbrt",
        "sin",
        "tan",
        "tanh",
        "asin",
        "atan",
        "sinh",
        "asinh",
        "expm1",
        "log1p",
        "erf",
        "floor",
        "ceil",
        "round",
        "convert_element_type",
        "copy",
        "copy_p",
        "square",
        "stop_gradient",
        "reduce_precision",
        "real",
        "conj",
        "optimization_barrier",
    ]
)
_ZERO_IF_ANY = frozenset(["mul"])
_ZERO_IF_FIRST = frozenset(["div", "rem"])
_NEVER_ZERO = frozenset(
    [
        "exp",
        "exp2",
        "log",
        "rsqrt",
        "logistic",
        "cos",
        "cosh",
        "acosh",
        "pow",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "and",
        "or",
        "not",
        "xor",
        "is_finite",
        "nextafter",
        "atan2",
        "clamp",
    ]
)
_BY_POSITION = (
    _ZERO_IF_ALL
    | _ZERO_IF_ANY
    | _ZERO_IF_FIRST
    | _NEVER_ZERO
    | frozenset(["integer_pow", "select_n", "broadcast_in_dim", "reshape", "squeeze"])
    | frozenset(["bitcast_convert_type", "shift_left", "iota"])
    | frozenset(["shift_right_logical", "shift_right_arithmetic"])
)
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def is_elementwise(
    function: Any, args: Any, masked_in: Sequence[bool], masked_out: Sequence[bool]
) -> bool:
    """Whether masked outputs follow masked inputs by position, and zeros stay zero.

    Args:
      function: a traceable function.
      args: a tuple of pytrees of arrays, traced or not; only types are read.
      masked_in: for every leaf of `args`, whether it is a masked array.
      masked_out: for every leaf of the function's result, the same.

    Returns:
      True if it is proved that every masked output has, at every position, a value
      that depends only on that position of masked inputs of its shape (and on inputs
      that are not masked), zero where those are zero; and that no other output
      depends on masked inputs. False if not.
    """
    jaxpr: Any = jax.make_jaxpr(function)(*args).jaxpr
    facts = [
        _Fact(shape=v.aval.shape, zero=True) if masked else _CLEAN
        for v, masked in zip(jaxpr.invars, masked_in, strict=True)
    ]
    results = _follow(jaxpr, facts)
    return all(
        not fact.mixed
        and (
            (fact.zero and fact.shape == var.aval.shape)
            if masked
            else fact.shape is None
        )
        for fact, var, masked in zip(results, jaxpr.outvars, masked_out, strict=True)
    )


def is_light(jaxpr: core.Jaxpr) -> bool:
    """Whether a function does no more than arithmetic by position, cheap to do again.

    Args:
      jaxpr: the function, traced.

    Returns:
      False if there is anything else that arrays go through or come from: a sum, a
      sort, a product of matrices, random bits, a loop. (Scalars may go through all.)
    """
    for equation in jaxpr.eqns:
        atoms = [*equation.invars, *equation.outvars]
        if all(math.prod(getattr(a.aval, "shape", ())) <= 1 for a in atoms):
            continue
        name = equation.primitive.name
        calls = [equation.params[p] for p in _CALLS if p in equation.params]
        if name == "cond":
            calls = equation.params["branches"]
        if not calls or name in ("while", "scan"):
            if name not in _BY_POSITION:
                return False
        elif not all(is_light(getattr(call, "jaxpr", call)) for call in calls):
            return False
    return True


def _follow(jaxpr: Any, arguments: Sequence[_Fact]) -> list[_Fact]:
    known = dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> _Fact:
        if isinstance(atom, core.Literal):
            return _Fact(zero=bool(np.all(np.asarray(atom.val) == 0)))
        return known.get(atom, _CLEAN)

    for equation in jaxpr.eqns:
        facts = _apply(equation, [read(x) for x in equation.invars])
        known.update(zip(equation.outvars, facts, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _apply(equation: Any, facts: list[_Fact]) -> list[_Fact]:
    name = equation.primitive.name
    outputs = len(equation.outvars)
    for parameter in _CALLS:
        inner = equation.params.get(parameter)
        if inner is not None and name not in ("while", "scan"):
            return _follow(getattr(inner, "jaxpr", inner), facts)
    if name == "cond" and facts[0] == _CLEAN:
        branches = [_follow(b.jaxpr, facts[1:]) for b in equation.params["branches"]]
        return [
            _join(choice, zero=all(f.zero for f in choice))
            for choice in zip(*branches, strict=True)
        ]
    if all(f.shape is None and not f.mixed for f in facts):
        # Nothing masked goes in. A broadcast zero is a zero.
        zero = name in ("broadcast_in_dim", "convert_element_type") and facts[0].zero
        return [_Fact(zero=zero)] * outputs
    if outputs != 1:
        return [_MIXED] * outputs
    shape = equation.outvars[0].aval.shape
    if any(f.shape is not None and f.shape != shape for f in facts):
        return [_MIXED]
    if name in _ZERO_IF_ALL:
        return [_join(facts, zero=all(f.zero for f in facts))]
    if name in _ZERO_IF_ANY:
        return [_join(facts, zero=any(f.zero for f in facts))]
    if name in _ZERO_IF_FIRST:
        return [_join(facts, zero=facts[0].zero)]
    if name == "integer_pow":
        return [_join(facts, zero=facts[0].zero and equation.params["y"] > 0)]
    if name == "select_n":
        return [_join(facts, zero=all(f.zero for f in facts[1:]))]
    if name in _NEVER_ZERO:
        return [_join(facts, zero=False)]
    if name in ("broadcast_in_dim", "reshape", "squeeze") and (
        equation.invars[0].aval.shape == shape
    ):
        return [facts[0]]
    return [_MIXED]


def _join(facts: Sequence[_Fact], *, zero: bool) -> _Fact:
    if any(f.mixed for f in facts):
        return _MIXED
    shapes = {f.shape for f in facts if f.shape is not None}
    if len(shapes) > 1:
        return _MIXED
    return _Fact(shape=shapes.pop() if shapes else None, zero=zero)
