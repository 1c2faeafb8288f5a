"""Sums over the inputs that meet the weights of a kernel in a product."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from granet_jax.distributions import Shape
from granet_jax.dtypes import wider
from granet_jax.mask_sources.weight_places import (
    GROUP,
    INPUT,
    OUTPUT,
    Back,
    Placed,
    Roles,
    UnevenError,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputSums:
    """Sums over the inputs that meet the weights of a kernel.

    All arrays but `products` have the axes of the kernel, of length 1 along outputs.

    Attributes:
      count: The number of inputs.
      total: The sum of the inputs.
      squares: The sum of their squares.
      products: The sum of the products of each pair of inputs of an output; None if it
        is not wanted. It has the axes of the kernel twice. In the second set, the axes
        of groups also have length 1.
      roles: What each axis of the kernel counts (static).
    """

    count: Array
    total: Array
    squares: Array
    products: Array | None
    roles: Roles = dataclasses.field(metadata={"static": True})


class Rows(NamedTuple):
    """The inputs of a product: one vector for each time that an output is computed.

    Attributes:
      vectors: The inputs, of shape (groups, vectors, inputs).
      group_axes: The axes of the kernel that count groups.
      input_axes: The axes of the kernel that count inputs.
    """

    vectors: Array
    group_axes: tuple[int, ...]
    input_axes: tuple[int, ...]


def _rows_of_matrix_product(equation: Any, data: Array, side: int) -> Rows:
    """The inputs that meet the kernel on one side of a `dot_general`."""
    contracted, batch = equation.params["dimension_numbers"]
    groups, inputs = batch[1 - side], contracted[1 - side]
    others = [axis for axis in range(data.ndim) if axis not in (*groups, *inputs)]
    sizes = [
        math.prod(data.shape[axis] for axis in axes)
        for axes in (groups, others, inputs)
    ]
    vectors = jnp.transpose(data, (*groups, *others, *inputs)).reshape(sizes)
    return Rows(vectors, tuple(batch[side]), tuple(contracted[side]))


def _rows_of_convolution(equation: Any, data: Array, side: int) -> Rows:
    """The inputs that meet the kernel of a convolution: patches of the data."""
    params = equation.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if side != 1 or params["batch_group_count"] != 1:
        raise UnevenError("it enters a convolution in another place than as kernel")
    kernel = equation.invars[1].aval.shape
    output, *inputs = numbers.rhs_spec
    _, *window = (kernel[axis] for axis in inputs)
    patches = lax.conv_general_dilated_patches(
        jnp.transpose(data, numbers.lhs_spec),
        window,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
    )
    n, features, *places = patches.shape
    patches = patches.reshape(n, groups, features // groups, math.prod(places))
    vectors = jnp.transpose(patches, (1, 0, 3, 2)).reshape(
        groups, -1, features // groups
    )
    return Rows(vectors, (output,) if groups > 1 else (), tuple(inputs))


ROWS = {
    "dot_general": _rows_of_matrix_product,
    "conv_general_dilated": _rows_of_convolution,
}


def sum_rows(rows: Rows, kernel: Shape, with_products: bool) -> InputSums:
    """The sums over the inputs of a product, with the axes of its kernel."""
    vectors = rows.vectors.astype(wider(rows.vectors.dtype, jnp.float32))
    roles = [OUTPUT] * len(kernel)
    for axes, role in ((rows.group_axes, GROUP), (rows.input_axes, INPUT)):
        for axis in axes:
            roles[axis] = role
    groups = math.prod(kernel[axis] for axis in rows.group_axes)

    def at_kernel(x: Array, *more: int) -> Array:
        # In grouped convolutions, several outputs share the inputs of a group.
        x = jnp.repeat(x, groups // x.shape[0], axis=0)
        axes = (*rows.group_axes, *rows.input_axes, *more)
        x = x.reshape([kernel[axis % len(kernel)] for axis in axes])
        x = jnp.transpose(x, [int(i) for i in np.argsort(axes)])
        ndim = 2 * len(kernel) if more else len(kernel)
        return jnp.expand_dims(x, [axis for axis in range(ndim) if axis not in axes])

    products = None
    if with_products:
        pairs = jnp.einsum("gni,gnj->gij", vectors, vectors)
        second = [len(kernel) + axis for axis in rows.input_axes]
        products = at_kernel(pairs, *second)
    return InputSums(
        count=at_kernel(jnp.full_like(vectors[:, 0], vectors.shape[1])),
        total=at_kernel(jnp.sum(vectors, axis=1)),
        squares=at_kernel(jnp.sum(jnp.square(vectors), axis=1)),
        products=products,
        roles=tuple(roles),
    )


def stack_sums(sums: InputSums) -> InputSums:
    """The sums of a stack of layers, from a stack of the sums of each layer."""
    products = sums.products
    if products is not None:
        products = jnp.expand_dims(products, 1 + len(sums.roles))
    roles = (GROUP, *sums.roles)
    return dataclasses.replace(sums, products=products, roles=roles)


def move_sums(back: Back, sums: InputSums) -> InputSums:
    """The sums with the axes of a parameter, from those at a value that holds it.

    Raises:
      UnevenError: The value mixes inputs of the parameter with outputs.
    """
    each = frozenset((INPUT, GROUP))

    def move(array: Array, present: frozenset[str] = each) -> Array:
        return back(Placed(array, sums.roles, present)).array

    return InputSums(
        count=move(sums.count),
        total=move(sums.total),
        squares=move(sums.squares),
        products=None if sums.products is None else _move_pairs(move, sums),
        roles=back(Placed(sums.count, sums.roles, each)).roles,
    )


def _move_pairs(move: Callable[..., Array], sums: InputSums) -> Array:
    """Move both sets of axes of `products`, one after the other."""
    products, ndim = cast("Array", sums.products), len(sums.roles)
    first, second = products.shape[:ndim], products.shape[ndim:]
    moved = jax.vmap(move, -1, 0)(products.reshape(*first, -1))
    places = moved.shape[1:]
    by_place = jnp.moveaxis(moved.reshape(*second, -1), -1, 0)
    moved = jax.vmap(functools.partial(move, present=frozenset((INPUT,))))(by_place)
    return moved.reshape(*places, *moved.shape[1:])
