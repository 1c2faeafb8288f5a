r"""Images a second of the trainer, sparse and dense, and of a minimal training loop.

    python -m benchmarks.throughput                     # cnn, 28 x 28, a few minutes
    python -m benchmarks.throughput --model resnet-18-cifar --size 32 --channels 3 \
        --precision bfloat16 --steps 400                # on a GPU
    python -m benchmarks.throughput --quick             # only checks the results

Three contenders train the same network on the same random images, with the same
augmentation and optimizer: "minimal" is a loop written by hand below; "dense" and
"sparse" (GraNet from half of the weights, mask updates included) are the trainer of
`experiments` as `experiments.train` calls it. The times cover the steps, without
compilation, evaluation and checkpoints.

The benchmark asserts that "minimal" and "dense" compute the same losses. It prints
times and asserts nothing about them.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from benchmarks.tools import command_line, results, timing
from experiments import data, models
from experiments.config.run import CheckpointConfig, Config, DataConfig, MaskConfig
from experiments.data import augment
from experiments.training import loop

PyTree = Any
# The first steps of a run fill the device's queue, and are not timed.
WARM = 10


def random_images(
    size: int, channels: int, number: int, classes: int = 10
) -> data.Dataset:
    """Creates a data set of noise."""
    rng = np.random.default_rng(0)

    def split(n: int) -> data.Split:
        images = rng.integers(0, 256, (n, size, size, channels), dtype=np.uint8)
        return data.Split(images, rng.integers(0, classes, n).astype(np.int32))

    return data.from_arrays("random", split(number), split(1024), classes)


def minimal(config: Config, dataset: data.Dataset) -> Callable[[], tuple[float, Any]]:
    """Writes the shortest training loop; a call returns its seconds and losses."""
    model = models.create(
        config.model, classes=dataset.classes, dtype=jnp.dtype(config.precision)
    )
    tx = optax.chain(
        optax.add_decayed_weights(
            config.optimizer.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim >= 2, params),
        ),
        optax.sgd(config.optimizer.learning_rate, momentum=0.9, nesterov=True),
    )
    images, labels = map(jnp.asarray, dataset.train)
    n, batch, shift = len(labels), config.data.batch_size, config.shift

    def stream(purpose: int, number: jax.Array | int) -> jax.Array:
        return jax.random.fold_in(
            jax.random.fold_in(jax.random.key(0), purpose), number
        )

    @jax.jit
    def shuffled(epoch: int) -> jax.Array:
        return jax.random.permutation(stream(1, epoch), n)

    def step(carry: PyTree, order: jax.Array, i: int, t: int) -> PyTree:
        params, stats, opt_state = carry
        rows = jax.lax.dynamic_slice_in_dim(order, i * batch, batch)
        corners = augment.shifts(stream(2, t), batch, shift)
        x = augment.shifted(images[rows], corners, shift)
        x = augment.normalised(x, dataset.mean, dataset.std)

        def loss_of(params: PyTree) -> Any:
            variables = {"params": params, "batch_stats": stats}
            out, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
            entropy = optax.softmax_cross_entropy_with_integer_labels
            return entropy(jnp.asarray(out), labels[rows]).mean(), new

        (loss, new), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, new.get("batch_stats", stats), opt_state), loss

    step = jax.jit(step, donate_argnums=0)

    @jax.jit
    def start() -> PyTree:
        x = jnp.zeros((1, *dataset.train.inputs.shape[1:]))
        variables = model.init(stream(0, 0), x, train=False)
        params = variables["params"]
        return params, variables.get("batch_stats", {}), tx.init(params)

    def run() -> tuple[float, Any]:
        carry, order, losses, begin = start(), None, [], 0.0
        for t in range(config.steps):
            if t == WARM:
                jax.block_until_ready(losses)
                begin = time.perf_counter()
            epoch, i = divmod(t, n // batch)
            if i == 0:
                order = shuffled(epoch)
            assert order is not None
            carry, loss = step(carry, order, i, t)
            losses.append(loss)
        jax.block_until_ready(carry)
        return time.perf_counter() - begin, [float(x) for x in losses]

    return run


def with_trainer(
    config: Config, dataset: data.Dataset
) -> Callable[[], tuple[float, Any]]:
    """Wraps the trainer on one device; a call returns its seconds and mean loss."""
    setup = loop.create(config, dataset, jax.devices()[:1])

    def run() -> tuple[float, Any]:
        done, begin, end = 0, 0.0, 0.0

        def on_step(steps: int) -> None:
            nonlocal done, begin, end
            done += steps
            end = time.perf_counter() if steps else end
            if done <= WARM:
                begin = end

        with tempfile.TemporaryDirectory() as folder:
            (records,), _ = loop.fit(setup, [0], epath.Path(folder), on_step=on_step)
        return end - begin, records[-1].train_loss

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks that the loops agree, then times them."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--model", default="cnn", choices=models.NAMES)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--size", type=int, default=28, help="pixels, square")
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200, help="steps of a run")
    parser.add_argument(
        "--interval", type=int, default=100, help="steps between mask updates"
    )
    parser.add_argument("--rounds", type=int, default=11, help="runs of each")
    options = parser.parse_args(arguments)
    if options.quick:
        options.model, options.steps, options.interval = "lenet-300-100", 30, 5
    if options.steps <= 2 * WARM:
        parser.error(f"--steps must be over {2 * WARM}, got {options.steps}")

    dataset = random_images(
        options.size, options.channels, max(2048, 10 * options.batch_size)
    )
    dense = Config(
        method="dense",
        model=options.model,
        precision=options.precision,
        steps=options.steps,
        eval_every=options.steps,
        checkpoint=CheckpointConfig(every=options.steps),
        data=DataConfig(batch_size=options.batch_size, shift=2, flip=False),
        seeds=1,
    )
    sparse = dataclasses.replace(
        dense, method="granet-st", masks=MaskConfig(interval=options.interval)
    )
    contenders = {
        "minimal": minimal(dense, dataset),
        "dense": with_trainer(dense, dataset),
        "sparse": with_trainer(sparse, dataset),
    }
    seconds: timing.Rounds = {name: [] for name in contenders}
    # The first runs compile.
    losses = {name: run()[1] for name, run in contenders.items()}
    # Halfway, the trainer's learning rate drops and that of the minimal loop stays. The
    # work is the same, but only the first losses of a run can be compared.
    check(losses["minimal"], dense, dataset)
    print(f"{options.model}: the minimal loop and the trainer agree")
    if options.quick:
        return
    for order in timing.turns(list(contenders), options.rounds):
        for name in order:
            seconds[name].append(contenders[name]()[0])
    report(seconds, options)


def check(losses: Sequence[float], config: Config, dataset: data.Dataset) -> None:
    """Compares the trainer's first losses with those of the minimal loop."""
    setup = loop.create(config, dataset, jax.devices()[:1])
    state = setup.compiled_step.create([0])
    for step in range(4):
        state, loss = setup.compiled_step.steps(state, setup.train_data, 1)
        np.testing.assert_allclose(loss[0, 0], losses[step], rtol=2e-2)


def report(seconds: timing.Rounds, options: argparse.Namespace) -> None:
    """Publishes images a second and the two ratios."""
    images = (options.steps - WARM) * options.batch_size
    pairs = {"minimal": None, "dense": "minimal", "sparse": "dense"}
    rows = []
    ratios = {}
    for name, baseline in pairs.items():
        rate = images / statistics.median(seconds[name])
        cells = [name, f"{rate:,.0f}", "-", "-"]
        if baseline is not None:
            # The ratio of two rates is the inverse of the ratio of the times.
            ratios[f"{name} / {baseline}"] = (
                1 / timing.ratio_of_medians(seconds, name, baseline),
                1 / timing.median_ratio(seconds, name, baseline),
            )
            of_medians, of_rounds = ratios[f"{name} / {baseline}"]
            cells[2:] = [
                f"{of_medians:.3f} of {baseline}",
                f"{of_rounds:.3f} of {baseline}",
            ]
        rows.append(cells)
    header = ["loop", "images / s", "ratio of medians", "median of ratios"]
    results.publish(
        options,
        "throughput",
        results.table(header, rows),
        {"seconds": seconds, "ratios": ratios},
        {name: of_medians for name, (of_medians, _) in ratios.items()},
    )


if __name__ == "__main__":
    main()
