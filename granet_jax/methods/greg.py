"""GReg: a growing penalty removes weights gently (Wang et al. 2021).

A fixed share s of the weights gets the penalty lambda(t)/2 w^2, whose coefficient grows
in steps: lambda(t) = delta (floor(t / K) + 1), until it exceeds a ceiling. After some
more steps these weights are pruned. GReg-1 takes the weights of smallest magnitude at
the start. GReg-2 first lets a small penalty grow on all weights, and takes the weights
of smallest magnitude after that.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import Array

from granet_jax import penalties
from granet_jax.checks import check_number, check_sparsity, check_steps
from granet_jax.distributions import Distribution
from granet_jax.methods.arguments import Jump
from granet_jax.methods.method import Method
from granet_jax.penalties import Penalty, PenaltyInputs
from granet_jax.phases import Prune
from granet_jax.schedules import NEVER, UpdateSteps
from granet_jax.scores import ScoreInputs
from granet_jax.selection import Scope
from granet_jax.structures import Structure


def greg1(
    sparsity: float,
    *,
    interval: int = 10,
    growth: float = 1e-4,
    ceiling: float = 1.0,
    settle_steps: int = 10_000,
    scope: Scope = "layer",
    distribution: Distribution = "uniform",
    structure: Structure | None = None,
) -> Method:
    """GReg-1: a growing penalty on weights chosen at the start, then their removal.

    Start from the weights of a trained network. The weights of smallest magnitude at
    init get an L2 penalty, which is `growth` in the first step and grows by `growth`
    every `interval` steps until it exceeds `ceiling`. It stays there for `settle_steps`
    more steps. Then these weights are pruned, at step `method.updates.last`. The rest
    of the training is fine-tuning.

    Args:
      sparsity: Final sparsity: the share of weights that are removed, in [0, 1).
      interval: Steps between increases (K_u in the paper: 10 for CIFAR, 5 for
        ImageNet).
      growth: Increase of the penalty.
      ceiling: Value above which the penalty stops growing.
      settle_steps: Steps from the last increase to the pruning (K_s in the paper:
        10,000 for CIFAR, 40,000 for ImageNet).
      scope: "layer": weights compete within each layer, at the sparsity that
        `distribution` gives it. "global": they compete across layers.
      distribution: Distribution of the sparsity over layers, for scope "layer".
      structure: Structure of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform(method, inner)`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong type.

    References:
      Wang et al., Neural Pruning via Growing Regularization, ICLR 2021; code:
      MingSun-Tse/Regularization-Pruning. (The code ends the increases layer by layer,
      which gives the same numbers for single weights.)
    """
    increases = _increases(interval, growth, ceiling, settle_steps)
    last = increases * interval
    return _growing(
        "greg1",
        sparsity,
        prune_step=last + settle_steps,
        scope=scope,
        distribution=distribution,
        structure=structure,
        parts=(penalties.growing(interval=interval, step=growth, first=0, last=last),),
        pick=None,
    )


def greg2(
    sparsity: float,
    *,
    interval: int = 10,
    growth: float = 1e-4,
    ceiling: float = 1.0,
    settle_steps: int = 10_000,
    pick_growth: float = 1e-5,
    pick_ceiling: float = 1e-2,
    weight_decay: float = 0.0,
    scope: Scope = "layer",
    distribution: Distribution = "uniform",
    structure: Structure | None = None,
) -> Method:
    """GReg-2: a small penalty on all weights picks those that GReg-1 then removes.

    The penalty of all weights grows by `pick_growth` every `interval` steps until it
    reaches `pick_ceiling`. This separates the weights by the curvature of the loss.
    Then the weights of smallest magnitude are picked, and their penalty grows by
    `growth` as in `greg1`. The penalty of the other weights becomes `-weight_decay`,
    which cancels the weight decay of the optimizer.

    Args:
      sparsity: Final sparsity: the share of weights that are removed, in [0, 1).
      interval: Steps between increases.
      growth: Increase of the penalty of the picked weights.
      ceiling: Value above which the penalty of the picked weights stops growing.
      settle_steps: Steps from the last increase to the pruning.
      pick_growth: Increase of the penalty of all weights.
      pick_ceiling: Penalty of all weights at which the weights are picked.
      weight_decay: Coupled weight decay of `inner`, which the penalty cancels at the
        weights that are not picked (1e-4 in the authors' code).
      scope: "layer": weights compete within each layer, at the sparsity that
        `distribution` gives it. "global": they compete across layers.
      distribution: Distribution of the sparsity over layers, for scope "layer".
      structure: Structure of the masks, one of `structures`; None for single weights.

    Returns:
      A record for `transform(method, inner)`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong type.

    References:
      Wang et al., Neural Pruning via Growing Regularization, ICLR 2021; code:
      MingSun-Tse/Regularization-Pruning.
    """
    check_number("pick_growth", pick_growth, above=0.0)
    check_number("pick_ceiling", pick_ceiling, least=pick_growth)
    check_number("weight_decay", weight_decay, least=0.0)
    check_number("ceiling", ceiling, above=pick_ceiling)
    increases = _increases(interval, growth, ceiling - pick_ceiling, settle_steps)
    pick = interval * math.ceil(pick_ceiling / pick_growth - 1e-6)
    last = pick + increases * interval
    before = penalties.picking(interval=interval, step=pick_growth, last=pick)
    after = penalties.growing(
        interval=interval,
        step=growth,
        first=pick,
        last=last,
        start=pick_ceiling,
        kept=-weight_decay,
    )
    return _growing(
        "greg2",
        sparsity,
        prune_step=last + settle_steps,
        scope=scope,
        distribution=distribution,
        structure=structure,
        parts=(before, after),
        pick=pick,
    )


def _increases(interval: int, growth: float, ceiling: float, settle_steps: int) -> int:
    """Count the increases until the penalty exceeds `ceiling`; check the arguments."""
    check_steps("interval", interval)
    check_steps("settle_steps", settle_steps, least=0)
    check_number("growth", growth, above=0.0)
    check_number("ceiling", ceiling, above=0.0)
    return math.floor(ceiling / growth + 1e-6) + 1


def _growing(
    name: str,
    sparsity: float,
    *,
    prune_step: int,
    scope: Scope,
    distribution: Distribution,
    structure: Structure | None,
    parts: tuple[Penalty, ...],
    pick: int | None,
) -> Method:
    check_sparsity("sparsity", sparsity)
    check_steps("the step of the pruning", prune_step)
    return Method(
        name=name,
        sparsity=Jump(0.0, sparsity, prune_step),
        updates=UpdateSteps(prune_step, prune_step, prune_step),
        distribution=distribution,
        structure=structure,
        scope=scope,
        phases=(Prune(_marked_first),),
        marked_sparsity=sparsity,
        marks=NEVER if pick is None else UpdateSteps(pick, pick, pick),
        # After the pruning, fine-tuning has no penalty.
        penalty=_SumUntil(prune_step, parts),
    )


@dataclasses.dataclass(frozen=True)
class _SumUntil:
    step: int
    parts: tuple[Penalty, ...]

    def __call__(self, inputs: PenaltyInputs) -> Array:
        size = sum(jnp.asarray(part(inputs)) for part in self.parts)
        return jnp.where(inputs.count < self.step, size, 0.0)


def _marked_first(inputs: ScoreInputs) -> Array:
    """Magnitude, but infinite at marked weights, which are the weights to keep."""
    size = jnp.abs(inputs.param)
    return size if inputs.marked is None else jnp.where(inputs.marked, jnp.inf, size)
