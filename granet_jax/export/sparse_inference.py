"""Inference by the active weights alone, for matrices sparse enough to gain by it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from granet_jax.masking import PyTree, check_concrete, check_masks, is_masked_node

MOST = 0.05
"""Largest share of active inputs, of the output that has most, at which `accelerate`
takes a matrix: `python -m benchmarks.sparse_linear` has the measurements."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FanIn:
    """A matrix that has a few active weights for every output; `x @ matrix` works.

    Attributes:
      values: weights, of shape (k, n_out); zeros fill up outputs with fewer than k.
      inputs: int32 of the same shape: the input that each belongs to.
      n_in: number of rows of the matrix (static).
    """

    values: Array
    inputs: Array
    n_in: int = dataclasses.field(metadata={"static": True})

    # Has NumPy leave `x @ matrix` to the method below.
    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix, inputs and outputs."""
        return self.n_in, self.values.shape[1]

    def __rmatmul__(self, x: Any) -> Array:
        """`x @ self` for x of shape (..., n_in), of shape (..., n_out).

        One active input of every output at a time, for the whole batch, so that nothing
        is written but the sums. (One gather of all of them writes the active weights'
        inputs once for every example, and takes 5 to 100 times as long on CPU.)
        Half-precision products are added up in float32.

        Raises:
          ValueError: x of another size.
        """
        x = jnp.asarray(x)
        if x.ndim == 0 or x.shape[-1] != self.n_in:
            raise ValueError(
                f"x @ matrix of shape {self.shape} needs x of shape "
                f"(..., {self.n_in}), got {x.shape}."
            )
        dtype = jnp.result_type(x, self.values)
        sums = jnp.promote_types(dtype, jnp.float32)
        rows = x.reshape(-1, self.n_in).T.astype(sums)

        def add(total: Array, weights: tuple[Array, Array]) -> tuple[Array, None]:
            values, inputs = weights
            # They are in bounds by construction.
            taken = rows.at[inputs].get(mode="promise_in_bounds")
            return total + taken * values[:, None].astype(sums), None

        start = jnp.zeros((self.shape[1], rows.shape[1]), sums)
        total, _ = lax.scan(add, start, (self.values, self.inputs))
        return total.T.astype(dtype).reshape(*x.shape[:-1], self.shape[1])


def fan_in(param: ArrayLike, mask: ArrayLike) -> FanIn:
    """The active weights of every output of a matrix.

    Args:
      param: of shape (n_in, n_out). Pruned weights count as zero, whatever they are.
      mask: bool, of the same shape.
    """
    active, weights = np.asarray(mask), np.asarray(param)
    most = int(active.sum(axis=0).max(initial=0))
    # The active inputs of every output, in order; then pruned ones, of weight zero.
    inputs = np.argsort(~active, axis=0, kind="stable")[:most]
    weights = np.where(active, weights, np.zeros((), weights.dtype))
    return FanIn(
        values=jnp.asarray(np.take_along_axis(weights, inputs, axis=0)),
        inputs=jnp.asarray(inputs, jnp.int32),
        n_in=active.shape[0],
    )


def accelerate(params: PyTree, masks: PyTree) -> PyTree:
    """Parameters for inference, the sparsest matrices as their active weights alone.

        fast = granet_jax.accelerate(params, granet_jax.get_masks(opt_state))
        predict = jax.jit(lambda params, x: jax.nn.relu(x @ params["w"]) + params["b"])
        predict(fast, x)

    Works for networks that write `x @ kernel`, with kernels of shape (n_in, n_out). All
    outputs take as long as the one with most active inputs, so masks of constant fan-in
    (`structures.constant_fan_in`) gain most. Measured on CPU alone. Results equal those
    of the dense product up to rounding, since sums are in another order. Small matrices
    with few examples gain nothing (256 x 256, up to 8).

    Args:
      params: pytree of arrays. Pruned weights count as zero, whatever they are.
      masks: pytree of masks of the same structure, from `get_masks`. Must be concrete.

    Returns:
      `params` with a `FanIn` for every matrix with a mask in which no output has more
      than 5% of the inputs active (`MOST`). Others stay as they are, for the dense
      product is faster.

    Raises:
      TypeError: traced masks or parameters.
      ValueError: masks of another structure or shape; or no matrix is sparse enough.
    """
    check_concrete("masks", masks)
    check_concrete("params", params)
    found = 0

    def convert(mask: Any, param: Any) -> Any:
        nonlocal found
        if is_masked_node(mask) or mask.ndim != 2:
            return param
        if np.sum(mask, axis=0).max(initial=0) > MOST * len(mask):
            return param
        found += 1
        return fan_in(param, mask)

    fast = jax.tree.map(
        convert, check_masks(masks, params), params, is_leaf=is_masked_node
    )
    if not found:
        raise ValueError(
            f"params has no matrix in which every output has at most {MOST:.0%} of the "
            "inputs active: the dense product is faster for all of it."
        )
    return fast
