"""Draw how the methods compare after short and long trainings, and print the table.

    python docs/lengths_figure.py

It reads `experiments/results/lenet-*-epochs`, which the sweeps of the same names wrote,
and writes `docs/images/training_length.png`.
"""

import json
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from granet_jax.analysis import plots  # noqa: E402

RESULTS = HERE.parent / "experiments" / "results"
EPOCHS = (12, 60, 160)
METHODS = ("dense", "static", "set", "rigl", "gmp", "granet")
PAIRS = (("granet", "gmp"), ("gmp", "rigl"), ("rigl", "set"), ("set", "static"))


def read() -> dict[str, list[list[float]]]:
    """Read the accuracies in [0, 1] of every method, by length and seed."""
    accuracies: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    for epochs in EPOCHS:
        path = RESULTS / f"lenet-{epochs}-epochs" / "results.json"
        cells = json.loads(path.read_text())["cells"]
        found = {cell["method"]: cell["test_accuracy"] for cell in cells}
        for method in METHODS:
            accuracies[method].append(found[method])
    return accuracies


def gains(first: list[list[float]], second: list[list[float]]) -> list[list[float]]:
    """Subtract the accuracies of two methods, paired by seed."""
    return [
        [a - b for a, b in zip(x, y, strict=True)]
        for x, y in zip(first, second, strict=True)
    ]


def table(accuracies: dict[str, list[list[float]]]) -> str:
    """Format all means and differences, with their standard deviations."""
    rows = dict(accuracies)
    for first, second in PAIRS:
        rows[f"{first} - {second}"] = gains(accuracies[first], accuracies[second])
    lines = [["", *(f"{epochs} epochs" for epochs in EPOCHS)]]
    lines.append(["---", *["---:"] * len(EPOCHS)])
    for name, values in rows.items():
        sign = "+" if " - " in name else ""
        cells = (
            f"{100 * statistics.mean(x):{sign}.2f} ± {100 * statistics.stdev(x):.2f}"
            for x in values
        )
        lines.append([name, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(accuracies: dict[str, list[list[float]]], path: Path) -> None:
    """Draw accuracies on the left, and differences between methods on the right."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    looks = plots.looks(METHODS[1:])
    left.set_title("accuracy")
    for i, method in enumerate(METHODS[1:]):
        # A small shift keeps error bars from hiding each other.
        places = [epochs * 1.02 ** (i - 2) for epochs in EPOCHS]
        plots.draw_accuracies(
            left, places, accuracies[method], looks[method], label=method
        )
    dense = [100 * statistics.mean(x) for x in accuracies["dense"]]
    left.plot(EPOCHS, dense, color="black", linestyle="--", label="dense")
    left.set_ylabel("test accuracy / %, mean ± std")
    left.legend(frameon=False)
    right.set_title("differences, paired by seed")
    for i, (first, second) in enumerate(PAIRS[:3]):
        places = [epochs * 1.02 ** (i - 1) for epochs in EPOCHS]
        values = gains(accuracies[first], accuracies[second])
        label = f"{first} - {second}"
        plots.draw_accuracies(right, places, values, looks[first], label=label)
    right.axhline(0, color="black", linewidth=0.8)
    right.set_ylabel("points, mean ± std")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(EPOCHS, [str(epochs) for epochs in EPOCHS])
        axes.minorticks_off()
        axes.set_xlabel("epochs")
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle("LeNet-300-100 on Fashion-MNIST, 95% sparse, 75 mask updates")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    all_accuracies = read()
    draw(all_accuracies, HERE / "images" / "training_length.png")
    sys.stdout.write(f"{table(all_accuracies)}\n")
