"""Ghost skip connections: paths around convolutions that vanish during training.

In the ghost phase, a sparse layer F computes y = F(x) + alpha(step) G(x), with alpha
from the schedule `fading`. Afterwards the skips do not exist at all: the plain network
is another program, and `drop_ghosts` removes their parameters and moments from the
state. Adding 0 G(x) instead would not be exact, because -0.0 + 0.0 is 0.0, 0 times
infinity is NaN, and weight decay changes parameters without a gradient.

In low precision, cast the coefficient, `y + alpha(step).astype(y.dtype) * g`, because a
float32 scalar array would make the sum float32.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from granet_jax import masking
from granet_jax.checks import check_integer, check_type

PyTree = Any

SkipKind = Literal["identity", "conv"]
SKIP_KINDS: tuple[SkipKind, ...] = ("identity", "conv")

PREFIX = "ghost_"
"""Prefix of the names of ghost parameters, or of the modules that hold them."""


def ghost_skip(x: Array, features: int, strides: int | tuple[int, ...] = 1) -> Array:
    """Return x in the output shape of a layer: a skip without parameters.

    With strides, it averages over windows whose width and distance are the stride; the
    edge may cut off the last window of an axis. This gives ceil(n / stride) of n
    positions, as a convolution with padding "SAME" (or kernel // 2) does. Surplus
    channels are cut off, and missing channels are zero.

    Args:
      x: Array of shape `(n, *positions, channels)`, with any number of axes of
        positions.
      features: Number of output channels, 1 or more.
      strides: One stride for all axes of positions, or one for each; 1 or more.

    Returns:
      Array of shape `(n, *ceil(positions / strides), features)` and the dtype of `x`.

    Raises:
      TypeError, ValueError: An argument of the wrong type or out of range.
    """
    axis_strides = check_skip(x, features, strides)
    if any(stride > 1 for stride in axis_strides):
        x = _average_pool(x, axis_strides)
    channels = x.shape[-1]
    if features <= channels:
        return x[..., :features]
    padding = [(0, 0)] * (x.ndim - 1) + [(0, features - channels)]
    return jnp.pad(x, padding)


def check_skip(
    x: Array, features: int, strides: int | tuple[int, ...]
) -> tuple[int, ...]:
    """Return one stride for each axis of positions; raise as `ghost_skip` does."""
    if not hasattr(x, "ndim"):
        raise TypeError(f"x must be an array, got {x!r}.")
    if x.ndim < 2:
        raise ValueError(
            "x must have shape (n, *positions, channels), got shape "
            f"{x.shape}: under vmap, add an axis of length 1 in front."
        )
    positions = x.ndim - 2
    axis_strides = strides if isinstance(strides, tuple) else (strides,) * positions
    if len(axis_strides) != positions:
        raise ValueError(
            f"strides must be one integer or {positions} (for x of shape {x.shape}), "
            f"got {strides!r}."
        )
    check_integer("features", features, least=1)
    for stride in axis_strides:
        check_integer("strides", stride, least=1)
    return axis_strides


def _average_pool(x: Array, strides: tuple[int, ...]) -> Array:
    window = (1, *strides, 1)
    overhang = [-size % step for size, step in zip(x.shape, window, strict=True)]

    def window_sums(values: Any) -> Any:
        padding = [(0, extra) for extra in overhang]
        zero = np.zeros((), values.dtype)
        return lax.reduce_window(values, zero, lax.add, window, window, padding)

    # Windows at the edge hold fewer entries.
    entries = window_sums(jnp.ones((1, *x.shape[1:-1], 1), jnp.float32))
    return window_sums(x) / entries.astype(x.dtype)


def is_ghost(name: str) -> bool:
    """Return whether a leaf such as "block/ghost_1/kernel" belongs to a ghost."""
    check_type("name", name, str, "the name of a leaf")
    return any(part.startswith(PREFIX) for part in name.split("/"))


def without_ghosts(name: str, leaf: Any) -> bool:
    """Select the default maskable leaves without the ghosts; pass it as `where`.

    Ghosts stay dense. With masks, they would count in the sparsity of a network that
    does not contain them in the end.
    """
    masking.check_arrays("leaf", leaf)
    return not is_ghost(name) and masking.default_where(name, leaf)


def drop_ghosts(tree: PyTree) -> PyTree:
    """Remove the ghosts from parameters, statistics, or an optimizer's state.

    Every dictionary in the tree, at any depth and in any container, loses its entries
    whose names begin with `"ghost_"`, and its dictionaries that held nothing else. All
    other leaves stay the same array objects. The result has the structure of the plain
    network's parameters, statistics and optimizer state. This includes a
    `granet_jax.SparseState`, provided that ghosts had no masks, see `without_ghosts`::

        variables, opt_state = tost.drop_ghosts((variables, opt_state))

    It does not work with `optax.flatten`, whose moments are one vector over all
    parameters. Labels of `optax.multi_transform` must not begin with `"ghost_"`,
    because they are the keys of a dictionary in its state.

    Args:
      tree: Any pytree.

    Returns:
      The pytree without ghosts.

    Raises:
      ValueError: A ghost that is a field of a record and so cannot be removed.
    """
    plain = _drop(tree)
    for path, _ in jax.tree_util.tree_leaves_with_path(plain):
        name = masking.leaf_name(path)
        if is_ghost(name):
            raise ValueError(
                f"tree has the ghost {name!r} in a record (a tuple, dataclass or "
                "module), whose fields cannot be removed: keep ghosts in dictionaries, "
                "or set the field to None."
            )
    return plain


def _drop(tree: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x: _drop_entries(x) if isinstance(x, Mapping) else x,
        tree,
        is_leaf=lambda x: isinstance(x, Mapping),
    )


def _drop_entries(tree: Mapping[Any, Any]) -> Any:
    kept = {}
    for key, value in tree.items():
        if isinstance(key, str) and is_ghost(key):
            continue
        plain = _drop(value)
        if isinstance(value, Mapping) and value and not plain:
            continue  # It held only ghosts, so the plain network does not have it.
        kept[key] = plain
    # dict, OrderedDict and FrozenDict can all be constructed from a mapping.
    return type(tree)(kept)  # pyright: ignore[reportCallIssue]
