"""Sweeps: the file, going on where one stopped, and the results."""

import dataclasses
import json
import pathlib
import re
import signal
import statistics
from typing import Any

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest

import granet_jax
from experiments import sweep, train
from experiments.config.sweep import Sweep, read
from experiments.reports import sweep as sweep_report
from experiments.reports import training as training_report
from experiments.training import loop
from experiments.training.metrics import Log, MetricsRecord
from granet_jax.analysis import plots

SWEEPS = pathlib.Path(sweep.__file__).parent / "sweeps"
TOTAL = 64 * 300 + 300 * 100 + 100 * 10

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


def written(tmp_path: pathlib.Path, text: str) -> Sweep:
    path = tmp_path / "file.toml"
    path.write_text(text)
    return read(path)


def kept(sparsity: float) -> int:
    return round((1 - sparsity) * TOTAL)


def record(step: int, accuracy: float, active: int) -> MetricsRecord:
    return MetricsRecord(
        step=step,
        train_loss=None if step == 0 else 0.5,
        test_correct=round(accuracy * 1000),
        test_accuracy=accuracy,
        test_loss=1.0,
        sparsity=granet_jax.Sparsity(
            overall=1 - active / TOTAL,
            leaves={"kernel": 1 - active / TOTAL},
            active=active,
            total=TOTAL,
        ),
        learning_rate=0.1,
        seconds=1.0,
    )


class Fake:
    """In the place of training: writes what a run leaves behind, and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.done: list[str] = []
        self.fails: dict[str, BaseException] = {}
        monkeypatch.setattr(loop, "create", lambda config, dataset: config)
        monkeypatch.setattr(sweep.devices, "compile_step", lambda config, dataset: None)
        monkeypatch.setattr(train, "train_seeds", self.train)
        monkeypatch.setattr(
            sweep_report, "plot", lambda sweep, runs, path: path.touch()
        )

    def train(self, config, seeds, folder, bar, stopped):
        run_folder = folder / train.run_name(config.method, seeds)
        name = f"{folder.name}/{run_folder.name}"
        if name in self.fails:
            raise self.fails.pop(name)
        self.done.append(name)
        run_folder.mkdir()
        log = Log(run_folder, config.method, seeds, writes=True)
        log.resume(-1)
        active = kept(config.sparsity)
        for step, share in ((0, 0.1), (3, 0.8), (config.steps, 0.75)):
            log.add([record(step, share + seed / 100, active) for seed in seeds])
        log.close()
        (run_folder / "checkpoints" / str(config.steps)).mkdir(parents=True)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(monkeypatch)


ALL = [
    *("dense/dense-seed0", "dense/dense-seed1"),
    *("rigl-0.9/rigl-seed0", "rigl-0.9/rigl-seed1"),
    *("rigl-0.95/rigl-seed0", "rigl-0.95/rigl-seed1"),
]


# --- the file


def test_cells_are_as_the_file_says(tmp_path):
    found = written(
        tmp_path,
        """
        methods = ["granet-st", "set", "dense"]
        sparsities = [0.98, 0.9]
        seeds = 4
        [train]
        model = "lenet-300-100"
        steps = 300
        data.dataset = "fashion_mnist"
        data.batch-size = 128
        masks.interval = 7
        masks.stop = 0.5
        optimizer.drops = [0.25]
        optimizer.learning_rate = 1
        [method.set]
        masks.interval = 9
        optimizer.weight_decay = 0.0
        """,
    )
    assert list(found.cells) == [
        *("granet-st-0.9", "granet-st-0.98", "set-0.9", "set-0.98", "dense")
    ]
    assert (found.sparsities, found.seeds) == ((0.9, 0.98), 4)
    assert found.vmap_seeds is None
    for config in found.cells.values():
        assert (config.model, config.steps, config.seeds) == ("lenet-300-100", 300, 4)
        assert (config.data.dataset, config.data.batch_size) == ("fashion_mnist", 128)
        assert config.optimizer.learning_rate == 1.0
        assert type(config.optimizer.learning_rate) is float
        assert config.optimizer.drops == (0.25,)
        assert (config.seed, config.baseline, config.vmap_seeds) == (0, False, False)
    masks = {name: config.masks for name, config in found.cells.items()}
    assert masks["granet-st-0.9"].interval == 7
    assert masks["granet-st-0.9"].stop is None
    assert (masks["set-0.98"].interval, masks["set-0.98"].stop) == (9, 0.5)
    assert masks["dense"].interval is None
    assert found.cells["set-0.9"].optimizer.weight_decay == 0.0
    assert found.cells["dense"].optimizer.weight_decay == 5e-4
    assert found.cells["set-0.98"].sparsity == 0.98


ERRORS = {
    "unknown key": ("seeds = 2", "sedes = 2", r"sedes is unknown. Did you mean seeds"),
    "missing": ("seeds = 2", "", r"seeds is missing"),
    "no method": ('"rigl"', '"rigel"', r"methods must be one of .*'rigel'.*'rigl'"),
    "twice": ('"rigl"', '"dense"', r"methods has a value twice"),
    "empty": ("[0.9, 0.95]", "[]", r"sparsities must not be empty"),
    "no list": ("[0.9, 0.95]", "0.9", r"sparsities must be a list.*got 0.9"),
    "sparsity": ("0.95]", "1.5]", r"rigl-1.5: sparsity must lie in \[0, 1\), got 1.5"),
    "true": ("seeds = 2", "seeds = true", r"seeds must be an integer, got True"),
    "no seeds": ("seeds = 2", "seeds = 0", r"seeds must be at least 1, got 0"),
    "vmap": ("= false", '= "no"', r"vmap_seeds must be true or false or 'auto'"),
    "train key": ("steps =", "step =", r"train.step is unknown. Did you mean train.st"),
    "nested key": (
        "masks.interval",
        "masks.intreval",
        r"train.masks.intreval is unknown. Did you mean train.masks.interval\?",
    ),
    "no table": ("masks.interval", "masks", r"train.masks must be a table"),
    "type": ("= 6", '= "6"', r"train.steps must be an integer, got '6'"),
    "float": ("= 6", "= 6.5", r"train.steps must be an integer, got 6.5"),
    "value": ("= 6", "= 0", r"dense: steps must lie in"),
    "choice": ("= 6", '= 6\noptimizer.name = "adam"', r"one of sgd, adamw.*'adamw'"),
    "optional": ("masks.interval = 2", "masks.interval = 2.5", r"must be an integer"),
    "decided": ("= 6", "= 6\nseed = 1", r"train.seed is not for a sweep"),
    "unused": (
        "= 6",
        "= 6\nmasks.pruning_end = 0.5",
        r"train.masks.pruning_end is not",
    ),
    "no model": ("lenet-300-100", "lenet-300", r"model must be one of.*lenet-300-100"),
    "data set": ('"digits"', '"digit"', r"data.dataset must be one of .*'digits'"),
    "a row of nothing": (
        '"rigl"',
        '"mine"',
        r"methods must be one of .*, or have a table \[method.NAME\].*'mine'",
    ),
    "a row without a method": (
        '"rigl"]',
        '"mine"]\nmethod.mine.masks.source = "snip"',
        r"method.mine.method is missing",
    ),
    "a row of no method": (
        '"rigl"]',
        '"mine"]\nmethod.mine.method = "rigel"',
        r"method.mine.method must be one of .*'rigel'.*'rigl'",
    ),
    "a method renamed": (
        '"rigl"]',
        '"rigl"]\nmethod.rigl.method = "set"',
        r"method.rigl.method is for rows with names of their own",
    ),
    "no name of a folder": (
        '"rigl"]',
        '"a/b"]\nmethod."a/b".method = "rigl"',
        r"methods has 'a/b': the name of a row is also the name of a folder",
    ),
    "not a method": ("[train]", "[method.rigel]\n[train]", r"method.rigel is unknown"),
    "not there": ("[train]", "[method.gmp]\n[train]", r"gmp is not one of methods"),
    "budget": (
        "[train]",
        "[method.rigl]\nsteps = 7\n[train]",
        r"method.rigl.steps must be the same for all methods",
    ),
    "not its option": (
        "[train]",
        "[method.rigl]\nmasks.pruning_end = 0.5\n[train]",
        r"rigl-0.9: masks.pruning_end is not an option of method 'rigl'",
    ),
    "twice in a table": (
        "eval_every = 3",
        "eval_every = 3\neval-every = 3",
        r"train.eval.every is given twice",
    ),
    "not TOML": ("seeds = 2", "seeds = ", r"is not a TOML file"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_wrong_in_a_file_is_named(case, tmp_path, capsys):
    old, new, message = ERRORS[case]
    assert old in TINY
    with pytest.raises(ValueError, match=message):
        written(tmp_path, TINY.replace(old, new, 1))
    out = tmp_path / "out"
    command = [str(tmp_path / "file.toml"), "--out", str(out), "--no-progress"]
    assert sweep.main(command) == 2
    assert "error: " in capsys.readouterr().err
    assert not out.exists()


def test_no_file_is_an_error(tmp_path, capsys):
    assert sweep.main([str(tmp_path / "none.toml")]) == 2
    assert "none.toml" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.toml")), ids=lambda p: p.stem)
def test_the_sweeps_there_are_give_all_methods_one_budget(path):
    found = read(path)
    if path.stem in ("fashion-lenet", "fashion-cnn", "fashion-cnn-bn", "quick"):
        methods = {"dense", "static", "set", "rigl", "gmp", "granet", "granet-st"}
        assert set(found.methods) == methods
        assert len(found.cells) == 1 + 6 * len(found.sparsities)
    for config in found.cells.values():
        first = found.first
        same = {"method": first.method, "sparsity": first.sparsity}
        own = {"masks": first.masks, "tost": first.tost}
        assert config.optimizer.learning_rate == first.optimizer.learning_rate
        own["optimizer"] = first.optimizer
        assert dataclasses.replace(config, **same, **own) == first
    dynamic = [c for c in found.cells.values() if c.method not in ("dense", "static")]
    assert len({config.mask_interval for config in dynamic}) <= 1


# --- going on


def test_a_sweep_goes_on_where_it_was_stopped(fake, tmp_path, monkeypatch, capsys):
    tiny, out = written(tmp_path, TINY), tmp_path / "out"
    stop = loop.StoppedError(3, signal.SIGTERM)
    fake.fails = {"rigl-0.9/rigl-seed1": stop}
    command = [str(tmp_path / "file.toml"), "--out", str(out), "--no-progress"]
    assert sweep.main(command) == 128 + signal.SIGTERM
    assert str(out) in capsys.readouterr().err
    assert fake.done == ALL[:3]
    # The results so far are those after the last finished cell.
    assert "| rigl | - | - |" in (out / "results.md").read_text()
    assert sweep.main(command) == 0
    assert fake.done == ALL
    assert "(1 of 2" not in (out / "results.md").read_text()
    before = (out / "results.json").read_bytes()
    # All is there: neither data nor a program is needed.
    monkeypatch.setattr(sweep, "load", None)
    sweep.run(tiny, out, progress=False)
    assert fake.done == ALL
    assert (out / "results.json").read_bytes() == before


@pytest.mark.parametrize("lost", ["checkpoint", "record"])
def test_a_run_without_its_end_is_gone_on_with(fake, tmp_path, lost):
    tiny, out = written(tmp_path, TINY), tmp_path / "out"
    sweep.run(tiny, out, progress=False)
    folder = out / ALL[4]
    if lost == "checkpoint":
        (folder / "checkpoints" / "6").rmdir()
    else:
        path = folder / "metrics.jsonl"
        path.write_text("".join(path.read_text().splitlines(True)[:-1]) + '{"cut')
    config = tiny.cells["rigl-0.95"]
    assert sweep.groups(config, out / "rigl-0.95", False) == [range(1)]
    assert sweep.finished_groups(config, out / "rigl-0.95") == [range(1, 2)]


def test_seeds_methods_and_sparsities_may_be_added(fake, tmp_path):
    out = tmp_path / "out"
    sweep.run(written(tmp_path, TINY), out, progress=False)
    more = TINY.replace("seeds = 2", "seeds = 3", 1).replace("[0.9,", "[0.8, 0.9,")
    more = more.replace('"rigl"', '"rigl", "set"')
    sweep.run(written(tmp_path, more), out, progress=False)
    assert sorted(fake.done) == sorted(
        f"{cell}/{method}-seed{seed}"
        for method, cells in {
            "dense": ["dense"],
            "rigl": ["rigl-0.8", "rigl-0.9", "rigl-0.95"],
            "set": ["set-0.8", "set-0.9", "set-0.95"],
        }.items()
        for cell in cells
        for seed in range(3)
    )
    assert "over 3 seeds" in (out / "results.md").read_text()


def test_seeds_at_once_keep_their_folders_when_more_are_added(fake, tmp_path):
    out, text = tmp_path / "out", TINY.replace("= false", "= true")
    sweep.run(written(tmp_path, text), out, progress=False)
    assert fake.done[1] == "rigl-0.9/rigl-seeds0-1"
    runs = sweep.run(
        written(tmp_path, text.replace("seeds = 2", "seeds = 4", 1)),
        out,
        progress=False,
    )
    assert fake.done[3:] == [
        *("dense/dense-seeds2-3", "rigl-0.9/rigl-seeds2-3", "rigl-0.95/rigl-seeds2-3")
    ]
    assert runs["rigl-0.9"].seeds == (0, 1, 2, 3)
    assert [r.test_accuracy for r in runs["dense"].last] == [0.75, 0.76, 0.77, 0.78]
    # With fewer, those that are wanted are read.
    runs = sweep.run(
        written(tmp_path, text.replace("seeds = 2", "seeds = 1", 1)),
        out,
        progress=False,
    )
    assert runs["rigl-0.9"].seeds == (0,)
    assert len(fake.done) == 6


def test_another_configuration_in_the_same_folder_is_an_error(fake, tmp_path):
    out = tmp_path / "out"
    sweep.run(written(tmp_path, TINY), out, progress=False)
    changed = written(tmp_path, TINY.replace("= 6", "= 9"))
    with pytest.raises(ValueError, match=r"dense with .*=.*another\s+folder"):
        sweep.run(changed, out, progress=False)
    changed = written(tmp_path, TINY + "[method.rigl]\nmasks.fraction = 0.2")
    with pytest.raises(ValueError, match=r"rigl-0.9 with masks.fraction=None, .*=0.2"):
        sweep.run(changed, out, progress=False)
    with pytest.raises(ValueError, match=r"vmap_seeds=False, and .*vmap_seeds=True"):
        sweep.run(
            written(tmp_path, TINY.replace("= false", "= true")), out, progress=False
        )
    assert fake.done == ALL
    # What is not given is what was chosen before.
    sweep.run(written(tmp_path, TINY.replace("= false", '= "auto"')), out)
    assert fake.done == ALL


def test_a_folder_of_something_else_is_left_alone(fake, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="nor the folder of a sweep"):
        sweep.run(written(tmp_path, TINY), out, progress=False)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_the_rest_is_trained_when_a_run_diverges(fake, tmp_path, capsys):
    written(tmp_path, TINY)
    fake.fails = {ALL[2]: loop.DivergedError("the loss of step 2 is nan")}
    command = [str(tmp_path / "file.toml"), "--out", str(tmp_path / "out")]
    assert sweep.main([*command, "--no-progress"]) == 1
    assert "rigl-0.9: the loss of step 2 is nan" in capsys.readouterr().err
    assert fake.done == ALL[:2] + ALL[3:]
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| rigl | 76.00 (1 of 2 seeds) diverged | 75.50 ± 0.71 |" in text


def test_auto_chooses_what_is_faster_once(fake, tmp_path, monkeypatch, capsys):
    tiny = written(tmp_path, TINY.replace("vmap_seeds = false", ""))
    timings = [(0.002, 0.001)]
    monkeypatch.setattr(sweep, "seconds_per_step", lambda *a: timings.pop())
    device = loop.jax.devices()[:1]
    monkeypatch.setattr(sweep.jax, "devices", lambda: device)
    out = tmp_path / "out"
    fake.fails = {"rigl-0.9/rigl-seeds0-1": loop.StoppedError(0, signal.SIGINT)}
    with pytest.raises(loop.StoppedError):
        sweep.run(tiny, out, progress=False)
    assert "2.00 ms, and with all seeds at once 1.00 ms" in capsys.readouterr().out
    assert json.loads((out / "sweep.json").read_text())["vmap_seeds"] is True
    sweep.run(tiny, out, progress=False)
    assert fake.done == [
        *("dense/dense-seeds0-1", "rigl-0.9/rigl-seeds0-1", "rigl-0.95/rigl-seeds0-1")
    ]
    timings.append((0.001, 0.002))
    sweep.run(tiny, tmp_path / "other", progress=False)
    assert fake.done[3:] == ALL


# --- the results


def by_hand(out: pathlib.Path, cell: str) -> dict[int, list[dict[str, Any]]]:
    """Every seed's lines in the order of steps, from all files of a cell."""
    found: dict[int, list[dict[str, Any]]] = {}
    for path in (out / cell).glob("*/metrics.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            found.setdefault(line["seed"], []).append(line)
    return found


def spread(values: list[float]) -> str:
    array = 100 * np.array(values)
    return f"{array.mean():.2f} ± {array.std(ddof=1):.2f}"


def rows(text: str, table: int) -> dict[str, list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    half = lines[: len(lines) // 2] if table == 0 else lines[len(lines) // 2 :]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in half]
    return {cell[0]: cell[1:] for cell in cells}


@pytest.mark.parametrize("vmap_seeds", ["false", "true"])
def test_results_are_what_the_runs_say(vmap_seeds, tmp_path, monkeypatch):
    """A real sweep, without and with all seeds at once."""
    device = loop.jax.devices()[:1]
    monkeypatch.setattr(sweep.jax, "devices", lambda: device)
    text = TINY.replace("= false", f"= {vmap_seeds}").replace("[0.9, 0.95]", "[0.9]")
    found, out = written(tmp_path, text), tmp_path / "out"
    sweep.run(found, out, progress=False)
    text = (out / "results.md").read_text()
    results = json.loads((out / "results.json").read_text())
    assert [cell["name"] for cell in results["cells"]] == ["dense", "rigl-0.9"]
    assert results["environment"]["jax"] == loop.jax.__version__
    for cell, active in zip(results["cells"], (TOTAL, kept(0.9)), strict=True):
        lines = by_hand(out, cell["name"])
        assert sorted(lines) == [0, 1] == cell["seeds"]
        for seed in (0, 1):
            assert [line["step"] for line in lines[seed]] == [0, 3, 6]
            assert lines[seed][-1]["active_weights"] == active
            assert lines[seed][-1]["test_correct"] == round(
                596 * lines[seed][-1]["test_accuracy"]
            )
        # They are two runs, not one twice.
        assert lines[0][-1]["test_loss"] != lines[1][-1]["test_loss"]
        last = [lines[seed][-1]["test_accuracy"] for seed in (0, 1)]
        best = [max(x["test_accuracy"] for x in lines[seed]) for seed in (0, 1)]
        assert rows(text, 0)[cell["method"]] == [spread(last)]
        assert rows(text, 1)[cell["method"]] == [spread(best)]
        assert cell["test_accuracy"] == last
        assert cell["mean"] == pytest.approx(np.mean(last))
        assert cell["std"] == pytest.approx(np.std(last, ddof=1))
        assert cell["best_test_accuracy"] == best
        assert cell["active_weights"] == [active, active]
        assert cell["config"]["steps"] == 6
    assert f"{kept(0.9):,} at 90%, of {TOTAL:,}" in text
    assert "6 steps of 64 examples" in text


NAMED = """
methods = ["dense", "dense+labels", "rigl", "snip", "snip+labels"]
sparsities = [0.9, 0.95]
seeds = 1
[train]
model = "lenet-300-100"
steps = 6
eval_every = 3
data.dataset = "digits"
[method.rigl]
masks.interval = 2
[method."dense+labels"]
method = "dense"
tost.labels = 0.1
[method.snip]
method = "static"
masks.source = "snip"
[method."snip+labels"]
method = "static"
masks.source = "snip"
tost.labels = 0.1
optimizer.weight-decay = 0.0
"""


def test_rows_may_have_names_and_options_of_their_own(fake, tmp_path):
    found, out = written(tmp_path, NAMED), tmp_path / "out"
    assert list(found.cells) == [
        *("dense", "dense+labels", "rigl-0.9", "rigl-0.95"),
        *("snip-0.9", "snip-0.95", "snip+labels-0.9", "snip+labels-0.95"),
    ]
    for name, config in found.cells.items():
        row = name.partition("-")[0]
        assert config.method == {"snip": "static", "snip+labels": "static"}.get(
            row, row.partition("+")[0]
        )
        assert config.masks.source == ("snip" if row.startswith("snip") else None)
        assert config.tost.labels == (0.1 if row.endswith("labels") else None)
    sweep.run(found, out, progress=False)
    assert "snip+labels-0.95/static-seed0" in fake.done
    assert "dense+labels/dense-seed0" in fake.done
    text = (out / "results.md").read_text()
    for row in found.methods:
        assert rows(text, 0)[row] == ["75.00", "75.00"]
    assert "snip has static, masks.source snip." in text
    assert (
        "snip+labels has static, masks.source snip, tost.labels 0.1, weight_decay 0.0."
        in text
    )
    # It goes on where it stopped, by name.
    sweep.run(found, out, progress=False)
    assert len(fake.done) == len(found.cells)


VARIANTS = (
    NAMED.partition("[method.")[0]
    .replace(
        '"dense", "dense+labels", "rigl", "snip", "snip+labels"',
        '"dense", "set", "snip"',
    )
    .replace("seeds = 1", "seeds = 2")
    + """
[method.snip]
method = "static"
masks.source = "snip"
optimizer.momentum = 0.5
[variants]
labels = { tost.labels = 0.1 }
slow = { optimizer.learning-rate = 0.01, optimizer.momentum = 0.8 }
"""
)


def test_variants_are_those_of_every_row(fake, tmp_path):
    found, out = written(tmp_path, VARIANTS), tmp_path / "out"
    assert found.methods == tuple(
        row + variant
        for row in ("dense", "set", "snip")
        for variant in ("", "+labels", "+slow")
    )
    assert found.plain == ("dense", "set", "snip")
    assert len(found.cells) == 3 + 3 * 2 + 3 * 2
    for name, config in found.cells.items():
        assert config.method == {"d": "dense", "s": "set"}.get(
            name[0] if name[1] != "n" else "", "static"
        )
        assert config.masks.source == ("snip" if name.startswith("snip") else None)
        assert config.tost.labels == (0.1 if "labels" in name else None)
        optimizer = config.optimizer
        assert optimizer.learning_rate == (0.01 if "slow" in name else 0.1)
        momentum = 0.5 if name.startswith("snip") else 0.9
        assert optimizer.momentum == (0.8 if "slow" in name else momentum)
    sweep.run(found, out, progress=False)
    text = (out / "results.md").read_text()
    assert (
        " snip has static, masks.source snip, momentum 0.5. +labels adds tost.labels "
        "0.1. +slow adds learning_rate 0.01, momentum 0.8. Test" in text
    )
    assert "dense has" not in text
    assert "set has" not in text


def test_what_the_page_says_about_rows_holds(tmp_path):
    page = (SWEEPS.parent / "README.md").read_text()
    found = []
    for block in re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL):
        head, _, rest = block.partition("\n")
        assert head.startswith("methods = ")
        text = f"{head}\nsparsities = [0.9]\nseeds = 1\n{rest}"
        found.append(written(tmp_path, text).methods)
    assert found == [
        ("dense", "rigl", "snip", "snip-labels"),
        ("dense", "dense+labels", "dense+lrsi", "rigl", "rigl+labels", "rigl+lrsi"),
    ]


def test_gains_are_between_runs_of_one_seed(tmp_path):
    found = written(tmp_path, VARIANTS)

    def runs(name, *accuracies, seeds=(0, 1)):
        method = found.cells[name].method
        records = tuple((record(6, a, kept(0.9)),) for a in accuracies)
        return training_report.MethodRuns(method, seeds, records)

    done = {
        "dense": runs("dense", 0.9, 0.8),
        "dense+labels": runs("dense+labels", 0.85, 0.9),
        "set-0.9": runs("set-0.9", 0.5, 0.7),
        "set+slow-0.9": runs("set+slow-0.9", 0.75, seeds=(1,)),
        "snip+slow-0.95": runs("snip+slow-0.95", 0.5, 0.5),
    }
    sweep_report.write(found, done, {}, {}, tmp_path)
    text = (tmp_path / "results.md").read_text().partition("What a variant gains")[2]
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


def test_variants_have_a_panel_for_every_sparse_row(tmp_path, monkeypatch):
    found = written(tmp_path, VARIANTS)
    done = {
        name: training_report.MethodRuns(
            config.method, (0,), ((record(6, 0.9 - 0.01 * i, kept(0.9)),),)
        )
        for i, (name, config) in enumerate(found.cells.items())
    }
    drawn = []
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self)
    )
    sweep_report.plot(found, done, tmp_path / "plot.png")
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes] == ["set", "snip"]
    for axes, row in zip(figure.axes, ("set", "snip"), strict=True):
        lines, labels = axes.get_legend_handles_labels()
        shown = dict(zip(labels, lines, strict=True))
        assert list(shown) == ["dense", "plain", "+labels", "+slow"]
        for variant, label in (("", "plain"), ("+labels", "+labels")):
            expected = [
                100 * done[f"{row}{variant}-{s}"].last[0].test_accuracy
                for s in found.sparsities
            ]
            assert list(shown[label][0].get_ydata()) == pytest.approx(expected)
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["dense", "plain", "+labels", "+slow"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"snip"]', '"snip", "snip+slow"]', r"methods has snip\+slow, which is also"),
        ("slow =", '"a/b" =', "variants has 'a/b'"),
        (
            "tost.labels = 0.1",
            "steps = 6",
            "variants.labels.steps must be the same for all",
        ),
        ("{ tost.labels = 0.1 }", "0.1", r"variants.labels must be a table"),
        ("tost.labels", "tost.label", "variants.labels.tost.label is unknown"),
        ("tost.labels = 0.1", "tost.labels = 2.0", r"dense\+labels: "),
    ],
)
def test_what_is_wrong_in_variants_is_named(old, new, message, tmp_path):
    text = VARIANTS.replace(old, new, 1)
    if "snip+slow" in new:
        text = text.replace(
            "[variants]", '[method."snip+slow"]\nmethod = "set"\n[variants]'
        )
    with pytest.raises(ValueError, match=message):
        written(tmp_path, text)


def test_rows_with_names_have_colours_of_their_own(tmp_path):
    found = written(tmp_path, NAMED)
    runs = {
        name: training_report.MethodRuns(
            config.method, (0,), ((record(6, 0.9 - 0.03 * i, kept(0.9)),),)
        )
        for i, (name, config) in enumerate(found.cells.items())
    }
    sweep_report.plot(found, runs, tmp_path / "plot.png")
    image = matplotlib.image.imread(tmp_path / "plot.png")[..., :3]
    # Those of rigl, and of the first two methods that are not there. (Text has the grey
    # of snfs.)
    shown = [
        method
        for method, (colour, _) in plots.LOOKS.items()
        if (np.abs(image - matplotlib.colors.to_rgb(colour)).max(axis=-1) < 0.02).any()
        and method != "snfs"
    ]
    assert shown == ["granet", "granet-st", "rigl"]


def test_best_is_chosen_at_the_final_sparsity(tmp_path):
    found = written(tmp_path, TINY.replace('"rigl"', '"gmp"'))
    records = (
        record(0, 0.99, TOTAL),
        record(3, 0.6, kept(0.9)),
        record(6, 0.5, kept(0.9)),
    )
    runs = {"gmp-0.9": training_report.MethodRuns("gmp", (0,), (records,))}
    sweep_report.write(found, runs, {}, {}, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert rows(text, 0)["gmp"] == ["50.00 (1 of 2 seeds)", "-"]
    assert rows(text, 1)["gmp"] == ["60.00 (1 of 2 seeds)", "-"]


def test_one_seed_has_no_standard_deviation(fake, tmp_path):
    out = tmp_path / "out"
    text = TINY.replace("seeds = 2", "seeds = 1", 1)
    sweep.run(written(tmp_path, text), out, progress=False)
    text = (out / "results.md").read_text()
    assert rows(text, 0)["rigl"] == ["75.00", "75.00"]
    assert "±" not in text
    assert "1 seed" in text
    cells = json.loads((out / "results.json").read_text())["cells"]
    assert [cell["std"] for cell in cells] == [None] * 3


def test_the_plot_shows_every_method(tmp_path):
    names = ", ".join(f'"{method}"' for method in ["dense", *plots.LOOKS])
    text = TINY.replace('"dense", "rigl"', names).replace("masks.interval = 2\n", "")
    text = text.replace("steps = 6", "steps = 48")
    found = written(tmp_path, text)
    runs = {
        name: training_report.MethodRuns(
            config.method,
            (0, 1),
            tuple(
                (record(6, 0.9 - 0.03 * i + 0.004 * seed, kept(config.sparsity)),)
                for seed in (0, 1)
            ),
        )
        for i, (name, config) in enumerate(found.cells.items())
    }
    sweep_report.plot(found, runs, tmp_path / "plot.png")
    image = matplotlib.image.imread(tmp_path / "plot.png")[..., :3]
    colours = {m: colour for m, (colour, _) in plots.LOOKS.items()}
    for method, colour in colours.items():
        near = np.abs(image - matplotlib.colors.to_rgb(colour)).max(axis=-1) < 0.02
        # The legend alone has fewer.
        assert near.sum() > 300, method
    assert len(set(colours.values())) == len(colours)
    assert len({marker for _, marker in plots.LOOKS.values()}) == len(colours)
    # Without rigl there is nothing in its colour.
    fewer = {name: run for name, run in runs.items() if run.method != "rigl"}
    sweep_report.plot(found, fewer, tmp_path / "plot.png")
    image = matplotlib.image.imread(tmp_path / "plot.png")[..., :3]
    rigl = matplotlib.colors.to_rgb(colours["rigl"])
    assert not (np.abs(image - rigl).max(axis=-1) < 0.02).any()


def test_timing_tells_seconds_of_one_seed(tmp_path, monkeypatch):
    """Of a program whose calls take known times."""
    tiny = written(tmp_path, TINY)
    clock = [0.0]

    class CompiledStep:
        def __init__(self, lanes: int, seconds: float):
            self.lanes, self.seconds = lanes, seconds
            self.create = tuple

        def steps(self, state, data, number):
            clock[0] += number * self.seconds
            return state, 0.0

    class TrainSetup:
        train_data = None

        def __init__(self, config, dataset):
            lanes = config.seeds if config.vmap_seeds else 1
            self.compiled_step = CompiledStep(lanes, 0.05 if lanes == 1 else 0.08)

    monkeypatch.setattr(loop, "create", TrainSetup)
    monkeypatch.setattr(sweep.time, "perf_counter", lambda: clock[0])
    plain, mapped = sweep.seconds_per_step(tiny.first, None)
    assert (plain, mapped) == (pytest.approx(0.05), pytest.approx(0.04))


def test_mean_and_deviation_are_of_a_sample():
    values = [0.5, 0.52, 0.57]
    expected = f"{100 * statistics.mean(values):.2f} ± 3.61"
    assert sweep_report.cell(values) == expected
