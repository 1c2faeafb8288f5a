"""Pruning plasticity: how well a network in training recovers from being pruned.

The parts of the GraNet paper's study, for any training loop. A dense network at some
moment of its training, with its parameters and the state of its optimizer, is pruned::

    full = granet_jax.init_masks(granet_jax.static(0.0), params)
    (keep,) = keep_counts(full, [0.9])
    pruned = prune(params, full, keep, regrow=0.5, grads=grads)
    params, inner_state = apply_pruned(params, inner_state, pruned)

then trained on for a while, its masks held::

    tx = granet_jax.transform(granet_jax.static(0.0), inner, masks=pruned.masks)
    opt_state = granet_jax.get_state(tx.init(params))._replace(inner_state=inner_state)

and its accuracies are compared: `Recovery`. The paper trains on at the learning rate of
the moment of pruning.

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
"""The criteria of the study, by which the lowest go."""


class Pruned(NamedTuple):
    """What pruning makes of masks.

    Attributes:
      masks: pytree of masks, from now on.
      continuing: pytree of masks: of those, the weights that keep value and moments.
        The others have been regrown, and start at zero.
    """

    masks: PyTree
    continuing: PyTree


class Recovery(NamedTuple):
    """Accuracies around a pruning; numbers, or arrays of a shape (of seeds, say).

    Attributes:
      before: of the network in training, before it is pruned.
      pruned: just after it is pruned.
      after: of the pruned network after some more training.
      unpruned: of the network that was trained on as long without being pruned.
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
        """What came of what pruning took or never was there, `after` - `pruned`."""
        return self.after - self.pruned

    @property
    def relative(self) -> Any:
        """What pruning costs in the end, `after` - `unpruned`.

        Plasticity counts what the network would have learned in that time anyway, much
        early in training and little late in it; this does not.
        """
        return self.after - self.unpruned


def sparsities(sparsity: float, updates: int = 1) -> list[float]:
    """The sparsities that pruning goes through: at once, or gradually.

    Args:
      sparsity: at the end, in [0, 1).
      updates: number of times it prunes: 1 for one-shot pruning; with more, sparsity
        rises by the cubic schedule, s_j = s (1 - (1 - j / updates)^3), j = 1..updates.

    Returns:
      One sparsity an update, the last `sparsity` to the bit.

    Raises:
      ValueError, TypeError: an argument out of range or of the wrong type.

    References:
      Zhu & Gupta, To Prune, or Not to Prune, 2017.
    """
    checks.check_sparsity("sparsity", sparsity)
    checks.check_steps("updates", updates, least=1)
    rising = schedules.cubic(0.0, sparsity, begin=0, end=updates, interval=1)
    return [rising(j) for j in range(1, updates + 1)]


def keep_counts(
    masks: PyTree, rising: Sequence[float], *, scope: Scope = "global"
) -> np.ndarray:
    """How many weights stay at each of some sparsities, exactly.

    Args:
      masks: pytree of masks; only their shapes are read.
      rising: sparsities in [0, 1), none below the one before it.
      scope: "global": of all leaves together; "layer": the same sparsity in each leaf,
        rounded by largest remainder to the exact total.

    Returns:
      Unsigned integers, (sparsities,) with scope "global", (sparsities, leaves) with
      scope "layer".

    Raises:
      ValueError, TypeError: a sparsity out of range or below the one before it; an
        unknown scope; no masks.
    """
    check_scope(scope)
    masking.check_arrays("masks", masks)
    if not isinstance(rising, Sequence | np.ndarray) or isinstance(rising, str):
        raise TypeError(f"rising must be a sequence of sparsities, got {rising!r}.")
    shapes = [tuple(x.shape) for x in jax.tree.leaves(masks)]
    if not shapes:
        raise ValueError(f"masks holds no mask, got {masks!r}.")
    for i, sparsity in enumerate(rising):
        checks.check_sparsity(f"rising[{i}]", sparsity)
        if i > 0 and sparsity < rising[i - 1]:
            raise ValueError(
                f"rising must not fall, got {sparsity} after {rising[i - 1]}: pruning "
                "takes weights away only."
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
) -> Pruned:
    """Prunes down to so many active weights, and regenerates some of them.

    Keeps the `keep` active weights with the highest score by the criterion. With
    `regrow`, then, in every leaf, the ceil(regrow * active) active weights of smallest
    magnitude are dropped and as many of largest abs(dense gradient) are grown, among
    all that are then inactive (GraNet's neuroregeneration, at no cost in parameters).
    A weight dropped and grown continues; one pruned and grown starts at zero.

    Runs under `jit` and `vmap`; `keep` may be traced.

    Args:
      params: pytree of arrays.
      masks: the present masks, as from `granet_jax.init_masks`.
      keep: a row of `keep_counts`: an integer with scope "global", one a leaf with
        scope "layer". Where fewer are active, all of them stay.
      criterion: "magnitude", abs(w); "gradient", abs(dL/dw); "random"; or a function of
        `ScoreInputs`.
      scope: what competes, "global" or "layer".
      regrow: share of the weights of every leaf that are exchanged after pruning, in
        [0, 1]; 0 for none. (GraNet: 0.5 at the start of training.)
      grads: dense gradient, of the structure of `params`; for the criterion "gradient"
        and for `regrow`.
      key: random key, for the criterion "random". Every leaf has its own of it.

    Returns:
      Masks, and which weights continue; `apply_pruned` makes parameters and moments
      agree with them.

    Raises:
      ValueError: an unknown criterion or scope, `regrow` out of range, masks of another
        structure or shape, `keep` of another shape; gradient or key missing.
      TypeError: `regrow` is no number.
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
    leaves = len(jax.tree.leaves(masks))
    shape = (leaves,) if scope == "layer" else ()
    number = keep if isinstance(keep, jax.Array) else np.asarray(keep)
    if not jnp.issubdtype(number.dtype, jnp.integer):
        raise TypeError(f"keep must be whole numbers of weights, got {keep!r}.")
    if number.shape != shape:
        raise ValueError(
            f"keep must have shape {shape} with scope {scope!r} and {leaves} masks, "
            f"got {number.shape}: take a row of keep_counts(masks, ..., "
            f"scope={scope!r})."
        )
    if not isinstance(number, Tracer) and np.any(np.asarray(number) < 0):
        raise ValueError(f"keep must not be negative, got {keep!r}.")
    if grads is None and (criterion == "gradient" or regrow > 0):
        why = "criterion 'gradient'" if criterion == "gradient" else f"regrow={regrow}"
        raise ValueError(f"grads must be given with {why}: the dense gradient.")
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
    )


@functools.partial(jax.jit, static_argnames=("criterion", "scope", "regrow"))
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
        score=score_function(names, leaves, Weights(weights, dense), key),
        target=keep,
        scope=scope,
        row=jnp.zeros((), jnp.int32),
        steps=schedules.every(1, last=1),
        boxes=None,
    )
    pruned, continuing, _ = run_phases(phases, ((),) * len(phases), at)
    return Pruned(treedef.unflatten(pruned), treedef.unflatten(continuing))


def apply_pruned(
    params: PyTree, inner_state: PyTree, pruned: Pruned
) -> tuple[PyTree, PyTree]:
    """Parameters and moments as they are after a pruning.

    Args:
      params: pytree of arrays.
      inner_state: state of the optimizer that steps on them: of any optax optimizer
        that keeps moments in the parameters' shapes. Not a `SparseState`, but the
        `inner_state` in it.
      pruned: from `prune`.

    Returns:
      (params, inner_state), zero wherever a weight does not continue.

    Raises:
      ValueError: masks of another structure or shape; `optax.flatten`.
    """
    checks.check_type("pruned", pruned, Pruned, "from granet_jax.analysis.prune")
    moments.refuse_flattened(inner_state, params, "inner_state")
    return (
        masking.apply_masks(params, pruned.continuing),
        moments.zero_moments(inner_state, pruned.continuing),
    )
