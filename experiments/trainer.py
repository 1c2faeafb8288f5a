"""Training: one pure step, and the loop around it.

The step holds all that changes in `TrainState`, its random numbers being functions of
the seed and the step, so that a state is all one needs to go on from.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import granet_jax
from experiments.config import Config, OptimizerConfig, build_method
from experiments.data import Dataset, Split
from experiments.models import MODELS
from granet_jax import distributions, masking, scores

PyTree = Any
EVALUATION_BATCH = 1024


class TrainState(NamedTuple):
    """Everything that a training step reads and writes.

    Attributes:
      step: int32 scalar, optimizer steps done.
      seed: uint32 scalar, which all random numbers follow from (with `step`).
      order: int32 (n,), the order in which this epoch goes through the training images.
      params: the network's parameters.
      opt_state: the optimizer's state, masks included.
    """

    step: Array
    seed: Array
    order: Array
    params: PyTree
    opt_state: optax.OptState


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
        normalise = functools.partial(_normalise, mean=dataset.mean, std=dataset.std)
        step = functools.partial(
            train_step,
            model=model,
            tx=tx,
            normalise=normalise,
            batch_size=config.data.batch_size,
            shift=config.data.shift,
        )
        self._train, self._test = jax.device_put((dataset.train, _padded(dataset.test)))
        self._create = jax.jit(
            functools.partial(
                create_state, model=model, tx=tx, shape=dataset.train.images.shape
            )
        )
        self._step = jax.jit(step, donate_argnums=0)
        self._scan = jax.jit(
            functools.partial(_scan, step), donate_argnums=0, static_argnums=2
        )
        self._correct = jax.jit(
            functools.partial(_correct, model=model, normalise=normalise)
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
        if number == 1:
            state, loss = self._step(state, self._train)
            return state, loss[None]
        return self._scan(state, self._train, number)

    def evaluate(self, params: PyTree) -> int:
        """Number of test images classified correctly."""
        return sum(int(self._correct(params, batch)) for batch in self._test)


def train_step(
    state: TrainState,
    train: Split,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    normalise: Callable[[Array], Array],
    batch_size: int,
    shift: int,
) -> tuple[TrainState, Array]:
    """One optimizer step: pure, for any transformation of compilation or loops.

    Args:
      state: see `TrainState`.
      train: all training images and labels, on the device.
      model: network, applied to `params` alone.
      tx: optimizer.
      normalise: from uint8 images to the network's input.
      batch_size: images a step.
      shift: largest shift of the augmentation, in pixels.

    Returns:
      (the next state, the mean cross-entropy of the batch).
    """
    size = len(train.labels)
    epoch, batch = jnp.divmod(state.step, size // batch_size)
    order = lax.cond(
        batch == 0,
        lambda: jax.random.permutation(_key(state.seed, "order", epoch), size),
        lambda: state.order,
    )
    chosen = lax.dynamic_slice_in_dim(order, batch * batch_size, batch_size)
    images = train.images[chosen]
    if shift:
        images = shifted(images, _key(state.seed, "shift", state.step), shift)
    inputs, labels = normalise(images), train.labels[chosen]

    def loss_of(params: PyTree) -> Array:
        logits = model.apply({"params": params}, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, state.seed, order, params, opt_state), loss


def create_state(
    seed: Array,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    shape: tuple[int, ...],
) -> TrainState:
    """The state at step 0, pruned weights already zero.

    Args:
      seed: uint32 scalar.
      model: network.
      tx: optimizer.
      shape: of all training images, (n, height, width, channels).
    """
    inputs = jnp.zeros((1, *shape[1:]), jnp.float32)
    params = model.init(_key(seed, "init", 0), inputs)["params"]
    opt_state = tx.init(params)
    if _is_sparse(opt_state):
        params = granet_jax.apply_masks(params, granet_jax.get_masks(opt_state))
    order = jnp.arange(shape[0], dtype=jnp.int32)
    return TrainState(jnp.int32(0), seed, order, params, opt_state)


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
                    learning_rate=float(trainer.schedule(step)),
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
    if not _is_sparse(state.opt_state):
        return
    masks = granet_jax.get_masks(state.opt_state)
    found = granet_jax.sparsity(masks)
    expected = distributions.total_count(found.total, config.sparsity)
    if found.active != expected:
        raise RuntimeError(
            f"{found.active} weights are active, {expected} of {found.total} should be."
        )
    weights = masking.maskable_leaves(state.params, masks)
    for name, p, m in zip(found.leaves, weights, jax.tree.leaves(masks), strict=True):
        if np.any(np.asarray(p)[~np.asarray(m)]):
            raise RuntimeError(f"{name} has weights that are pruned but not zero.")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate as a function of the steps done."""
    match config.schedule:
        case "drops":
            return optax.piecewise_constant_schedule(
                config.learning_rate,
                {steps // 2: 0.1, steps * 3 // 4: 0.1},
            )
        case "cosine":
            return optax.cosine_decay_schedule(config.learning_rate, steps)
        case "constant":
            return optax.constant_schedule(config.learning_rate)


def optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """SGD with momentum and weight decay on weights (two dimensions or more)."""
    return optax.chain(
        optax.add_decayed_weights(
            config.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim >= 2, params),
        ),
        optax.sgd(schedule, momentum=config.momentum, nesterov=config.nesterov),
    )


def shifted(images: Array, key: Array, shift: int) -> Array:
    """Each image moved by -shift to shift pixels in both directions, zeros moving in.

    Args:
      images: (n, height, width, channels).
      key: typed key.
      shift: in pixels.

    Returns:
      An array of the shape and dtype of `images`.
    """
    n, height, width, channels = images.shape
    padding = ((0, 0), (shift, shift), (shift, shift), (0, 0))
    padded = jnp.pad(images, padding)
    corners = jax.random.randint(key, (n, 2), 0, 2 * shift + 1)

    def crop(image: Array, corner: Array) -> Array:
        start = (corner[0], corner[1], 0)
        return lax.dynamic_slice(image, start, (height, width, channels))

    return jax.vmap(crop)(padded, corners)


def masks_of(state: TrainState) -> PyTree:
    """The masks; for dense training, masks of which every weight is active."""
    if _is_sparse(state.opt_state):
        return granet_jax.get_masks(state.opt_state)
    return granet_jax.init_masks(granet_jax.static(0.0), state.params)


def _key(seed: Array, purpose: str, number: Array | int) -> Array:
    streams = {"init": 0, "order": 1, "shift": 2}
    stream = jax.random.fold_in(jax.random.key(seed), streams[purpose])
    return jax.random.fold_in(stream, number)


def _scan(
    step: Callable[..., tuple[TrainState, Array]],
    state: TrainState,
    train: Split,
    number: int,
) -> tuple[TrainState, Array]:
    return lax.scan(lambda carry, _: step(carry, train), state, length=number)


def _normalise(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    x = images.astype(jnp.float32) / 255
    return (x - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def _correct(
    params: PyTree,
    batch: Split,
    model: nn.Module,
    normalise: Callable[[Array], Array],
) -> Array:
    logits = model.apply({"params": params}, normalise(batch.images))
    return jnp.sum(jnp.argmax(logits, axis=-1) == batch.labels, dtype=jnp.int32)


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


def _is_sparse(opt_state: optax.OptState) -> bool:
    return isinstance(opt_state, granet_jax.SparseState)
