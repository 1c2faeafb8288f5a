"""The command that runs all benchmarks, and their shared tools."""

import importlib
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from benchmarks import __main__ as runner
from benchmarks.tools import command_line, results

RESULT: dict[str, Any] = {
    "date": "2001-02-03",
    "environment": {"device": "abacus"},
    "figures": {},
}
# Stands for every benchmark, takes no time, and fails as `optimizer_step`.
FAKE = """
import json, pathlib, sys
name = pathlib.Path(__file__).stem
print("this is", name)
if name == "optimizer_step":
    sys.exit(3)
if "--out" in sys.argv:
    pathlib.Path(sys.argv[-1], f"{{name}}.json").write_text(json.dumps({result!r}))
"""


def rows(summary: str, first: str) -> list[list[str]]:
    """Returns the cells of the table rows that begin with `first`."""
    lines = summary.splitlines()
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in lines]
    return [row for row in cells if row and row[0] == first]


def test_other_benchmarks_run_if_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    package, out = tmp_path / "benchmarks", tmp_path / "out"
    for folder in (package, out):
        folder.mkdir()
    for name in ("__init__", *runner.NAMES):
        (package / f"{name}.py").write_text(FAKE.format(result=RESULT))
    # `python -m` looks for packages in the current folder first.
    monkeypatch.chdir(tmp_path)
    # The result of an earlier run, which must not remain.
    (out / "optimizer_step.json").write_text(json.dumps(RESULT))
    arguments = ["--out", str(out), "--only", "optimizer_step", "selection"]
    assert runner.main(arguments) == 1
    printed = capfd.readouterr()
    assert "failed: optimizer_step\n" in printed.err
    assert "this is selection" in printed.out
    assert "this is scale" not in printed.out
    summary = (out / "summary.md").read_text()
    assert rows(summary, "optimizer_step") == [["optimizer_step", "failed", ""]]
    assert rows(summary, "selection") == [["selection", "2001-02-03", "device abacus"]]
    assert rows(summary, "scale") == [["scale", "not run", ""]]
    # Quick runs write nothing.
    before = {p for p in tmp_path.rglob("*") if "__pycache__" not in p.parts}
    assert runner.main(["--quick", "--only", "selection"]) == 0
    assert before == {p for p in tmp_path.rglob("*") if "__pycache__" not in p.parts}


@pytest.mark.parametrize(
    ("measured", "verdict"), [(39.9996, "met"), (39.999, "missed"), (41.0, "met")]
)
def test_summary_of_what_a_benchmark_writes(
    measured: float, verdict: str, tmp_path: Path
) -> None:
    options = command_line.parser("Sheep.").parse_args(["--out", str(tmp_path / "new")])
    figures = {"over_introselect": 3.2, "argsort_over_selection": measured}
    results.publish(options, "selection", "| table |", {"sheep": [1.5]}, figures)
    assert "| table |" in (options.out / "selection.md").read_text()
    saved = runner.read(options.out)
    assert saved["selection"]["sheep"] == [1.5]
    summary = runner.summary(saved, [])
    assert f"jax {jax.__version__}" in rows(summary, "selection")[0][2]
    for row in (
        ["argsort / selection", f"{measured:.3f}", ">= 40", verdict],
        ["selection / NumPy's introselect", "3.200", "<= 3", "missed"],
        ["resnet50 on v5e:4x4, bytes a leaf and pass", "-", "<= 64", "not measured"],
    ):
        assert rows(summary, row[0]) == [row]


@pytest.mark.parametrize("name", runner.NAMES)
def test_every_benchmark_takes_the_common_options(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    options = capsys.readouterr().out
    assert "--quick" in options
    assert "--out DIR" in options


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("model name\t: Xeon\n\nflags\t: avx2 avx512f avx512bw\n", "Xeon avx512bw"),
        ("processor\t: 0\nFeatures\t: fp asimd\n", "asimd"),
        ("", ""),
    ],
)
def test_name_of_the_processor(cpuinfo: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo)
    assert results.processor(path) == name
