"""The results of a plasticity study: tables, JSON, and plots."""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.config.plasticity import UNPRUNED, Branch, PruningPoint
from experiments.training.atomic_files import atomic_path, write_json
from granet_jax.analysis.plasticity import Recovery
from granet_jax.analysis.plots import LOOKS

# If the learning rate changes more often, it falls continuously instead of in drops.
_MOST_DROPS = 10


@dataclasses.dataclass(frozen=True)
class Results:
    """The outcomes of a study.

    Attributes:
      title: Model and data set.
      points: Finished points, in order.
      seeds: Seeds, in order.
      steps: Number of training steps after pruning.
      epochs: The same in epochs.
      drops: Epochs at which the learning rate changes.
      outcomes: Outcomes of every branch, by point and seed, as in the files.
    """

    title: str
    points: tuple[PruningPoint, ...]
    seeds: tuple[int, ...]
    steps: int
    epochs: float
    drops: tuple[float, ...]
    outcomes: Mapping[Branch, Sequence[Sequence[Mapping[str, Any]]]]

    def values(self, branch: Branch, name: str) -> np.ndarray:
        """Return one number of all outcomes of a branch, (points, seeds)."""
        return np.asarray([[o[name] for o in row] for row in self.outcomes[branch]])

    def recovery(self, branch: Branch) -> Recovery:
        """Return the accuracies of a branch in percent, (points, seeds) each."""
        before, pruned, after = (
            100 * self.values(branch, name) for name in ("before", "pruned", "after")
        )
        return Recovery(before, pruned, after, 100 * self.values(UNPRUNED, "after"))

    @property
    def branches(self) -> list[Branch]:
        """All branches that are pruned."""
        return [branch for branch in self.outcomes if branch != UNPRUNED]

    @property
    def phases(self) -> dict[float, list[int]]:
        """Indices of the points of every learning rate, in order."""
        rates = [point.learning_rate for point in self.points]
        return {
            rate: [i for i, other in enumerate(rates) if other == rate]
            for rate in dict.fromkeys(rates)
        }


def write(results: Results, values: Mapping[str, Any], out: epath.Path) -> None:
    """Write results.md, results.json and plots.

    Args:
      results: Results of the study.
      values: Additional values for results.json.
      out: Folder of the study.
    """
    with atomic_path(out / "results.md") as path:
        path.write_text(_markdown(results))
    write_json(out / "results.json", {**_json(results), **values})
    by_ranking: dict[tuple[str, str], list[Branch]] = {}
    for branch in results.branches:
        by_ranking.setdefault(branch[:2], []).append(branch)
    for (criterion, scope), branches in by_ranking.items():
        with atomic_path(out / f"plasticity-{criterion}-{scope}.png") as path:
            title = f"{results.title}: pruned by {criterion}, {_scope(scope)}"
            plot(results, title, branches, lambda b: b.way, path)
    if len(by_ranking) > 1:
        first = results.branches[0]
        same_way = [b for b in results.branches if b[2:4] == first[2:4]]
        with atomic_path(out / "criteria.png") as path:
            title = f"{results.title}: criteria, {first.way}"
            plot(results, title, same_way, lambda b: f"{b.criterion}, {b.scope}", path)


def _epochs(results: Results) -> str:
    return f"{results.epochs:g} epoch{'' if results.epochs == 1 else 's'}"


def _scope(scope: str) -> str:
    return {"global": "across layers", "layer": "in each layer"}[scope]


def _json(results: Results) -> dict[str, Any]:
    branches = []
    for branch in results.branches:
        recovery = results.recovery(branch)
        branches.append(
            branch._asdict()
            | {
                "active_weights": int(results.values(branch, "active_weights")[0, 0]),
                "accuracy_when_pruned": results.values(branch, "pruned").tolist(),
                "accuracy_after": results.values(branch, "after").tolist(),
                "test_loss_after": results.values(branch, "test_loss").tolist(),
                "plasticity_mean": (np.mean(recovery.plasticity, 1) / 100).tolist(),
                "relative_mean": (np.mean(recovery.relative, 1) / 100).tolist(),
            }
        )
    return {
        "points": [point._asdict() for point in results.points],
        "seeds": results.seeds,
        "steps_after_pruning": results.steps,
        "learning_rate_changes_at_epoch": results.drops,
        "accuracy_before": results.values(UNPRUNED, "before").tolist(),
        "accuracy_after_unpruned": results.values(UNPRUNED, "after").tolist(),
        "branches": branches,
    }


# --- tables


def _markdown(results: Results) -> str:
    before = 100 * results.values(UNPRUNED, "before")
    number = len(results.seeds)
    seeds = (
        "1 seed" if number == 1 else f"mean ± standard deviation over {number} seeds"
    )
    accuracies = [spread(x, sign="") for x in _by_phase(results, before)]
    dense = ["accuracy before pruning", *accuracies]
    plain = results.recovery(UNPRUNED)
    total = results.values(UNPRUNED, "active_weights")[0, 0]
    sections = [
        f"# Pruning plasticity of {results.title}",
        f"The network is pruned at {len(results.points)} points of the dense training "
        f"and then trained for {results.steps:,} steps ({_epochs(results)}) at the "
        f"learning rate of that point. All numbers are test accuracies in %, {seeds}; "
        "the number of each seed is the mean over the points of a column. "
        f"{total:,} weights can be pruned.",
        "## Plasticity\n\nAccuracy after that training minus accuracy before pruning. "
        "The first rows are those of the dense network.",
        _table(
            results,
            [
                dense,
                ["not pruned", *map(spread, _by_phase(results, plain.plasticity))],
                *_rows(results, lambda recovery: recovery.plasticity),
            ],
        ),
        "## Compared with the network that is not pruned\n\nAccuracy after that "
        "training minus the accuracy of the same network after the same training "
        "without pruning.",
        _table(results, _rows(results, lambda recovery: recovery.relative)),
    ]
    for heading, text, pairs in (
        (
            "What regeneration adds",
            "Accuracy with regrowth minus accuracy without, all else being equal.",
            _pairs(results, lambda b: b.regrow > 0, lambda b: b._replace(regrow=0.0)),
        ),
        (
            "What it adds to let all pruned weights grow again",
            "Accuracy of the network that is dense again minus accuracy with the "
            "weights left after one-shot pruning.",
            _pairs(
                results,
                lambda b: b.pruning == "revived",
                lambda b: b._replace(pruning="one-shot"),
            ),
        ),
        (
            "What gradual pruning adds",
            "Accuracy after gradual pruning minus accuracy after one-shot pruning.",
            _pairs(
                results,
                lambda b: b.pruning == "gradual",
                lambda b: b._replace(pruning="one-shot"),
            ),
        ),
    ):
        if pairs:
            sections += [f"## {heading}\n\n{text}", _table(results, pairs)]
    fall = [
        [
            _label(branch),
            *map(spread, _fall(results, results.recovery(branch).plasticity)),
        ]
        for branch in results.outcomes
    ]
    sections += [
        "## How plasticity falls\n\nPlasticity at the last point of a learning rate "
        "minus plasticity at its first point (empty if it has one point). Last column: "
        "the same for the last and the first point of the training.",
        _table(results, fall, last="last - first"),
    ]
    return "\n\n".join(sections) + "\n"


def _by_phase(results: Results, values: np.ndarray) -> list[np.ndarray]:
    """Return the means over the points of every learning rate and over all points."""
    groups = [*results.phases.values(), [*range(len(results.points))]]
    return [values[group].mean(axis=0) for group in groups]


def _fall(results: Results, values: np.ndarray) -> list[np.ndarray]:
    groups = [*results.phases.values(), [*range(len(results.points))]]
    return [
        values[group[-1]] - values[group[0]] if len(group) > 1 else np.empty(0)
        for group in groups
    ]


def _rows(results: Results, value: Callable[[Recovery], np.ndarray]) -> list[list[str]]:
    return [
        [
            _label(branch),
            *map(spread, _by_phase(results, value(results.recovery(branch)))),
        ]
        for branch in results.branches
    ]


def _pairs(
    results: Results,
    matches: Callable[[Branch], bool],
    other: Callable[[Branch], Branch],
) -> list[list[str]]:
    """Return rows with the differences between matching branches and their others."""
    rows = []
    for branch in results.branches:
        if matches(branch) and other(branch) in results.outcomes:
            with_it, without = map(results.recovery, (branch, other(branch)))
            difference = with_it.after - without.after
            rows.append([_label(branch), *map(spread, _by_phase(results, difference))])
    return rows


def _label(branch: Branch) -> str:
    if branch == UNPRUNED:
        return "not pruned"
    words = [f"{100 * branch.rate:g}%", branch.criterion, branch.scope, branch.pruning]
    return " ".join(words) + (f", regrow {branch.regrow:g}" if branch.regrow else "")


def _table(
    results: Results, rows: Sequence[Sequence[str]], last: str = "all points"
) -> str:
    headings = ["pruning"]
    for rate, group in results.phases.items():
        first, final = results.points[group[0]].epoch, results.points[group[-1]].epoch
        epochs = f"epoch {first:.3g}"
        if len(group) > 1:
            epochs = f"epochs {first:.3g} to {final:.3g}"
        headings.append(f"lr {rate:.3g} ({epochs})")
    lines = [[*headings, last], ["---", *["---:"] * len(headings)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: np.ndarray, sign: str = "+") -> str:
    """Format mean and sample standard deviation; "+" also signs positive means."""
    if values.size == 0:
        return ""
    std = f" ± {values.std(ddof=1):.2f}" if values.size > 1 else ""
    return f"{values.mean():{sign}.2f}{std}"


# --- plots


def plot(
    results: Results,
    title: str,
    branches: Sequence[Branch],
    label: Callable[[Branch], str],
    path: pathlib.Path,
) -> None:
    """Plot the paper's curves over the epoch of pruning, with a column per rate.

    The upper panels show plasticity, the lower panels the accuracy compared with the
    network that is not pruned.

    Args:
      results: Results of the study.
      title: Title of the figure.
      branches: Branches to plot, with one line per label and column.
      label: Function from a branch to its label in the legend.
      path: Path of the PNG image.
    """
    rates = sorted({branch.rate for branch in branches})
    figure = Figure(figsize=(max(3.3 * len(rates), 6.5), 6.2), layout="constrained")
    grid = figure.subplots(2, len(rates), sharex=True, squeeze=False)
    labels = [*dict.fromkeys(map(label, branches))]
    looks = dict(zip(labels, itertools.cycle(LOOKS.values()), strict=False))
    plain = results.recovery(UNPRUNED)
    for column, rate in zip(grid.T, rates, strict=True):
        above, below = column
        above.set_title(f"{100 * rate:g}% pruned")
        _line(above, results, plain.plasticity, "not pruned", ("black", ""), 0.0)
        below.axhline(0.0, color="black", linestyle="--", linewidth=1.2)
        column_branches = [branch for branch in branches if branch.rate == rate]
        for i, branch in enumerate(column_branches):
            recovery, name = results.recovery(branch), label(branch)
            # A small shift keeps error bars from hiding each other.
            shift = 0.06 * (i - (len(column_branches) - 1) / 2)
            _line(above, results, recovery.plasticity, name, looks[name], shift)
            _line(below, results, recovery.relative, name, looks[name], shift)
        for axes in column:
            axes.grid(axis="y", alpha=0.3)
            if len(results.drops) <= _MOST_DROPS:
                for epoch in results.drops:
                    axes.axvline(epoch, color="0.55", linestyle=":", linewidth=1.4)
        below.set_xlabel("epoch of pruning")
    grid[0, 0].set_ylabel("plasticity:\nafter - before pruning / %")
    grid[1, 0].set_ylabel("with - without\npruning, after / %")
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=min(len(names), len(rates) + 1),
        frameon=False,
    )
    drops = "; dotted: learning rate drops" if results.drops else ""
    several = ", mean ± std" if len(results.seeds) > 1 else ""
    number = "1 seed" if len(results.seeds) == 1 else f"{len(results.seeds)} seeds"
    figure.suptitle(
        f"{title}\ntrained for {_epochs(results)} ({number}{several}{drops})",
        fontsize=11,
    )
    figure.savefig(path, dpi=150, format="png")


def _line(
    axes: Axes,
    results: Results,
    values: np.ndarray,
    label: str,
    look: tuple[str, str],
    shift: float,
) -> None:
    colour, marker = look
    spreads = values.std(axis=1, ddof=1) if values.shape[1] > 1 else None
    axes.errorbar(
        [point.epoch + shift for point in results.points],
        values.mean(axis=1),
        yerr=spreads,
        label=label,
        color=colour,
        marker=marker or None,
        linestyle="-" if marker else "--",
        markersize=5.5,
        markeredgecolor="white",
        markeredgewidth=0.5,
        linewidth=1.4,
        elinewidth=1.0,
        capsize=2,
    )
