"""The results of a sweep: tables, all numbers as JSON, and a plot."""

import dataclasses
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.config.run import Config
from experiments.config.sweep import Sweep
from experiments.reports.training import MethodRuns
from experiments.training.atomic_files import atomic_path, write_json
from granet_jax.analysis import plots


def write(
    sweep: Sweep,
    runs: Mapping[str, MethodRuns],
    diverged: Mapping[str, str],
    environment: Mapping[str, Any],
    out: epath.Path,
) -> None:
    """Write results.md, results.json and accuracy.png.

    Args:
      sweep: The sweep.
      runs: Metrics of every cell with finished seeds, by its name.
      diverged: Error messages of the cells that diverged, by name.
      environment: Versions and devices on which the results depend.
      out: Folder of the sweep.
    """
    with atomic_path(out / "results.md") as path:
        path.write_text(_markdown(sweep, runs, diverged))
    results = _results(sweep, runs, diverged) | {"environment": environment}
    write_json(out / "results.json", results)
    if runs:
        with atomic_path(out / "accuracy.png") as path:
            plot(sweep, runs, path)


def _results(
    sweep: Sweep, runs: Mapping[str, MethodRuns], diverged: Mapping[str, str]
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
    }


def _markdown(
    sweep: Sweep, runs: Mapping[str, MethodRuns], diverged: Mapping[str, str]
) -> str:
    config, optimizer = sweep.first, sweep.first.optimizer
    seeds = "1 seed" if sweep.seeds == 1 else f"mean ± std over {sweep.seeds} seeds"
    paragraphs = [
        f"# {_title(sweep)}",
        f"Every run has the same budget: {config.steps:,} steps of "
        f"{config.data.batch_size} examples, with {optimizer.name}, learning rate "
        f"{optimizer.learning_rate:g}, schedule {optimizer.schedule}."
        f"{_row_options(sweep)} Test accuracy in %, by the sparsity of all weights at "
        "the end."
        f"{_active_weights(sweep, runs)}",
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
    if sweep.variants:
        paragraphs += [
            "Gain of each variant over its row, in percentage points after the last "
            "step (mean ± std of the differences between runs of the same seed):",
            _table_of_gains(sweep, runs),
        ]
    if any(config.method == "dense" for config in sweep.cells.values()):
        paragraphs.append(
            "The dense network has no sparsity: its numbers are the same in every "
            "column."
        )
    return "\n\n".join(paragraphs) + "\n"


def _title(sweep: Sweep) -> str:
    return f"{sweep.first.model} on {sweep.first.data.dataset}"


def _row_options(sweep: Sweep) -> str:
    """Return a sentence for each row and variant with options of its own."""

    def config_of(row: str) -> Config:
        return sweep.cells[sweep.cell(row, sweep.sparsities[0])]

    # Rows with names of their own are described in full, including the method.
    default = Config(method="dense", optimizer=sweep.first.optimizer)
    sentences = ""
    for method in sweep.plain:
        config = config_of(method)
        named = method != config.method
        changed = [config.method] if named else []
        changed += _changed(default, config, ("masks", "tost") if named else ())
        if changed:
            sentences += f" {method} has {', '.join(changed)}."
    for variant in sweep.variants:
        row = sweep.plain[0]
        changed = _changed(config_of(row), config_of(row + variant), ("masks", "tost"))
        sentences += f" {variant} adds {', '.join(changed)}."
    return sentences


def _changed(before: Config, config: Config, parts: Sequence[str]) -> list[str]:
    """Return the changed options of the optimizer and of `parts`."""
    changed = []
    for part in (*parts, "optimizer"):
        prefix = "" if part == "optimizer" else f"{part}."
        old = dataclasses.asdict(getattr(before, part))
        new = dataclasses.asdict(getattr(config, part))
        changed += [f"{prefix}{k} {v}" for k, v in new.items() if old[k] != v]
    return changed


def _active_weights(sweep: Sweep, runs: Mapping[str, MethodRuns]) -> str:
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
    runs: Mapping[str, MethodRuns],
    diverged: Mapping[str, str],
    accuracies: Callable[[MethodRuns], Sequence[float]],
) -> str:
    def entry(name: str) -> str:
        parts = []
        if name in runs:
            values = accuracies(runs[name])
            parts.append(cell(values))
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
        names = [sweep.cell(method, sparsity) for sparsity in sweep.sparsities]
        lines.append([method, *map(entry, names)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _table_of_gains(sweep: Sweep, runs: Mapping[str, MethodRuns]) -> str:
    def accuracies(name: str, sparsity: float) -> dict[int, float]:
        run = runs.get(sweep.cell(name, sparsity))
        if run is None:
            return {}
        pairs = zip(run.seeds, run.last, strict=True)
        return {seed: record.test_accuracy for seed, record in pairs}

    def entry(row: str, variant: str, sparsity: float) -> str:
        plain, other = (accuracies(n, sparsity) for n in (row, row + variant))
        gains = [other[seed] - plain[seed] for seed in other if seed in plain]
        return cell(gains, sign="+") if gains else "-"

    lines = [
        ["method", "sparsity", *sweep.variants],
        ["---", "---:", *["---:"] * len(sweep.variants)],
    ]
    for row in sweep.plain:
        for sparsity in (0.0,) if row in sweep.cells else sweep.sparsities:
            gains = [entry(row, variant, sparsity) for variant in sweep.variants]
            lines.append([row, _percent(sparsity), *gains])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(sweep: Sweep, runs: Mapping[str, MethodRuns], path: pathlib.Path) -> None:
    """Plot accuracy against sparsity with a line per method, as a PNG image.

    With variants, there is a panel for every row that has variants.
    """
    rows = [row for row in sweep.plain if row not in sweep.cells]
    panels = [("", {row: row for row in rows})]
    if sweep.variants:
        named = {"": "plain"} | {variant: variant for variant in sweep.variants}
        panels = [(row, {label: row + v for v, label in named.items()}) for row in rows]
    labels = panels[0][1]
    # Rows with names of their own get the looks of absent methods.
    looks = plots.looks(labels)
    width = 8 if len(panels) == 1 else 3 * len(panels) + 2
    figure = Figure(figsize=(width, 5), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, (title, lines) in zip(grid[0], panels, strict=True):
        for i, (label, row) in enumerate(lines.items()):
            # A small shift keeps error bars from hiding each other.
            shift = 0.035 * (i - (len(lines) - 1) / 2)
            _line(axes, sweep, runs, row, shift, looks[label], label)
        if "dense" in runs:
            plots.draw_dense(
                axes, [record.test_accuracy for record in runs["dense"].last]
            )
        axes.set_title(title)
        axes.set_xlim(-0.4, len(sweep.sparsities) - 0.6)
        axes.set_xticks(range(len(sweep.sparsities)), map(_percent, sweep.sparsities))
        axes.grid(axis="y", alpha=0.3)
    spread = ", mean ± std" if sweep.seeds > 1 else ""
    number = "1 seed" if sweep.seeds == 1 else f"{sweep.seeds} seeds"
    figure.suptitle(f"{_title(sweep)}, {sweep.first.steps:,} steps ({number})")
    figure.supxlabel("final sparsity (fraction of all weights that are zero)")
    grid[0, 0].set_ylabel(f"test accuracy after the last step / %{spread}")
    lines, names = [], []
    for axes in grid[0]:
        for line, name in zip(*axes.get_legend_handles_labels(), strict=True):
            if name not in names:
                lines.append(line)
                names.append(name)
    figure.legend(lines, names, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150, format="png")


def _line(
    axes: Axes,
    sweep: Sweep,
    runs: Mapping[str, MethodRuns],
    row: str,
    shift: float,
    look: tuple[str, str],
    label: str,
) -> None:
    points = []
    for x, sparsity in enumerate(sweep.sparsities):
        run = runs.get(sweep.cell(row, sparsity))
        if run is not None:
            values = [record.test_accuracy for record in run.last]
            points.append((x + shift, values))
    if not points:
        return
    places, values = zip(*points, strict=True)
    plots.draw_accuracies(axes, places, values, look, label)


def cell(accuracies: Sequence[float], sign: Literal["-", "+"] = "-") -> str:
    """Format mean and standard deviation in percent; "+" also signs positive means."""
    std = _std(accuracies)
    spread = "" if std is None else f" ± {100 * std:.2f}"
    return f"{100 * statistics.mean(accuracies):{sign}.2f}{spread}"


def _std(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation; None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def _percent(share: float) -> str:
    return f"{100 * share:.10g}%"
