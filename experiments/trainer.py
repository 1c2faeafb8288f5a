"""Training: the compiled steps of a configuration, and the loop around them."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import granet_jax
from experiments.config import Config, build_method
from experiments.data import Dataset, Split
from experiments.models import MODELS
from experiments.step import (
    TrainState,
    create_state,
    evaluation_step,
    learning_rate,
    masks_of,
    normalised,
    optimizer,
    train_step,
)
from granet_jax import distributions, masking, scores

PyTree = Any
EVALUATION_BATCH = 1024


class Record(NamedTuple):
    """One evaluation.

    Attributes:
      step: optimizer steps done.
      train_loss: mean cross-entropy over the steps since the record before, in nats;
        None at step 0.
      test_correct: test images classified correctly.
      test_accuracy: their share.
      sparsity: how sparse the masks are (`granet_jax.Sparsity`).
      learning_rate: of the next step.
      seconds: wall-clock time since the start, compilation included.
    """

    step: int
    train_loss: float | None
    test_correct: int
    test_accuracy: float
    sparsity: granet_jax.Sparsity
    learning_rate: float
    seconds: float


class DivergedError(RuntimeError):
    """The training loss is no longer finite."""


class Trainer:
    """The compiled functions of a configuration on a data set.

    The seed is an input of theirs, so that runs with several seeds share them; except
    that `transform` compiles the seed of random masks in, see `for_seed`.
    """

    def __init__(self, config: Config, dataset: Dataset, mask_seed: int):
        """Puts the data on the device; nothing is compiled before it is needed."""
        size = len(dataset.train.labels)
        if config.data.batch_size > size:
            raise ValueError(
                f"data.batch_size must be at most the {size} training images of "
                f"{dataset.name}, got {config.data.batch_size}."
            )
        self.config = config
        self.dataset = dataset
        self._mask_seed = mask_seed
        self.schedule = learning_rate(config.optimizer, config.steps)
        model = MODELS[config.model](dataset.classes)
        method = build_method(config)
        self._draws = method is not None and (
            method.sparsity(0) > 0 or method.grow is scores.random
        )
        tx = optimizer(config.optimizer, self.schedule)
        if method is not None:
            tx = granet_jax.transform(method, tx, seed=mask_seed)
        normalise = functools.partial(normalised, mean=dataset.mean, std=dataset.std)
        step = functools.partial(
            train_step,
            model=model,
            tx=tx,
            normalise=normalise,
            batch_size=config.data.batch_size,
            shift=config.data.shift,
        )
        self._train, self._test = jax.device_put((dataset.train, _padded(dataset.test)))
        # Not compiled as a whole: its parts are, once for all trainers.
        self._create = functools.partial(
            create_state, model=model, tx=tx, shape=dataset.train.images.shape
        )
        self._steps = jax.jit(
            functools.partial(_steps, step), donate_argnums=0, static_argnums=2
        )
        self._correct = jax.jit(
            functools.partial(evaluation_step, model=model, normalise=normalise)
        )

    def for_seed(self, seed: int) -> "Trainer":
        """This trainer, or a new one where the masks are drawn from another seed."""
        if self._draws and seed != self._mask_seed:
            return Trainer(self.config, self.dataset, seed)
        return self

    def create(self, seed: int) -> TrainState:
        """The state at step 0."""
        return self._create(jnp.uint32(seed))

    def steps(self, state: TrainState, number: int) -> tuple[TrainState, Array]:
        """Trains for some steps, without waiting for the device.

        Args:
          state: donated; not to be used again.
          number: of steps. One is a plain step, more are one `lax.scan` over steps.

        Returns:
          (the next state, the losses (number,)).
        """
        return self._steps(state, self._train, number)

    def evaluate(self, params: PyTree) -> int:
        """Number of test images classified correctly."""
        return sum(int(self._correct(params, batch)) for batch in self._test)


def fit(trainer: Trainer, seed: int, report: Callable[[Record], None]) -> TrainState:
    """Trains for the configured steps.

    Args:
      trainer: for this seed.
      seed: of this run.
      report: called at step 0, at every evaluation and at the last step.

    Returns:
      The final state.

    Raises:
      DivergedError: the loss is no longer finite.
    """
    start = time.perf_counter()
    config = trainer.config
    state = trainer.create(seed)
    interval = config.evaluation_interval
    step, losses = 0, []
    while True:
        if step % interval == 0 or step == config.steps:
            # This waits for the device: the queue of steps stays within one interval.
            train_loss = _mean_loss(jax.device_get(losses), step)
            correct = trainer.evaluate(state.params)
            report(
                Record(
                    step=step,
                    train_loss=train_loss,
                    test_correct=correct,
                    test_accuracy=correct / len(trainer.dataset.test.labels),
                    sparsity=granet_jax.sparsity(masks_of(state)),
                    learning_rate=float(np.asarray(trainer.schedule(step))),
                    seconds=time.perf_counter() - start,
                )
            )
            losses = []
        if step == config.steps:
            break
        # What is left of an interval after whole blocks goes step by step, so that at
        # most two programs are compiled.
        left = min(interval - step % interval, config.steps - step)
        block = min(config.scan_block, interval)
        number = block if left >= block else 1
        state, loss = trainer.steps(state, number)
        losses.append(loss)
        step += number
    check_exact(config, state)
    return state


def check_exact(config: Config, state: TrainState) -> None:
    """Raises RuntimeError unless the network is as sparse as configured, exactly."""
    masks = masks_of(state)
    found = granet_jax.sparsity(masks)
    target = 0.0 if config.method == "dense" else config.sparsity
    expected = distributions.total_count(found.total, target)
    if found.active != expected:
        raise RuntimeError(
            f"{found.active} weights are active, {expected} of {found.total} should be."
        )
    weights = masking.maskable_leaves(state.params, masks)
    for name, p, m in zip(found.leaves, weights, jax.tree.leaves(masks), strict=True):
        if np.any(np.asarray(p)[~np.asarray(m)]):
            raise RuntimeError(f"{name} has weights that are pruned but not zero.")


def _steps(
    step: Callable[..., tuple[TrainState, Array]],
    state: TrainState,
    train: Split,
    number: int,
) -> tuple[TrainState, Array]:
    if number == 1:
        state, loss = step(state, train)
        return state, loss[None]
    return lax.scan(lambda carry, _: step(carry, train), state, length=number)


def _padded(split: Split) -> list[Split]:
    """The split in batches of one size, filled up with a label that nothing has."""
    size = len(split.labels)
    number = math.ceil(size / EVALUATION_BATCH)
    batch = math.ceil(size / number)
    extra = number * batch - size
    images = np.pad(split.images, ((0, extra), (0, 0), (0, 0), (0, 0)))
    labels = np.pad(split.labels, (0, extra), constant_values=-1)
    return [
        Split(*part)
        for part in zip(np.split(images, number), np.split(labels, number), strict=True)
    ]


def _mean_loss(losses: list[np.ndarray], step: int) -> float | None:
    """Mean of the losses of the steps up to `step`; None if there are none."""
    if not losses:
        return None
    values = np.concatenate(losses)
    finite = np.isfinite(values)
    if not finite.all():
        first = int(np.argmin(finite))
        raise DivergedError(
            f"the loss of step {step - len(values) + first + 1} is {values[first]}: "
            "lower optimizer.learning_rate."
        )
    return float(values.mean(dtype=np.float64))
