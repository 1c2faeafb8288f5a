"""Layer collapse: leaves without active weights, and disconnected networks.

Whether a network is connected is decided by one derivative. Every active weight is set
to 1 / (number of active weights into its unit), so that each unit averages its inputs
and nothing overflows, and every other parameter is set to 1. The input then grows in
all its entries at once. An output grows with it if and only if a path of active weights
reaches it.
"""

import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from granet_jax import masking
from granet_jax.checks import check_function
from granet_jax.layers import Axes, Stacked, layer_axes, stack_axes
from granet_jax.masking import PyTree

OnCollapse = Literal["warn", "error", "ignore"]
ApplyFn = Callable[[PyTree, Any], PyTree]

# The value of every input entry. It is large enough for biases not to matter, and far
# from the limits of float32, in which a network's own layers may compute.
_INPUT = 2.0**50


class Collapse(NamedTuple):
    """Result of `collapse`, with values on the host.

    Attributes:
      empty: Names of the layers without active weights ("dense/kernel"). In a network
        without branches, one empty layer disconnects the output. In parallel
        with a shortcut it need not.
      connected: Whether some path leads from the input to the output, or None if it was
        not determined.
    """

    empty: tuple[str, ...]
    connected: bool | None


def collapse(
    masks: PyTree,
    *,
    apply_fn: ApplyFn | None = None,
    params: PyTree = None,
    inputs: Any = None,
    stacked: Stacked = None,
) -> Collapse:
    """Find the layers without active weights, and whether the network is connected.

    Args:
      masks: Pytree of masks with known (not traced) values.
      apply_fn: See `connected`. If None, only the masks are inspected.
      params: See `connected`.
      inputs: See `connected`.
      stacked: Which axes of a leaf count layers, as in `granet_jax.transform`.

    Returns:
      A `Collapse`.

    Raises:
      ValueError: As `connected`.
    """
    masks = masking.given_masks(masks)
    masking.check_concrete("masks", masks)
    layers = masking.by_layer(masks, stacked)
    has_weights = {
        masking.leaf_name(path): jnp.any(m)
        for path, m in jax.tree_util.tree_leaves_with_path(layers)
        if m.size
    }
    has_weights = jax.device_get(has_weights)
    empty = tuple(name for name, has_any in has_weights.items() if not has_any)
    if apply_fn is None:
        return Collapse(empty, None)
    reaches = connected(apply_fn, params, masks, inputs, stacked=stacked)
    return Collapse(empty, reaches)


def connected(
    apply_fn: ApplyFn,
    params: PyTree,
    masks: PyTree,
    inputs: Any,
    *,
    stacked: Stacked = None,
) -> bool:
    """Return whether some path of active weights leads from the input to the output.

    This depends on the masks and the architecture, not on the values of the weights. It
    works for networks of linear layers, convolutions, ReLU-like activations, pooling,
    shortcuts, and norms in inference form. It raises an error for networks with a layer
    norm or a softmax, which do not grow with their input.

    Args:
      apply_fn: Function (params, inputs) -> outputs. Norms must be in inference form
        with their initial statistics (mean 0, variance 1).
      params: Pytree of arrays or `jax.ShapeDtypeStruct`; the values are not read.
      masks: Pytree of masks with known (not traced) values.
      inputs: Array or `jax.ShapeDtypeStruct` (or a pytree of them) with a batch of one
        example; the values are not read.
      stacked: Which axes of a leaf count layers, as in `granet_jax.transform`.

    Returns:
      True or False.

    Raises:
      ValueError: The masks have another structure or shape than the parameters, or even
        the dense network is not connected.
    """
    check_function("apply_fn", apply_fn, "a function (params, inputs) -> outputs")
    check_inputs(inputs)
    masking.check_concrete("masks", masks)
    masks = masking.check_masks(masks, params)
    result = _is_connected(apply_fn, params, masks, inputs, stacked)
    if result is None:
        raise ValueError(
            "apply_fn has no path from input to output that can be followed, even with "
            "nothing pruned: it must be positively homogeneous except for biases "
            "(ReLU, pooling, norms in inference form with mean 0 and variance 1), must "
            "not normalize its input, and must be finite."
        )
    return result


def report(
    masks: PyTree,
    on_collapse: OnCollapse,
    *,
    apply_fn: ApplyFn | None = None,
    params: PyTree = None,
    inputs: Any = None,
    stacked: Stacked = None,
) -> PyTree:
    """Return `masks`, after a warning or an error if they have collapsed.

    Traced masks cannot be inspected and are returned as they are.
    """
    if on_collapse == "ignore" or is_traced(masks):
        return masks
    result = collapse(masks, stacked=stacked)
    if apply_fn is not None:
        is_connected = _is_connected(apply_fn, params, masks, inputs, stacked)
        result = result._replace(connected=is_connected)
    if not result.empty and result.connected is not False:
        return masks
    message = _describe(result)
    if on_collapse == "error":
        raise ValueError(message)
    # Level 3 is the caller of the source, which calls this function.
    warnings.warn(message, UserWarning, stacklevel=3)
    return masks


def _describe(result: Collapse) -> str:
    facts = []
    if result.empty:
        names = ", ".join(map(repr, result.empty))
        facts.append(f"no active weight is left at {names}")
    if result.connected is None:
        facts.append(
            "granet_jax.mask_sources.connected tells whether a path is left from input "
            "to output"
        )
    elif result.connected:
        facts.append("the network is still connected from input to output")
    else:
        facts.append("no path is left from input to output, so it cannot learn")
    return (
        f"the masks have collapsed layers: {'; '.join(facts)}. Lower the sparsity, use "
        'another source or scope="layer", or accept it with on_collapse="ignore".'
    )


def _is_connected(
    apply_fn: ApplyFn, params: PyTree, masks: PyTree, inputs: Any, stacked: Stacked
) -> bool | None:
    """Decide as `connected` does; return None if the dense network has no path."""
    dense = jax.tree.map(jnp.ones_like, masks)
    with jax.enable_x64(True):
        reaches = jax.jit(
            lambda masks: _reaches(apply_fn, params, masks, inputs, stacked)
        )
        if bool(reaches(masks)):
            return True
        return False if bool(reaches(dense)) else None


def _reaches(
    apply_fn: ApplyFn, params: PyTree, masks: PyTree, inputs: Any, stacked: Stacked
) -> Array:
    """Return whether some output grows when all inputs grow, in float64."""
    weights = jax.tree_util.tree_map_with_path(
        lambda path, mask, param: _averaging_weights(
            mask, param, stack_axes(stacked, masking.leaf_name(path), param)
        ),
        masks,
        params,
        is_leaf=masking.is_masked_node,
    )
    leaves, treedef = jax.tree.flatten(inputs)
    values = [
        jnp.full(x.shape, _INPUT, jnp.float64 if _is_floating(x) else x.dtype)
        for x in leaves
    ]
    # Integer inputs, such as tokens, have no derivative.
    growing = [i for i, x in enumerate(leaves) if _is_floating(x)]

    def outputs(inputs: list[Array]) -> PyTree:
        filled = list(values)
        for i, x in zip(growing, inputs, strict=True):
            filled[i] = x
        return apply_fn(weights, treedef.unflatten(filled))

    point = [values[i] for i in growing]
    slopes = jax.tree.leaves(jax.jvp(outputs, (point,), (point,))[1])
    finite = jnp.stack([jnp.all(jnp.isfinite(x)) for x in slopes])
    positive = jnp.stack([jnp.any(x > 0) for x in slopes])
    return jnp.all(finite) & jnp.any(positive)


def _averaging_weights(mask: Any, param: Any, axes: Axes) -> Array:
    """Return weights that average the active inputs of a unit, and ones for vectors."""
    if not _is_floating(param):
        return jnp.zeros(param.shape, param.dtype)
    active = jnp.ones(param.shape, bool) if masking.is_masked_node(mask) else mask
    within = layer_axes(active.ndim, axes)
    if len(within) < 2:
        return active.astype(jnp.float64)
    input_axes = within[:-1]  # The last one counts the outputs.
    fan_in = jnp.sum(active, axis=input_axes, keepdims=True)
    return jnp.where(active, 1.0 / jnp.maximum(fan_in, 1), 0.0)


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def is_traced(*trees: PyTree) -> bool:
    """Return whether some leaf is a tracer, so that its value is unknown."""
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(trees))


def check_inputs(inputs: Any) -> None:
    """Raise TypeError or ValueError unless `inputs` holds arrays, or shapes."""
    masking.check_arrays("inputs", inputs)
    if not jax.tree.leaves(inputs):
        raise ValueError(f"inputs has no arrays, got {inputs!r}: pass one example.")


def check_action(on_collapse: str) -> None:
    """Raise ValueError unless `on_collapse` is a known action."""
    if on_collapse not in ("warn", "error", "ignore"):
        raise ValueError(
            f'on_collapse must be "warn", "error" or "ignore", got {on_collapse!r}.'
        )
