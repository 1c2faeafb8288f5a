"""Metrics of a training run, written as JSON lines and for TensorBoard."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath
from tensorboardX import SummaryWriter

import granet_jax
from experiments.training.atomic_files import atomic_path

FILE = "metrics.jsonl"


class MetricsRecord(NamedTuple):
    """Metrics of one evaluation.

    Attributes:
      step: Number of completed optimizer steps.
      train_loss: Mean loss since the previous record, in nats; None at step 0.
      test_correct: Number of test labels predicted correctly.
      test_accuracy: Fraction of test labels predicted correctly.
      test_loss: Mean cross-entropy over the test data, in nats.
      sparsity: Sparsity of the masks.
      learning_rate: Learning rate of the next step.
      seconds: Wall-clock training time so far, including compilation.
    """

    step: int
    train_loss: float | None
    test_correct: int
    test_accuracy: float
    test_loss: float
    sparsity: granet_jax.Sparsity
    learning_rate: float
    seconds: float


class Log:
    """The records of all seeds of one run, kept in memory and in a file.

    Only the first process of a run writes files.
    """

    def __init__(
        self, folder: epath.Path, method: str, seeds: Sequence[int], *, writes: bool
    ) -> None:
        """Create an empty log without reading or writing files."""
        self.records: list[list[MetricsRecord]] = [[] for _ in seeds]
        self._path = folder / FILE
        self._method = method
        self._seeds = tuple(seeds)
        self._writes = writes
        self._boards: list[SummaryWriter] = []

    def resume(self, step: int, expected: Sequence[int] | None = None) -> None:
        """Read the records up to `step` and remove later records from the file.

        Args:
          step: Step of the checkpoint from which training resumes; -1 without one.
          expected: Steps that must have a record; None to accept any.

        Raises:
          ValueError: The file has records of other seeds, or lacks records.
        """
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                try:
                    seed, record = _parse(line)
                except (ValueError, KeyError, TypeError):
                    # A damaged line counts as missing.
                    continue
                if record.step > step:
                    continue
                if seed not in self._seeds:
                    raise ValueError(f"{self._path} has records of seed {seed}.")
                self.records[self._seeds.index(seed)].append(record)
        for records in self.records:
            if expected is not None and [r.step for r in records] != [*expected]:
                raise ValueError(
                    f"{self._path} lacks records up to step {step}, the step of the "
                    "checkpoint next to it: put the file back, or remove "
                    f"{self._path.parent} to train again from the start."
                )
        if not self._writes:
            return
        self._write()
        self._boards = [
            SummaryWriter(
                logdir=str(
                    self._path.parent
                    if len(self._seeds) == 1
                    else self._path.parent / f"seed{seed}"
                ),
                purge_step=step + 1,
                write_to_disk=True,
            )
            for seed in self._seeds
        ]

    def add(self, new_records: Sequence[MetricsRecord]) -> None:
        """Append one record of every seed. They are on disk when this returns."""
        for records, record in zip(self.records, new_records, strict=True):
            records.append(record)
        if not self._writes:
            return
        self._write()
        for board, record in zip(self._boards, new_records, strict=True):
            for name, value in _scalars(record).items():
                board.add_scalar(name, value, record.step)
            board.flush()

    def _write(self) -> None:
        """Write all records. Buckets cannot append to a file."""
        with atomic_path(self._path) as path, path.open("w") as file:
            for evaluation in zip(*self.records, strict=True):
                for seed, record in zip(self._seeds, evaluation, strict=True):
                    file.write(_line(self._method, seed, record))

    def close(self) -> None:
        """Close the TensorBoard files."""
        for board in self._boards:
            board.close()


def _line(method: str, seed: int, record: MetricsRecord) -> str:
    line = {
        "method": method,
        "seed": seed,
        "step": record.step,
        "train_loss": record.train_loss,
        "test_accuracy": record.test_accuracy,
        "test_correct": record.test_correct,
        "test_loss": record.test_loss,
        "sparsity": record.sparsity.overall,
        "active_weights": record.sparsity.active,
        "total_weights": record.sparsity.total,
        "layer_sparsity": record.sparsity.leaves,
        "learning_rate": record.learning_rate,
        "seconds": record.seconds,
    }
    return json.dumps(line, allow_nan=False) + "\n"


def _parse(line: str) -> tuple[int, MetricsRecord]:
    values = json.loads(line)
    sparsity = granet_jax.Sparsity(
        overall=values["sparsity"],
        leaves=values["layer_sparsity"],
        active=values["active_weights"],
        total=values["total_weights"],
    )
    record = MetricsRecord(
        step=values["step"],
        train_loss=values["train_loss"],
        test_correct=values["test_correct"],
        test_accuracy=values["test_accuracy"],
        test_loss=values["test_loss"],
        sparsity=sparsity,
        learning_rate=values["learning_rate"],
        seconds=values["seconds"],
    )
    return values["seed"], record


def _scalars(record: MetricsRecord) -> dict[str, float]:
    scalars = {
        "test/accuracy": record.test_accuracy,
        "test/loss": record.test_loss,
        "sparsity/all": record.sparsity.overall,
        "learning_rate": record.learning_rate,
    }
    if record.train_loss is not None:
        scalars["train/loss"] = record.train_loss
    for layer, sparsity in record.sparsity.leaves.items():
        scalars[f"sparsity/{layer}"] = sparsity
    return scalars
