r"""Seconds to compute the masks of each source at 95% sparsity.

    python -m benchmarks.masks                         # resnet-20; a few minutes
    python -m benchmarks.masks --model resnet-50 --size 224 --classes 1000 --images 32
    python -m benchmarks.masks --quick                 # checks the counts only

Sources that score the loss see `--images` random images in batches of at most 32;
SynFlow sees none. Rounds are those of the papers (100 for SynFlow) or `--rounds`. A
first call goes before the one that is timed, unless `--once`. (It warms up the smaller
functions only: each call of a source compiles the network anew.)
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import granet_jax
from benchmarks import timing
from experiments import models
from granet_jax import distributions, mask_sources

SPARSITY = 0.95
BATCH = 32


def contenders(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Functions without arguments that give masks, by the name of their source."""
    model = models.create(options.model, classes=options.classes)
    wide = model.clone(dtype=None)
    shape = (1, options.size, options.size, options.channels)
    key = jax.random.key(0)
    variables = jax.jit(lambda: model.init(key, jnp.ones(shape), train=False))()
    params, statistics = variables["params"], variables.get("batch_stats", {})

    def apply(params: Any, inputs: jax.Array) -> jax.Array:
        given = {"params": params, "batch_stats": statistics}
        logits, _ = model.apply(given, inputs, train=True, mutable=["batch_stats"])
        return jnp.asarray(logits)

    def linear(params: Any, inputs: jax.Array) -> jax.Array:
        given = {"params": params, "batch_stats": statistics}
        return jnp.asarray(wide.apply(given, inputs, train=False))

    number = math.ceil(options.images / BATCH)
    size = math.ceil(options.images / number)
    batches = []
    for i in range(number):
        pixels, labels = jax.random.split(jax.random.fold_in(key, i))
        images = jax.random.normal(pixels, (size, *shape[1:]))
        batches.append(
            (images, jax.random.randint(labels, (size,), 0, options.classes))
        )
    loss = mask_sources.cross_entropy(apply)
    flat = mask_sources.cross_entropy(apply, temperature=200.0)
    common: dict[str, Any] = {"where": models.maskable, "on_collapse": "ignore"}
    rounds = {"rounds": options.rounds} if options.rounds else {}
    return {
        "random ERK": lambda: mask_sources.random(
            params, SPARSITY, key=key, where=models.maskable
        ),
        "magnitude": lambda: mask_sources.magnitude(params, SPARSITY, **common),
        "SNIP": lambda: mask_sources.snip(loss, params, batches, SPARSITY, **common),
        "GraSP": lambda: mask_sources.grasp(flat, params, batches, SPARSITY, **common),
        "FORCE": lambda: mask_sources.force(
            loss, params, batches, SPARSITY, **common, **rounds
        ),
        "SynFlow": lambda: mask_sources.synflow(
            linear, params, jnp.ones(shape), SPARSITY, **common, **rounds
        ),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks the counts, then times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="check only")
    parser.add_argument("--model", default="resnet-20", choices=models.NAMES)
    parser.add_argument("--size", type=int, default=32, help="pixels, square")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, help="of FORCE and SynFlow")
    parser.add_argument("--sources", nargs="*", help="only these")
    parser.add_argument("--once", action="store_true", help="time the first call")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args(arguments)
    if options.quick:
        options.model, options.size, options.images = "cnn-bn", 12, 20
        options.rounds, options.once = 3, True
    seconds: dict[str, float] = {}
    for name, make in contenders(options).items():
        if options.sources and name not in options.sources:
            continue
        if not options.once:
            jax.block_until_ready(make())
        start = time.perf_counter()
        masks = jax.block_until_ready(make())
        seconds[name] = time.perf_counter() - start
        found = granet_jax.sparsity(masks)
        expected = distributions.total_count(found.total, SPARSITY)
        if found.active != expected:
            raise AssertionError(f"{name}: {found.active} active, not {expected}")
        if not options.quick:
            print(f"{name}: {seconds[name]:.2f} s", flush=True)
    print(f"{options.model}: all masks have the number of weights asked for")
    if options.quick:
        return
    rows = [[name, f"{value:.2f}"] for name, value in seconds.items()]
    print(timing.table(["source", "seconds"], rows))
    print(timing.environment())
    given = {k: str(v) for k, v in vars(options).items()}
    timing.write_json(options.json, {"options": given, "seconds": seconds})


if __name__ == "__main__":
    main()
