"""Plots of sparse networks. Each function returns a matplotlib `Figure`.

    figure = plots.densities({"GraNet": granet_jax.sparsity(masks)})
    figure.savefig("densities.png", dpi=150)

The functions do not use pyplot, so no window opens. In a notebook, run
`%matplotlib inline` once; the notebook then shows a figure that is the last expression
of a cell, and `IPython.display.display(figure)` shows one anywhere else. Install
matplotlib with `pip install 'granet_jax[analysis]'`.
"""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from granet_jax.analysis.metrics import churn as mask_churn
from granet_jax.analysis.metrics import exploration_over_time
from granet_jax.analysis.named_leaves import named_masks
from granet_jax.checks import (
    check_fraction,
    check_integer,
    check_sparsity,
    check_steps,
    check_type,
)
from granet_jax.masking import PyTree, Sparsity
from granet_jax.methods import Method

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Look = tuple[str, str]

# Colour-blind readers can tell these colours apart: first those of Okabe and Ito, with
# grey instead of yellow, which is too pale on white, then darker ones of Tol. Dense
# training is black.
LOOKS: dict[str, Look] = {
    "granet": ("#D55E00", "o"),
    "granet-st": ("#E69F00", "s"),
    "gmp": ("#0072B2", "^"),
    "rigl": ("#009E73", "D"),
    "set": ("#CC79A7", "v"),
    "snfs": ("#777777", "P"),
    "static": ("#56B4E9", "X"),
    "cyclical": ("#332288", ">"),
    "acdc": ("#44AA99", "<"),
    "sculpt": ("#AA4499", "p"),
    "straight-through": ("#882255", "h"),
    "top-kast": ("#999933", "d"),
    "greg2": ("#661100", "*"),
}
"""Colour and marker of each method, by its name in the experiments."""

_STYLES = ("-", "--", "-.", ":")
_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++")
_ORDER = ("gmp", "granet", "rigl", "set", "granet-st", "static", "snfs", "cyclical")
# With more layers than this, a colour bar replaces the names in the legend.
_MAX_NAMED_LAYERS = 10
# Larger masks are averaged down to at most this many cells along each side, so that a
# cell covers at least one pixel.
_MAX_CELLS = 500
# With more tiles than this along a side, lines between the tiles would hide them.
_MAX_TILES = 64


def looks(labels: Iterable[str]) -> dict[str, Look]:
    """Return a colour and a marker for each label.

    Labels that `LOOKS` names keep their own; other labels take those of a method that
    is not among the labels.
    """
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise TypeError(f"labels must be several strings, got {labels!r}.")
    labels = list(labels)
    for label in labels:
        check_type("labels", label, str, "strings")
    unused = itertools.cycle([m for m in LOOKS if m not in labels] or LOOKS)
    return {name: LOOKS[name if name in LOOKS else next(unused)] for name in labels}


def densities(networks: Mapping[str, Sparsity]) -> "Figure":
    """Draw the density of every layer as bars, for one or several networks.

    Args:
      networks: `granet_jax.sparsity(masks)` by the name of the network, all of the same
        leaves.

    Raises:
      ValueError: No networks, or networks of different leaves.
    """
    leaves = _common_leaves("networks", networks)
    rows = len(leaves) * max(len(networks), 1.3)
    figure = _figure(7.0, min(1.4 + 0.16 * rows, 60.0))
    axes = figure.subplots()
    draw_bars(
        axes,
        {
            name: {leaf: 1.0 - s for leaf, s in network.leaves.items()}
            for name, network in networks.items()
        },
    )
    if len(networks) > 1:
        figure.legend(loc="outside right upper", frameon=False)
        axes.set_title("Density of each layer")
    else:
        axes.set_title(f"Density of each layer: {next(iter(networks))}")
    return figure


def draw_bars(axes: "Axes", networks: Mapping[str, Mapping[str, float]]) -> None:
    """Draw densities in [0, 1] as bars on `axes`, by network and leaf."""
    leaves = list(next(iter(networks.values())))
    height = 0.8 / len(networks)
    for i, (name, densities) in enumerate(networks.items()):
        offset = (i - (len(networks) - 1) / 2) * height
        bars = axes.barh(
            [j + offset for j in range(len(leaves))],
            [100 * densities[leaf] for leaf in leaves],
            height * 0.92,
            color=_colour(i),
            hatch=_HATCHES[i % len(_HATCHES)],
            edgecolor="white",
            label=name,
        )
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=9 if height > 0.3 else 7)
    axes.set_yticks(
        range(len(leaves)), [leaf.replace("/kernel", "") for leaf in leaves]
    )
    axes.set_ylim(len(leaves) - 0.5, -0.5)
    axes.set(xlabel="active weights / % of the layer", ylabel="layer", xlim=(0, 114))
    axes.set_xticks(range(0, 101, 20))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def mask(mask: Any, title: str = "") -> "Figure":
    """Draw a mask as an image in which active weights are dark.

    A dense kernel (inputs, outputs) has its inputs from top to bottom and its outputs
    from left to right. A convolution (height, width, inputs, outputs) is a grid of
    tiles, one for each pair of channels. In a large mask, one cell of the image shows
    the density of several weights.

    Args:
      mask: Boolean mask of two axes or more, packed or not.
      title: Title of the figure.

    Raises:
      ValueError: A mask with fewer than two axes, or without weights.
    """
    array = _kernel_mask(mask)
    *kernel, inputs, outputs = array.shape
    height = kernel[0] if len(kernel) > 1 else 1
    width = math.prod(kernel) // height
    tiles = array.reshape(height, width, inputs, outputs).transpose(2, 0, 3, 1)
    cells = tiles.reshape(inputs * height, outputs * width).astype(float)
    cells = _averaged(cells, *(math.ceil(n / _MAX_CELLS) for n in cells.shape))
    rows, columns = cells.shape
    # Cells are square unless that would make the figure too long for a page.
    aspect = min(max(rows / columns, 0.2), 3.0)
    is_square = aspect == rows / columns
    figure = _figure(6.0, min(max(6.0 * aspect, 2.0), 8.5) + 0.7)
    axes = figure.subplots()
    axes.imshow(
        cells,
        cmap="Greys",
        vmin=0.0,
        vmax=1.0,
        interpolation="nearest",
        aspect="equal" if is_square else "auto",
        extent=(0, outputs * width, inputs * height, 0),
    )
    active = int(np.count_nonzero(array))
    text = f"{active:,} of {array.size:,} weights active ({active / array.size:.2%})"
    axes.set_title(f"{title}\n{text}" if title else text, fontsize=11)
    if kernel:
        size = " x ".join(map(str, kernel))
        axes.set_xlabel(f"output channel (each tile is a {size} kernel)")
        axes.set_ylabel("input channel")
        _label_tiles(axes, (inputs, outputs), (height, width))
    else:
        axes.set(xlabel="output unit", ylabel="input unit")
    return figure


def inputs(mask: Any, image_shape: Sequence[int], title: str = "") -> "Figure":
    """Draw how many weights of each pixel the first layer keeps.

    Args:
      mask: Mask of a dense kernel (pixels, units), packed or not. Its pixels are those
        of an image, flattened row by row with channels last.
      image_shape: Shape (height, width) or (height, width, channels).
      title: Title of the figure.

    Raises:
      ValueError: A mask that does not fit images of this shape.
    """
    array = _kernel_mask(mask)
    check_type("image_shape", image_shape, Sequence, "(height, width) or with channels")
    for side in image_shape:
        check_integer("image_shape", side, least=1)
    if not 2 <= len(image_shape) <= 3:
        raise ValueError(
            "image_shape must be (height, width) or (height, width, channels), got "
            f"{image_shape}."
        )
    height, width, *channels = image_shape
    if array.ndim != 2 or array.shape[0] != math.prod(image_shape):
        raise ValueError(
            f"mask must be (pixels, units), with the {math.prod(image_shape)} pixels "
            f"of image_shape={tuple(image_shape)}, got shape {array.shape}."
        )
    kept = array.sum(axis=1).reshape(height, width, -1).sum(axis=-1)
    figure = _figure(5.6, 4.9 * max(height / width, 0.7) + 0.3)
    axes = figure.subplots()
    image = axes.imshow(kept, cmap="cividis", vmin=0, interpolation="nearest")
    weights = array.shape[1] * math.prod(channels)
    figure.colorbar(image, label=f"active weights of a pixel, of {weights:,}")
    unused = int(np.count_nonzero(kept == 0))
    text = f"{unused:,} of {kept.size:,} pixels are not used"
    axes.set_title(f"{title}\n{text}" if title else text, fontsize=11)
    axes.set(xlabel="column / pixels", ylabel="row / pixels")
    return figure


def densities_over_time(
    history: Mapping[int, Sparsity], title: str = "Density over the training"
) -> "Figure":
    """Draw the density of every layer, and of all weights together, over the steps.

    Args:
      history: `granet_jax.sparsity(masks)` by step.
      title: Title of the figure.

    Raises:
      ValueError: An empty history, or different leaves at different steps.
    """
    leaves = _common_leaves("history", history)
    steps = sorted(history)
    lines = {
        leaf: [100 * (1.0 - history[step].leaves[leaf]) for step in steps]
        for leaf in leaves
    }
    figure = _figure(8.5, 4.6)
    axes = figure.subplots()
    _draw_layers(figure, [axes], steps, [lines], "steps-post")
    overall = [100 * (1.0 - history[step].overall) for step in steps]
    _draw_total(axes, steps, overall, "steps-post")
    axes.set(
        title=title,
        xlabel="optimizer steps",
        ylabel="active weights / % of the layer",
        ylim=(-3, 103),
    )
    _finish(figure, axes)
    return figure


def churn(
    history: Mapping[int, PyTree], title: str = "Weights that updates exchange"
) -> "Figure":
    """Draw the fraction of weights that change from one tree of masks to the next.

    Args:
      history: Two or more trees of masks by step, for example one for each update.
      title: Title of the figure.

    Raises:
      ValueError: Fewer than two trees of masks, or trees of different leaves.
    """
    check_type("history", history, Mapping, "trees of masks by step")
    if len(history) < 2:
        raise ValueError(f"history must hold two masks or more, got {len(history)}.")
    steps = sorted(history)
    for step in steps:
        named_masks(history[step], f"history[{step}]")
    changes = [mask_churn(history[a], history[b]) for a, b in itertools.pairwise(steps)]
    figure = _figure(8.5, 6.0)
    dropped, grown = figure.subplots(2, 1, sharex=True)
    lines = [
        {
            leaf: [100 * getattr(change.leaves[leaf], field) for change in changes]
            for leaf in changes[0].leaves
        }
        for field in ("dropped", "grown")
    ]
    _draw_layers(figure, [dropped, grown], steps[1:], lines, "default")
    for axes, field in ((dropped, "dropped"), (grown, "grown")):
        total = [100 * getattr(change.total, field) for change in changes]
        _draw_total(axes, steps[1:], total, "default")
        axes.set_ylim(bottom=0)
    dropped.set(title=title, ylabel="dropped / % of those\nactive before")
    grown.set(xlabel="optimizer steps", ylabel="grown / % of those\nactive after")
    _finish(figure, dropped, grown)
    return figure


def exploration(
    histories: Mapping[str, Mapping[int, PyTree]],
    title: str = "Weights that were active at least once",
) -> "Figure":
    """Draw the exploration rate R_s over the steps, with one line for each network.

    Args:
      histories: Trees of masks by step, by the name of the network: for example those
        of step 0 and after every update.
      title: Title of the figure.

    Raises:
      ValueError: No networks, no masks, or different leaves in one history.
    """
    check_type("histories", histories, Mapping, "trees of masks by step, by network")
    if not histories:
        raise ValueError("histories must hold masks by network, got none.")
    for name, history in histories.items():
        check_type(f"histories[{name!r}]", history, Mapping, "trees of masks by step")
        if not history:
            raise ValueError(f"histories[{name!r}] must hold masks, got none.")
    figure = _figure(8.5, 4.6)
    axes = figure.subplots()
    for i, (name, history) in enumerate(histories.items()):
        rates = exploration_over_time(history)
        axes.step(
            [*rates],
            [100 * rate.total for rate in rates.values()],
            where="post",
            color=_colour(i),
            linestyle=_STYLES[i % len(_STYLES)],
            linewidth=1.8,
            label=name,
        )
    axes.set(
        title=title,
        xlabel="optimizer steps",
        ylabel="exploration rate $R_s$ / %",
        ylim=(-3, 103),
    )
    _finish(figure, axes)
    return figure


def accuracies(
    methods: Mapping[str, Mapping[float, Sequence[float]]],
    dense: Sequence[float] = (),
    title: str = "",
) -> "Figure":
    """Draw accuracy against sparsity: means and deviations over seeds.

    Args:
      methods: Accuracies in [0, 1], one for each seed, by sparsity in [0, 1), by
        method. Methods that `LOOKS` names look as in the experiments.
      dense: Accuracies of dense training to compare with, if any.
      title: Title of the figure.

    Raises:
      ValueError: No accuracies.
    """
    check_type("methods", methods, Mapping, "accuracies by sparsity, by method")
    for name, points in methods.items():
        for sparsity, values in points.items():
            check_sparsity(f"methods[{name!r}]", sparsity)
            _check_accuracies(f"methods[{name!r}][{sparsity}]", values)
            if not values:
                raise ValueError(
                    f"methods[{name!r}][{sparsity}] must hold accuracies, got none."
                )
    _check_accuracies("dense", dense)
    sparsities = sorted({s for points in methods.values() for s in points})
    if not sparsities:
        raise ValueError(f"methods must hold accuracies, got {methods!r}.")
    figure = _figure(8.0, 5.0)
    axes = figure.subplots()
    positions = {s: i for i, s in enumerate(sparsities)}
    for i, (name, look) in enumerate(looks(methods).items()):
        points = sorted(methods[name].items())
        # A small shift keeps the error bars of different methods apart.
        shift = 0.035 * (i - (len(methods) - 1) / 2)
        places = [positions[s] + shift for s, _ in points]
        draw_accuracies(axes, places, [values for _, values in points], look, name)
    if dense:
        draw_dense(axes, dense)
    axes.set_xlim(-0.4, len(sparsities) - 0.6)
    axes.set_xticks(range(len(sparsities)), [f"{100 * s:.10g}%" for s in sparsities])
    has_deviations = any(
        len(values) > 1 for points in methods.values() for values in points.values()
    )
    axes.set(
        title=title,
        xlabel="sparsity (share of all weights that are zero)",
        ylabel=f"accuracy / %{', mean ± std' if has_deviations else ''}",
    )
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def draw_accuracies(
    axes: "Axes",
    places: Sequence[float],
    values: Sequence[Sequence[float]],
    look: Look,
    label: str,
) -> None:
    """Draw a line of mean accuracies on `axes`, with sample standard deviations.

    Args:
      axes: Axes to draw on.
      places: Horizontal position of each point.
      values: Accuracies in [0, 1] of each point, one for each seed.
      look: Colour and marker, as in `LOOKS`.
      label: Label in the legend.
    """
    percentages = [[100 * x for x in seeds] for seeds in values]
    errors = [statistics.stdev(x) if len(x) > 1 else 0.0 for x in percentages]
    colour, marker = look
    axes.errorbar(
        places,
        [statistics.mean(x) for x in percentages],
        yerr=errors if any(errors) else None,
        color=colour,
        marker=marker,
        markersize=7,
        markeredgecolor="white",
        markeredgewidth=0.6,
        linewidth=1.6,
        elinewidth=1.2,
        capsize=2.5,
        label=label,
    )


def draw_dense(axes: "Axes", accuracies: Sequence[float]) -> None:
    """Draw mean and deviation of dense training across the whole width of `axes`."""
    values = [100 * accuracy for accuracy in accuracies]
    mean = statistics.mean(values)
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    axes.axhline(mean, color="black", linestyle="--", linewidth=1.2, label="dense")
    axes.axhspan(mean - std, mean + std, color="black", alpha=0.12, linewidth=0)


def sparsities(methods: Mapping[str, Method], total_steps: int) -> "Figure":
    """Draw the sparsity that methods prescribe over the steps of a training run.

    Args:
      methods: Records such as `granet_jax.granet(...)`, by name.
      total_steps: Number of optimizer steps.

    Raises:
      ValueError: No methods.
    """
    check_type("methods", methods, Mapping, "records such as granet_jax.rigl(...)")
    if not methods:
        raise ValueError("methods must hold records, got none.")
    for name, method in methods.items():
        check_type(f"methods[{name!r}]", method, Method, "a record")
    check_steps("total_steps", total_steps)
    figure = _figure(8.5, 4.6)
    axes = figure.subplots()
    styles = itertools.cycle(_STYLES)
    for (name, (colour, _)), style in zip(looks(methods).items(), styles, strict=False):
        method = methods[name]
        steps = [0, *(t for t in method.updates.steps() if t <= total_steps)]
        values = [100 * method.sparsity(step) for step in steps]
        axes.step(
            [*steps, total_steps],
            [*values, values[-1]],
            where="post",
            color=colour,
            linestyle=style,
            linewidth=1.8,
            label=name,
        )
    axes.set(
        title="Sparsity of all weights that masks cover",
        xlabel="optimizer steps",
        ylabel="sparsity / %",
        ylim=(-3, 103),
    )
    _finish(figure, axes)
    return figure


def _check_accuracies(name: str, values: Any) -> None:
    check_type(name, values, Sequence | np.ndarray, "a sequence of accuracies")
    for value in values:
        check_fraction(name, value)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _colour(i: int) -> str:
    colour, _ = LOOKS[_ORDER[i % len(_ORDER)]]
    return colour


def _common_leaves(name: str, sparsities: Mapping[Any, Sparsity]) -> list[str]:
    check_type(name, sparsities, Mapping, "granet_jax.sparsity(masks), by a name")
    for key, value in sparsities.items():
        check_type(f"{name}[{key!r}]", value, Sparsity, "a granet_jax.sparsity(masks)")
    if not sparsities:
        raise ValueError(f"{name} must hold granet_jax.sparsity(masks), got none.")
    first, *others = (list(s.leaves) for s in sparsities.values())
    for leaves in others:
        if leaves != first:
            raise ValueError(
                f"{name} must be of the same leaves, got {first} and {leaves}."
            )
    return first


def _kernel_mask(mask: Any) -> np.ndarray:
    (array,) = named_masks(mask, "mask").values()
    if array.ndim < 2 or not array.size:
        raise ValueError(
            f"mask must have weights and two axes or more, got shape {array.shape}."
        )
    return array


def _averaged(cells: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Average blocks of cells; blocks at the edges may be smaller."""
    for axis, step in enumerate((rows, columns)):
        starts = np.arange(0, cells.shape[axis], step)
        lengths = np.diff([*starts, cells.shape[axis]])
        sums = np.add.reduceat(cells, starts, axis=axis)
        cells = sums / np.expand_dims(lengths, 1 - axis)
    return cells


def _label_tiles(
    axes: "Axes", channels: tuple[int, int], kernel: tuple[int, int]
) -> None:
    """Number the channels along both axes, and draw lines between the tiles."""
    for axis, number, size in zip(
        (axes.yaxis, axes.xaxis), channels, kernel, strict=True
    ):
        step = max(1, 2 ** math.ceil(math.log2(number / 12)))
        ticks = np.arange(0, number, step)
        axis.set_ticks((ticks + 0.5) * size, [str(n) for n in ticks])
    if max(channels) <= _MAX_TILES and math.prod(kernel) > 1:
        for n in range(1, channels[0]):
            axes.axhline(n * kernel[0], color="#E69F00", linewidth=0.8)
        for n in range(1, channels[1]):
            axes.axvline(n * kernel[1], color="#E69F00", linewidth=0.8)


def _draw_layers(
    figure: "Figure",
    panels: Sequence["Axes"],
    steps: list[int],
    lines: Sequence[Mapping[str, list[float]]],
    drawstyle: Literal["default", "steps-post"],
) -> None:
    """Draw a line for each layer on each panel; a colour bar identifies many layers."""
    from matplotlib import cm, colormaps, colors

    names = list(lines[0])
    many = len(names) > _MAX_NAMED_LAYERS
    colours = [_colour(i) for i in range(len(names))]
    if many:
        # The palest tenth of the colour map would be hard to see on white.
        scale = colors.Normalize(1, len(names) / 0.9)
        colours = [colormaps["viridis"](scale(i + 1)) for i in range(len(names))]
        bar = cm.ScalarMappable(
            colors.Normalize(1, len(names)),
            colors.ListedColormap(colormaps["viridis"](np.linspace(0, 0.9, 256))),
        )
        figure.colorbar(bar, ax=list(panels), label="layer, in their order", aspect=30)
    for axes, by_layer in zip(panels, lines, strict=True):
        for i, (name, values) in enumerate(by_layer.items()):
            axes.plot(
                steps,
                values,
                color=colours[i],
                linestyle="-" if many else _STYLES[i % len(_STYLES)],
                linewidth=1.0 if many else 1.7,
                marker="." if drawstyle == "default" and len(steps) < 60 else "",
                drawstyle=drawstyle,
                label=None if many else name.replace("/kernel", ""),
            )


def _draw_total(
    axes: "Axes",
    steps: list[int],
    values: list[float],
    drawstyle: Literal["default", "steps-post"],
) -> None:
    axes.plot(
        steps,
        values,
        color="black",
        linewidth=2.4,
        drawstyle=drawstyle,
        label="all weights",
    )


def _finish(figure: "Figure", axes: "Axes", *others: "Axes") -> None:
    """Add grids, thousands separators, and one legend next to the axes."""
    for panel in (axes, *others):
        panel.grid(alpha=0.3)
        panel.margins(x=0.01)
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False)
