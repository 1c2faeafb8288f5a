"""Sweeps: the file, continuing where one stopped, and the results."""

import dataclasses
import json
import os
import pathlib
import re
import signal
from collections.abc import Mapping
from typing import Any

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest

import granet_jax
from experiments import sweep
from experiments.config.sweep import Sweep, read
from experiments.reports import sweep as sweep_report
from experiments.reports.training import MethodRuns
from experiments.training import loop, run_folders, sweep_tasks
from experiments.training.metrics import Log, MetricsRecord
from experiments.training.stop_signal import StopSignal
from granet_jax.analysis import plots
from tests.helpers import runs
from tests.helpers.runs import TOTAL, active_count

SWEEPS = pathlib.Path(sweep.__file__).parent / "sweeps"
TINY = """
methods = ["dense", "rigl"]
sparsities = [0.9, 0.95]
seeds = 2
vmap_seeds = false
[train]
model = "lenet-300-100"
steps = 6
eval_every = 3
masks.interval = 2
data.dataset = "digits"
"""
NAMED = TINY.replace('"rigl"', '"set", "snip"').replace("= false", '= "auto"')
NAMED += """
[method.snip]
method = "static"
masks.source = "snip"
optimizer.momentum = 0.5
[variants]
labels = { tost.labels = 0.1 }
slow = { optimizer.learning-rate = 0.01, optimizer.momentum = 0.8 }
"""


def parse(tmp_path: pathlib.Path, text: str) -> Sweep:
    path = tmp_path / "file.toml"
    path.write_text(text)
    return read(path)


def record(step: int, accuracy: float, active: int) -> MetricsRecord:
    sparsity = 1 - active / TOTAL
    return MetricsRecord(
        step=step,
        train_loss=None if step == 0 else 0.5,
        test_correct=round(accuracy * 1000),
        test_accuracy=accuracy,
        test_loss=1.0,
        sparsity=granet_jax.Sparsity(sparsity, {"kernel": sparsity}, active, TOTAL),
        learning_rate=0.1,
        seconds=1.0,
    )


def test_cells_are_as_the_file_says(tmp_path):
    text = TINY.replace('"rigl"]', '"granet-st", "set"]').replace("= false", '= "auto"')
    text = text.replace("interval = 2", "interval = 1\nmasks.stop = 0.5")
    text = text.replace("[0.9, 0.95]", "[0.98, 0.9]").replace("seeds = 2", "seeds = 4")
    text += """
data.batch-size = 128
optimizer.drops = [0.25]
optimizer.learning_rate = 1
[method.set]
masks.interval = 2
optimizer.weight_decay = 0.0
"""
    plan = parse(tmp_path, text)
    cells = plan.cells
    assert " ".join(cells) == "dense granet-st-0.9 granet-st-0.98 set-0.9 set-0.98"
    assert (plan.sparsities, plan.seeds) == ((0.9, 0.98), 4)
    assert plan.vmap_seeds is None
    for config in cells.values():
        assert (config.model, config.steps, config.seeds) == ("lenet-300-100", 6, 4)
        assert config.data.batch_size == 128
        assert type(config.optimizer.learning_rate) is float
        assert config.optimizer.drops == (0.25,)
        assert (config.seed, config.baseline, config.vmap_seeds) == (0, False, False)
    masks = {n: (c.masks.interval, c.masks.stop) for n, c in cells.items()}
    assert masks["granet-st-0.9"] == (1, None)
    assert masks["set-0.98"] == (2, 0.5)
    assert masks["dense"] == (None, None)
    assert cells["set-0.9"].optimizer.weight_decay == 0.0
    assert cells["dense"].optimizer.weight_decay == 5e-4
    assert cells["set-0.98"].sparsity == 0.98


SLASH = '"a/b"]\nmethod."a/b".method = "set"'
# (file, what is replaced, by what, part of the message)
ERRORS = [
    (TINY, "seeds = 2", "sedes = 2", r"sedes is unknown. Did you mean seeds"),
    (TINY, "seeds = 2", "", r"seeds is missing"),
    (TINY, '"rigl"', '"rigel"', r"methods must be one of .*'rigel'.*'rigl'"),
    (TINY, '"rigl"', '"dense"', r"methods has a value twice"),
    (TINY, "[0.9, 0.95]", "[]", r"sparsities must not be empty"),
    (TINY, "[0.9, 0.95]", "0.9", r"sparsities must be a list.*got 0.9"),
    (TINY, "0.95]", "1.5]", r"rigl-1.5: sparsity must lie in \[0, 1\), got 1.5"),
    (TINY, "seeds = 2", "seeds = true", r"seeds must be an integer, got True"),
    (TINY, "= false", '= "no"', r"vmap_seeds must be true or false or 'auto'"),
    (TINY, ".interval", ".intreval", r"train.masks.intreval is unk.*masks.interval\?"),
    (TINY, "masks.interval", "masks", r"train.masks must be a table"),
    (TINY, "= 6", '= "6"', r"train.steps must be an integer, got '6'"),
    (TINY, "= 6", "= 0", r"dense: steps must lie in"),
    (TINY, "= 6", '= 6\noptimizer.name = "adam"', r"one of sgd, adamw.*'adamw'"),
    (TINY, "= 6", "= 6\nseed = 1", r"train.seed is not for a sweep"),
    (TINY, "= 6", "= 6\nmasks.pruning_end = 0.5", r"train.masks.pruning_end is not"),
    (TINY, '"rigl"', '"mine"', r"methods must be .*a table \[method.NAME\].*'mine'"),
    (NAMED, 'method = "static"', "", r"method.snip.method is missing"),
    (NAMED, "[method.snip]", "[method.set]", r"method.set.method is for rows with na"),
    (TINY, '"rigl"]', SLASH, "the name of a row is also"),
    (TINY, "[train]", "[method.rigel]\n[train]", r"method.rigel is unknown"),
    (TINY, "[train]", "[method.gmp]\n[train]", r"gmp is not one of methods"),
    (NAMED, "optimizer.momentum = 0.5", "steps = 7", r"snip.steps must be the same"),
    (NAMED, 'source = "snip"', "stop = 0.5", r"snip-0.9: masks.stop is not an option"),
    (TINY, "= 3", "= 3\neval-every = 3", r"train.eval.every is given twice"),
    (TINY, "seeds = 2", "seeds = ", r"is not a TOML file"),
    (NAMED, "slow =", '"a/b" =', "variants has 'a/b'"),
    (NAMED, "{ tost.labels = 0.1 }", "0.1", r"variants.labels must be a table"),
    (NAMED, '"set"', '"set+slow"', r"methods must be one of .*'set\+slow'"),
]


@pytest.mark.parametrize(("text", "old", "new", "message"), ERRORS)
def test_bad_files_are_refused(text, old, new, message, tmp_path):
    assert old in text
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, text.replace(old, new, 1))


def test_the_command_refuses_bad_files_and_folders(fake, tmp_path, capsys):
    out = tmp_path / "out"

    def refused(text: str) -> str:
        (tmp_path / "file.toml").write_text(text)
        assert sweep.main([str(tmp_path / "file.toml"), "--out", str(out)]) == 2
        return capsys.readouterr().err

    assert "error: " in refused("seeds = 2")
    assert sweep.main([str(tmp_path / "none.toml")]) == 2
    assert "none.toml" in capsys.readouterr().err
    assert not out.exists()
    out.mkdir()
    (out / "thesis.tex").write_text("")
    assert "neither empty nor the folder of a sweep" in refused(TINY)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    assert fake.done == []


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.toml")), ids=lambda p: p.stem)
def test_the_sweeps_of_the_repository_give_all_methods_one_budget(path):
    plan = read(path)
    first = plan.first
    own = ("method", "sparsity", "masks", "tost", "optimizer")
    for config in plan.cells.values():
        assert config.optimizer.learning_rate == first.optimizer.learning_rate
        same = {name: getattr(first, name) for name in own}
        assert dataclasses.replace(config, **same) == first
    dynamic = [c for c in plan.cells.values() if c.method not in ("dense", "static")]
    intervals = {config.mask_interval for config in dynamic}
    # One sweep is about the interval.
    assert (
        len(intervals) == 4 if path.stem == "lenet-exploration" else len(intervals) <= 1
    )


def test_rows_may_have_names_options_and_variants(tmp_path):
    plan = parse(tmp_path, NAMED)
    suffixes = ("", "+labels", "+slow")
    rows = tuple(row + x for row in ("dense", "set", "snip") for x in suffixes)
    assert plan.methods == rows
    assert plan.plain == ("dense", "set", "snip")
    assert len(plan.cells) == 3 + 3 * 2 + 3 * 2
    for name, config in plan.cells.items():
        row = name.partition("-")[0].partition("+")[0]
        assert config.method == ("static" if row == "snip" else row)
        assert config.masks.source == ("snip" if row == "snip" else None)
        assert config.tost.labels == (0.1 if "labels" in name else None)
        assert config.optimizer.learning_rate == (0.01 if "slow" in name else 0.1)
        momentum = 0.5 if row == "snip" else 0.9
        assert config.optimizer.momentum == (0.8 if "slow" in name else momentum)
    # The page shows rows with names, and variants.
    page = (SWEEPS.parent / "README.md").read_text()
    methods = []
    for block in re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL):
        head, _, rest = block.partition("\n")
        text = f"{head}\nsparsities = [0.9]\nseeds = 1\n{rest}"
        methods.append(parse(tmp_path, text).methods)
    assert methods == [
        ("dense", "rigl", "snip", "snip-labels"),
        ("dense", "dense+labels", "dense+lrsi", "rigl", "rigl+labels", "rigl+lrsi"),
    ]


class Fake:
    """Stands in for training: writes the files of a run, and lists the runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.done: list[str] = []
        self.fails: dict[str, BaseException] = {}
        monkeypatch.setattr(loop, "create", lambda config, dataset: config)
        monkeypatch.setattr(sweep.devices, "compile_step", lambda config, dataset: None)
        monkeypatch.setattr(sweep_tasks, "train_seeds", self.train)
        monkeypatch.setattr(
            sweep_report, "plot", lambda sweep, runs, path: path.touch()
        )

    def train(self, config, seeds, folder, bar, stopped):
        run_folder = folder / run_folders.run_name(config.method, seeds)
        name = f"{folder.name}/{run_folder.name}"
        if name in self.fails:
            raise self.fails.pop(name)
        self.done.append(name)
        run_folder.mkdir()
        log = Log(run_folder, config.method, seeds, writes=True)
        log.resume(-1)
        active = active_count(config.sparsity)
        for step, share in ((0, 0.1), (3, 0.8), (config.steps, 0.75)):
            log.add([record(step, share + seed / 100, active) for seed in seeds])
        log.close()
        (run_folder / "checkpoints" / str(config.steps)).mkdir(parents=True)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(monkeypatch)


CELLS = ("dense", "rigl-0.9", "rigl-0.95")


def run_names(seeds: str, *cells: str) -> list[str]:
    """Names of the runs of these cells."""
    return [f"{cell}/{cell.partition('-')[0]}-{seeds}" for cell in cells]


ALL = [run for cell in CELLS for seed in "01" for run in run_names(f"seed{seed}", cell)]


@pytest.fixture
def tiny(tmp_path, fake) -> Any:
    """Runs a sweep of the file TINY with some changes, in one folder."""

    def run(changes: Mapping[str, str] | None = None) -> dict[str, MethodRuns]:
        text = TINY
        for old, new in (changes or {}).items():
            assert old in text
            text = text.replace(old, new, 1)
        return sweep.run(parse(tmp_path, text), tmp_path / "out", progress=False)

    return run


def test_a_sweep_continues_where_it_was_stopped(
    fake, tiny, tmp_path, monkeypatch, capsys
):
    config, out = parse(tmp_path, TINY), tmp_path / "out"
    fake.fails = {ALL[3]: loop.StoppedError(3, signal.SIGTERM)}
    command = [str(tmp_path / "file.toml"), "--out", str(out), "--no-progress"]
    assert sweep.main(command) == 128 + signal.SIGTERM
    assert str(out) in capsys.readouterr().err
    assert fake.done == ALL[:3]
    # The results so far are those after the last finished run.
    text = (out / "results.md").read_text()
    assert "| rigl | 75.00 (1 of 2 seeds) | - |" in text
    assert sweep.main(command) == 0
    assert fake.done == ALL
    assert "(1 of 2" not in (out / "results.md").read_text()
    before = (out / "results.json").read_bytes()
    # Everything is there, so that neither data nor a program is needed.
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "load", None)
        tiny()
    assert fake.done == ALL
    assert (out / "results.json").read_bytes() == before
    # A run without its last checkpoint or its last record is trained again.
    (out / ALL[4] / "checkpoints" / "6").rmdir()
    path = out / ALL[2] / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(True)[:-1]) + '{"cut')
    for cell in CELLS[1:]:
        assert sweep.groups(config.cells[cell], out / cell, False) == [range(1)]
        assert sweep.finished_groups(config.cells[cell], out / cell) == [range(1, 2)]


def test_seeds_methods_and_sparsities_may_be_added(fake, tiny, tmp_path):
    tiny()
    changes = {"seeds = 2": "seeds = 3", "[0.9,": "[0.8, 0.9,"}
    tiny(changes | {'"rigl"': '"rigl", "set"'})
    cells = [f"{m}-{s}" for m in ("rigl", "set") for s in (0.8, 0.9, 0.95)]
    expected = [run for i in range(3) for run in run_names(f"seed{i}", "dense", *cells)]
    assert sorted(fake.done) == sorted(expected)
    assert "over 3 seeds" in (tmp_path / "out" / "results.md").read_text()


def test_seeds_at_once_keep_their_folders_when_more_are_added(fake, tiny):
    at_once = {"= false": "= true"}
    tiny(at_once)
    assert fake.done == run_names("seeds0-1", *CELLS)
    runs = tiny(at_once | {"seeds = 2": "seeds = 4"})
    assert fake.done[3:] == run_names("seeds2-3", *CELLS)
    assert runs["rigl-0.9"].seeds == (0, 1, 2, 3)
    assert [r.test_accuracy for r in runs["dense"].last] == [0.75, 0.76, 0.77, 0.78]
    # Of fewer seeds, only the wanted ones are read.
    assert tiny(at_once | {"seeds = 2": "seeds = 1"})["rigl-0.9"].seeds == (0,)
    assert len(fake.done) == 6


def test_another_configuration_in_the_same_folder_is_an_error(fake, tiny):
    tiny()
    for changes, message in (
        ({"= 6": "= 9"}, r"dense with .*=.*another\s+folder"),
        (
            {"[train]": "[method.rigl]\nmasks.fraction = 0.2\n[train]"},
            r"rigl-0.9 with masks.fraction=None, .*=0.2",
        ),
        ({"= false": "= true"}, r"vmap_seeds=False, and .*vmap_seeds=True"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(changes)
    # An option that the file does not give keeps its value.
    tiny({"= false": '= "auto"'})
    assert fake.done == ALL


def test_the_other_runs_are_trained_when_one_diverges(fake, tmp_path, capsys):
    parse(tmp_path, TINY)
    fake.fails = {ALL[2]: loop.DivergedError("the loss of step 2 is nan")}
    command = [str(tmp_path / "file.toml"), "--out", str(tmp_path / "out")]
    assert sweep.main([*command, "--no-progress"]) == 1
    assert "rigl-0.9: the loss of step 2 is nan" in capsys.readouterr().err
    assert fake.done == ALL[:2] + ALL[3:]
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| rigl | 76.00 (1 of 2 seeds) diverged | 75.50 ± 0.71 |" in text


def test_auto_chooses_the_faster_way_once(fake, tiny, tmp_path, monkeypatch, capsys):
    timings = [(0.002, 0.001)]
    monkeypatch.setattr(sweep, "seconds_per_step", lambda *a: timings.pop())
    device = loop.jax.devices()[:1]
    monkeypatch.setattr(sweep.jax, "devices", lambda: device)
    auto = {"vmap_seeds = false": ""}
    fake.fails = {"rigl-0.9/rigl-seeds0-1": loop.StoppedError(0, signal.SIGINT)}
    with pytest.raises(loop.StoppedError):
        tiny(auto)
    assert "2.00 ms, and with all seeds at once 1.00 ms" in capsys.readouterr().out
    settings = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert settings["vmap_seeds"] is True
    tiny(auto)
    assert fake.done == run_names("seeds0-1", *CELLS)
    timings.append((0.001, 0.002))
    sweep.run(read(tmp_path / "file.toml"), tmp_path / "other", progress=False)
    assert fake.done[3:] == ALL


def test_processes_stop_with_checkpoints_and_continue(tmp_path, monkeypatch, capfd):
    """Two runs are stopped; the third, which has their configuration, is not."""
    text = TINY.replace('"dense", "rigl"', '"static", "twin", "third"')
    text = text.replace("[0.9, 0.95]", "[0.9]").replace("seeds = 2", "seeds = 1")
    text = text.replace("= 6", "= 2000").replace("eval_every = 3", "eval_every = 500")
    text = text.replace("masks.interval = 2\n", "")
    text += "".join(f'[method.{x}]\nmethod = "static"\n' for x in ("twin", "third"))
    parse(tmp_path, text)
    for name, value in runs.environment(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    out, reached = tmp_path / "out", StopSignal.reached

    def stopping(self: StopSignal, step: int) -> int | None:
        trains = any(path.stat().st_size for path in out.glob("*/*/metrics.jsonl"))
        if trains and self.received is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return reached(self, step)

    command = [str(tmp_path / "file.toml"), "--jobs", "2", "--no-progress"]
    command += ["--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "reached", stopping)
        patch.setattr(sweep_tasks, "_PAUSE", 0.05)
        assert sweep.main(command) == 128 + signal.SIGTERM
    errors = capfd.readouterr().err
    assert "Go on with the same command" in errors
    assert "Traceback" not in errors
    checkpoints = {x.name for x in out.glob("*/*/checkpoints/[0-9]*")}
    assert checkpoints - {"2000"}
    folders = [out / f"{x}-0.9" / "static-seed0" for x in ("static", "twin", "third")]
    assert not folders[2].exists()
    assert sweep.main(command) == 0
    one, two, straight = map(runs.metrics, folders)
    assert one == two == straight


def test_more_processes_than_cores_are_an_error(fake, tmp_path):
    cores = len(os.sched_getaffinity(0))
    for jobs in (0, cores + 1):
        with pytest.raises(ValueError, match=f"jobs must lie in 1 to {cores}, the"):
            sweep.run(parse(tmp_path, TINY), tmp_path / "out", jobs=jobs)


def test_results_are_those_of_the_runs(tmp_path, monkeypatch):
    """A real sweep, with all seeds at once."""
    device = loop.jax.devices()[:1]
    monkeypatch.setattr(sweep.jax, "devices", lambda: device)
    text = TINY.replace("= false", "= true").replace("[0.9, 0.95]", "[0.9]")
    text = text.replace("rigl", "static").replace("masks.interval = 2\n", "")
    out = tmp_path / "out"
    sweep.run(parse(tmp_path, text), out, progress=False)
    text = (out / "results.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    tables = "\n".join(rows[: len(rows) // 2]), "\n".join(rows[len(rows) // 2 :])
    results = json.loads((out / "results.json").read_text())
    assert [cell["name"] for cell in results["cells"]] == ["dense", "static-0.9"]
    assert results["environment"]["jax"] == loop.jax.__version__
    for cell, active in zip(results["cells"], (TOTAL, active_count(0.9)), strict=True):
        lines: dict[int, list[dict[str, Any]]] = {}
        for path in (out / cell["name"]).glob("*/metrics.jsonl"):
            for line in map(json.loads, path.read_text().splitlines()):
                lines.setdefault(line["seed"], []).append(line)
        assert sorted(lines) == [0, 1] == cell["seeds"]
        for seed in (0, 1):
            assert [line["step"] for line in lines[seed]] == [0, 3, 6]
            assert lines[seed][-1]["active_weights"] == active
        # They are two runs, not one twice.
        assert lines[0][-1]["test_loss"] != lines[1][-1]["test_loss"]
        last = [lines[seed][-1]["test_accuracy"] for seed in (0, 1)]
        best = [max(x["test_accuracy"] for x in lines[seed]) for seed in (0, 1)]
        for table, values in zip(tables, (last, best), strict=True):
            mean, std = 100 * np.mean(values), 100 * np.std(values, ddof=1)
            assert f"| {cell['method']} | {mean:.2f} ± {std:.2f} |" in table
        assert cell["test_accuracy"] == last
        assert cell["mean"] == pytest.approx(np.mean(last))
        assert cell["std"] == pytest.approx(np.std(last, ddof=1))
        assert cell["best_test_accuracy"] == best
        assert cell["active_weights"] == [active, active]
        assert cell["config"]["steps"] == 6
    assert f"{active_count(0.9):,} at 90%, of {TOTAL:,}" in text
    assert "6 steps of 64 examples" in text


def test_named_rows_and_variants_are_described(fake, tmp_path):
    out = tmp_path / "out"
    plan = parse(tmp_path, NAMED.replace("seeds = 2", "seeds = 1"))
    sweep.run(plan, out, progress=False)
    text = (out / "results.md").read_text()
    assert (
        " snip has static, masks.source snip, momentum 0.5. +labels adds tost.labels "
        "0.1. +slow adds learning_rate 0.01, momentum 0.8. Test" in text
    )
    assert "dense has" not in text
    assert "set has" not in text
    # One seed has no standard deviation.
    assert "75.00 | 75.00" in text
    assert "±" not in text.partition("Gain of each variant")[0]
    assert "1 seed" in text
    cells = json.loads((out / "results.json").read_text())["cells"]
    assert {cell["std"] for cell in cells} == {None}


def test_gains_are_between_runs_of_one_seed(tmp_path):
    plan = parse(tmp_path, NAMED)

    def runs(name, *accuracies, seeds=(0, 1)):
        records = tuple((record(6, a, active_count(0.9)),) for a in accuracies)
        return MethodRuns(plan.cells[name].method, seeds, records)

    done = {
        "dense": runs("dense", 0.9, 0.8),
        "dense+labels": runs("dense+labels", 0.85, 0.9),
        "set-0.9": runs("set-0.9", 0.5, 0.7),
        "set+slow-0.9": runs("set+slow-0.9", 0.75, seeds=(1,)),
        "snip+slow-0.95": runs("snip+slow-0.95", 0.5, 0.5),
    }
    sweep_report.write(plan, done, {}, {}, tmp_path)
    text = (tmp_path / "results.md").read_text().partition("Gain of each variant")[2]
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table == [
        "| method | sparsity | +labels | +slow |",
        "| --- | ---: | ---: | ---: |",
        "| dense | 0% | +2.50 ± 10.61 | - |",
        "| set | 90% | - | +5.00 |",
        "| set | 95% | - | - |",
        "| snip | 90% | - | - |",
        "| snip | 95% | - | - |",
    ]


def test_the_plot_shows_every_method_in_a_colour_of_its_own(tmp_path):
    names = ", ".join(f'"{method}"' for method in ["dense", *plots.LOOKS])
    text = TINY.replace('"dense", "rigl"', names).replace("masks.interval = 2\n", "")
    plan = parse(tmp_path, text.replace("steps = 6", "steps = 48"))
    done = {}
    for i, (name, config) in enumerate(plan.cells.items()):
        # Each is less accurate than the one before.
        last = record(6, 0.9 - 0.03 * i, active_count(config.sparsity))
        done[name] = MethodRuns(config.method, (0,), ((last,),))
    sweep_report.plot(plan, done, tmp_path / "plot.png")
    image = matplotlib.image.imread(tmp_path / "plot.png")[..., :3]
    for method, (colour, _) in plots.LOOKS.items():
        distance = np.abs(image - matplotlib.colors.to_rgb(colour)).max(axis=-1)
        # The legend alone has fewer pixels.
        assert (distance < 0.02).sum() > 300, method
    for looks in zip(*plots.LOOKS.values(), strict=True):
        assert len(set(looks)) == len(plots.LOOKS)
