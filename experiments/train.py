"""Train a sparse network, and a dense one to compare: `python -m experiments.train`."""

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence

import rich.console
import tqdm
import tyro
from etils import epath

from experiments.config import recipes
from experiments.config.run import Config
from experiments.data import Dataset, Stream, load
from experiments.reports import dry_run
from experiments.reports import training as training_report
from experiments.training import loop, processes
from experiments.training.atomic_files import atomic_path, write_json
from experiments.training.exit_status import exit_status
from experiments.training.run_folders import open_folder
from experiments.training.stop_signal import StopSignal
from experiments.training.with_progress import train_seeds


def run(config: Config) -> list[training_report.MethodRuns]:
    """Train as configured, or continue a previous run, and write the results.

    Returns:
      The metrics of the method and, if there is a baseline, of dense training.

    Raises:
      ValueError: The configuration is invalid.
      OSError: The folder has other files or cannot be written, or the data are missing
        or unreadable.
      loop.DivergedError: The loss is no longer finite. Checkpoints are kept.
      loop.StoppedError: SIGTERM or SIGINT arrived. Checkpoints are kept.
    """
    configs = [config]
    if config.baseline and config.method != "dense" and config.init_from is None:
        configs.append(config.dense())

    def prepare() -> tuple[Dataset | Stream, loop.TrainSetup, epath.Path]:
        dataset = load(config.data.dataset, config.data.data_dir)
        return dataset, loop.create(configs[0], dataset), open_folder(config)

    dataset, setup, folder = processes.in_all(prepare)
    try:
        with StopSignal() as stop:
            runs = [train_all(setup, folder, stop.reached)]
            for other in configs[1:]:
                # Free the first setup: each one holds the data on the devices.
                del setup
                setup = loop.create(other, dataset)
                runs.append(train_all(setup, folder, stop.reached))
    except loop.StoppedError as error:
        error.add_note(f"Go on with the same command and --out {folder}")
        raise
    if processes.is_first():
        _write_results(config, runs, folder)
    return runs


def train_all(
    setup: loop.TrainSetup,
    folder: epath.Path,
    stopped: Callable[[int], int | None] = lambda step: None,
) -> training_report.MethodRuns:
    """Train all seeds of a configuration, each in its own folder in `folder`."""
    config = setup.config
    seeds = tuple(range(config.seed, config.seed + config.seeds))
    lanes = setup.compiled_step.lanes
    records = []
    with tqdm.tqdm(
        total=config.steps * config.seeds // lanes,
        unit="step",
        disable=not (config.progress and processes.is_first()),
        dynamic_ncols=True,
    ) as bar:
        for start in range(0, len(seeds), lanes):
            group = seeds[start : start + lanes]
            records += train_seeds(setup, group, folder, bar, stopped)
    return training_report.MethodRuns(config.method, seeds, tuple(records))


def _write_results(
    config: Config, runs: Sequence[training_report.MethodRuns], folder: epath.Path
) -> None:
    title = (
        f"{config.data.dataset}, {config.model}, {config.steps:,} steps of "
        f"{config.data.batch_size}"
    )
    with atomic_path(folder / "curves.png") as path:
        training_report.plot(title, runs, path)
    environment = training_report.environment()
    write_json(folder / "summary.json", training_report.summary(runs, environment))
    console = rich.console.Console()
    console.print(training_report.table(title, runs))
    console.print(f"Results in {folder}", soft_wrap=True, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    return exit_status(lambda: _command(arguments))


def _command(arguments: Sequence[str] | None) -> None:
    parser = _recipe_parser()
    first, others = parser.parse_known_args(arguments)
    if first.list_recipes is not None:
        print(recipes.listing(first.list_recipes))
        return
    recipe = None if first.recipe is None else recipes.find(first.recipe)
    config = tyro.cli(
        Config,
        args=others,
        default=Config() if recipe is None else recipe.config,
        prog="python -m experiments.train",
        description=f"{inspect.getdoc(Config)}\n\n{parser.format_help()}",
    )
    if first.dry_run:
        dry_run.run(config, recipe, first.topology)
        return
    if first.topology is not None:
        raise ValueError("--topology compiles without training: give --dry-run too.")
    processes.initialize(config.distributed)
    run(config)


def _recipe_parser() -> argparse.ArgumentParser:
    """Parse the options that choose the defaults of the others, or replace training."""
    parser = argparse.ArgumentParser(
        "python -m experiments.train",
        usage=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=78),
    )
    group = parser.add_argument_group("before all others")
    group.add_argument(
        "--recipe",
        metavar="NAME",
        help="start from a row of the papers' tables, or from its small twin "
        "NAME-mini, instead of the defaults; the other options change it",
    )
    group.add_argument(
        "--list-recipes",
        nargs="?",
        const="",
        metavar="TEXT",
        help="print the recipes (with TEXT in their name)",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print parameters, FLOPs, memory and steps, and plot the schedules, "
        "without data and without training",
    )
    group.add_argument(
        "--topology",
        metavar="NAME",
        help="with --dry-run: also compile the step for these TPUs or GPUs, such as "
        "v5e:4x4 or h100:8, and print memory and communication (needs their compiler, "
        "but not the devices)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
