"""Exit statuses and error messages of the commands."""

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

from experiments.training import loop


def exit_status(command: Callable[[], object]) -> int:
    """Run a command and print its error, if any, to standard error.

    Returns:
      0 after success, 1 if training diverged, 2 after bad input, 130 or 143 if SIGINT
      or SIGTERM (or the preemption of a pod) stopped the command.
    """
    _silence_libraries()
    try:
        command()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except loop.DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except loop.StoppedError as error:
        notes = getattr(error, "__notes__", ())
        print("\n".join([str(error), *notes]), file=sys.stderr)
        return 128 + error.signal
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


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
