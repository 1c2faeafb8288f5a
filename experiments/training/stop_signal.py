"""Signals that ask a training run to stop after the current step."""

import signal
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Turns SIGTERM and SIGINT into a request to stop at the next step.

    A second signal has its usual effect. If several processes train together, JAX's
    preemption service handles SIGTERM and makes all processes stop at the same step,
    while SIGINT ends a process at once.
    """

    def __init__(self) -> None:
        """Start without a signal."""
        self.received: int | None = None
        self._queries = 0
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def reached(self, step: int) -> int | None:
        """Return the signal if training must stop before `step`, else None.

        All processes get the same answer.
        """
        if jax.process_count() > 1:
            # JAX's sync points are numbers that only increase. The step cannot be used:
            # it starts again with every seed, and a scan skips some steps.
            self._queries += 1
            if multihost_utils.reached_preemption_sync_point(self._queries):
                self.received = signal.SIGTERM
        return self.received

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._previous_handlers[number])
