"""Collapse: leaves without active weights, and whether the network is cut through."""

import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from granet_jax import masking
from granet_jax.checks import check_function
from granet_jax.mask_sources.arguments import check_inputs, is_traced
from granet_jax.masking import PyTree

OnCollapse = Literal["warn", "error", "ignore"]

# Far enough out that biases no longer matter, and far from either end of float32, in
# which the network's own layers may insist on computing.
_FAR = 2.0**50


class Collapse(NamedTuple):
    """What masks have cut off: values on the host.

    Attributes:
      empty: names of the maskable leaves without active weights ("dense/kernel"). In
        a network without branches one of them cuts it through; beside a shortcut it
        need not.
      connected: whether some path leads from the input to the output; None if not
        determined.
    """

    empty: tuple[str, ...]
    connected: bool | None


def collapse(
    masks: PyTree,
    *,
    apply_fn: Callable[[PyTree, Any], PyTree] | None = None,
    params: PyTree = None,
    inputs: Any = None,
) -> Collapse:
    """Which leaves are empty, and whether the network still is connected.

    Args:
      masks: pytree of masks, concrete.
      apply_fn: see `connected`; None to look at the masks only.
      params: see `connected`.
      inputs: see `connected`.

    Returns:
      A `Collapse`.

    Raises:
      ValueError: as `connected`.
    """
    masks = masking.given_masks(masks)
    masking.check_concrete("masks", masks)
    alive = {
        masking.leaf_name(path): jnp.any(m)
        for path, m in jax.tree_util.tree_leaves_with_path(masks)
        if m.size
    }
    empty = tuple(name for name, any_ in jax.device_get(alive).items() if not any_)
    if apply_fn is None:
        return Collapse(empty, None)
    return Collapse(empty, connected(apply_fn, params, masks, inputs))


def connected(
    apply_fn: Callable[[PyTree, Any], PyTree],
    params: PyTree,
    masks: PyTree,
    inputs: Any,
) -> bool:
    """Whether some path of active weights leads from the input to the output.

    A property of the masks and the architecture: every active weight is replaced by
    1 / (active weights into its unit), so that a unit averages its inputs and nothing
    overflows, other parameters by 1, and the output's derivative is taken along an
    input that grows everywhere (so that biases are no path).

    For networks of linear layers and convolutions, ReLU-like activations, pooling,
    shortcuts and norms in inference form. A layer norm or a softmax has no such
    derivative: then this is an error.

    Args:
      apply_fn: (params, inputs) -> outputs. Norms in inference form, with the
        statistics of initialisation (mean 0, variance 1).
      params: pytree of arrays or `jax.ShapeDtypeStruct`; values are not read.
      masks: pytree of masks, concrete.
      inputs: array or `jax.ShapeDtypeStruct` (or a pytree of them), one example as a
        batch; values are not read.

    Returns:
      True or False.

    Raises:
      ValueError: masks of another structure or shape; or the network is not connected
        with nothing pruned either.
    """
    check_function("apply_fn", apply_fn, "a function (params, inputs) -> outputs")
    check_inputs(inputs)
    masking.check_concrete("masks", masks)
    found = _has_path(apply_fn, params, masking.check_masks(masks, params), inputs)
    if found is None:
        raise ValueError(
            "apply_fn has no path from input to output that can be followed, even with "
            "nothing pruned: it must be positively homogeneous but for biases (ReLU, "
            "pooling, norms in inference form with mean 0 and variance 1), not "
            "normalise its input, and be finite."
        )
    return found


def _has_path(
    apply_fn: Callable[[PyTree, Any], PyTree],
    params: PyTree,
    masks: PyTree,
    inputs: Any,
) -> bool | None:
    """As `connected`; None if not even the dense network has a path."""

    def wide(x: Any) -> jnp.dtype | None:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.dtype(jnp.float64) if floating else None

    def averaging(active: Any) -> Any:
        fan_in = jnp.sum(active, axis=tuple(range(active.ndim - 1)), keepdims=True)
        return jnp.where(active, 1.0 / jnp.maximum(fan_in, 1), 0.0)

    def weight(mask: Any, p: Any) -> Any:
        if wide(p) is None:
            return jnp.zeros(p.shape, p.dtype)
        if len(p.shape) < 2:
            ones = jnp.ones(p.shape, jnp.float64)
            return ones if masking.is_masked_node(mask) else jnp.where(mask, ones, 0)
        dense = masking.is_masked_node(mask)
        return averaging(jnp.ones(p.shape, bool) if dense else mask)

    def reaches(masks: PyTree) -> Any:
        weights = jax.tree.map(weight, masks, params, is_leaf=masking.is_masked_node)
        # A direction in whole numbers (tokens, say) has no derivative: left out.
        point = jax.tree.map(
            lambda x: jnp.full(x.shape, _FAR, wide(x) or x.dtype), inputs
        )
        leaves, treedef = jax.tree.flatten(point)
        floating = [i for i, x in enumerate(leaves) if wide(x) is not None]

        def outputs(moving: list[Any]) -> PyTree:
            placed = dict(zip(floating, moving, strict=True))
            at = [placed.get(i, x) for i, x in enumerate(leaves)]
            return apply_fn(weights, treedef.unflatten(at))

        moving = [leaves[i] for i in floating]
        _, slopes = jax.jvp(outputs, (moving,), (moving,))
        slopes = jax.tree.leaves(slopes)
        finite = jnp.stack([jnp.all(jnp.isfinite(x)) for x in slopes])
        positive = jnp.stack([jnp.any(x > 0) for x in slopes])
        return jnp.all(finite) & jnp.any(positive)

    dense = jax.tree.map(jnp.ones_like, masks)
    with jax.enable_x64(True):
        reaches = jax.jit(reaches)
        if bool(reaches(masks)):
            return True
        return False if bool(reaches(dense)) else None


def check_action(on_collapse: str) -> None:
    """Raises ValueError unless `on_collapse` is a known action."""
    if on_collapse not in ("warn", "error", "ignore"):
        raise ValueError(
            f'on_collapse must be "warn", "error" or "ignore", got {on_collapse!r}.'
        )


def report(
    masks: PyTree,
    on_collapse: OnCollapse,
    *,
    apply_fn: Callable[[PyTree, Any], PyTree] | None = None,
    params: PyTree = None,
    inputs: Any = None,
) -> PyTree:
    """Returns `masks`, having warned of or refused a collapse, as asked.

    Inside a traced function, where masks cannot be looked at, it does neither.
    """
    if on_collapse == "ignore" or is_traced(masks):
        return masks
    found = collapse(masks)
    if apply_fn is not None:
        found = found._replace(connected=_has_path(apply_fn, params, masks, inputs))
    if not found.empty and found.connected is not False:
        return masks
    parts = []
    if found.empty:
        names = ", ".join(map(repr, found.empty))
        parts.append(f"no active weight is left at {names}")
    parts.append(
        {
            True: "the network is still connected from input to output",
            False: "no path is left from input to output: it cannot learn",
            None: "whether a path is left from input to output, "
            "granet_jax.mask_sources.connected tells",
        }[found.connected]
    )
    message = (
        f"the masks have collapsed layers: {'; '.join(parts)}. Lower the sparsity, "
        'take another source or scope="layer", or accept it with on_collapse="ignore".'
    )
    if on_collapse == "error":
        raise ValueError(message)
    # Seen from the caller of the source, which calls this.
    warnings.warn(message, UserWarning, stacklevel=3)
    return masks
