"""FLOPs of the forward pass of a sparse network, for any model.

`flops` reads the program that JAX traces. It needs no knowledge of modules, and nothing
runs. A multiply-add with an active weight counts as two FLOPs, in matrix products
(`lax.dot_general`, which einsum and attention use) and in convolutions. Norms, biases,
activations, embedding look-ups and linear algebra do not count.

- A tap of a convolution counts even where it falls on padding, as in the RigL paper.
  The zeros that a transposed convolution inserts between its inputs do not count.
- The body of a `lax.scan` (also of a `lax.map`, or a `lax.fori_loop` of fixed length)
  counts once for each iteration, and a `lax.cond` counts as its costliest branch. A
  `lax.while_loop` that contains products raises an error, because the number of
  iterations is unknown.
- A product belongs to the parameter that is one of its factors, even after operations
  that keep its zeros: moves, reshapes, repeats, casts and scales. Its cost is scaled by
  the density of the whole parameter, even if the product uses only a slice.
- Products without such a factor, such as queries with keys, count as dense, under
  `other`. So do products with weights that lost their zeros (standardised weights, or
  weights merged with a low-rank update) or that depend on the inputs (hypernetworks,
  experts that the inputs select).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from granet_jax.analysis.jaxpr_flops import INPUT, Origin, ProductCounter
from granet_jax.analysis.named_leaves import pair_with_masks
from granet_jax.checks import check_function
from granet_jax.masking import PyTree, check_arrays


class LeafFlops(NamedTuple):
    """FLOPs of the products with one parameter.

    Attributes:
      shape: Shape of the parameter.
      masked: Whether the parameter has a mask.
      active: Number of active weights; all of them if there is no mask.
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
      leaves: FLOPs of each parameter, by its name ("dense/kernel"). Biases and other
        parameters that are not a factor of a product have 0.
      other: FLOPs of products without a parameter, as in attention.
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
        """`sparse` divided by `dense`; 1 if nothing is computed."""
        return self.sparse / self.dense if self.dense else 1.0

    def at(self, densities: Mapping[str, float]) -> float:
        """Return the FLOPs of the network at other densities.

        Args:
          densities: Densities in [0, 1] by the name of the parameter. Parameters that
            are not named count as dense.

        Raises:
          ValueError: An unknown parameter, or a density out of range.
        """
        if unknown := sorted(set(densities) - set(self.leaves)):
            raise ValueError(
                f"densities names leaves {unknown}, which the network does not have: "
                f"it has {', '.join(self.leaves)}."
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
    """Count the FLOPs of `apply_fn(params, *inputs)`, dense and with masks.

    With linen, nnx and equinox::

        flops(lambda p, x: model.apply({"params": p}, x), params, masks, x)
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        flops(lambda p, r, x: nnx.merge(graph, p, r)(x), params, masks, rest, x)
        params, static = eqx.partition(model, eqx.is_array)
        flops(lambda p, x: eqx.combine(p, static)(x), params, masks, x)

    Args:
      apply_fn: The forward pass. It is traced, but does not run.
      params: Pytree of arrays or `jax.ShapeDtypeStruct`.
      masks: Concrete masks of these leaves, packed or not, matched by name, with None
        or `optax.MaskedNode()` at leaves without one; or None for a dense network.
      *inputs: Pytrees of arrays or `jax.ShapeDtypeStruct`. A batch costs as much as all
        of its examples together.

    Returns:
      The FLOPs of each parameter and of the whole network, see `Flops`.

    Raises:
      ValueError: Masks that do not match the parameters, or a product of several masked
        parameters at once.
      NotImplementedError: A product in a loop of unknown length, or in a primitive
        whose products cannot be read.
    """
    check_function("apply_fn", apply_fn, "a function (params, *inputs) -> outputs")
    pairs = pair_with_masks(params, masks)
    check_arrays("inputs", inputs)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    jaxpr = jax.make_jaxpr(apply_fn)(shapes, *inputs).jaxpr
    sizes = [math.prod(leaf.shape) for leaf, _ in pairs.values()]
    masked = frozenset(i for i, (_, m) in enumerate(pairs.values()) if m is not None)
    origins = [Origin(frozenset([i]), from_inputs=False) for i in range(len(pairs))]
    origins += [INPUT] * (len(jaxpr.invars) - len(pairs))
    _, counts = ProductCounter([*pairs], sizes, masked).count(jaxpr, origins)
    leaves = {
        name: LeafFlops(
            shape=tuple(leaf.shape),
            masked=mask is not None,
            active=sizes[i] if mask is None else int(np.count_nonzero(mask)),
            dense=counts[i],
        )
        for i, (name, (leaf, mask)) in enumerate(pairs.items())
    }
    return Flops(leaves, other=counts[None])
