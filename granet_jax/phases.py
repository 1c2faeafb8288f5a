"""Mask updates: prune, revive, exchange.

A phase turns masks into masks. A method is a schedule and a tuple of phases, which
`update_masks` runs one after the other at every update step: GraNet is
`(Prune(), Exchange(fraction))`, RigL an `Exchange`, gradual pruning a `Prune`. To write
a phase of your own, subclass `Phase`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    get_args,
)

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from granet_jax import schedules, scores, structures, targets
from granet_jax.boxes import box_counts, merge, merge_masks, spread
from granet_jax.checks import check_flag, check_fraction, check_function
from granet_jax.layers import (
    Axes,
    divide,
    layer_keys,
    layer_shapes,
    over_layers,
)
from granet_jax.redistribution import mean_score, redistribute
from granet_jax.schedules import Schedule, Steps
from granet_jax.scores import Score, ScoreInputs
from granet_jax.selection import (
    Scope,
    count_layers,
    counter_dtype,
    top_k,
)
from granet_jax.structured_selection import fill, select
from granet_jax.structures import Structure

if TYPE_CHECKING:
    from granet_jax.methods.method import Method

Masks = list[Array]
Selection = Literal["drop", "grow", "revive"]


class ScoreMasks(Protocol):
    """A function from a score and masks to one array of scores per leaf."""

    def __call__(
        self, score: Score, masks: Masks, *, growing: bool = False
    ) -> list[Array]:
        """Evaluate the score; see `UpdateInputs`."""
        ...


class UpdateInputs(NamedTuple):
    """What a phase may read besides the masks.

    Attributes:
      before: The masks before this update, one boolean array per leaf.
      score: Evaluates a score: from (score, masks) to one array per leaf. Weights
        outside the masks count as zero. With `growing=True`, weights that were active
        before this update keep their values.
      target: The number of active weights that the schedule asks for: one unsigned
        integer per layer, or a single one for all layers with scope "global".
      scope: Whether weights compete across layers or within each layer.
      stacks: The axes of every leaf that count layers, see `granet_jax.layers`.
      row: int32 scalar, which of the updates this is, from 0.
      steps: The update steps of the method, known on the host.
      boxes: The structure whose boxes all keep the same number of weights, if the
        method has one. (Boxes that are kept or pruned as a whole appear to a phase as
        single weights.)
      least: The structure whose units all keep at least some weights, if the method
        has one. Pass it on to `structured_selection.select` and `grow`.
      key: A random key of this update, by which phases put equal scores in a random
        order; None for the lowest index first.
      makes_up: Whether layers make up for others that have fewer active weights than
        their targets, see `within_reach`.
      names: The names of the leaves.
    """

    before: Masks
    score: ScoreMasks
    target: Array
    scope: Scope
    stacks: tuple[Axes, ...]
    row: Array
    steps: Steps
    boxes: Structure | None
    key: Array | None = None
    makes_up: bool = False
    least: Structure | None = None
    names: tuple[str, ...] = ()

    def at_this_update(self, schedule: Callable[[int], Any], dtype: Any) -> Array:
        """The value of a host-side function of the step at this update."""
        table = [schedule(step) for step in self.steps.steps()]
        return jnp.asarray(table, dtype)[self.row]

    def order_of(self, selection: Selection) -> Array | None:
        """A random key for the order of equal scores in one selection of an update."""
        number = get_args(Selection).index(selection)
        return None if self.key is None else jax.random.fold_in(self.key, number)


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of a mask update. Subclass it, as a frozen dataclass, for your own.

    Attributes:
      grows: Whether the phase may activate weights.
    """

    grows: ClassVar[bool] = True

    def check(self, method: "Method") -> None:
        """Raise an error if the phase does not fit the method."""

    def init(self, masks: Masks) -> Any:
        """The state that the phase keeps between updates: a pytree of arrays."""
        return ()

    def __call__(self, masks: Masks, state: Any, at: UpdateInputs) -> tuple[Masks, Any]:
        """The masks and the state after the phase.

        A weight keeps its value and its moments in an update if it is active before
        the update and after every phase of it; else it starts at zero.

        Args:
          masks: One boolean array per leaf.
          state: The state from `init` or from the previous update.
          at: What else the phase may read.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Prune(Phase):
    """Keeps the highest-scored active weights, down to the schedule's number.

    Attributes:
      by: The score that ranks active weights.
      floor: The density, rounded down to whole weights, that every layer keeps with
        scope "global". The total number is the same.
    """

    grows: ClassVar[bool] = False
    by: Score = scores.magnitude
    floor: float = 0.0

    def check(self, method: "Method") -> None:
        """Raise TypeError or ValueError if a part does not fit the method."""
        check_function("by", self.by)
        check_fraction("floor", self.floor)
        if not self.floor:
            return
        if structures.has_least(method.structure):
            raise ValueError(
                f"floor must be 0 with the structure {method.structure.name}, which "
                f"says itself what every unit keeps, got {self.floor}."
            )
        if method.scope != "global":
            raise ValueError(
                f'floor must be 0 with scope="layer", got {self.floor}: there the '
                "distribution gives every layer its density."
            )
        density = 1.0 - max(method.sparsity(step) for step in method.updates.steps())
        if self.floor > density + 1e-12:  # 0.1 is more than 1.0 - 0.9, by rounding.
            raise ValueError(
                f"floor must be at most the density that {method.name} prunes to, "
                f"{density:g}, got {self.floor}: the layers could not all keep it."
            )

    def __call__(self, masks: Masks, state: Any, at: UpdateInputs) -> tuple[Masks, Any]:
        """Prune. Where no more weights are active than the target, nothing changes."""

        def prune() -> Masks:
            ranked = at.score(self.by, masks)
            number = at.target
            if at.makes_up:
                number = within_reach(number, active(masks, at.stacks))
            if not self.floor:
                return select(
                    at.boxes or at.least,
                    ranked,
                    number,
                    among=masks,
                    scope=at.scope,
                    stacks=at.stacks,
                )
            least = self._least(masks, at.stacks)
            first = top_k(ranked, least, among=masks, stacks=at.stacks)
            others = [m & ~f for m, f in zip(masks, first, strict=True)]
            number = number - active(first, at.stacks, "global").astype(number.dtype)
            chosen = top_k(
                ranked, number, among=others, scope="global", stacks=at.stacks
            )
            return [f | c for f, c in zip(first, chosen, strict=True)]

        if at.boxes is not None:
            return prune(), state
        excess = jnp.any(active(masks, at.stacks, at.scope) > at.target)
        return lax.cond(excess, prune, lambda: masks), state

    def _least(self, masks: Masks, stacks: tuple[Axes, ...]) -> np.ndarray:
        """The number of weights that every layer keeps."""
        sizes = map(math.prod, layer_shapes([m.shape for m in masks], stacks))
        # The small addend undoes the rounding error of a product such as 0.29 * 100.
        least = [math.floor(self.floor * size + 1e-6) for size in sizes]
        return np.asarray(least, np.uint32 if max(least) < 2**32 else np.uint64)


@dataclasses.dataclass(frozen=True)
class Revive(Phase):
    """Activates the highest-scored inactive weights, up to the schedule's number.

    Attributes:
      by: The score that ranks inactive weights.
    """

    by: Score = scores.magnitude

    def check(self, method: "Method") -> None:
        """Raise TypeError unless the score is a function."""
        check_function("by", self.by)

    def __call__(self, masks: Masks, state: Any, at: UpdateInputs) -> tuple[Masks, Any]:
        """Revive. Where as many weights are active as the target, nothing changes."""
        ranked, key = at.score(self.by, masks, growing=True), at.order_of("revive")
        if at.boxes is not None:
            numbers = divide(at.target, [m.shape for m in masks], at.stacks)
            filled = fill(at.boxes, masks, ranked, numbers, at.stacks, key=key)
            return filled, state
        present = active(masks, at.stacks, at.scope)
        missing = at.target.astype(present.dtype)
        missing -= jnp.minimum(present, missing)
        grown = grow(masks, ranked, missing, at.stacks, at.scope, key, at.least)
        return grown, state


@dataclasses.dataclass(frozen=True)
class Exchange(Phase):
    """Drops a fraction of every layer's active weights and regrows as many.

    Of a active weights, ceil(fraction * a) are dropped and regrown. Weights that were
    just dropped compete again, and keep their value and moments if they return. This
    is the neuroregeneration of GraNet and the update of RigL, SET and SNFS.

    Attributes:
      fraction: The prune fraction, in [0, 1], as a function of the step.
      drop: The score by which active weights are dropped, the lowest first.
      grow: The score by which inactive weights are activated, the highest first.
      across: Whether the freed weights of all layers are redistributed in proportion to
        the mean `grow` score of each layer's active weights (SNFS). Otherwise every
        layer regrows the number it dropped.
    """

    fraction: Schedule
    drop: Score = scores.magnitude
    grow: Score = scores.gradient
    across: bool = False

    def check(self, method: "Method") -> None:
        """Raise TypeError or ValueError if a part does not fit the method."""
        for name in ("fraction", "drop", "grow"):
            check_function(name, getattr(self, name))
        check_flag("across", self.across)
        for step in (0, *method.updates.steps()):
            check_fraction(f"fraction({step})", self.fraction(step))
        structure = method.structure
        if self.across and structures.has_equal_boxes(structure):
            raise ValueError(
                f"structure must be None, block or channel for {method.name}, which "
                f"moves weights between layers, got {structure.name}: each part of a "
                "layer has a fixed number of them."
            )

    def __call__(self, masks: Masks, state: Any, at: UpdateInputs) -> tuple[Masks, Any]:
        """Drop, then grow. The number of active weights stays the same."""
        stacks = at.stacks
        number = active(masks, stacks)
        fraction = at.at_this_update(
            lambda step: schedules.fixed_point(self.fraction(step)), jnp.uint32
        )
        freed = schedules.ceil_of(fraction, number)

        ranked = at.score(self.drop, masks)
        kept, key = number - freed, at.order_of("drop")
        stay = select(
            *(at.least, ranked, kept),
            among=masks,
            scope="layer",
            stacks=stacks,
            key=key,
        )

        ranked, key = at.score(self.grow, stay, growing=True), at.order_of("grow")
        if at.boxes is not None:
            pairs = zip(masks, stacks, strict=True)
            counts = [box_counts(at.boxes, m, axes) for m, axes in pairs]
            filled = fill(at.boxes, stay, ranked, counts, stacks, key=key)
            return filled, state
        if self.across:
            active_scores = at.score(self.grow, masks, growing=True)
            means = mean_score(masks, active_scores, stacks)
            room = active([~m for m in stay], stacks)
            total = jnp.sum(freed, dtype=freed.dtype)
            freed = redistribute(total, means, room)
        return grow(stay, ranked, freed, stacks, "layer", key, at.least), state


def grow(
    masks: Masks,
    ranked: list[Array],
    number: Array,
    stacks: tuple[Axes, ...],
    scope: Scope = "layer",
    key: Array | None = None,
    least: Structure | None = None,
) -> Masks:
    """Activate the `number` highest-ranked of the inactive weights, as `top_k` does.

    Equal ranks come in a random order that the key decides. A weight without gradient,
    such as that of a rare token, would otherwise come by its index. With `least`, units
    that have fewer active weights than it asks for come first.
    """
    if least is not None:
        wanted = [jnp.asarray(least.least, jnp.uint32)] * len(masks)
        filled = fill(least, masks, ranked, wanted, stacks, key=key)
        before = masks
        lacking = [f & ~m for f, m in zip(filled, masks, strict=True)]
        first = top_k(ranked, number, among=lacking, scope=scope, stacks=stacks)
        masks = [m | f for m, f in zip(masks, first, strict=True)]
        grown = active(masks, stacks, scope) - active(before, stacks, scope)
        number = number - grown.astype(number.dtype)
    inactive = [~m for m in masks]
    grown = top_k(ranked, number, among=inactive, scope=scope, key=key, stacks=stacks)
    return [m | g for m, g in zip(masks, grown, strict=True)]


def within_reach(target: Array, present: Array) -> Array:
    """The target of every layer, where some have fewer active weights than that.

    Those keep what they have. The others keep more than their targets, in proportion to
    what they have above them, so that the total is the same. (Masks of the method never
    need this. Masks from the user may.)

    Args:
      target: Vector of unsigned integers, one per layer.
      present: The active weights of every layer.
    """
    kept = jnp.minimum(target.astype(present.dtype), present)
    room = present - kept
    missing = jnp.sum(target.astype(present.dtype) - kept, dtype=present.dtype)
    return kept + redistribute(missing, room.astype(jnp.float32), room)


def active(masks: Masks, stacks: tuple[Axes, ...], scope: Scope = "layer") -> Array:
    """The number of active weights: one per layer, or of all with scope "global"."""
    sizes = [math.prod(s) for s in layer_shapes([m.shape for m in masks], stacks)]
    counter = counter_dtype(sizes, scope)
    # On CPU, XLA is ten times slower at a single sum than at two in one pass.
    true, false = count_layers([[m, ~m] for m in masks], stacks, counter)
    counts = jnp.minimum(true, jnp.asarray(sizes, counter) - false)
    return jnp.sum(counts, dtype=counter) if scope == "global" else counts


class Weights(NamedTuple):
    """The maskable leaves that an update reads, one array per leaf in each list.

    Attributes:
      stepped: A function that returns the weights after the optimizer's step. It is
        called wherever weights are scored: XLA then computes them there, and keeps no
        copy of them during the update.
      grads: The dense gradient, or None.
      average: The moving average of the dense gradient, or None.
      marked: The marked weights of the method, or None.
    """

    stepped: Callable[[], list[Array]]
    grads: list[Array] | None = None
    average: list[Array] | None = None
    marked: list[Array] | None = None


def update_masks(
    method: "Method",
    names: tuple[str, ...],
    masks: Masks,
    states: tuple[Any, ...],
    weights: Weights,
    count: Array,
    key: Array,
    stacks: tuple[Axes, ...],
) -> tuple[Masks, Masks, tuple[Any, ...]]:
    """Run the phases of a method's mask update, one after the other.

    Args:
      method: The method.
      names: The names of the maskable leaves.
      masks: One boolean array per leaf.
      states: The states of the phases.
      weights: What the scores read.
      count: int32 scalar, the step.
      key: The random key of the step.
      stacks: The axes of every leaf that count layers.

    Returns:
      The new masks; the weights among them that keep value and moments; the new states.
    """
    structure = method.structure
    shapes = layer_shapes([m.shape for m in masks], stacks)
    row = method.updates.update_index(count)
    boxes = structure if structures.has_equal_boxes(structure) else None
    at = UpdateInputs(
        before=merge_masks(structure, masks, stacks),
        score=score_function(names, masks, weights, key, stacks, structure),
        target=jnp.asarray(targets.active_counts(method, shapes))[row],
        scope=method.scope,
        stacks=stacks,
        row=row,
        steps=method.updates,
        boxes=boxes,
        least=structure if structures.has_least(structure) else None,
        key=jax.random.fold_in(key, len(shapes)),  # Layers fold in their numbers.
        makes_up=method.scope == "layer" and boxes is None and not method.revives,
        names=names,
    )
    present, kept, states = run_phases(method.phases, states, at)
    present = spread(structure, present, masks, stacks)
    return present, spread(structure, kept, masks, stacks), states


def update_masks_compiled(
    method: "Method",
    names: tuple[str, ...],
    masks: Masks,
    states: tuple[Any, ...],
    weights: Weights,
    count: Array,
    key: Array,
    stacks: tuple[Axes, ...],
) -> tuple[Masks, Masks, tuple[Any, ...]]:
    """`update_masks` for steps outside `jit`, compiled once for all of them."""
    stepped, *rest = weights.stepped(), *weights[1:]
    return _compiled(method, names, stacks, masks, states, stepped, rest, count, key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _compiled(
    method: "Method",
    names: tuple[str, ...],
    stacks: tuple[Axes, ...],
    masks: Masks,
    states: tuple[Any, ...],
    stepped: list[Array],
    rest: list[Any],
    count: Array,
    key: Array,
) -> tuple[Masks, Masks, tuple[Any, ...]]:
    weights = Weights(lambda: stepped, *rest)
    return update_masks(method, names, masks, states, weights, count, key, stacks)


def run_phases(
    phases: tuple[Phase, ...], states: tuple[Any, ...], at: UpdateInputs
) -> tuple[Masks, Masks, tuple[Any, ...]]:
    """Run phases one after the other.

    Returns:
      The new masks; the weights that were active before and after every phase, which
      keep their value and moments; the new states of the phases.
    """
    masks = kept = at.before
    after: list[Any] = []
    for phase, state in zip(phases, states, strict=True):
        masks, state = phase(masks, state, at)
        kept = [k & m for k, m in zip(kept, masks, strict=True)]
        after.append(state)
    return masks, kept, tuple(after)


def score_function(
    names: tuple[str, ...],
    before: Masks,
    weights: Weights,
    key: Array,
    stacks: tuple[Axes, ...],
    structure: Structure | None = None,
) -> ScoreMasks:
    """The function by which phases evaluate scores, see `UpdateInputs.score`.

    Args:
      names: The names of the maskable leaves.
      before: The masks before the update.
      weights: What the scores read.
      key: The random key of the step.
      stacks: The axes of every leaf that count layers.
      structure: The structure of the masks. Phases see its boxes as single weights;
        scores see weights.
    """

    def evaluated(score: Score, masks: Masks, *, growing: bool = False) -> list[Array]:
        masks = spread(structure, masks, before, stacks)
        params = zero_outside(before if growing else masks, weights.stepped())
        visible = zero_outside(masks, params)
        ranked = evaluate(score, names, masks, params, visible, weights, key, stacks)
        return merge(structure, ranked, stacks)

    return evaluated


def evaluate(
    score: Score,
    names: tuple[str, ...],
    masks: Masks,
    params: list[Array],
    visible: list[Array],
    weights: Weights,
    key: Array,
    stacks: tuple[Axes, ...],
) -> list[Array]:
    """The score of every leaf; see `ScoreInputs` for what it reads.

    The score of a leaf that stacks layers is that of its layers, each by itself.

    Args:
      score: The score.
      names: The names of the maskable leaves.
      masks: The masks that the score may read.
      params: The weights of every leaf, for the score of that leaf.
      visible: The weights of every leaf, for the scores of all leaves.
      weights: The gradients, averages and marked weights.
      key: The random key of the step.
      stacks: The axes of every leaf that count layers.
    """
    named = zip(names, visible, stacks, strict=True)
    by_name = {name: x for name, x, axes in named if not axes}
    keys = layer_keys(key, [m.shape for m in masks], stacks)

    def of_leaf(i: int, name: str) -> Array:
        def of_layer(key: Array, values: Any) -> Array:
            param, grad, mask, average, marked = values
            return score(
                ScoreInputs(param, grad, mask, average, key, name, by_name, marked)
            )

        lists = (params, weights.grads, masks, weights.average, weights.marked)
        values = [None if x is None else x[i] for x in lists]
        return over_layers(of_layer, stacks[i])(keys[i], values)

    return [of_leaf(i, name) for i, name in enumerate(names)]


def step_key(seed: int | Array, count: Array | int) -> Array:
    """The random key of a step. That of step 0 is for the initial masks."""
    return jax.random.fold_in(jax.random.key(seed), count)


def zero_outside(masks: Masks, arrays: list[Array]) -> list[Array]:
    """The arrays with zeros outside the masks."""
    return [
        jnp.where(m, x, jnp.zeros_like(x)) for m, x in zip(masks, arrays, strict=True)
    ]
