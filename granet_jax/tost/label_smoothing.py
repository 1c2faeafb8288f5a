"""Label smoothing, in the convention of the ToST authors and in the standard one."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer

from granet_jax.checks import check_choice, check_integer, check_number

Convention = Literal["tost", "standard"]
CONVENTIONS: tuple[Convention, ...] = ("tost", "standard")


def smooth_targets(
    labels: Array,
    classes: int,
    alpha: Array | float,
    convention: Convention = "tost",
) -> Array:
    """Return smoothed target distributions over the classes.

    - "tost" (the authors' code): 1 - alpha for the true class, alpha / (classes - 1)
      for every other class;
    - "standard" (optax, PyTorch): (1 - alpha) onehot + alpha / classes.

    They agree if the standard alpha is classes / (classes - 1) times the ToST alpha.

    Args:
      labels: Integer array with values in [0, classes), of any shape.
      classes: Number of classes, 2 or more.
      alpha: Amount of smoothing in [0, 1]; may be traced, such as a schedule's value.
      convention: "tost" or "standard".

    Returns:
      Floating array of shape `(*labels.shape, classes)`; the last axis sums to 1.

    Raises:
      TypeError, ValueError: An argument of the wrong type or out of range. Values of
        traced arguments are not checked.
    """
    check_choice("convention", convention, CONVENTIONS)
    check_integer("classes", classes, least=2)
    dtype = labels.dtype if hasattr(labels, "dtype") else np.asarray(labels).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"labels must be integers, got dtype {dtype}: distributions over "
            "classes need no smoothing."
        )
    labels = jnp.asarray(labels)
    if jnp.ndim(alpha) != 0:
        raise ValueError(f"alpha must be a scalar, got shape {jnp.shape(alpha)}.")
    if not isinstance(alpha, Tracer):
        check_number("alpha", np.asarray(alpha).item(), least=0.0, most=1.0)
    if not isinstance(labels, Tracer) and labels.size:
        # Concrete labels can be checked even while other values are traced.
        with jax.ensure_compile_time_eval():
            low, high = int(jnp.min(labels)), int(jnp.max(labels))
        if low < 0 or high >= classes:
            raise ValueError(
                f"labels must be in [0, {classes}), got values from {low} to {high}."
            )
    onehot = jax.nn.one_hot(labels, classes)
    alpha = jnp.asarray(alpha, onehot.dtype)
    if convention == "standard":
        return (1.0 - alpha) * onehot + alpha / classes
    return jnp.where(onehot > 0, 1.0 - alpha, alpha / (classes - 1))


def smoothed_cross_entropy(
    logits: Array,
    labels: Array,
    alpha: Array | float,
    *,
    convention: Convention = "tost",
) -> Array:
    """Return the cross-entropy of each example with its smoothed label.

    Args:
      logits: Floating array of shape (..., classes).
      labels: Integer array of shape (...), with values in [0, classes).
      alpha: Amount of smoothing in [0, 1], 0.1 in the authors' code; may be traced.
      convention: "tost" or "standard", see `smooth_targets`.

    Returns:
      Floating array of shape (...). As with the losses of optax, take its mean.

    Raises:
      TypeError, ValueError: As `smooth_targets`, and for shapes that do not match.

    References:
      Szegedy et al., Rethinking the Inception Architecture, CVPR 2016. Jaiswal et al.,
      Training Your Sparse Neural Network Better with Any Mask, ICML 2022.
    """
    if not hasattr(logits, "dtype") or not jnp.issubdtype(logits.dtype, jnp.floating):
        kind = getattr(logits, "dtype", repr(logits))
        raise TypeError(f"logits must be a floating array, got {kind}.")
    if logits.ndim < 1 or jnp.shape(labels) != logits.shape[:-1]:
        raise ValueError(
            "labels must have the shape of logits less its last axis, got labels of "
            f"shape {jnp.shape(labels)} and logits of shape {logits.shape}."
        )
    targets = smooth_targets(labels, logits.shape[-1], alpha, convention)
    return optax.softmax_cross_entropy(logits, targets)
