"""What a run leaves behind: metrics as JSON lines, a table, a summary and a plot."""

import dataclasses
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import rich.table
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.training.metrics import MetricsRecord
from granet_jax.analysis import plots

# Okabe and Ito's colours, which the colour-blind tell apart: method, dense.
_COLOURS = ("#0072B2", "#D55E00")
_STYLES = ("-", "--")


@dataclasses.dataclass(frozen=True)
class MethodRuns:
    """The records of one method, for all seeds.

    Attributes:
      method: its name.
      seeds: of the runs, in the order of `records`.
      records: of every run, in the order of steps.
    """

    method: str
    seeds: tuple[int, ...]
    records: tuple[tuple[MetricsRecord, ...], ...]

    @property
    def last(self) -> list[MetricsRecord]:
        """The last record of every run."""
        return [records[-1] for records in self.records]

    @property
    def best(self) -> list[float]:
        """The best test accuracy of every run among records of the final sparsity.

        Chosen on the test data, as the papers do: an optimistic number, to be compared
        with theirs only.
        """
        return [
            max(
                record.test_accuracy
                for record in records
                if record.sparsity.active == records[-1].sparsity.active
            )
            for records in self.records
        ]


def summary(runs: Sequence[MethodRuns], environment: dict[str, Any]) -> dict[str, Any]:
    """The final numbers of every run, ready for JSON."""
    rows = [
        {
            "method": run.method,
            "seeds": run.seeds,
            "test_accuracy": [last.test_accuracy for last in run.last],
            "best_test_accuracy": run.best,
            "sparsity": [last.sparsity.overall for last in run.last],
            "active_weights": [last.sparsity.active for last in run.last],
            "total_weights": run.last[0].sparsity.total,
            "seconds": [last.seconds for last in run.last],
        }
        for run in runs
    ]
    return {"runs": rows, "environment": environment}


def table(title: str, runs: Sequence[MethodRuns]) -> rich.table.Table:
    """The final numbers of every method: mean and standard deviation over seeds."""
    result = rich.table.Table(title=title, title_justify="left")
    result.add_column("method", no_wrap=True)
    for heading in ("last / %", "best / %", "sparsity / %", "active of all weights"):
        result.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        sparsity = run.last[0].sparsity
        result.add_row(
            run.method,
            _spread([100 * last.test_accuracy for last in run.last]),
            _spread([100 * best for best in run.best]),
            f"{100 * sparsity.overall:.2f}",
            f"{sparsity.active:,} of {sparsity.total:,}",
        )
    seeds = len(runs[0].seeds)
    result.caption = "Test accuracy: last, and best at the final sparsity"
    if seeds > 1:
        result.caption += f"; mean ± std over {seeds} seeds"
    result.caption_justify = "left"
    return result


def plot(title: str, runs: Sequence[MethodRuns], path: pathlib.Path) -> None:
    """Accuracy and sparsity over the steps, and the final density of every layer.

    Args:
      title: of the figure.
      runs: of one or two methods, with the same seeds and steps.
      path: of the PNG image.
    """
    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(title)
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 2))
    accuracy = figure.add_subplot(grid[0, 0])
    sparsity = figure.add_subplot(grid[1, 0], sharex=accuracy)
    density = figure.add_subplot(grid[:, 1])
    for run, colour, style in zip(runs, _COLOURS, _STYLES, strict=False):
        look = {"color": colour, "linestyle": style}
        _curve(accuracy, run, [_accuracies(r) for r in run.records], look)
        _curve(sparsity, run, [_sparsities(r) for r in run.records], look)
    several = len(runs[0].seeds) > 1
    accuracy.set(
        title="Test accuracy" + (" (mean; band: range over seeds)" if several else ""),
        ylabel="test accuracy / %",
        ylim=(_lower_limit(runs), 100.3),
    )
    accuracy.tick_params(labelbottom=False)
    accuracy.legend(loc="lower right", frameon=False)
    sparsity.set(
        title="Sparsity of all weights",
        xlabel="optimizer steps",
        ylabel="sparsity / %",
        ylim=(-4, 104),
    )
    for axes in (accuracy, sparsity):
        axes.grid(alpha=0.3)
        axes.margins(x=0.01)
    _bars(density, runs)
    figure.savefig(path, dpi=150, format="png")


def _curve(axes: Axes, run: MethodRuns, values: list[list[float]], look: Any) -> None:
    steps = [record.step for record in run.records[0]]
    columns = list(zip(*values, strict=True))
    means = [statistics.mean(column) for column in columns]
    axes.plot(steps, means, label=run.method, linewidth=1.8, **look)
    if len(values) > 1:
        low, high = map(min, columns), map(max, columns)
        axes.fill_between(
            steps, list(low), list(high), color=look["color"], alpha=0.2, linewidth=0
        )


def _bars(axes: Axes, runs: Sequence[MethodRuns]) -> None:
    layers = list(runs[0].last[0].sparsity.leaves)
    plots.draw_bars(
        axes,
        {
            run.method: {
                layer: 1 - statistics.mean(r.sparsity.leaves[layer] for r in run.last)
                for layer in layers
            }
            for run in runs
        },
    )
    several = len(runs[0].seeds) > 1
    axes.set(
        title="Density of each layer at the end" + (" (mean)" if several else ""),
        ylabel="layer, from input to output",
    )


def _accuracies(records: Sequence[MetricsRecord]) -> list[float]:
    return [100 * record.test_accuracy for record in records]


def _sparsities(records: Sequence[MetricsRecord]) -> list[float]:
    return [100 * record.sparsity.overall for record in records]


def _lower_limit(runs: Sequence[MethodRuns]) -> float:
    """Cuts off the first steep rise, which would flatten all that follows."""
    later = [
        accuracy
        for run in runs
        for records in run.records
        for accuracy in _accuracies(records)[len(records) // 5 :]
    ]
    return max(0.0, 5 * ((min(later) - 1) // 5))


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean
