"""Follows the weights of a parameter to the places where a program puts them.

A program transposes, reshapes, joins, slices and casts weights before it multiplies
with them. For each of these operations there is a way back: it takes an array with the
axes of the result, such as sums over the inputs of a product, to the places that the
weights came from.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from granet_jax.distributions import Shape

# What an axis of a kernel counts in a product: the inputs that an output sums, the
# outputs that share their inputs, or groups of outputs with inputs of their own.
INPUT, OUTPUT, GROUP = "input", "output", "group"
Roles = tuple[str, ...]


class Placed(NamedTuple):
    """An array with the axes of a value that holds weights.

    Attributes:
      array: The array, of length 1 along axes whose role is not in `present`.
      roles: What each axis counts. It does not matter for an axis of length 1.
      present: The roles along whose axes the array has its full length.
    """

    array: Array
    roles: Roles
    present: frozenset[str]


Back = Callable[[Placed], Placed]


class Weights(NamedTuple):
    """The weights of one parameter that a value holds.

    Attributes:
      parameter: The number of the parameter among the inputs of the program.
      back: Takes an array from the places of the value to those of the parameter. None
        if the value is computed from the weights in another way than by moving them.
    """

    parameter: int
    back: Back | None


class UnevenError(Exception):
    """Weights were moved in a way that mixes inputs and outputs."""


# The output holds the values of the first operand at the same places.
_SAME_PLACES = frozenset(
    (
        *("convert_element_type", "copy", "mesh_cast", "reduce_precision", "reshard"),
        "sharding_constraint",
    )
)


def keep(placed: Placed) -> Placed:
    """The way back over an operation that does not move weights."""
    return placed


def ways_back(equation: Any, operands: Sequence[Array], i: int) -> dict[int, Back]:
    """The ways back from output `i` of an operation, by the number of the operand.

    Args:
      equation: The operation.
      operands: The values of its operands.
      i: The number of the output.

    Returns:
      Nothing for operands whose values the output does not hold unchanged.
    """
    name, params = equation.primitive.name, equation.params
    shapes = [atom.aval.shape for atom in equation.invars]
    result = equation.outvars[i].aval.shape
    if name in _SAME_PLACES:
        return {0: keep}
    if name in ("add", "add_any"):
        return {0: keep, 1: keep}
    if name == "select_n":
        return dict.fromkeys(range(1, len(operands)), keep)
    if name in ("optimization_barrier", "pvary"):
        return {i: keep}
    if name == "transpose":
        return {0: _back_from_transpose(params["permutation"])}
    if name in ("reshape", "squeeze", "broadcast_in_dim"):
        repeats = math.prod(shapes[0]) != math.prod(result)
        return {} if repeats else {0: _back_from_reshape(shapes[0], result)}
    if name == "slice" and params["strides"] is None:
        return {0: _back_from_slice(shapes[0], params["start_indices"], result)}
    if name == "dynamic_slice":
        return {0: _back_from_slice(shapes[0], operands[1:], result)}
    if name == "split":
        axis = params["axis"]
        starts = [0] * len(result)
        starts[axis] = sum(params["sizes"][:i])
        return {0: _back_from_slice(shapes[0], starts, result)}
    if name == "concatenate":
        axis = params["dimension"]
        ends = np.cumsum([shape[axis] for shape in shapes])
        return {
            j: _back_from_join(axis, int(end) - shape[axis], int(end))
            for j, (shape, end) in enumerate(zip(shapes, ends, strict=True))
        }
    return {}


def _back_from_transpose(permutation: Sequence[int]) -> Back:
    order = [int(i) for i in np.argsort(permutation)]

    def back(placed: Placed) -> Placed:
        roles = tuple(placed.roles[i] for i in order)
        return Placed(jnp.transpose(placed.array, order), roles, placed.present)

    return back


def _back_from_reshape(before: Shape, after: Shape) -> Back:
    parts = _common_parts(before, after)

    def back(placed: Placed) -> Placed:
        shape, roles = [1] * len(before), [OUTPUT] * len(before)
        for old, new in parts:
            found = {placed.roles[i] for i in new if after[i] > 1} or {OUTPUT}
            if len(found) > 1:
                raise UnevenError(
                    f"a reshape from {before} to {after} joins its inputs with others"
                )
            (role,) = found
            for i in old:
                roles[i] = role
                shape[i] = before[i] if role in placed.present else 1
        return Placed(placed.array.reshape(shape), tuple(roles), placed.present)

    return back


def _common_parts(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Pairs of lists of axes that hold the same entries before and after a reshape."""
    parts: list[tuple[list[int], list[int]]] = []
    old, new = list(range(len(before))), list(range(len(after)))
    while old or new:
        left, right = old[:1], new[:1]
        while (a := math.prod(before[i] for i in left)) != (
            b := math.prod(after[i] for i in right)
        ):
            if a < b:
                left.append(left[-1] + 1 if left else old[0])
            else:
                right.append(right[-1] + 1 if right else new[0])
        parts.append((left, right))
        old, new = old[len(left) :], new[len(right) :]
    return parts


def _back_from_slice(whole: Shape, starts: Sequence[Any], part: Shape) -> Back:
    cut = [axis for axis in range(len(whole)) if part[axis] != whole[axis]]

    def back(placed: Placed) -> Placed:
        roles = list(placed.roles)
        shape, places = list(placed.array.shape), [0] * len(whole)
        for axis in cut:
            if part[axis] == 1:  # One layer, or one unit, is read alone.
                roles[axis] = GROUP
            if roles[axis] == OUTPUT:
                raise UnevenError(
                    "a product has a part of its outputs: slice the result of one "
                    "product instead"
                )
            if roles[axis] in placed.present:
                shape[axis] = whole[axis]
                places[axis] = starts[axis]
        zeros = jnp.zeros(shape, placed.array.dtype)
        array = lax.dynamic_update_slice(zeros, placed.array, places)
        return Placed(array, tuple(roles), placed.present)

    return back


def _back_from_join(axis: int, start: int, end: int) -> Back:
    def back(placed: Placed) -> Placed:
        if placed.roles[axis] not in placed.present:
            return placed
        part = lax.slice_in_dim(placed.array, start, end, axis=axis)
        return Placed(part, placed.roles, placed.present)

    return back
