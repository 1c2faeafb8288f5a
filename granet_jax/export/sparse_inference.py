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

from granet_jax.dtypes import wider
from granet_jax.masking import PyTree, check_concrete, check_masks, is_masked_node

MAX_DENSITY = 0.05
"""Largest share of active inputs of any output up to which `accelerate` converts a
matrix. `python -m benchmarks.sparse_linear` measures where the gain begins."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FanIn:
    """A matrix with few active weights per output, for products `x @ matrix`.

    It is no array and computes nothing else. Other uses raise an error that says so.

    Attributes:
      values: Weights, shape (k, n_out). Outputs with fewer than k are padded by zeros.
      inputs: Input that each weight belongs to, int32, same shape.
      n_in: Number of rows of the matrix (static).
    """

    values: Array
    inputs: Array
    n_in: int = dataclasses.field(metadata={"static": True})

    # Makes NumPy leave `x @ matrix` to the method below.
    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix: inputs, outputs."""
        return self.n_in, self.values.shape[1]

    def __rmatmul__(self, x: Any) -> Array:
        """Return `x @ self` with shape (..., n_out), for x with shape (..., n_in).

        Products in half precision are summed in float32.

        Raises:
          ValueError: The last dimension of x is not n_in.
        """
        x = jnp.asarray(x)
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

    def __matmul__(self, x: Any) -> Any:
        """Raise TypeError that says what the matrix is for."""
        raise TypeError(_NO_ARRAY)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise TypeError that says what the matrix is for."""
        raise TypeError(_NO_ARRAY)


_NO_ARRAY = (
    "A FanIn from granet_jax.accelerate is a sparse matrix for products x @ matrix, "
    "and no array. Layers of flax and equinox compute otherwise: write the forward "
    "pass of these layers as x @ kernel."
)


def fan_in(param: ArrayLike, mask: ArrayLike) -> FanIn:
    """Return the active weights of every output of a matrix.

    Args:
      param: Array of shape (n_in, n_out). Pruned weights count as zero whatever their
        value.
      mask: Boolean array of the same shape.
    """
    active, weights = np.asarray(mask), np.asarray(param)
    largest = int(active.sum(axis=0).max(initial=0))
    # A stable sort puts the active inputs of every output first, in order. Outputs with
    # fewer of them are filled with pruned inputs, whose weight is zero.
    inputs = np.argsort(~active, axis=0, kind="stable")[:largest]
    weights = np.where(active, weights, np.zeros((), weights.dtype))
    return FanIn(
        values=jnp.asarray(np.take_along_axis(weights, inputs, axis=0)),
        inputs=jnp.asarray(inputs, jnp.int32),
        n_in=active.shape[0],
    )


def accelerate(params: PyTree, masks: PyTree) -> PyTree:
    """Return parameters for inference, with the sparsest matrices in a compact form.

        fast = granet_jax.accelerate(params, granet_jax.get_masks(opt_state))
        predict = jax.jit(lambda params, x: jax.nn.relu(x @ params["w"]) + params["b"])
        predict(fast, x)

    It works for networks that compute `x @ kernel` with kernels of shape (n_in, n_out).
    Layers of flax and equinox do not: they convert and index their kernels, and linen
    raises an error because the kernel has the shape (k, n_out) of the active weights.
    The guide to exporting shows how linen's layers can compute `x @ kernel`.
    The time of a product depends on the output with the most active inputs, so masks
    with constant fan-in (`structures.constant_fan_in`) gain most. The results equal
    those of the dense product up to rounding, because the order of the sums differs. It
    was measured on CPU only. Small matrices with few examples gain nothing (256 x 256
    with up to 8 examples).

    Args:
      params: Pytree of arrays. Pruned weights count as zero whatever their value.
      masks: Pytree of masks with the same structure, as from `get_masks`, with known
        (not traced) values.

    Returns:
      `params` with a `FanIn` in place of every masked matrix in which each output has
      at most 5% of the inputs active (`MAX_DENSITY`). The other leaves are unchanged,
      since the dense product is faster for them.

    Raises:
      TypeError: Masks or parameters are traced.
      ValueError: The masks have another structure or shape, or no matrix is sparse
        enough.
    """
    check_concrete("masks", masks)
    check_concrete("params", params)
    masks = check_masks(masks, params)

    def convert(mask: Any, param: Any) -> Any:
        return fan_in(param, mask) if _is_sparse_enough(mask) else param

    if not any(map(_is_sparse_enough, jax.tree.leaves(masks))):
        raise ValueError(
            "params has no matrix in which every output has at most "
            f"{MAX_DENSITY:.0%} of the inputs active: the dense product is faster for "
            "all of it."
        )
    return jax.tree.map(convert, masks, params, is_leaf=is_masked_node)


def _is_sparse_enough(mask: Any) -> bool:
    if is_masked_node(mask) or mask.ndim != 2:
        return False
    return bool(np.sum(mask, axis=0).max(initial=0) <= MAX_DENSITY * len(mask))
