"""Plots show the numbers they are given, and no element covers another."""

import itertools
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import granet_jax
from granet_jax.analysis import plots

RNG = np.random.default_rng(0)
STEPS = 1000


def masks(step: int, layers: int = 3) -> dict[str, Any]:
    """Masks that become sparser, of layers with long names."""
    rng = np.random.default_rng(step)
    return {
        f"group_{i}/block_{i:02}/kernel": rng.random((20, 30)) < 0.9 / (1 + i + step)
        for i in range(layers)
    }


def random_mask(*shape: int, density: float = 0.1) -> np.ndarray:
    return RNG.random(shape) < density


def history(layers: int = 3) -> dict[int, granet_jax.Sparsity]:
    return {t: granet_jax.sparsity(masks(t, layers)) for t in (0, 5, 10)}


METHODS = {
    "granet": granet_jax.granet(0.9, STEPS, interval=100),
    "rigl": granet_jax.rigl(0.9, STEPS),
    "acdc": granet_jax.acdc(0.8, [100, 300, 500]),
    "mine": granet_jax.gmp(0.5, STEPS, interval=50),
}
FIGURES: dict[str, Any] = {
    "one network": lambda: plots.densities({"GraNet": history()[5]}),
    "three networks": lambda: plots.densities(
        {f"network {t}": s for t, s in history(12).items()}
    ),
    "many layers": lambda: plots.densities({"GraNet": history(54)[0]}),
    "dense mask": lambda: plots.mask(random_mask(64, 128), "hidden"),
    "wide mask": lambda: plots.mask(random_mask(10, 300)),
    "tall mask": lambda: plots.mask(random_mask(784, 10)),
    "large mask": lambda: plots.mask(random_mask(3, 3, 256, 512), "conv"),
    "small filters": lambda: plots.mask(random_mask(3, 3, 1, 6, density=0.5), "stem"),
    "stem": lambda: plots.mask(random_mask(7, 7, 3, 64, density=0.5), "stem"),
    "inputs": lambda: plots.inputs(random_mask(784, 30), (28, 28), "LeNet"),
    "inputs in colour": lambda: plots.inputs(random_mask(96, 9), (4, 8, 3)),
    "densities over time": lambda: plots.densities_over_time(history()),
    "of many layers": lambda: plots.densities_over_time(history(40)),
    "churn": lambda: plots.churn({t: masks(t) for t in (0, 5, 10)}),
    "churn of many": lambda: plots.churn({t: masks(t, 30) for t in range(0, 90, 3)}),
    "exploration": lambda: plots.exploration(
        {m: {t: masks(t + i) for t in (0, 5, 10)} for i, m in enumerate(METHODS)}
    ),
    "accuracies": lambda: plots.accuracies(
        {m: {s: [0.9 - s / 9, 0.91 - s / 9] for s in (0.9, 0.98)} for m in METHODS},
        [0.93, 0.92],
        "A network on data",
    ),
    "schedules": lambda: plots.sparsities(METHODS, STEPS),
}


def overlap(a: Any, b: Any) -> bool:
    """Whether two boxes have more than a pixel in common."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    return width > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_covers_anything_else(name: str) -> None:
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    page = figure.bbox
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for axes, box in zip(figure.axes, boxes, strict=True):
        assert page.x0 - 1 < box.x0 < box.x1 < page.x1 + 1
        assert page.y0 - 1 < box.y0 < box.y1 < page.y1 + 1
        for legend in figure.legends:
            assert not overlap(legend.get_window_extent(), box)
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            labels = [
                tick.label1.get_window_extent()
                for tick in axis.get_major_ticks()
                if tick.label1.get_text() and low <= tick.get_loc() <= high
            ]
            assert not any(overlap(*pair) for pair in itertools.pairwise(labels))
        assert axes.get_ylabel()
    assert any(axes.get_xlabel() for axes in figure.axes)
    assert not any(overlap(*pair) for pair in itertools.combinations(boxes, 2))


def image(figure: Figure) -> np.ndarray:
    return np.asarray(figure.axes[0].images[0].get_array())


def lines(axes: Axes) -> dict[str, list[float]]:
    return {str(x.get_label()): [*map(float, x.get_ydata())] for x in axes.lines}


def test_bars_are_densities() -> None:
    networks = {"a": history()[0], "b": history()[5]}
    axes = plots.densities(networks).axes[0]
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers if bars]
    for row, sparsity in zip(widths, networks.values(), strict=True):
        assert row == pytest.approx([100 * (1 - s) for s in sparsity.leaves.values()])
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == [f"group_{i}/block_{i:02}" for i in range(3)]


def test_images_of_masks() -> None:
    dense = np.asarray([[1, 0, 0, 1], [0, 1, 0, 0]], bool)
    for given in (dense, granet_jax.pack_masks([dense])[0]):
        figure = plots.mask(given)
        np.testing.assert_array_equal(image(figure), dense)
        assert figure.axes[0].get_title() == "3 of 8 weights active (37.50%)"
    conv = np.zeros((2, 3, 4, 5), bool)
    conv[1, 0, 3, 2] = True  # Lower left of the tile in row 3 and column 2.
    assert image(plots.mask(conv)).shape == (2 * 4, 3 * 5)
    assert np.argwhere(image(plots.mask(conv))).tolist() == [[3 * 2 + 1, 2 * 3]]
    # The kernel (width, in, out) of a sequence has tiles of a single row.
    assert image(plots.mask(conv[0])).shape == (4, 3 * 5)
    large = np.zeros((2501, 6), bool)
    large[:6, 0] = large[2500, 5] = True
    cells = image(plots.mask(large))
    # A cell averages six rows; the last cell has the remaining five.
    assert cells.shape == (417, 6)
    assert (cells[0, 0], cells[416, 5], cells.sum()) == (1, 0.2, 1.2)


def test_inputs_are_summed_over_channels() -> None:
    mask = np.zeros((2, 3, 2, 4), bool)  # Rows, columns, channels, units.
    mask[1, 2, 0, :3] = mask[1, 2, 1, 0] = mask[0, 1, 1, 1] = True
    figure = plots.inputs(mask.reshape(12, 4), (2, 3, 2))
    np.testing.assert_array_equal(image(figure), [[0, 1, 0], [0, 0, 4]])
    assert figure.axes[0].get_title() == "4 of 6 pixels are not used"


def test_lines_over_time() -> None:
    drawn = lines(plots.densities_over_time(history()).axes[0])
    overall = [100 * (1 - s.overall) for s in history().values()]
    assert drawn["all weights"] == pytest.approx(overall)
    leaf = "group_1/block_01"
    densities = [100 * (1 - s.leaves[f"{leaf}/kernel"]) for s in history().values()]
    assert drawn[leaf] == pytest.approx(densities)
    assert len(drawn) == 4

    before = {"a": np.asarray([[1, 1, 0, 0]], bool)}
    after = {"a": np.asarray([[0, 1, 1, 1]], bool)}
    dropped, grown = plots.churn({3: before, 7: after, 9: after}).axes
    assert lines(dropped)["all weights"] == lines(dropped)["a"] == [50, 0]
    assert lines(grown)["a"] == pytest.approx([200 / 3, 0])
    assert [*dropped.lines[0].get_xdata()] == [7, 9]

    start = {"a": np.asarray([[1, 1, 0, 0]], bool), "b": np.zeros((2, 2), bool)}
    end = {"a": np.asarray([[0, 1, 1, 0]], bool), "b": np.eye(2, dtype=bool)}
    moving = {0: start, 7: end, 9: start}
    axes = plots.exploration({"moving": moving, "still": {0: start, 9: start}}).axes[0]
    assert lines(axes) == {"moving": [25, 62.5, 62.5], "still": [25, 25]}
    assert [*axes.lines[0].get_xdata()] == [0, 7, 9]

    drawn = lines(plots.sparsities(METHODS, STEPS).axes[0])
    assert drawn["rigl"] == [90.0] * len(drawn["rigl"])
    # At steps 0, 100, 300 and 500, and at the end.
    assert drawn["acdc"] == [0, 80, 0, 80, 80]
    assert drawn["granet"][:2] == [0, pytest.approx(90 * (1 - 0.8**3))]


def test_accuracies_are_means_over_seeds() -> None:
    points = {"mine": {0.9: [0.5, 0.7], 0.95: [0.4]}, "granet": {0.9: [0.8]}}
    axes = plots.accuracies(points, [0.9, 0.92]).axes[0]
    drawn = {bars.get_label(): bars.lines[0] for bars in axes.containers}
    assert [*drawn["mine"].get_ydata()] == pytest.approx([60, 40])
    assert [*drawn["granet"].get_ydata()] == pytest.approx([80])
    assert drawn["granet"].get_color() == plots.LOOKS["granet"][0]
    assert drawn["mine"].get_color() != plots.LOOKS["granet"][0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["90%", "95%"]
    assert lines(axes)["dense"] == pytest.approx([91, 91])


def test_analysis_loads_neither_matplotlib_nor_rich_nor_pyplot() -> None:
    code = """
import sys, numpy as np, granet_jax
from granet_jax import analysis
from granet_jax.analysis import plots
masks = {"w": np.ones((2, 2), bool)}
str(analysis.summary({"w": np.ones((2, 2))}, masks))
assert not {"matplotlib", "rich"} & set(sys.modules)
plots.densities({"a": granet_jax.sparsity(masks)})
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
