"""The optimizer of a configuration and its learning rate schedule."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from experiments.config.run import OptimizerConfig

PyTree = Any


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the number of completed steps.

    During the warm-up the schedule is multiplied by a factor that rises linearly to 1.
    The warm-up does not shift the schedule, which always ends with the last step.
    """
    schedule = _schedule(config, steps)
    if not config.warmup_steps:
        return schedule

    def with_warmup(count: ArrayLike) -> ArrayLike:
        factor = (jnp.asarray(count, jnp.float32) + 1) / (config.warmup_steps + 1)
        return schedule(count) * jnp.minimum(1.0, factor)

    return with_warmup


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
            # Rounding every boundary makes the cycles fill the steps exactly.
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
    config: OptimizerConfig, schedule: optax.Schedule, decay_mask: Any
) -> optax.GradientTransformation:
    """Return the optimizer without masks.

    Args:
      config: Options of the optimizer.
      schedule: Learning rate.
      decay_mask: Pytree of bools with the structure of the parameters, or a function
        from the parameters to it: which parameters have weight decay.
    """
    if config.name == "adamw":
        return optax.adamw(
            schedule,
            b1=config.momentum,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        )
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.sgd(schedule, momentum=config.momentum, nesterov=config.nesterov),
    )


def decay_mask(params: PyTree, maskable: Any) -> PyTree:
    """Return which parameters have weight decay: the maskable parameters."""

    def decays(path: Any, leaf: Any) -> bool:
        return bool(
            maskable(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        )

    return jax.tree_util.tree_map_with_path(decays, params)
