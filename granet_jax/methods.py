"""The record of a method, and GraNet, GMP, RigL, SET, SNFS and static as such records.

A method is data: which sparsity at which step, when masks are updated, what is dropped
and what is grown. To write one's own, take a record and replace a part::

    mine = dataclasses.replace(granet_jax.rigl(0.9, 10_000), drop=my_score)
"""

import dataclasses
import itertools
import math
from typing import Any, Literal

from granet_jax import schedules, scores, structures
from granet_jax.checks import (
    check_choice,
    check_decay,
    check_flag,
    check_fraction,
    check_sparsity,
    check_steps,
    check_type,
    got,
    is_number,
)
from granet_jax.distributions import Distribution, check_distribution
from granet_jax.penalties import Penalty
from granet_jax.schedules import ListedSteps, Schedule, Steps, UpdateSteps
from granet_jax.scores import Score
from granet_jax.selection import Scope, check_scope
from granet_jax.structures import Structure

_GROW: dict[str, Score] = {
    "gradient": scores.gradient,
    "momentum": scores.momentum,
    "random": scores.random,
}


Weights = Literal["sparse", "projected", "dense"]
WEIGHTS: tuple[str, ...] = ("sparse", "projected", "dense")

_NO_EXCHANGE = schedules.constant(0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A sparse-training method, as the parts that `transform` puts together.

    At an update step: prune down to `sparsity` if it has risen since the last update,
    or revive weights, with a `revive` score, if it has fallen; then, with a `grow`
    score, drop a fraction of every leaf's active weights and regrow as many.

    With `weights` other than "sparse" nothing is exchanged: masks are chosen anew,
    among all weights.

    Attributes:
      name: for messages and reports.
      sparsity: overall sparsity in [0, 1) as a function of the step, evaluated on the
        host at step 0 (initial masks) and at every update step.
      updates: the steps that update the masks.
      distribution: how the sparsity is split over leaves: of the initial masks, and of
        every update with scope "layer".
      scope: whether pruning ranks weights across leaves or within each.
      prune: score by which pruning ranks (the highest stay).
      revive: score by which weights come back where the sparsity falls (the highest
        come, with value and moments zero); None if none do, and a sparsity that falls
        changes nothing.
      drop: score by which the exchange drops (the lowest go).
      grow: score by which the exchange regrows (the highest come); None for no
        exchange.
      fraction: prune fraction of the exchange in [0, 1], as a function of the step.
      redistribute: the freed weights of all leaves go where the mean grow score of the
        active weights is large, instead of back to their leaf (SNFS).
      accumulator_decay: decay of a moving average of the dense gradient, in [0, 1),
        kept in the state for the scores; None for none.
      needs_gradient: whether a score reads the dense gradient.
      resets: the steps after which the moments of all parameters start anew: with the
        step that follows (what is saved in between still has those of before).
      weights: what becomes of weights outside the mask. "sparse": they are zero, and
        the optimizer sees the masked gradient. "projected": it sees the dense one and
        moves all weights; the mask is then chosen among all, and the others become
        zero (projected gradient descent). "dense": they live on, and the forward pass
        takes the sparse ones (`granet_jax.sparse_view`).
      refresh: steps from one choice of masks to the next, with `weights` other than
        "sparse".
      marked_sparsity: sparsity of a second tree of masks, the `marked` weights, chosen
        by `prune` among the active ones; with dense weights among all, whenever the
        masks are chosen, and then the optimizer moves no others. None for none.
      marks: the steps that choose the marked weights anew; the first choice is that
        among the weights at init.
      penalty: extra L2 coefficient of each weight, see `penalties`; None for none.
      structure: of all masks, see `structures`; None for single weights. To the other
        parts, a box that is kept or pruned as a whole is what a weight is otherwise.
    """

    name: str
    sparsity: Schedule
    updates: Steps = schedules.NEVER
    distribution: Distribution = "erk"
    scope: Scope = "global"
    prune: Score = scores.magnitude
    drop: Score = scores.magnitude
    grow: Score | None = None
    fraction: Schedule = _NO_EXCHANGE
    redistribute: bool = False
    accumulator_decay: float | None = None
    needs_gradient: bool = False
    revive: Score | None = None
    resets: Steps = schedules.NEVER
    weights: Weights = "sparse"
    refresh: int = 1
    marked_sparsity: float | None = None
    marks: Steps = schedules.NEVER
    penalty: Penalty | None = None
    structure: Structure | None = None

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError for a part that cannot be used."""
        check_type("name", self.name, str, "a string")
        check_scope(self.scope)
        check_distribution(self.distribution)
        when = "steps from schedules.every(...) or schedules.listed(...)"
        for field in ("updates", "resets", "marks"):
            check_type(field, getattr(self, field), (UpdateSteps, ListedSteps), when)
        for field in ("redistribute", "needs_gradient"):
            check_flag(field, getattr(self, field))
        if self.accumulator_decay is not None:
            check_decay("accumulator_decay", self.accumulator_decay)
        for field in ("sparsity", "prune", "drop", "fraction"):
            if not callable(getattr(self, field)):
                raise TypeError(
                    f"{field} must be a function, got {getattr(self, field)!r}."
                )
        for field in ("grow", "revive", "penalty"):
            part = getattr(self, field)
            if part is not None and not callable(part):
                raise TypeError(f"{field} must be a function or None, got {part!r}.")
        check_choice("weights", self.weights, WEIGHTS)
        check_steps("refresh", self.refresh)
        if self.weights != "sparse" and self.grow is not None:
            raise ValueError(
                f'grow must be None with weights="{self.weights}": all weights compete '
                "for the mask, and none are exchanged."
            )
        if self.marked_sparsity is not None:
            check_sparsity("marked_sparsity", self.marked_sparsity)
        for step in (0, *self.updates.steps()):
            check_sparsity(f"sparsity({step})", self.sparsity(step))
            check_fraction(f"fraction({step})", self.fraction(step))
        self._check_structure()

    def _check_structure(self) -> None:
        reached = [self.sparsity(t) for t in (0, *self.updates.steps())]
        # Masks of constant sparsity are drawn, and exchanged, within each leaf.
        ranks = self.weights != "sparse" or self.marked_sparsity is not None
        ranks |= len(set(reached)) > 1
        structures.check_use(
            self.structure,
            sparsity=reached[-1],
            scope=self.scope if ranks else "layer",
            distribution=self.distribution,
        )
        if self.redistribute and self.structure and not self.structure.whole:
            raise ValueError(
                f"structure must be None, block or channel for {self.name}, which "
                f"moves weights between leaves, got {self.structure.name}: each part "
                "of a leaf has a fixed number of them."
            )

    @property
    def grows(self) -> bool:
        """Whether an update may activate weights."""
        steps = (0, *self.updates.steps())
        falls = self.revive is not None and any(
            self.sparsity(after) < self.sparsity(before)
            for before, after in itertools.pairwise(steps)
        )
        return self.grow is not None or falls


def check_method(method: object) -> None:
    """Raises TypeError unless `method` is a record of a method."""
    what = "a record such as granet_jax.granet(sparsity, total_steps)"
    check_type("method", method, Method, what)


def granet(
    sparsity: float,
    total_steps: int,
    *,
    initial_sparsity: float = 0.0,
    begin_step: int = 0,
    end_step: int | None = None,
    interval: int = 1000,
    fraction: float = 0.5,
    final_fraction: float = 0.005,
    distribution: Distribution = "erk",
    scope: Scope = "global",
    grow: str = "gradient",
    structure: Structure | None = None,
) -> Method:
    """GraNet: gradual magnitude pruning with zero-cost neuroregeneration.

    Every `interval` steps: prune by magnitude down to the cubic schedule's sparsity
    (until `end_step`), then in every layer drop the fraction r of the active weights
    by magnitude and regrow as many by abs(dense gradient) (until `total_steps`), with
    r(t) = final_fraction + (fraction - final_fraction)(1 + cos(pi t / total_steps))/2.

    Dense-to-sparse at `initial_sparsity=0`; sparse-to-sparse (GraNet-ST) at, say, 0.5.

    Args:
      sparsity: final sparsity, in [0, 1).
      total_steps: optimizer steps of the whole training.
      initial_sparsity: sparsity at the start, in [0, sparsity].
      begin_step: step at which gradual pruning begins.
      end_step: last step of gradual pruning; default half of `total_steps`. The last
        update up to it reaches `sparsity` exactly.
      interval: steps between mask updates.
      fraction: prune fraction at the start, in [0, 1].
      final_fraction: prune fraction at the end, in [0, 1].
      distribution: "uniform", "er", "erk" or a function; of the initial masks, and of
        pruning with scope "layer". The GraNet code's uniform variant
        (`distribution="uniform", scope="layer"`) keeps its classifier at density 0.2
        from sparsity 0.8 on; we do not, since no leaf of a pytree is known to be one.
      scope: "global" or "layer": what competes in gradual pruning.
      grow: "gradient", "momentum" or "random".
      structure: of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform`.

    Raises:
      ValueError, TypeError: an argument out of range or of the wrong type.

    References:
      Liu et al., Sparse Training via Boosting Pruning Plasticity with
      Neuroregeneration, NeurIPS 2021.
    """
    check_steps("total_steps", total_steps, least=1)
    end_step = total_steps // 2 if end_step is None else end_step
    pruning = gradual(sparsity, initial_sparsity, begin_step, end_step, interval)
    if end_step > total_steps:
        raise ValueError(
            f"end_step must be at most total_steps, got end_step={end_step} with "
            f"total_steps={total_steps}."
        )
    check_fraction("fraction", fraction)
    check_fraction("final_fraction", final_fraction)
    check_choice("grow", grow, tuple(_GROW))
    return Method(
        name="granet",
        sparsity=pruning,
        updates=schedules.every(interval, begin=begin_step, last=total_steps),
        distribution=distribution,
        structure=structure,
        scope=scope,
        grow=_GROW[grow],
        fraction=schedules.cosine(fraction, final_fraction, steps=total_steps),
        accumulator_decay=0.9 if grow == "momentum" else None,
        needs_gradient=grow != "random",
    )


def gmp(
    sparsity: float,
    end_step: int,
    *,
    initial_sparsity: float = 0.0,
    begin_step: int = 0,
    interval: int = 1000,
    scope: Scope = "global",
    distribution: Distribution = "uniform",
    structure: Structure | None = None,
) -> Method:
    """Gradual magnitude pruning: cubic schedule, no regrowth.

    s(t) = sparsity + (initial_sparsity - sparsity)(1 - (t - begin)/(n interval))^3 at
    t = begin + j interval, j = 1..n, n = (end - begin) // interval.

    Args:
      sparsity: final sparsity, in [0, 1).
      end_step: last step of pruning; the last update up to it reaches `sparsity`
        exactly.
      initial_sparsity: sparsity at the start, in [0, sparsity].
      begin_step: step at which pruning begins.
      interval: steps between mask updates.
      scope: "global": weights compete across layers; "layer": within each, at the
        sparsity that `distribution` gives it (the uniform variant).
      distribution: of the initial masks, and of pruning with scope "layer".
      structure: of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform`.

    Raises:
      ValueError, TypeError: an argument out of range or of the wrong type.

    References:
      Zhu & Gupta, To Prune, or Not to Prune, 2017.
    """
    pruning = gradual(sparsity, initial_sparsity, begin_step, end_step, interval)
    return Method(
        name="gmp",
        sparsity=pruning,
        updates=UpdateSteps(begin_step + interval, end_step, interval),
        distribution=distribution,
        structure=structure,
        scope=scope,
    )


def rigl(
    sparsity: float,
    total_steps: int,
    *,
    interval: int = 100,
    fraction: float = 0.3,
    stop: float = 0.75,
    distribution: Distribution = "erk",
    structure: Structure | None = None,
) -> Method:
    """RigL: constant sparsity, drop by magnitude, regrow by abs(dense gradient).

    Prune fraction r(t) = fraction/2 (1 + cos(pi t / (stop total_steps))), until
    stop * total_steps. The optimizer also steps on update steps (RigL's own code skips
    it there; the GraNet code does not).

    RigL-ITOP (Liu et al. 2021) is this with a larger fraction, to the end of training,
    at longer intervals: `rigl(s, total_steps, interval=1500, fraction=0.5, stop=1.0)`
    (CIFAR: 1000 to 1500; ImageNet: 4000).

    Args:
      sparsity: constant sparsity, in [0, 1).
      total_steps: optimizer steps of the whole training.
      interval: steps between mask updates.
      fraction: prune fraction at the start, in [0, 1].
      stop: share of the training after which masks no longer change, in (0, 1].
      distribution: "uniform", "er", "erk" or a function, of the initial masks.
      structure: of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform`.

    Raises:
      ValueError, TypeError: an argument out of range or of the wrong type.

    References:
      Evci et al., Rigging the Lottery, ICML 2020. Liu et al., Do We Actually Need
      Dense Over-Parameterization?, ICML 2021.
    """
    check_steps("total_steps", total_steps, least=1)
    if not is_number(stop) or not 0.0 < stop <= 1.0:
        raise ValueError(f"stop must be a number in (0, 1], got {got(stop)}.")
    return Method(
        name="rigl",
        **_exchange(
            sparsity, math.floor(stop * total_steps), interval, fraction, distribution
        ),
        structure=structure,
        grow=scores.gradient,
        fraction=schedules.cosine(fraction, 0.0, steps=stop * total_steps),
        needs_gradient=True,
    )


def set_(
    sparsity: float,
    total_steps: int,
    *,
    interval: int = 100,
    fraction: float = 0.3,
    distribution: Distribution = "erk",
    structure: Structure | None = None,
) -> Method:
    """SET: constant sparsity, drop by magnitude, regrow at random; constant fraction.

    Args:
      sparsity: constant sparsity, in [0, 1).
      total_steps: optimizer steps of the whole training.
      interval: steps between mask updates (an epoch in the paper).
      fraction: prune fraction, in [0, 1].
      distribution: "uniform", "er", "erk" or a function, of the initial masks.
      structure: of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform`.

    Raises:
      ValueError, TypeError: an argument out of range or of the wrong type.

    References:
      Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive
      Sparse Connectivity, Nature Communications 2018.
    """
    check_steps("total_steps", total_steps, least=1)
    return Method(
        name="set",
        **_exchange(sparsity, total_steps, interval, fraction, distribution),
        structure=structure,
        grow=scores.random,
        fraction=schedules.constant(fraction),
    )


def snfs(
    sparsity: float,
    total_steps: int,
    *,
    interval: int = 100,
    fraction: float = 0.5,
    decay: float = 0.9,
    distribution: Distribution = "uniform",
    structure: Structure | None = None,
) -> Method:
    """SNFS: regrowth by momentum, with redistribution across layers.

    Drop by magnitude; the weights freed in all layers are redistributed in proportion
    to the mean abs(momentum) of each layer's active weights (those before the drop),
    and regrown there by abs(momentum) among the inactive. The momentum is a moving
    average of the dense gradient kept by this library: m = decay m + (1 - decay) g, in
    at least float32. Prune fraction r(t) = fraction/2 (1 + cos(pi t / total_steps)).

    Args:
      sparsity: constant sparsity, in [0, 1).
      total_steps: optimizer steps of the whole training.
      interval: steps between mask updates (an epoch in the paper).
      fraction: prune fraction at the start, in [0, 1].
      decay: of the moving average, in [0, 1).
      distribution: "uniform", "er", "erk" or a function, of the initial masks.
      structure: of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform`.

    Raises:
      ValueError, TypeError: an argument out of range or of the wrong type.

    References:
      Dettmers & Zettlemoyer, Sparse Networks from Scratch, 2019.
    """
    check_steps("total_steps", total_steps, least=1)
    check_decay("decay", decay)
    return Method(
        name="snfs",
        **_exchange(sparsity, total_steps, interval, fraction, distribution),
        structure=structure,
        grow=scores.momentum,
        fraction=schedules.cosine(fraction, 0.0, steps=total_steps),
        redistribute=True,
        accumulator_decay=decay,
        needs_gradient=True,
    )


def static(
    sparsity: float,
    *,
    distribution: Distribution = "erk",
    structure: Structure | None = None,
) -> Method:
    """A fixed random mask; or the masks given to `transform(masks=...)`.

    Args:
      sparsity: sparsity of the random mask, in [0, 1). Given masks have their own.
      distribution: "uniform", "er", "erk" or a function.
      structure: of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform`.

    Raises:
      ValueError, TypeError: an argument out of range or of the wrong type.

    References:
      Liu et al., The Unreasonable Effectiveness of Random Pruning, ICLR 2022.
    """
    check_sparsity("sparsity", sparsity)
    return Method(
        name="static",
        sparsity=schedules.constant(sparsity),
        distribution=distribution,
        structure=structure,
    )


def gradual(
    final: float, initial: float, begin: int, end: int, interval: int
) -> Schedule:
    """The checked cubic schedule of GraNet, GMP and a cycle of `cyclical`."""
    check_sparsity("sparsity", final)
    check_sparsity("initial_sparsity", initial)
    if initial > final:
        raise ValueError(
            "initial_sparsity must be at most sparsity, got "
            f"initial_sparsity={initial} with sparsity={final}."
        )
    check_steps("begin_step", begin, least=0)
    check_steps("end_step", end, least=1)
    check_steps("interval", interval, least=1)
    if end <= begin:
        raise ValueError(
            f"end_step must be after begin_step, got end_step={end} with "
            f"begin_step={begin}."
        )
    if end - begin < interval:
        raise ValueError(
            f"interval must fit between begin_step and end_step, got "
            f"interval={interval} with begin_step={begin} and end_step={end}: no "
            "update would prune. Take a shorter interval or a later end_step."
        )
    return schedules.cubic(initial, final, begin=begin, end=end, interval=interval)


def _exchange(
    sparsity: float,
    last: int,
    interval: int,
    fraction: float,
    distribution: Distribution,
) -> dict[str, Any]:
    """The checked parts that the methods of constant sparsity share."""
    check_sparsity("sparsity", sparsity)
    check_steps("interval", interval, least=1)
    check_fraction("fraction", fraction)
    if interval > last:
        raise ValueError(
            f"interval must be at most the last step that updates masks ({last}), got "
            f"{interval}: the masks would never change. For fixed masks use static()."
        )
    return {
        "sparsity": schedules.constant(sparsity),
        "updates": schedules.every(interval, last=last),
        "distribution": distribution,
    }
