"""SynFlow: masks without data, by the flow from input to output."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from granet_jax.checks import check_function, check_sparsity
from granet_jax.mask_sources.arguments import (
    check_inputs,
    check_rounds,
    is_traced,
)
from granet_jax.mask_sources.layer_collapse import OnCollapse, check_action, report
from granet_jax.mask_sources.select import (
    full_masks,
    put,
    round_counts,
    select_in_rounds,
    take,
)
from granet_jax.masking import PyTree, Where
from granet_jax.selection import Scope, check_scope

ApplyFn = Callable[[PyTree, Any], PyTree]


def synflow(
    apply_fn: ApplyFn,
    params: PyTree,
    inputs: Any,
    sparsity: float,
    *,
    rounds: int = 100,
    scope: Scope = "global",
    where: Where = None,
    on_collapse: OnCollapse = "warn",
) -> PyTree:
    """SynFlow: iterative pruning of the weights that carry least flow.

    With all parameters made absolute and an input of ones, R is the sum of the outputs
    and the score abs(w) dR/dabs(w). Every round scores the network that the one before
    has left, at densities d^(k/n); what is pruned does not come back. In a network that
    is positively homogeneous, the scores across any cut between input and output sum to
    R, and no cut is emptied before it must be. A layer beside a shortcut is no cut, and
    may be.

    R is large: beyond float32 from some thirty layers on. All is computed in float64
    (whether or not JAX has it enabled), as far as `apply_fn` lets it: a module that
    fixes float32 for its layers, instead of following its parameters, overflows, which
    is an error.

    Args:
      apply_fn: (params, inputs) -> outputs. Norms in inference form, with the
        statistics of initialisation (mean 0, variance 1); batch statistics would undo
        what the method rests on.
      params: pytree of arrays, those of initialisation. Their signs are not used.
      inputs: array or `jax.ShapeDtypeStruct` of a batch of inputs (or a pytree of
        them); only the shape and dtype are read. One example is enough.
      sparsity: share of pruned weights, in [0, 1).
      rounds: number of rounds. A single one collapses much earlier.
      scope: "global" or "layer", see `select`.
      where: which leaves carry a mask, as in `granet_jax.transform`.
      on_collapse: what to do about a leaf left without active weights, or about a
        network cut through: "warn", "error" or "ignore".

    Returns:
      Masks, of the structure of `params`.

    Raises:
      ValueError: an argument out of range; R that is NaN or infinite (inside a traced
        function, where it cannot be looked at, the masks are then meaningless); or
        collapse, if that is to be an error.
      TypeError: an argument of the wrong type.

    References:
      Tanaka et al., Pruning neural networks without any data by iteratively conserving
      synaptic flow, NeurIPS 2020.
    """
    check_sparsity("sparsity", sparsity)
    check_rounds(rounds)
    check_scope(scope)
    check_action(on_collapse)
    _check_network(apply_fn, inputs)
    masks = full_masks(params, where)
    shapes = [m.shape for m in jax.tree.leaves(masks)]
    with jax.enable_x64(True):
        masks = select_in_rounds(
            _flow(apply_fn, params, inputs),
            masks,
            round_counts(shapes, sparsity, rounds, scope),
            scope=scope,
            revive=False,
            traced=is_traced(params),
        )
    return report(masks, on_collapse, apply_fn=apply_fn, params=params, inputs=inputs)


def synflow_scores(
    apply_fn: ApplyFn, params: PyTree, inputs: Any, *, where: Where = None
) -> PyTree:
    """abs(w) dR/dabs(w), the scores of SynFlow with nothing pruned.

    Args:
      apply_fn: see `synflow`.
      params: see `synflow`.
      inputs: see `synflow`.
      where: see `synflow`.

    Returns:
      Pytree of the structure of `params`: float64 arrays at maskable leaves,
      `optax.MaskedNode()` elsewhere. For `select`. (Where JAX has not enabled 64-bit
      types, most of its functions would round them to float32.)

    Raises:
      ValueError: see `synflow`.
    """
    _check_network(apply_fn, inputs)
    masks = full_masks(params, where)
    with jax.enable_x64(True):
        return _flow(apply_fn, params, inputs)(masks)


def _check_network(apply_fn: Any, inputs: Any) -> None:
    check_function("apply_fn", apply_fn, "a function (params, inputs) -> outputs")
    check_inputs(inputs)


def _flow(apply_fn: ApplyFn, params: PyTree, inputs: Any) -> Callable[[PyTree], PyTree]:
    """From masks to scores; to be called where 64-bit types are enabled."""

    def wide(x: Any) -> bool:
        return jnp.issubdtype(x.dtype, jnp.floating)

    @jax.jit
    def flow(params: PyTree, masks: PyTree) -> tuple[Array, PyTree]:
        absolute = jax.tree.map(
            lambda p: jnp.abs(p).astype(jnp.float64) if wide(p) else p, params
        )
        ones = jax.tree.map(
            lambda x: jnp.ones(x.shape, jnp.float64 if wide(x) else x.dtype), inputs
        )

        def total(chosen: PyTree) -> Array:
            outputs = jax.tree.leaves(apply_fn(put(absolute, chosen), ones))
            return jnp.sum(jnp.stack([jnp.sum(x, dtype=jnp.float64) for x in outputs]))

        weights = take(absolute, masks)
        flow, slopes = jax.value_and_grad(total)(weights)
        return flow, jax.tree.map(jnp.multiply, weights, slopes)

    def score(masks: PyTree) -> PyTree:
        flow_, scores = flow(params, masks)
        finite = jnp.isfinite(flow_)
        for x in jax.tree.leaves(scores):
            finite &= jnp.all(jnp.isfinite(x))
        if not is_traced(finite) and not bool(finite):
            raise ValueError(
                f"the flow R through apply_fn must be finite, got {float(flow_)}: "
                "it grows with every layer, beyond float32 from some thirty on. "
                "Parameters and inputs are given in float64; let the module compute in "
                "it (flax: dtype=None, which follows the parameters, not "
                "dtype=jnp.float32), and give norms the statistics of initialisation."
            )
        return scores

    return score
