"""Checks of arguments: each error names the argument, the value, and what it may be."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np


def is_number(x: Any) -> bool:
    """Whether `x` is a real number on the host."""
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}."
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
    """Raises TypeError or ValueError unless `value` is a number in the range.

    Args:
      name: of the argument, for the message.
      value: what was given.
      above: it must be larger than this; or
      least: it must be this or larger.
      most: it must be this or smaller.
      finite: whether infinity is refused.
    """
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}.")
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
        wanted = " and ".join(bound for bound in bounds if bound)
        raise ValueError(f"{name} must be {wanted}, got {value}.")


def check_sparsity(name: str, value: Any) -> None:
    """Raises TypeError or ValueError unless `value` is a number in [0, 1)."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number in [0, 1), got {value!r}.")
    if not 0.0 <= value < 1.0:
        raise ValueError(
            f"{name} must be in [0, 1), got {value}: it is the share of pruned weights "
            "(0.9 for 90%)."
        )


def check_fraction(name: str, value: Any) -> None:
    """Raises TypeError or ValueError unless `value` is a number in [0, 1]."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number in [0, 1], got {value!r}.")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}.")


def check_decay(name: str, value: Any) -> None:
    """Raises TypeError or ValueError unless `value` is a number in [0, 1)."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number in [0, 1), got {value!r}.")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}.")


def check_steps(name: str, value: Any, *, least: int = 1) -> None:
    """Raises TypeError or ValueError unless `value` is an integer from `least` on."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer number of steps, got {value!r}.")
    if not least <= value < 2**31:
        raise ValueError(
            f"{name} must be at least {least} and below 2**31, got {value}."
        )
