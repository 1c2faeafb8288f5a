r"""Seconds to compute the masks of each source at 95% sparsity, as the trainer does.

    python -m benchmarks.masks                         # resnet-20; a minute
    python -m benchmarks.masks --model resnet-50 --size 224 --classes 1000 --images 32
    python -m benchmarks.masks --quick                 # checks the counts only

Sources that score the loss see `--images` random images; SynFlow sees none. Rounds are
those of the papers (60 for FORCE, 100 for SynFlow) or `--rounds`. Compilation is
included, since each call compiles the network anew.
"""

import time
from collections.abc import Sequence

import jax
import numpy as np

import granet_jax
from benchmarks import commands, timing
from benchmarks.throughput import random_images
from experiments import models
from experiments.config.methods import MaskConfig, SourceName
from experiments.config.run import Config
from experiments.training import initial_masks
from experiments.training.step import TrainStep
from granet_jax import distributions

SPARSITY = 0.95
# With whether they have images, and rounds.
SOURCES: dict[SourceName, tuple[bool, bool]] = {
    "magnitude": (False, False),
    "snip": (True, False),
    "grasp": (True, False),
    "force": (True, True),
    "synflow": (False, True),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Times every source, and checks its counts."""
    parser = commands.parser(__doc__)
    parser.add_argument("--model", default="resnet-20", choices=models.NAMES)
    parser.add_argument("--size", type=int, default=32, help="pixels, square")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, help="of FORCE and SynFlow")
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
        found = initial_masks.masks(train_step, params, statistics, 0)
        jax.block_until_ready(found)
        seconds[source] = time.perf_counter() - start
        counts = granet_jax.sparsity(found)
        expected = distributions.total_count(counts.total, SPARSITY)
        if counts.active != expected:
            raise AssertionError(f"{source}: {counts.active} active, not {expected}")
        if not options.quick:
            print(f"{source}: {seconds[source]:.2f} s", flush=True)
    print(f"{options.model}: all masks have the number of weights asked for")
    if options.quick:
        return
    rows = [[name, f"{value:.2f}"] for name, value in seconds.items()]
    table = timing.table(["source", "seconds"], rows)
    commands.publish(options, "masks", table, {"seconds": seconds}, {})


if __name__ == "__main__":
    main()
