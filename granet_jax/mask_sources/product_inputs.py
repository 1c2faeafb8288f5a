"""Evaluates a program, and sums the inputs that meet each weight in its products.

Every value of the program carries the weights that it holds: which parameter they come
from, and how a sum for each place of the value goes back to the places of the
parameter. So the walk needs no knowledge of modules: it finds kernels that are
transposed, reshaped, cast, masked, joined, sliced or stacked for a scan, in matrix
products and convolutions.
"""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from granet_jax.jaxpr_calls import carry_of_scan, has_products, is_call
from granet_jax.mask_sources.input_sums import (
    ROWS,
    InputSums,
    move_sums,
    stack_sums,
    sum_rows,
)
from granet_jax.mask_sources.weight_places import (
    INPUT,
    Back,
    Roles,
    UnevenError,
    Weights,
    keep,
    ways_back,
)


class Value(NamedTuple):
    """A value of the program.

    Attributes:
      array: The value itself.
      weights: The weights that it holds.
      from_batch: Whether it depends on the batch.
    """

    array: Any
    weights: tuple[Weights, ...] = ()
    from_batch: bool = False


class UnknownInputsError(Exception):
    """The inputs of a parameter cannot be told.

    Attributes:
      args: The number of the parameter among the program's inputs, and the cause.
    """


Sums = dict[int, InputSums]


@dataclasses.dataclass(frozen=True)
class ProductInputs:
    """Evaluates programs.

    Attributes:
      with_products: Whether the products of pairs of inputs are wanted.
    """

    with_products: bool

    def evaluate(
        self, program: core.Jaxpr, constants: Sequence[Any], inputs: Sequence[Value]
    ) -> tuple[list[Value], Sums]:
        """Return the outputs of a program, and the sums of each of its inputs.

        Raises:
          UnknownInputsError: The inputs that meet some weights cannot be told.
        """
        values = dict(zip(program.constvars, map(Value, constants), strict=True))
        values.update(zip(program.invars, inputs, strict=True))
        sums: Sums = {}

        def read(atom: Any) -> Value:
            return Value(atom.val) if isinstance(atom, core.Literal) else values[atom]

        for equation in program.eqns:
            operands = [read(atom) for atom in equation.invars]
            with equation.ctx.manager:
                outputs, found = self._evaluate_equation(equation, operands)
            values.update(zip(equation.outvars, outputs, strict=True))
            _add(sums, found)
        return [read(atom) for atom in program.outvars], sums

    def _evaluate_equation(
        self, equation: Any, operands: list[Value]
    ) -> tuple[list[Value], Sums]:
        name = equation.primitive.name
        held = [w for operand in operands for w in operand.weights]
        if name == "scan" and held:
            return self._evaluate_scan(equation, operands)
        if is_call(equation):
            return self.evaluate(*_program_of(equation), operands)
        if held and name not in ROWS and has_products(equation):
            raise UnknownInputsError(
                held[0].parameter,
                f"it enters {name!r}, in which products are not followed: write it "
                "with lax.scan, matrix products and convolutions",
            )
        primitive = equation.primitive
        params = primitive.get_bind_params(equation.params)
        result = primitive.bind(*(operand.array for operand in operands), **params)
        results = result if primitive.multiple_results else [result]
        from_batch = any(operand.from_batch for operand in operands)
        if name in ROWS:
            weights, sums = self._sums_of_product(equation, operands)
            return [Value(results[0], weights, from_batch)], sums
        return [
            Value(x, _moved(equation, operands, i), from_batch)
            for i, x in enumerate(results)
        ], {}

    def _sums_of_product(
        self, equation: Any, factors: list[Value]
    ) -> tuple[tuple[Weights, ...], Sums]:
        """Return the weights in a product, and the sums for those that meet data."""
        sides = [i for i, factor in enumerate(factors) if factor.weights]
        held = [w for factor in factors for w in factor.weights]
        if not any(factor.from_batch for factor in factors) or len(sides) == 2:
            # This is a product of weights, such as that of an adapter.
            return tuple(Weights(w.parameter, None) for w in held), {}
        if not sides:
            return (), {}
        (side,) = sides
        kernel, data = factors[side], factors[1 - side]
        try:
            rows = ROWS[equation.primitive.name](equation, data.array, side)
        except UnevenError as error:
            parameter = kernel.weights[0].parameter
            raise UnknownInputsError(parameter, str(error)) from None
        shape = equation.invars[side].aval.shape
        found = sum_rows(rows, shape, self.with_products)
        return (), _move_all(kernel.weights, found)

    def _evaluate_scan(
        self, equation: Any, operands: list[Value]
    ) -> tuple[list[Value], Sums]:
        program, constants = _program_of(equation)
        carry = carry_of_scan(equation)
        arrays = [operand.array for operand in operands]
        fixed, start = arrays[: carry.start], arrays[carry]
        stacked = arrays[carry.stop :]
        from_batch = [operand.from_batch for operand in operands]
        outputs_from_batch: list[bool] = []

        def value_inside(i: int, array: Any) -> Value:
            # A step sees the weights of an operand, or of one layer of it.
            way = None if carry.start <= i < carry.stop else keep
            weights = (
                () if from_batch[i] else operands[i].weights and (Weights(i, way),)
            )
            return Value(array, weights, from_batch[i])

        def step(
            state: list[Any], layer: list[Any]
        ) -> tuple[list[Any], list[Any], Sums]:
            inputs = map(value_inside, range(len(operands)), [*fixed, *state, *layer])
            outputs, sums = self.evaluate(program, constants, list(inputs))
            outputs_from_batch[:] = [value.from_batch for value in outputs]
            results = [value.array for value in outputs]
            return results[: len(state)], results[len(state) :], sums

        def split(sums: Sums) -> tuple[Sums, Sums]:
            of_fixed = {i: x for i, x in sums.items() if i < carry.start}
            return of_fixed, {i: x for i, x in sums.items() if i not in of_fixed}

        def accumulate(state: Any, layer: Any) -> tuple[Any, Any]:
            values, totals = state
            values, outputs, sums = step(values, layer)
            of_fixed, of_layer = split(sums)
            totals = jax.tree.map(jnp.add, totals, of_fixed)
            return (values, totals), (outputs, of_layer)

        first = [x[0] for x in stacked]
        while True:
            # What a step computes from the batch enters the next one.
            try:
                _, _, shapes = jax.eval_shape(step, start, first)
            except UnknownInputsError as error:
                operand, cause = error.args
                parameter = operands[operand].weights[0].parameter
                raise UnknownInputsError(parameter, cause) from None
            before = from_batch[carry]
            after = [*map(operator.or_, before, outputs_from_batch[: len(start)])]
            if after == before:
                break
            from_batch[carry] = after
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), split(shapes)[0])
        options = {k: equation.params[k] for k in ("length", "reverse", "unroll")}
        (end, totals), (outputs, layers) = lax.scan(
            accumulate, (start, zeros), stacked, **options
        )
        sums: Sums = {}
        stacks = {i: stack_sums(x) for i, x in layers.items()}
        for i, found in (totals | stacks).items():
            _add(sums, _move_all(operands[i].weights, found))
        held = [Weights(w.parameter, None) for x in operands for w in x.weights]
        return [
            Value(x, () if flag else tuple(held), flag)
            for x, flag in zip([*end, *outputs], outputs_from_batch, strict=True)
        ], sums


def _program_of(equation: Any) -> tuple[core.Jaxpr, Sequence[Any]]:
    """The program that an equation calls, with its constants."""
    for value in equation.params.values():
        if isinstance(value, core.ClosedJaxpr):
            return value.jaxpr, value.consts
        if isinstance(value, core.Jaxpr):
            return value, ()
    raise AssertionError(equation)


def _add(sums: Sums, more: Mapping[int, InputSums]) -> None:
    for parameter, found in more.items():
        before = sums.get(parameter)
        if before is not None and before.roles != found.roles:
            raise UnknownInputsError(
                parameter,
                f"one product has its inputs along the axes {_inputs(before.roles)}, "
                f"and another along {_inputs(found.roles)}",
            )
        sums[parameter] = (
            found if before is None else jax.tree.map(jnp.add, before, found)
        )


def _inputs(roles: Roles) -> list[int]:
    return [axis for axis, role in enumerate(roles) if role == INPUT]


def _move_all(held: Sequence[Weights], sums: InputSums) -> Sums:
    """The sums of parameters, from those of a value that holds their weights."""
    moved: Sums = {}
    for weights in held:
        try:
            if weights.back is None:
                raise UnevenError("a product has values computed from its weights")
            _add(moved, {weights.parameter: move_sums(weights.back, sums)})
        except UnevenError as error:
            raise UnknownInputsError(weights.parameter, str(error)) from None
    return moved


def _moved(equation: Any, operands: Sequence[Value], i: int) -> tuple[Weights, ...]:
    """The weights in output `i` of an operation that is no product."""
    if any(operand.from_batch for operand in operands):
        return ()
    arrays = [operand.array for operand in operands]
    backs = ways_back(equation, arrays, i)
    return tuple(
        Weights(w.parameter, _chain(w.back, backs.get(j)))
        for j, operand in enumerate(operands)
        for w in operand.weights
    )


def _chain(earlier: Back | None, later: Back | None) -> Back | None:
    """The way back over two operations, None if one of them has no way back."""
    if earlier is None or later is None:
        return None
    return lambda placed: earlier(later(placed))
