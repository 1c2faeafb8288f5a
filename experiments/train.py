"""Trains a network sparsely, beside a dense one: `python -m experiments.train`."""

import dataclasses
import datetime
import pathlib
import sys
from collections.abc import Sequence
from typing import IO, Any

import jax
import rich.console
import tqdm
import tyro

import granet_jax
from experiments import report
from experiments.config import Config, MaskConfig
from experiments.data import load
from experiments.trainer import DivergedError, Record, Trainer, fit

DEFAULT_FOLDER = pathlib.Path("runs")


def run(config: Config) -> list[report.Runs]:
    """Trains as configured, and writes the results.

    Every file but config.json gets its name when it is complete, summary.json last.
    Until the end of training, metrics.jsonl.partial holds what was measured so far.

    Returns:
      The records of the method and, with a baseline, of dense training.

    Raises:
      ValueError: a configuration that cannot be run.
      OSError: the folder has files in it, or cannot be written.
      DivergedError: the loss is no longer finite. metrics.jsonl.partial stays.
    """
    configs = [config]
    if config.baseline and config.method != "dense":
        configs.append(dataclasses.replace(config, method="dense", masks=MaskConfig()))
    dataset = load(config.data.dataset)
    trainers = [Trainer(each, dataset, config.seed) for each in configs]
    title = (
        f"{config.data.dataset}, {config.model}, {config.steps:,} steps of "
        f"{config.data.batch_size} images"
    )

    folder = _new_folder(config)
    (folder / "config.json").write_text(config.to_json())
    with report.complete(folder / "metrics.jsonl") as path, path.open("x") as file:
        runs = _train_all(trainers, file)
    with report.complete(folder / "curves.png") as path:
        report.plot(title, runs, path)
    with report.complete(folder / "summary.json") as path:
        path.write_text(report.summary(runs, _environment()))
    console = rich.console.Console()
    console.print(report.table(title, runs))
    console.print(f"Results in {folder}", soft_wrap=True, highlight=False)
    return runs


def _train_all(trainers: Sequence[Trainer], file: IO[str]) -> list[report.Runs]:
    first = trainers[0].config
    seeds = tuple(range(first.seed, first.seed + first.seeds))
    with tqdm.tqdm(
        total=len(trainers) * len(seeds) * first.steps,
        unit="step",
        disable=not first.progress,
        dynamic_ncols=True,
    ) as bar:
        runs = []
        for trainer in trainers:
            records = []
            for seed in seeds:
                trainer = trainer.for_seed(seed)
                records.append(_train_one(trainer, seed, file, bar))
            runs.append(report.Runs(trainer.config.method, seeds, tuple(records)))
    return runs


def _train_one(
    trainer: Trainer, seed: int, file: IO[str], bar: tqdm.tqdm
) -> tuple[Record, ...]:
    method = trainer.config.method
    records: list[Record] = []

    def add(record: Record) -> None:
        bar.set_description(f"{method}, seed {seed}", refresh=False)
        bar.set_postfix(_postfix(record), refresh=False)
        bar.update(record.step - (records[-1].step if records else 0))
        records.append(record)
        report.write_record(file, method, seed, record)

    fit(trainer, seed, add)
    return tuple(records)


def _postfix(record: Record) -> dict[str, str]:
    loss = {} if record.train_loss is None else {"loss": f"{record.train_loss:.3f}"}
    return loss | {
        "accuracy": f"{record.test_accuracy:.2%}",
        "sparsity": f"{record.sparsity.overall:.2%}",
    }


def _new_folder(config: Config) -> pathlib.Path:
    """Makes the folder for the results; never one with files in it."""
    if config.out is not None:
        if config.out.exists() and (
            not config.out.is_dir() or any(config.out.iterdir())
        ):
            raise FileExistsError(
                f"out: {config.out} exists already and is not an empty folder. Results "
                "are never overwritten: choose another one."
            )
        config.out.mkdir(parents=True, exist_ok=True)
        return config.out
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    DEFAULT_FOLDER.mkdir(exist_ok=True)
    for suffix in ("", *(f"-{i}" for i in range(2, 100))):
        folder = DEFAULT_FOLDER / f"{now}-{config.method}{suffix}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{DEFAULT_FOLDER} has 99 runs of {now} already.")


def _environment() -> dict[str, Any]:
    return {
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "granet_jax": granet_jax.__version__,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    try:
        run(tyro.cli(Config, args=arguments, prog="python -m experiments.train"))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
