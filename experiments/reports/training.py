"""The results of `experiments.train`: a table, a summary as JSON, and a plot."""

import dataclasses
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import jax
import rich.table
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import granet_jax
from experiments.training.metrics import MetricsRecord
from granet_jax.analysis import plots

# Colour-blind safe (Okabe and Ito): the method, then dense training.
_COLOURS = ("#0072B2", "#D55E00")
_STYLES = ("-", "--")


@dataclasses.dataclass(frozen=True)
class MethodRuns:
    """The metrics of one method for all seeds.

    Attributes:
      method: Name of the method.
      seeds: Seeds of the runs.
      records: Records of every run, in the order of steps.
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
        """The best test accuracy of every run at the final sparsity.

        The best evaluation is chosen on the test data, as the papers do. The number is
        therefore optimistic and comparable with the papers' numbers only.
        """
        return [
            max(
                record.test_accuracy
                for record in records
                if record.sparsity.active == records[-1].sparsity.active
            )
            for records in self.records
        ]


def environment() -> dict[str, Any]:
    """Return the versions and devices on which the results depend."""
    return {
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "granet_jax": granet_jax.__version__,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


def summary(runs: Sequence[MethodRuns], environment: dict[str, Any]) -> dict[str, Any]:
    """Return the final metrics of every run as JSON values."""
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
    """Return a table of the final metrics, mean and standard deviation over seeds."""
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
    """Plot accuracy and sparsity over the steps, and every layer's final density.

    Args:
      title: Title of the figure.
      runs: Metrics of one or two methods with the same seeds and steps.
      path: Path of the PNG image.
    """
    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(title)
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 2))
    accuracy = figure.add_subplot(grid[0, 0])
    sparsity = figure.add_subplot(grid[1, 0], sharex=accuracy)
    density = figure.add_subplot(grid[:, 1])
    for run, colour, line in zip(runs, _COLOURS, _STYLES, strict=False):
        style = {"color": colour, "linestyle": line}
        _curve(accuracy, run, [_accuracies(r) for r in run.records], style)
        _curve(sparsity, run, [_sparsities(r) for r in run.records], style)
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


def _curve(axes: Axes, run: MethodRuns, values: list[list[float]], style: Any) -> None:
    steps = [record.step for record in run.records[0]]
    columns = list(zip(*values, strict=True))
    means = [statistics.mean(column) for column in columns]
    axes.plot(steps, means, label=run.method, linewidth=1.8, **style)
    if len(values) > 1:
        low, high = map(min, columns), map(max, columns)
        axes.fill_between(
            steps, list(low), list(high), color=style["color"], alpha=0.2, linewidth=0
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
    """Return an axis limit that hides the steep rise of the first fifth of training."""
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
