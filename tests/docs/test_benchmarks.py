"""The benchmarks' runner, and what they read off programs."""

import importlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array, lax

from benchmarks import __main__ as runner
from benchmarks import commands, programs, timing

RESULT = {
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
if {name!r} == "step":
    sys.exit(3)
if not options.quick:
    path = options.out / "{name}.json"
    path.write_text(json.dumps({result!r}))
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of the benchmarks some that take no time, of which `step` fails."""
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in runner.NAMES:
        (package / f"{name}.py").write_text(FAKE.format(name=name, result=RESULT))
    # `python -m` looks there first.
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_that_fails_is_named_and_the_others_run(
    fakes: Path, capfd: pytest.CaptureFixture[str]
):
    out = fakes / "out"
    out.mkdir()
    # Of an earlier run: it must not pass for one of this.
    (out / "step.json").write_text(json.dumps(RESULT))
    status = runner.main(["--out", str(out), "--only", "step", "selection"])
    printed = capfd.readouterr()
    assert status == 1
    assert "failed: step\n" in printed.err
    assert "[1/2] step" in printed.out
    assert "[2/2] selection" in printed.out
    assert "this is selection" in printed.out
    assert "this is masks" not in printed.out
    assert not (out / "step.json").exists()
    assert json.loads((out / "selection.json").read_text()) == RESULT
    lines = (out / "summary.md").read_text().splitlines()
    assert rows(lines, "step") == [["step", "failed", ""]]
    assert rows(lines, "selection") == [
        ["selection", "2001-02-03", "device 1 x abacus"]
    ]
    assert rows(lines, "masks") == [["masks", "not run", ""]]


def test_quick_runs_write_nothing(fakes: Path, capfd: pytest.CaptureFixture[str]):
    before = sorted(fakes.rglob("*"))
    assert runner.main(["--quick", "--only", "selection", "masks"]) == 0
    assert sorted(p for p in fakes.rglob("*") if "__pycache__" not in str(p)) == before
    assert "this is masks" in capfd.readouterr().out


def test_what_a_benchmark_writes_is_what_the_summary_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    parser = commands.parser("Counts sheep.\n\nAt night.")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(["--out", str(tmp_path / "new" / "folder")])
    figures = {"over_introselect": 0.25}
    commands.publish(options, "selection", "| table |", {"sheep": [1.5]}, figures)
    assert "| table |" in capsys.readouterr().out
    assert "| table |" in (options.out / "selection.md").read_text()
    found = runner.read(options.out)
    assert list(found) == ["selection"]
    assert found["selection"]["sheep"] == [1.5]
    assert found["selection"]["options"] == {"rounds": 3}
    lines = runner.summary(found, []).splitlines()
    ((_, shown, _, verdict),) = rows(lines, "selection / NumPy's introselect")
    assert (shown, verdict) == ("0.250", "met")
    ((_, _, where),) = rows(lines, "selection")
    assert f"jax {jax.__version__}" in where


def rows(lines: list[str], first: str) -> list[list[str]]:
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in lines]
    return [row for row in cells if row and row[0] == first]


@pytest.mark.parametrize(
    ("measured", "verdict"), [(39.9996, "met"), (39.999, "missed"), (41.0, "met")]
)
def test_goals_are_met_or_missed(measured: float, verdict: str):
    result: dict[str, Any] = RESULT | {
        "figures": {"over_introselect": 1.2, "argsort_over_selection": measured}
    }
    lines = runner.summary({"selection": result}, []).splitlines()
    ((_, shown, goal, found),) = rows(lines, "argsort / selection")
    assert (shown, goal, found) == (f"{measured:.3f}", ">= 40", verdict)
    ((_, shown, goal, found),) = rows(lines, "selection / NumPy's introselect")
    assert (shown, goal, found) == ("1.200", "<= 1", "missed")
    ((_, shown, _, found),) = rows(lines, "seconds to compile the step, 54 leaves")
    assert (shown, found) == ("-", "not measured")


@pytest.mark.parametrize("name", runner.NAMES)
def test_every_benchmark_takes_the_same_options(
    name: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit, match=r"^0$"):
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    options = capsys.readouterr().out
    assert "--quick" in options
    assert "--out DIR" in options


def test_trips_of_loops_are_counted():
    def inner(n: Array) -> Array:
        return lax.while_loop(lambda i: i < n, lambda i: i + 1, jnp.zeros_like(n))

    @jax.jit
    def nested(n: Array) -> Array:
        # 2 + 3 + ... + (n - 1) trips of the inner loop, and then n.
        last = lax.while_loop(lambda i: i < n, lambda i: i + inner(i) // i, n // n + 1)
        return last + inner(n)

    assert programs.count_trips(nested, jnp.asarray(6)) == [4, 2 + 3 + 4 + 5, 6]
    assert programs.count_trips(inner, jnp.asarray(0)) == [0]


def test_copies_are_told_by_where_they_are():
    program = """
%fused (p: f32[8,2]) -> f32[8,2] {
  ROOT %copy.1 = f32[8,2]{1,0} copy(%p)
}

%body (t: (s32[], f32[8,2])) -> (s32[], f32[8,2]) {
  %f = f32[8,2]{1,0} fusion(%x), kind=kLoop, calls=%fused
}

ENTRY %main (a: pred[3,5], b: f32[8,2]) -> pred[3,5] {
  %w = (s32[], f32[8,2]) while(%t), condition=%test, body=%body
  ROOT %copy.2 = pred[3,5]{1,0} copy(%a)
}
"""
    found = programs.copies(program)
    assert sorted(found) == [(15, False), (64, True)]


@pytest.mark.parametrize(
    ("says", "name"),
    [
        ("model name\t: AMD EPYC\nflags\t\t: sse avx avx2 bmi2\n", "AMD EPYC avx2"),
        ("model name\t: Xeon\n\nflags\t: avx2 avx512f avx512bw\n", "Xeon avx512bw"),
        ("processor\t: 0\nFeatures\t: fp asimd\n", "asimd"),
        ("", ""),
    ],
)
def test_name_of_the_processor(says: str, name: str, tmp_path: Path) -> None:
    about = tmp_path / "cpuinfo"
    about.write_text(says)
    assert timing.processor(about) == name
