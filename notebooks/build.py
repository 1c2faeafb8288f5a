"""Runs the notebooks from fresh kernels and writes them with their outputs.

    python -m notebooks.build                 # all of them
    python -m notebooks.build quickstart      # those named
    python -m notebooks.build --check         # to see that they run: writes nothing

The source of a notebook is its script, NAME.py; NAME.ipynb is written anew.
"""

import argparse
import time
from pathlib import Path

import jupytext
import nbclient
import nbformat
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
NAMES = (
    "quickstart",
    "exploring_masks",
    "pruning_plasticity",
    "your_own_method",
    "any_model",
)
"""In the order in which to read them."""

_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_WIDGET = "application/vnd.jupyter.widget-view+json"


def source(name: str) -> NotebookNode:
    """The notebook that a script is, without outputs.

    Metadata and cell ids say nothing of where and when, so that a notebook that is
    built again differs only where its cells do.
    """
    notebook = jupytext.read(FOLDER / f"{name}.py", fmt="py:percent")
    notebook.metadata = nbformat.from_dict(_METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = NotebookNode()
    return notebook


def run(notebook: NotebookNode, *, timeout: int = 600) -> NotebookNode:
    """Runs all cells in a new kernel, from the first to the last.

    Args:
      notebook: from `source`; its outputs are filled in.
      timeout: seconds that a cell may take.

    Returns:
      The same notebook. Widgets are not kept: without a kernel they show nothing.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raised an exception.
    """
    nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=timeout,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        resources={"metadata": {"path": str(FOLDER)}},
    ).execute()
    notebook.metadata = nbformat.from_dict(_METADATA)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [x for x in cell.outputs if _WIDGET not in x.get("data", {})]
            cell.metadata = NotebookNode()
    return notebook


def main() -> None:
    """Builds, or checks, the notebooks named on the command line."""
    parser = argparse.ArgumentParser(description="Runs notebooks, keeps the outputs.")
    parser.add_argument("names", nargs="*", default=NAMES, help=", ".join(NAMES))
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    for name in args.names:
        began = time.monotonic()
        notebook = run(source(name))
        if not args.check:
            nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        size = len(nbformat.writes(notebook)) / 1000
        print(f"{name}: {time.monotonic() - began:.0f} s, {size:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
