"""Kernels as matrices of (outputs, inputs), for sources that work row by row."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from granet_jax import structures
from granet_jax.checks import check_type
from granet_jax.distributions import Shape
from granet_jax.layers import layer_axes, layer_shape
from granet_jax.mask_sources.by_inputs import group_axes
from granet_jax.mask_sources.input_statistics import InputStatistics
from granet_jax.structures import Structure


def as_matrices(x: Array, statistics: InputStatistics) -> Array:
    """Arrange a leaf as matrices of shape (groups, outputs, inputs)."""
    order, sizes = _arrangement(x.shape, statistics)
    return jnp.transpose(x, order).reshape(sizes)


def from_matrices(matrices: Array, shape: Shape, statistics: InputStatistics) -> Array:
    """The inverse of `as_matrices`, for a leaf of a shape."""
    order, _ = _arrangement(shape, statistics)
    x = matrices.reshape([shape[axis] for axis in order])
    return jnp.transpose(x, [int(i) for i in np.argsort(order)])


def input_products(statistics: InputStatistics) -> Array:
    """Arrange the products of inputs as matrices of shape (groups, inputs, inputs)."""
    products = statistics.products
    if products is None:
        raise ValueError(
            "statistics must have the products of inputs: compute them with "
            "input_statistics(..., products=True)."
        )
    ndim = len(statistics.roles)
    order, (groups, _, inputs) = _arrangement(products.shape[:ndim], statistics)
    both = [*order, *(ndim + axis for axis in order)]
    return jnp.transpose(products, both).reshape(groups, inputs, inputs)


def group_length(
    structure: Structure | None,
    name: str,
    shape: Shape,
    found: InputStatistics,
) -> int | None:
    """The length of the groups of N:M sparsity along a row; None without a structure.

    Raises:
      ValueError: The structure is another, or its groups do not lie along a row.
      TypeError: It is no structure.
    """
    if structure is None:
        return None
    check_type("structure", structure, Structure, "structures.n_of_m(n, m) or None")
    stack, along = group_axes(found), found.input_axes[-1:]
    structures.check_leaves(structure, [(name, shape)], (stack,))
    box = structure.box(layer_shape(shape, stack))
    sides = dict(zip(layer_axes(len(shape), stack), box, strict=True))
    if structure.density is None or [a for a, n in sides.items() if n > 1] != [*along]:
        raise ValueError(
            "structure must be None or n_of_m along the last axis of inputs, which is "
            f"{along[0] if along else 'none'} of {name!r} with shape {shape}; got "
            f"{structure.name}."
        )
    return sides[along[0]]


def _arrangement(
    shape: Shape, statistics: InputStatistics
) -> tuple[list[int], tuple[int, int, int]]:
    """The axes in the order groups, outputs, inputs, and the size of each of these."""
    groups, inputs = group_axes(statistics), statistics.input_axes
    outputs = [a for a in range(len(shape)) if a not in (*groups, *inputs)]
    parts = (groups, outputs, inputs)
    sizes = [math.prod(shape[axis] for axis in axes) for axes in parts]
    return [*groups, *outputs, *inputs], (sizes[0], sizes[1], sizes[2])
