"""Train methods x sparsities x seeds: `python -m experiments.sweep FILE.toml`."""

import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import tqdm
import tyro
from etils import epath

from experiments.buckets import check_folder, check_reachable
from experiments.config.run import Config, check_same
from experiments.config.sweep import Sweep, read
from experiments.data import Dataset, Stream, load
from experiments.reports import sweep as sweep_report
from experiments.reports import training as training_report
from experiments.training import devices, loop
from experiments.training.atomic_files import read_json, write_json
from experiments.training.checkpoints import is_complete
from experiments.training.exit_status import exit_status
from experiments.training.metrics import Log
from experiments.training.run_folders import DEFAULT_FOLDER, run_name, seeds_of
from experiments.training.stop_signal import StopSignal
from experiments.training.sweep_tasks import Task, train_in_processes, train_tasks


def run(
    sweep: Sweep, out: epath.Path, *, jobs: int = 1, progress: bool = True
) -> dict[str, training_report.MethodRuns]:
    """Train all unfinished cells of a sweep and write the results to `out`.

    Args:
      sweep: The sweep.
      out: Folder of the sweep.
      jobs: Number of processes that train at the same time.
      progress: Whether to show a progress bar.

    Returns:
      The metrics of every cell, by its name, without seeds that diverged.

    Raises:
      ValueError: A configuration is invalid, or differs from the cell in the folder, or
        this machine does not have the cores for `jobs`.
      OSError: A folder has other files or cannot be written, or the data are missing
        or unreadable.
      loop.DivergedError: A loss was no longer finite. All other cells are trained.
      loop.StoppedError: SIGTERM or SIGINT arrived. Checkpoints are kept.
    """
    _check_jobs(jobs)
    check_folder("out", out)
    settings = open_folder(sweep, out)
    unfinished = {
        name: config
        for name, config in sweep.cells.items()
        if missing(sweep.seeds, finished_groups(config, out / name))
    }
    diverged: dict[str, str] = {}
    if unfinished:
        with StopSignal() as stop:
            dataset = load(sweep.first.data.dataset, sweep.first.data.data_dir)
            # Report every invalid configuration before training starts.
            for name, config in unfinished.items():
                try:
                    devices.compile_step(config, dataset)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
            vmap_seeds = _choose_vmap_seeds(sweep, settings, dataset, out)
            tasks = _tasks(unfinished, out, vmap_seeds)
            diverged = _train(sweep, tasks, dataset, out, jobs, stop.reached, progress)
    runs = write_results(sweep, out, diverged)
    print((out / "results.md").read_text())
    print(f"Results in {out}")
    if diverged:
        name, error = next(iter(diverged.items()))
        raise loop.DivergedError(f"{name}: {error}")
    return runs


def _train(
    sweep: Sweep,
    tasks: Sequence[Task],
    dataset: Dataset | Stream,
    out: epath.Path,
    jobs: int,
    stopped: Callable[[int], int | None],
    progress: bool,
) -> dict[str, str]:
    """Train runs, and write the results after each.

    Returns:
      The error messages of the cells that diverged, by the names of the cells.
    """
    diverged: dict[str, str] = {}
    with tqdm.tqdm(
        total=sum(task.config.steps for task in tasks),
        unit="step",
        disable=not progress,
        dynamic_ncols=True,
    ) as bar:

        def end(cell: str, message: str | None) -> None:
            if message is not None:
                diverged[cell] = message
                bar.write(f"{cell}: {message}", file=sys.stderr)
            runs = write_results(sweep, out, diverged)
            if cell in runs:
                accuracy = sweep_report.cell([r.test_accuracy for r in runs[cell].last])
                bar.write(f"{cell}: {accuracy} %", file=sys.stdout)

        try:
            if jobs == 1:
                train_tasks(tasks, dataset, out, bar, stopped, end)
            else:
                train_in_processes(jobs, tasks, out, bar, stopped, end)
        except loop.StoppedError as error:
            error.add_note(f"Go on with the same command and --out {out}")
            raise
    return diverged


def _check_jobs(jobs: int) -> None:
    """Raise ValueError unless this many processes can train at once."""
    if jobs == 1:
        return
    if jax.default_backend() != "cpu":
        raise ValueError(
            f"jobs must be 1 on {jax.default_backend()}, whose devices one process "
            f"holds, got {jobs}."
        )
    if not hasattr(os, "sched_getaffinity"):
        raise ValueError(
            f"jobs must be 1 on {sys.platform}, which gives no process its own cores, "
            f"got {jobs}."
        )
    cores = len(os.sched_getaffinity(0))
    if not 1 <= jobs <= cores:
        raise ValueError(f"jobs must lie in 1 to {cores}, the cores, got {jobs}.")


def _tasks(
    unfinished: Mapping[str, Config], out: epath.Path, vmap_seeds: bool
) -> list[Task]:
    """The runs that are missing; notes their options in the folders of their cells."""
    tasks = []
    for name, config in unfinished.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        config = dataclasses.replace(config, vmap_seeds=vmap_seeds)
        write_json(out / name / "config.json", config.to_dict())
        seed_groups = groups(config, out / name, vmap_seeds)
        tasks += [Task(name, config, seeds) for seeds in seed_groups]
    return tasks


def open_folder(sweep: Sweep, out: epath.Path) -> dict[str, Any]:
    """Create the folder of a sweep, or check that it belongs to this sweep.

    Returns:
      The choices made in an earlier run: "vmap_seeds", if it was chosen.

    Raises:
      FileExistsError: The folder contains other files.
      ValueError: A cell in the folder has another configuration.
    """
    check_reachable("out", out)
    path = out / "sweep.json"
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(
                f"out: {out} already exists, and it is neither empty nor the folder of "
                "a sweep. Results are never overwritten: choose another folder."
            )
        out.mkdir(parents=True, exist_ok=True)
        settings = {}
        if sweep.vmap_seeds is not None:
            settings["vmap_seeds"] = sweep.vmap_seeds
        write_json(path, settings)
    settings = read_json(path)
    for name, config in sweep.cells.items():
        path = out / name / "config.json"
        if not path.exists():
            continue
        expected = config.to_dict()
        if sweep.vmap_seeds is None:
            expected["vmap_seeds"] = settings.get("vmap_seeds", False)
        check_same(
            read_json(path),
            expected,
            holder=f"{out} holds {name}",
            this="this sweep (to which methods, sparsities and seeds may be added)",
        )
    return settings


def _choose_vmap_seeds(
    sweep: Sweep,
    settings: dict[str, Any],
    dataset: Dataset | Stream,
    out: epath.Path,
) -> bool:
    """Return whether to train all seeds of a cell at once; measured once per sweep."""
    if sweep.vmap_seeds is not None:
        return sweep.vmap_seeds
    if "vmap_seeds" in settings:
        return settings["vmap_seeds"]
    possible = (
        sweep.seeds > 1
        and len(jax.devices()) == 1
        and not isinstance(dataset, Stream)
        and all(cell.optimizer.accumulate == 1 for cell in sweep.cells.values())
    )
    settings = {"vmap_seeds": False}
    if possible:
        # Measure the last cell. The first one is usually dense, which gains more from
        # vmap than sparse training.
        plain, mapped = seconds_per_step([*sweep.cells.values()][-1], dataset)
        settings = {
            "vmap_seeds": mapped < plain,
            "milliseconds_per_step_and_seed": {
                "plain": round(1000 * plain, 3),
                "vmap_seeds": round(1000 * mapped, 3),
            },
        }
        choice = "all seeds at once" if mapped < plain else "one seed after the other"
        print(
            f"One step takes {1000 * plain:.2f} ms, and with all seeds at once "
            f"{1000 * mapped:.2f} ms a seed: {choice}.",
            flush=True,
        )
    write_json(out / "sweep.json", settings)
    return settings["vmap_seeds"]


def seconds_per_step(
    config: Config, dataset: Dataset | Stream, rounds: int = 3
) -> tuple[float, float]:
    """Measure a training step's time per seed, one seed at a time and all at once.

    The two alternate for `rounds` rounds of up to 50 steps or one second, and the best
    round of each counts.
    """
    seeds = range(config.seed, config.seed + config.seeds)
    timings: list[list[float]] = [[], []]
    contenders = []
    for vmap_seeds in (False, True):
        setup = loop.create(dataclasses.replace(config, vmap_seeds=vmap_seeds), dataset)
        state = setup.compiled_step.create(seeds[: setup.compiled_step.lanes])
        contenders.append([setup, state])
    for i in range(rounds + 1):
        for contender, seconds in zip(contenders, timings, strict=True):
            setup, state = contender
            steps, start = 0, time.perf_counter()
            while steps < 2 or (
                i > 0 and steps < 50 and time.perf_counter() - start < 1
            ):
                state, losses = setup.compiled_step.steps(
                    state, setup.train_data, config.scan_block
                )
                jax.block_until_ready(losses)
                steps += 1
            elapsed = time.perf_counter() - start
            contender[1] = state
            # The first round includes compilation.
            if i > 0:
                number = steps * config.scan_block * setup.compiled_step.lanes
                seconds.append(elapsed / number)
    return min(timings[0]), min(timings[1])


def groups(config: Config, folder: epath.Path, vmap_seeds: bool) -> list[range]:
    """Return the groups of seeds to train, beginning with the groups already started.

    A started group keeps its seeds. Seeds added since then form new groups.
    """
    started = _started(config, folder)
    new = missing(config.seeds, started)
    result = [seeds for seeds in started if not _is_finished(config, folder, seeds)]
    if not vmap_seeds:
        return result + [range(seed, seed + 1) for seed in new]
    while new:
        length = next((i for i, seed in enumerate(new) if seed != new[0] + i), len(new))
        result.append(range(new[0], new[0] + length))
        new = new[length:]
    return result


def finished_groups(config: Config, folder: epath.Path) -> list[range]:
    """Return the groups of seeds that are trained to the end, one group per folder."""
    return [
        seeds
        for seeds in _started(config, folder)
        if _is_finished(config, folder, seeds)
    ]


def missing(seeds: int, groups: Sequence[range]) -> list[int]:
    """Return the seeds from 0 to `seeds` - 1 that are in no group."""
    return [seed for seed in range(seeds) if not any(seed in group for group in groups)]


def _started(config: Config, folder: epath.Path) -> list[range]:
    """Return the groups of seeds in the folder of a cell."""
    found = [seeds_of(path, config.method) for path in folder.glob("*")]
    started = [seeds for seeds in found if seeds and seeds[0] < config.seeds]
    return sorted(started, key=lambda seeds: seeds[0])


def _is_finished(config: Config, folder: epath.Path, seeds: range) -> bool:
    if not is_complete(folder / run_name(config.method, seeds), config.steps):
        return False
    records = _records(config, folder, seeds)
    return all(lane and lane[-1].step == config.steps for lane in records)


def _records(
    config: Config, folder: epath.Path, seeds: range
) -> list[list[training_report.MetricsRecord]]:
    log = Log(
        folder / run_name(config.method, seeds),
        config.method,
        seeds,
        writes=False,
    )
    log.resume(config.steps)
    return log.records


def write_results(
    sweep: Sweep, out: epath.Path, diverged: Mapping[str, str]
) -> dict[str, training_report.MethodRuns]:
    """Write results.md, results.json and accuracy.png from the finished seeds.

    Args:
      sweep: The sweep.
      out: Folder of the sweep.
      diverged: Error messages of the cells that diverged.

    Returns:
      The metrics of every cell with finished seeds.
    """
    runs = {}
    for name, config in sweep.cells.items():
        records = {
            seed: tuple(lane)
            for group in finished_groups(config, out / name)
            for seed, lane in zip(
                group, _records(config, out / name, group), strict=True
            )
            if seed < sweep.seeds
        }
        if records:
            seeds = tuple(sorted(records))
            runs[name] = training_report.MethodRuns(
                config.method, seeds, tuple(records[seed] for seed in seeds)
            )
    sweep_report.write(sweep, runs, diverged, training_report.environment(), out)
    return runs


def _command(
    file: tyro.conf.Positional[pathlib.Path],
    out: epath.Path | None = None,
    jobs: int = 1,
    progress: bool = True,
) -> None:
    """Trains methods x sparsities x seeds, as described in a file.

    The same command continues where it stopped. It writes results.md, results.json and
    accuracy.png after every run.

    Args:
        file: The sweep, as TOML; examples are in experiments/sweeps.
        out: Folder for the results; by default runs/NAME for NAME.toml.
        jobs: Number of runs that train at the same time, each in a process with its
            share of the cores. Only on Linux, and only on CPUs.
        progress: Whether to show a progress bar.
    """
    folder = DEFAULT_FOLDER / file.stem if out is None else out
    run(read(file), folder, jobs=jobs, progress=progress)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    return exit_status(
        lambda: tyro.cli(_command, args=arguments, prog="python -m experiments.sweep")
    )


if __name__ == "__main__":
    sys.exit(main())
