"""The study of pruning plasticity, reduced, on digits: end to end, and continuing."""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import shutil
import signal
from typing import Any

import jax
import matplotlib.image
import numpy as np
import optax
import pytest

from experiments import data, plasticity
from experiments.config.plasticity import UNPRUNED, Branch, PruningPoint, Study
from experiments.config.run import Config, DataConfig, OptimizerConfig
from experiments.reports import plasticity as plasticity_report
from experiments.reports.plasticity import Results
from experiments.training import loop, plasticity_branches, stop_signal
from tests.helpers import runs

WEIGHTS = 64 * 40 + 40 * 10
# An epoch is 18 steps: points at 8, 16 and 24 steps, 8 steps from each. The learning
# rate drops at 12.
STUDY = Study(
    points=3,
    rates=(0.5, 0.9),
    epochs=0.45,
    updates=2,
    progress=False,
    train=dataclasses.replace(
        runs.CONFIG,
        method="dense",
        steps=24,
        seeds=2,
        data=DataConfig(shift=0),
        optimizer=OptimizerConfig(drops=(0.5,)),
    ),
)


@pytest.fixture(autouse=True, scope="module")
def _small():
    """Small networks, on one device, whose programs all studies share."""
    pruners: dict[Config, Any] = {}
    create_pruner = plasticity.create_pruner

    def shared(study: Study, dataset: Any) -> Any:
        config = study.continued(study.train.optimizer.learning_rate)
        if config not in pruners:
            pruners[config] = create_pruner(study, dataset)
        return pruners[config]

    with pytest.MonkeyPatch.context() as patch:
        runs.use_small_networks(patch)
        runs.share_setups(patch)
        patch.setattr(plasticity, "create_pruner", shared)
        compile_step = plasticity.compile_step
        one = functools.partial(compile_step, devices=jax.devices()[:1])
        patch.setattr(plasticity, "compile_step", one)
        yield


def small(**changes: Any) -> Study:
    """A study of few branches: two on each of two points."""
    few = {"points": 2, "rates": (0.9,), "pruning": ("one-shot",), "regrow": (0.5,)}
    return runs.replace_options(STUDY, few | changes)


@pytest.fixture(scope="module")
def straight(_small, tmp_path_factory) -> pathlib.Path:
    """The folder of a small study that was not disturbed."""
    folder = tmp_path_factory.mktemp("study") / "straight"
    plasticity.run(small(out=folder))
    return folder


def text(folder: pathlib.Path) -> tuple[str, ...]:
    return tuple((folder / n).read_text() for n in ("results.json", "results.md"))


def test_a_whole_study(tmp_path, capsys):
    """Its numbers are those of networks pruned and trained on by NumPy and optax."""
    folder = tmp_path / "study"
    ways = ("one-shot", "gradual", "revived")
    study = dataclasses.replace(STUDY, out=folder, pruning=ways)
    results = plasticity.run(study)
    assert results is not None
    assert [p.step for p in results.points] == [8, 16, 24]
    # The learning rate is that of the last step before the point.
    rates = [p.learning_rate for p in results.points]
    np.testing.assert_allclose(rates, [0.1, 0.01, 0.01], rtol=1e-6)
    assert results.drops == (12 / 18,)
    report = json.loads((folder / "results.json").read_text())
    assert len(report["branches"]) == 2 * (2 * 2 + 1)
    for branch in report["branches"]:
        left = math.floor((1 - branch["rate"]) * WEIGHTS + 0.5)
        revived = branch["pruning"] == "revived"
        assert branch["active_weights"] == (WEIGHTS if revived else left)
        assert np.shape(branch["accuracy_after"]) == (3, 2)
        plain = np.asarray(branch["accuracy_after"]) - report["accuracy_before"]
        np.testing.assert_allclose(branch["plasticity_mean"], plain.mean(axis=1))
    page = (folder / "results.md").read_text()
    assert page.strip() in capsys.readouterr().out
    for heading in (
        *("## Plasticity", "regeneration adds", "gradual pruning adds"),
        "all pruned weights grow again",
    ):
        assert heading in page
    picture = matplotlib.image.imread(folder / "plasticity-magnitude-global.png")
    assert picture.shape[0] > 500
    assert picture[..., :3].std() > 0.05

    # Where the learning rate stays as it is, training on without pruning is what the
    # dense run did: from step 16, the eight steps to step 24. From step 8 it is not.
    unpruned = np.asarray(report["accuracy_after_unpruned"])
    np.testing.assert_array_equal(unpruned[1], report["accuracy_before"][2])
    assert (unpruned[0] != report["accuracy_before"][1]).any()

    dense = loop.create(study.dense, data.load("digits"))
    state = runs.restore_state(dense, folder / "dense-seed1", 16)
    for way in ("one-shot", "revived"):
        after, when_pruned = by_hand(
            dense, state, rate=0.9, learning_rate=0.01, revive=way == "revived"
        )
        branch = Branch("magnitude", "global", way, 0.0, 0.9)
        file = folder / "branches" / "step16" / f"seed1-{branch.name}.json"
        outcome = json.loads(file.read_text())
        # To one test example: the order of the sums is not the same.
        assert abs(outcome["after"] - after) <= 1.01 / 596
        assert abs(outcome["pruned"] - when_pruned) <= 1.01 / 596
        assert outcome["before"] == report["accuracy_before"][1][1]
        assert outcome["after"] != outcome["pruned"]


def by_hand(
    dense: loop.TrainSetup,
    state: Any,
    *,
    rate: float,
    learning_rate: float,
    revive: bool,
) -> tuple[float, float]:
    """Accuracy of a state pruned by magnitude, eight steps later and at once."""
    train_step: Any = dense.compiled_step.train_step
    train_data, test = dense.dataset.train, dense.dataset.test  # type: ignore[union-attr]
    kernels = {n: np.asarray(state.params[n]["kernel"]) for n in ("hidden", "output")}
    sizes = np.abs(np.concatenate([k.ravel() for k in kernels.values()]))
    threshold = np.sort(sizes)[-math.floor((1 - rate) * WEIGHTS + 0.5)]
    masks = {n: np.abs(k) >= threshold for n, k in kernels.items()}

    def on_kernels(function: Any, tree: Any) -> Any:
        changed = {
            n: tree[n] | {"kernel": function(n, tree[n]["kernel"])} for n in masks
        }
        return tree | changed

    mask_kernels = functools.partial(on_kernels, lambda n, kernel: kernel * masks[n])

    def loss(params: Any, statistics: Any, images: Any, labels: Any) -> Any:
        inputs = train_step.inputs(images)
        logits, changed = train_step.logits(params, statistics, inputs, 0)
        report = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return report.mean(), changed

    def accuracy(params: Any, statistics: Any) -> float:
        variables = {"params": params, "batch_stats": statistics}
        inputs = train_step.inputs(test.inputs)
        logits = train_step.model.apply(variables, inputs, train=False)
        return float(np.mean(np.argmax(logits, axis=1) == test.labels))

    params, statistics = mask_kernels(state.params), state.statistics
    trace = mask_kernels(state.opt_state[1][0].trace)
    when_pruned = accuracy(params, statistics)
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    for step in range(16, 24):
        epoch, batch = divmod(step, 18)
        stream = jax.random.fold_in(jax.random.key(state.seed), 1)
        size = len(train_data.labels)
        order = jax.random.permutation(jax.random.fold_in(stream, epoch), size)
        rows = np.asarray(order)[batch * 64 : (batch + 1) * 64]
        grads, statistics = gradient(
            params, statistics, train_data.inputs[rows], train_data.labels[rows]
        )
        old = params
        decay = functools.partial(
            on_kernels, lambda n, g, old=old: g + 5e-4 * old[n]["kernel"]
        )
        grads = decay(grads) if revive else mask_kernels(decay(grads))
        trace = jax.tree.map(lambda t, g: 0.9 * t + g, trace, grads)
        # Nesterov.
        params = jax.tree.map(
            lambda p, t, g: p - learning_rate * (0.9 * t + g), params, trace, grads
        )
    return accuracy(params, statistics), when_pruned


def test_gradual_pruning_is_done_in_the_first_half():
    masks = [np.empty((64, 40), bool), np.empty((40, 10), bool)]
    study = dataclasses.replace(STUDY, updates=4)
    gradual = Branch("magnitude", "layer", "gradual", 0.0, 0.8)
    report = plasticity_branches.keep_numbers(gradual, masks, study, 50)
    assert [*report] == [0, 6, 12, 18]
    for j, row in enumerate(report.values(), 1):
        sparsity = 0.8 * (1 - (1 - j / 4) ** 3)
        assert row.sum() == math.floor((1 - sparsity) * WEIGHTS + 0.5)
        np.testing.assert_allclose(row, [(1 - sparsity) * n for n in (2560, 400)], 0, 1)
    at_once = gradual._replace(pruning="one-shot")
    (row,) = plasticity_branches.keep_numbers(at_once, masks, study, 50).values()
    assert row.tolist() == [512, 80]
    assert plasticity_branches.keep_numbers(UNPRUNED, masks, study, 50) == {}


def test_lanes_give_the_same(straight, tmp_path):
    """Branches of two seeds in one program of three lanes; the last is not full."""
    plasticity.run(small(out=tmp_path / "lanes", lanes=3))
    one, three = (json.loads(text(x)[0]) for x in (straight, tmp_path / "lanes"))
    assert one["points"] == three["points"]
    for a, b in zip(one["branches"], three["branches"], strict=True):
        assert a["active_weights"] == b["active_weights"]
        for name in ("accuracy_when_pruned", "accuracy_after"):
            np.testing.assert_allclose(a[name], b[name], atol=3 / 596)
        np.testing.assert_allclose(a["test_loss_after"], b["test_loss_after"], 1e-3)


def test_a_study_that_is_stopped_and_killed_ends_like_one_that_is_not(
    straight, tmp_path, monkeypatch
):
    again = small(out=tmp_path / "stopped")
    questions = itertools.count()
    with monkeypatch.context() as patch:
        # Some fifty times in the dense runs, and eight in every branch.
        patch.setattr(
            stop_signal.StopSignal,
            "reached",
            lambda self, step: signal.SIGTERM if next(questions) > 70 else None,
        )
        with pytest.raises(loop.StoppedError) as stop:
            plasticity.run(again)
    assert stop.value.signal == signal.SIGTERM
    assert "--out" in stop.value.__notes__[0]
    outcomes = [*(tmp_path / "stopped/branches").rglob("*.json")]
    assert 0 < len(outcomes) < 4

    class Killed(BaseException):
        pass

    write = plasticity_branches.write_json
    paths: list[pathlib.Path] = []

    def killing(path: pathlib.Path, values: Any) -> None:
        paths.append(path)
        if len(paths) == 3:
            path.with_name(path.name + ".partial").write_text('{"before": 0.')
            raise Killed
        write(path, values)

    with monkeypatch.context() as patch:
        patch.setattr(plasticity_branches, "write_json", killing)
        with pytest.raises(Killed):
            plasticity.run(again)
    assert not set(outcomes) & set(paths)
    plasticity.run(again)
    assert text(tmp_path / "stopped") == text(straight)


def test_branches_may_be_added_and_nothing_is_trained_twice(
    straight, tmp_path, monkeypatch
):
    folder = tmp_path / "added"
    shutil.copytree(straight, folder)
    branch_names: list[str] = []
    train_branches = plasticity.train_branches

    def noting(study: Any, each: Any, pruner: Any, jobs: Any, *rest: Any) -> None:
        branch_names.extend(f"{job.seed} {job.branch.name}" for job in jobs)
        train_branches(study, each, pruner, jobs, *rest)

    monkeypatch.setattr(plasticity, "train_branches", noting)
    plasticity.run(small(out=folder))
    assert branch_names == []
    assert text(folder) == text(straight)
    plasticity.run(small(out=folder, scopes=("global", "layer")))
    added = Branch("magnitude", "layer", "one-shot", 0.5, 0.9).name
    assert branch_names == [f"{seed} {added}" for _ in (12, 24) for seed in (0, 1)]
    assert (folder / "criteria.png").exists()
    report = json.loads(text(folder)[0])
    assert [b["scope"] for b in report["branches"]] == ["global", "layer"]


def test_another_study_is_not_continued(tmp_path):
    first = small(out=tmp_path / "a")
    plasticity.open_folder(first)
    for changes, message in (
        ({"epochs": 1.0}, r"holds a run with epochs=0.45, and this on"),
        ({"train.optimizer.learning_rate": 0.2}, "with optimizer.learning_rate=0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            plasticity.open_folder(runs.replace_options(first, changes))
    # Seeds may be added.
    assert (
        plasticity.open_folder(runs.replace_options(first, {"train.seeds": 3}))
        == first.out
    )
    (tmp_path / "b").mkdir()
    (tmp_path / "b/notes").touch()
    with pytest.raises(FileExistsError, match="neither empty nor the folder of a run"):
        plasticity.open_folder(dataclasses.replace(first, out=tmp_path / "b"))


def test_tables_hold_what_was_measured():
    def each(after: list[list[float]]) -> Any:
        measured = {"before": 0.5, "pruned": 0.1, "active_weights": 7}
        return [[measured | {"after": a} for a in row] for row in after]

    way = Branch("magnitude", "global", "one-shot", 0.0, 0.9)
    points = [(10, 1, 0.1), (20, 2, 0.1), (30, 3, 0.01)]
    results = Results(
        title="a model",
        points=tuple(PruningPoint(*point) for point in points),
        seeds=(0, 1),
        steps=10,
        epochs=1.0,
        drops=(2.5,),
        outcomes={
            UNPRUNED: each([[0.6, 0.6], [0.5, 0.5], [0.5, 0.5]]),
            way: each([[0.7, 0.6], [0.5, 0.4], [0.2, 0.4]]),
            way._replace(regrow=0.5): each([[0.8, 0.6], [0.6, 0.4], [0.5, 0.5]]),
            way._replace(pruning="gradual"): each([[0.7, 0.6], [0.5, 0.4], [0.4, 0.4]]),
        },
    )
    report = plasticity_report._markdown(results)
    at_once = "| 90% magnitude global one-shot |"
    assert [row for row in report.splitlines() if row.startswith(at_once)] == [
        # Over both points at 0.1, seeds 10 and 0; at 0.01, -30 and -10.
        f"{at_once} +5.00 ± 7.07 | -20.00 ± 14.14 | -3.33 ± 0.00 |",
        f"{at_once} +0.00 ± 7.07 | -20.00 ± 14.14 | -6.67 ± 0.00 |",
        f"{at_once} -20.00 ± 0.00 |  | -35.00 ± 21.21 |",
    ]
    parts = {
        "regeneration adds": "+5.00 ± 7.07 | +20.00 ± 14.14 | +10.00 ± 9.43 |",
        "gradual pruning adds": "+0.00 ± 0.00 | +10.00 ± 14.14 | +3.33 ± 4.71 |",
    }
    for part, row in parts.items():
        assert row in report.partition(part)[2].partition("##")[0]
    assert "| pruning | lr 0.1 (epochs 1 to 2) | lr 0.01 (epoch 3) |" in report
