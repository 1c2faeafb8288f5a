"""Trains methods x sparsities x seeds: `python -m experiments.sweep FILE.toml`."""

import dataclasses
import pathlib
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import tqdm
import tyro

from experiments import train
from experiments.config.run import Config, check_same
from experiments.config.sweep import Sweep, read
from experiments.data import Dataset, Stream, load
from experiments.reports import sweep as sweep_report
from experiments.reports import training as training_report
from experiments.training import devices, loop
from experiments.training.atomic_files import read_json, write_json
from experiments.training.metrics import Log


def run(
    sweep: Sweep, out: pathlib.Path, *, progress: bool = True
) -> dict[str, training_report.MethodRuns]:
    """Trains all cells that are not finished in `out`, and writes the results there.

    Returns:
      The records of every cell, by its name; without those of seeds that diverged.

    Raises:
      ValueError: a configuration that cannot be run, or not that of the cells there.
      OSError: a folder has other files in it, or cannot be written; data that is not
        there or cannot be read.
      loop.DivergedError: a loss was no longer finite. All else is trained.
      loop.StoppedError: SIGTERM or SIGINT came. Checkpoints stay.
    """
    settings = open_folder(sweep, out)
    finished = {
        name: finished_groups(config, out / name)
        for name, config in sweep.cells.items()
    }
    left = {
        name: config
        for name, config in sweep.cells.items()
        if missing(sweep.seeds, finished[name])
    }
    with train.StopSignal() as stop:
        if left:
            dataset = load(sweep.first.data.dataset, sweep.first.data.data_dir)
            # All that can be wrong is to come to light before anything trains.
            for name, config in left.items():
                try:
                    devices.compile_step(config, dataset)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
            vmap_seeds = _choose(sweep, settings, dataset, out)
            diverged = _train(
                sweep, left, dataset, out, vmap_seeds, stop.reached, progress
            )
        else:
            diverged = {}
    runs = write_results(sweep, out, diverged)
    print((out / "results.md").read_text())
    print(f"Results in {out}")
    if diverged:
        name, error = next(iter(diverged.items()))
        raise loop.DivergedError(f"{name}: {error}")
    return runs


def _train(
    sweep: Sweep,
    left: dict[str, Config],
    dataset: Dataset | Stream,
    out: pathlib.Path,
    vmap_seeds: bool,
    stopped: Callable[[int], int | None],
    progress: bool,
) -> dict[str, str]:
    """Trains cells, writing the results after each: what diverged, and how."""
    plan = {
        name: groups(config, out / name, vmap_seeds) for name, config in left.items()
    }
    diverged: dict[str, str] = {}
    with tqdm.tqdm(
        total=sweep.first.steps * sum(map(len, plan.values())),
        unit="step",
        disable=not progress,
        dynamic_ncols=True,
    ) as bar:
        for name, config in left.items():
            (out / name).mkdir(parents=True, exist_ok=True)
            config = dataclasses.replace(config, vmap_seeds=vmap_seeds)
            write_json(out / name / "config.json", config.to_dict())
            trainers: dict[int, loop.TrainSetup] = {}
            for seeds in plan[name]:
                lanes = len(seeds)
                if lanes not in trainers:
                    trainers[lanes] = loop.create(
                        dataclasses.replace(
                            config,
                            seed=seeds[0],
                            seeds=lanes,
                            vmap_seeds=lanes > 1,
                        ),
                        dataset,
                    )
                try:
                    train.train_seeds(trainers[lanes], seeds, out / name, bar, stopped)
                except loop.DivergedError as error:
                    diverged[name] = str(error)
                    bar.write(f"{name}: {error}", file=sys.stderr)
                except loop.StoppedError as error:
                    error.add_note(f"Go on with the same command and --out {out}")
                    raise
            runs = write_results(sweep, out, diverged)
            if name in runs:
                accuracy = sweep_report.cell([r.test_accuracy for r in runs[name].last])
                bar.write(f"{name}: {accuracy} %", file=sys.stdout)
    return diverged


def open_folder(sweep: Sweep, out: pathlib.Path) -> dict[str, Any]:
    """Makes the folder, or looks whether it is one of this sweep.

    Returns:
      What was settled in it before: "vmap_seeds", if it was.

    Raises:
      FileExistsError: it has files of something else in it.
      ValueError: a cell in it was configured otherwise.
    """
    path = out / "sweep.json"
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(
                f"out: {out} exists already and is neither empty nor of a sweep. "
                "Results are never overwritten: choose another folder."
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


def _choose(
    sweep: Sweep,
    settings: dict[str, Any],
    dataset: Dataset | Stream,
    out: pathlib.Path,
) -> bool:
    """Whether to train all seeds of a cell as one program; measured once a sweep."""
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
        # The last cell: dense, if it is there, tends to stand first, and seeds at once
        # gain more without masks than with them.
        plain, mapped = seconds_per_step([*sweep.cells.values()][-1], dataset)
        settings = {
            "vmap_seeds": mapped < plain,
            "milliseconds_per_step_and_seed": {
                "plain": round(1000 * plain, 3),
                "vmap_seeds": round(1000 * mapped, 3),
            },
        }
        chosen = "all seeds at once" if mapped < plain else "one seed after the other"
        print(
            f"One step takes {1000 * plain:.2f} ms, and with all seeds at once "
            f"{1000 * mapped:.2f} ms a seed: {chosen}.",
            flush=True,
        )
    write_json(out / "sweep.json", settings)
    return settings["vmap_seeds"]


def seconds_per_step(
    config: Config, dataset: Dataset | Stream, rounds: int = 3
) -> tuple[float, float]:
    """Time of a training step for one seed: by itself, and as one of all at once.

    The best of `rounds` rounds each, in turn, of some dozens of steps or a second.
    """
    seeds = range(config.seed, config.seed + config.seeds)
    timings: list[list[float]] = [[], []]
    compiled_steps = []
    for vmap_seeds in (False, True):
        each = loop.create(dataclasses.replace(config, vmap_seeds=vmap_seeds), dataset)
        state = each.compiled_step.create(seeds[: each.compiled_step.lanes])
        compiled_steps.append([each, state])
    for i in range(rounds + 1):
        for compiled_step, found in zip(compiled_steps, timings, strict=True):
            each, state = compiled_step
            steps, start = 0, time.perf_counter()
            while steps < 2 or (
                i > 0 and steps < 50 and time.perf_counter() - start < 1
            ):
                state, losses = each.compiled_step.steps(
                    state, each.train_data, config.scan_block
                )
                jax.block_until_ready(losses)
                steps += 1
            seconds = time.perf_counter() - start
            compiled_step[1] = state
            # The first round is compilation.
            if i > 0:
                number = steps * config.scan_block * each.compiled_step.lanes
                found.append(seconds / number)
    return min(timings[0]), min(timings[1])


def groups(config: Config, folder: pathlib.Path, vmap_seeds: bool) -> list[range]:
    """Seeds to train, together or one by one: first those that have started.

    A folder of several seeds is gone on with as it is, and seeds that have been added
    make a group of their own.
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


def finished_groups(config: Config, folder: pathlib.Path) -> list[range]:
    """Seeds that have been trained to the end, as their folders hold them."""
    return [
        seeds
        for seeds in _started(config, folder)
        if _is_finished(config, folder, seeds)
    ]


def missing(seeds: int, found: Sequence[range]) -> list[int]:
    """Of so many seeds those that are in no group."""
    return [seed for seed in range(seeds) if not any(seed in group for group in found)]


def _started(config: Config, folder: pathlib.Path) -> list[range]:
    """The groups of seeds in a cell's folder that hold wanted ones."""
    found = []
    for path in folder.glob(f"{config.method}-seed*"):
        name = path.name.removeprefix(f"{config.method}-")
        match = re.fullmatch(r"seed(\d+)|seeds(\d+)-(\d+)", name)
        if match is None:
            continue
        first = int(match[1] or match[2])
        if first < config.seeds:
            found.append(range(first, int(match[3] or first) + 1))
    return sorted(found, key=lambda seeds: seeds[0])


def _is_finished(config: Config, folder: pathlib.Path, seeds: range) -> bool:
    run_folder = folder / train.run_name(config.method, seeds)
    if not (run_folder / "checkpoints" / str(config.steps)).is_dir():
        return False
    records = _records(config, folder, seeds)
    return all(lane and lane[-1].step == config.steps for lane in records)


def _records(
    config: Config, folder: pathlib.Path, seeds: range
) -> list[list[training_report.MetricsRecord]]:
    log = Log(
        folder / train.run_name(config.method, seeds),
        config.method,
        seeds,
        writes=False,
    )
    log.resume(config.steps)
    return log.records


def write_results(
    sweep: Sweep, out: pathlib.Path, diverged: Mapping[str, str]
) -> dict[str, training_report.MethodRuns]:
    """Writes results.md, results.json and accuracy.png from what is finished so far.

    Args:
      sweep: the sweep.
      out: its folder.
      diverged: what diverged in which cell.

    Returns:
      The records of the finished seeds of every cell that has some.
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
    sweep_report.write(sweep, runs, diverged, train.environment(), out)
    return runs


def _command(
    file: tyro.conf.Positional[pathlib.Path],
    out: pathlib.Path | None = None,
    progress: bool = True,
) -> None:
    """Trains methods x sparsities x seeds, as a file says.

    The same command goes on where it stopped. Results are in the folder, after every
    cell: results.md, results.json and accuracy.png.

    Args:
        file: The sweep, as TOML; experiments/sweeps/ has some.
        out: Folder for the results; by default runs/NAME for NAME.toml.
        progress: Whether to show a progress bar.
    """
    folder = train.DEFAULT_FOLDER / file.stem if out is None else out
    run(read(file), folder, progress=progress)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, as `experiments.train.main` does."""
    return train.exit_status(
        lambda: tyro.cli(_command, args=arguments, prog="python -m experiments.sweep")
    )


if __name__ == "__main__":
    sys.exit(main())
