r"""The sparsity at which a sparse linear layer becomes faster than a dense one, on CPU.

    python -m benchmarks.sparse_linear --out results   # everything, with a plot
    python -m benchmarks.sparse_linear --sizes 256 --batches 1 8
    python -m benchmarks.sparse_linear --quick         # only checks the products

The layer is `x @ w` with float32 x of shape (batch, n) and w of shape (n, n). The
contenders compute the product from x, a jax array:

- dense: the matrix product under jit, zeros included. It is the baseline, ratio 1.
- csr: SciPy, not under jit, on one core; x is transposed before and after.
- bcsr, bcoo: `jax.experimental.sparse` under jit.
- fan-in: the same number of weights for every output, by `granet_jax.accelerate`.
- gather: the same weights by a single gather and a sum, under jit.
- 2:4: two of every four inputs, at 50% sparsity only, compressed to half the weights
  and multiplied by the kernel of fan-in. (CPUs have no instruction for 2:4.)
- block-16, block-64: the same number of square blocks for every block of outputs, under
  jit: a gather of their inputs, then dense products of the blocks.

Every contender has weights of its own structure at the same sparsity, and is checked
against the dense product of these weights. A ratio is the seconds of dense over those
of the contender, so it is above 1 where the contender is faster. The crossover is the
sparsity from which the contender is faster, interpolated between the measured
sparsities in the logarithms of ratio and density. A contender more than `SLOW` times
slower than dense at one sparsity is not tried at lower ones.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.tools import command_line, results, timing
from granet_jax import export
from granet_jax.export import sparse_inference

SIZES = (256, 1024, 4096)
BATCHES = (1, 8, 64, 256)
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
SLOW = 8.0
# The most that a gather may write. At half the weights of 4096 x 4096 and a batch of
# 256, a single gather would write 9 GB.
MOST_BYTES = 2**30
# Okabe and Ito's colours, with a marker and a line for each contender.
LOOKS = {
    "csr": ("#E69F00", "s", "-"),
    "bcsr": ("#777777", "P", ":"),
    "bcoo": ("#000000", "X", ":"),
    "gather": ("#56B4E9", "v", "--"),
    "fan-in": ("#0072B2", "o", "-"),
    "2:4": ("#CC79A7", "*", ""),
    "block-16": ("#009E73", "^", "--"),
    "block-64": ("#D55E00", "D", "-"),
}

# A function from x to the product, and the dense matrix of the same weights.
Contender = tuple[Callable[[Array], Any], np.ndarray]


def dense_product(x: Array, w: Array) -> Array:
    return x @ w


def gather_product(x: Array, values: Array, inputs: Array) -> Array:
    """Multiplies `values` (k, n_out) with the inputs that `inputs` (k, n_out) names."""
    return jnp.einsum("bko,ko->bo", x[:, inputs], values)


def block_product(x: Array, blocks: Array, inputs: Array) -> Array:
    """Multiplies blocks (n_out / side, k, side, side) at block rows `inputs`."""
    columns, k, side, _ = blocks.shape
    parts = x.reshape(len(x), -1, side)

    def column(weights: tuple[Array, Array]) -> Array:
        block, rows = weights
        return parts[:, rows].reshape(len(x), k * side) @ block.reshape(k * side, side)

    product = jax.lax.map(column, (blocks, inputs))
    return product.transpose(1, 0, 2).reshape(len(x), columns * side)


def random_rows(rng: np.random.Generator, n: int, k: int, columns: int) -> np.ndarray:
    """Draws booleans (n, columns), k of them True in every column."""
    scores = rng.random((n, columns), np.float32)
    chosen = np.zeros((n, columns), bool)
    rows = np.argpartition(scores, k - 1, axis=0)[:k]
    np.put_along_axis(chosen, rows, True, axis=0)
    return chosen


def two_of_four(rng: np.random.Generator, n: int) -> np.ndarray:
    quarters = random_rows(rng, 4, 2, n * n // 4).reshape(4, n // 4, n)
    return quarters.transpose(1, 0, 2).reshape(n, n)


def contenders(n: int, sparsity: float) -> dict[str, Contender]:
    """Creates all contenders that support this size and sparsity, by name."""
    rng = np.random.default_rng(n)
    weights = rng.standard_normal((n, n), np.float32) / np.float32(math.sqrt(n))
    k = max(1, round((1 - sparsity) * n))
    mask = random_rows(rng, n, k, n)
    w = np.where(mask, weights, np.float32(0))
    found: dict[str, Contender] = {"dense": (on_arrays(dense_product, w), w)}
    # SciPy and jax.experimental.sparse multiply from the left, so they take transposes.
    csr = export.to_csr(w.T, mask.T)
    found["csr"] = (lambda x: (csr @ np.asarray(x).T).T, w)
    for name, convert in {"bcsr": export.to_bcsr, "bcoo": export.to_bcoo}.items():
        found[name] = (on_arrays(lambda x, s: (s @ x.T).T, convert(w.T, mask.T)), w)
    fan_in = sparse_inference.fan_in(w, mask)
    found["fan-in"] = (on_arrays(dense_product, fan_in), w)
    found["gather"] = (on_arrays(gather_product, fan_in.values, fan_in.inputs), w)
    if sparsity == 0.5:
        mask = two_of_four(rng, n)
        half = np.where(mask, weights, np.float32(0))
        compressed = sparse_inference.fan_in(half, mask)
        found["2:4"] = (on_arrays(dense_product, compressed), half)
    for side in (16, 64):
        found[f"block-{side}"] = blocks_of(rng, weights, sparsity, side)
    return found


def blocks_of(
    rng: np.random.Generator, weights: np.ndarray, sparsity: float, side: int
) -> Contender:
    count = len(weights) // side
    k = max(1, round((1 - sparsity) * count))
    chosen = random_rows(rng, count, k, count)
    # The shape is (block columns, block rows, side, side).
    grid = weights.reshape(count, side, count, side).transpose(2, 0, 1, 3)
    inputs = np.nonzero(chosen.T)[1].reshape(count, k)
    blocks = np.take_along_axis(grid, inputs[:, :, None, None], axis=1)
    whole = np.kron(chosen, np.ones((side, side), bool))
    product = on_arrays(block_product, blocks, inputs.astype(np.int32))
    return product, np.where(whole, weights, np.float32(0))


def on_arrays(f: Callable[..., Array], *weights: Any) -> Callable[[Array], Array]:
    """Jits a function of x and the weights, and puts the weights on the device."""
    jitted, placed = jax.jit(f), jax.device_put(weights)
    return lambda x: jitted(x, *placed)


def check(name: str, contender: Contender, x: Array) -> None:
    """Asserts that a product equals the dense one up to rounding."""
    product, w = contender
    expected = np.asarray(x) @ w
    np.testing.assert_allclose(
        np.asarray(product(x)), expected, rtol=1e-4, atol=1e-4, err_msg=name
    )


# Seconds by sparsity and contender.
Seconds = dict[float, dict[str, float]]


def measure(n: int, options: argparse.Namespace) -> dict[int, Seconds]:
    """Checks and times every contender, by batch."""
    measured: dict[int, Seconds] = {batch: {} for batch in options.batches}
    left_out: dict[int, set[str]] = {batch: set() for batch in options.batches}
    for sparsity in sorted(options.sparsities, reverse=True):
        runs = contenders(n, sparsity)
        for batch, out in left_out.items():
            if 4 * batch * n * n * (1 - sparsity) > MOST_BYTES:
                out.add("gather")
            rng = np.random.default_rng(batch)
            x = jax.device_put(rng.standard_normal((batch, n), np.float32))
            kept = {name: run for name, run in runs.items() if name not in out}
            for name, run in kept.items():
                check(name, run, x)
            if not options.quick:
                products = {name: product for name, (product, _) in kept.items()}
                seconds = timings(products, x, options)
                measured[batch][sparsity] = seconds
                out |= {k for k, v in seconds.items() if v > SLOW * seconds["dense"]}
        print(f"{n} x {n}, {sparsity:.0%}: all products agree with dense", flush=True)
    return measured


def timings(
    products: Mapping[str, Callable[[Array], Any]],
    x: Array,
    options: argparse.Namespace,
) -> dict[str, float]:
    """Times every contender: the median, or the better of two if it is slow."""
    calls: dict[str, Callable[[], Any]] = {
        name: partial(product, x) for name, product in products.items()
    }
    # With one timing, a moment's load could exclude a contender.
    once = {k: min(v) for k, v in timing.interleaved(calls, rounds=2).items()}
    slow = {k: v for k, v in once.items() if v > SLOW * once["dense"]}
    # Repeats make a timing long enough for the clock.
    repeats = max(1, math.ceil(options.least / once["dense"]))
    seconds = timing.interleaved(
        {k: call for k, call in calls.items() if k not in slow},
        rounds=options.rounds,
        repeats=repeats,
    )
    return {k: statistics.median(v) for k, v in seconds.items()} | slow


def ratios(
    seconds: Mapping[float, Mapping[str, float]], name: str
) -> dict[float, float]:
    """Divides the seconds of dense by those of a contender, lowest sparsity first."""
    return {
        s: seconds[s]["dense"] / seconds[s][name]
        for s in sorted(seconds)
        if name in seconds[s]
    }


def crossover(ratios: Mapping[float, float]) -> float | None:
    """Finds the sparsity from which a contender is faster than dense.

    It is the lowest measured sparsity if the contender is always faster, and None if it
    is slower at the highest.
    """
    points = sorted(ratios.items(), reverse=True)
    if not points or points[0][1] < 1:
        return None
    for (above, faster), (below, slower) in itertools.pairwise(points):
        if slower < 1:
            part = math.log(faster) / (math.log(faster) - math.log(slower))
            low, high = math.log(1 - above), math.log(1 - below)
            return 1 - math.exp(low + part * (high - low))
    return points[-1][0]


def report(cases: Sequence[dict[str, Any]]) -> str:
    """Formats the crossovers and all ratios."""
    names = list(LOOKS)
    crossings, rows = [], []
    for case in cases:
        label = f"{case['size']}, batch {case['batch']}"
        seconds = case["seconds"]
        cells = []
        for name in names:
            measured = ratios(seconds, name)
            at = crossover(measured)
            always = at is not None and at == min(measured) == min(seconds)
            cells.append("-" if at is None else f"{'<= ' * always}{at:.1%}")
        crossings.append([label, *cells])
        for sparsity in sorted(seconds):
            own = {name: ratios(seconds, name).get(sparsity) for name in names}
            rows.append(
                [
                    f"{label}, {sparsity:.0%}",
                    f"{1e3 * seconds[sparsity]['dense']:.3f}",
                    *("" if own[k] is None else f"{own[k]:.2f}" for k in names),
                ]
            )
    return "\n\n".join(
        [
            "Sparsity from which a contender is faster than dense:",
            results.table(["size, batch", *names], crossings),
            "Speed relative to dense:",
            results.table(["size, batch, sparsity", "dense ms", *names], rows),
        ]
    )


def plot(cases: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots the ratios over sparsity, in a panel for every size and batch."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    sizes = sorted({case["size"] for case in cases})
    batches = sorted({case["batch"] for case in cases})
    figure = Figure(
        figsize=(1 + 2.9 * len(batches), 1.2 + 2.4 * len(sizes)), layout="constrained"
    )
    grid = figure.subplots(
        len(sizes), len(batches), sharex=True, sharey=True, squeeze=False
    )
    for case in cases:
        row, column = sizes.index(case["size"]), batches.index(case["batch"])
        axes = grid[row, column]
        axes.axhline(1, color="#444444", linewidth=1)
        for name, (colour, marker, line) in LOOKS.items():
            measured = ratios(case["seconds"], name)
            axes.plot(
                [1 - s for s in measured],
                list(measured.values()),
                color=colour,
                marker=marker,
                linestyle=line,
                markersize=5,
                label=name,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(color="#DDDDDD", linewidth=0.5)
        axes.set_title(f"{case['size']} x {case['size']}, batch {case['batch']}")
    first = grid[0, 0]
    first.invert_xaxis()
    first.set_xticks([1 - s for s in sorted(cases[0]["seconds"])])
    first.xaxis.set_major_formatter(FuncFormatter(lambda d, _: f"{100 * (1 - d):.0f}"))
    first.xaxis.set_minor_locator(NullLocator())
    first.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    for axes in grid[-1]:
        axes.set_xlabel("sparsity / %")
    for axes in grid[:, 0]:
        axes.set_ylabel("speed relative to dense")
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks every product, then times all."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--rounds", type=int, default=7, help="timings of each")
    parser.add_argument(
        "--least", type=float, default=0.01, help="least seconds of a timing of dense"
    )
    options = parser.parse_args(arguments)
    if any(n % 64 for n in options.sizes):
        parser.error("sizes must be multiples of 64, the side of a block")
    if options.quick:
        options.sizes, options.batches, options.sparsities = (128,), (1, 3), (0.5, 0.9)
    cases = []
    for n in options.sizes:
        for batch, seconds in measure(n, options).items():
            cases.append({"size": n, "batch": batch, "seconds": seconds})
    if options.quick:
        return
    results.publish(options, "sparse_linear", report(cases), {"results": cases}, {})
    if options.out is not None:
        plot(cases, options.out / "sparse_linear.png")


if __name__ == "__main__":
    main()
