"""Trains the pruned language model on, with fixed masks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

import granet_jax
from experiments.language import smollm2


def finetune(
    params: dict[str, Any],
    masks: dict[str, Any],
    windows: np.ndarray,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    progress: bool,
) -> dict[str, Any]:
    """Return the parameters after training; pruned weights stay zero.

    The optimizer is AdamW, with a learning rate that rises over the first tenth of the
    steps and falls to zero in a cosine. Embedding and norms train too.

    Args:
      params: Parameters of the network, zero where the masks prune.
      masks: Masks of the layers.
      windows: Tokens (n, length), which are used in their order, from the start again
        if they do not suffice.
      steps: Number of steps.
      batch_size: Windows of a step.
      learning_rate: The highest learning rate.
      progress: Whether to show a progress bar.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, steps // 10), steps
    )
    tx = granet_jax.transform(
        granet_jax.static(0.0),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95)),
        masks=masks,
    )

    def loss(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
        logits = smollm2.apply(params, tokens[:, :-1])
        return jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        )

    @jax.jit
    def step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    with tqdm.trange(steps, unit="step", disable=not progress) as bar:
        for i in bar:
            rows = np.arange(i * batch_size, (i + 1) * batch_size) % len(windows)
            params, state, value = step(params, state, windows[rows])
            bar.set_postfix(loss=f"{value:.3f}", refresh=False)
    return params
