"""The training loop: steps, evaluations, checkpoints, and going on from them."""

import collections
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax import Array

import granet_jax
from experiments.config.run import Config
from experiments.data import Dataset, Split, Stream
from experiments.training import initial_state
from experiments.training.checkpoints import Checkpoints, Progress
from experiments.training.devices import CompiledStep, compile_step
from experiments.training.metrics import Log, MetricsRecord
from granet_jax import distributions, masking, tost

if TYPE_CHECKING:
    from experiments.training.step import Score

PyTree = Any
EVALUATION_BATCH = 1024
# Steps that the host may be ahead of the device.
_AHEAD = 32


class DivergedError(RuntimeError):
    """The training loss, or a parameter, is no longer finite."""


class StoppedError(RuntimeError):
    """Training was told to stop before its end; there is a checkpoint to go on from.

    Attributes:
      signal: number of the signal that said so.
    """

    def __init__(self, step: int, signal: int) -> None:
        """Stopped after `step` steps."""
        super().__init__(f"stopped after step {step}, with a checkpoint.")
        self.signal = signal


class TrainSetup(NamedTuple):
    """A program with its data on the devices.

    Attributes:
      program: the compiled functions.
      ghost_step: those of the network with ghosts; None without ghosts.
      train_data: all training data; None for a stream.
      test_batches: the test data in batches; None for a stream.
      mask_sizes: number of weights of every maskable leaf, by its name.
    """

    compiled_step: CompiledStep
    ghost_step: CompiledStep | None
    train_data: PyTree | None
    test_batches: list[PyTree] | None
    mask_sizes: dict[str, int]

    @property
    def config(self) -> Config:
        """The configuration."""
        return self.compiled_step.train_step.config

    @property
    def dataset(self) -> Dataset | Stream:
        """What it trains on."""
        return self.compiled_step.train_step.dataset

    def compiled_step_at(self, step: int) -> CompiledStep:
        """The program for a state of so many steps."""
        if self.ghost_step is not None and step < self.config.ghost_steps:
            return self.ghost_step
        return self.compiled_step


def create(
    config: Config,
    dataset: Dataset | Stream,
    devices: Sequence[Any] | None = None,
) -> TrainSetup:
    """A trainer; nothing is compiled before it is needed.

    Raises:
      ValueError: a batch larger than the data, or that the devices cannot split; a
        scan over steps of streamed data.
    """
    streamed = isinstance(dataset, Stream)
    if config.data.batch_size > dataset.train_size:
        raise ValueError(
            f"data.batch_size must be at most the {dataset.train_size} training "
            f"examples of {dataset.name}, got {config.data.batch_size}."
        )
    if streamed and config.scan_block > 1:
        raise ValueError(
            f"scan_block must be 1 for {dataset.name}, got {config.scan_block}: its "
            "batches come from the host, one a step."
        )
    compiled_step = compile_step(config, dataset, devices)
    early = None
    if config.ghost_steps:
        early = compile_step(config, dataset, devices, ghosts=True)
    sizes = _mask_sizes(compiled_step)
    if streamed:
        return TrainSetup(compiled_step, early, None, None, sizes)
    return TrainSetup(
        compiled_step,
        early,
        compiled_step.place(dataset.train),
        [
            compiled_step.place_test(batch)
            for batch in padded_batches(
                dataset.test, EVALUATION_BATCH, compiled_step.devices
            )
        ],
        sizes,
    )


def fit(
    trainer: TrainSetup,
    seeds: Sequence[int],
    folder: pathlib.Path,
    *,
    on_step: Callable[[int], None] = lambda steps: None,
    on_records: Callable[[Sequence[MetricsRecord]], None] = lambda records: None,
    stopped: Callable[[int], int | None] = lambda step: None,
    first: int = 0,
    begin: Callable[[CompiledStep, Sequence[int]], PyTree] = initial_state.state,
) -> tuple[list[list[MetricsRecord]], PyTree]:
    """Trains for the configured steps, or for those that are left of them.

    Args:
      trainer: of the configuration.
      seeds: of this run; as many as the program has lanes.
      folder: of this run. A checkpoint found there is gone on from, exactly.
      on_step: called with the number of steps that have just been done.
      on_records: called with the new records of all seeds, at every evaluation.
      stopped: asked before every step, by the number of those done, for the signal
        that says to stop, if there is one.
      first: step that a new run starts from.
      begin: its state at that step, from the program for it and the seeds.

    Returns:
      (the records of every seed, the final state).

    Raises:
      DivergedError: a loss or a parameter is no longer finite.
      StoppedError: `stopped` said so. A checkpoint of that step is written.
      CheckpointError: a checkpoint could not be written or read.
    """
    config = trainer.config
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep)
    log = Log(folder, config.method, seeds, writes=jax.process_index() == 0)
    try:
        return _fit(
            trainer, seeds, checkpoints, log, on_step, on_records, stopped, first, begin
        )
    finally:
        log.close()
        checkpoints.close()


def _fit(
    trainer: TrainSetup,
    seeds: Sequence[int],
    checkpoints: Checkpoints,
    log: Log,
    on_step: Callable[[int], None],
    on_records: Callable[[Sequence[MetricsRecord]], None],
    stopped: Callable[[int], int | None],
    first: int,
    begin: Callable[[CompiledStep, Sequence[int]], PyTree],
) -> tuple[list[list[MetricsRecord]], PyTree]:
    config = trainer.config
    interval, saving = config.evaluation_interval, config.checkpoint_interval
    start = time.perf_counter()
    saved = checkpoints.latest
    step = first if saved is None else saved
    compiled_step = trainer.compiled_step_at(step)
    losses = Losses(compiled_step.lanes)
    if saved is None:
        state = begin(compiled_step, seeds)
        log.resume(-1)
    else:
        snapshot, progress = checkpoints.restore(
            saved, compiled_step.abstract(), config.method
        )
        state = compiled_step.restore(snapshot)
        del snapshot
        start -= progress.seconds
        losses.values = progress.losses
        evaluated = [s for s in range(0, step + 1, interval) if s >= first]
        if step == config.steps and step % interval:
            evaluated.append(step)
        log.resume(step, evaluated)
        on_step(step - first)
    data = train_batches(trainer, seeds[0], step)
    ahead = steps_ahead(compiled_step)
    while True:
        if trainer.compiled_step_at(step) is not compiled_step:
            # The end of the ghosts: from this step on the network is the plain one.
            on_step(losses.wait(0))
            plain = tost.drop_ghosts(compiled_step.snapshot(state))
            compiled_step = trainer.compiled_step_at(step)
            state = compiled_step.restore(plain)
        # A checkpoint is written after the evaluation of its step: what is gone on from
        # has been evaluated.
        if step != saved and (step % interval == 0 or step == config.steps):
            on_step(losses.wait(0))
            losses.check(step, checkpoints.latest)
            log.add(
                _evaluate(trainer, state, step, losses, time.perf_counter() - start)
            )
            losses.clear()
            on_records([records[-1] for records in log.records])
        wish = stopped(step)
        stopping = wish is not None and step < config.steps
        due = step % saving == 0 and step > 0
        if step != saved and (due or stopping or step == config.steps):
            on_step(losses.wait(0))
            losses.check(step, checkpoints.latest)
            _check_state(trainer, state, step, checkpoints.latest)
            # Written in the background, while more losses come in: a copy.
            progress = Progress(
                [list(lane) for lane in losses.values],
                time.perf_counter() - start,
                config.method,
            )
            checkpoints.save(step, compiled_step.snapshot(state), progress)
            saved = step
        if wish is not None and stopping:
            checkpoints.wait()
            raise StoppedError(step, wish)
        if step == config.steps:
            break
        # What is left of an interval after whole blocks goes step by step, so that at
        # most two programs are compiled.
        left = min(interval - step % interval, saving - step % saving)
        left = min(left, config.steps - step)
        if step < config.ghost_steps:
            left = min(left, config.ghost_steps - step)
        number = config.scan_block if left >= config.scan_block else 1
        state, loss = compiled_step.steps(state, next(data), number)
        step += number
        losses.add(loss)
        on_step(losses.wait(ahead))
        if losses.diverged:
            losses.check(step, checkpoints.latest)
    checkpoints.wait()
    return log.records, state


class Losses:
    """The losses since the last evaluation, some of them still being computed."""

    def __init__(self, lanes: int) -> None:
        """No losses, of so many lanes."""
        self.values: list[list[float]] = [[] for _ in range(lanes)]
        self.diverged = False
        self._pending: collections.deque[Array] = collections.deque()

    def add(self, losses: Array) -> None:
        """Adds those of the latest steps, (lanes, steps), without waiting for them."""
        self._pending.append(losses)

    def wait(self, pending: int) -> int:
        """Waits until at most so many calls are not done; how many steps came in."""
        steps = 0
        while len(self._pending) > pending:
            losses = np.asarray(self._pending.popleft())
            self.diverged |= not np.isfinite(losses).all()
            for values, lane in zip(self.values, losses, strict=True):
                values.extend(lane.tolist())
            steps += losses.shape[1]
        return steps

    def mean(self) -> list[float | None]:
        """Of every lane; None if there are none."""
        return [math.fsum(v) / len(v) if v else None for v in self.values]

    def clear(self) -> None:
        """Forgets them."""
        self.values = [[] for _ in self.values]

    def check(self, step: int, saved: int | None) -> None:
        """Raises DivergedError if one of those up to `step` is not finite."""
        if not self.diverged:
            return
        self.wait(0)
        for values in self.values:
            for i, loss in enumerate(values):
                if not math.isfinite(loss):
                    where = step - len(values) + i + 1
                    raise _diverged(f"the loss of step {where} is {loss}", saved)


def padded_batches(split: Split, largest: int, multiple: int) -> list[Split]:
    """The split in batches of one size, filled up with a label that nothing has.

    Args:
      split: on the host.
      largest: number of examples in a batch, exceeded only for `multiple`'s sake.
      multiple: that the number of examples in a batch is to be.
    """
    size = len(split.labels)
    number = math.ceil(size / largest)
    batch = math.ceil(math.ceil(size / number) / multiple) * multiple
    extra = number * batch - size

    def cut(x: Any, fill: int) -> list[np.ndarray]:
        pads = [(0, extra)] + [(0, 0)] * (x.ndim - 1)
        return np.split(np.pad(x, pads, constant_values=fill), number)

    inputs, labels = cut(split.inputs, 0), cut(split.labels, -1)
    return [Split(*pair) for pair in zip(inputs, labels, strict=True)]


def train_batches(trainer: TrainSetup, seed: int, start: int) -> Iterator[PyTree]:
    """What every step is given, from step `start` on."""
    dataset = trainer.dataset
    if not isinstance(dataset, Stream):
        while True:
            yield trainer.train_data
    batches = dataset.train_batches(
        seed=seed,
        start=start,
        batch_size=trainer.config.data.batch_size,
        process=jax.process_index(),
        processes=jax.process_count(),
        workers=trainer.config.data.workers,
    )
    for batch in batches:
        yield trainer.compiled_step.place(batch)


def _test_batches(trainer: TrainSetup) -> Iterator[PyTree]:
    dataset, compiled_step = trainer.dataset, trainer.compiled_step
    if not isinstance(dataset, Stream):
        assert trainer.test_batches is not None
        yield from trainer.test_batches
        return
    batches = dataset.test_batches(
        batch_size=trainer.config.data.batch_size,
        process=jax.process_index(),
        processes=jax.process_count(),
        workers=trainer.config.data.workers,
    )
    for batch in batches:
        yield compiled_step.place_test(batch)


def evaluate(
    trainer: TrainSetup, state: PyTree, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """What the state of a step makes of the test data.

    Returns:
      (int64, labels predicted correctly; float64, sum of the cross-entropy over all
      labels in nats), (lanes,) each.
    """
    compiled_step = trainer.compiled_step_at(step)
    correct = np.zeros(compiled_step.lanes, np.int64)
    loss = np.zeros(compiled_step.lanes, np.float64)
    scores: collections.deque[Score] = collections.deque()
    ahead = min(2, steps_ahead(compiled_step))

    def add(pending: int) -> None:
        while len(scores) > pending:
            score = jax.device_get(scores.popleft())
            correct[:] += score.correct
            loss[:] += score.loss

    for batch in _test_batches(trainer):
        scores.append(compiled_step.evaluate(state, batch))
        add(ahead)
    add(0)
    return correct, loss


def _evaluate(
    trainer: TrainSetup, state: PyTree, step: int, losses: Losses, seconds: float
) -> list[MetricsRecord]:
    """The record of every lane."""
    compiled_step = trainer.compiled_step_at(step)
    correct, loss = evaluate(trainer, state, step)
    total = trainer.dataset.test_size
    active = np.asarray(compiled_step.inspect(state).active)
    rate = float(np.asarray(compiled_step.train_step.schedule(step)))
    return [
        MetricsRecord(
            step=step,
            train_loss=train_loss,
            test_correct=int(correct[lane]),
            test_accuracy=int(correct[lane]) / total,
            test_loss=float(loss[lane]) / total,
            sparsity=_sparsity(trainer, active[lane].tolist()),
            learning_rate=rate,
            seconds=seconds,
        )
        for lane, train_loss in enumerate(losses.mean())
    ]


def _sparsity(trainer: TrainSetup, active: Sequence[int]) -> granet_jax.Sparsity:
    total = sum(trainer.mask_sizes.values())
    return granet_jax.Sparsity(
        overall=1.0 - sum(active) / total,
        leaves={
            name: 1.0 - n / size
            for (name, size), n in zip(trainer.mask_sizes.items(), active, strict=True)
        },
        active=sum(active),
        total=total,
    )


def _mask_sizes(compiled_step: CompiledStep) -> dict[str, int]:
    train_step = compiled_step.train_step
    one = jax.eval_shape(
        lambda seed: train_step.masks(train_step.create(seed)), np.uint32(0)
    )
    return {
        masking.leaf_name(path): math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(one)
    }


def _check_state(
    trainer: TrainSetup, state: PyTree, step: int, saved: int | None
) -> None:
    """Raises unless the state is worth keeping: finite, and exactly sparse."""
    seen = trainer.compiled_step_at(step).inspect(state)
    if not np.asarray(seen.finite).all():
        raise _diverged(f"a parameter is not finite after step {step}", saved)
    for lane in np.asarray(seen.broken):
        for name, number in zip(trainer.mask_sizes, lane, strict=True):
            if number:
                raise RuntimeError(f"{name} has weights that are pruned but not zero.")
    if step < trainer.config.steps:
        return
    total = sum(trainer.mask_sizes.values())
    dense = trainer.config.method == "dense"
    sparsity = 0.0 if dense else trainer.config.sparsity
    expected = distributions.total_count(total, sparsity)
    for lane in np.asarray(seen.active):
        if lane.sum() != expected:
            raise RuntimeError(
                f"{lane.sum()} weights are active, {expected} of {total} should be."
            )


def _diverged(what: str, saved: int | None) -> DivergedError:
    kept = "there is none" if saved is None else f"it is of step {saved}"
    return DivergedError(
        f"{what}: lower optimizer.learning_rate. The last good checkpoint is kept "
        f"({kept})."
    )


def steps_ahead(compiled_step: CompiledStep) -> int:
    """Steps that may queue up on the device.

    None where several devices are one CPU: programs that wait for one another there,
    and for the few threads, can wait for ever.
    """
    alone = compiled_step.devices == 1 or jax.default_backend() != "cpu"
    return _AHEAD if alone else 0
