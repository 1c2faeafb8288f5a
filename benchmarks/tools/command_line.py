"""The command line that all benchmarks share, and the files that they write."""

import argparse
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import timing


def parser(text: str | None) -> argparse.ArgumentParser:
    """For the benchmark with this docstring, with the options of all of them."""
    made = argparse.ArgumentParser(description=(text or "").split("\n")[0])
    made.add_argument("--quick", action="store_true", help="check results only, small")
    made.add_argument("--out", type=Path, metavar="DIR", help="folder for JSON, tables")
    return made


def publish(
    options: argparse.Namespace,
    name: str,
    tables: str,
    results: Mapping[str, Any],
    figures: Mapping[str, float],
) -> None:
    """Prints tables and environment, and writes them: see `write`."""
    print(tables)
    print(timing.environment())
    write(options, name, tables, results, figures)


def write(
    options: argparse.Namespace,
    name: str,
    tables: str,
    results: Mapping[str, Any],
    figures: Mapping[str, float],
) -> None:
    """Writes NAME.json and NAME.md, where a folder was asked for.

    Args:
      options: of `parser`; the benchmark's own are written with the results.
      name: of the benchmark.
      tables: in Markdown.
      results: all that was measured, as JSON.
      figures: by name, the numbers that `python -m benchmarks` holds against goals.
    """
    if options.out is None:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    given = {k: v for k, v in vars(options).items() if k not in ("out", "quick")}
    timing.write_json(
        options.out / f"{name}.json",
        {
            "date": datetime.date.today().isoformat(),
            "options": given,
            "figures": dict(figures),
            **results,
        },
    )
    about = json.dumps(timing.environment())
    (options.out / f"{name}.md").write_text(f"{tables}\n\n{about}\n")
