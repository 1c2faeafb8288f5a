"""The command line that all benchmarks share."""

import argparse
from pathlib import Path


def parser(docstring: str | None) -> argparse.ArgumentParser:
    """Creates a benchmark's parser, with the options that every benchmark has.

    Args:
      docstring: Docstring of the benchmark; its first line becomes the description.
    """
    result = argparse.ArgumentParser(description=(docstring or "").split("\n")[0])
    result.add_argument(
        "--quick", action="store_true", help="only check the results, on small inputs"
    )
    result.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for results and tables"
    )
    return result
