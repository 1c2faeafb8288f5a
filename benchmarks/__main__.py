"""All benchmarks, each in a process of its own, and how they stand to the goals.

    python -m benchmarks             # all, into benchmarks/results/DEVICE
    python -m benchmarks --only selection step --out DIR
    python -m benchmarks --quick     # checks of the results only

Each writes NAME.json and NAME.md. All that lie in the folder, of other days too, make
summary.md: which were run when and on what, and for every goal the figure measured. The
exit status is 1 if one failed; the others are run all the same.
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

from benchmarks import commands, timing

NAMES = (
    "selection",
    "step",
    "training",
    "throughput",
    "masks",
    "sparse_linear",
    "file_size",
    "scale",
    "estimate",
)
RESULTS = Path(__file__).parent / "results"


class Goal(NamedTuple):
    """A figure of a benchmark, and where it should be.

    Attributes:
      text: what it is.
      benchmark: that measures it.
      figure: its name there.
      limit: the most it should be, or the least.
      least: which of both.
    """

    text: str
    benchmark: str
    figure: str
    limit: float
    least: bool = False

    def met(self, measured: float) -> bool:
        """Whether it is reached, to the three decimals that are shown."""
        if self.least:
            return round(measured, 3) >= self.limit
        return round(measured, 3) <= self.limit


STEPS = [
    f"{o}, gradients {g}"
    for o in ("sgd-momentum", "adamw")
    for g in ("inside", "argument")
]
GOALS = (
    Goal("selection / NumPy's introselect", "selection", "over_introselect", 1.0),
    Goal(
        "argsort / selection", "selection", "argsort_over_selection", 40.0, least=True
    ),
    *(
        Goal(f"optimizer step, {s}: sparse / dense", "step", f"{s}, sparse", 1.05)
        for s in STEPS
    ),
    *(
        Goal(f"optimizer step, {s}: packed / dense", "step", f"{s}, packed", 1.10)
        for s in STEPS
    ),
    Goal("training step of ResNet-20: sparse / dense", "training", "training", 1.01),
    *(
        Goal(f"temporary bytes a weight, {m} update", "selection", f"memory_{m}", 1.4)
        for m in ("granet", "rigl")
    ),
    Goal("state, bytes a weight", "step", "state bytes a weight, sparse", 1.0),
    Goal("packed state, bytes a weight", "step", "state bytes a weight, packed", 0.125),
    Goal("seconds to compile the step, 54 leaves", "step", "compile seconds", 10.0),
    Goal(
        "seconds to compile the step, 1,000 leaves",
        "scale",
        "1000-leaves, seconds to compile",
        60.0,
    ),
    *(
        Goal(
            f"KiB sent by an update, {tree}, {axes} axes", "scale", f"{tree}, {axes}", k
        )
        for tree, k in (("resnet50", 64), ("7b-stacked", 1024))
        for axes in ("explicit", "auto")
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmarks one after the other; the exit status."""
    parser = commands.parser(__doc__)
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
        ended = f"failed, exit status {status}" if status else "done"
        print(f"== {label}: {ended}, {seconds:.0f} s", flush=True)
        if status:
            failed.append(name)
        if not options.quick:
            # After each: a run that is stopped has been of use.
            (out / "summary.md").write_text(summary(read(out), failed))
    if not options.quick:
        print((out / "summary.md").read_text())
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def device() -> str:
    """Name of the device as that of a folder."""
    # Asked in another process: whoever asks takes hold of the device's memory.
    code = "import jax; print(jax.devices()[0].device_kind)"
    asked = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True
    )
    return re.sub(r"[^a-z0-9]+", "-", asked.stdout.lower()).strip("-")


def run(name: str, out: Path | None) -> int:
    """A benchmark in a process of its own, quick without `out`; its exit status."""
    command = [sys.executable, "-m", f"benchmarks.{name}"]
    if out is None:
        return subprocess.run([*command, "--quick"], check=False).returncode
    # Nothing of an earlier run is to pass for one that fails now.
    (out / f"{name}.json").unlink(missing_ok=True)
    # Seconds of compilation are measured, too.
    uncached = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    return subprocess.run(
        [*command, "--out", str(out)], env=uncached, check=False
    ).returncode


def read(folder: Path) -> dict[str, Any]:
    """The results in a folder, by benchmark."""
    paths = {name: folder / f"{name}.json" for name in NAMES}
    return {k: json.loads(p.read_text()) for k, p in paths.items() if p.exists()}


def summary(results: Mapping[str, Any], failed: Sequence[str]) -> str:
    """Markdown: the goals, and what was run when and on what."""
    goals = []
    for goal in GOALS:
        found = results.get(goal.benchmark, {"figures": {}})["figures"]
        measured = found.get(goal.figure)
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
            about = results[name]["environment"]
            cells = [
                results[name]["date"],
                ", ".join(f"{k} {v}" for k, v in about.items()),
            ]
        runs.append([name, *cells])
    return (
        f"# Benchmarks\n\nWritten on {datetime.date.today()} by `python -m benchmarks`."
        f"\n\n{timing.table(['figure', 'measured', 'goal', ''], goals)}\n\n"
        f"{timing.table(['benchmark', 'run', 'on'], runs)}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
