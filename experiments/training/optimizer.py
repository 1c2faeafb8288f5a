"""The optimizer of a configuration, and its learning rate over the steps."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from experiments.config.run import OptimizerConfig

PyTree = Any


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate as a function of the steps done.

    The warm-up goes in a line to the value at its end, the first step taking the first
    part of it, and the schedule runs underneath: it ends with the last step whatever
    the warm-up.
    """
    schedule = _schedule(config, steps)
    if not config.warmup_steps:
        return schedule

    def warmed(count: ArrayLike) -> ArrayLike:
        share = (jnp.asarray(count, jnp.float32) + 1) / (config.warmup_steps + 1)
        return schedule(count) * jnp.minimum(1.0, share)

    return warmed


def _schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    match config.schedule:
        case "drops":
            factors: dict[int, float] = {}
            for share in config.drops:
                step = int(steps * share)
                factors[step] = 0.1 * factors.get(step, 1.0)
            return optax.piecewise_constant_schedule(config.learning_rate, factors)
        case "cosine":
            return optax.cosine_decay_schedule(config.learning_rate, steps)
        case "cyclic":
            # Boundaries to the step, so that the cycles fill the steps exactly.
            ends = [steps * i // config.cycles for i in range(config.cycles + 1)]
            lengths = [max(1, b - a) for a, b in itertools.pairwise(ends)]
            return optax.join_schedules(
                [
                    optax.cosine_decay_schedule(config.learning_rate, length)
                    for length in lengths
                ],
                ends[1:-1],
            )
        case "constant":
            return optax.constant_schedule(config.learning_rate)


def create(
    config: OptimizerConfig, schedule: optax.Schedule, decayed: PyTree
) -> optax.GradientTransformation:
    """The optimizer that the masks are put around.

    Args:
      config: see there.
      schedule: learning rate.
      decayed: pytree of bools, in the structure of the parameters: which ones decay.
    """
    if config.name == "adamw":
        return optax.adamw(
            schedule,
            b1=config.momentum,
            weight_decay=config.weight_decay,
            mask=decayed,
        )
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.sgd(schedule, momentum=config.momentum, nesterov=config.nesterov),
    )


def decay_mask(params: PyTree, maskable: Any) -> PyTree:
    """Which parameters decay: those that may carry a mask, by `maskable`."""

    def decays(path: Any, leaf: Any) -> bool:
        return bool(
            maskable(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        )

    return jax.tree_util.tree_map_with_path(decays, params)
