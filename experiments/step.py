"""The training step and its state: pure functions, for any compilation or loop.

The step holds all that changes in `TrainState`, its random numbers being functions of
the seed and the step, so that a state is all one needs to go on from.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.typing import ArrayLike

import granet_jax
from experiments.config import OptimizerConfig
from experiments.data import Split

PyTree = Any


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


def train_step(
    state: TrainState,
    train: Split,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    normalise: Callable[[ArrayLike], Array],
    batch_size: int,
    shift: int,
) -> tuple[TrainState, Array]:
    """One optimizer step.

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
        logits = _logits(model, params, inputs)
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


def evaluation_step(
    params: PyTree,
    batch: Split,
    *,
    model: nn.Module,
    normalise: Callable[[ArrayLike], Array],
) -> Array:
    """Number of images of `batch` classified correctly, an int32 scalar."""
    logits = _logits(model, params, normalise(batch.images))
    return jnp.sum(jnp.argmax(logits, axis=-1) == batch.labels, dtype=jnp.int32)


def masks_of(state: TrainState) -> PyTree:
    """The masks; for dense training, masks of which every weight is active."""
    if _is_sparse(state.opt_state):
        return granet_jax.get_masks(state.opt_state)
    return granet_jax.init_masks(granet_jax.static(0.0), state.params)


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


def normalised(
    images: ArrayLike, mean: tuple[float, ...], std: tuple[float, ...]
) -> Array:
    """Float32 images of mean 0 and standard deviation 1, given those of each channel.

    Args:
      images: uint8, of shape (..., channels).
      mean: of every channel, for values from 0 to 1.
      std: standard deviation, likewise.
    """
    x = jnp.asarray(images, jnp.float32) / 255
    channels = (1,) * (x.ndim - 1) + (len(mean),)
    mean_, std_ = jnp.float32(mean), jnp.float32(std)
    return (x - mean_.reshape(channels)) / std_.reshape(channels)


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


def _logits(model: nn.Module, params: PyTree, inputs: Array) -> Array:
    return jnp.asarray(model.apply({"params": params}, inputs))


def _key(seed: Array, purpose: str, number: Array | int) -> Array:
    streams = {"init": 0, "order": 1, "shift": 2}
    stream = jax.random.fold_in(jax.random.key(seed), streams[purpose])
    return jax.random.fold_in(stream, number)


def _is_sparse(opt_state: optax.OptState) -> bool:
    return isinstance(opt_state, granet_jax.SparseState)
