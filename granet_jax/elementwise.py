"""Whether an optimizer's step treats every weight on its own, read off its jaxpr.

For such an optimizer (sgd, adam, lion, ...) a weight whose gradient, moments and value
are zero stays so, and no other weight notices: masking its inputs is then as good as
masking its outputs, and costs no memory. `transform` takes that way where this
analysis proves it right, and the general way elsewhere (muon, lamb, adafactor, ...).

And whether a function is nothing but arithmetic by position, so that it may as well be
computed several times as once and kept.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core


class _Fact(NamedTuple):
    """What is known of a value.

    Attributes:
      shape: None if the value does not depend on masked arrays at all; else the shape
        of the masked array on whose entries it depends, position by position.
      value: what it is wherever the masked arrays are zero, if that is known: a NumPy
        scalar. Else None: some finite number, which may or may not be zero. (What
        comes from outside, a learning rate, is taken for finite, and an epsilon from
        there for no zero.)
      mixed: it depends on masked arrays in some other way.
    """

    shape: tuple[int, ...] | None = None
    value: np.generic | None = None
    mixed: bool = False

    @property
    def zero(self) -> bool:
        """Whether it is known to be zero wherever the masked arrays are."""
        return self.value is not None and bool(self.value == 0)


_CLEAN = _Fact()
_MIXED = _Fact(mixed=True)

# These pass a value on, in another type or as it is.
_SAME = frozenset(
    ["convert_element_type", "copy", "copy_p", "optimization_barrier", "stop_gradient"]
)
_RESHAPED = frozenset(["broadcast_in_dim", "reshape", "squeeze"])
# What operations by position give. (An epsilon that rounds to zero in float16 makes
# rsqrt(0 + epsilon) infinite, and its product with a zero gradient NaN.)
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "acosh": np.arccosh,
    "add": np.add,
    "add_any": np.add,
    "asin": np.arcsin,
    "asinh": np.arcsinh,
    "atan": np.arctan,
    "atan2": np.arctan2,
    "cbrt": np.cbrt,
    "ceil": np.ceil,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "conj": np.conj,
    "cos": np.cos,
    "cosh": np.cosh,
    "div": np.divide,
    "erf": lambda x: math.erf(float(x)),
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "floor": np.floor,
    "log": np.log,
    "log1p": np.log1p,
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "neg": np.negative,
    "pow": np.power,
    "real": np.real,
    "rem": np.fmod,
    "round": np.round,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sign": np.sign,
    "sin": np.sin,
    "sinh": np.sinh,
    "sqrt": np.sqrt,
    "square": np.square,
    "sub": np.subtract,
    "tan": np.tan,
    "tanh": np.tanh,
    **dict.fromkeys(_SAME | _RESHAPED, np.asarray),
}
# Zero times what is finite is zero; and divided by what is not known to be zero.
_ZERO_IF_ANY = frozenset(["mul"])
_ZERO_IF_FIRST = frozenset(["div", "rem"])
# Of what these give nothing is said.
_UNSAID = frozenset(["eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "xor"]) | {
    *("is_finite", "nextafter", "reduce_precision")
}
_BY_POSITION = (
    _ARITHMETIC.keys()
    | _UNSAID
    | frozenset(["integer_pow", "select_n"])
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
        _Fact(v.aval.shape, v.aval.dtype.type(0)) if masked else _CLEAN
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
            return _Fact(value=_constant(np.asarray(atom.val)))
        return known.get(atom, _CLEAN)

    for equation in jaxpr.eqns:
        facts = _apply(equation, [read(x) for x in equation.invars])
        known.update(zip(equation.outvars, facts, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _constant(x: np.ndarray) -> np.generic | None:
    same = x.size > 0 and bool(np.all(x == x.reshape(-1)[0]))
    return x.reshape(-1)[0] if same else None


def _apply(equation: Any, facts: list[_Fact]) -> list[_Fact]:
    name = equation.primitive.name
    outputs = equation.outvars
    for parameter in _CALLS:
        inner = equation.params.get(parameter)
        if inner is not None and name not in ("while", "scan"):
            return _follow(getattr(inner, "jaxpr", inner), facts)
    if name == "cond" and facts[0] == _CLEAN:
        branches = [_follow(b.jaxpr, facts[1:]) for b in equation.params["branches"]]
        return [
            _join(choice, _common([f.value for f in choice]))
            for choice in zip(*branches, strict=True)
        ]
    if len(outputs) == 1 and name in _BY_POSITION:
        value = _value(equation, facts)
        shape = outputs[0].aval.shape
    else:
        value = shape = None
    if all(f.shape is None and not f.mixed for f in facts):
        # Nothing masked goes in.
        return [_Fact(value=value)] * len(outputs)
    if shape is None or any(f.shape not in (None, shape) for f in facts):
        return [_MIXED] * len(outputs)
    if name in _RESHAPED and equation.invars[0].aval.shape != shape:
        return [_MIXED]
    return [_join(facts, value)]


def _value(equation: Any, facts: list[_Fact]) -> np.generic | None:
    """What an operation by position gives where the masked arrays are zero."""
    name, dtype = equation.primitive.name, equation.outvars[0].aval.dtype
    values = [f.value for f in facts]
    if not jnp.issubdtype(dtype, jnp.inexact):
        return None
    if name == "select_n":
        return _common(values[1:])
    if name == "integer_pow":
        name, values = "pow", [*values, np.float64(equation.params["y"])]
    function = _ARITHMETIC.get(name)
    if function is None:
        return None
    known = [v for v in values if v is not None]
    if len(known) == len(values):
        with np.errstate(all="ignore"):
            return dtype.type(function(*map(_wide, known)))
    if not all(map(_is_finite, known)):
        return _NAN
    zeros = [f.zero for f in facts]
    if (name in _ZERO_IF_ANY and any(zeros)) or (name in _ZERO_IF_FIRST and zeros[0]):
        return dtype.type(0)
    # A power of zero may be infinite; and what divides by zero is.
    if (name == "pow" and zeros[0]) or (name == "div" and zeros[1]):
        return _NAN
    return None


_NAN = np.float64(np.nan)


def _wide(x: np.generic) -> np.generic:
    """In a type that every function of NumPy knows; bfloat16 is none."""
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def _is_finite(x: np.generic) -> bool:
    return bool(np.isfinite(_wide(x)))


def _common(values: Sequence[np.generic | None]) -> np.generic | None:
    """The value of a choice among several, of which nothing is known."""
    first, *rest = values
    if first is not None and all(v is not None and v == first for v in rest):
        return first
    return None if all(v is None or _is_finite(v) for v in values) else _NAN


def _join(facts: Sequence[_Fact], value: np.generic | None) -> _Fact:
    if any(f.mixed for f in facts):
        return _MIXED
    shapes = {f.shape for f in facts if f.shape is not None}
    if len(shapes) > 1:
        return _MIXED
    return _Fact(shape=shapes.pop() if shapes else None, value=value)
