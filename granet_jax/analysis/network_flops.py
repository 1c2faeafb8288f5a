"""How much a sparse network computes in a forward pass, of any model.

Read from the program that jax traces, so nothing is known of modules and nothing runs.
Two FLOPs are counted for each multiply-add of a product with an active weight: of
matrix products (`lax.dot_general`, which einsum and attention come down to) and of
convolutions. Norms, biases, activations, look-ups of embeddings and linear algebra are
not counted.

- A tap of a convolution counts whether or not it falls on padding, as in the RigL
  paper's counts and as is usual; zeros that a transposed convolution puts between its
  inputs do not.
- The body of a `lax.scan` (of `lax.map`, and of a `lax.fori_loop` of fixed length)
  counts once an iteration, the costliest branch of a `lax.cond` once. A
  `lax.while_loop` with products in it is refused: its iterations are not known.
- A product belongs to the parameter that is one of its factors, whatever moves,
  reshapes, repeats, casts or scales it on the way there (what keeps its zeros). It
  costs the density of the whole leaf, also where it takes a slice of it.
- Products without such a factor, as of queries with keys, count dense, under `other`.
  So do those with a weight whose zeros were lost on the way (standardised, or merged
  with a low-rank update), or that depends on the inputs (a hypernetwork, an expert that
  the inputs choose).
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from granet_jax.analysis.named_leaves import paired
from granet_jax.checks import check_function
from granet_jax.masking import PyTree, check_arrays


class LeafFlops(NamedTuple):
    """FLOPs of the products with one parameter.

    Attributes:
      shape: of the parameter.
      masked: whether it carries a mask.
      active: number of its active weights; all of them without a mask.
      dense: FLOPs with all weights, an integer.
    """

    shape: tuple[int, ...]
    masked: bool
    active: int
    dense: int

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def sparse(self) -> float:
        """FLOPs with the active weights only."""
        return self.dense * self.active / self.size if self.size else 0.0


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of a forward pass.

    Attributes:
      leaves: of every parameter, by its name ("dense/kernel"); 0 for biases and others
        that are no factor of a product.
      other: of products without a parameter, as in attention.
    """

    leaves: Mapping[str, LeafFlops]
    other: int

    @property
    def dense(self) -> int:
        """FLOPs of the network without masks."""
        return self.other + sum(leaf.dense for leaf in self.leaves.values())

    @property
    def sparse(self) -> float:
        """FLOPs of the network with its masks."""
        return self.other + math.fsum(leaf.sparse for leaf in self.leaves.values())

    @property
    def ratio(self) -> float:
        """`sparse` as a share of `dense`; 1 where nothing is computed."""
        return self.sparse / self.dense if self.dense else 1.0

    def at(self, densities: Mapping[str, float]) -> float:
        """FLOPs at other densities, in [0, 1], by leaf; one not named is dense.

        Raises:
          ValueError: an unknown leaf, or a density out of range.
        """
        if unknown := sorted(set(densities) - set(self.leaves)):
            raise ValueError(
                f"densities names leaves {unknown}, which the network has not: it has "
                f"{', '.join(self.leaves)}."
            )
        for name, density in densities.items():
            if not 0 <= density <= 1:
                raise ValueError(
                    f"densities must be in [0, 1], got {density} for {name!r}."
                )
        return self.other + math.fsum(
            leaf.dense * densities.get(name, 1.0) for name, leaf in self.leaves.items()
        )


def flops(
    apply_fn: Callable[..., Any], params: PyTree, masks: PyTree | None, *inputs: Any
) -> Flops:
    """FLOPs of `apply_fn(params, *inputs)`, dense and with masks.

    With linen, nnx and equinox::

        flops(lambda p, x: model.apply({"params": p}, x), params, masks, x)
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        flops(lambda p, r, x: nnx.merge(graph, p, r)(x), params, masks, rest, x)
        params, static = eqx.partition(model, eqx.is_array)
        flops(lambda p, x: eqx.combine(p, static)(x), params, masks, x)

    Args:
      apply_fn: the forward pass; traced, not run.
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      masks: concrete masks of these leaves (None or `optax.MaskedNode()` at leaves
        without one, packed or not), matched by name; or None for a dense network.
      *inputs: pytrees of arrays or `jax.ShapeDtypeStruct`. FLOPs are those of all of
        them: of a batch, if they are one.

    Returns:
      See `Flops`.

    Raises:
      ValueError: masks that do not fit; a product of several masked leaves at once.
      NotImplementedError: a product in a loop of unknown length, or in a primitive that
        cannot be looked into.
    """
    check_function("apply_fn", apply_fn, "a function (params, *inputs) -> outputs")
    pairs = paired(params, masks)
    check_arrays("inputs", inputs)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    program = jax.make_jaxpr(apply_fn)(abstract, *inputs)
    names = list(pairs)
    sizes = [math.prod(leaf.shape) for leaf, _ in pairs.values()]
    masked = frozenset(i for i, (_, m) in enumerate(pairs.values()) if m is not None)
    given = [_Value(frozenset([i]), False) for i in range(len(names))]
    given += [_Value(frozenset(), True)] * (len(program.jaxpr.invars) - len(names))
    _, counts = _Tracer(names, sizes, masked).walk(program.jaxpr, given)
    leaves = {
        name: LeafFlops(
            shape=tuple(leaf.shape),
            masked=mask is not None,
            active=size if mask is None else int(np.count_nonzero(mask)),
            dense=counts[i],
        )
        for i, ((name, (leaf, mask)), size) in enumerate(
            zip(pairs.items(), sizes, strict=True)
        )
    }
    return Flops(leaves, other=counts[None])


class _Value(NamedTuple):
    """What is known of an array in the program.

    Attributes:
      leaves: parameters (by number) whose zeros make zeros of it.
      data: whether it depends on the inputs.
    """

    leaves: frozenset[int]
    data: bool


_CONSTANT = _Value(frozenset(), False)

# Of the first operand, at other places or in another form, with its zeros. The other
# operands say where.
_MOVES = frozenset(
    (
        *("broadcast_in_dim", "convert_element_type", "copy", "dynamic_slice"),
        *("gather", "mesh_cast", "reduce_precision", "reshape", "reshard", "rev"),
        *("sharding_constraint", "slice", "split", "squeeze", "transpose"),
        *("abs", "clamp", "div", "integer_pow", "neg", "round", "sign", "square"),
        "tanh",
    )
)
# One output for each operand.
_EACH = frozenset({"optimization_barrier", "pvary"})
_PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})
_OPAQUE = frozenset({"ragged_dot_general", "scaled_matmul_wrapper", "shard_map"})


@dataclasses.dataclass(frozen=True)
class _Tracer:
    """Follows parameters through a program.

    Attributes:
      names: of the parameters.
      sizes: their numbers of weights.
      masked: which ones carry a mask.
    """

    names: Sequence[str]
    sizes: Sequence[int]
    masked: frozenset[int]

    def walk(
        self, jaxpr: core.Jaxpr, given: Sequence[_Value]
    ) -> tuple[list[_Value], Counter[int | None]]:
        """What a program makes of values, and its FLOPs by parameter (None: other)."""
        values = dict.fromkeys(jaxpr.constvars, _CONSTANT)
        values.update(zip(jaxpr.invars, given, strict=True))
        counts: Counter[int | None] = Counter()

        def read(atom: Any) -> _Value:
            return _CONSTANT if isinstance(atom, core.Literal) else values[atom]

        for equation in jaxpr.eqns:
            outputs, found = self._equation(equation, [*map(read, equation.invars)])
            values.update(zip(equation.outvars, outputs, strict=True))
            counts.update(found)
        return [read(atom) for atom in jaxpr.outvars], counts

    def _equation(
        self, equation: Any, given: list[_Value]
    ) -> tuple[list[_Value], Counter[int | None]]:
        name, params = equation.primitive.name, equation.params
        if name in _PRODUCTS:
            cost = _matrix_product(equation) if name == "dot_general" else None
            cost = _convolution(equation) if cost is None else cost
            owner = self._owner(equation, given)
            data = any(value.data for value in given)
            return [_Value(frozenset(), data)], Counter({owner: cost})
        if name == "scan":
            return self._scan(equation, given)
        if name == "cond":
            return self._branches(params["branches"], given)
        programs = list(core.jaxprs_in_params(params))
        if name in _OPAQUE or (
            programs and not _is_call(equation, programs) and any(map(_has, programs))
        ):
            raise NotImplementedError(
                f"apply_fn has products in {name!r}, whose FLOPs cannot be counted"
                + (
                    ": the number of iterations is not known. Use lax.scan, or "
                    "lax.fori_loop with constant bounds."
                    if name == "while"
                    else ": write it with matrix products and convolutions."
                )
            )
        if programs and _is_call(equation, programs):
            return self.walk(programs[0], given)
        outputs = [
            self._elementwise(name, equation, given, i)
            for i in range(len(equation.outvars))
        ]
        return outputs, Counter()

    def _elementwise(
        self, name: str, equation: Any, given: list[_Value], i: int
    ) -> _Value:
        """Output i of an operation that is neither a product nor a program."""
        if name in _EACH:
            return given[i]
        if any(value.data for value in given):
            return _Value(frozenset(), True)
        sets = [value.leaves for value in given]
        if name in _MOVES:
            return _Value(sets[1] if name == "clamp" else sets[0], False)
        if name == "select_n":
            # A case without parameters is taken for zeros: where(mask, w, 0).
            sets = [leaves for leaves in sets[1:] if leaves]
            same = len(set(sets)) == 1
            return _Value(sets[0] if same else frozenset(), False)
        if name in ("mul", "concatenate"):
            found = frozenset().union(*sets)
            if name == "mul":
                # Of a kernel times a scale for each unit, the kernel.
                size = equation.outvars[i].aval.size
                found = frozenset(x for x in found if self.sizes[x] >= size) or found
            return _Value(found, False)
        return _CONSTANT

    def _owner(self, equation: Any, given: Sequence[_Value]) -> int | None:
        """The parameter that a product belongs to."""
        found = frozenset().union(*(value.leaves for value in given))
        masked = found & self.masked
        if len(masked) > 1:
            names = " and ".join(sorted(repr(self.names[x]) for x in masked))
            raise ValueError(
                f"apply_fn has a product ({equation.primitive.name} to shape "
                f"{equation.outvars[0].aval.shape}) of {names} at once, which both "
                "have masks: whose density it has is not clear. Leave all but one "
                "out of masks (None there), or write it as several products."
            )
        chosen = masked or found
        return next(iter(chosen)) if len(chosen) == 1 else None

    def _scan(
        self, equation: Any, given: list[_Value]
    ) -> tuple[list[_Value], Counter[int | None]]:
        params = equation.params
        body: core.Jaxpr = params["jaxpr"].jaxpr
        # What is not stacked along the steps is constant or, if it also comes out,
        # carried. (How params say so differs between versions of jax.)
        number = _not_stacked(equation.outvars, body.outvars)
        first = _not_stacked(equation.invars, body.invars) - number
        given = list(given)
        while True:
            outputs, counts = self.walk(body, given)
            carried = given[first : first + number]
            merged = [*map(_either, carried, outputs[:number])]
            if merged == carried:
                break
            given[first : first + number] = merged
        length = params["length"]
        return outputs, Counter({key: length * n for key, n in counts.items()})

    def _branches(
        self, branches: Sequence[Any], given: list[_Value]
    ) -> tuple[list[_Value], Counter[int | None]]:
        choice, *operands = given
        found = [self.walk(branch.jaxpr, operands) for branch in branches]
        outputs = [
            functools.reduce(_either, values)
            for values in zip(*(values for values, _ in found), strict=True)
        ]
        if choice.data:
            outputs = [_Value(frozenset(), True) for _ in outputs]
        return outputs, max((counts for _, counts in found), key=lambda c: c.total())


def _either(a: _Value, b: _Value) -> _Value:
    """One of two: what is certain of both."""
    if a.data or b.data:
        return _Value(frozenset(), True)
    return _Value(a.leaves & b.leaves, False)


def _is_call(equation: Any, programs: Sequence[core.Jaxpr]) -> bool:
    """Whether it is one program on its operands: jit, remat, custom derivatives."""
    return (
        len(programs) == 1
        and len(programs[0].invars) == len(equation.invars)
        and len(programs[0].outvars) == len(equation.outvars)
    )


def _not_stacked(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many operands or results of a scan have one value, not one for each step."""
    pairs = zip(outside, inside, strict=True)
    return sum(a.aval.shape == b.aval.shape for a, b in pairs)


def _has(jaxpr: core.Jaxpr) -> bool:
    """Whether there are products in a program."""
    return any(
        equation.primitive.name in _PRODUCTS | _OPAQUE
        or any(map(_has, core.jaxprs_in_params(equation.params)))
        for equation in jaxpr.eqns
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
        # Input positions under every tap, at every output position: those between
        # inputs, where a dilated input has zeros, do not count.
        starts = np.arange(output[axis]) * params["window_strides"][i]
        steps = np.arange(kernel[kernel_axis]) * params["rhs_dilation"][i]
        places = starts[:, None] + steps - params["padding"][i][0]
        taps *= int(np.count_nonzero(places % params["lhs_dilation"][i] == 0))
    batch, features = (output[axis] for axis in numbers.out_spec[:2])
    return 2 * taps * batch * features * kernel[numbers.rhs_spec[1]]
