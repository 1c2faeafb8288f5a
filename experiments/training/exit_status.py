"""Exit statuses and error messages of the commands."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax

from experiments.training import loop
from experiments.training.checkpoints import CheckpointError


def exit_status(command: Callable[[], object]) -> int:
    """Run a command and print its error, if any, to standard error.

    Returns:
      0 after success, 1 if training diverged, 2 after bad input, 3 if the connection
      to other processes broke, 130 or 143 if SIGINT or SIGTERM (or the preemption of a
      pod) stopped the command.
    """
    _silence_libraries()
    try:
        command()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _leave(2) if isinstance(error, CheckpointError) else 2
    except loop.DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except loop.StoppedError as error:
        notes = getattr(error, "__notes__", ())
        print("\n".join([str(error), *notes]), file=sys.stderr)
        return 128 + error.signal
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).strip().partition("\n")[0]
        print(
            "error: the connection to the other processes broke, probably because one "
            "of them ended. Run the same command again in all processes: it goes on "
            f"from the last checkpoint. ({reason})",
            file=sys.stderr,
        )
        return _leave(3)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _leave(status: int) -> int:
    """Return the status, or end now if JAX would wait for a process that has ended."""
    if jax.process_count() > 1:
        sys.stderr.flush()
        os._exit(status)
    return status


def _silence_libraries() -> None:
    """Hide library tracebacks of errors that this process raises and reports itself."""
    # Orbax logs its errors. If several of its writes fail, asyncio logs all but one.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    # If orbax cannot read or write one array, it stops immediately, and the unfinished
    # operations on the other arrays report to this hook.
    expected = ("Event loop is closed", "Encountered error while reading array index")
    previous_hook = sys.unraisablehook

    def print_unexpected(unraisable: Any) -> None:
        if not str(unraisable.exc_value).startswith(expected):
            previous_hook(unraisable)

    sys.unraisablehook = print_unexpected
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
