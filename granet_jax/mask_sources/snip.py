"""SNIP, iterative SNIP, FORCE and GraSP: masks from a loss, parameters and data.

All take `loss_fn(params, batch) -> scalar`, which closes over whatever else the network
has. That decides how norms are scored, and papers differ: the SNIP and SynFlow codes
score with norms in inference form, GraSP's and FORCE's with batch statistics, and the
masks differ. Statistics that such a forward pass would update are not to be kept.

A batch counts as one term of a mean, whatever its size. Gradients are averaged before
the modulus is taken, so that batches of one size score as the whole does.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from granet_jax.checks import (
    check_axis_name,
    check_function,
    check_sparsity,
    got,
    is_number,
)
from granet_jax.mask_sources.arguments import (
    check_rounds,
    is_traced,
)
from granet_jax.mask_sources.layer_collapse import OnCollapse, check_action, report
from granet_jax.mask_sources.select import (
    full_masks,
    put,
    round_counts,
    select,
    select_in_rounds,
    take,
)
from granet_jax.masking import PyTree, Where
from granet_jax.selection import Scope, check_scope

LossFn = Callable[[PyTree, Any], Array]


def cross_entropy(
    apply_fn: Callable[[PyTree, Any], Array], temperature: float = 1.0
) -> LossFn:
    """A loss for classifiers: the mean cross-entropy of logits over a temperature.

    Args:
      apply_fn: (params, inputs) -> logits (..., classes).
      temperature: positive; the logits are divided by it. GraSP takes 200.

    Returns:
      loss(params, (inputs, labels)) -> float32 scalar, in nats, the labels integers of
      the shape of the logits but for the last axis.

    Raises:
      TypeError, ValueError: a temperature that is no positive number; or, when called,
        labels that are no integers.
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
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits / temperature, labels
        )
        return jnp.mean(losses)

    return loss


def snip(
    loss_fn: LossFn,
    params: PyTree,
    batches: Iterable[Any],
    sparsity: float,
    *,
    rounds: int = 1,
    scope: Scope = "global",
    where: Where = None,
    axis_name: str | None = None,
    on_collapse: OnCollapse = "warn",
) -> PyTree:
    """SNIP: masks of the weights whose removal would change the loss most.

    Score abs(w dL/dw). In one round, or in several (iterative SNIP): each scores the
    network that the one before has left, at densities d^(k/n), and what is pruned does
    not come back.

    Args:
      loss_fn: (params, batch) -> scalar; of the parameters and the batch alone.
      params: pytree of arrays, those of initialisation. The authors' code draws them
        anew for training.
      batches: list, loader or other iterable of pytrees of arrays, at each of which
        the loss is evaluated once a round. One-shot iterators serve one round only.
        Some ten examples of every class, or one batch for the authors' form.
      sparsity: share of pruned weights, in [0, 1).
      rounds: number of rounds.
      scope: "global" or "layer", see `select`.
      where: which leaves carry a mask, as in `granet_jax.transform`.
      axis_name: mapped axis (of `pmap`, `shard_map`) over which devices hold different
        batches; gradients are averaged over it, so that masks are the same everywhere.
        None under `jit`, whose sharded arrays need nothing.
      on_collapse: what to do about a leaf left without active weights: "warn", "error"
        or "ignore".

    Returns:
      Masks, of the structure of `params`.

    Raises:
      ValueError: an argument out of range; no batch; scores that are NaN or infinite;
        or collapse, if that is to be an error.
      TypeError: an argument of the wrong type; a one-shot iterator for several rounds.

    References:
      Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity,
      ICLR 2019. De Jorge et al., Progressive Skeletonization, ICLR 2021 (several
      rounds).
    """
    return _iterated(
        loss_fn,
        params,
        batches,
        sparsity,
        rounds=rounds,
        scope=scope,
        where=where,
        axis_name=axis_name,
        on_collapse=on_collapse,
        revive=False,
    )


def force(
    loss_fn: LossFn,
    params: PyTree,
    batches: Iterable[Any],
    sparsity: float,
    *,
    rounds: int = 60,
    scope: Scope = "global",
    where: Where = None,
    axis_name: str | None = None,
    on_collapse: OnCollapse = "warn",
) -> PyTree:
    """FORCE: iterative SNIP in which pruned weights may come back.

    Every round scores all weights by abs(w g), with w as given and g the dense gradient
    of the masked network, and selects anew among all, at densities d^(k/n).

    The authors' code scores with the negated mean logit of the true class for a loss,
    and trains with cross-entropy; pass such a `loss_fn` for that form.

    Args:
      loss_fn: see `snip`.
      params: see `snip`.
      batches: see `snip`.
      sparsity: share of pruned weights, in [0, 1).
      rounds: number of rounds; one is SNIP.
      scope: see `snip`.
      where: see `snip`.
      axis_name: see `snip`.
      on_collapse: see `snip`.

    Returns:
      Masks, of the structure of `params`.

    Raises:
      ValueError, TypeError: see `snip`.

    References:
      De Jorge et al., Progressive Skeletonization: Trimming more fat from a network at
      initialization, ICLR 2021.
    """
    return _iterated(
        loss_fn,
        params,
        batches,
        sparsity,
        rounds=rounds,
        scope=scope,
        where=where,
        axis_name=axis_name,
        on_collapse=on_collapse,
        revive=True,
    )


def grasp(
    loss_fn: LossFn,
    params: PyTree,
    batches: Iterable[Any],
    sparsity: float,
    *,
    scope: Scope = "global",
    where: Where = None,
    axis_name: str | None = None,
    on_collapse: OnCollapse = "warn",
) -> PyTree:
    """GraSP: masks that preserve the gradient's norm.

    Removing w changes norm(g)^2 by about -2 w (H g), H the Hessian of the loss. Score
    w (H g), signed: the weights whose removal would lower the norm most stay. It needs
    two passes over the batches, and parameters in float32.

    Args:
      loss_fn: see `snip`; the authors' is `cross_entropy(apply_fn, temperature=200)`.
      params: see `snip`.
      batches: see `snip`, but never a one-shot iterator.
      sparsity: share of pruned weights, in [0, 1).
      scope: see `snip`.
      where: see `snip`.
      axis_name: see `snip`.
      on_collapse: see `snip`.

    Returns:
      Masks, of the structure of `params`.

    Raises:
      ValueError, TypeError: see `snip`.

    References:
      Wang et al., Picking Winning Tickets Before Training by Preserving Gradient Flow,
      ICLR 2020.
    """
    check_sparsity("sparsity", sparsity)
    check_scope(scope)
    check_action(on_collapse)
    found = grasp_scores(loss_fn, params, batches, where=where, axis_name=axis_name)
    return report(select(found, sparsity, scope=scope), on_collapse)


def snip_scores(
    loss_fn: LossFn,
    params: PyTree,
    batches: Iterable[Any],
    *,
    where: Where = None,
    axis_name: str | None = None,
) -> PyTree:
    """The scores of SNIP: abs(w dL/dw).

    Args:
      loss_fn: see `snip`.
      params: see `snip`.
      batches: see `snip`.
      where: see `snip`.
      axis_name: see `snip`.

    Returns:
      Pytree of the structure of `params`: arrays of at least float32 at maskable
      leaves, `optax.MaskedNode()` elsewhere. For `select`.

    Raises:
      ValueError, TypeError: see `snip`.
    """
    _check_loss(loss_fn, axis_name)
    _check_batches(batches, passes=1)
    masks = full_masks(params, where)
    return _sensitivity(loss_fn, params, batches, axis_name, revive=False)(masks)


def grasp_scores(
    loss_fn: LossFn,
    params: PyTree,
    batches: Iterable[Any],
    *,
    where: Where = None,
    axis_name: str | None = None,
) -> PyTree:
    """The scores of GraSP: w (H g), signed.

    Args:
      loss_fn: see `grasp`.
      params: see `grasp`.
      batches: see `grasp`.
      where: see `grasp`.
      axis_name: see `grasp`.

    Returns:
      As `snip_scores`.

    Raises:
      ValueError, TypeError: see `grasp`.
    """
    _check_loss(loss_fn, axis_name)
    _check_batches(batches, passes=2)
    masks = full_masks(params, where)
    gradient = _gradient(loss_fn, axis_name)

    def product(params: PyTree, masks: PyTree, batch: Any, direction: PyTree) -> PyTree:
        # Forward over reverse: one linearised backward pass.
        at = _varying(take(params, masks), axis_name)
        direction = jax.tree.map(
            lambda d, x: d.astype(x.dtype), _varying(direction, axis_name), at
        )
        return jax.jvp(
            lambda w: gradient(put(params, w), masks, batch), (at,), (direction,)
        )[1]

    mean_gradient = _mean_over_batches(gradient, _unchanged, axis_name)
    mean_product = _mean_over_batches(product, _times_weight, axis_name)
    direction = mean_gradient(params, masks, batches)
    return mean_product(params, masks, batches, direction)


def _unchanged(params: PyTree, masks: PyTree, mean: PyTree) -> PyTree:
    del params, masks
    return mean


def _times_weight(params: PyTree, masks: PyTree, mean: PyTree) -> PyTree:
    """W x at the maskable weights w, pruned ones counting as zero."""
    return jax.tree.map(lambda w, x: w.astype(x.dtype) * x, take(params, masks), mean)


def _iterated(
    loss_fn: LossFn,
    params: PyTree,
    batches: Iterable[Any],
    sparsity: float,
    *,
    rounds: int,
    scope: Scope,
    where: Where,
    axis_name: str | None,
    on_collapse: OnCollapse,
    revive: bool,
) -> PyTree:
    """`snip` and `force`."""
    check_sparsity("sparsity", sparsity)
    check_rounds(rounds)
    check_scope(scope)
    check_action(on_collapse)
    _check_loss(loss_fn, axis_name)
    _check_batches(batches, passes=rounds)
    masks = full_masks(params, where)
    shapes = [m.shape for m in jax.tree.leaves(masks)]
    masks = select_in_rounds(
        _sensitivity(loss_fn, params, batches, axis_name, revive=revive),
        masks,
        round_counts(shapes, sparsity, rounds, scope),
        scope=scope,
        revive=revive,
        traced=is_traced(params, batches),
    )
    return report(masks, on_collapse)


def _sensitivity(
    loss_fn: LossFn,
    params: PyTree,
    batches: Iterable[Any],
    axis_name: str | None,
    *,
    revive: bool,
) -> Callable[[PyTree], PyTree]:
    """From masks to |w g|, g at the masked weights, w masked too or else as given."""

    def saliency(params: PyTree, masks: PyTree, mean: PyTree) -> PyTree:
        counted = jax.tree.map(jnp.ones_like, masks) if revive else masks
        return jax.tree.map(jnp.abs, _times_weight(params, counted, mean))

    score = _mean_over_batches(_gradient(loss_fn, axis_name), saliency, axis_name)
    return lambda masks: score(params, masks, batches)


def _gradient(loss_fn: LossFn, axis_name: str | None) -> Callable[..., PyTree]:
    """The gradient of one batch by the maskable weights, at the masked ones."""

    def gradient(params: PyTree, masks: PyTree, batch: Any) -> PyTree:
        at = _varying(take(params, masks), axis_name)
        rest = _varying(params, axis_name)
        return jax.grad(lambda chosen: loss_fn(put(rest, chosen), batch))(at)

    return gradient


def _mean_over_batches(
    term: Callable[..., PyTree],
    finish: Callable[[PyTree, PyTree, PyTree], PyTree],
    axis_name: str | None,
) -> Callable[..., PyTree]:
    """A function of (params, masks, batches, *extra), compiled once.

    It gives finish(params, masks, mean), with the mean over batches and devices of
    term(params, masks, batch, *extra), a tree like the maskable weights. The mean is
    taken in at least float32, batch by batch, and no batch is held. Products of
    matrices are precise to float32 on every device: where their factors were rounded,
    small scores would lose their order.
    """

    @jax.jit
    def add(total: PyTree, *args: Any) -> PyTree:
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, term(*args))

    @jax.jit
    def finished(params: PyTree, masks: PyTree, total: PyTree, number: Any) -> PyTree:
        mean = jax.tree.map(lambda x: x / number, total)
        if axis_name is not None:
            mean = lax.pmean(mean, axis_name)
        return finish(params, masks, mean)

    def mean(
        params: PyTree, masks: PyTree, batches: Iterable[Any], *extra: Any
    ) -> PyTree:
        total = jax.tree.map(
            lambda x: jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32)),
            take(params, masks),
        )
        number = 0
        with jax.default_matmul_precision("highest"):
            for batch in batches:
                total = add(total, params, masks, batch, *extra)
                number += 1
        if number == 0:
            raise ValueError(
                "batches must hold at least one batch, got none: is it a loader that "
                "has come to its end, or of fewer examples than a batch?"
            )
        return finished(params, masks, total, number)

    return mean


def _varying(tree: PyTree, axis_name: str | None) -> PyTree:
    """Typed as different on every device of the axis, for `shard_map`.

    The gradient by a value that is the same everywhere would come summed over devices.
    """

    def vary(x: Array) -> Array:
        try:
            return lax.pcast(x, axis_name, to="varying")
        except ValueError:  # It is so already.
            return x

    return tree if axis_name is None else jax.tree.map(vary, tree)


def _check_loss(loss_fn: Any, axis_name: Any) -> None:
    check_function("loss_fn", loss_fn, "a function (params, batch) -> scalar")
    check_axis_name(axis_name)


def _check_batches(batches: Any, *, passes: int) -> None:
    if isinstance(batches, Mapping | np.ndarray | jax.Array | str):
        raise TypeError(
            "batches must be a list or loader of batches, got one "
            f"{type(batches).__name__}: put it into a list."
        )
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be iterable, got {batches!r}.")
    if passes > 1 and iter(batches) is batches:
        raise TypeError(
            f"batches must be re-iterable, since they are gone through {passes} times, "
            f"got the one-shot iterator {batches!r}: pass a list, or a loader that "
            "starts anew whenever it is iterated over."
        )
