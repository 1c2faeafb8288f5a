"""How well a network recovers from pruning: `python -m experiments.plasticity`.

This is the study of pruning plasticity in the GraNet paper (Liu et al. 2021, section
3), for any model and data set of `experiments.train`. Every seed has one dense run with
a checkpoint at every point, from which all branches of that point start.
"""

import datetime
import sys
from collections.abc import Sequence

import jax
import numpy as np
import tqdm
import tyro
from etils import epath

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
from experiments.training.exit_status import exit_status
from experiments.training.plasticity_branches import (
    BranchRun,
    create_pruner,
    train_branches,
)
from experiments.training.run_folders import DEFAULT_FOLDER, claim, run_name
from experiments.training.stop_signal import StopSignal


def run(study: Study) -> Results | None:
    """Train all unfinished parts of a study and write the results.

    Returns:
      The results; None without a finished point.

    Raises:
      ValueError: The study is invalid, or differs from the study in the folder.
      OSError: The folder has other files or cannot be written, or the data are missing
        or unreadable.
      loop.DivergedError: A loss is no longer finite.
      loop.StoppedError: SIGTERM or SIGINT arrived. Finished parts are kept.
    """
    dataset = load(study.train.data.dataset, study.train.data.data_dir)
    steps = continued_steps(study, dataset)
    dense = loop.create(study.dense, dataset)
    compiled_step = dense.compiled_step
    # Report every invalid configuration before training starts.
    compile_step(study.continued(study.train.optimizer.learning_rate), dataset)
    folder = open_folder(study)
    try:
        with StopSignal() as stop:
            runs = train.train_all(dense, folder, stop.reached)
            # Free the setup: each one holds the data on the devices.
            del dense
            with tqdm.tqdm(
                total=_calls(study, runs, folder) * steps,
                unit="step",
                disable=not study.progress,
                dynamic_ncols=True,
            ) as bar:
                pruner = create_pruner(study, dataset)
                setup = None
                for point in _points(study, compiled_step):
                    branch_runs = _missing(study, compiled_step, runs, folder, point)
                    if not branch_runs:
                        continue
                    config = study.continued(point.learning_rate)
                    # Branches of the same learning rate share a setup.
                    if setup is None or setup.config != config:
                        setup = None
                        setup = loop.create(config, dataset)
                    bar.set_description(f"from step {point.step}", refresh=False)
                    for first in range(0, len(branch_runs), study.lanes):
                        lanes = branch_runs[first : first + study.lanes]
                        train_branches(
                            study,
                            setup,
                            pruner,
                            lanes,
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
    """Return the number of steps for which a branch is trained.

    Raises:
      ValueError: The steps are too few for gradual pruning.
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


def open_folder(study: Study) -> epath.Path:
    """Return the results folder of a study, new or to be continued.

    Raises:
      FileExistsError: The folder contains other files.
      ValueError: The folder contains a study with other options.
    """
    time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = study.out or DEFAULT_FOLDER / f"{time}-plasticity"
    claim(folder, study.to_dict())
    return folder


def _points(study: Study, dense: CompiledStep) -> list[PruningPoint]:
    schedule = dense.train_step.schedule
    batch_size = study.train.data.batch_size
    per_epoch = dense.train_step.dataset.steps_per_epoch(batch_size)
    # Use the learning rate of the last step before the point. If the schedule drops at
    # the point, the network has not been trained with the lower rate yet.
    return [
        PruningPoint(step, step / per_epoch, float(np.asarray(schedule(step - 1))))
        for step in study.steps
    ]


def _path(folder: epath.Path, step: int, seed: int, branch: Branch) -> epath.Path:
    return folder / "branches" / f"step{step}" / f"seed{seed}-{branch.name}.json"


def _calls(study: Study, runs: training_report.MethodRuns, folder: epath.Path) -> int:
    """Return how many groups of `study.lanes` branches are left to train."""
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
    folder: epath.Path,
    point: PruningPoint,
) -> list[BranchRun]:
    """Return the unfinished branches of a point."""
    branch_runs = []
    for seed, records in zip(runs.seeds, runs.records, strict=True):
        paths = {b: _path(folder, point.step, seed, b) for b in study.branches}
        unfinished = {b: path for b, path in paths.items() if not path.exists()}
        if not unfinished:
            continue
        run_folder = folder / run_name("dense", [seed])
        checkpoints = Checkpoints(run_folder / "checkpoints", study.points + 1)
        try:
            state, _ = checkpoints.restore(point.step, dense.abstract())
        finally:
            checkpoints.close()
        state = jax.device_get(state)
        before = next(r for r in records if r.step == point.step).test_correct
        branch_runs += [
            BranchRun(branch, seed, state, before, path)
            for branch, path in unfinished.items()
        ]
    return branch_runs


def write_results(
    study: Study,
    dense: CompiledStep,
    runs: training_report.MethodRuns,
    folder: epath.Path,
    steps: int,
) -> Results | None:
    """Write results.md, results.json and plots of the finished points.

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
    values = {"config": study.to_dict(), "environment": training_report.environment()}
    plasticity_report.write(results, values, folder)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    return exit_status(
        lambda: run(
            tyro.cli(Study, args=arguments, prog="python -m experiments.plasticity")
        )
    )


if __name__ == "__main__":
    sys.exit(main())
