"""Count the FLOPs of matrix products and convolutions in a jaxpr, by parameter.

Each array in the program carries its origin: the parameters whose zeros become zeros of
that array. A product belongs to the parameter in the origin of its factors.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

from granet_jax.jaxpr_calls import (
    PRODUCTS,
    carry_of_scan,
    has_products,
    is_call,
    programs_in,
)

# FLOPs by the index of the parameter; None stands for products without a parameter.
Counts = Counter[int | None]


class Origin(NamedTuple):
    """Where an array in the program comes from.

    Attributes:
      parameters: Indices of the parameters whose zeros become zeros of this array.
      from_inputs: Whether the array depends on the inputs of the network.
    """

    parameters: frozenset[int]
    from_inputs: bool


CONSTANT = Origin(frozenset(), False)
INPUT = Origin(frozenset(), True)

# The output holds the values of the first operand, moved, cast or scaled, so zeros of
# that operand stay zeros. Other operands are indices, bounds or divisors.
_KEEPS_ZEROS = frozenset(
    (
        *("broadcast_in_dim", "convert_element_type", "copy", "dynamic_slice"),
        *("gather", "mesh_cast", "reduce_precision", "reshape", "reshard", "rev"),
        *("sharding_constraint", "slice", "split", "squeeze", "transpose"),
        *("abs", "div", "integer_pow", "neg", "round", "sign", "square", "tanh"),
    )
)
_OUTPUT_PER_OPERAND = frozenset({"optimization_barrier", "pvary"})


@dataclasses.dataclass(frozen=True)
class ProductCounter:
    """Follows parameters through a program and counts the products with each.

    Attributes:
      names: Name of each parameter.
      sizes: Number of weights of each parameter.
      masked: Indices of the parameters that have a mask.
    """

    names: Sequence[str]
    sizes: Sequence[int]
    masked: frozenset[int]

    def count(
        self, jaxpr: core.Jaxpr, inputs: Sequence[Origin]
    ) -> tuple[list[Origin], Counts]:
        """Return the origins of the program's outputs, and its FLOPs by parameter."""
        origins = dict.fromkeys(jaxpr.constvars, CONSTANT)
        origins.update(zip(jaxpr.invars, inputs, strict=True))
        total: Counts = Counter()

        def origin_of(atom: Any) -> Origin:
            return CONSTANT if isinstance(atom, core.Literal) else origins[atom]

        for equation in jaxpr.eqns:
            operands = [origin_of(atom) for atom in equation.invars]
            outputs, counts = self._count_equation(equation, operands)
            origins.update(zip(equation.outvars, outputs, strict=True))
            total.update(counts)
        return [origin_of(atom) for atom in jaxpr.outvars], total

    def _count_equation(
        self, equation: Any, operands: list[Origin]
    ) -> tuple[list[Origin], Counts]:
        name = equation.primitive.name
        if name in PRODUCTS:
            return self._count_product(equation, operands)
        if name == "scan":
            return self._count_scan(equation, operands)
        if name == "cond":
            return self._count_branches(equation.params["branches"], operands)
        if is_call(equation):
            return self.count(programs_in(equation)[0], operands)
        if has_products(equation):
            raise _uncountable(name)
        outputs = range(len(equation.outvars))
        return [self._transform(equation, operands, i) for i in outputs], Counter()

    def _count_product(
        self, equation: Any, factors: list[Origin]
    ) -> tuple[list[Origin], Counts]:
        is_matrix_product = equation.primitive.name == "dot_general"
        flops = (_matrix_product if is_matrix_product else _convolution)(equation)
        from_inputs = any(factor.from_inputs for factor in factors)
        counts: Counts = Counter({self._owner(equation, factors): flops})
        return [Origin(frozenset(), from_inputs)], counts

    def _owner(self, equation: Any, factors: Sequence[Origin]) -> int | None:
        """Return the index of the parameter that a product belongs to, if any."""
        parameters = frozenset().union(*(factor.parameters for factor in factors))
        masked = parameters & self.masked
        if len(masked) > 1:
            names = " and ".join(sorted(repr(self.names[x]) for x in masked))
            raise ValueError(
                f"apply_fn has a product ({equation.primitive.name} to shape "
                f"{equation.outvars[0].aval.shape}) of {names} at once, which both "
                "have masks, so its density is ambiguous. Leave all but one of them "
                "out of masks (None there), or write it as several products."
            )
        candidates = masked or parameters
        return next(iter(candidates)) if len(candidates) == 1 else None

    def _count_scan(
        self, equation: Any, operands: list[Origin]
    ) -> tuple[list[Origin], Counts]:
        (body,) = programs_in(equation)
        carry = carry_of_scan(equation)
        carry_size = carry.stop - carry.start
        operands = list(operands)
        while True:
            outputs, counts = self.count(body, operands)
            merged = [*map(_common, operands[carry], outputs[:carry_size])]
            if merged == operands[carry]:
                break
            operands[carry] = merged
        length = equation.params["length"]
        return outputs, Counter({key: length * n for key, n in counts.items()})

    def _count_branches(
        self, branches: Sequence[Any], operands: list[Origin]
    ) -> tuple[list[Origin], Counts]:
        index, *arguments = operands
        results = [self.count(branch.jaxpr, arguments) for branch in branches]
        outputs = [
            functools.reduce(_common, origins)
            for origins in zip(*(origins for origins, _ in results), strict=True)
        ]
        if index.from_inputs:
            outputs = [INPUT for _ in outputs]
        return outputs, max((counts for _, counts in results), key=Counter.total)

    def _transform(self, equation: Any, operands: list[Origin], i: int) -> Origin:
        """Return the origin of output `i` of an operation without products."""
        name = equation.primitive.name
        if name in _OUTPUT_PER_OPERAND:
            return operands[i]
        if any(operand.from_inputs for operand in operands):
            return INPUT
        parameters = [operand.parameters for operand in operands]
        if name in _KEEPS_ZEROS:
            return Origin(parameters[0], False)
        if name == "clamp":  # Its operands are the lower bound, the value, the upper.
            return Origin(parameters[1], False)
        if name == "select_n":
            # A case without parameters is taken for zeros, as in where(mask, w, 0).
            cases = {case for case in parameters[1:] if case}
            return Origin(cases.pop() if len(cases) == 1 else frozenset(), False)
        if name == "concatenate":
            return Origin(frozenset().union(*parameters), False)
        if name == "mul":
            factors = frozenset().union(*parameters)
            # In a kernel times a scale for each unit, the weights are the kernel's.
            size = equation.outvars[i].aval.size
            full = frozenset(x for x in factors if self.sizes[x] >= size)
            return Origin(full or factors, False)
        return CONSTANT


def _common(a: Origin, b: Origin) -> Origin:
    """Return what holds for an array that is one or the other."""
    if a.from_inputs or b.from_inputs:
        return INPUT
    return Origin(a.parameters & b.parameters, False)


def _uncountable(name: str) -> NotImplementedError:
    remedy = (
        "the number of iterations is not known. Use lax.scan, or lax.fori_loop with "
        "constant bounds."
        if name == "while"
        else "write it with matrix products and convolutions."
    )
    return NotImplementedError(
        f"apply_fn has products in {name!r}, whose FLOPs cannot be counted: {remedy}"
    )


def _matrix_product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    depth = math.prod(shape[axis] for axis in contracted)
    return 2 * depth * math.prod(equation.outvars[0].aval.shape)


def _convolution(equation: Any) -> int:
    params = equation.params
    numbers = params["dimension_numbers"]
    kernel = equation.invars[1].aval.shape
    output = equation.outvars[0].aval.shape
    taps = 1
    for i, (axis, kernel_axis) in enumerate(
        zip(numbers.out_spec[2:], numbers.rhs_spec[2:], strict=True)
    ):
        # The input position under each tap, for each output position. Where the input
        # is dilated, positions between its entries hold zeros and do not count.
        starts = np.arange(output[axis]) * params["window_strides"][i]
        offsets = np.arange(kernel[kernel_axis]) * params["rhs_dilation"][i]
        positions = starts[:, None] + offsets - params["padding"][i][0]
        taps *= int(np.count_nonzero(positions % params["lhs_dilation"][i] == 0))
    batch, features = (output[axis] for axis in numbers.out_spec[:2])
    return 2 * taps * batch * features * kernel[numbers.rhs_spec[1]]
