"""How well a network recovers from pruning: `python -m experiments.plasticity`.

The study of pruning plasticity of the GraNet paper (Liu et al. 2021, section 3), on any
model and data set that `experiments.train` can train. One dense run a seed is trained
with a checkpoint at every point in time; all branches of a point start from it.
"""

import dataclasses
import datetime
import functools
import itertools
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
import tyro
from jax import Array

import granet_jax
from experiments import plasticity_report, report, train, trainer
from experiments.checkpoints import Checkpoints
from experiments.config import CheckpointConfig, Config, MaskConfig
from experiments.data import Dataset, Stream, load
from experiments.files import read_json, write_json
from experiments.parallel import Program, compiled
from experiments.plasticity_report import Branch, Point, Results
from experiments.step import Functions, TrainState
from granet_jax.analysis import plasticity
from granet_jax.selection import Scope

PyTree = Any
# A random criterion draws from a stream of its own, apart from those of `step`.
_STREAM = 4
# Options of `train` that the study itself decides.
_DECIDED = ("out", "eval_every", "vmap_seeds", "checkpoint", "distributed")


@dataclasses.dataclass(frozen=True)
class Study:
    """Measures pruning plasticity: how a network recovers from pruning.

    Trains a network densely. At several points in time prunes copies of
    it, one for each rate, criterion, scope and way of pruning, and trains
    each on for a while at the learning rate of that moment. Plasticity is
    the accuracy then, less the accuracy before pruning.

    In `out` come results.md, results.json and plots. The same command
    with the same `out` goes on where it stopped; rates, criteria, scopes
    and ways of pruning, and seeds, may be added to it.
    """

    points: int = 8
    """Points in time, evenly over the training, the last one near its
    end."""

    rates: tuple[float, ...] = (0.5, 0.8, 0.9, 0.98)
    """Pruning rates: shares of all weights that are pruned, in (0, 1)."""

    criteria: tuple[Literal["magnitude", "gradient", "random"], ...] = ("magnitude",)
    """What is pruned first: small weights, weights of small gradient (of
    one batch), or any."""

    scopes: tuple[Literal["global", "layer"], ...] = ("global",)
    """Whether weights compete across layers, or within each."""

    pruning: tuple[Literal["one-shot", "gradual"], ...] = ("one-shot", "gradual")
    """All at once; or by a cubic schedule, over the first half of the
    training that follows."""

    regrow: tuple[float, ...] = (0.0, 0.5)
    """Neuroregeneration: the share of each layer's weights left by
    pruning that are dropped too, by magnitude, and replaced by as many
    of large gradient, each time that it prunes. 0: none."""

    epochs: float = 1.0
    """Epochs that each pruned network is trained on."""

    updates: int = 10
    """Times that gradual pruning prunes."""

    lanes: int = 1
    """Pruned networks trained at once, as one vectorised program on one
    device. For a GPU or TPU, as many as fit its memory. Leave it at 1 on
    a CPU, where convolutions with a kernel each run several times
    slower."""

    out: pathlib.Path | None = None
    """Folder for the results; must be new, or of the same study, which
    then goes on. By default runs/TIME-plasticity."""

    progress: bool = True
    """Whether to show a progress bar."""

    train: Config = dataclasses.field(
        default_factory=lambda: Config(method="dense", baseline=False)
    )
    """The dense training, as of `experiments.train`."""

    def __post_init__(self) -> None:
        """Raises ValueError for a value that cannot be used."""
        for name in ("points", "updates", "lanes"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}."
                )
        if self.points > self.train.steps:
            raise ValueError(
                f"points must be at most train.steps, {self.train.steps}, got "
                f"{self.points}."
            )
        if not 0 < self.epochs < float("inf"):
            raise ValueError(f"epochs must lie in (0, inf), got {self.epochs}.")
        for name in ("rates", "criteria", "scopes", "pruning", "regrow"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must have values, none twice, got {values}.")
        for rate in self.rates:
            if not 0 < rate < 1:
                raise ValueError(f"rates must lie in (0, 1), got {rate}.")
        for share in self.regrow:
            if not 0 <= share <= 1:
                raise ValueError(f"regrow must lie in [0, 1], got {share}.")
        if self.train.method != "dense":
            raise ValueError(
                f"train.method must be dense, got {self.train.method}: a study prunes "
                "a dense network."
            )
        defaults = Config()
        for name in _DECIDED:
            if getattr(self.train, name) != getattr(defaults, name):
                raise ValueError(
                    f"train.{name} is not for a study, which decides it: leave it out."
                )
        if self.train.parallel != "jit":
            raise ValueError(
                f"train.parallel must be jit, got {self.train.parallel}: masks are "
                "changed between steps."
            )
        if self.train.ghost_steps:
            raise ValueError(
                "train.tost.neurons and train.tost.skips are not for a study: the "
                "network must be the same at all points."
            )

    @property
    def interval(self) -> int:
        """Steps between points."""
        return self.train.steps // self.points

    @property
    def steps(self) -> list[int]:
        """Those of the points."""
        return [self.interval * i for i in range(1, self.points + 1)]

    @property
    def branches(self) -> list[Branch]:
        """What is trained on from every point: first, without being pruned."""
        ways = itertools.product(
            self.criteria, self.scopes, self.pruning, sorted(self.regrow)
        )
        found = [
            Branch(*way, rate) for way, rate in itertools.product(ways, self.rates)
        ]
        return [plasticity_report.UNPRUNED, *found]

    @property
    def dense(self) -> Config:
        """The training that branches start from: a checkpoint at every point."""
        return dataclasses.replace(
            self.train,
            masks=MaskConfig(),
            baseline=False,
            progress=self.progress,
            eval_every=self.interval,
            checkpoint=CheckpointConfig(self.interval, self.points + 1),
        )

    def continued(self, learning_rate: float) -> Config:
        """The training of branches: masked, at a learning rate that stays."""
        return dataclasses.replace(
            self.dense,
            method="static",
            sparsity=0.0,
            seeds=self.lanes,
            vmap_seeds=self.lanes > 1,
            optimizer=dataclasses.replace(
                self.train.optimizer,
                schedule="constant",
                learning_rate=learning_rate,
                warmup_steps=0,
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """The values that all numbers of a study depend on, as JSON holds them."""
        own = {name: getattr(self, name) for name in ("points", "epochs", "updates")}
        return own | self.dense.to_dict()


class _Job(NamedTuple):
    """A branch to train, of one seed, from one point.

    Attributes:
      branch: how it is pruned.
      seed: of the dense run.
      state: of the dense run at that point.
      before: its number of test examples predicted correctly.
      path: of the file for the outcome.
    """

    branch: Branch
    seed: int
    state: TrainState
    before: int
    path: pathlib.Path


def run(study: Study) -> Results | None:
    """Trains all that is not finished in the folder, and writes the results there.

    Raises:
      ValueError: a study that cannot be run, or not that of the folder.
      OSError: the folder has other files in it, or cannot be written; data that is not
        there or cannot be read.
      trainer.DivergedError: a loss is no longer finite.
      trainer.StoppedError: SIGTERM or SIGINT came. What is done stays.
    """
    dataset = load(study.train.data.dataset, study.train.data.data_dir)
    steps = continued_steps(study, dataset)
    dense = trainer.create(study.dense, dataset)
    program = dense.program
    # All that can be wrong is to come to light before anything trains.
    compiled(study.continued(study.train.optimizer.learning_rate), dataset)
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
                pruner = _pruner(study, dataset)
                each = None
                for point in _points(study, program):
                    jobs = _missing(study, program, runs, folder, point)
                    if not jobs:
                        continue
                    config = study.continued(point.learning_rate)
                    # Compiled once a learning rate.
                    if each is None or each.config != config:
                        each = None
                        each = trainer.create(config, dataset)
                    bar.set_description(f"from step {point.step}", refresh=False)
                    for first in range(0, len(jobs), study.lanes):
                        chosen = jobs[first : first + study.lanes]
                        _train_jobs(
                            study,
                            each,
                            pruner,
                            chosen,
                            steps,
                            bar.update,
                            stop.reached,
                        )
                    write_results(study, program, runs, folder, steps)
    except trainer.StoppedError as stopped:
        stopped.add_note(f"Go on with the same command and --out {folder}")
        raise
    results = write_results(study, program, runs, folder, steps)
    print((folder / "results.md").read_text())
    print(f"Results in {folder}")
    return results


def continued_steps(study: Study, dataset: Dataset | Stream) -> int:
    """Steps that a branch trains for.

    Raises:
      ValueError: too few for gradual pruning.
    """
    per_epoch = _steps_per_epoch(study.train, dataset)
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


def _points(study: Study, dense: Program) -> list[Point]:
    schedule = dense.functions.schedule
    per_epoch = _steps_per_epoch(study.train, dense.functions.dataset)
    # That of the last step before the point: where the schedule drops at this very
    # moment, the network has not been trained at the next one yet.
    return [
        Point(step, step / per_epoch, float(np.asarray(schedule(step - 1))))
        for step in study.steps
    ]


def _steps_per_epoch(config: Config, dataset: Dataset | Stream) -> int:
    streamed = isinstance(dataset, Stream)
    size = dataset.train_size if streamed else len(dataset.train.labels)
    return max(1, size // config.data.batch_size)


def _path(folder: pathlib.Path, step: int, seed: int, branch: Branch) -> pathlib.Path:
    return folder / "branches" / f"step{step}" / f"seed{seed}-{branch.name}.json"


def _calls(study: Study, runs: report.Runs, folder: pathlib.Path) -> int:
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
    dense: Program,
    runs: report.Runs,
    folder: pathlib.Path,
    point: Point,
) -> list[_Job]:
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
        jobs += [_Job(b, seed, state, before, path) for b, path in left.items()]
    return jobs


def _record(records: Sequence[report.Record], step: int) -> report.Record:
    return next(record for record in records if record.step == step)


class _Pruner(NamedTuple):
    """What prunes states, one at a time, however many lanes there are.

    Compiled once for all points: nothing in it depends on the learning rate.

    Attributes:
      start: from a dense state to the same with masks, all active.
      cutter: from (criterion, scope, regrow) to a function of (state, data, keep) that
        prunes a state down to `keep`.
    """

    start: Callable[[TrainState], TrainState]
    cutter: Callable[[str, Scope, float], Callable[..., TrainState]]


def _pruner(study: Study, dataset: Dataset | Stream) -> _Pruner:
    config = study.continued(study.train.optimizer.learning_rate)
    functions = Functions(config, dataset)

    def start(state: TrainState) -> TrainState:
        opt_state = functions.optimizer(state.seed).init(state.params)
        assert isinstance(opt_state, granet_jax.SparseState)
        opt_state = opt_state._replace(inner_state=state.opt_state)
        return state._replace(opt_state=opt_state)

    @functools.cache
    def cutter(
        criterion: str, scope: Scope, regrow: float
    ) -> Callable[..., TrainState]:
        return jax.jit(functools.partial(_cut, functions, criterion, scope, regrow))

    return _Pruner(jax.jit(start), cutter)


def _cut(
    functions: Functions,
    criterion: str,
    scope: Scope,
    regrow: float,
    state: TrainState,
    data: PyTree,
    keep: Any,
) -> TrainState:
    """A state pruned down to so many weights, `regrow` of them exchanged."""
    opt_state = state.opt_state
    assert isinstance(opt_state, granet_jax.SparseState)
    key = jax.random.fold_in(jax.random.key(state.seed), _STREAM)
    pruned = plasticity.prune(
        state.params,
        opt_state.masks,
        keep,
        criterion=criterion,
        scope=scope,
        regrow=regrow,
        # Compiled only if it is of use.
        grads=functions.gradient(state, data),
        key=jax.random.fold_in(key, state.step),
    )
    params, inner_state = plasticity.apply_pruned(
        state.params, opt_state.inner_state, pruned
    )
    average = state.average
    if average != ():
        average = granet_jax.apply_masks(average, pruned.continuing)
    opt_state = opt_state._replace(masks=pruned.masks, inner_state=inner_state)
    return state._replace(params=params, opt_state=opt_state, average=average)


def _train_jobs(
    study: Study,
    each: trainer.Trainer,
    pruner: _Pruner,
    jobs: Sequence[_Job],
    steps: int,
    on_step: Callable[[int], object],
    stopped: Callable[[int], int | None],
) -> None:
    """Trains one branch, or several at once, and writes the outcome of each."""
    # A last group that is smaller would be another program: it is filled up.
    lanes = [*jobs, *[jobs[-1]] * (study.lanes - len(jobs))]
    states = [pruner.start(job.state) for job in lanes]
    (masks,) = {tuple(x.shape for x in _masks(state)) for state in states}
    keeps = [
        _keeps(job.branch, [np.empty(s, bool) for s in masks], study, steps)
        for job in lanes
    ]
    cuts = [
        pruner.cutter(job.branch.criterion, job.branch.scope, job.branch.regrow)
        for job in lanes
    ]
    program = each.program
    state = program.restore(_stacked(program, states))
    pruned = np.asarray([job.before for job in lanes])
    losses = trainer.Losses(program.lanes)
    data = trainer.batches(each, jobs[0].seed, int(jobs[0].state.step))
    ahead, done = trainer.steps_ahead(program), 0
    while done < steps:
        if (wish := stopped(done)) is not None:
            raise trainer.StoppedError(done, wish)
        batch = next(data)
        due = [i for i, keep in enumerate(keeps) if done in keep]
        if due:
            states = _unstacked(program, state)
            for i in due:
                states[i] = cuts[i](states[i], batch, keeps[i][done])
            state = program.restore(_stacked(program, states))
            last = [i for i in due if done == max(keeps[i])]
            if last:
                pruned[last] = trainer.evaluate(each, state, done)[0][last]
        left = min([at for keep in keeps for at in keep if at > done] + [steps]) - done
        number = each.config.scan_block if left >= each.config.scan_block else 1
        state, loss = program.steps(state, batch, number)
        done += number
        losses.add(loss)
        on_step(losses.wait(ahead))
    on_step(losses.wait(0))
    if losses.diverged:
        names = ", ".join(job.path.stem for job in jobs)
        raise trainer.DivergedError(
            f"{names}: a loss is not finite: lower train.optimizer.learning_rate, or "
            "leave out this way of pruning."
        )
    after, loss = trainer.evaluate(each, state, done)
    seen = program.inspect(state)
    for i, job in enumerate(jobs):
        keep = [*keeps[i].values()]
        active = int(keep[-1].sum() if keep else sum(map(math.prod, masks)))
        if int(np.asarray(seen.active)[i].sum()) != active or seen.broken[i].any():
            raise RuntimeError(f"{job.path.stem} has not exactly {active} weights.")
        job.path.parent.mkdir(parents=True, exist_ok=True)
        total = _test_size(each)
        outcome = {
            "before": job.before / total,
            "pruned": int(pruned[i]) / total,
            "after": int(after[i]) / total,
            "test_loss": float(loss[i]) / total,
            "active_weights": active,
        }
        write_json(job.path, outcome)


def _keeps(
    branch: Branch, masks: PyTree, study: Study, steps: int
) -> dict[int, np.ndarray]:
    """The numbers of weights that a branch keeps, by the steps done before it does."""
    if branch == plasticity_report.UNPRUNED:
        return {}
    updates = study.updates if branch.pruning == "gradual" else 1
    rising = plasticity.sparsities(branch.rate, updates)
    rows = plasticity.keep_counts(masks, rising, scope=branch.scope)
    return {i * (steps // 2 // updates): row for i, row in enumerate(rows)}


def _masks(state: TrainState) -> list[Array]:
    return jax.tree.leaves(granet_jax.get_masks(state.opt_state))


def _stacked(program: Program, states: Sequence[TrainState]) -> TrainState:
    """Of states of one lane a snapshot of the program's; counters have no lanes."""

    def stack(like: jax.ShapeDtypeStruct, *leaves: Array) -> Any:
        if len(like.shape) > leaves[0].ndim:
            return jnp.stack(leaves)
        return jax.device_put(leaves[0], like.sharding)

    return jax.tree.map(stack, program.abstract(), *states)


def _unstacked(program: Program, state: PyTree) -> list[TrainState]:
    """The states of the lanes."""
    if program.lanes == 1:
        return [program.snapshot(state)]
    one = jax.eval_shape(program.functions.create, np.uint32(0))

    def lane(i: int) -> TrainState:
        return jax.tree.map(
            lambda x, like: x[i] if x.ndim > like.ndim else jnp.copy(x), state, one
        )

    return [lane(i) for i in range(program.lanes)]


def _test_size(each: trainer.Trainer) -> int:
    dataset = each.dataset
    return (
        dataset.test_size if isinstance(dataset, Stream) else dataset.test.labels.size
    )


def write_results(
    study: Study,
    dense: Program,
    runs: report.Runs,
    folder: pathlib.Path,
    steps: int,
) -> Results | None:
    """Writes results.md, results.json and plots from the points that are finished.

    Returns:
      The results; None without a finished point.
    """
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
        dense.functions.schedule(np.arange(study.train.steps)),
        study.train.steps,
    )
    results = Results(
        title=f"{study.train.model} on {study.train.data.dataset}",
        points=tuple(points),
        seeds=runs.seeds,
        steps=steps,
        epochs=study.epochs,
        drops=tuple(
            (int(i) + 1) / _steps_per_epoch(study.train, dense.functions.dataset)
            for i in np.flatnonzero(np.diff(rates))
        ),
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
