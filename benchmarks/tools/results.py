"""Tables, the machine they were measured on, and the files that hold both."""

import argparse
import datetime
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax


def publish(
    options: argparse.Namespace,
    name: str,
    tables: str,
    results: Mapping[str, Any],
    figures: Mapping[str, float],
) -> None:
    """Prints the tables and the environment, and saves them; see `save`."""
    print(tables)
    print(environment())
    save(options, name, tables, results, figures)


def save(
    options: argparse.Namespace,
    name: str,
    tables: str,
    results: Mapping[str, Any],
    figures: Mapping[str, float],
) -> None:
    """Writes NAME.json and NAME.md if the user asked for a folder.

    Args:
      options: Parsed command line. The options are saved with the results.
      name: Name of the benchmark.
      tables: Tables in Markdown.
      results: Everything that was measured, as JSON.
      figures: Numbers that `python -m benchmarks` compares with the goals, by name.
    """
    if options.out is None:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "quick")}
    content = {
        "environment": environment(),
        "date": datetime.date.today().isoformat(),
        "options": settings,
        "figures": dict(figures),
        **results,
    }
    path = options.out / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    machine = json.dumps(environment())
    (options.out / f"{name}.md").write_text(f"{tables}\n\n{machine}\n")


def table(header: list[str], rows: list[list[str]]) -> str:
    """Formats a GitHub table: first column to the left, the others to the right."""
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
    """Describes what the numbers depend on: devices, processor, cores, versions."""
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Names the processor and, on Linux, its widest vector instructions.

    Kernels that count bytes differ several times in speed between AVX2 and AVX-512.

    Args:
      cpuinfo: File in which Linux describes its processors.
    """
    if not cpuinfo.is_file():
        return platform.processor()
    pairs = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    fields = {key.strip(): value.strip() for key, _, value in pairs}
    flags = fields.get("flags", fields.get("Features", "")).split()
    widest = next((x for x in ("avx512bw", "avx2", "sve", "asimd") if x in flags), "")
    return " ".join(filter(None, [fields.get("model name", ""), widest]))
