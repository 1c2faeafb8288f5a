"""The notebooks match their scripts, have outputs, and run from a new kernel."""

import re

import jupytext.cli
import nbformat
import pytest

from notebooks import build

SETTINGS = {
    "NOTEBOOK_STEPS": "60",  # The assertions hold after any number of steps.
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # Most of the time is compilation.
}
MACHINE_PATHS = re.compile(r"/(?:tmp|home|root|work|usr|opt|Users)/|site-packages")


def test_every_script_has_its_notebook():
    scripts = {path.stem for path in build.FOLDER.glob("*.py")} - {"__init__", "build"}
    notebooks = {path.stem for path in build.FOLDER.glob("*.ipynb")}
    assert set(build.NAMES) == scripts == notebooks


@pytest.mark.parametrize("name", build.NAMES)
def test_notebook_is_its_script_with_outputs(
    name: str, capsys: pytest.CaptureFixture[str]
):
    path = build.FOLDER / f"{name}.ipynb"
    notebook, script = nbformat.read(path, as_version=4), build.source(name)
    nbformat.validate(notebook)
    jupytext.cli.jupytext(["--paired-paths", str(path)])
    assert capsys.readouterr().out.split() == [str(path.with_suffix(".py"))]

    cells, sources = (
        [(cell.id, cell.cell_type, cell.source, cell.metadata) for cell in n.cells]
        for n in (notebook, script)
    )
    assert cells == sources, f"run python -m notebooks.build {name}"
    assert notebook.metadata == script.metadata
    assert not any(cell.metadata for cell in notebook.cells)
    first, setup = notebook.cells[:2]
    assert first.source.startswith("# ")
    assert f"/{build.REPOSITORY}/blob/main/notebooks/{name}.ipynb" in first.source
    assert "google.colab" in setup.source
    assert f"github.com/{build.REPOSITORY}" in setup.source

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    kinds = {output.output_type for output in outputs}
    assert {"stream"} <= kinds <= {"stream", "display_data", "execute_result"}
    for output in outputs:
        assert output.get("name") != "stderr"
        text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
        assert not MACHINE_PATHS.search(text)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 300_000


@pytest.fixture
def _little_training(monkeypatch: pytest.MonkeyPatch):
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("_little_training")
@pytest.mark.parametrize("name", [n for n in build.NAMES if n != "exploring_masks"])
def test_notebook_runs_from_a_new_kernel(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.argv", ["build", "--check", name])
    build.main()
    assert capsys.readouterr().out.startswith(f"{name}: ")


@pytest.mark.usefixtures("_little_training")
def test_exploring_masks_runs_and_its_slider_changes_the_figure():
    notebook = build.source("exploring_masks")
    code = """
def shown():
    (axes, _) = explorer.result.axes
    return axes.images[0].get_array(), axes.get_title()

start, title = shown()
assert title.startswith("GraNet, step 0") and start.min() == start.max() == 300
slider.value = STEPS
end, title = shown()
assert title.startswith(f"GraNet, step {STEPS}") and end.sum() < start.sum() / 5
print("moved")
"""
    notebook.cells.append(nbformat.v4.new_code_cell(code))
    assert build.run(notebook).cells[-1].outputs[0].text == "moved\n"
