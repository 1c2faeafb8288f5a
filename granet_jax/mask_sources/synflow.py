"""SynFlow: prune the weights that carry the least flow, without data.

All parameters w are replaced by abs(w) and the input by ones. R is the sum of the
outputs, and the score of a weight is abs(w) dR/dabs(w), the flow through it. The scores
are computed anew in every round, on the network that the previous round has left
(Tanaka et al., NeurIPS 2020).

In a positively homogeneous network, the scores across any cut between input and output
sum to R, so no cut is emptied before it has to be. A layer in parallel with a shortcut
is not a cut and may be emptied.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from granet_jax.checks import check_function, check_integer, check_sparsity
from granet_jax.layers import Stacked
from granet_jax.mask_sources.layer_collapse import (
    ApplyFn,
    OnCollapse,
    check_action,
    check_inputs,
    is_traced,
    report,
)
from granet_jax.mask_sources.rounds import select_in_rounds
from granet_jax.mask_sources.select import full_masks, masked_weights, with_weights
from granet_jax.masking import PyTree, Where
from granet_jax.selection import Scope, check_scope


def synflow(
    apply_fn: ApplyFn,
    params: PyTree,
    inputs: Any,
    sparsity: float,
    *,
    rounds: int = 100,
    scope: Scope = "global",
    where: Where = None,
    stacked: Stacked = None,
    on_collapse: OnCollapse = "warn",
) -> PyTree:
    """Return the masks of SynFlow.

    Round k of n keeps the density (1 - sparsity)^(k/n), and pruned weights do not
    return.

    R grows with depth and exceeds float32 from about thirty layers on. Everything is
    therefore computed in float64, even where JAX has not enabled it. A module that
    fixes its layers to float32 instead of following its parameters may still overflow,
    which raises an error.

    Args:
      apply_fn: Function (params, inputs) -> outputs. Norms must be in inference form
        with their initial statistics (mean 0, variance 1). Batch statistics would
        invalidate the method's guarantee.
      params: Pytree of arrays, the initial parameters. Their signs are not used.
      inputs: Array or `jax.ShapeDtypeStruct` (or a pytree of them) with a batch of
        inputs. Only shape and dtype are read, and one example is enough.
      sparsity: Share of pruned weights, in [0, 1).
      rounds: Number of rounds. With a single round, layers collapse at much lower
        sparsity.
      scope: "global" or "layer", see `select`.
      where: Which leaves carry a mask, as in `granet_jax.transform`.
      stacked: Which axes of a leaf count layers, as in `granet_jax.transform`.
      on_collapse: "warn", "error" or "ignore": the reaction to a leaf that is left
        without active weights, or to a disconnected network.

    Returns:
      Masks with the structure of `params`.

    Raises:
      ValueError: An argument is out of range, or R is NaN or infinite. (A traced R
        cannot be checked, and the masks are then meaningless.) Also for a collapse if
        `on_collapse="error"`.
      TypeError: An argument has the wrong type.

    References:
      Tanaka et al., Pruning neural networks without any data by iteratively conserving
      synaptic flow, NeurIPS 2020.
    """
    check_sparsity("sparsity", sparsity)
    check_integer("rounds", rounds, least=1)
    check_scope(scope)
    check_action(on_collapse)
    _check_network(apply_fn, inputs)
    masks = full_masks(params, where, stacked)
    with jax.enable_x64(True):
        masks = select_in_rounds(
            _flow_score(apply_fn, params, inputs),
            masks,
            sparsity,
            rounds,
            scope=scope,
            stacked=stacked,
            revive=False,
            traced=is_traced(params),
        )
    return report(
        masks,
        on_collapse,
        apply_fn=apply_fn,
        params=params,
        inputs=inputs,
        stacked=stacked,
    )


def synflow_scores(
    apply_fn: ApplyFn,
    params: PyTree,
    inputs: Any,
    *,
    where: Where = None,
    stacked: Stacked = None,
) -> PyTree:
    """Return the scores of SynFlow with nothing pruned, for `select`.

    Args:
      apply_fn: See `synflow`.
      params: See `synflow`.
      inputs: See `synflow`.
      where: See `synflow`.
      stacked: See `synflow`.

    Returns:
      Pytree with the structure of `params`: float64 arrays at maskable leaves,
      `optax.MaskedNode()` elsewhere. Where JAX has not enabled 64-bit types, most of
      its functions would round these arrays to float32; `select` does not.

    Raises:
      ValueError: As `synflow`.
    """
    _check_network(apply_fn, inputs)
    masks = full_masks(params, where, stacked)
    with jax.enable_x64(True):
        return _flow_score(apply_fn, params, inputs)(masks)


def _flow_score(
    apply_fn: ApplyFn, params: PyTree, inputs: Any
) -> Callable[[PyTree], PyTree]:
    """Return the score of given masks. Call it where 64-bit types are enabled."""

    @jax.jit
    def flow_and_scores(params: PyTree, masks: PyTree) -> tuple[Array, PyTree]:
        absolute = jax.tree.map(
            lambda p: jnp.abs(p).astype(jnp.float64) if _is_floating(p) else p, params
        )
        ones = jax.tree.map(
            lambda x: jnp.ones(x.shape, jnp.float64 if _is_floating(x) else x.dtype),
            inputs,
        )

        def flow(weights: PyTree) -> Array:
            outputs = jax.tree.leaves(apply_fn(with_weights(absolute, weights), ones))
            return jnp.sum(jnp.stack([jnp.sum(x, dtype=jnp.float64) for x in outputs]))

        weights = masked_weights(absolute, masks)
        total, slopes = jax.value_and_grad(flow)(weights)
        return total, jax.tree.map(jnp.multiply, weights, slopes)

    def score(masks: PyTree) -> PyTree:
        total, scores = flow_and_scores(params, masks)
        _check_flow(total, scores)
        return scores

    return score


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _check_flow(total: Array, scores: PyTree) -> None:
    finite = jnp.isfinite(total)
    for x in jax.tree.leaves(scores):
        finite &= jnp.all(jnp.isfinite(x))
    if not is_traced(finite) and not bool(finite):
        raise ValueError(
            f"the flow R through apply_fn must be finite, got {float(total)}: it grows "
            "with every layer and exceeds float32 from about thirty on. Parameters and "
            "inputs are passed as float64; let the module compute in it (flax: "
            "dtype=None, which follows the parameters, not dtype=jnp.float32), and "
            "give norms their initial statistics."
        )


def _check_network(apply_fn: Any, inputs: Any) -> None:
    check_function("apply_fn", apply_fn, "a function (params, inputs) -> outputs")
    check_inputs(inputs)
