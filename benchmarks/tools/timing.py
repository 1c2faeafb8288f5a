"""Timing of several contenders in one run, round by round in turn."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

Rounds = dict[str, list[float]]


def interleaved(
    contenders: Mapping[str, Callable[[], Any]], *, rounds: int, repeats: int = 1
) -> Rounds:
    """Seconds per call of every contender, one number a round.

    The contenders take `turns` within a round, so that a change in the machine's load
    touches all of them alike. One call of each, compilation included, goes before and
    is not timed.

    Args:
      contenders: functions without arguments; what they return is waited for.
      rounds: how many times each contender is timed.
      repeats: calls per timing, of which the mean is taken.

    Returns:
      For every contender its seconds per call, in the order of the rounds.
    """
    names = list(contenders)
    for name in names:
        jax.block_until_ready(contenders[name]())
    seconds: Rounds = {name: [] for name in names}
    for order in turns(names, rounds):
        for name in order:
            result = None
            start = time.perf_counter()
            for _ in range(repeats):
                result = contenders[name]()
            jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - start) / repeats)
    return seconds


def turns(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """The order of the contenders in each round.

    Drawn anew for every round, so that what one leaves behind, in caches say, is not
    always the same one's to find; and the same orders in every run.
    """
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        yield list(rng.permutation(names))


def ratio_of_medians(seconds: Rounds, name: str, baseline: str) -> float:
    """Median of `name` divided by the median of `baseline`."""
    return statistics.median(seconds[name]) / statistics.median(seconds[baseline])


def median_ratio(seconds: Rounds, name: str, baseline: str) -> float:
    """Median over the rounds of `name` divided by `baseline` in the same round."""
    pairs = zip(seconds[name], seconds[baseline], strict=True)
    return statistics.median(a / b for a, b in pairs)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A GitHub-flavoured table: the first column to the left, numbers to the right."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * width if i == 0 else "-" * (width - 1) + ":"
        for i, width in enumerate(widths)
    ]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def environment() -> dict[str, Any]:
    """What the numbers depend on: devices, processor, cores, versions."""
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def processor(about: Path = Path("/proc/cpuinfo")) -> str:
    """Name of the processor, and the widest vectors it computes with (on Linux).

    Kernels that count bytes differ by several times between AVX2 and AVX-512.

    Args:
      about: what Linux says of its processors.
    """
    if not about.is_file():
        return platform.processor()
    pairs = (line.partition(":") for line in about.read_text().splitlines())
    says = {key.strip(): value.strip() for key, _, value in pairs}
    flags = says.get("flags", says.get("Features", "")).split()
    widest = next((x for x in ("avx512bw", "avx2", "sve", "asimd") if x in flags), "")
    return " ".join(filter(None, [says.get("model name", ""), widest]))


def write_json(path: Path | None, results: dict[str, Any]) -> None:
    """Writes results and environment to `path`, if one is given."""
    if path is not None:
        content = {"environment": environment(), **results}
        path.write_text(json.dumps(content, indent=2) + "\n")
