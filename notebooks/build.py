"""Run the notebooks in new kernels and write them with their outputs.

    python -m notebooks.build                 # all of them
    python -m notebooks.build quickstart      # only this one
    python -m notebooks.build --check         # run them, write nothing

The source of a notebook is its script, NAME.py; the program overwrites NAME.ipynb.
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
    "prune_a_language_model",
)
"""The notebooks, in the order in which to read them."""
REPOSITORY = "granet-jax/granet_jax"
"""Where the notebooks' Colab badges and first cells look for the repository."""

_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_WIDGET = "application/vnd.jupyter.widget-view+json"


def source(name: str) -> NotebookNode:
    """Return the notebook of a script, without outputs.

    Metadata and cell ids do not depend on place and time, so that a rebuilt notebook
    differs only where its cells do.
    """
    notebook = jupytext.read(FOLDER / f"{name}.py", fmt="py:percent")
    notebook.metadata = nbformat.from_dict(_METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = NotebookNode()
    return notebook


def run(notebook: NotebookNode, *, timeout: int = 600) -> NotebookNode:
    """Run all cells in a new kernel, in order.

    Args:
      notebook: Notebook from `source`. Its outputs are filled in.
      timeout: Seconds that one cell may take.

    Returns:
      The same notebook, without widgets, which show nothing without a kernel.

    Raises:
      nbclient.exceptions.CellExecutionError: If a cell raises an exception.
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
    """Build or check the notebooks named on the command line."""
    parser = argparse.ArgumentParser(description="Build or check notebooks.")
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
