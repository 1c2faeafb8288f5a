"""Trains a network sparsely, beside a dense one: `python -m experiments.train`."""

import dataclasses
import datetime
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import rich.console
import tqdm
import tyro

import granet_jax
from experiments import report
from experiments.config import Config
from experiments.data import Dataset, load
from experiments.trainer import DivergedError, Record, Trainer, fit

DEFAULT_FOLDER = pathlib.Path("runs")


def run(config: Config) -> list[report.Runs]:
    """Trains as configured, and writes the results.

    Returns:
      The records of the method and, with a baseline, of dense training.

    Raises:
      ValueError: a configuration that cannot be run.
      FileExistsError: the folder has files in it.
      DivergedError: the loss is no longer finite. What was measured before it stays.
    """
    dataset = load(config.data.dataset)
    folder = _new_folder(config)
    (folder / "config.json").write_text(config.to_json())
    configs = [config]
    if config.baseline and config.method != "dense":
        dense = dataclasses.replace(config, method="dense", masks=type(config.masks)())
        configs.append(dense)
    runs = _train_all(configs, dataset, folder)

    title = (
        f"{config.data.dataset}, {config.model}, {config.steps:,} steps of "
        f"{config.data.batch_size} images"
    )
    (folder / "summary.json").write_text(report.summary(runs, _environment()))
    report.plot(title, runs, folder / "curves.png")
    console = rich.console.Console()
    console.print(report.table(title, runs))
    console.print(f"Results in {folder}", soft_wrap=True, highlight=False)
    return runs


def _train_all(
    configs: Sequence[Config], dataset: Dataset, folder: pathlib.Path
) -> list[report.Runs]:
    first = configs[0]
    seeds = tuple(range(first.seed, first.seed + first.seeds))
    runs = []
    with (
        (folder / "metrics.jsonl").open("x") as file,
        tqdm.tqdm(
            total=len(configs) * len(seeds) * first.steps,
            unit="step",
            disable=not first.progress,
            dynamic_ncols=True,
        ) as bar,
    ):
        for config in configs:
            all_records = []
            trainer = Trainer(config, dataset, first.seed)
            for seed in seeds:
                records: list[Record] = []

                def add(
                    record: Record,
                    records: list[Record] = records,
                    config: Config = config,
                    seed: int = seed,
                ) -> None:
                    bar.set_description(f"{config.method}, seed {seed}", refresh=False)
                    bar.set_postfix(_postfix(record), refresh=False)
                    bar.update(record.step - (records[-1].step if records else 0))
                    records.append(record)
                    report.write_record(file, config.method, seed, record)

                trainer = trainer.for_seed(seed)
                fit(trainer, seed, add)
                all_records.append(tuple(records))
            runs.append(report.Runs(config.method, seeds, tuple(all_records)))
    return runs


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
    except (ValueError, TypeError, FileExistsError, DivergedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, DivergedError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
