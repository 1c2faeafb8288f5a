"""Draw the figures of the documentation from the methods themselves.

    python docs/figures.py FOLDER

The figures evaluate the sparsity, exchange and penalty of the same records that
`transform` takes, so they show what the library does. Every run writes the same bytes.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import granet_jax
from granet_jax import Method, distributions
from granet_jax.analysis import plots
from granet_jax.penalties import PenaltyInputs
from granet_jax.phases import Exchange

STEPS = 10_000
# Okabe and Ito's colours, which colour-blind readers can distinguish.
BLUE, ORANGE, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
DASHED = (0, (5, 1))
LINES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (PINK, ":"), ("black", DASHED))
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "granet_jax",
    "svg.fonttype": "path",
    "font.size": 10,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": "0.9",
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
}


def gradual() -> Figure:
    """Draw the methods whose sparsity rises once."""
    figure, (axes,) = _panels(1)
    _sparsities(
        axes,
        {
            "granet(0.9, 10_000)": granet_jax.granet(0.9, STEPS, interval=250),
            "granet(0.9, 10_000, initial_sparsity=0.5)": granet_jax.granet(
                0.9, STEPS, initial_sparsity=0.5, interval=250
            ),
            "gmp(0.9, 7_500)": granet_jax.gmp(0.9, 7_500, interval=250),
            "straight_through(0.9, 9_000)": granet_jax.straight_through(
                0.9, 9_000, interval=250
            ),
        },
    )
    axes.legend(loc="lower right")
    return figure


def constant() -> Figure:
    """Draw the methods of constant sparsity, and the share of weights they exchange."""
    figure, (above, below) = _panels(2)
    static = granet_jax.static(0.9)
    rigl = granet_jax.rigl(0.9, STEPS, interval=500)
    set_ = granet_jax.set_(0.9, STEPS, interval=500)
    snfs = granet_jax.snfs(0.9, STEPS, interval=500)
    top_kast = granet_jax.top_kast(0.9, backward_sparsity=0.8)
    (sparsity,) = {m.sparsity(0) for m in (static, rigl, set_, snfs, top_kast)}
    together = "static, rigl, set_, snfs, top_kast: forward"
    above.axhline(sparsity, color="black", label=together)
    assert top_kast.marked_sparsity is not None
    above.axhline(
        top_kast.marked_sparsity, color=BLUE, linestyle="--", label="top_kast: backward"
    )
    above.set(ylabel="sparsity s", ylim=(-0.03, 1))
    granet = granet_jax.granet(0.9, STEPS, interval=500)
    exchanging = {
        "rigl(0.9, 10_000)": (rigl, ORANGE, "s", 4),
        "set_(0.9, 10_000)": (set_, PINK, "D", 4),
        "snfs(0.9, 10_000)": (snfs, GREEN, "^", 5),
        # Large open markers, because snfs has nearly the same values.
        "granet(0.9, 10_000)": (granet, BLUE, "o", 9),
    }
    for name, (method, colour, marker, size) in exchanging.items():
        at = list(method.updates.steps())
        below.plot(
            at,
            [_fraction(method, t) for t in at],
            marker=marker,
            markersize=size,
            markerfacecolor="none" if marker == "o" else colour,
            linewidth=1,
            color=colour,
            label=name,
            clip_on=False,
        )
    below.set(ylabel="exchanged fraction r", ylim=(0, 0.75))
    above.legend(loc="lower left")
    below.legend(loc="upper right", ncols=2)
    return figure


def cycles() -> Figure:
    """Draw the methods whose sparsity falls, or whose moments are reset."""
    panels = {
        "cyclical(0.9, 10_000, cycles=4)": granet_jax.cyclical(0.9, STEPS),
        "acdc(0.9, range(1_000, 9_001, 1_000))": granet_jax.acdc(
            0.9, range(1_000, 9_001, 1_000)
        ),
        "sculpt(0.9, 10_000, cycles=3)": granet_jax.sculpt(0.9, STEPS, cycles=3),
    }
    figure, rows = _panels(len(panels))
    for axes, (name, method) in zip(rows, panels.items(), strict=True):
        _sparsities(axes, {name: method})
        resets = method.resets.steps()
        values = [method.sparsity(t) for t in resets]
        axes.plot(resets, values, "o", color=ORANGE, label="moments are reset")
        axes.set_title(name, loc="left", fontsize=10)
    # One legend for all panels, above the first.
    handles, _ = rows[-1].get_legend_handles_labels()
    rows[0].legend(handles=handles[-1:], loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def growing() -> Figure:
    """Draw growing regularisation: first the penalty, then the pruning."""
    options: dict[str, Any] = {"growth": 2e-3, "settle_steps": 2_000}
    methods = {
        "greg1": granet_jax.greg1(0.9, **options),
        "greg2": granet_jax.greg2(0.9, **options, pick_growth=5e-5),
    }
    figure, (above, below) = _panels(2)
    _sparsities(above, methods)
    for (name, method), (colour, line) in zip(methods.items(), LINES, strict=False):
        at = np.arange(0, STEPS, 10)
        sizes = [_coefficient(method, int(t)) for t in at]
        below.plot(at, sizes, color=colour, linestyle=line, label=name)
    above.legend()
    below.set(ylabel="L2 coefficient of\nthe pruned weights")
    return figure


def layers() -> Figure:
    """Draw the density of every layer of a small network at 90% overall sparsity."""
    shapes = {
        "3 x 3\n3→64": (3, 3, 3, 64),
        "3 x 3\n64→64": (3, 3, 64, 64),
        "3 x 3\n64→128": (3, 3, 64, 128),
        "3 x 3\n128→256": (3, 3, 128, 256),
        "3 x 3\n256→512": (3, 3, 256, 512),
        "512→10": (512, 10),
    }
    figure, (axes,) = _panels(1)
    place = np.arange(len(shapes))
    for i, name in enumerate(("uniform", "er", "erk")):
        densities = distributions.densities(list(shapes.values()), 0.9, name)
        # Hatches distinguish the bars in grey.
        axes.bar(
            place + (i - 1) * 0.27,
            densities,
            width=0.25,
            color=(BLUE, ORANGE, GREEN)[i],
            hatch=("", "//", "..")[i],
            edgecolor="white",
            label=f'"{name}"',
        )
    axes.set_xticks(place, list(shapes))
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="kernel", ylabel="density", xlim=(-0.5, len(shapes) - 0.5))
    axes.legend(title="distribution")
    return figure


def exploration() -> Figure:
    """Draw how many weights the methods of constant sparsity have explored."""
    methods = {
        "SET": granet_jax.set_(0.9, 200, interval=10),
        "RigL": granet_jax.rigl(0.9, 200, interval=10),
        "static": granet_jax.static(0.9),
    }
    histories = {name: _masks_of_training(method) for name, method in methods.items()}
    return plots.exploration(histories)


FIGURES: Mapping[str, Callable[[], Figure]] = {
    "gradual": gradual,
    "constant": constant,
    "cycles": cycles,
    "growing": growing,
    "layers": layers,
    "exploration": exploration,
}


def draw_all(folder: Path) -> None:
    """Write every figure to `folder` as NAME.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        with matplotlib.rc_context(STYLE):
            figure = draw()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def _masks_of_training(method: Method) -> dict[int, Any]:
    """Fit one matrix to another, and return its masks after every tenth step."""
    keys = jax.random.split(jax.random.key(0), 3)
    goal, start, x = (jax.random.normal(key, (64, 64)) for key in keys)
    tx = granet_jax.transform(method, optax.sgd(0.05, momentum=0.9))

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        grads = x.T @ (x @ (params - goal)) / len(x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = start, tx.init(start)
    history = {0: granet_jax.get_masks(state)}
    for t in range(1, 201):
        params, state = step(params, state)
        if t % 10 == 0:
            history[t] = granet_jax.get_masks(state)
    return history


def _panels(rows: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with `rows` panels above each other that share the x axis."""
    # Without pyplot there is no window, and no state shared by figures.
    figure = Figure(figsize=(7.2, 3.2 if rows == 1 else 1.9 * rows + 0.6))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(rows, sharex=True, squeeze=False)[:, 0]
    panels[-1].set(xlabel="step", xlim=(0, STEPS))
    panels[-1].xaxis.set_major_formatter("{x:,.0f}")
    return figure, list(panels)


def _sparsities(axes: Axes, methods: Mapping[str, Method]) -> None:
    """Plot the sparsity after every step; it is constant between mask updates."""
    for (name, method), (colour, line) in zip(methods.items(), LINES, strict=False):
        at = [0, *method.updates.steps()]
        values = [method.sparsity(t) for t in at]
        axes.step(
            [*at, STEPS],
            [*values, values[-1]],
            where="post",
            color=colour,
            linestyle=line,
            label=name,
        )
    axes.set(ylabel="sparsity s", ylim=(-0.03, 1))


def _fraction(method: Method, step: int) -> float:
    """Return the share of a layer's active weights that `method` exchanges."""
    (exchange,) = [phase for phase in method.phases if isinstance(phase, Exchange)]
    return exchange.fraction(step)


def _coefficient(method: Method, step: int) -> float:
    """Return the L2 coefficient of a weight that will be pruned."""
    assert method.penalty is not None
    inputs = PenaltyInputs(
        param=jnp.ones(()),
        mask=jnp.asarray(True),
        marked=jnp.asarray(False),
        count=jnp.asarray(step, jnp.int32),
    )
    return float(jnp.asarray(method.penalty(inputs)))


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]))
