"""Chooses weights leaf by leaf, for the sources that know the inputs of each kernel.

These sources take the result of `input_statistics`, which also says which leaves carry
a mask and which axes of a kernel count its inputs.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array

from granet_jax import masking, structures
from granet_jax.checks import check_choice, check_sparsity, check_type
from granet_jax.distributions import Shape
from granet_jax.dtypes import wider
from granet_jax.layers import Axes, layer_shapes
from granet_jax.mask_sources.input_statistics import InputStatistics
from granet_jax.mask_sources.select import count_array, select_compiled
from granet_jax.mask_sources.weight_places import GROUP
from granet_jax.masking import PyTree
from granet_jax.structures import Structure

Statistics = Mapping[str, InputStatistics]
# Whether weights compete with those of the same output, or of the whole layer.
InputScope = Literal["unit", "layer"]
# One sparsity for all leaves, or one for each leaf by its name, as from `owl`.
Sparsities = float | Mapping[str, float]


def choose(
    score: Callable[[Array, InputStatistics], Array],
    params: PyTree,
    statistics: Statistics,
    sparsity: Sparsities,
    scope: InputScope,
    structure: Structure | None,
) -> PyTree:
    """Return masks of the weights of largest score, exactly as sparse as asked.

    Args:
      score: Function of the weights of a leaf, in float32 or wider, and the statistics
        of its inputs.
      params: Pytree of arrays.
      statistics: Result of `input_statistics`.
      sparsity: Share of pruned weights, for all leaves or for each by its name.
      scope: Whether weights compete within their output ("unit") or layer ("layer").
        With a structure they compete within its boxes, or among its boxes in the layer.
      structure: Structure of the masks, or None.
    """
    check_choice("scope", scope, ("unit", "layer"))
    leaves = leaves_with_statistics(params, statistics)
    wanted = sparsity_of_each(statistics, sparsity, structure)
    masks = {}
    for name, leaf in leaves.items():
        found = statistics[name]
        form, stack = structure, group_axes(found)
        if structure is None and scope == "unit":
            form, stack = Structure("units", _Units(found.input_axes), whole=False), ()
        structures.check_leaves(form, [(name, leaf.shape)], (stack,))
        shapes = layer_shapes([leaf.shape], (stack,))
        number = structures.counts(form, shapes[:1], wanted[name], "uniform")
        (masks[name],) = select_compiled(
            [score(as_float(leaf), found)],
            count_array(number * len(shapes), shapes, "layer"),
            *(form, "layer", (stack,)),
        )
    return tree_like(params, masks)


@dataclasses.dataclass(frozen=True)
class _Units:
    """The shape of one output with all its inputs, which lie along some axes."""

    inputs: Axes

    def __call__(self, leaf: Shape) -> Shape:
        return tuple(n if axis in self.inputs else 1 for axis, n in enumerate(leaf))


def group_axes(statistics: InputStatistics) -> Axes:
    """The axes of a kernel along which outputs have inputs of their own."""
    roles = statistics.roles
    return tuple(axis for axis, role in enumerate(roles) if role == GROUP)


def leaves_with_statistics(params: PyTree, statistics: Statistics) -> dict[str, Array]:
    """Return the leaves that have statistics, by name.

    Raises:
      TypeError: `statistics` is not a result of `input_statistics`.
      ValueError: They are of other parameters.
    """
    check_type(
        "statistics",
        statistics,
        Mapping,
        "the result of granet_jax.mask_sources.input_statistics",
    )
    named = jax.tree_util.tree_leaves_with_path(params)
    leaves = {masking.leaf_name(path): leaf for path, leaf in named}
    for name, found in statistics.items():
        if name not in leaves or leaves[name].ndim != len(found.roles):
            raise ValueError(
                f"statistics has {name!r} with {len(found.roles)} axes, which params "
                f"does not have: it has {', '.join(map(repr, leaves))}. Compute them "
                "with input_statistics for these parameters."
            )
    return {name: leaf for name, leaf in leaves.items() if name in statistics}


def sparsity_of_each(
    statistics: Statistics, sparsity: Sparsities, structure: Structure | None
) -> dict[str, float]:
    """Return the sparsity of every leaf, by name.

    Raises:
      ValueError, TypeError: A sparsity is missing, is not in [0, 1), or does not fit
        the structure.
    """
    each: dict[str, Any] = dict.fromkeys(statistics, sparsity)
    if isinstance(sparsity, Mapping):
        if missing := [repr(name) for name in statistics if name not in sparsity]:
            raise ValueError(
                "sparsity must be one number, or one for each leaf of statistics; "
                f"there is none for {', '.join(missing)}."
            )
        each = {name: sparsity[name] for name in statistics}
    for value in each.values():
        check_sparsity("sparsity", value)
        structures.check_use(
            structure, sparsity=value, scope="layer", distribution="uniform"
        )
    return each


def tree_like(params: PyTree, leaves: Mapping[str, Array]) -> PyTree:
    """Return a tree like `params` of the named leaves, `MaskedNode` at all others."""

    def leaf(path: Any, _: Any) -> Any:
        return leaves.get(masking.leaf_name(path), optax.MaskedNode())

    return jax.tree_util.tree_map_with_path(leaf, params)


def as_float(weights: Array) -> Array:
    """The weights in float32 or wider, in which scores are computed."""
    return weights.astype(wider(weights.dtype, jnp.float32))
