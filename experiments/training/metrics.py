"""What is measured in a training run, kept as lines of JSON and for TensorBoard."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from tensorboardX import SummaryWriter

import granet_jax
from experiments.training.atomic_files import atomic_path, explain_write_errors

FILE = "metrics.jsonl"


class MetricsRecord(NamedTuple):
    """One evaluation.

    Attributes:
      step: optimizer steps done.
      train_loss: mean loss over the steps since the record before, in nats; None at
        step 0.
      test_correct: labels of the test data predicted correctly.
      test_accuracy: their share.
      test_loss: mean cross-entropy over the test data, in nats.
      sparsity: how sparse the masks are (`granet_jax.Sparsity`).
      learning_rate: of the next step.
      seconds: wall-clock time of training so far, compilation included.
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
    """The records of one run's seeds, in a folder: written at once, read on resuming.

    In a process that is not the first of its run it only holds them.
    """

    def __init__(
        self, folder: pathlib.Path, method: str, seeds: Sequence[int], *, writes: bool
    ) -> None:
        """An empty log; nothing is read or written yet."""
        self.records: list[list[MetricsRecord]] = [[] for _ in seeds]
        self._path = folder / FILE
        self._method = method
        self._seeds = tuple(seeds)
        self._writes = writes
        self._boards: list[SummaryWriter] = []

    def resume(self, step: int, expected: Sequence[int] | None = None) -> None:
        """Reads the records up to `step`, and removes those after it from the file.

        Args:
          step: of the checkpoint that is gone on from; -1 without one.
          expected: steps that there must be records of; None for whichever there are.

        Raises:
          ValueError: the file is not one of these seeds, or lacks records.
        """
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                try:
                    seed, record = _parse(line)
                except (ValueError, KeyError, TypeError):
                    # Killed while writing it: the checkpoint is of an earlier step.
                    continue
                if record.step > step:
                    continue
                if seed not in self._seeds:
                    raise ValueError(f"{self._path} has records of seed {seed}.")
                self.records[self._seeds.index(seed)].append(record)
        for records in self.records:
            if expected is not None and [r.step for r in records] != [*expected]:
                raise ValueError(
                    f"{self._path} has not the records up to step {step}, which the "
                    "checkpoint beside it is of: put the file back, or remove "
                    f"{self._path.parent} to train anew."
                )
        if not self._writes:
            return
        with atomic_path(self._path) as path, path.open("w") as file:
            for i in range(len(self.records[0])):
                for seed, records in zip(self._seeds, self.records, strict=True):
                    file.write(_line(self._method, seed, records[i]))
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

    def add(self, new: Sequence[MetricsRecord]) -> None:
        """Appends one record of every seed; when it returns they are on the disk."""
        for records, record in zip(self.records, new, strict=True):
            records.append(record)
        if not self._writes:
            return
        with explain_write_errors(self._path), self._path.open("a") as file:
            for seed, record in zip(self._seeds, new, strict=True):
                file.write(_line(self._method, seed, record))
            file.flush()
            os.fsync(file.fileno())
        for board, record in zip(self._boards, new, strict=True):
            for name, value in _scalars(record).items():
                board.add_scalar(name, value, record.step)
            board.flush()

    def close(self) -> None:
        """Ends TensorBoard's files."""
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
