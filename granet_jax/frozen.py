"""Masked parameters that the inner optimizer never trains."""

import warnings
from typing import Any

import jax
import numpy as np
import optax
from jax.extend.core import Jaxpr, Literal

from granet_jax.masking import PyTree, leaf_name


def warn_of_frozen_leaves(
    optimizer: optax.GradientTransformationExtraArgs,
    inner_state: optax.OptState,
    params: PyTree,
    masks: PyTree,
) -> None:
    """Warn if the optimizer trains some parameters, but not all that carry a mask.

    Only an optimizer with `optax.masked` in it, as `optax.multi_transform` has, is
    examined. Its update is traced and not run. No warning is given if it cannot be
    traced here, because it takes extra arguments.
    """
    if not any(map(_is_partial, jax.tree.leaves(inner_state, is_leaf=_is_partial))):
        return

    def updates(grads: PyTree) -> PyTree:
        return optimizer.update(grads, inner_state, params)[0]

    names, masked = _names(params), {*_names(masks)}
    try:
        jaxpr = jax.make_jaxpr(updates)(params).jaxpr
        trained = dict(zip(names, _reached_outputs(jaxpr), strict=True))
    except Exception:  # noqa: BLE001 - optimizers raise what they like
        return
    frozen = [name for name in names if name in masked and not trained[name]]
    if frozen and any(trained.values()):
        warnings.warn(
            f"inner never trains {', '.join(map(repr, frozen))}, which carry masks: "
            "their weights are pruned all the same, and those that regrow stay zero. "
            "Exclude frozen parameters with where, for example by a regular expression "
            "that matches the names of the others only.",
            UserWarning,
            stacklevel=3,
        )


def _names(tree: PyTree) -> list[str]:
    return [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _is_partial(x: Any) -> bool:
    return isinstance(x, optax.MaskedState)


def _reached_outputs(jaxpr: Jaxpr) -> list[bool]:
    """For every output of a traced function, whether its inputs reach it.

    A product with a constant zero reaches nothing. A call or a loop inside the function
    is taken to pass all of its inputs on to all of its outputs.
    """
    reached = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        inputs = equation.invars
        zero = equation.primitive.name == "mul" and any(map(_is_zero, inputs))
        if not zero and not reached.isdisjoint(map(_variable, inputs)):
            reached.update(equation.outvars)
    return [_variable(x) in reached for x in jaxpr.outvars]


def _variable(x: Any) -> Any:
    return None if isinstance(x, Literal) else x


def _is_zero(x: Any) -> bool:
    return isinstance(x, Literal) and not np.any(x.val)
