"""Train one run and show its progress."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from etils import epath

from experiments.training import loop
from experiments.training.metrics import MetricsRecord
from experiments.training.run_folders import run_name


class Bar(Protocol):
    """The part of `tqdm.tqdm` that a run uses."""

    def update(self, n: int, /) -> Any:
        """Count more steps."""

    def set_description(self, desc: str, /, refresh: bool) -> Any:
        """Show the name of the run."""

    def set_postfix(self, ordered_dict: dict[str, str], /, refresh: bool) -> Any:
        """Show the figures of the last evaluation."""


def train_seeds(
    setup: loop.TrainSetup,
    seeds: Sequence[int],
    folder: epath.Path,
    bar: Bar,
    stopped: Callable[[int], int | None],
) -> list[tuple[MetricsRecord, ...]]:
    """Train one seed per lane of the compiled step, in one folder in `folder`."""
    name = run_name(setup.config.method, seeds)
    bar.set_description(name, refresh=False)

    def show(records: Sequence[MetricsRecord]) -> None:
        bar.set_postfix(_figures(records[0]), refresh=False)

    def advance(steps: int) -> None:
        bar.update(steps)

    records, _ = loop.fit(
        setup,
        seeds,
        folder / name,
        on_step=advance,
        on_records=show,
        stopped=stopped,
    )
    return [tuple(lane) for lane in records]


def _figures(record: MetricsRecord) -> dict[str, str]:
    loss = {} if record.train_loss is None else {"loss": f"{record.train_loss:.3f}"}
    return loss | {
        "accuracy": f"{record.test_accuracy:.2%}",
        "sparsity": f"{record.sparsity.overall:.2%}",
    }
