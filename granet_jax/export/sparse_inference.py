"""Inference with the active weights alone, for matrices sparse enough to gain from it.

A matrix becomes two arrays of shape (k, outputs): the active weights of every output,
and the inputs that they belong to, where k is the largest number of active weights of
an output. A product adds one active weight of every output at a time.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from granet_jax.checks import check_integer
from granet_jax.dtypes import wider
from granet_jax.masking import PyTree, check_concrete, check_masks, is_masked_node

MAX_DENSITY = 0.05
"""Largest share of active inputs of any output up to which `accelerate` converts a
matrix. `python -m benchmarks.sparse_linear` measures where the gain begins."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FanIn:
    """A matrix with few active weights per output.

    It is for products `x @ matrix` if the matrix is (n_in, n_out), and for products
    `matrix @ x` if it is (n_out, n_in).

    It is no array and computes nothing else. Other uses raise an error that says so.

    Attributes:
      values: Weights, shape (k, n_out). Outputs with fewer than k are padded by zeros.
      inputs: Input that each weight belongs to, int32, same shape.
      n_in: Number of inputs of the matrix (static).
      axis: Axis of the matrix that counts the outputs, 0 or 1 (static).
    """

    values: Array
    inputs: Array
    n_in: int = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(default=1, metadata={"static": True})

    # Makes NumPy leave `x @ matrix` to the method below.
    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix."""
        n_out = self.values.shape[1]
        return (n_out, self.n_in) if self.axis == 0 else (self.n_in, n_out)

    @property
    def T(self) -> "FanIn":  # noqa: N802
        """The transposed matrix."""
        return dataclasses.replace(self, axis=1 - self.axis)

    def __matmul__(self, x: Any) -> Array:
        """Return `self @ x`, for x with shape (n_in,) or (..., n_in, columns).

        Raises:
          ValueError: The matrix is (n_in, n_out), or x has another number of inputs.
        """
        x = jnp.asarray(x)
        if self.axis == 1:
            raise ValueError(
                f"matrix @ x needs a matrix of shape (n_out, n_in), got {self.shape}: "
                "take accelerate(params, masks, axis=0), or matrix.T."
            )
        if x.ndim < 2:
            return x @ self.T
        return jnp.swapaxes(jnp.swapaxes(x, -1, -2) @ self.T, -1, -2)

    def __rmatmul__(self, x: Any) -> Array:
        """Return `x @ self` with shape (..., n_out), for x with shape (..., n_in).

        Products in half precision are summed in float32.

        Raises:
          ValueError: The matrix is (n_out, n_in), or the last dimension of x is not
            n_in.
        """
        x = jnp.asarray(x)
        if self.axis == 0:
            raise ValueError(
                f"x @ matrix needs a matrix of shape (n_in, n_out), got {self.shape}: "
                "take accelerate(params, masks), or matrix.T."
            )
        if x.ndim == 0 or x.shape[-1] != self.n_in:
            raise ValueError(
                f"x @ matrix of shape {self.shape} needs x of shape "
                f"(..., {self.n_in}), got {x.shape}."
            )
        dtype = jnp.result_type(x, self.values)
        sums = wider(dtype, jnp.float32)
        rows = x.reshape(-1, self.n_in).T.astype(sums)

        # One active weight of every output at a time, for the whole batch: only the
        # sums are written to memory. A single gather of all inputs takes 5 to 100
        # times as long on CPU, because it writes them once per example.
        def add(total: Array, weights: tuple[Array, Array]) -> tuple[Array, None]:
            values, inputs = weights
            # The inputs are in bounds by construction.
            column = rows.at[inputs].get(mode="promise_in_bounds")
            return total + column * values[:, None].astype(sums), None

        start = jnp.zeros((self.shape[1], rows.shape[1]), sums)
        total, _ = lax.scan(add, start, (self.values, self.inputs))
        return total.T.astype(dtype).reshape(*x.shape[:-1], self.shape[1])

    # Layers of libraries index their kernels, read attributes of arrays, or convert
    # them. (`hasattr` needs an AttributeError.)
    def __getattr__(self, name: str) -> Any:
        """Raise AttributeError that says what the matrix is for."""
        raise AttributeError(f"{_NO_ARRAY} It has no {name!r}.")

    def __getitem__(self, index: Any) -> Any:
        """Raise TypeError that says what the matrix is for."""
        raise TypeError(_NO_ARRAY)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise TypeError that says what the matrix is for."""
        raise TypeError(_NO_ARRAY)


_NO_ARRAY = (
    "A FanIn from granet_jax.accelerate is a sparse matrix for products with @, and no "
    "array. Layers of flax compute otherwise: write their forward pass as x @ kernel."
)


def fan_in(param: ArrayLike, mask: ArrayLike, axis: int = 1) -> FanIn:
    """Return the active weights of every output of a matrix.

    Args:
      param: Array of two axes. Pruned weights count as zero whatever their value.
      mask: Boolean array of the same shape.
      axis: Axis that counts the outputs, 0 or 1.
    """
    active, weights = np.asarray(mask), np.asarray(param)
    if axis == 0:
        active, weights = active.T, weights.T
    largest = int(active.sum(axis=0).max(initial=0))
    # A stable sort puts the active inputs of every output first, in order. Outputs with
    # fewer of them are filled with pruned inputs, whose weight is zero.
    inputs = np.argsort(~active, axis=0, kind="stable")[:largest]
    weights = np.where(active, weights, np.zeros((), weights.dtype))
    return FanIn(
        values=jnp.asarray(np.take_along_axis(weights, inputs, axis=0)),
        inputs=jnp.asarray(inputs, jnp.int32),
        n_in=active.shape[0],
        axis=axis,
    )


def accelerate(params: PyTree, masks: PyTree, *, axis: int = -1) -> PyTree:
    """Return parameters for inference, with the sparsest matrices in a compact form.

        fast = granet_jax.accelerate(params, granet_jax.get_masks(opt_state))
        predict = jax.jit(lambda params, x: jax.nn.relu(x @ params["w"]) + params["b"])
        predict(fast, x)

    It works for networks that compute `x @ kernel` with kernels of shape (n_in, n_out).
    With `axis=0` it works for those that compute `weight @ x`, or `x @ weight.T`, with
    weights of shape (n_out, n_in), as equinox and PyTorch have them.

    Layers of flax do not: they convert and index their kernels, and linen raises an
    error because the kernel has the shape (k, n_out) of the active weights. The guide
    to exporting shows how linen's layers can compute `x @ kernel`.

    The time of a product depends on the output with the most active inputs, so masks
    with constant fan-in (`structures.constant_fan_in`, with the same `axis`) gain most.
    The results equal those of the dense product up to rounding, because the order of
    the sums differs. It was measured on CPU only. Small matrices with few examples gain
    nothing (256 x 256 with up to 8 examples).

    Args:
      params: Pytree of arrays. Pruned weights count as zero whatever their value.
      masks: Pytree of masks with the same structure, as from `get_masks`, with known
        (not traced) values.
      axis: Axis of a matrix that counts the outputs: -1 or 1, or 0.

    Returns:
      `params` with a `FanIn` in place of every masked matrix in which each output has
      at most 5% of the inputs active (`MAX_DENSITY`). The other leaves are unchanged,
      since the dense product is faster for them.

    Raises:
      TypeError: Masks or parameters are traced, or axis is not an integer.
      ValueError: There is no such axis; the masks have another structure or shape; or
        no matrix is sparse enough.
    """
    check_concrete("masks", masks)
    check_concrete("params", params)
    check_integer("axis", axis)
    if axis not in (-2, -1, 0, 1):
        raise ValueError(
            f"axis must be an axis of a matrix: -1 or 1 for kernels of shape (n_in, "
            f"n_out), 0 for weights of shape (n_out, n_in), got {axis}."
        )
    axis %= 2
    masks = check_masks(masks, params, integers=True)

    def convert(mask: Any, param: Any) -> Any:
        return fan_in(param, mask, axis) if _is_sparse_enough(mask, axis) else param

    if not any(_is_sparse_enough(mask, axis) for mask in jax.tree.leaves(masks)):
        raise ValueError(
            "params has no matrix in which every output has at most "
            f"{MAX_DENSITY:.0%} of the inputs active: the dense product is faster for "
            "all of it."
        )
    return jax.tree.map(convert, masks, params, is_leaf=is_masked_node)


def _is_sparse_enough(mask: Any, axis: int) -> bool:
    if is_masked_node(mask) or mask.ndim != 2:
        return False
    inputs = 1 - axis
    most = np.sum(mask, axis=inputs).max(initial=0)
    return bool(most <= MAX_DENSITY * mask.shape[inputs])
