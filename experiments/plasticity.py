"""How well a network recovers from pruning: `python -m experiments.plasticity`.

The study of pruning plasticity of the GraNet paper (Liu et al. 2021, section 3), on any
model and data set that `experiments.train` can train. One dense run a seed is trained
with a checkpoint at every point in time; all branches of a point start from it.
"""

import datetime
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np
import tqdm
import tyro

from experiments import train
from experiments.config.plasticity import Branch, PruningPoint, Study
from experiments.data import Dataset, Stream, load
from experiments.reports import plasticity as plasticity_report
from experiments.reports import training as training_report
from experiments.reports.plasticity import Results
from experiments.training import loop
from experiments.training.atomic_files import read_json
from experiments.training.checkpoints import Checkpoints
from experiments.training.devices import CompiledStep, compile_step
from experiments.training.plasticity_branches import (
    BranchRun,
    create_pruner,
    train_branches,
)


def run(study: Study) -> Results | None:
    """Trains all that is not finished in the folder, and writes the results there.

    Raises:
      ValueError: a study that cannot be run, or not that of the folder.
      OSError: the folder has other files in it, or cannot be written; data that is not
        there or cannot be read.
      loop.DivergedError: a loss is no longer finite.
      loop.StoppedError: SIGTERM or SIGINT came. What is done stays.
    """
    dataset = load(study.train.data.dataset, study.train.data.data_dir)
    steps = continued_steps(study, dataset)
    dense = loop.create(study.dense, dataset)
    compiled_step = dense.compiled_step
    # All that can be wrong is to come to light before anything trains.
    compile_step(study.continued(study.train.optimizer.learning_rate), dataset)
    folder = open_folder(study)
    try:
        with train.StopSignal() as stop:
            runs = train.train_all(dense, folder, stop.reached)
            # So that the devices hold the data once.
            del dense
            with tqdm.tqdm(
                total=_calls(study, runs, folder) * steps,
                unit="step",
                disable=not study.progress,
                dynamic_ncols=True,
            ) as bar:
                pruner = create_pruner(study, dataset)
                each = None
                for point in _points(study, compiled_step):
                    jobs = _missing(study, compiled_step, runs, folder, point)
                    if not jobs:
                        continue
                    config = study.continued(point.learning_rate)
                    # Compiled once a learning rate.
                    if each is None or each.config != config:
                        each = None
                        each = loop.create(config, dataset)
                    bar.set_description(f"from step {point.step}", refresh=False)
                    for first in range(0, len(jobs), study.lanes):
                        chosen = jobs[first : first + study.lanes]
                        train_branches(
                            study,
                            each,
                            pruner,
                            chosen,
                            steps,
                            bar.update,
                            stop.reached,
                        )
                    write_results(study, compiled_step, runs, folder, steps)
    except loop.StoppedError as stopped:
        stopped.add_note(f"Go on with the same command and --out {folder}")
        raise
    results = write_results(study, compiled_step, runs, folder, steps)
    print((folder / "results.md").read_text())
    print(f"Results in {folder}")
    return results


def continued_steps(study: Study, dataset: Dataset | Stream) -> int:
    """Steps that a branch trains for.

    Raises:
      ValueError: too few for gradual pruning.
    """
    per_epoch = dataset.steps_per_epoch(study.train.data.batch_size)
    steps = max(1, round(study.epochs * per_epoch))
    if "gradual" in study.pruning and study.updates > steps // 2:
        raise ValueError(
            f"updates must be at most {steps // 2}, half of the {steps} steps of "
            f"{study.epochs:g} epochs, got {study.updates}: more epochs, or fewer "
            "updates."
        )
    return steps


def open_folder(study: Study) -> pathlib.Path:
    """The folder for the results: a new one, or that of the study to go on with.

    Raises:
      FileExistsError: it has files of something else in it.
      ValueError: its study was configured otherwise.
    """
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = study.out or train.DEFAULT_FOLDER / f"{now}-plasticity"
    train.claim(folder, study.to_dict())
    return folder


def _points(study: Study, dense: CompiledStep) -> list[PruningPoint]:
    schedule = dense.train_step.schedule
    batch_size = study.train.data.batch_size
    per_epoch = dense.train_step.dataset.steps_per_epoch(batch_size)
    # That of the last step before the point: where the schedule drops at this very
    # moment, the network has not been trained at the next one yet.
    return [
        PruningPoint(step, step / per_epoch, float(np.asarray(schedule(step - 1))))
        for step in study.steps
    ]


def _path(folder: pathlib.Path, step: int, seed: int, branch: Branch) -> pathlib.Path:
    return folder / "branches" / f"step{step}" / f"seed{seed}-{branch.name}.json"


def _calls(study: Study, runs: training_report.MethodRuns, folder: pathlib.Path) -> int:
    """How many times a program of so many lanes is to be run."""
    missing = [
        sum(
            not _path(folder, step, seed, branch).exists()
            for seed in runs.seeds
            for branch in study.branches
        )
        for step in study.steps
    ]
    return sum(-(-number // study.lanes) for number in missing)


def _missing(
    study: Study,
    dense: CompiledStep,
    runs: training_report.MethodRuns,
    folder: pathlib.Path,
    point: PruningPoint,
) -> list[BranchRun]:
    """The branches of a point that are not finished."""
    jobs = []
    for seed, records in zip(runs.seeds, runs.records, strict=True):
        paths = {b: _path(folder, point.step, seed, b) for b in study.branches}
        left = {branch: path for branch, path in paths.items() if not path.exists()}
        if not left:
            continue
        run_folder = folder / train.run_name("dense", [seed])
        checkpoints = Checkpoints(run_folder / "checkpoints", study.points + 1)
        try:
            state, _ = checkpoints.restore(point.step, dense.abstract())
        finally:
            checkpoints.close()
        state = jax.device_get(state)
        before = _record(records, point.step).test_correct
        jobs += [BranchRun(b, seed, state, before, path) for b, path in left.items()]
    return jobs


def _record(
    records: Sequence[training_report.MetricsRecord], step: int
) -> training_report.MetricsRecord:
    return next(record for record in records if record.step == step)


def write_results(
    study: Study,
    dense: CompiledStep,
    runs: training_report.MethodRuns,
    folder: pathlib.Path,
    steps: int,
) -> Results | None:
    """Writes results.md, results.json and plots from the points that are finished.

    Returns:
      The results; None without a finished point.
    """
    per_epoch = dense.train_step.dataset.steps_per_epoch(study.train.data.batch_size)
    points = [
        point
        for point in _points(study, dense)
        if all(
            _path(folder, point.step, seed, branch).exists()
            for seed in runs.seeds
            for branch in study.branches
        )
    ]
    if not points:
        return None
    outcomes = {
        branch: [
            [read_json(_path(folder, p.step, seed, branch)) for seed in runs.seeds]
            for p in points
        ]
        for branch in study.branches
    }
    rates = np.broadcast_to(
        dense.train_step.schedule(np.arange(study.train.steps)),
        study.train.steps,
    )
    results = Results(
        title=f"{study.train.model} on {study.train.data.dataset}",
        points=tuple(points),
        seeds=runs.seeds,
        steps=steps,
        epochs=study.epochs,
        drops=tuple((int(i) + 1) / per_epoch for i in np.flatnonzero(np.diff(rates))),
        outcomes=outcomes,
    )
    values = {"config": study.to_dict(), "environment": train.environment()}
    plasticity_report.write(results, values, folder)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, as `experiments.train.main` does."""
    return train.exit_status(
        lambda: run(
            tyro.cli(Study, args=arguments, prog="python -m experiments.plasticity")
        )
    )


if __name__ == "__main__":
    sys.exit(main())
