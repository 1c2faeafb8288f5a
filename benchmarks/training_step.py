r"""Seconds of the trainer's step for ResNet-20, sparse and dense.

    python -m benchmarks.training_step            # 128 images of 32 x 32, some minutes
    python -m benchmarks.training_step --model resnet-50 --size 224 --classes 1000 \
        --precision bfloat16                      # on a GPU
    python -m benchmarks.training_step --quick    # small network: only checks the masks

The contenders are whole training steps, forward and backward pass included: "dense";
"between", which trains by GraNet from half of the weights and leaves the masks as they
are; and "updating", which also changes the masks in every step. From these follows the
mean step of a training that changes the masks every `INTERVAL` steps.

The benchmark asserts that masks change in updates only, and that they have the right
number of weights. It prints times and asserts nothing about them.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.throughput import random_images
from benchmarks.tools import command_line, results, timing
from experiments import models
from experiments.config.run import Config, DataConfig, MaskConfig
from experiments.data import Dataset
from experiments.training import loop
from granet_jax import distributions, masking

INTERVAL = 100
STEPS = 10_000
# An interval so long that no timed step changes the masks.
NEVER = 5000
SPARSITY = 0.5


class Run:
    """The training state of a configuration. The first step compiles."""

    def __init__(self, config: Config, dataset: Dataset) -> None:
        self._setup = loop.create(config, dataset, jax.devices()[:1])
        self._state: Any = self._setup.compiled_step.create([0])

    def __call__(self) -> jax.Array:
        """Takes one training step; returns its loss."""
        self._state, loss = self._setup.compiled_step.steps(
            self._state, self._setup.train_data, 1
        )
        return loss

    def masks(self) -> list[np.ndarray]:
        """Copies the masks of all leaves that carry one."""
        masks = self._setup.compiled_step.train_step.masks(self._state)
        return [np.array(m) for m in jax.tree.leaves(masking.unpack_masks(masks))]

    def broken(self) -> int:
        """Counts pruned weights that are not zero."""
        return int(self._setup.compiled_step.inspect(self._state).broken.sum())


def check(between: Run, updating: Run) -> None:
    """Checks the masks after three steps."""
    for run, changes in ((between, False), (updating, True)):
        before = run.masks()
        losses = [float(run()[0, 0]) for _ in range(3)]
        assert np.isfinite(losses).all(), losses
        after = run.masks()
        differ = any((a != b).any() for a, b in zip(before, after, strict=True))
        assert differ == changes, f"masks change: {differ}, not {changes}"
        assert run.broken() == 0, f"{run.broken()} pruned weights are not zero"
    masks = between.masks()
    active = sum(int(m.sum()) for m in masks)
    wanted = distributions.total_count(sum(m.size for m in masks), SPARSITY)
    assert active == wanted, f"{active} active weights, not {wanted}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks the masks, then times the steps."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--model", default="resnet-20", choices=models.NAMES)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--size", type=int, default=32, help="pixels, square")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=31, help="steps of each")
    options = parser.parse_args(arguments)
    if options.quick:
        options.model, options.batch_size = "lenet-5", 16

    dataset = random_images(
        options.size, options.channels, 8 * options.batch_size, options.classes
    )

    def run(method: Any, interval: int | None) -> Run:
        config = Config(
            method=method,
            model=options.model,
            precision=options.precision,
            steps=STEPS,
            data=DataConfig(batch_size=options.batch_size),
            masks=MaskConfig(interval=interval),
            seeds=1,
        )
        return Run(config, dataset)

    runs: dict[str, Callable[[], Any]] = {
        "between": (between := run("granet-st", NEVER)),
        "updating": (updating := run("granet-st", 1)),
    }
    check(between, updating)
    print(f"{options.model}: masks change in updates only, and have the right size")
    if options.quick:
        return
    runs = {"dense": run("dense", None), **runs}
    report(options, timing.interleaved(runs, rounds=options.rounds))


def report(options: argparse.Namespace, seconds: timing.Rounds) -> None:
    """Publishes the ratios, and that of a training with updates now and then."""
    ratios = {name: timing.ratio_of_medians(seconds, name, "dense") for name in seconds}
    training = ((INTERVAL - 1) * ratios["between"] + ratios["updating"]) / INTERVAL
    rows = [
        [name, f"{statistics.median(times):.4f}", f"{ratios[name]:.3f}"]
        for name, times in seconds.items()
    ]
    rows.append([f"an update every {INTERVAL} steps", "-", f"{training:.3f}"])
    results.publish(
        options,
        "training_step",
        results.table(["step", "median s", "of dense"], rows),
        {"seconds": seconds, "ratios": ratios},
        {"between": ratios["between"], "training": training},
    )


if __name__ == "__main__":
    main()
