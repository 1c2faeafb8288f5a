"""Trains a network sparsely, beside a dense one: `python -m experiments.train`."""

import argparse
import dataclasses
import datetime
import inspect
import logging
import pathlib
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Self

import jax
import rich.console
import tqdm
import tyro
from jax.experimental import multihost_utils

import granet_jax
from experiments.config import recipes
from experiments.config.run import Config, MaskConfig, check_same
from experiments.data import Dataset, Stream, load
from experiments.reports import dry_run
from experiments.reports import training as training_report
from experiments.training import loop, processes
from experiments.training.atomic_files import atomic_path, read_json, write_json
from experiments.training.metrics import MetricsRecord

DEFAULT_FOLDER = pathlib.Path("runs")


def run(config: Config) -> list[training_report.MethodRuns]:
    """Trains as configured, or goes on from where that stopped, and writes the results.

    Returns:
      The records of the method and, with a baseline, of dense training.

    Raises:
      ValueError: a configuration that cannot be run.
      OSError: the folder has other files in it, or cannot be written; data that is not
        there or cannot be read.
      loop.DivergedError: the loss is no longer finite. Checkpoints stay.
      loop.StoppedError: SIGTERM or SIGINT came. Checkpoints stay.
    """
    configs = [config]
    if config.baseline and config.method != "dense":
        configs.append(dataclasses.replace(config, method="dense", masks=MaskConfig()))

    def prepare() -> tuple[Dataset | Stream, loop.TrainSetup, pathlib.Path]:
        dataset = load(config.data.dataset, config.data.data_dir)
        first = loop.create(configs[0], dataset)
        return dataset, first, open_folder(config)

    dataset, each, folder = processes.in_all(prepare)
    title = (
        f"{config.data.dataset}, {config.model}, {config.steps:,} steps of "
        f"{config.data.batch_size}"
    )
    try:
        with StopSignal() as stop:
            runs = [train_all(each, folder, stop.reached)]
            # Made when it is its turn, so that the devices hold the data once.
            for other in configs[1:]:
                del each
                each = loop.create(other, dataset)
                runs.append(train_all(each, folder, stop.reached))
    except loop.StoppedError as stopped:
        stopped.add_note(f"Go on with the same command and --out {folder}")
        raise
    if processes.is_first():
        with atomic_path(folder / "curves.png") as path:
            training_report.plot(title, runs, path)
        write_json(
            folder / "summary.json", training_report.summary(runs, environment())
        )
        console = rich.console.Console()
        console.print(training_report.table(title, runs))
        console.print(f"Results in {folder}", soft_wrap=True, highlight=False)
    return runs


def train_all(
    each: loop.TrainSetup,
    folder: pathlib.Path,
    stopped: Callable[[int], int | None] = lambda step: None,
) -> training_report.MethodRuns:
    """Trains with all seeds of a configuration, in folders of their own in `folder`."""
    config = each.config
    seeds = tuple(range(config.seed, config.seed + config.seeds))
    lanes = each.compiled_step.lanes
    records: list[tuple[MetricsRecord, ...]] = []
    with tqdm.tqdm(
        total=config.steps * config.seeds // lanes,
        unit="step",
        disable=not (config.progress and processes.is_first()),
        dynamic_ncols=True,
    ) as bar:
        for first in range(0, len(seeds), lanes):
            chosen = seeds[first : first + lanes]
            records += train_seeds(each, chosen, folder, bar, stopped)
    return training_report.MethodRuns(config.method, seeds, tuple(records))


def train_seeds(
    each: loop.TrainSetup,
    seeds: Sequence[int],
    folder: pathlib.Path,
    bar: "tqdm.tqdm[Any]",
    stopped: Callable[[int], int | None],
) -> list[tuple[MetricsRecord, ...]]:
    """Trains with as many seeds as the program has lanes, in one folder in `folder`."""
    name = run_name(each.config.method, seeds)
    bar.set_description(name, refresh=False)
    records, _ = loop.fit(
        each,
        seeds,
        folder / name,
        on_step=lambda steps: advance(bar, steps),
        on_records=lambda new: bar.set_postfix(_postfix(new[0]), refresh=False),
        stopped=stopped,
    )
    return [tuple(lane) for lane in records]


def run_name(method: str, seeds: Sequence[int]) -> str:
    """Name of the folder of a run with one seed, or with several at once."""
    if len(seeds) == 1:
        return f"{method}-seed{seeds[0]}"
    return f"{method}-seeds{seeds[0]}-{seeds[-1]}"


class StopSignal:
    """SIGTERM and SIGINT, taken as a wish to stop at the next step.

    A second one has its usual effect. Where several processes train as one, JAX's own
    service takes SIGTERM, and sees to it that all stop at the same step; SIGINT ends
    them at once.
    """

    def __init__(self) -> None:
        """No signal so far."""
        self.received: int | None = None
        self._asked = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reached(self, step: int) -> int | None:
        """The signal, if it is one to stop before this step; alike in all processes."""
        if jax.process_count() > 1:
            # JAX has all stop where they ask with one more than the highest number that
            # any has asked with. Steps will not do: they start anew with each seed, and
            # a scan goes past some.
            self._asked += 1
            if multihost_utils.reached_preemption_sync_point(self._asked):
                self.received = signal.SIGTERM
        return self.received

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._before[number])


def open_folder(config: Config) -> pathlib.Path:
    """The folder for the results: a new one, or that of a run to go on with.

    Raises:
      FileExistsError: it has files of something else in it.
      ValueError: its run was configured otherwise.
    """
    if config.out is None:
        if jax.process_count() > 1:
            raise ValueError("several processes need one folder: give --out.")
        return _new_folder(config)
    if processes.is_first():
        claim(config.out, config.to_dict())
    return config.out


def claim(folder: pathlib.Path, values: dict[str, Any]) -> None:
    """Makes the folder of a run, or looks whether it is that of this one.

    Args:
      folder: for the results.
      values: all options, as JSON holds them, for its config.json.

    Raises:
      FileExistsError: it has files of something else in it.
      ValueError: its run was configured otherwise.
    """
    path = folder / "config.json"
    if path.exists():
        check_same(
            read_json(path), values, holder=f"{folder} holds a run", this="this one"
        )
        return
    if folder.exists() and (not folder.is_dir() or _others(folder)):
        raise FileExistsError(
            f"out: {folder} exists already and is neither empty nor of a run. "
            "Results are never overwritten: choose another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, values)


def _others(folder: pathlib.Path) -> bool:
    """Whether it has files beside a config.json that a killed run did not finish."""
    return any(path.name != "config.json.partial" for path in folder.iterdir())


def _new_folder(config: Config) -> pathlib.Path:
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    DEFAULT_FOLDER.mkdir(exist_ok=True)
    for suffix in ("", *(f"-{i}" for i in range(2, 100))):
        folder = DEFAULT_FOLDER / f"{now}-{config.method}{suffix}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        write_json(folder / "config.json", config.to_dict())
        return folder
    raise FileExistsError(f"{DEFAULT_FOLDER} has 99 runs of {now} already.")


def environment() -> dict[str, Any]:
    """What the numbers depend on beside the configuration."""
    return {
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "granet_jax": granet_jax.__version__,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


def advance(bar: "tqdm.tqdm[Any]", steps: int) -> None:
    bar.update(steps)


def _postfix(record: MetricsRecord) -> dict[str, str]:
    loss = {} if record.train_loss is None else {"loss": f"{record.train_loss:.3f}"}
    return loss | {
        "accuracy": f"{record.test_accuracy:.2%}",
        "sparsity": f"{record.sparsity.overall:.2%}",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def command() -> None:
        chosen, others = _chooser().parse_known_args(arguments)
        if chosen.list_recipes is not None:
            print(recipes.listing(chosen.list_recipes))
            return
        recipe = None if chosen.recipe is None else recipes.find(chosen.recipe)
        config = tyro.cli(
            Config,
            args=others,
            default=Config() if recipe is None else recipe.config,
            prog="python -m experiments.train",
            description=f"{inspect.getdoc(Config)}\n\n{_chooser().format_help()}",
        )
        if chosen.dry_run:
            dry_run.run(config, recipe)
            return
        processes.initialize(config.distributed)
        run(config)

    return exit_status(command)


def _silence_libraries() -> None:
    """Keeps off standard error the tracebacks of errors that are raised here anyway."""
    # Orbax logs them; of several writes that fail it leaves all but one to asyncio.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    # Where one array of a checkpoint cannot be written or read, orbax stops at once;
    # what becomes of the others is printed through this hook.
    echoes = ("Event loop is closed", "Encountered error while reading array index")
    before = sys.unraisablehook

    def print_others(unraisable: Any) -> None:
        if not str(unraisable.exc_value).startswith(echoes):
            before(unraisable)

    sys.unraisablehook = print_others
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _chooser() -> argparse.ArgumentParser:
    """The options that say where the others start from, or that nothing is trained."""
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
        help="start from the values of a row of the papers' tables, or of its small "
        "twin NAME-mini, in place of the defaults; other options change it",
    )
    group.add_argument(
        "--list-recipes",
        nargs="?",
        const="",
        metavar="TEXT",
        help="print the recipes (that have TEXT in their name)",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print parameters, FLOPs, memory and steps, and draw the schedules, with "
        "no data and no training",
    )
    return parser


def exit_status(command: Callable[[], object]) -> int:
    """Runs a command, and says on standard error what went wrong.

    Returns:
      0: trained; 1: diverged; 2: bad input; 130 and 143: told to stop, by SIGINT and
      SIGTERM (or a pod's pre-emption), with a checkpoint to go on from.
    """
    _silence_libraries()
    try:
        command()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except loop.DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except loop.StoppedError as stopped:
        print("\n".join([str(stopped), *stopped.__notes__]), file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
