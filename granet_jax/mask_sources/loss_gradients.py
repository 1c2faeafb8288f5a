"""Gradients of a loss over batches of data, for SNIP, FORCE and GraSP.

The sources take `loss_fn(params, batch) -> scalar`, a closure over everything else that
the network needs. The user thereby decides how norms behave, and the masks depend on
it: the authors' code of SNIP and SynFlow uses norms in inference form, that of GraSP
and FORCE uses batch statistics. Discard the running statistics that such a forward pass
updates.

Every batch has the same weight in the mean, whatever its size. Gradients are averaged
before the absolute value is taken, so that splitting the data into batches of equal
size does not change the scores.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from granet_jax.checks import check_axis_name, check_function, got, is_number
from granet_jax.dtypes import wider
from granet_jax.mask_sources.select import masked_weights, with_weights
from granet_jax.masking import PyTree

LossFn = Callable[[PyTree, Any], Array]


def cross_entropy(
    apply_fn: Callable[[PyTree, Any], Array], temperature: float = 1.0
) -> LossFn:
    """Return a loss for classifiers: the mean cross-entropy of logits / temperature.

    Args:
      apply_fn: Function (params, inputs) -> logits of shape (..., classes).
      temperature: Positive divisor of the logits. The authors of GraSP use 200.

    Returns:
      Function loss(params, (inputs, labels)) -> float32 scalar in nats. The labels are
      integers with the shape of the logits without the last axis.

    Raises:
      TypeError, ValueError: `temperature` is not a positive number. When the loss is
        called, TypeError also for labels that are not integers.
    """
    check_function("apply_fn", apply_fn, "a function (params, inputs) -> logits")
    if not is_number(temperature):
        raise TypeError(f"temperature must be a number, got {got(temperature)}.")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive, got {temperature}.")

    def loss(params: PyTree, batch: Any) -> Array:
        inputs, labels = batch
        if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
            raise TypeError(
                "a batch must be (inputs, labels) with integer labels, got labels of "
                f"dtype {jnp.result_type(labels)}; for others write your own loss_fn."
            )
        logits = apply_fn(params, inputs)
        logits = logits.astype(wider(logits.dtype, jnp.float32))
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits / temperature, labels
        )
        return jnp.mean(losses)

    return loss


def gradient_of(loss_fn: LossFn, axis_name: str | None) -> Callable[..., PyTree]:
    """Return the gradient of one batch at the masked weights, for maskable leaves."""

    def gradient(params: PyTree, masks: PyTree, batch: Any) -> PyTree:
        weights = per_device(masked_weights(params, masks), axis_name)
        rest = per_device(params, axis_name)
        return jax.grad(lambda w: loss_fn(with_weights(rest, w), batch))(weights)

    return gradient


def mean_over_batches(
    term: Callable[..., PyTree], axis_name: str | None
) -> Callable[..., PyTree]:
    """Return a function of (params, masks, batches, *extra) that averages `term`.

    It is the mean over batches and devices of term(params, masks, batch, *extra), which
    is a tree like the maskable weights. It is compiled once, accumulates in float32 or
    wider, and holds one batch at a time. Matrix products have full float32 precision on
    every device, because small scores would lose their order in a coarser one.
    """

    @jax.jit
    def add(total: PyTree, *args: Any) -> PyTree:
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, term(*args))

    @jax.jit
    def divide(total: PyTree, number: Any) -> PyTree:
        mean = jax.tree.map(lambda x: x / number, total)
        return mean if axis_name is None else lax.pmean(mean, axis_name)

    def mean(
        params: PyTree, masks: PyTree, batches: Iterable[Any], *extra: Any
    ) -> PyTree:
        total = jax.tree.map(
            lambda x: jnp.zeros_like(x, wider(x.dtype, jnp.float32)),
            masked_weights(params, masks),
        )
        number = 0
        with jax.default_matmul_precision("highest"):
            for batch in batches:
                total = add(total, params, masks, batch, *extra)
                number += 1
        if number == 0:
            raise ValueError(
                "batches must hold at least one batch, got none: is it a loader that "
                "is exhausted, or that has fewer examples than one batch?"
            )
        return divide(total, number)

    return mean


@jax.jit
def times_weights(params: PyTree, masks: PyTree, tree: PyTree) -> PyTree:
    """Return w x for every x of `tree`, with pruned weights w counting as zero."""
    weights = masked_weights(params, masks)
    return jax.tree.map(lambda w, x: w.astype(x.dtype) * x, weights, tree)


def per_device(tree: PyTree, axis_name: str | None) -> PyTree:
    """Type a tree as different on every device of a `shard_map` axis.

    JAX would sum the gradient with respect to a replicated value over the devices.
    """

    def vary(x: Array) -> Array:
        try:
            return lax.pcast(x, axis_name, to="varying")
        except ValueError:  # The value already varies.
            return x

    return tree if axis_name is None else jax.tree.map(vary, tree)


def check_loss(loss_fn: Any, axis_name: Any) -> None:
    """Raise TypeError unless these are a loss function and the name of an axis."""
    check_function("loss_fn", loss_fn, "a function (params, batch) -> scalar")
    check_axis_name(axis_name)


def check_batches(batches: Any, *, passes: int) -> None:
    """Raise TypeError unless `batches` can be iterated over `passes` times."""
    if isinstance(batches, Mapping | np.ndarray | jax.Array | str):
        raise TypeError(
            "batches must be a list or loader of batches, got one "
            f"{type(batches).__name__}: put it into a list."
        )
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be iterable, got {batches!r}.")
    if passes > 1 and iter(batches) is batches:
        raise TypeError(
            f"batches must be re-iterable because they are read {passes} times, got "
            f"the one-shot iterator {batches!r}: pass a list, or a loader that starts "
            "over in every iteration."
        )
