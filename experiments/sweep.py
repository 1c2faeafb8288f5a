"""Trains methods x sparsities x seeds: `python -m experiments.sweep FILE.toml`."""

import dataclasses
import difflib
import json
import pathlib
import re
import statistics
import sys
import time
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import tqdm
import tyro
from matplotlib.figure import Figure

from experiments import parallel, report, train, trainer
from experiments.config import _OPTIONS, Config, MethodName, differences
from experiments.data import Dataset, Stream, load
from experiments.metrics import Log, complete

METHODS: tuple[str, ...] = typing.get_args(MethodName)

# What the sweep itself decides.
_DECIDED = ("method", "sparsity", "seeds", "seed", "vmap_seeds", "baseline")
_DECIDED += ("out", "progress", "distributed")
# What a single method may have of its own: the budget is the same for all.
_OWN = ("masks", "optimizer")

# Okabe and Ito's colours, which the colour-blind tell apart, with grey for the yellow
# that white paper swallows; dense is black.
_LOOKS = {
    "granet": ("#D55E00", "o"),
    "granet-st": ("#E69F00", "s"),
    "gmp": ("#0072B2", "^"),
    "rigl": ("#009E73", "D"),
    "set": ("#CC79A7", "v"),
    "snfs": ("#777777", "P"),
    "static": ("#56B4E9", "X"),
}


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep file says, checked.

    Attributes:
      methods: in the order of the file.
      sparsities: in rising order.
      seeds: number of seeds, from 0.
      vmap_seeds: whether all seeds of a cell train as one program; None: what is
        faster.
      cells: the configuration of every cell by its name, which its folder has too.
    """

    methods: tuple[str, ...]
    sparsities: tuple[float, ...]
    seeds: int
    vmap_seeds: bool | None
    cells: dict[str, Config]

    @property
    def first(self) -> Config:
        """One of the cells: what all have in common can be read off it."""
        return next(iter(self.cells.values()))


def read(path: pathlib.Path) -> Sweep:
    """The sweep that a file describes.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not TOML, or an option in it is unknown or cannot be used; the
        message names it.
    """
    try:
        values = tomllib.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a TOML file: {error}.") from error
    try:
        return _sweep(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def cell_name(method: str, sparsity: float) -> str:
    """Name of a cell and of its folder; dense training has one, of no sparsity."""
    return method if method == "dense" else f"{method}-{sparsity}"


def _sweep(values: dict[str, Any]) -> Sweep:
    known = ("methods", "sparsities", "seeds", "vmap_seeds", "train", "method")
    _check_keys("", values, known)
    for name in known[:3]:
        if name not in values:
            raise ValueError(f"{name} is missing: a sweep needs it.")
    methods = _distinct("methods", values["methods"], tuple[MethodName, ...])
    sparsities = _distinct("sparsities", values["sparsities"], tuple[float, ...])
    seeds = _converted("seeds", values["seeds"], int)
    vmap = _converted(
        "vmap_seeds", values.get("vmap_seeds", "auto"), bool | Literal["auto"]
    )
    common = _table("train", values.get("train", {}))
    own = _table("method", values.get("method", {}))
    _check_keys("method.", own, METHODS)
    for method in own:
        if method not in methods:
            raise ValueError(f"method.{method}: {method} is not one of methods.")
    options = _options("train", common, Config)
    for name in options:
        if name in _DECIDED:
            raise ValueError(
                f"train.{name} is not for a sweep, which sets it by itself or by "
                "methods, sparsities, seeds and vmap_seeds."
            )
    _check_used(options.get("masks", {}), methods)
    cells = {}
    for method in methods:
        extra = _options(f"method.{method}", own.get(method, {}), Config)
        for name in extra:
            if name not in _OWN:
                raise ValueError(
                    f"method.{method}.{name} must be the same for all methods: set "
                    f"it in [train]. A method has its own {' and '.join(_OWN)} only."
                )
        for sparsity in (0.0,) if method == "dense" else sparsities:
            name = cell_name(method, sparsity)
            given = {"method": method, "sparsity": sparsity, "seeds": seeds}
            try:
                cells[name] = _config(given, options, extra, bool(vmap is True))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    return Sweep(methods, sparsities, seeds, None if vmap == "auto" else vmap, cells)


def _config(
    given: dict[str, Any],
    common: dict[str, Any],
    own: dict[str, Any],
    vmap_seeds: bool,
) -> Config:
    """The configuration of a cell, from the options that all have and its method's."""
    values: dict[str, Any] = dict(common)
    having = _OPTIONS[given["method"]]
    if "masks" in common:
        values["masks"] = {k: v for k, v in common["masks"].items() if k in having}
    for name, options in own.items():
        values[name] = values.get(name, {}) | options
    hints = typing.get_type_hints(Config)
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            values[name] = hints[name](**value)
    return Config(**given, **values, vmap_seeds=vmap_seeds, baseline=False)


def _check_used(masks: Mapping[str, Any], methods: Sequence[str]) -> None:
    for name in masks:
        if not any(name in _OPTIONS[method] for method in methods):
            raise ValueError(
                f"train.masks.{name} is not an option of any of the methods "
                f"{', '.join(methods)}."
            )


def _options(prefix: str, table: Mapping[str, Any], record: Any) -> dict[str, Any]:
    """The values of a table as the fields of `record`, nested ones as dictionaries."""
    hints = typing.get_type_hints(record)
    # On the command line, words are joined by hyphens.
    renamed = {name.replace("-", "_"): name for name in table}
    if len(renamed) < len(table):
        twice = next(name for name in table if renamed[name.replace("-", "_")] != name)
        raise ValueError(f"{prefix}.{twice} is there twice, with - and with _.")
    _check_keys(f"{prefix}.", renamed, tuple(hints))
    result = {}
    for name, hint in hints.items():
        if name not in renamed:
            continue
        full, value = f"{prefix}.{name}", table[renamed[name]]
        if dataclasses.is_dataclass(hint):
            result[name] = _options(full, _table(full, value), hint)
        else:
            result[name] = _converted(full, value, hint)
    return result


def _converted(name: str, value: Any, hint: Any) -> Any:
    """A value of a file as the type that an option has."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for choice in arguments:
            try:
                return _converted(name, value, choice)
            except ValueError:
                continue
    elif origin is Literal:
        if value in arguments:
            return value
        near = difflib.get_close_matches(str(value), arguments, 1)
        hinted = f" Did you mean {near[0]!r}?" if near else ""
        choices = ", ".join(map(str, arguments))
        raise ValueError(f"{name} must be one of {choices}; got {value!r}.{hinted}")
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_converted(name, item, arguments[0]) for item in value)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif type(value) is hint:
        return value
    raise ValueError(f"{name} must be {_called(hint)}, got {value!r}.")


def _called(hint: Any) -> str:
    """A type in words."""
    words = {int: "an integer", float: "a number", str: "a string"}
    words |= {bool: "true or false"}
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_called(a) for a in arguments if a is not types.NoneType)
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, arguments))
    if typing.get_origin(hint) is tuple:
        return f"a list, of each {_called(arguments[0])}"
    return words.get(hint, str(hint))


def _distinct(name: str, value: Any, hint: Any) -> tuple[Any, ...]:
    values = _converted(name, value, hint)
    if not values:
        raise ValueError(f"{name} must not be empty.")
    if len(set(values)) < len(values):
        raise ValueError(f"{name} has a value twice: {value}.")
    return tuple(sorted(values)) if hint == tuple[float, ...] else values


def _table(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a table, [{name}], got {value!r}.")
    return value


def _check_keys(prefix: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = (
                f"Did you mean {prefix}{near[0]}?"
                if near
                else f"There are {', '.join(known)}."
            )
            raise ValueError(f"{prefix}{name} is unknown. {hint}")


def run(
    sweep: Sweep, out: pathlib.Path, *, progress: bool = True
) -> dict[str, report.Runs]:
    """Trains all cells that are not finished in `out`, and writes the results there.

    Returns:
      The records of every cell, by its name; without those of seeds that diverged.

    Raises:
      ValueError: a configuration that cannot be run, or not that of the cells there.
      OSError: a folder has other files in it, or cannot be written; data that is not
        there or cannot be read.
      trainer.DivergedError: a loss was no longer finite. All else is trained.
      trainer.StoppedError: SIGTERM or SIGINT came. Checkpoints stay.
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
                    parallel.compiled(
                        dataclasses.replace(config, vmap_seeds=False), dataset
                    )
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
        raise trainer.DivergedError(f"{name}: {error}")
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
            with complete(out / name / "config.json") as path:
                path.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
            trainers: dict[int, trainer.Trainer] = {}
            for seeds in plan[name]:
                lanes = len(seeds)
                if lanes not in trainers:
                    trainers[lanes] = trainer.create(
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
                except trainer.DivergedError as error:
                    diverged[name] = str(error)
                    bar.write(f"{name}: {error}", file=sys.stderr)
                except trainer.StoppedError as error:
                    error.add_note(f"Go on with the same command and --out {out}")
                    raise
            runs = write_results(sweep, out, diverged)
            if name in runs:
                accuracy = _cell([r.test_accuracy for r in runs[name].last])
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
        _write_json(path, settings)
    settings = _read_json(path)
    for name, config in sweep.cells.items():
        path = out / name / "config.json"
        if not path.exists():
            continue
        expected = config.to_dict()
        if sweep.vmap_seeds is None:
            expected["vmap_seeds"] = settings.get("vmap_seeds", False)
        if found := differences(_read_json(path), expected):
            option, (old, new) = next(iter(found.items()))
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise ValueError(
                f"out: {out} holds {name} with {option}={old}, and this sweep has "
                f"{option}={new}{more}. Give the same options to go on with it, or "
                "another folder. Methods, sparsities and seeds may be added."
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
    config = sweep.first
    possible = (
        sweep.seeds > 1
        and len(jax.devices()) == 1
        and not isinstance(dataset, Stream)
        and all(cell.optimizer.accumulate == 1 for cell in sweep.cells.values())
    )
    settings = {"vmap_seeds": False}
    if possible:
        plain, mapped = seconds_per_step(config, dataset)
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
    _write_json(out / "sweep.json", settings)
    return settings["vmap_seeds"]


def seconds_per_step(
    config: Config, dataset: Dataset | Stream, rounds: int = 3
) -> tuple[float, float]:
    """Time of a training step for one seed: by itself, and as one of all at once.

    The best of `rounds` rounds each, in turn, of some dozens of steps or a second.
    """
    seeds = range(config.seed, config.seed + config.seeds)
    timings: list[list[float]] = [[], []]
    programs = []
    for vmap_seeds in (False, True):
        each = trainer.create(
            dataclasses.replace(config, vmap_seeds=vmap_seeds), dataset
        )
        state = each.program.create(seeds[: each.program.lanes])
        programs.append([each, state])
    for i in range(rounds + 1):
        for program, found in zip(programs, timings, strict=True):
            each, state = program
            steps, start = 0, time.perf_counter()
            while steps < 2 or (
                i > 0 and steps < 50 and time.perf_counter() - start < 1
            ):
                state, losses = each.program.steps(state, each.train, config.scan_block)
                jax.block_until_ready(losses)
                steps += 1
            seconds = time.perf_counter() - start
            program[1] = state
            # The first round is compilation.
            if i > 0:
                number = steps * config.scan_block * each.program.lanes
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
) -> list[list[report.Record]]:
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
) -> dict[str, report.Runs]:
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
            runs[name] = report.Runs(
                config.method, seeds, tuple(records[seed] for seed in seeds)
            )
    with complete(out / "results.md") as path:
        path.write_text(_markdown(sweep, runs, diverged))
    _write_json(out / "results.json", _results(sweep, runs, diverged))
    if runs:
        with complete(out / "accuracy.png") as path:
            plot(sweep, runs, path)
    return runs


def _results(
    sweep: Sweep, runs: Mapping[str, report.Runs], diverged: Mapping[str, str]
) -> dict[str, Any]:
    cells = []
    for name, config in sweep.cells.items():
        cell: dict[str, Any] = {"name": name, "method": config.method}
        cell["sparsity"] = config.sparsity
        if name in diverged:
            cell["diverged"] = diverged[name]
        if name in runs:
            last = runs[name].last
            accuracies = [record.test_accuracy for record in last]
            best = runs[name].best
            cell |= {
                "seeds": runs[name].seeds,
                "test_accuracy": accuracies,
                "mean": statistics.mean(accuracies),
                "std": _std(accuracies),
                "best_test_accuracy": best,
                "best_mean": statistics.mean(best),
                "best_std": _std(best),
                "test_loss": [record.test_loss for record in last],
                "active_weights": [record.sparsity.active for record in last],
                "total_weights": last[0].sparsity.total,
                "seconds": [record.seconds for record in last],
            }
        cells.append(cell | {"config": config.to_dict()})
    return {
        "methods": sweep.methods,
        "sparsities": sweep.sparsities,
        "seeds": sweep.seeds,
        "cells": cells,
        "environment": train.environment(),
    }


def _markdown(
    sweep: Sweep, runs: Mapping[str, report.Runs], diverged: Mapping[str, str]
) -> str:
    first, optimizer = sweep.first, sweep.first.optimizer
    seeds = "1 seed" if sweep.seeds == 1 else f"mean ± std over {sweep.seeds} seeds"
    paragraphs = [
        f"# {_title(sweep)}",
        f"Every run has the same budget: {first.steps:,} steps of "
        f"{first.data.batch_size} examples, with {optimizer.name}, learning rate "
        f"{optimizer.learning_rate:g}, schedule {optimizer.schedule}.{_own(sweep)} "
        "Test accuracy in %, by the sparsity of all weights at the end."
        f"{_weights(sweep, runs)}",
        f"After the last step ({seeds}):",
        _table_of(
            sweep,
            runs,
            diverged,
            lambda run: [record.test_accuracy for record in run.last],
        ),
        f"The best of all evaluations at the final sparsity ({seeds}; chosen on the "
        "test data, as papers often do, and so optimistic):",
        _table_of(sweep, runs, diverged, lambda run: run.best),
    ]
    if "dense" in sweep.methods:
        paragraphs.append(
            "The dense network has no sparsity: its numbers are repeated in each "
            "column."
        )
    return "\n\n".join(paragraphs) + "\n"


def _title(sweep: Sweep) -> str:
    return f"{sweep.first.model} on {sweep.first.data.dataset}"


def _own(sweep: Sweep) -> str:
    """What a method has of its own beside its mask options, if any has."""
    common = dataclasses.asdict(sweep.first.optimizer)
    for method in sweep.methods:
        cell = next(c for c in sweep.cells.values() if c.method == method)
        found = dataclasses.asdict(cell.optimizer)
        changed = [f"{k}={v}" for k, v in found.items() if common[k] != v]
        if changed:
            return f" {method} has {', '.join(changed)}."
    return ""


def _weights(sweep: Sweep, runs: Mapping[str, report.Runs]) -> str:
    active = {}
    total = 0
    for name, run in runs.items():
        total = run.last[0].sparsity.total
        if run.method != "dense":
            active[sweep.cells[name].sparsity] = run.last[0].sparsity.active
    if not active:
        return ""
    counts = ", ".join(f"{active[s]:,} at {_percent(s)}" for s in sorted(active))
    return f" Active weights: {counts}, of {total:,}."


def _table_of(
    sweep: Sweep,
    runs: Mapping[str, report.Runs],
    diverged: Mapping[str, str],
    accuracies: Callable[[report.Runs], Sequence[float]],
) -> str:
    def cell(name: str) -> str:
        parts = []
        if name in runs:
            values = accuracies(runs[name])
            parts.append(_cell(values))
            if len(values) < sweep.seeds:
                parts.append(f"({len(values)} of {sweep.seeds} seeds)")
        if name in diverged:
            parts.append("diverged")
        return " ".join(parts) or "-"

    lines = [
        ["method", *map(_percent, sweep.sparsities)],
        ["---", *["---:"] * len(sweep.sparsities)],
    ]
    for method in sweep.methods:
        names = [cell_name(method, sparsity) for sparsity in sweep.sparsities]
        lines.append([method, *map(cell, names)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(sweep: Sweep, runs: Mapping[str, report.Runs], path: pathlib.Path) -> None:
    """Accuracy against sparsity, a line a method, as a PNG image."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    sparse = [method for method in sweep.methods if method != "dense"]
    for i, method in enumerate(sparse):
        points = []
        for x, sparsity in enumerate(sweep.sparsities):
            run = runs.get(cell_name(method, sparsity))
            if run is not None:
                values = [100 * record.test_accuracy for record in run.last]
                # Side by side, so that error bars do not hide one another.
                shift = 0.02 * (i - (len(sparse) - 1) / 2)
                points.append((x + shift, statistics.mean(values), _std(values) or 0))
        if points:
            xs, means, errors = zip(*points, strict=True)
            colour, marker = _LOOKS[method]
            axes.errorbar(
                xs,
                means,
                yerr=errors if any(errors) else None,
                color=colour,
                marker=marker,
                markersize=6,
                linewidth=1.6,
                elinewidth=1.2,
                capsize=2.5,
                label=method,
            )
    if "dense" in runs:
        values = [100 * record.test_accuracy for record in runs["dense"].last]
        mean, std = statistics.mean(values), _std(values) or 0
        axes.axhline(mean, color="black", linestyle="--", linewidth=1.2, label="dense")
        axes.axhspan(mean - std, mean + std, color="black", alpha=0.12, linewidth=0)
    spread = ", mean ± std" if sweep.seeds > 1 else ""
    number = "1 seed" if sweep.seeds == 1 else f"{sweep.seeds} seeds"
    axes.set(
        title=f"{_title(sweep)}, {sweep.first.steps:,} steps ({number})",
        xlabel="sparsity at the end (share of all weights that are zero)",
        ylabel=f"test accuracy after the last step / %{spread}",
        xlim=(-0.4, len(sweep.sparsities) - 0.6),
    )
    axes.set_xticks(range(len(sweep.sparsities)), map(_percent, sweep.sparsities))
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150, format="png")


def _cell(accuracies: Sequence[float]) -> str:
    """Mean and standard deviation, in percent."""
    std = _std(accuracies)
    spread = "" if std is None else f" ± {100 * std:.2f}"
    return f"{100 * statistics.mean(accuracies):.2f}{spread}"


def _std(values: Sequence[float]) -> float | None:
    """Sample standard deviation, which one value has none of."""
    return statistics.stdev(values) if len(values) > 1 else None


def _percent(share: float) -> str:
    return f"{100 * share:.10g}%"


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise FileExistsError(f"out: {path} cannot be read ({error}).") from error


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    with complete(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n")


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
