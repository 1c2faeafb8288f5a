"""Plots of analysis: they show the numbers given, and nothing lies on anything else."""

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
    """Masks that thin out, of layers with long names."""
    rng = np.random.default_rng(step)
    return {
        f"group_{i}/block_{i:02}/kernel": rng.random((20, 30)) < 0.9 / (1 + i + step)
        for i in range(layers)
    }


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
    "dense mask": lambda: plots.mask(RNG.random((64, 128)) < 0.1, "hidden"),
    "wide mask": lambda: plots.mask(RNG.random((10, 300)) < 0.1),
    "tall mask": lambda: plots.mask(RNG.random((784, 10)) < 0.1),
    "large mask": lambda: plots.mask(RNG.random((3, 3, 256, 512)) < 0.1, "conv"),
    "small filters": lambda: plots.mask(RNG.random((3, 3, 1, 6)) < 0.5, "stem"),
    "stem": lambda: plots.mask(RNG.random((7, 7, 3, 64)) < 0.5, "stem"),
    "inputs": lambda: plots.inputs(RNG.random((784, 30)) < 0.1, (28, 28), "LeNet"),
    "inputs in colour": lambda: plots.inputs(RNG.random((96, 9)) < 0.1, (4, 8, 3)),
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
def test_nothing_lies_on_anything_else(name: str) -> None:
    figure = FIGURES[name]()
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    page = figure.bbox
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box.x0 > page.x0 - 1
        assert box.x1 < page.x1 + 1
        assert box.y0 > page.y0 - 1
        assert box.y1 < page.y1 + 1
        for legend in figure.legends:
            assert not overlap(legend.get_window_extent(), box)
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            boxes = [
                tick.label1.get_window_extent()
                for tick in axis.get_major_ticks()
                if tick.label1.get_text() and low <= tick.get_loc() <= high
            ]
            for one, next_one in itertools.pairwise(boxes):
                assert not overlap(one, next_one)
        assert axes.get_ylabel()
    assert any(axes.get_xlabel() for axes in figure.axes)
    for one, other in itertools.combinations(figure.axes, 2):
        assert not overlap(one.get_tightbbox(), other.get_tightbbox())


def first(figure: Figure) -> Axes:
    return figure.axes[0]


def test_bars_are_densities() -> None:
    found = history()
    axes = first(plots.densities({"a": found[0], "b": found[5]}))
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers if bars]
    for row, sparsity in zip(widths, (found[0], found[5]), strict=True):
        assert row == pytest.approx([100 * (1 - s) for s in sparsity.leaves.values()])
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == [f"group_{i}/block_{i:02}" for i in range(3)]


def test_a_dense_mask_is_shown_cell_by_cell() -> None:
    mask = np.asarray([[1, 0, 0, 1], [0, 1, 0, 0]], bool)
    packed = granet_jax.pack_masks([mask])[0]
    for given in (mask, packed):
        axes = first(plots.mask(given))
        np.testing.assert_array_equal(axes.images[0].get_array(), mask)
        assert axes.get_title() == "3 of 8 weights active (37.50%)"


def test_a_convolution_is_shown_tile_by_tile() -> None:
    mask = np.zeros((2, 3, 4, 5), bool)
    mask[1, 0, 3, 2] = True  # Lower left of the tile in row 3 and column 2.
    image = np.asarray(first(plots.mask(mask)).images[0].get_array())
    assert image.shape == (2 * 4, 3 * 5)
    assert np.argwhere(image).tolist() == [[3 * 2 + 1, 2 * 3]]
    # A sequence's kernel (width, in, out) is one of a single row.
    image = np.asarray(first(plots.mask(mask[0])).images[0].get_array())
    assert image.shape == (4, 3 * 5)


def test_cells_of_a_large_mask_are_means() -> None:
    mask = np.zeros((2501, 6), bool)
    mask[:6, 0] = True
    mask[2500, 5] = True
    image = np.asarray(first(plots.mask(mask)).images[0].get_array())
    assert image.shape == (417, 6)
    # Cells of six rows; the last one has the five that are left.
    assert (image[0, 0], image[416, 5], image.sum()) == (1, 0.2, 1.2)


def test_inputs_are_summed_over_channels() -> None:
    mask = np.zeros((2, 3, 2, 4), bool)  # Rows, columns, channels, units.
    mask[1, 2, 0, :3] = mask[1, 2, 1, 0] = mask[0, 1, 1, 1] = True
    axes = first(plots.inputs(mask.reshape(12, 4), (2, 3, 2)))
    np.testing.assert_array_equal(axes.images[0].get_array(), [[0, 1, 0], [0, 0, 4]])
    assert axes.get_title() == "4 of 6 pixels are not used"


def lines(axes: Axes) -> dict[str, list[float]]:
    return {str(x.get_label()): [*map(float, x.get_ydata())] for x in axes.lines}


def test_lines_over_time() -> None:
    found = history()
    drawn = lines(first(plots.densities_over_time(found)))
    overall = [100 * (1 - s.overall) for s in found.values()]
    assert drawn["all weights"] == pytest.approx(overall)
    of_one = [100 * (1 - s.leaves["group_1/block_01/kernel"]) for s in found.values()]
    assert drawn["group_1/block_01"] == pytest.approx(of_one)
    assert len(drawn) == 4

    before = {"a": np.asarray([[1, 1, 0, 0]], bool)}
    after = {"a": np.asarray([[0, 1, 1, 1]], bool)}
    dropped, grown = plots.churn({3: before, 7: after, 9: after}).axes
    assert lines(dropped)["all weights"] == lines(dropped)["a"] == [50, 0]
    assert lines(grown)["a"] == pytest.approx([200 / 3, 0])
    assert [*dropped.lines[0].get_xdata()] == [7, 9]


def test_exploration_is_over_all_leaves() -> None:
    start = {"a": np.asarray([[1, 1, 0, 0]], bool), "b": np.zeros((2, 2), bool)}
    end = {"a": np.asarray([[0, 1, 1, 0]], bool), "b": np.eye(2, dtype=bool)}
    moving = {0: start, 7: end, 9: start}
    axes = first(plots.exploration({"moving": moving, "still": {0: start, 9: start}}))
    drawn = lines(axes)
    assert drawn["moving"] == [25, 62.5, 62.5]
    assert drawn["still"] == [25, 25]
    assert [*axes.lines[0].get_xdata()] == [0, 7, 9]


def test_schedules_are_those_of_methods() -> None:
    drawn = lines(first(plots.sparsities(METHODS, STEPS)))
    assert drawn["rigl"] == [90.0] * len(drawn["rigl"])
    # At the steps 0, 100, 300 and 500, and to the end.
    assert drawn["acdc"] == [0, 80, 0, 80, 80]
    assert drawn["granet"][:2] == [0, pytest.approx(90 * (1 - 0.8**3))]


def test_accuracies_are_means_over_seeds() -> None:
    given = {"mine": {0.9: [0.5, 0.7], 0.95: [0.4]}, "granet": {0.9: [0.8]}}
    axes = first(plots.accuracies(given, [0.9, 0.92]))
    data = {bars.get_label(): bars.lines[0] for bars in axes.containers}
    assert [*data["mine"].get_ydata()] == pytest.approx([60, 40])
    assert [*data["granet"].get_ydata()] == pytest.approx([80])
    assert data["granet"].get_color() == plots.LOOKS["granet"][0]
    assert data["mine"].get_color() != plots.LOOKS["granet"][0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["90%", "95%"]
    (dense,) = [line for line in axes.lines if line.get_label() == "dense"]
    assert [*dense.get_ydata()] == pytest.approx([91, 91])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.densities({}), "networks must hold"),
        (
            lambda: plots.densities({"a": history()[0], "b": history(2)[0]}),
            "networks must be of the same leaves",
        ),
        (lambda: plots.densities_over_time({}), "history must hold"),
        (lambda: plots.churn({0: masks(0)}), "two masks or more, got 1"),
        (lambda: plots.exploration({}), "histories must hold masks"),
        (lambda: plots.exploration({"a": {}}), r"histories\['a'\] must hold masks"),
        (lambda: plots.mask(np.ones(3, bool)), r"got shape \(3,\)"),
        (lambda: plots.inputs(np.ones((9, 2), bool), (2, 5)), "the 10 pixels"),
        (lambda: plots.accuracies({}), "must hold accuracies"),
        (lambda: plots.sparsities({}, 3), "methods must hold records"),
    ],
)
def test_nonsense(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_numbers_need_neither_matplotlib_nor_rich() -> None:
    """Nor do plots touch pyplot, which would open windows."""
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
