"""Perplexity of the language model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from experiments.language import smollm2


def perplexity(
    params: dict[str, Any],
    windows: np.ndarray,
    batch_size: int = 2,
    *,
    progress: bool = False,
) -> float:
    """Return exp of the mean cross-entropy of the next token.

    Every window starts without context, and its first token is not predicted. The
    logits of one batch are in memory at a time: batch_size * length * 0.2 MB.

    Args:
      params: Parameters of the network.
      windows: Tokens (n, length).
      batch_size: Number of windows in a compiled step.
      progress: Whether to show a progress bar.

    Raises:
      ValueError: `windows` has another shape, or `batch_size` is less than 1.
    """
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 2:
        raise ValueError(
            "windows must have the shape (n, length), with n at least 1 and length at "
            f"least 2, got {windows.shape}."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    losses: list[np.ndarray] = []
    for start in tqdm.trange(0, len(windows), batch_size, disable=not progress):
        # The last batch has as many rows as the others, so nothing compiles twice.
        rows = np.arange(start, start + batch_size)
        loss = _losses(params, windows[rows % len(windows)])
        losses.append(np.asarray(loss, np.float64)[rows < len(windows)])
    return float(np.exp(np.concatenate(losses).mean()))


def _losses(params: dict[str, Any], tokens: np.ndarray) -> jax.Array:
    """Return the mean cross-entropy (n,) of each window (n, length)."""
    hidden = smollm2.embed(params, jnp.asarray(tokens[:, :-1]))
    for name in smollm2.layer_names():
        hidden = _block(params[name], hidden)
    return _losses_of_head(params["norm"], params["embedding"], hidden, tokens[:, 1:])


# All layers share a program, which compiles much faster than the whole network.
_block = jax.jit(smollm2.block)


@jax.jit
def _losses_of_head(
    norm: dict[str, Any], embedding: dict[str, Any], hidden: Any, targets: Any
) -> jax.Array:
    logits = smollm2.head({"norm": norm, "embedding": embedding}, hidden)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.mean(losses, axis=1)
