"""Pictures of sparse networks: each function returns a matplotlib `Figure`.

    figure = plots.densities({"GraNet": granet_jax.sparsity(masks)})
    figure.savefig("densities.png", dpi=150)

No state of pyplot is touched: nothing is shown by itself, and no window opens. A
notebook draws the figure that a cell ends with once `%matplotlib inline` was run, which
tells it how; `IPython.display.display(figure)` does so in the middle of a cell.
Matplotlib comes with `pip install 'granet_jax[analysis]'`.
"""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from granet_jax.analysis.metrics import churn as changes
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

# Okabe and Ito's colours, which the colour-blind tell apart, with grey for the yellow
# that white paper swallows, and then Tol's darker ones; dense is black.
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
"""Colour and marker of methods, by their names in the experiments."""

_STYLES = ("-", "--", "-.", ":")
_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++")
# More lines than this have colours in order, on a bar, instead of names.
_MOST_NAMES = 10
# An image has no more cells than this a side, a pixel each at least; those of larger
# masks are averaged.
_MOST_CELLS = 500
# Lines between more tiles a side would hide them.
_MOST_TILES = 64


def looks(labels: Iterable[str]) -> dict[str, Look]:
    """Colour and marker of every label: a method's own, or those of one not there."""
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise TypeError(f"labels must be several strings, got {labels!r}.")
    labels = list(labels)
    for label in labels:
        check_type("labels", label, str, "strings")
    free = itertools.cycle([m for m in LOOKS if m not in labels] or LOOKS)
    return {name: LOOKS[name if name in LOOKS else next(free)] for name in labels}


def densities(networks: Mapping[str, Sparsity]) -> "Figure":
    """Density of every layer, as bars, of one network or several.

    Args:
      networks: `granet_jax.sparsity(masks)` by the name of the network; of the same
        leaves.

    Raises:
      ValueError: no networks, or of other leaves.
    """
    leaves = _leaves("networks", networks)
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
    """Densities in [0, 1] of the same leaves, by network, as bars on `axes`."""
    leaves = list(next(iter(networks.values())))
    height = 0.8 / len(networks)
    colours = [colour for colour, _ in _by_number(len(networks))]
    for i, (name, found) in enumerate(networks.items()):
        bars = axes.barh(
            [j + (i - (len(networks) - 1) / 2) * height for j in range(len(leaves))],
            [100 * found[leaf] for leaf in leaves],
            height * 0.92,
            color=colours[i],
            hatch=_HATCHES[i % len(_HATCHES)],
            edgecolor="white",
            label=name,
        )
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=9 if height > 0.3 else 7)
    axes.set_yticks(
        range(len(leaves)), [leaf.replace("/kernel", "") for leaf in leaves]
    )
    axes.set_ylim(len(leaves) - 0.5, -0.5)
    axes.set(
        xlabel="active weights / % of the layer",
        ylabel="layer",
        xlim=(0, 114),
    )
    axes.set_xticks(range(0, 101, 20))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def mask(mask: Any, title: str = "") -> "Figure":
    """A mask as an image: active weights are dark.

    A dense kernel (in, out) has its inputs from top to bottom and its outputs from left
    to right; a convolution (height, width, in, out) a tile for each pair, as it lies on
    the image. Cells of a large mask show the density of several weights.

    Args:
      mask: boolean, packed or not, of two axes or more.
      title: of the figure.

    Raises:
      ValueError: a mask of less than two axes, or without weights.
    """
    array = _single(mask)
    *kernel, inputs, outputs = array.shape
    height = kernel[0] if len(kernel) > 1 else 1
    width = math.prod(kernel) // height
    tiles = array.reshape(height, width, inputs, outputs).transpose(2, 0, 3, 1)
    cells = tiles.reshape(inputs * height, outputs * width).astype(float)
    steps = [-(-n // _MOST_CELLS) for n in cells.shape]
    cells = _averaged(cells, *steps)
    rows, columns = cells.shape
    # Cells are square as long as the figure stays a rectangle that fits a page.
    aspect = min(max(rows / columns, 0.2), 3.0)
    figure = _figure(6.0, min(max(6.0 * aspect, 2.0), 8.5) + 0.7)
    axes = figure.subplots()
    square = 0.2 <= rows / columns <= 3.0
    axes.imshow(
        cells,
        cmap="Greys",
        vmin=0.0,
        vmax=1.0,
        interpolation="nearest",
        aspect="equal" if square else "auto",
        extent=(0, outputs * width, inputs * height, 0),
    )
    active = int(np.count_nonzero(array))
    share = f"{active:,} of {array.size:,} weights active ({active / array.size:.2%})"
    axes.set_title(f"{title}\n{share}" if title else share, fontsize=11)
    if kernel:
        small = " x ".join(map(str, kernel))
        _tiles(axes, (inputs * height, outputs * width), (inputs, outputs))
        axes.set_xlabel(f"output channel (each tile is a {small} kernel)")
        axes.set_ylabel("input channel")
        if max(inputs, outputs) <= _MOST_TILES and height * width > 1:
            for n in range(1, inputs):
                axes.axhline(n * height, color="#E69F00", linewidth=0.8)
            for n in range(1, outputs):
                axes.axvline(n * width, color="#E69F00", linewidth=0.8)
    else:
        axes.set(xlabel="output unit", ylabel="input unit")
    return figure


def inputs(mask: Any, image_shape: Sequence[int], title: str = "") -> "Figure":
    """How many weights the first layer keeps of every pixel, on the grid of the image.

    Args:
      mask: of a dense kernel (pixels, units), packed or not; the pixels of an image
        flattened row by row, channels last.
      image_shape: (height, width) or (height, width, channels).
      title: of the figure.

    Raises:
      ValueError: a mask that is not of such images.
    """
    array = _single(mask)
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
    among = array.shape[1] * math.prod(channels)
    figure.colorbar(image, label=f"active weights of a pixel, of {among:,}")
    unused = int(np.count_nonzero(kept == 0))
    text = f"{unused:,} of {kept.size:,} pixels are not used"
    axes.set_title(f"{title}\n{text}" if title else text, fontsize=11)
    axes.set(xlabel="column / pixels", ylabel="row / pixels")
    return figure


def densities_over_time(
    history: Mapping[int, Sparsity], title: str = "Density over the training"
) -> "Figure":
    """Density of every layer over the steps, and of all weights together.

    Args:
      history: `granet_jax.sparsity(masks)` by step.
      title: of the figure.

    Raises:
      ValueError: no history, or of other leaves.
    """
    leaves = _leaves("history", history)
    steps = sorted(history)
    lines = {
        leaf: [100 * (1.0 - history[step].leaves[leaf]) for step in steps]
        for leaf in leaves
    }
    figure = _figure(8.5, 4.6)
    axes = figure.subplots()
    _layers(figure, [axes], [(steps, lines)], "post")
    overall = [100 * (1.0 - history[step].overall) for step in steps]
    _all(axes, steps, overall, "post")
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
    """What share of the weights changes from one tree of masks to the next, by layer.

    Args:
      history: trees of masks by step, two or more: after every update, say.
      title: of the figure.

    Raises:
      ValueError: fewer than two, or of other leaves.
    """
    check_type("history", history, Mapping, "trees of masks by step")
    if len(history) < 2:
        raise ValueError(f"history must hold two masks or more, got {len(history)}.")
    steps = sorted(history)
    for step in steps:
        named_masks(history[step], f"history[{step}]")
    found = [changes(history[a], history[b]) for a, b in itertools.pairwise(steps)]
    figure = _figure(8.5, 6.0)
    dropped, grown = figure.subplots(2, 1, sharex=True)
    panels = []
    for field in ("dropped", "grown"):
        lines = {
            leaf: [100 * getattr(change.leaves[leaf], field) for change in found]
            for leaf in found[0].leaves
        }
        panels.append((steps[1:], lines))
    _layers(figure, [dropped, grown], panels, None)
    for axes, field in ((dropped, "dropped"), (grown, "grown")):
        total = [100 * getattr(change.total, field) for change in found]
        _all(axes, steps[1:], total, None)
        axes.set_ylim(bottom=0)
    dropped.set(title=title, ylabel="dropped / % of those\nactive before")
    grown.set(xlabel="optimizer steps", ylabel="grown / % of those\nactive after")
    _finish(figure, dropped, grown)
    return figure


def exploration(
    histories: Mapping[str, Mapping[int, PyTree]],
    title: str = "Weights that were active at least once",
) -> "Figure":
    """Exploration rate R_s over the steps, a line for every network.

    Args:
      histories: trees of masks by step, by the name of the network: after every update,
        say, and those of step 0.
      title: of the figure.

    Raises:
      ValueError: no networks, no masks, or other leaves in one history.
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
    colours = [colour for colour, _ in _by_number(len(histories))]
    for i, (name, history) in enumerate(histories.items()):
        found = exploration_over_time(history)
        axes.step(
            [*found],
            [100 * rate.total for rate in found.values()],
            where="post",
            color=colours[i],
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
    """Accuracy against sparsity, a line a method: means, and deviations over seeds.

    Args:
      methods: accuracies in [0, 1], one for each seed, by sparsity in [0, 1), by
        method. Methods that `LOOKS` names look as in the experiments.
      dense: those of dense training, if they are to be shown.
      title: of the figure.

    Raises:
      ValueError: no accuracies.
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
    places = {s: i for i, s in enumerate(sparsities)}
    several = False
    for i, (name, look) in enumerate(looks(methods).items()):
        points = sorted(methods[name].items())
        several |= any(len(values) > 1 for _, values in points)
        # Side by side, so that error bars do not hide one another.
        shift = 0.035 * (i - (len(methods) - 1) / 2)
        draw_accuracies(
            axes,
            [places[s] + shift for s, _ in points],
            [values for _, values in points],
            look,
            name,
        )
    if dense:
        draw_dense(axes, dense)
    axes.set_xlim(-0.4, len(sparsities) - 0.6)
    axes.set_xticks(range(len(sparsities)), [f"{100 * s:.10g}%" for s in sparsities])
    axes.set(
        title=title,
        xlabel="sparsity (share of all weights that are zero)",
        ylabel=f"accuracy / %{', mean ± std' if several else ''}",
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
    """A line of accuracies in [0, 1] on `axes`: means, with sample deviations."""
    points = [[100 * x for x in each] for each in values]
    errors = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in points]
    colour, marker = look
    axes.errorbar(
        places,
        [statistics.mean(each) for each in points],
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
    """Mean and sample deviation of dense training, across the whole width of `axes`."""
    values = [100 * accuracy for accuracy in accuracies]
    mean = statistics.mean(values)
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    axes.axhline(mean, color="black", linestyle="--", linewidth=1.2, label="dense")
    axes.axhspan(mean - std, mean + std, color="black", alpha=0.12, linewidth=0)


def sparsities(methods: Mapping[str, Method], total_steps: int) -> "Figure":
    """The sparsity that methods prescribe over the steps of a training.

    Args:
      methods: records such as `granet_jax.granet(...)`, by a name.
      total_steps: of the training.

    Raises:
      ValueError: no methods.
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


def _by_number(number: int) -> list[Look]:
    order = ("gmp", "granet", "rigl", "set", "granet-st", "static", "snfs", "cyclical")
    return [LOOKS[name] for name in itertools.islice(itertools.cycle(order), number)]


def _leaves(name: str, sparsities: Mapping[Any, Sparsity]) -> list[str]:
    """The leaves that all of them have."""
    check_type(name, sparsities, Mapping, "granet_jax.sparsity(masks), by a name")
    for key, found in sparsities.items():
        check_type(f"{name}[{key!r}]", found, Sparsity, "a granet_jax.sparsity(masks)")
    if not sparsities:
        raise ValueError(f"{name} must hold granet_jax.sparsity(masks), got none.")
    first, *others = (list(s.leaves) for s in sparsities.values())
    for leaves in others:
        if leaves != first:
            raise ValueError(
                f"{name} must be of the same leaves, got {first} and {leaves}."
            )
    return first


def _single(mask: Any) -> np.ndarray:
    (array,) = named_masks(mask, "mask").values()
    if array.ndim < 2 or not array.size:
        raise ValueError(
            f"mask must have weights and two axes or more, got shape {array.shape}."
        )
    return array


def _averaged(cells: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Means of blocks of cells, those at the edges of what is left."""
    for axis, step in enumerate((rows, columns)):
        starts = np.arange(0, cells.shape[axis], step)
        lengths = np.diff([*starts, cells.shape[axis]])
        sums = np.add.reduceat(cells, starts, axis=axis)
        cells = sums / np.expand_dims(lengths, 1 - axis)
    return cells


def _tiles(axes: "Axes", shape: tuple[int, int], channels: tuple[int, int]) -> None:
    """Numbers channels, and not weights, along both axes."""
    sides = ((axes.yaxis, shape[0], channels[0]), (axes.xaxis, shape[1], channels[1]))
    for axis, length, number in sides:
        step = max(1, 2 ** math.ceil(math.log2(number / 12)))
        at = np.arange(0, number, step)
        axis.set_ticks((at + 0.5) * length / number, [str(n) for n in at])


def _layers(
    figure: "Figure",
    panels: Sequence["Axes"],
    data: Sequence[tuple[list[int], Mapping[str, list[float]]]],
    drawstyle: str | None,
) -> None:
    """A line for every layer: with a name each, or colours in order on a bar."""
    from matplotlib import cm, colormaps, colors

    names = list(data[0][1])
    many = len(names) > _MOST_NAMES
    colours = [colour for colour, _ in _by_number(len(names))]
    if many:
        # Without its palest end, which white paper swallows.
        scale = colors.Normalize(1, len(names) / 0.9)
        colours = [colormaps["viridis"](scale(i + 1)) for i in range(len(names))]
        bar = cm.ScalarMappable(
            colors.Normalize(1, len(names)),
            colors.ListedColormap(colormaps["viridis"](np.linspace(0, 0.9, 256))),
        )
        figure.colorbar(bar, ax=list(panels), label="layer, in their order", aspect=30)
    for axes, (steps, lines) in zip(panels, data, strict=True):
        for i, (name, values) in enumerate(lines.items()):
            axes.plot(
                steps,
                values,
                color=colours[i],
                linestyle="-" if many else _STYLES[i % len(_STYLES)],
                linewidth=1.0 if many else 1.7,
                marker="." if drawstyle is None and len(steps) < 60 else "",
                drawstyle="default" if drawstyle is None else f"steps-{drawstyle}",
                label=None if many else name.replace("/kernel", ""),
            )


def _all(
    axes: "Axes", steps: list[int], values: list[float], drawstyle: str | None
) -> None:
    axes.plot(
        steps,
        values,
        color="black",
        linewidth=2.4,
        drawstyle="default" if drawstyle is None else f"steps-{drawstyle}",
        label="all weights",
    )


def _finish(figure: "Figure", axes: "Axes", *others: "Axes") -> None:
    """Grids, steps with thousands set apart, and one legend outside of the data."""
    for each in (axes, *others):
        each.grid(alpha=0.3)
        each.margins(x=0.01)
        each.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False)
