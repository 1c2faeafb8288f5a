"""Several processes that train together."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.config.run import DistributedConfig

T = TypeVar("T")


def initialize(config: DistributedConfig) -> None:
    """Connect this process to the others. Call it before anything else uses JAX.

    Raises:
      ValueError: Some of coordinator, processes and process are missing or invalid.
    """
    explicit = (config.coordinator, config.processes, config.process)
    if config.auto:
        if any(x is not None for x in explicit):
            raise ValueError(
                "distributed.auto finds coordinator, processes and process by itself: "
                "give it or them, not both."
            )
        jax.distributed.initialize()
        return
    if all(x is None for x in explicit):
        return
    if config.coordinator is None or config.processes is None or config.process is None:
        raise ValueError(
            "distributed.coordinator, distributed.processes and distributed.process go "
            f"together, got {config.coordinator}, {config.processes} and "
            f"{config.process}."
        )
    if not 0 <= config.process < config.processes:
        raise ValueError(
            f"distributed.process must lie in [0, {config.processes}), got "
            f"{config.process}."
        )
    jax.distributed.initialize(
        config.coordinator, num_processes=config.processes, process_id=config.process
    )


def in_all(prepare: Callable[[], T]) -> T:
    """Call `prepare` in all processes and return its result.

    If it fails in one process, all processes stop instead of waiting for that process.

    Raises:
      ValueError, OSError: `prepare` failed here, or in another process, which reports
        the reason.
    """
    if jax.process_count() == 1:
        return prepare()
    try:
        result = prepare()
    except (ValueError, OSError):
        _failed_processes(True)
        raise
    if failed := _failed_processes(False):
        raise ValueError(f"process {failed[0]} cannot start: see its message.")
    return result


def _failed_processes(failed: bool) -> list[int]:
    """Return the numbers of the failed processes. All processes must call this."""
    gathered = multihost_utils.process_allgather(np.asarray(failed))
    return np.flatnonzero(gathered).tolist()


def is_first() -> bool:
    """Return whether this process is the one that writes and prints."""
    return jax.process_index() == 0
