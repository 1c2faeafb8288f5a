"""Draw the two results that the README shows.

    python docs/results_figure.py

It reads the results of the sweeps `photos-cnn`, `photos-cnn-least` and
`lenet-*-epochs` in `experiments/results`, and writes `docs/images/results.png`.
"""

import json
import statistics
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from granet_jax.analysis import plots  # noqa: E402

RESULTS = HERE.parent / "experiments" / "results"
EPOCHS = (12, 60, 160)
METHODS = ("static", "set", "rigl", "gmp", "granet")
NAMES = {
    "static": "static",
    "set": "SET",
    "rigl": "RigL",
    "gmp": "GMP",
    "granet": "GraNet",
}


def accuracies(sweep: str, sparsity: float) -> dict[str, list[float]]:
    """Read the accuracies in [0, 1] of every method, one for each seed."""
    cells = json.loads((RESULTS / sweep / "results.json").read_text())["cells"]
    return {
        cell["method"]: cell["test_accuracy"]
        for cell in cells
        if cell["sparsity"] in (sparsity, 0.0) and "test_accuracy" in cell
    }


def draw_structure(axes: Axes) -> None:
    """Draw how methods gain where every unit keeps an input."""
    methods = METHODS[1:]
    for sweep, label, colour, shift in (
        ("photos-cnn", "units may die", "#999999", -0.12),
        ("photos-cnn-least", "every unit keeps an input", "#d55e00", 0.12),
    ):
        found = accuracies(sweep, 0.98)
        percent = [[100 * x for x in found[method]] for method in methods]
        axes.errorbar(
            [i + shift for i in range(len(methods))],
            [statistics.mean(x) for x in percent],
            yerr=[statistics.stdev(x) for x in percent],
            color=colour,
            linestyle="none",
            marker="o",
            markersize=7,
            capsize=4,
            label=label,
        )
    axes.set_xticks(range(len(methods)), [NAMES[method] for method in methods])
    axes.set_title("98% sparse, CNN on garments before photographs")
    axes.legend(frameon=False, loc="upper left")


def draw_length(axes: Axes) -> None:
    """Draw how methods compare after trainings of several lengths."""
    found = [accuracies(f"lenet-{epochs}-epochs", 0.95) for epochs in EPOCHS]
    looks = plots.looks(METHODS)
    for i, method in enumerate(METHODS):
        # Not all methods were trained for 160 epochs.
        values = [each[method] for each in found if method in each]
        # A small shift keeps error bars from hiding each other.
        places = [epochs * 1.03 ** (i - 2) for epochs in EPOCHS[: len(values)]]
        plots.draw_accuracies(axes, places, values, looks[method], label=NAMES[method])
    dense = [100 * statistics.mean(each["dense"]) for each in found if "dense" in each]
    axes.plot(EPOCHS[: len(dense)], dense, "k--", label="dense")
    axes.set_xscale("log")
    axes.set_xticks(EPOCHS, [str(epochs) for epochs in EPOCHS])
    axes.minorticks_off()
    axes.set_xlabel("epochs")
    axes.set_title("95% sparse, LeNet-300-100 on Fashion-MNIST")
    axes.legend(frameon=False, bbox_to_anchor=(1, 0.5), loc="center left")


if __name__ == "__main__":
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_structure(left)
    draw_length(right)
    for axes in (left, right):
        axes.set_ylabel("test accuracy / %, mean ± std")
        axes.grid(axis="y", alpha=0.3)
    figure.savefig(HERE / "images" / "results.png", dpi=110)
