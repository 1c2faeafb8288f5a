"""Pruning plasticity: how well a network in training recovers from being pruned.

These are the parts of the GraNet paper's study, for any training loop. First, prune a
dense network at some step of its training, with the state of its optimizer::

    full = granet_jax.init_masks(granet_jax.static(0.0), params)
    (keep,) = keep_counts(full, [0.9])
    pruned = prune(params, full, keep, regrow=0.5, grads=grads)
    params, inner_state = apply_pruned(params, inner_state, pruned)

Then train it for a while with fixed masks::

    tx = granet_jax.transform(granet_jax.static(0.0), inner, masks=pruned.masks)
    opt_state = granet_jax.get_state(tx.init(params))._replace(inner_state=inner_state)

Finally, compare its accuracies with `Recovery`. The paper continues training at the
learning rate of the step at which it prunes.

References:
  Liu et al., Sparse Training via Boosting Pruning Plasticity with Neuroregeneration,
  NeurIPS 2021, section 3.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from granet_jax import (
    checks,
    distributions,
    masking,
    moments,
    schedules,
    scores,
)
from granet_jax.layers import Axes, Stacked, layer_shapes
from granet_jax.masking import PyTree
from granet_jax.phases import (
    Exchange,
    Phase,
    Prune,
    UpdateInputs,
    Weights,
    run_phases,
    score_function,
)
from granet_jax.scores import Score
from granet_jax.selection import Scope, check_scope

CRITERIA: dict[str, Score] = {
    "magnitude": scores.magnitude,
    "gradient": scores.gradient,
    "random": scores.random,
}
"""Criteria of the study. Weights with the lowest scores are pruned."""


class Pruned(NamedTuple):
    """Masks after pruning.

    Attributes:
      masks: Pytree of the new masks.
      continuing: Pytree of masks of the active weights that keep their value and
        moments. The other active weights are regrown and start at zero.
    """

    masks: PyTree
    continuing: PyTree


class Recovery(NamedTuple):
    """Accuracies before and after pruning: numbers, or arrays with an axis of seeds.

    Attributes:
      before: Accuracy of the network before it is pruned.
      pruned: Accuracy just after it is pruned.
      after: Accuracy of the pruned network after further training.
      unpruned: Accuracy of the network after the same training without pruning.
    """

    before: Any
    pruned: Any
    after: Any
    unpruned: Any

    @property
    def plasticity(self) -> Any:
        """The paper's pruning plasticity, `after` - `before`; larger is better."""
        return self.after - self.before

    @property
    def regained(self) -> Any:
        """Accuracy that training after pruning gained, `after` - `pruned`."""
        return self.after - self.pruned

    @property
    def relative(self) -> Any:
        """Cost of pruning in the end, `after` - `unpruned`.

        Plasticity includes what the network would have learned in that time anyway,
        which is a lot early in training and little late. This difference does not.
        """
        return self.after - self.unpruned


def sparsities(sparsity: float, updates: int = 1) -> list[float]:
    """Return the sparsities of one-shot or gradual pruning, one for each update.

    Args:
      sparsity: Final sparsity, in [0, 1).
      updates: Number of times the network is pruned. 1 is one-shot pruning; with more
        updates, sparsity rises by the cubic schedule
        s_j = s (1 - (1 - j / updates)^3), j = 1..updates.

    Returns:
      One sparsity for each update. The last one equals `sparsity` exactly.

    Raises:
      ValueError, TypeError: An argument out of range or of the wrong type.

    References:
      Zhu & Gupta, To Prune, or Not to Prune, 2017.
    """
    checks.check_sparsity("sparsity", sparsity)
    checks.check_steps("updates", updates)
    rising = schedules.cubic(0.0, sparsity, begin=0, end=updates, interval=1)
    return [rising(j) for j in range(1, updates + 1)]


def keep_counts(
    masks: PyTree,
    rising: Sequence[float],
    *,
    scope: Scope = "global",
    stacked: Stacked = None,
) -> np.ndarray:
    """Return the exact number of weights to keep at each of several sparsities.

    Args:
      masks: Pytree of masks. Only their shapes matter.
      rising: Sparsities in [0, 1), in ascending order.
      scope: "global" for one number over all layers; "layer" for the same sparsity in
        each layer, rounded by largest remainder to the exact total.
      stacked: Which axes of a leaf count layers, as in `granet_jax.transform`.

    Returns:
      Unsigned integers of shape (sparsities,) with scope "global", and
      (sparsities, layers) with scope "layer".

    Raises:
      ValueError, TypeError: A sparsity out of range or below its predecessor; an
        unknown scope; no masks.
    """
    check_scope(scope)
    masking.check_arrays("masks", masks)
    if not isinstance(rising, Sequence | np.ndarray) or isinstance(rising, str):
        raise TypeError(f"rising must be a sequence of sparsities, got {rising!r}.")
    leaves = [tuple(x.shape) for x in jax.tree.leaves(masks)]
    shapes = layer_shapes(leaves, masking.stacks_of(masks, stacked))
    if not shapes:
        raise ValueError(f"masks holds no mask, got {masks!r}.")
    for i, sparsity in enumerate(rising):
        checks.check_sparsity(f"rising[{i}]", sparsity)
        if i > 0 and sparsity < rising[i - 1]:
            raise ValueError(
                f"rising must not fall, got {sparsity} after {rising[i - 1]}: pruning "
                "only removes weights."
            )
    size = sum(math.prod(shape) for shape in shapes)
    rows: list[Any] = []
    for sparsity in rising:
        if scope == "global":
            rows.append(distributions.total_count(size, sparsity))
        else:
            caps = rows[-1] if rows else None
            rows.append(distributions.counts(shapes, sparsity, "uniform", caps))
    return np.asarray(rows, np.uint32 if size < 2**32 else np.uint64)


def prune(
    params: PyTree,
    masks: PyTree,
    keep: ArrayLike | Sequence[int],
    *,
    criterion: str | Score = "magnitude",
    scope: Scope = "global",
    regrow: float = 0.0,
    grads: PyTree | None = None,
    key: Array | None = None,
    stacked: Stacked = None,
) -> Pruned:
    """Prune to a given number of active weights, and regenerate some of them.

    Pruning keeps the `keep` active weights with the highest scores. With `regrow`, each
    layer then drops its ceil(regrow * active) active weights of smallest magnitude and
    grows the same number of inactive weights with the largest abs(dense gradient). This
    is GraNet's neuroregeneration, which leaves the number of weights unchanged. A
    weight that is dropped and grown again keeps its value; a weight that is pruned and
    grown again starts at zero.

    Runs under `jit` and `vmap`; `keep` may be traced.

    Args:
      params: Pytree of arrays.
      masks: Current masks, as from `granet_jax.init_masks`.
      keep: Row of `keep_counts`: one integer with scope "global", one for each layer
        with scope "layer". If fewer weights are active, all of them stay.
      criterion: "magnitude", abs(w); "gradient", abs(dL/dw); "random"; or a function of
        `ScoreInputs`.
      scope: "global" if all weights compete, "layer" if those of one layer do.
      regrow: Fraction of the active weights of each layer to exchange after pruning, in
        [0, 1]; 0 for none. GraNet uses 0.5 at the start of training.
      grads: Dense gradient with the structure of `params`, for the criterion "gradient"
        and for `regrow`.
      key: Random key for the criterion "random". Each layer derives its own key.
      stacked: Which axes of a leaf count layers, as in `granet_jax.transform`.

    Returns:
      The new masks, and the weights that keep their value. `apply_pruned` applies them
      to parameters and moments.

    Raises:
      ValueError: An unknown criterion or scope, `regrow` out of range, masks of another
        structure or shape, `keep` of another shape, or a missing gradient or key.
      TypeError: `regrow` is not a number.
    """
    check_scope(scope)
    checks.check_fraction("regrow", regrow)
    if not callable(criterion):
        checks.check_choice("criterion", criterion, list(CRITERIA))
    masks = masking.check_masks(masks, params)
    if grads is not None:
        masking.check_masks(masks, grads, "grads")
    if key is not None:
        checks.check_key(key)
    stacks = masking.stacks_of(masks, stacked)
    layers = len(layer_shapes([m.shape for m in jax.tree.leaves(masks)], stacks))
    shape = (layers,) if scope == "layer" else ()
    number = keep if isinstance(keep, jax.Array) else np.asarray(keep)
    if not jnp.issubdtype(number.dtype, jnp.integer):
        raise TypeError(f"keep must be whole numbers of weights, got {keep!r}.")
    if number.shape != shape:
        raise ValueError(
            f"keep must have shape {shape} with scope {scope!r} and {layers} layers, "
            f"got {number.shape}: take a row of keep_counts(masks, ..., "
            f"scope={scope!r})."
        )
    if not isinstance(number, Tracer) and np.any(np.asarray(number) < 0):
        raise ValueError(f"keep must not be negative, got {keep!r}.")
    if grads is None and (criterion == "gradient" or regrow > 0):
        reason = (
            "criterion 'gradient'" if criterion == "gradient" else f"regrow={regrow}"
        )
        raise ValueError(f"grads must be given with {reason}: the dense gradient.")
    if key is None and criterion == "random":
        raise ValueError("key must be given with criterion 'random': a random key.")
    return _prune(
        params,
        masks,
        jnp.asarray(number),
        grads,
        jax.random.key(0) if key is None else key,
        criterion=criterion if callable(criterion) else CRITERIA[criterion],
        scope=scope,
        regrow=regrow,
        stacks=stacks,
    )


@functools.partial(jax.jit, static_argnames=("criterion", "scope", "regrow", "stacks"))
def _prune(
    params: PyTree,
    masks: PyTree,
    keep: Array,
    grads: PyTree | None,
    key: Array,
    *,
    criterion: Score,
    scope: Scope,
    regrow: float,
    stacks: tuple[Axes, ...],
) -> Pruned:
    paths = jax.tree_util.tree_leaves_with_path(masks)
    names = tuple(masking.leaf_name(path) for path, _ in paths)
    leaves, treedef = jax.tree.flatten(masks)
    weights = masking.maskable_leaves(params, masks)
    dense = None if grads is None else masking.maskable_leaves(grads, masks)

    phases: tuple[Phase, ...] = (Prune(criterion),)
    if regrow > 0:
        phases += (Exchange(schedules.constant(regrow)),)
    at = UpdateInputs(
        before=leaves,
        score=score_function(
            names, leaves, Weights(lambda: weights, dense), key, stacks
        ),
        target=keep,
        scope=scope,
        stacks=stacks,
        row=jnp.zeros((), jnp.int32),
        steps=schedules.every(1, last=1),
        boxes=None,
    )
    pruned, continuing, _ = run_phases(phases, ((),) * len(phases), at)
    return Pruned(treedef.unflatten(pruned), treedef.unflatten(continuing))


def apply_pruned(
    params: PyTree, inner_state: PyTree, pruned: Pruned
) -> tuple[PyTree, PyTree]:
    """Apply the result of `prune` to parameters and moments.

    Args:
      params: Pytree of arrays.
      inner_state: State of an optax optimizer whose moments have the shapes of the
        parameters, and are zero at first. For a `SparseState`, pass its field
        `inner_state`.
      pruned: Result of `prune`.

    Returns:
      (params, inner_state), with zeros at weights that do not keep their value.

    Raises:
      ValueError: Masks of another structure or shape, or a state of `optax.flatten`.
    """
    checks.check_type("pruned", pruned, Pruned, "from granet_jax.analysis.prune")
    moments.refuse_flattened(inner_state, params, "inner_state")
    zeros = jax.tree.map(jnp.zeros_like, inner_state)
    return (
        masking.apply_masks(params, pruned.continuing),
        moments.renew_moments(inner_state, zeros, pruned.continuing),
    )
