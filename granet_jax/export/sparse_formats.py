"""One leaf in the sparse formats of JAX (BCOO, BCSR) and SciPy (CSR)."""

import types
from importlib import import_module
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from granet_jax.masking import check_concrete, given_masks, is_masked_node
from granet_jax.packed_masks import is_packed

if TYPE_CHECKING:
    import scipy.sparse
    from jax.experimental import sparse


def to_bcoo(param: ArrayLike, mask: ArrayLike) -> "sparse.BCOO":
    """Convert the active weights of a leaf of any shape for `jax.experimental.sparse`.

    Args:
      param: Floating or integer array (quantised weights), zero where `mask` is False.
      mask: Boolean array of the same shape.

    Returns:
      BCOO of that shape with all dimensions sparse. `nse` is the number of active
      weights, including those that are zero. The dtype is that of `param`, but of 32
      bits for 64 unless JAX has 64-bit types enabled.

    Raises:
      ValueError: The shapes differ, or a pruned weight is not zero.
    """
    from jax.experimental import sparse  # It imports SciPy, which takes time.

    x, active = _check(param, mask)
    indices = np.argwhere(active).astype(np.int32)
    return sparse.BCOO(
        (jnp.asarray(x[active]), jnp.asarray(indices)),
        shape=x.shape,
        indices_sorted=True,
        unique_indices=True,
    )


def to_bcsr(param: ArrayLike, mask: ArrayLike) -> "sparse.BCSR":
    """Convert the active weights of a matrix, by rows, for `jax.experimental.sparse`.

    See `to_bcoo`. `param` must have two dimensions.
    """
    from jax.experimental import sparse

    values, columns, starts, shape = _compress_rows(param, mask)
    return sparse.BCSR(
        (jnp.asarray(values), jnp.asarray(columns), jnp.asarray(starts)),
        shape=shape,
        indices_sorted=True,
        unique_indices=True,
    )


def to_csr(param: ArrayLike, mask: ArrayLike) -> "scipy.sparse.csr_array":
    """Convert the active weights of a matrix, by rows, for SciPy.

    See `to_bcoo`. `param` must have two dimensions and keeps its dtype.

    Raises:
      ImportError: SciPy is missing.
      TypeError: SciPy's sparse arrays do not support the dtype (float16, bfloat16,
        int4).
    """
    scipy_sparse = import_extra("scipy.sparse")
    values, columns, starts, shape = _compress_rows(param, mask)
    if values.dtype.char not in "fdbhilqBHILQ":
        raise TypeError(
            f"param has dtype {values.dtype}, which SciPy's sparse arrays do not "
            "support: convert it with .astype(np.float32)."
        )
    return scipy_sparse.csr_array((values, columns, starts), shape=shape)


def _compress_rows(
    param: ArrayLike, mask: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int]]:
    """Return the active weights, their columns, each row's start, and the shape."""
    x, active = _check(param, mask)
    if x.ndim != 2:
        raise ValueError(
            f"param must have two dimensions, got shape {x.shape}: reshape it and its "
            "mask, or use to_bcoo."
        )
    columns = np.nonzero(active)[1].astype(np.int32)
    starts = np.zeros(x.shape[0] + 1, np.int32)
    np.cumsum(active.sum(axis=1), out=starts[1:])
    return x[active], columns, starts, x.shape


def _check(param: ArrayLike, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return both as NumPy arrays, or raise an error if they do not fit."""
    check_concrete("mask", mask)
    check_concrete("param", param)
    x = np.asarray(param)
    if not any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise TypeError(f"param must be a floating or integer array, got {param!r}.")
    if mask is None or is_masked_node(mask):
        raise ValueError(
            f"mask must be an array, got {mask!r}: this leaf carries no mask."
        )
    if not (is_packed(mask) or hasattr(mask, "dtype")):
        mask = np.asarray(mask)
    active = jax.device_get(given_masks({"mask": mask}))["mask"]
    if active.shape != x.shape:
        raise ValueError(
            f"mask must have the shape of param, {x.shape}, got {active.shape}."
        )
    active_values("param", x, active)
    return x, active


def active_values(name: str, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the active weights in row-major order.

    Raises:
      ValueError: A pruned weight is not exactly zero. -0.0 is refused because it would
        come back as 0.0.
    """
    pruned_bytes = x[~mask].view(np.uint8).reshape(-1, x.dtype.itemsize)
    lost = np.count_nonzero(pruned_bytes.any(axis=1))
    if lost:
        raise ValueError(
            f"{name!r} has {lost} pruned weights that are not exactly 0.0 and would be "
            "lost: use granet_jax.apply_masks(params, masks), or, for a method that "
            "keeps its weights dense, granet_jax.sparse_view(params, opt_state)."
        )
    return x[mask]


def import_extra(name: str) -> types.ModuleType:
    """Import a module that the extra `granet_jax[export]` installs."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"granet_jax.export needs {name.partition('.')[0]}: pip install "
            "'granet_jax[export]'."
        ) from error
