"""Runs all benchmarks, each in a process of its own, and compares them with the goals.

    python -m benchmarks             # all, into benchmarks/results/DEVICE
    python -m benchmarks --only selection optimizer_step --out DIR
    python -m benchmarks --quick     # only checks of the results

Each benchmark writes NAME.json and NAME.md. From all of them in the folder, also those
of earlier days, this command writes summary.md: when and on what each was run, and for
every goal the figure that was measured. The exit status is 1 if a benchmark failed; the
others run all the same.
"""

import datetime
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.tools import command_line
from benchmarks.tools.results import table

NAMES = (
    "selection",
    "optimizer_step",
    "training_step",
    "throughput",
    "mask_sources",
    "sparse_linear",
    "file_size",
    "scale",
)
RESULTS = Path(__file__).parent / "results"


class Goal(NamedTuple):
    """A limit for a figure of a benchmark.

    Attributes:
      text: Name of the figure in the summary.
      benchmark: Benchmark that measures the figure.
      figure: Name of the figure there.
      limit: The largest value that meets the goal.
      least: If true, the limit is the smallest value instead.
    """

    text: str
    benchmark: str
    figure: str
    limit: float
    least: bool = False

    def met(self, measured: float) -> bool:
        """Compares to the three decimals that the summary shows."""
        if self.least:
            return round(measured, 3) >= self.limit
        return round(measured, 3) <= self.limit


STEPS = [
    f"{optimizer}, gradients {source}"
    for optimizer in ("sgd-momentum", "adamw")
    for source in ("inside", "argument")
]
GOALS = (
    Goal("selection / NumPy's introselect", "selection", "over_introselect", 3.0),
    Goal(
        "argsort / selection", "selection", "argsort_over_selection", 40.0, least=True
    ),
    *(
        Goal(
            f"step with {m} update / NumPy's introselect",
            "selection",
            f"{m} over introselect",
            12.0,
        )
        for m in ("GraNet", "RigL")
    ),
    *(
        Goal(
            f"step with {m} update, allocated bytes a weight",
            "selection",
            f"memory {m}",
            10.0,
        )
        for m in ("GraNet", "RigL")
    ),
    *(
        Goal(
            f"optimizer step, {s}: sparse / dense",
            "optimizer_step",
            f"{s}, sparse",
            1.05,
        )
        for s in STEPS
    ),
    *(
        Goal(
            f"optimizer step, {s}: packed / dense",
            "optimizer_step",
            f"{s}, packed",
            1.10,
        )
        for s in STEPS
    ),
    Goal(
        "training step of ResNet-20: sparse / dense", "training_step", "training", 1.01
    ),
    Goal(
        "state, bytes a weight",
        "optimizer_step",
        "state bytes a weight, sparse",
        1.0,
    ),
    Goal(
        "packed state, bytes a weight",
        "optimizer_step",
        "state bytes a weight, packed",
        0.125,
    ),
    Goal(
        "seconds to compile the step, ResNet-50",
        "optimizer_step",
        "compile seconds",
        10.0,
    ),
    *(
        Goal(
            f"{tree} on {topology}, bytes a leaf and pass",
            "scale",
            f"{topology}, {tree}, bytes a leaf and pass",
            limit,
        )
        for topology, tree, limit in (
            ("v5e:4x4", "resnet50", 64),
            ("v5e:16x16", "7b-stacked", 128),
        )
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmarks one after the other; returns the exit status."""
    parser = command_line.parser(__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        default=NAMES,
        choices=NAMES,
        metavar="NAME",
        help=f"some of {', '.join(NAMES)}",
    )
    options = parser.parse_args(arguments)
    out = options.out
    if not options.quick:
        out = out or RESULTS / device()
        out.mkdir(parents=True, exist_ok=True)
    failed = []
    for i, name in enumerate(options.only, start=1):
        label = f"[{i}/{len(options.only)}] {name}"
        print(f"== {label}", flush=True)
        start = time.perf_counter()
        status = run(name, None if options.quick else out)
        seconds = time.perf_counter() - start
        outcome = f"failed, exit status {status}" if status else "done"
        print(f"== {label}: {outcome}, {seconds:.0f} s", flush=True)
        if status:
            failed.append(name)
        if not options.quick:
            # Written after each benchmark, in case the run is stopped.
            (out / "summary.md").write_text(summary(read(out), failed))
    if not options.quick:
        print((out / "summary.md").read_text())
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def device() -> str:
    """Returns the name of the device, in the form of a folder's name."""
    # A process that asks jax for its devices also reserves their memory.
    code = "import jax; print(jax.devices()[0].device_kind)"
    process = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True
    )
    return re.sub(r"[^a-z0-9]+", "-", process.stdout.lower()).strip("-")


def run(name: str, out: Path | None) -> int:
    """Runs a benchmark, quickly if `out` is None; returns its exit status."""
    command = [sys.executable, "-m", f"benchmarks.{name}"]
    if out is None:
        return subprocess.run([*command, "--quick"], check=False).returncode
    # If this run fails, an earlier result must not stand in its place.
    (out / f"{name}.json").unlink(missing_ok=True)
    # Compile times are measured too.
    uncached = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    return subprocess.run(
        [*command, "--out", str(out)], env=uncached, check=False
    ).returncode


def read(folder: Path) -> dict[str, Any]:
    """Reads the results in a folder, by benchmark."""
    paths = {name: folder / f"{name}.json" for name in NAMES}
    return {k: json.loads(p.read_text()) for k, p in paths.items() if p.exists()}


def summary(results: Mapping[str, Any], failed: Sequence[str]) -> str:
    """Formats the goals, and when and on what every benchmark was run."""
    goals = []
    for goal in GOALS:
        figures = results.get(goal.benchmark, {"figures": {}})["figures"]
        measured = figures.get(goal.figure)
        verdict = "not measured"
        if measured is not None:
            verdict = "met" if goal.met(measured) else "missed"
        goals.append(
            [
                goal.text,
                "-" if measured is None else f"{measured:.3f}",
                f"{'>=' if goal.least else '<='} {goal.limit:g}",
                verdict,
            ]
        )
    runs = []
    for name in NAMES:
        cells = ["failed" if name in failed else "not run", ""]
        if name in results:
            environment = results[name]["environment"]
            cells = [
                results[name]["date"],
                ", ".join(f"{k} {v}" for k, v in environment.items()),
            ]
        runs.append([name, *cells])
    return (
        f"# Benchmarks\n\nWritten on {datetime.date.today()} by `python -m benchmarks`."
        f"\n\n{table(['figure', 'measured', 'goal', ''], goals)}\n\n"
        f"{table(['benchmark', 'run', 'on'], runs)}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
