"""The notebooks are as their scripts, have outputs, and run from a new kernel."""

import os
import re
import subprocess
import sys
from typing import Any

import jupytext.cli
import nbformat
import pytest

from notebooks import build

# Steps of training, for the sizes of the networks and not for what they learn.
STEPS = "60"
SCRIPTS = {path.stem for path in build.FOLDER.glob("*.py")} - {"__init__", "build"}
# Of the machine that built it.
PATHS = re.compile(r"/(?:tmp|home|root|work|usr|opt|Users)/|site-packages")


def written(name: str) -> Any:
    notebook = nbformat.read(build.FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_script_has_its_notebook():
    notebooks = {path.stem for path in build.FOLDER.glob("*.ipynb")}
    assert set(build.NAMES) == SCRIPTS == notebooks


@pytest.mark.parametrize("name", build.NAMES)
def test_notebook_is_its_script(name: str):
    script, notebook = build.source(name), written(name)
    cells = [
        [(c.id, c.cell_type, c.source) for c in n.cells] for n in (script, notebook)
    ]
    assert cells[0] == cells[1], f"run python -m notebooks.build {name}"
    assert notebook.metadata == script.metadata
    assert all(not cell.metadata for cell in notebook.cells)


def test_scripts_and_notebooks_are_paired(capsys: pytest.CaptureFixture[str]):
    for name in build.NAMES:
        jupytext.cli.jupytext(["--paired-paths", str(build.FOLDER / f"{name}.ipynb")])
        assert capsys.readouterr().out.split() == [str(build.FOLDER / f"{name}.py")]


@pytest.mark.parametrize("name", build.NAMES)
def test_outputs_are_kept(name: str):
    notebook = written(name)
    cells = code(notebook)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    kinds = {output.output_type for output in outputs}
    assert {"stream"} <= kinds <= {"stream", "display_data", "execute_result"}
    for output in outputs:
        # Warnings, and where data were prepared.
        assert output.get("name") != "stderr"
        shown = output.get("text", "") + output.get("data", {}).get("text/plain", "")
        assert not PATHS.search(shown)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (build.FOLDER / f"{name}.ipynb").stat().st_size < 300_000


@pytest.mark.parametrize("name", build.NAMES)
def test_first_cells_are_for_readers(name: str):
    first, setup = written(name).cells[:2]
    assert first.source.startswith("# ")
    assert f"/OWNER/granet_jax/blob/main/notebooks/{name}.ipynb" in first.source
    assert "google.colab" in setup.source


def run(*arguments: str) -> str:
    """Runs Python with little training, in a process of its own.

    The warnings and the event loop of the notebooks' client are not ours.
    """
    settings = {
        "NOTEBOOK_STEPS": STEPS,
        "JAX_PLATFORMS": "cpu",
        # Compiling is most of it.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=build.FOLDER.parent,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [n for n in build.NAMES if n != "exploring_masks"])
def test_runs_from_a_new_kernel(name: str):
    # The assertions are the notebook's own.
    assert run("-m", "notebooks.build", "--check", name).startswith(f"{name}: ")


def test_exploring_masks_runs_and_its_slider_shows_another_figure():
    code = """
from nbformat.v4 import new_code_cell
from notebooks import build

notebook = build.source("exploring_masks")
notebook.cells.append(new_code_cell('''
def shown():
    (axes, _) = explorer.result.axes
    return axes.images[0].get_array(), axes.get_title()

start, title = shown()
assert title.startswith("GraNet, step 0") and start.min() == start.max() == 300
slider.value = STEPS
end, title = shown()
assert title.startswith(f"GraNet, step {STEPS}") and end.sum() < start.sum() / 5
print("moved")
'''))
print(build.run(notebook).cells[-1].outputs[0].text)
"""
    assert run("-c", code).split() == ["moved"]
