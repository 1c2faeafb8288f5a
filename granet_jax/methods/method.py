"""The record that describes a method to `transform`.

A method is data: a sparsity schedule, the steps that update the masks, and the phases
of an update. To write your own, build a `Method`, or replace a part of another one::

    method = granet_jax.rigl(0.9, 10_000)
    phases = (Exchange(fraction, drop=score),)
    variant = dataclasses.replace(method, phases=phases)

Methods compare by their parts: `granet(0.9, 100) == granet(0.9, 100)`. A function
compares by identity, so give a schedule or score with arguments as a frozen dataclass
with a `__call__`, and not as a closure, if that matters. Such methods can be pickled.
"""

import dataclasses
from typing import Literal

from granet_jax import schedules, scores, structures
from granet_jax.checks import (
    check_choice,
    check_decay,
    check_flag,
    check_function,
    check_sparsity,
    check_steps,
    check_type,
)
from granet_jax.distributions import Distribution, check_distribution
from granet_jax.penalties import Penalty
from granet_jax.phases import Phase, Revive
from granet_jax.schedules import ListedSteps, Schedule, Steps, UpdateSteps
from granet_jax.scores import Score
from granet_jax.selection import Scope, check_scope
from granet_jax.structures import Structure

PrunedWeights = Literal["sparse", "projected", "dense"]
WEIGHTS: tuple[str, ...] = ("sparse", "projected", "dense")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A sparse-training method.

    At every step of `updates`, the phases change the masks one after the other. A
    method with `weights` other than "sparse" has no phases: it chooses its masks among
    all weights, by `rank`.

    Attributes:
      name: The name for messages and reports.
      sparsity: The overall sparsity in [0, 1) as a function of the step. It is
        evaluated on the host, at step 0 (initial masks) and at every update step.
      updates: The steps that update the masks, from `schedules.every` or
        `schedules.listed`.
      phases: The phases of an update, in order; see `granet_jax.phases`.
      distribution: How the sparsity is divided among leaves, for the initial masks and,
        with scope "layer", for every update.
      scope: Whether weights compete across leaves ("global") or within each ("layer")
        when they are pruned or revived.
      structure: The structure of all masks, see `structures`; None for single weights.
        Phases treat a block or a channel as they treat a single weight.
      average_decay: The decay, in [0, 1), of a moving average of the dense gradient
        that scores can read; None for no average.
      needs_gradient: Whether a score reads the dense gradient. Then `transform` raises
        an error early where no gradient is available.
      resets: The steps after which the optimizer's moments are reset. The step that
        follows starts with fresh moments.
      penalty: An extra L2 coefficient for each weight, see `penalties`; None for none.
      weights: What happens to weights outside the masks. "sparse": they are zero, and
        the optimizer sees the masked gradient. "projected": the optimizer moves all
        weights by the dense gradient; then the masks are chosen among all weights and
        the others become zero (projected gradient descent). "dense": they keep their
        values and train on, and the forward pass uses `granet_jax.sparse_view`.
      rank: The score by which masks and `marked` weights are chosen among all weights.
      refresh: The number of steps from one choice among all weights to the next.
      marked_sparsity: The sparsity of a second tree of masks, the `marked` weights;
        None for no such tree. A sparse method chooses them among the active weights. A
        method with dense weights chooses them among all weights, whenever it chooses
        its masks, and its optimizer moves only marked weights.
      marks: The steps at which the marked weights of a sparse method are chosen again
        after init.
    """

    name: str
    sparsity: Schedule
    updates: Steps = schedules.NEVER
    phases: tuple[Phase, ...] = ()
    distribution: Distribution = "erk"
    scope: Scope = "global"
    structure: Structure | None = None
    average_decay: float | None = None
    needs_gradient: bool = False
    resets: Steps = schedules.NEVER
    penalty: Penalty | None = None
    weights: PrunedWeights = "sparse"
    rank: Score = scores.magnitude
    refresh: int = 1
    marked_sparsity: float | None = None
    marks: Steps = schedules.NEVER

    def __post_init__(self) -> None:
        """Raise ValueError or TypeError for a part that cannot be used."""
        check_type("name", self.name, str, "a string")
        check_function("sparsity", self.sparsity)
        for field in ("updates", "resets", "marks"):
            when = "steps from schedules.every(...) or schedules.listed(...)"
            check_type(field, getattr(self, field), (UpdateSteps, ListedSteps), when)
        for step in (0, *self.updates.steps()):
            check_sparsity(f"sparsity({step})", self.sparsity(step))
        check_distribution(self.distribution)
        check_scope(self.scope)
        check_flag("needs_gradient", self.needs_gradient)
        if self.average_decay is not None:
            check_decay("average_decay", self.average_decay)
        if self.penalty is not None:
            check_function("penalty", self.penalty, "a function or None")
        check_choice("weights", self.weights, WEIGHTS)
        check_function("rank", self.rank)
        check_steps("refresh", self.refresh)
        if self.marked_sparsity is not None:
            check_sparsity("marked_sparsity", self.marked_sparsity)
        self._check_structure()
        self._check_phases()
        try:
            hash(self)
        except TypeError as error:
            raise TypeError(
                f"all parts of a method must be hashable, {error}: use tuples instead "
                "of lists, and frozen dataclasses."
            ) from error

    def _check_structure(self) -> None:
        sparsities = {self.sparsity(t) for t in (0, *self.updates.steps())}
        # At constant sparsity, masks are drawn and exchanged within each leaf, and so
        # the scope does not matter.
        ranks = self.weights != "sparse" or self.marked_sparsity is not None
        ranks |= len(sparsities) > 1
        last = self.updates.steps()[-1] if self.updates.steps() else 0
        structures.check_use(
            self.structure,
            sparsity=self.sparsity(last),
            scope=self.scope if ranks else "layer",
            distribution=self.distribution,
        )

    def _check_phases(self) -> None:
        check_type("phases", self.phases, tuple, "a tuple of phases")
        for phase in self.phases:
            check_type("phases", phase, Phase, "a tuple of phases, such as (Prune(),)")
            phase.check(self)
        if self.phases and self.weights != "sparse":
            raise ValueError(
                f'phases must be empty with weights="{self.weights}", which chooses '
                f"the masks among all weights, got {self.phases}."
            )

    @property
    def grows(self) -> bool:
        """Whether an update may activate weights."""
        return bool(self.updates.steps()) and any(p.grows for p in self.phases)

    @property
    def revives(self) -> bool:
        """Whether weights come back where the scheduled sparsity falls."""
        return any(isinstance(p, Revive) for p in self.phases)


def check_method(method: object) -> None:
    """Raise TypeError unless `method` is a `Method`."""
    what = "a record such as granet_jax.granet(sparsity, total_steps)"
    check_type("method", method, Method, what)
