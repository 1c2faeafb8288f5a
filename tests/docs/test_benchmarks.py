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
    "environment": {"device": "1 x abacus"},
    "figures": {"over_introselect": 0.5, "argsort_over_selection": 39.999},
}
FAKE = """
import argparse, json, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true")
parser.add_argument("--out", type=pathlib.Path)
options = parser.parse_args()
print("this is", {name!r})
if {name!r} == "optimizer_step":
    sys.exit(3)
if not options.quick:
    path = options.out / "{name}.json"
    path.write_text(json.dumps({result!r}))
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replaces the benchmarks by programs that take no time; `optimizer_step` fails."""
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in runner.NAMES:
        (package / f"{name}.py").write_text(FAKE.format(name=name, result=RESULT))
    # `python -m` looks for packages in the current folder first.
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(summary: str, first: str) -> list[list[str]]:
    """Returns the cells of the table rows that begin with `first`."""
    lines = summary.splitlines()
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in lines]
    return [row for row in cells if row and row[0] == first]


def test_other_benchmarks_run_if_one_fails(
    fakes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = fakes / "out"
    out.mkdir()
    # The result of an earlier run, which must not remain.
    (out / "optimizer_step.json").write_text(json.dumps(RESULT))
    arguments = ["--out", str(out), "--only", "optimizer_step", "selection"]
    assert runner.main(arguments) == 1
    printed = capfd.readouterr()
    assert "failed: optimizer_step\n" in printed.err
    assert "[2/2] selection" in printed.out
    assert "this is selection" in printed.out
    assert "this is mask_sources" not in printed.out
    assert not (out / "optimizer_step.json").exists()
    summary = (out / "summary.md").read_text()
    assert rows(summary, "optimizer_step") == [["optimizer_step", "failed", ""]]
    assert rows(summary, "selection") == [
        ["selection", "2001-02-03", "device 1 x abacus"]
    ]
    assert rows(summary, "mask_sources") == [["mask_sources", "not run", ""]]


def test_quick_runs_write_nothing(
    fakes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(fakes.rglob("*"))
    assert runner.main(["--quick", "--only", "selection", "mask_sources"]) == 0
    assert sorted(p for p in fakes.rglob("*") if "__pycache__" not in str(p)) == before
    assert "this is mask_sources" in capfd.readouterr().out


def test_the_summary_reads_what_a_benchmark_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = command_line.parser("Counts sheep.\n\nAt night.")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(["--out", str(tmp_path / "new" / "folder")])
    figures = {"over_introselect": 0.25}
    results.publish(options, "selection", "| table |", {"sheep": [1.5]}, figures)
    assert "| table |" in capsys.readouterr().out
    assert "| table |" in (options.out / "selection.md").read_text()
    saved = runner.read(options.out)
    assert list(saved) == ["selection"]
    assert saved["selection"]["sheep"] == [1.5]
    assert saved["selection"]["options"] == {"rounds": 3}
    ((_, _, environment),) = rows(runner.summary(saved, []), "selection")
    assert f"jax {jax.__version__}" in environment


@pytest.mark.parametrize(
    ("measured", "verdict"), [(39.9996, "met"), (39.999, "missed"), (41.0, "met")]
)
def test_goals_are_met_or_missed(measured: float, verdict: str) -> None:
    figures = {"over_introselect": 3.2, "argsort_over_selection": measured}
    summary = runner.summary({"selection": RESULT | {"figures": figures}}, [])
    assert rows(summary, "argsort / selection") == [
        ["argsort / selection", f"{measured:.3f}", ">= 40", verdict]
    ]
    ((_, *cells),) = rows(summary, "selection / NumPy's introselect")
    assert cells == ["3.200", "<= 3", "missed"]
    ((_, *cells),) = rows(summary, "seconds to compile the step, 1,000 leaves")
    assert cells == ["-", "<= 60", "not measured"]


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
        ("model name\t: AMD EPYC\nflags\t\t: sse avx avx2 bmi2\n", "AMD EPYC avx2"),
        ("model name\t: Xeon\n\nflags\t: avx2 avx512f avx512bw\n", "Xeon avx512bw"),
        ("processor\t: 0\nFeatures\t: fp asimd\n", "asimd"),
        ("", ""),
    ],
)
def test_name_of_the_processor(cpuinfo: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo)
    assert results.processor(path) == name
