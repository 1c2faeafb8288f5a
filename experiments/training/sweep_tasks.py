"""Train the runs of a sweep one after the other, in one process or in several."""

import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any, NamedTuple

from etils import epath

from experiments.config.run import Config
from experiments.data import Dataset, Stream, load
from experiments.training import loop
from experiments.training.exit_status import exit_status
from experiments.training.stop_signal import StopSignal
from experiments.training.with_progress import Bar, train_seeds

# Seconds between two looks at the progress of the processes.
_PAUSE = 0.5


class Task(NamedTuple):
    """One run of a sweep.

    Attributes:
      cell: Name of the cell, and of its folder.
      config: The configuration of the cell.
      seeds: The seeds that train as one program.
    """

    cell: str
    config: Config
    seeds: range


OnEnd = Callable[[str, str | None], None]
"""Called after a run with the name of its cell, and with a message if it diverged."""


def train_tasks(
    tasks: Iterable[Task],
    dataset: Dataset | Stream,
    out: epath.Path,
    bar: Bar,
    stopped: Callable[[int], int | None],
    on_end: OnEnd,
) -> None:
    """Train runs one after the other in this process.

    Raises:
      loop.StoppedError: `stopped` returned a signal. A checkpoint exists.
    """
    setups: dict[tuple[str, int], loop.TrainSetup] = {}
    for cell, config, seeds in tasks:
        lanes = len(seeds)
        if (cell, lanes) not in setups:
            setups.clear()  # Cells come one after the other.
            config = dataclasses.replace(
                config, seed=seeds[0], seeds=lanes, vmap_seeds=lanes > 1
            )
            setups[cell, lanes] = loop.create(config, dataset)
        diverged = None
        try:
            train_seeds(setups[cell, lanes], seeds, out / cell, bar, stopped)
        except loop.DivergedError as error:
            diverged = str(error)
        on_end(cell, diverged)


class _Shared(NamedTuple):
    """What the processes share: counters, and the messages of runs that ended."""

    claimed: Any
    steps: Any
    ended: Any


def train_in_processes(
    jobs: int,
    tasks: Sequence[Task],
    out: epath.Path,
    bar: Bar,
    stopped: Callable[[int], int | None],
    on_end: OnEnd,
) -> None:
    """Train runs in several processes, each of which has its share of the cores.

    Raises:
      loop.StoppedError: `stopped` returned a signal. Checkpoints exist.
      OSError: A process failed; it has printed the reason.
    """
    context = multiprocessing.get_context("spawn")
    shared = _Shared(context.Value("q"), context.Value("q"), context.SimpleQueue())
    cores = sorted(os.sched_getaffinity(0))
    workers = [
        context.Process(target=_work, args=(cores[i::jobs], tasks, out, shared))
        for i in range(min(jobs, len(tasks)))
    ]
    for worker in workers:
        worker.start()
    shown, told, running = 0, False, workers
    while running:
        wait([worker.sentinel for worker in running], _PAUSE)
        running = [worker for worker in workers if worker.is_alive()]
        bar.update(shared.steps.value - shown)
        shown = shared.steps.value
        while not shared.ended.empty():
            on_end(*shared.ended.get())
        has_failed = any(worker.exitcode for worker in workers)
        if not told and (has_failed or stopped(0) is not None):
            told = True
            for worker in running:
                worker.terminate()
    if any(worker.exitcode for worker in workers):
        received = stopped(0)
        if received is not None:
            raise loop.StoppedError(shown, received)
        raise OSError(
            "a process that trained runs of the sweep has failed, see above. The same "
            f"command with --out {out} continues."
        )


def _work(
    cores: Sequence[int], tasks: Sequence[Task], out: epath.Path, shared: _Shared
) -> None:
    """Train unclaimed runs until there are none. This is a process of its own."""
    # JAX counts the cores when it starts, so this comes first.
    os.sched_setaffinity(0, cores)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def claimed() -> Iterator[Task]:
        while True:
            with shared.claimed.get_lock():
                number = shared.claimed.value
                shared.claimed.value += 1
            if number >= len(tasks):
                return
            yield tasks[number]

    def train() -> None:
        data = tasks[0].config.data
        dataset = load(data.dataset, data.data_dir)
        with StopSignal() as stop:
            train_tasks(
                claimed(),
                dataset,
                out,
                _SharedBar(shared.steps),
                stop.reached,
                lambda *end: shared.ended.put(end),
            )

    raise SystemExit(exit_status(train))


class _SharedBar:
    """Adds the steps of this process to those of the others."""

    def __init__(self, steps: Any) -> None:
        """Count in `steps`, an integer that the processes share."""
        self.steps = steps

    def update(self, n: int, /) -> None:
        """Count more steps."""
        with self.steps.get_lock():
            self.steps.value += n

    def set_description(self, desc: str, /, refresh: bool) -> None:
        """Show nothing: the bar is that of several runs."""

    def set_postfix(self, ordered_dict: Mapping[str, str], /, refresh: bool) -> None:
        """Show nothing: the bar is that of several runs."""


def _end_with_parent() -> None:
    """Stop this process, with a checkpoint, if the one that started it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
    os._exit(1)
