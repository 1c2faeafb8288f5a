"""Ghost skip connections: paths beside the convolutions that vanish in training.

While the ghosts live, a sparse layer F computes y = F(x) + alpha(step) G(x), with alpha
from `schedules.fading`. In the end they are structurally absent: the plain network is
another program, and `drop_ghosts` takes their parameters and moments out of its state.
(Adding 0 G(x) would not do: -0.0 + 0.0 is 0.0, 0 times infinity is NaN, and weight
decay goes on moving what has no gradient.)

In low precision, cast the coefficient: `y + alpha(step).astype(y.dtype) * g`; a float32
scalar array would make the sum float32.
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
"""Names of ghosts' parameters, or of the modules that hold them, begin with it."""


def ghost_skip(x: Array, features: int, strides: int | tuple[int, ...] = 1) -> Array:
    """The skip without parameters: x, brought to the shape that the layer puts out.

    With strides, the mean over windows that begin at multiples of the stride and are as
    wide; the last window of an axis may be cut off by the edge. That gives
    ceil(n / stride) positions of n, as a convolution with padding "SAME" (or kernel //
    2) does. Channels are cut off, or filled up with zeros.

    Args:
      x: array of shape `(n, *positions, channels)`, with any number of positions.
      features: channels of the result, 1 or more.
      strides: one for all axes of positions, or one for each; 1 or more.

    Returns:
      Array of shape `(n, *ceil(positions / strides), features)` and the dtype of `x`.

    Raises:
      TypeError, ValueError: an argument of the wrong type or out of range.
    """
    steps = check_skip(x, features, strides)
    if any(step > 1 for step in steps):
        x = _average_pool(x, steps)
    channels = x.shape[-1]
    if features <= channels:
        return x[..., :features]
    padding = [(0, 0)] * (x.ndim - 1) + [(0, features - channels)]
    return jnp.pad(x, padding)


def check_skip(
    x: Array, features: int, strides: int | tuple[int, ...]
) -> tuple[int, ...]:
    """One stride for every axis of positions; raises as `ghost_skip`."""
    if not hasattr(x, "ndim"):
        raise TypeError(f"x must be an array, got {x!r}.")
    if x.ndim < 2:
        raise ValueError(
            "x must have shape (n, *positions, channels), got one of shape "
            f"{x.shape}: under vmap, give it an axis of length 1 in front."
        )
    positions = x.ndim - 2
    steps = strides if isinstance(strides, tuple) else (strides,) * positions
    if len(steps) != positions:
        raise ValueError(
            f"strides must be one integer or {positions} (for x of shape {x.shape}), "
            f"got {strides!r}."
        )
    for name, value in [("features", features), *(("strides", s) for s in steps)]:
        check_integer(name, value, least=1)
    return steps


def _average_pool(x: Array, steps: tuple[int, ...]) -> Array:
    window = (1, *steps, 1)
    overhang = [-size % step for size, step in zip(x.shape, window, strict=True)]
    sums = lax.reduce_window(
        x,
        np.zeros((), x.dtype),
        lax.add,
        window,
        window,
        [(0, extra) for extra in overhang],
    )
    # How many entries a window holds: fewer at the edge.
    sizes = np.ones((1,) * x.ndim)
    for axis, (length, step) in enumerate(zip(x.shape, window, strict=True)):
        starts = np.arange(0, length, step)
        held = np.minimum(step, length - starts) if step > 1 else np.ones(1)
        sizes = sizes * np.expand_dims(
            held, tuple(a for a in range(x.ndim) if a != axis)
        )
    return sums / jnp.asarray(np.broadcast_to(sizes, sums.shape), x.dtype)


def is_ghost(name: str) -> bool:
    """Whether the leaf "block/ghost_1/kernel" belongs to a ghost: by its name."""
    check_type("name", name, str, "the name of a leaf")
    return any(part.startswith(PREFIX) for part in name.split("/"))


def without_ghosts(name: str, leaf: Any) -> bool:
    """The default choice of maskable leaves, less the ghosts: as argument `where`.

    Ghosts are dense. Masked, they would count in the sparsity of a network in which
    they do not exist.
    """
    masking.check_arrays("leaf", leaf)
    return not is_ghost(name) and masking.default_where(name, leaf)


def drop_ghosts(tree: PyTree) -> PyTree:
    """The tree without ghosts: parameters, statistics, or an optimizer's state.

    Removes from every dictionary in the tree, however deep in whatever containers, the
    entries whose name begins with `"ghost_"`, and dictionaries that held nothing else.
    All other leaves are the very same arrays. The result has the structure that the
    plain network has: of its parameters and statistics, and of the state that the same
    optimizer makes for them (also inside `granet_jax.SparseState`: its masks and
    accumulator, provided that ghosts carried no mask, see `without_ghosts`)::

        variables, opt_state = tost.drop_ghosts((variables, opt_state))

    Not for `optax.flatten`, whose moments are one vector over all parameters; and
    labels of `optax.multi_transform` must not begin with `"ghost_"`, as they are the
    keys of a dictionary in its state.

    Args:
      tree: any pytree.

    Returns:
      The pytree without ghosts.

    Raises:
      ValueError: a ghost that is a field of a record, which cannot be taken out.
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
            continue  # It held ghosts only: the plain network has no such entry.
        kept[key] = plain
    # A constructor that takes a mapping: dict's, OrderedDict's, FrozenDict's.
    return type(tree)(kept)  # pyright: ignore[reportCallIssue]
