"""Lottery tickets by iterative magnitude pruning: `python -m experiments.lottery`.

For every seed the dense network is trained. Then every round prunes the smallest
weights of all layers, resets the others to their initial values (or to their values
after `--rewind-steps` steps), and trains again. Every round writes a ticket: its masks
and the weights at the start of its training. To train a ticket, use
`python -m experiments.train --masks.source tickets`.

References:
  Frankle & Carbin, The Lottery Ticket Hypothesis, ICLR 2019. Frankle et al., Linear
  Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020 (rewinding to a step).
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tqdm
import tyro
from etils import epath

import granet_jax
from experiments import models
from experiments.buckets import check_folder
from experiments.config.run import Config, DistributedConfig, MaskConfig, ToSTConfig
from experiments.data import load
from experiments.training import initial_state, loop, ticket_files
from experiments.training.devices import CompiledStep
from experiments.training.exit_status import exit_status
from experiments.training.run_folders import claim
from experiments.training.stop_signal import StopSignal
from granet_jax import mask_sources

PyTree = Any


@dataclasses.dataclass(frozen=True)
class LotteryConfig:
    """Finds lottery tickets by iterative magnitude pruning.

    The same command continues where it stopped.
    """

    sparsities: tyro.conf.Positional[tuple[float, ...]]
    """Sparsity after every round of pruning, in (0, 1), increasing."""

    out: epath.Path
    """Folder for the tickets and the training of every round."""

    rewind_steps: int = 0
    """Step of the dense training to which weights are reset; 0 for the
    initial weights."""

    train: Config = dataclasses.field(
        default_factory=lambda: Config(method="static", sparsity=0.0, baseline=False)
    )
    """Options of the training in each round. Its method is static, and
    each round sets the sparsity."""

    def __post_init__(self) -> None:
        """Raise ValueError for an invalid value."""
        check_folder("out", self.out)
        if not self.sparsities:
            raise ValueError("sparsities must not be empty.")
        for before, after in itertools.pairwise((0.0, *self.sparsities, 1.0)):
            if not before < after:
                raise ValueError(
                    "sparsities must lie in (0, 1) and rise, got "
                    f"{', '.join(map(str, self.sparsities))}."
                )
        if not 0 <= self.rewind_steps < self.train.steps:
            raise ValueError(
                f"rewind_steps must lie in [0, train.steps), got {self.rewind_steps} "
                f"of {self.train.steps}."
            )
        fixed = {
            "method": "static",
            "sparsity": 0.0,
            "masks": MaskConfig(),
            "tost": ToSTConfig(),
            "vmap_seeds": False,
            "baseline": False,
            "out": None,
            "init_from": None,
            "distributed": DistributedConfig(),
        }
        for name, value in fixed.items():
            if getattr(self.train, name) != value:
                raise ValueError(
                    f"train.{name} is not for lottery tickets: leave it out. They are "
                    "found in one process. To train them with other options, use "
                    "python -m experiments.train --masks.source tickets."
                )

    def to_dict(self) -> dict[str, Any]:
        """Return all options as JSON values."""
        own = {"sparsities": self.sparsities, "rewind_steps": self.rewind_steps}
        return json.loads(json.dumps(own)) | self.train.to_dict()


def run(config: LotteryConfig) -> None:
    """Find the tickets of all seeds, or continue where an earlier run stopped.

    It raises the errors of `experiments.train.run`.
    """
    settings = config.train
    setup = loop.create(settings, load(settings.data.dataset, settings.data.data_dir))
    claim(config.out, config.to_dict())
    seeds = range(settings.seed, settings.seed + settings.seeds)
    steps = settings.steps - config.rewind_steps
    try:
        with (
            StopSignal() as stop,
            tqdm.tqdm(
                total=len(seeds) * (1 + len(config.sparsities)) * steps,
                unit="step",
                disable=not settings.progress,
                dynamic_ncols=True,
            ) as bar,
        ):
            for seed in seeds:
                rounds = zip(
                    (0.0, *config.sparsities),
                    _tickets(config, setup, seed, stop.reached, bar),
                    strict=True,
                )
                for sparsity, (ticket, accuracy) in rounds:
                    bar.write(
                        f"seed {seed}, {sparsity:.10g} sparse: {100 * accuracy:.2f} %",
                        file=sys.stdout,
                    )
                    if sparsity:
                        start, masks = jax.device_get((ticket.start, ticket.masks))
                        ticket_files.write(config.out, seed, sparsity, start, masks)
    except loop.StoppedError as stopped:
        stopped.add_note("Go on with the same command.")
        raise


def _tickets(
    config: LotteryConfig,
    setup: loop.TrainSetup,
    seed: int,
    stopped: Callable[[int], int | None],
    bar: "tqdm.tqdm[Any]",
) -> Iterator[tuple[mask_sources.Ticket, float]]:
    """Yield the tickets of a seed with the test accuracies of their training."""
    compiled_step = setup.compiled_step
    origin = jax.device_get(compiled_step.snapshot(_origin(config, setup, seed)))
    accuracies: list[float] = []

    def train_round(params: PyTree, masks: PyTree, key: jax.Array) -> PyTree:
        del key  # All random numbers follow from the seed and the step.

        def begin(compiled_step: CompiledStep, _: Sequence[int]) -> PyTree:
            shardings = jax.tree.map(lambda x: x.sharding, compiled_step.abstract())
            state = compiled_step.restore(jax.device_put(origin, shardings))
            host = jax.device_get((params, masks))
            return initial_state.with_weights(compiled_step, state, *host)

        def advance(steps: int) -> None:
            bar.update(steps)

        number = len(accuracies)
        bar.set_description(f"seed {seed}, round {number}", refresh=False)
        (records,), state = loop.fit(
            _with_sparsity(setup, (0.0, *config.sparsities)[number]),
            [seed],
            config.out / f"seed{seed}" / f"round{number}",
            on_step=advance,
            stopped=stopped,
            first=config.rewind_steps,
            begin=begin,
        )
        accuracies.append(records[-1].test_accuracy)
        return jax.device_get(compiled_step.snapshot(state)).params

    densities = [1 - sparsity for sparsity in (0.0, *config.sparsities)]
    tickets = mask_sources.lottery_tickets(
        train_round,
        jax.tree.map(jnp.asarray, origin.params),
        rounds=len(config.sparsities),
        fraction=[1 - b / a for a, b in itertools.pairwise(densities)],
        key=jax.random.key(seed),
        where=models.maskable,
    )
    for ticket in tickets:
        yield ticket, accuracies[-1]


def _with_sparsity(setup: loop.TrainSetup, sparsity: float) -> loop.TrainSetup:
    """Change the expected sparsity. The compiled programs do not depend on it."""
    compiled_step = setup.compiled_step
    config = dataclasses.replace(setup.config, sparsity=sparsity)
    train_step = dataclasses.replace(compiled_step.train_step, config=config)
    compiled_step = dataclasses.replace(compiled_step, train_step=train_step)
    return setup._replace(compiled_step=compiled_step)


def _origin(config: LotteryConfig, setup: loop.TrainSetup, seed: int) -> PyTree:
    """Return the dense state to which weights are reset, with zero moments."""
    compiled_step = setup.compiled_step
    state = compiled_step.create([seed])
    batches = loop.train_batches(setup, seed, 0)
    for _ in range(config.rewind_steps):
        state, loss = compiled_step.steps(state, next(batches), 1)
        jax.block_until_ready(loss)
    state = compiled_step.snapshot(state)
    sparse_state = granet_jax.get_state(state.opt_state)
    inner = jax.tree.map(
        lambda x: jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        sparse_state.inner_state,
    )
    return compiled_step.restore(
        state._replace(opt_state=sparse_state._replace(inner_state=inner))
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    return exit_status(
        lambda: run(
            tyro.cli(
                LotteryConfig, args=arguments, prog="python -m experiments.lottery"
            )
        )
    )


if __name__ == "__main__":
    sys.exit(main())
