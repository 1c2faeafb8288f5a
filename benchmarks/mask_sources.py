r"""Seconds that the trainer takes for the masks of each mask source, at 95% sparsity.

    python -m benchmarks.mask_sources                  # resnet-20, a minute
    python -m benchmarks.mask_sources --model resnet-50 --size 224 --classes 1000 \
        --images 32
    python -m benchmarks.mask_sources --quick          # only checks the counts

Sources that differentiate the loss use `--images` random images. SynFlow uses none.
FORCE and SynFlow take the rounds of their papers (60 and 100) or `--rounds`. The times
include compilation, because each call compiles the network again.
"""

import time
from collections.abc import Sequence

import jax
import numpy as np

import granet_jax
from benchmarks.throughput import random_images
from benchmarks.tools import command_line, results
from experiments import models
from experiments.config.methods import MaskConfig, SourceName
from experiments.config.run import Config
from experiments.training import initial_masks
from experiments.training.step import TrainStep
from granet_jax import distributions

SPARSITY = 0.95
# For every source, whether it uses images and whether it works in rounds.
SOURCES: dict[SourceName, tuple[bool, bool]] = {
    "magnitude": (False, False),
    "snip": (True, False),
    "grasp": (True, False),
    "force": (True, True),
    "synflow": (False, True),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Times every source, and checks the number of weights in its masks."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--model", default="resnet-20", choices=models.NAMES)
    parser.add_argument("--size", type=int, default=32, help="pixels, square")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, help="rounds of FORCE and SynFlow")
    options = parser.parse_args(arguments)
    if options.quick:
        options.model, options.size, options.images = "cnn-bn", 12, 20
        options.rounds = 3
    dataset = random_images(
        options.size, options.channels, options.images, options.classes
    )
    seconds: dict[str, float] = {}
    for source, (images, rounds) in SOURCES.items():
        masks = MaskConfig(
            source=source,
            images=options.images if images else None,
            rounds=options.rounds if rounds else None,
        )
        config = Config(
            method="static", sparsity=SPARSITY, model=options.model, masks=masks
        )
        train_step = TrainStep(config, dataset)
        variables = jax.jit(train_step.variables)(np.uint32(0))
        params, statistics = variables["params"], variables.get("batch_stats", {})
        start = time.perf_counter()
        computed = initial_masks.masks(train_step, params, statistics, 0)
        jax.block_until_ready(computed)
        seconds[source] = time.perf_counter() - start
        counts = granet_jax.sparsity(computed)
        expected = distributions.total_count(counts.total, SPARSITY)
        if counts.active != expected:
            raise AssertionError(f"{source}: {counts.active} active, not {expected}")
        if not options.quick:
            print(f"{source}: {seconds[source]:.2f} s", flush=True)
    print(f"{options.model}: all masks have the right number of weights")
    if options.quick:
        return
    rows = [[name, f"{value:.2f}"] for name, value in seconds.items()]
    table = results.table(["source", "seconds"], rows)
    results.publish(options, "mask_sources", table, {"seconds": seconds}, {})


if __name__ == "__main__":
    main()
