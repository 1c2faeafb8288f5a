"""The training loop: steps, evaluations, checkpoints, and resuming from checkpoints."""

import collections
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax import Array

import granet_jax
from experiments.config.run import Config
from experiments.data import Dataset, Split, Stream, as_rows
from experiments.training import initial_state
from experiments.training.checkpoints import Checkpoints, Progress
from experiments.training.devices import CompiledStep, compile_step
from experiments.training.metrics import Log, MetricsRecord
from granet_jax import distributions, masking, structures, tost

if TYPE_CHECKING:
    from experiments.training.step import Score

PyTree = Any
EVALUATION_BATCH = 1024
# Number of calls that may wait in the device's queue.
_AHEAD = 32


class DivergedError(RuntimeError):
    """The training loss, or a parameter, is no longer finite."""


class StoppedError(RuntimeError):
    """A signal stopped training before its end, after a checkpoint was written.

    Attributes:
      signal: Number of the signal.
    """

    def __init__(self, step: int, signal: int) -> None:
        """Record that training stopped after `step` steps."""
        super().__init__(f"stopped after step {step}, with a checkpoint.")
        self.signal = signal


class TrainSetup(NamedTuple):
    """A compiled training step and its data on the devices.

    Attributes:
      compiled_step: Compiled functions of the plain network.
      ghost_step: Compiled functions of the network with ghosts; None without ghosts.
      train_data: All training data; None for a stream.
      test_batches: Test data in batches; None for a stream.
      mask_sizes: Number of weights of every maskable leaf, by its name.
    """

    compiled_step: CompiledStep
    ghost_step: CompiledStep | None
    train_data: PyTree | None
    test_batches: list[PyTree] | None
    mask_sizes: dict[str, int]

    @property
    def config(self) -> Config:
        """The configuration of the run."""
        return self.compiled_step.train_step.config

    @property
    def dataset(self) -> Dataset | Stream:
        """The training and test data."""
        return self.compiled_step.train_step.dataset

    def compiled_step_at(self, step: int) -> CompiledStep:
        """Return the functions for the network that is trained after `step` steps."""
        if self.ghost_step is not None and step < self.config.ghost_steps:
            return self.ghost_step
        return self.compiled_step


def create(
    config: Config,
    dataset: Dataset | Stream,
    devices: Sequence[Any] | None = None,
) -> TrainSetup:
    """Set up training. Functions are compiled when they are first called.

    Raises:
      ValueError: The batch is larger than the data, or the devices cannot share it, or
        the configuration asks for a scan over steps of streamed data.
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
    ghost_step = None
    if config.ghost_steps:
        ghost_step = compile_step(config, dataset, devices, ghosts=True)
    mask_sizes = _mask_sizes(compiled_step)
    if streamed:
        return TrainSetup(compiled_step, ghost_step, None, None, mask_sizes)
    batches = padded_batches(dataset.test, EVALUATION_BATCH, compiled_step.devices)
    return TrainSetup(
        compiled_step,
        ghost_step,
        compiled_step.place(as_rows(dataset.train)),
        [compiled_step.place_test(batch) for batch in batches],
        mask_sizes,
    )


def fit(
    setup: TrainSetup,
    seeds: Sequence[int],
    folder: epath.Path,
    *,
    on_step: Callable[[int], None] = lambda steps: None,
    on_records: Callable[[Sequence[MetricsRecord]], None] = lambda records: None,
    stopped: Callable[[int], int | None] = lambda step: None,
    first: int = 0,
    begin: Callable[[CompiledStep, Sequence[int]], PyTree] = initial_state.state,
) -> tuple[list[list[MetricsRecord]], PyTree]:
    """Train up to the configured number of steps.

    Args:
      setup: Compiled step and data.
      seeds: Seeds of this run, one per lane of the compiled step.
      folder: Folder of this run. If it has a checkpoint, training resumes there and
        gives exactly the result of an uninterrupted run.
      on_step: Function called with the number of steps just completed.
      on_records: Function called with the new records of all seeds after every
        evaluation.
      stopped: Function called before every step with the number of completed steps. It
        returns the signal that asks training to stop, or None.
      first: Step at which a new run starts.
      begin: Function from the compiled step and the seeds to the state of a new run.

    Returns:
      (the records of every seed, the final state).

    Raises:
      DivergedError: A loss or a parameter is no longer finite.
      StoppedError: `stopped` returned a signal. A checkpoint of that step exists.
      CheckpointError: A checkpoint could not be written or read.
    """
    config = setup.config
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep)
    log = Log(folder, config.method, seeds, writes=jax.process_index() == 0)
    try:
        run = _Run(setup, seeds, checkpoints, log, on_step)
        run.start(first, begin)
        return run.train(on_records, stopped)
    finally:
        log.close()
        checkpoints.close()


class _Run:
    """One training run in progress."""

    def __init__(
        self,
        setup: TrainSetup,
        seeds: Sequence[int],
        checkpoints: Checkpoints,
        log: Log,
        on_step: Callable[[int], None],
    ) -> None:
        self.setup = setup
        self.config = setup.config
        self.seeds = seeds
        self.checkpoints = checkpoints
        self.log = log
        self.on_step = on_step
        self.start_time = time.perf_counter()

    def start(
        self, first: int, begin: Callable[[CompiledStep, Sequence[int]], PyTree]
    ) -> None:
        """Restore the last checkpoint, or create the state of a new run."""
        self.saved_step = self.checkpoints.latest
        self.step = first if self.saved_step is None else self.saved_step
        self.compiled_step = self.setup.compiled_step_at(self.step)
        self.losses = Losses(self.compiled_step.lanes)
        if self.saved_step is None:
            self.state = begin(self.compiled_step, self.seeds)
            self.log.resume(-1)
            return
        snapshot, progress = self.checkpoints.restore(
            self.step, self.compiled_step.abstract(), self.config.method
        )
        self.state = self.compiled_step.restore(snapshot)
        self.start_time -= progress.seconds
        self.losses.values = progress.losses
        self.log.resume(self.step, self._evaluated_steps(first))
        self.on_step(self.step - first)

    def _evaluated_steps(self, first: int) -> list[int]:
        interval = self.config.evaluation_interval
        steps = [s for s in range(0, self.step + 1, interval) if s >= first]
        if self.step == self.config.steps and self.step % interval:
            steps.append(self.step)
        return steps

    def train(
        self,
        on_records: Callable[[Sequence[MetricsRecord]], None],
        stopped: Callable[[int], int | None],
    ) -> tuple[list[list[MetricsRecord]], PyTree]:
        """Train, evaluate and write checkpoints until the last step or a signal."""
        batches = train_batches(self.setup, self.seeds[0], self.step)
        ahead = steps_ahead(self.compiled_step)
        while True:
            if self.setup.compiled_step_at(self.step) is not self.compiled_step:
                self.drop_ghosts()
            # Evaluate before saving: a restored checkpoint has then been evaluated.
            if self.is_evaluation_due:
                self.evaluate()
                on_records([records[-1] for records in self.log.records])
            signal = stopped(self.step)
            finished = self.step == self.config.steps
            stopping = signal is not None and not finished
            if self.is_checkpoint_due or (stopping and self.step != self.saved_step):
                self.save()
            if signal is not None and stopping:
                self.checkpoints.wait()
                raise StoppedError(self.step, signal)
            if finished:
                self.checkpoints.wait()
                return self.log.records, self.state
            steps = self.block_length
            self.state, losses = self.compiled_step.steps(
                self.state, next(batches), steps
            )
            self.step += steps
            self.losses.add(losses)
            self.wait(ahead)
            if self.losses.diverged:
                self.check_losses()

    @property
    def is_evaluation_due(self) -> bool:
        due = self.step % self.config.evaluation_interval == 0
        return self.step != self.saved_step and (due or self.step == self.config.steps)

    @property
    def is_checkpoint_due(self) -> bool:
        due = self.step > 0 and self.step % self.config.checkpoint_interval == 0
        return self.step != self.saved_step and (due or self.step == self.config.steps)

    @property
    def block_length(self) -> int:
        """Number of steps of the next call.

        Only the lengths `scan_block` and 1 occur, so that at most two programs are
        compiled.
        """
        evaluation = self.config.evaluation_interval
        saving = self.config.checkpoint_interval
        steps_left = min(
            evaluation - self.step % evaluation,
            saving - self.step % saving,
            self.config.steps - self.step,
        )
        if self.step < self.config.ghost_steps:
            steps_left = min(steps_left, self.config.ghost_steps - self.step)
        return self.config.scan_block if steps_left >= self.config.scan_block else 1

    def drop_ghosts(self) -> None:
        """Continue with the plain network: the steps with ghosts are over."""
        self.wait(0)
        plain = tost.drop_ghosts(self.compiled_step.snapshot(self.state))
        self.compiled_step = self.setup.compiled_step_at(self.step)
        self.state = self.compiled_step.restore(plain)

    def evaluate(self) -> None:
        """Log the test accuracy and the mean loss since the last evaluation."""
        self.wait(0)
        self.check_losses()
        self.log.add(
            _evaluate(self.setup, self.state, self.step, self.losses, self.seconds)
        )
        self.losses.clear()

    def save(self) -> None:
        """Start writing a checkpoint in the background."""
        self.wait(0)
        self.check_losses()
        _check_state(self.setup, self.state, self.step, self.checkpoints.latest)
        # More losses arrive while the checkpoint is written, so it gets a copy.
        losses = [list(lane) for lane in self.losses.values]
        progress = Progress(losses, self.seconds, self.config.method)
        snapshot = self.compiled_step.snapshot(self.state)
        self.checkpoints.save(self.step, snapshot, progress)
        self.saved_step = self.step

    def wait(self, pending: int) -> None:
        """Wait until at most `pending` calls run on the device."""
        self.on_step(self.losses.wait(pending))

    def check_losses(self) -> None:
        """Raise DivergedError if a loss is not finite."""
        self.losses.check(self.step, self.checkpoints.latest)

    @property
    def seconds(self) -> float:
        """Training time in seconds, including the time before a restart."""
        return time.perf_counter() - self.start_time


class Losses:
    """Losses since the last evaluation. The device may still compute the last ones."""

    def __init__(self, lanes: int) -> None:
        """Start without losses."""
        self.values: list[list[float]] = [[] for _ in range(lanes)]
        self.diverged = False
        self._pending: collections.deque[Array] = collections.deque()

    def add(self, losses: Array) -> None:
        """Append the losses of the latest steps, (lanes, steps), without waiting."""
        self._pending.append(losses)

    def wait(self, pending: int) -> int:
        """Wait until at most `pending` calls run, and return the completed steps."""
        steps = 0
        while len(self._pending) > pending:
            losses = np.asarray(self._pending.popleft())
            self.diverged |= not np.isfinite(losses).all()
            for values, lane in zip(self.values, losses, strict=True):
                values.extend(lane.tolist())
            steps += losses.shape[1]
        return steps

    def mean(self) -> list[float | None]:
        """Return the mean loss of every lane, or None without losses."""
        return [math.fsum(v) / len(v) if v else None for v in self.values]

    def clear(self) -> None:
        """Discard the losses."""
        self.values = [[] for _ in self.values]

    def check(self, step: int, saved_step: int | None) -> None:
        """Raise DivergedError if a loss up to `step` is not finite."""
        if not self.diverged:
            return
        self.wait(0)
        for values in self.values:
            for i, loss in enumerate(values):
                if not math.isfinite(loss):
                    diverged_step = step - len(values) + i + 1
                    raise _diverged(
                        f"the loss of step {diverged_step} is {loss}", saved_step
                    )


def padded_batches(split: Split, largest: int, multiple: int) -> list[Split]:
    """Divide a split into batches of equal size, padded with examples of label -1.

    Args:
      split: Data on the host.
      largest: Largest batch size, which is exceeded only to reach a multiple.
      multiple: Number that must divide the batch size.
    """
    size = len(split.labels)
    number = math.ceil(size / largest)
    batch_size = math.ceil(math.ceil(size / number) / multiple) * multiple
    padding = number * batch_size - size

    def divide(x: Any, fill: int) -> list[np.ndarray]:
        widths = [(0, padding)] + [(0, 0)] * (x.ndim - 1)
        return np.split(np.pad(x, widths, constant_values=fill), number)

    inputs, labels = divide(split.inputs, 0), divide(split.labels, -1)
    return [Split(*pair) for pair in zip(inputs, labels, strict=True)]


def train_batches(setup: TrainSetup, seed: int, start: int) -> Iterator[PyTree]:
    """Yield the data argument of every step, beginning with step `start`."""
    dataset = setup.dataset
    if not isinstance(dataset, Stream):
        while True:
            yield setup.train_data
    batches = dataset.train_batches(
        seed=seed,
        start=start,
        batch_size=setup.config.data.batch_size,
        process=jax.process_index(),
        processes=jax.process_count(),
        workers=setup.config.data.workers,
    )
    for batch in batches:
        yield setup.compiled_step.place(batch)


def _test_batches(setup: TrainSetup) -> Iterator[PyTree]:
    dataset = setup.dataset
    if not isinstance(dataset, Stream):
        assert setup.test_batches is not None
        yield from setup.test_batches
        return
    batches = dataset.test_batches(
        batch_size=setup.config.data.batch_size,
        process=jax.process_index(),
        processes=jax.process_count(),
        workers=setup.config.data.workers,
    )
    for batch in batches:
        yield setup.compiled_step.place_test(batch)


def evaluate(
    setup: TrainSetup, state: PyTree, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Evaluate the state of a step on the test data.

    Returns:
      (number of labels predicted correctly, int64; sum of the cross-entropy over all
      labels in nats, float64), each of shape (lanes,).
    """
    compiled_step = setup.compiled_step_at(step)
    correct = np.zeros(compiled_step.lanes, np.int64)
    loss = np.zeros(compiled_step.lanes, np.float64)
    scores: collections.deque[Score] = collections.deque()
    ahead = min(2, steps_ahead(compiled_step))

    def collect(pending: int) -> None:
        while len(scores) > pending:
            score = jax.device_get(scores.popleft())
            correct[:] += score.correct
            loss[:] += score.loss

    for batch in _test_batches(setup):
        scores.append(compiled_step.evaluate(state, batch))
        collect(ahead)
    collect(0)
    return correct, loss


def _evaluate(
    setup: TrainSetup, state: PyTree, step: int, losses: Losses, seconds: float
) -> list[MetricsRecord]:
    """Return the metrics of every lane."""
    compiled_step = setup.compiled_step_at(step)
    correct, loss = evaluate(setup, state, step)
    total = setup.dataset.test_size
    active = np.asarray(compiled_step.inspect(state).active)
    learning_rate = float(np.asarray(compiled_step.train_step.schedule(step)))
    sparsities = [_sparsity(setup, lane.tolist()) for lane in active]
    empty = {name: None for sparsity in sparsities for name in sparsity.empty}
    if empty:
        warnings.warn(
            f"no active weight is left at {', '.join(map(repr, empty))} after step "
            f"{step}: signals pass there only by a shortcut, if there is one.",
            stacklevel=2,
        )
    return [
        MetricsRecord(
            step=step,
            train_loss=train_loss,
            test_correct=int(correct[lane]),
            test_accuracy=int(correct[lane]) / total,
            test_loss=float(loss[lane]) / total,
            sparsity=sparsities[lane],
            learning_rate=learning_rate,
            seconds=seconds,
        )
        for lane, train_loss in enumerate(losses.mean())
    ]


def _sparsity(setup: TrainSetup, active: Sequence[int]) -> granet_jax.Sparsity:
    total = sum(setup.mask_sizes.values())
    return granet_jax.Sparsity(
        overall=1.0 - sum(active) / total,
        leaves={
            name: 1.0 - n / size
            for (name, size), n in zip(setup.mask_sizes.items(), active, strict=True)
        },
        active=sum(active),
        total=total,
    )


def _mask_sizes(compiled_step: CompiledStep) -> dict[str, int]:
    train_step = compiled_step.train_step
    masks = jax.eval_shape(
        lambda seed: train_step.masks(train_step.create(seed)), np.uint32(0)
    )
    return {
        masking.leaf_name(path): math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(masks)
    }


def _check_state(
    setup: TrainSetup, state: PyTree, step: int, saved_step: int | None
) -> None:
    """Raise unless the parameters are finite and exactly as sparse as configured."""
    inspection = setup.compiled_step_at(step).inspect(state)
    if not np.asarray(inspection.finite).all():
        raise _diverged(f"a parameter is not finite after step {step}", saved_step)
    for lane in np.asarray(inspection.broken):
        for name, number in zip(setup.mask_sizes, lane, strict=True):
            if number:
                raise RuntimeError(f"{name} has weights that are pruned but not zero.")
    method = setup.compiled_step.train_step.method
    # With constant fan-in, layers round to a whole number of inputs for each unit.
    rounds = method is not None and structures.has_equal_boxes(method.structure)
    if step < setup.config.steps or rounds:
        return
    total = sum(setup.mask_sizes.values())
    sparsity = 0.0 if setup.config.method == "dense" else setup.config.sparsity
    expected = distributions.total_count(total, sparsity)
    for lane in np.asarray(inspection.active):
        if lane.sum() != expected:
            raise RuntimeError(
                f"{lane.sum()} weights are active, {expected} of {total} should be."
            )


def _diverged(reason: str, saved_step: int | None) -> DivergedError:
    kept = "there is none" if saved_step is None else f"it is of step {saved_step}"
    return DivergedError(
        f"{reason}: lower optimizer.learning_rate. The last good checkpoint is kept "
        f"({kept})."
    )


def steps_ahead(compiled_step: CompiledStep) -> int:
    """Return the number of calls that may wait in the device's queue.

    It is 0 if several devices share one CPU: their programs wait for each other and for
    the few threads, and could wait forever.
    """
    shares_cpu = compiled_step.devices > 1 and jax.default_backend() == "cpu"
    return 0 if shares_cpu else _AHEAD
