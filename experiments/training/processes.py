"""Several processes as one run."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.config.run import DistributedConfig

T = TypeVar("T")


def initialize(config: DistributedConfig) -> None:
    """Connects this process to the others; before anything else uses JAX.

    Raises:
      ValueError: an address without numbers, or numbers without an address.
    """
    given = (config.coordinator, config.processes, config.process)
    if config.auto:
        if any(x is not None for x in given):
            raise ValueError(
                "distributed.auto finds coordinator, processes and process by itself: "
                "give it or them, not both."
            )
        jax.distributed.initialize()
        return
    if all(x is None for x in given):
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
    """The result of `prepare`, once it is there in all processes.

    Raises:
      ValueError, OSError: `prepare` did so here, or in another process, which says why;
        without this the others would wait for that one in vain.
    """
    if jax.process_count() == 1:
        return prepare()
    try:
        result = prepare()
    except (ValueError, OSError):
        _failed(True)
        raise
    if failed := _failed(False):
        raise ValueError(f"process {failed[0]} cannot start: see its message.")
    return result


def _failed(here: bool) -> list[int]:
    """Numbers of the processes that say they failed; asked in all of them."""
    return np.flatnonzero(multihost_utils.process_allgather(np.asarray(here))).tolist()


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0
