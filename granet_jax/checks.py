"""Checks of arguments. Every error names the argument, its value and valid values."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def got(value: Any) -> str:
    """Describe a value in an error message."""
    if isinstance(value, Tracer):
        kind = value.aval.str_short()
        return f"a traced {kind}: hand over a value known before jit"
    return repr(value)


def is_number(x: Any) -> bool:
    """Whether `x` is a real number on the host."""
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {got(value)}."
        )


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float = math.inf,
    finite: bool = True,
) -> None:
    """Raise TypeError or ValueError unless `value` is a number in a range.

    Args:
      name: Name of the argument, for the message.
      value: Value of the argument.
      above: Exclusive lower bound, or None.
      least: Inclusive lower bound, or None.
      most: Inclusive upper bound.
      finite: Whether the value must be finite.
    """
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {got(value)}.")
    number = float(value)
    low = (
        (above is None or number > above)
        and (least is None or number >= least)
        and not math.isnan(number)
    )
    if not low or number > most or (finite and math.isinf(number)):
        bounds = [
            "" if above is None else f"above {above:g}",
            "" if least is None else f"at least {least:g}",
            "" if math.isinf(most) else f"at most {most:g}",
            "finite" if finite and math.isinf(most) else "",
        ]
        requirement = " and ".join(bound for bound in bounds if bound)
        raise ValueError(f"{name} must be {requirement}, got {value}.")


def check_sparsity(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless `value` is a number in [0, 1)."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number in [0, 1), got {got(value)}.")
    if not 0.0 <= value < 1.0:
        raise ValueError(
            f"{name} must be in [0, 1), got {value}: it is the share of pruned weights "
            "(0.9 for 90%)."
        )


def check_fraction(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless `value` is a number in [0, 1]."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number in [0, 1], got {got(value)}.")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}.")


def check_decay(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless `value` is a number in [0, 1)."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number in [0, 1), got {got(value)}.")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}.")


def check_steps(name: str, value: Any, *, least: int = 1) -> None:
    """Raise TypeError or ValueError unless `value` is a number of steps >= `least`."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer number of steps, got {got(value)}.")
    if not least <= value < 2**31:
        raise ValueError(
            f"{name} must be at least {least} and below 2**31, got {value}."
        )


def check_integer(name: str, value: Any, *, least: int | None = None) -> None:
    """Raise TypeError or ValueError unless `value` is an integer >= `least`."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {got(value)}.")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {got(value)}.")


def check_function(name: str, value: Any, what: str = "a function") -> None:
    """Raise TypeError unless `value` can be called; `what` describes valid values."""
    if not callable(value):
        raise TypeError(f"{name} must be {what}, got {value!r}.")


def check_type(name: str, value: Any, kind: Any, what: str) -> None:
    """Raise TypeError unless `value` is a `kind`; `what` describes valid values."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {what}, got {got(value)}.")


def check_key(key: Any) -> None:
    """Raise TypeError unless `key` is a single random key, typed or legacy."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (typed and shape == ()) and not (dtype == jnp.uint32 and shape == (2,)):
        raise TypeError(f"key must be one jax.random.key(seed), got {got(key)}.")


def check_seed(seed: Any) -> None:
    """Raise TypeError unless `seed` is an integer, or an integer scalar array."""
    scalar = isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jnp.integer)
    if isinstance(seed, bool) or not (
        isinstance(seed, int | np.integer) or (scalar and seed.ndim == 0)
    ):
        raise TypeError(f"seed must be an integer, got {seed!r}.")


def check_axis_name(axis_name: Any) -> None:
    """Raise TypeError unless `axis_name` is a name, a tuple of names, or None."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if axis_name is not None and not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"axis_name must be the name of a mapped axis or None, got {axis_name!r}."
        )
