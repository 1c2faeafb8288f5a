r"""Lottery tickets by iterative magnitude pruning, with the trainer.

    python -m experiments.lottery --fractions 0.5 0.5 0.6 0.5 0.6 --out runs/tickets \
        --train.model cnn-bn --train.data.dataset fashion_mnist --train.steps 1872
    python -m experiments.train --method static --sparsity 0.95 --masks.source tickets \
        --masks.tickets runs/tickets --model cnn-bn ...

For every seed the dense network is trained; then, round by round, a fraction of the
weights left is pruned, the smallest of all layers first, the others go back to what
they were after `--rewind-steps` steps, and the network is trained again from there.
After each round a file has the masks and the weights that the ticket is trained from.
The same command goes on where it stopped, bit for bit.

References:
  Frankle & Carbin, The Lottery Ticket Hypothesis, ICLR 2019. Frankle et al., Linear
  Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020 (rewinding to a step).
"""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tqdm
import tyro

import granet_jax
from experiments import initial, models, tickets, train, trainer
from experiments.config import Config
from experiments.data import load
from experiments.parallel import Program
from experiments.step import TrainState
from granet_jax import mask_sources

PyTree = Any


@dataclasses.dataclass(frozen=True)
class LotteryConfig:
    """Finds lottery tickets by iterative magnitude pruning."""

    out: pathlib.Path
    """Folder for the tickets and the training runs."""

    fractions: tuple[float, ...] = (0.2,) * 10
    """Share of the remaining weights that each round prunes, in (0, 1)."""

    rewind_steps: int = 0
    """Step of the dense training that weights go back to; 0 for the
    initial ones."""

    train: Config = dataclasses.field(
        default_factory=lambda: Config(method="static", baseline=False)
    )
    """Of each training run. Its method is static, and its sparsity is
    that of the round."""

    def __post_init__(self) -> None:
        """Raises ValueError for a value that cannot be used."""
        for fraction in self.fractions:
            if not 0 < fraction < 1:
                raise ValueError(
                    f"fractions must be numbers in (0, 1), got {fraction}."
                )
        if not 0 <= self.rewind_steps < self.train.steps:
            raise ValueError(
                f"rewind_steps must lie in [0, train.steps), got {self.rewind_steps} "
                f"of {self.train.steps}."
            )
        given = self.train
        if given.method != "static" or given.vmap_seeds or given.out is not None:
            raise ValueError(
                "train.method must be static, without train.vmap_seeds and train.out: "
                "the masks are those of the rounds, and the folder is --out."
            )


def run(config: LotteryConfig) -> None:
    """Finds the tickets of all seeds, or those that are missing.

    Raises:
      Those of `experiments.trainer.create` and `fit`.
    """
    each = trainer.create(
        dataclasses.replace(config.train, sparsity=0.0),
        load(config.train.data.dataset, config.train.data.data_dir),
    )
    number = len(config.fractions) + 1
    seeds = range(config.train.seed, config.train.seed + config.train.seeds)
    with (
        train.StopSignal() as stop,
        tqdm.tqdm(
            total=len(seeds) * number * (config.train.steps - config.rewind_steps),
            unit="step",
            disable=not config.train.progress,
            dynamic_ncols=True,
        ) as bar,
    ):
        for seed in seeds:
            for ticket, accuracy in _tickets(config, each, seed, stop, bar):
                found = granet_jax.sparsity(ticket.masks)
                weights, masks = jax.device_get((ticket.start, ticket.masks))
                tickets.write(config.out, seed, weights, masks)
                bar.write(
                    f"seed {seed}, {found.overall:.2%} sparse: {100 * accuracy:.2f} %",
                    file=sys.stdout,
                )


def _tickets(
    config: LotteryConfig,
    each: trainer.Trainer,
    seed: int,
    stop: train.StopSignal,
    bar: tqdm.tqdm,
) -> Iterator[tuple[mask_sources.Ticket, float]]:
    """The tickets of a seed, each with the test accuracy of its training."""
    program = each.program
    origin = jax.device_get(program.snapshot(_origin(config, each, seed)))
    accuracies: list[float] = []

    def trained(params: PyTree, masks: PyTree, key: jax.Array) -> PyTree:
        del key  # All random numbers follow from the seed and the step.

        def begin(program: Program, seeds: Sequence[int]) -> PyTree:
            shardings = jax.tree.map(lambda x: x.sharding, program.abstract())
            state = program.restore(jax.device_put(origin, shardings))
            return initial.with_weights(
                program, state, *jax.device_get((params, masks))
            )

        pruned = granet_jax.sparsity(masks).overall
        functions = dataclasses.replace(
            program.functions,
            config=dataclasses.replace(program.functions.config, sparsity=pruned),
        )
        own = each._replace(program=dataclasses.replace(program, functions=functions))
        folder = config.out / f"seed{seed}" / f"round{len(accuracies)}"
        (records,), state = trainer.fit(
            own,
            [seed],
            folder,
            on_step=lambda steps: train.advance(bar, steps),
            stopped=stop.reached,
            begin=begin,
        )
        accuracies.append(records[-1].test_accuracy)
        return program.snapshot(state).params

    rounds = mask_sources.lottery_tickets(
        trained,
        jax.tree.map(jnp.asarray, origin.params),
        rounds=len(config.fractions),
        fraction=config.fractions,
        key=jax.random.key(seed),
        where=models.maskable,
    )
    for ticket in rounds:
        yield ticket, accuracies[-1]


def _origin(config: LotteryConfig, each: trainer.Trainer, seed: int) -> PyTree:
    """The dense state that weights go back to, with moments of zero."""
    program = each.program
    state = program.create([seed])
    batches = trainer.batches(each, seed, 0)
    for _ in range(config.rewind_steps):
        state, loss = program.steps(state, next(batches), 1)
        jax.block_until_ready(loss)

    def without_moments(state: TrainState) -> TrainState:
        found = granet_jax.get_state(state.opt_state)
        inner = jax.tree.map(
            lambda x: jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            found.inner_state,
        )
        return state._replace(opt_state=found._replace(inner_state=inner))

    return without_moments(program.snapshot(state))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, as `experiments.train.main` does."""
    return train.exit_status(
        lambda: run(
            tyro.cli(
                LotteryConfig, args=arguments, prog="python -m experiments.lottery"
            )
        )
    )


if __name__ == "__main__":
    sys.exit(main())
