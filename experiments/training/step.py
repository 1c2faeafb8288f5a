"""The training step, its state, and evaluation, as pure functions.

`TrainState` has everything that a step changes. All random numbers are functions of the
seed and the step, so a saved state is enough to continue training. Nothing here depends
on the devices: `experiments.training.devices` compiles these functions and passes two
functions that say how a batch is split.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

import granet_jax
from experiments import models
from experiments.config.run import Config, build_method
from experiments.data import Dataset, Split, Stream, augment
from experiments.training import optimizer
from granet_jax import tost

PyTree = Any


class TrainState(NamedTuple):
    """Everything that a training step reads and writes.

    Attributes:
      step: Number of completed optimizer steps, int32 scalar.
      seed: Seed of all random numbers, uint32 scalar.
      order: Order of the training examples in the current epoch, int32 (n,); () for
        streamed data, which arrive in order.
      params: Parameters of the network.
      statistics: Batch statistics of the network; empty if it has none.
      opt_state: State of the optimizer, including the masks.
      average: Moving average of `params`; () without one.
    """

    step: Array
    seed: Array
    order: Array | tuple[()]
    params: PyTree
    statistics: PyTree
    opt_state: optax.OptState
    average: PyTree


class Score(NamedTuple):
    """Sums over the examples of one or more batches.

    Attributes:
      correct: Number of labels predicted correctly, int32 scalar.
      loss: Sum of the cross-entropy over all labels in nats, float32 scalar.
    """

    correct: Array
    loss: Array


def _identity(tree: PyTree) -> PyTree:
    return tree


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """The pure functions of a configuration.

    Attributes:
      config: The configuration.
      dataset: The data set. Only its sizes and statistics are used.
      split: Function from arrays with one row per example of the batch to the rows of
        this device, or to the same arrays with a sharding constraint.
      mean: Function that averages over the devices.
      axis_name: Mapped axis over which batch statistics are averaged; None without one.
      ghosts: Whether the network has the ghosts of `config.tost`.
    """

    config: Config
    dataset: Dataset | Stream
    split: Callable[[PyTree], PyTree] = _identity
    mean: Callable[[PyTree], PyTree] = _identity
    axis_name: str | None = None
    ghosts: bool = False

    @functools.cached_property
    def model(self) -> nn.Module:
        """The network."""
        return models.create(
            self.config.model,
            classes=self.dataset.classes,
            dtype=jnp.dtype(self.config.precision),
            axis_name=self.axis_name,
        )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        if isinstance(self.dataset, Stream):
            return self.dataset.image_shape
        return self.dataset.train.inputs.shape[1:]

    @functools.cached_property
    def schedule(self) -> optax.Schedule:
        """Learning rate as a function of the number of completed steps."""
        return optimizer.learning_rate(self.config.optimizer, self.config.steps)

    @functools.cached_property
    def method(self) -> granet_jax.Method | None:
        """The library's record of the method; None for dense training."""
        return build_method(self.config)

    @property
    def has_dense_weights(self) -> bool:
        """Whether pruned weights keep values that the forward pass ignores."""
        return self.method is not None and self.method.weights == "dense"

    def optimizer(self, seed: Array) -> optax.GradientTransformation:
        """Return the optimizer with masks for a seed, which may be traced."""
        inner = optimizer.create(
            self.config.optimizer,
            self.schedule,
            functools.partial(optimizer.decay_mask, maskable=models.maskable),
        )
        if self.method is None:
            return inner
        return granet_jax.transform(
            self.method,
            inner,
            where=models.maskable,
            seed=seed,
            warmup=self.config.masks.warmup or 0,
        )

    def variables(self, seed: Array) -> PyTree:
        """Return the initial "params" and, if the network has them, "batch_stats".

        Args:
          seed: Seed of the run, uint32 scalar.
        """
        example = self.inputs(jnp.zeros((1, *self.input_shape), jnp.uint8))
        key = _key(seed, "init", 0)
        return self.model.init(key, example, train=False, **self._ghost_arguments(0))

    def create(self, seed: Array) -> TrainState:
        """Return the state at step 0, in which pruned weights are zero.

        Args:
          seed: Seed of the run, uint32 scalar.
        """
        order = ()
        if not isinstance(self.dataset, Stream):
            order = jnp.arange(len(self.dataset.train.labels), dtype=jnp.int32)
        variables = self.variables(seed)
        params = variables["params"]
        opt_state = self.optimizer(seed).init(params)
        if self.method is not None and not self.has_dense_weights:
            params = granet_jax.apply_masks(params, granet_jax.get_masks(opt_state))
        return TrainState(
            step=jnp.int32(0),
            seed=seed,
            order=order,
            params=params,
            statistics=variables.get("batch_stats", {}),
            opt_state=opt_state,
            # A separate buffer, so that both can be donated.
            average=() if self._decay is None else jax.tree.map(jnp.copy, params),
        )

    def step(self, state: TrainState, data: Split) -> tuple[TrainState, Array]:
        """Perform one optimizer step.

        Args:
          state: State before the step.
          data: All training examples on the device; for a stream, the batch of this
            step (in a mapped function, the part of this device).

        Returns:
          (the next state, the mean loss of the batch).
        """
        state, batch = self._batch(state, data)
        loss, statistics, grads = self._gradient(state, batch)
        loss, grads = self.mean((loss, grads))
        updates, opt_state = self.optimizer(state.seed).update(
            grads, state.opt_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        state = state._replace(
            step=state.step + 1,
            params=params,
            statistics=statistics,
            opt_state=opt_state,
            average=self._averaged(state, params),
        )
        return state, loss

    def _averaged(self, state: TrainState, params: PyTree) -> PyTree:
        if self._decay is None:
            return state.average
        # The decay is lower in the first steps, so that the average soon forgets the
        # initial weights. This is the rule of TensorFlow's ExponentialMovingAverage.
        t = state.step.astype(jnp.float32)
        decay = jnp.minimum(self._decay, (1 + t) / (10 + t))
        return optax.incremental_update(params, state.average, 1 - decay)

    def gradient(self, state: TrainState, data: Split) -> PyTree:
        """Return the dense gradient of the next step; arguments as for `step`."""
        state, batch = self._batch(state, data)
        return self.mean(self._gradient(state, batch)[2])

    def steps(
        self, state: TrainState, data: Split, number: int
    ) -> tuple[TrainState, Array]:
        """Perform `number` steps, in a scan if there are several.

        Returns:
          (the state after the steps, their losses (number,)).
        """
        if number == 1:
            state, loss = self.step(state, data)
            return state, loss[None]
        return lax.scan(lambda s, _: self.step(s, data), state, length=number)

    def evaluate(self, state: TrainState, batch: Split) -> Score:
        """Evaluate one batch. Examples with the label -1 are padding."""
        params = self.evaluation_params(state)
        variables = {"params": params, "batch_stats": state.statistics}
        logits = self.model.apply(
            variables,
            self.inputs(batch.inputs),
            train=False,
            **self._ghost_arguments(state.step),
        )
        logits = jnp.asarray(logits)
        is_example = batch.labels >= 0
        labels = jnp.where(is_example, batch.labels, 0)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = is_example & (jnp.argmax(logits, axis=-1) == labels)
        return Score(
            jnp.sum(correct, dtype=jnp.int32),
            jnp.sum(jnp.where(is_example, losses, 0.0)),
        )

    def forward_params(self, state: TrainState) -> PyTree:
        """Return the parameters of the forward pass, where the gradient is computed."""
        if not self.has_dense_weights:
            return state.params
        return granet_jax.sparse_view(state.params, state.opt_state)

    def evaluation_params(self, state: TrainState) -> PyTree:
        """Return the parameters to evaluate: the masked moving average, if any."""
        if self._decay is None:
            return self.forward_params(state)
        if self.method is None:
            return state.average
        masks = granet_jax.get_masks(state.opt_state)
        return granet_jax.apply_masks(state.average, masks)

    def masks(self, state: TrainState) -> PyTree:
        """Return the masks. In dense training every weight is active."""
        if self.method is not None:
            return granet_jax.get_masks(state.opt_state)
        return granet_jax.init_masks(
            granet_jax.static(0.0), state.params, where=models.maskable
        )

    @property
    def _decay(self) -> float | None:
        return self.config.optimizer.ema

    def _batch(self, state: TrainState, data: Split) -> tuple[TrainState, Split]:
        """Return the batch of this step and the state with the order of the epoch."""
        if isinstance(self.dataset, Stream):
            return state, Split(self.inputs(data.inputs), data.labels)
        return self._draw(state, data)

    def _draw(self, state: TrainState, train: Split) -> tuple[TrainState, Split]:
        size, batch_size = len(train.labels), self.config.data.batch_size
        epoch, batch = jnp.divmod(state.step, size // batch_size)
        order = lax.cond(
            batch == 0,
            lambda: jax.random.permutation(_key(state.seed, "order", epoch), size),
            lambda: state.order,
        )
        rows = lax.dynamic_slice_in_dim(order, batch * batch_size, batch_size)
        # Random numbers are drawn for the whole batch and then split, so that they do
        # not depend on the number of devices.
        draws: dict[str, Array] = {"rows": rows}
        shift = self.config.shift
        if shift:
            key = _key(state.seed, "shift", state.step)
            draws["corners"] = augment.shifts(key, batch_size, shift)
        if self.config.flip:
            key = _key(state.seed, "flip", state.step)
            draws["mirrored"] = jax.random.bernoulli(key, shape=(batch_size,))
        draws = self.split(draws)
        inputs = jnp.asarray(train.inputs)[draws["rows"]]
        inputs = inputs.reshape(-1, *self.input_shape)
        if shift:
            inputs = augment.shifted(inputs, draws["corners"], shift)
        if self.config.flip:
            inputs = augment.mirrored(inputs, draws["mirrored"])
        labels = jnp.asarray(train.labels)[draws["rows"]]
        return state._replace(order=order), Split(self.inputs(inputs), labels)

    def inputs(self, raw: Any) -> Array:
        """Return the network's input: normalised images, or text unchanged."""
        if not self.dataset.mean:
            return jnp.asarray(raw)
        return augment.normalised(raw, self.dataset.mean, self.dataset.std)

    def _gradient(
        self, state: TrainState, batch: Split
    ) -> tuple[Array, PyTree, PyTree]:
        """Return (loss, batch statistics, gradient), accumulated if configured."""
        parts = self.config.optimizer.accumulate
        differentiate = jax.value_and_grad(self._loss, has_aux=True)
        params = self.forward_params(state)
        if parts == 1:
            (loss, statistics), grads = differentiate(
                params, state.statistics, batch, state.step
            )
            return loss, statistics, grads

        # Part i has the rows i, i + parts, ... so that rows stay on their devices.
        batch_parts = jax.tree.map(
            lambda x: jnp.moveaxis(
                x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0
            ),
            batch,
        )

        def add(carry: PyTree, part: Split) -> tuple[PyTree, None]:
            loss, statistics, grads = carry
            (part_loss, statistics), part_grads = differentiate(
                params, statistics, part, state.step
            )
            grads = jax.tree.map(jnp.add, grads, part_grads)
            return (loss + part_loss, statistics, grads), None

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        start = (jnp.float32(0), state.statistics, zeros)
        (loss, statistics, grads), _ = lax.scan(add, start, batch_parts)
        return loss / parts, statistics, jax.tree.map(lambda g: g / parts, grads)

    def _loss(
        self, params: PyTree, statistics: PyTree, batch: Split, step: Array
    ) -> tuple[Array, PyTree]:
        logits, statistics = self.logits(
            params, statistics, jnp.asarray(batch.inputs), step
        )
        labels = jnp.asarray(batch.labels)
        smoothing = self.config.optimizer.label_smoothing
        tost_smoothing = tost.label_alpha(self.config.tost.build(), self.config.steps)
        if tost_smoothing is not None:
            losses = tost.smoothed_cross_entropy(logits, labels, tost_smoothing(step))
        elif smoothing:
            targets = optax.smooth_labels(
                jax.nn.one_hot(labels, self.dataset.classes), smoothing
            )
            losses = optax.softmax_cross_entropy(logits, targets)
        else:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), statistics

    def logits(
        self, params: PyTree, statistics: PyTree, inputs: Array, step: Array | int
    ) -> tuple[Array, PyTree]:
        """Return the logits in training mode and the new batch statistics."""
        logits, changed = self.model.apply(
            {"params": params, "batch_stats": statistics},
            inputs,
            train=True,
            mutable=["batch_stats"],
            **self._ghost_arguments(step),
        )
        return jnp.asarray(logits), changed.get("batch_stats", statistics)

    def _ghost_arguments(self, step: Array | int) -> dict[str, Any]:
        """Return the arguments of the network's call that add the ghosts of a step."""
        if not self.ghosts:
            return {}
        config, steps = self.config.tost.build(), self.config.steps
        activation = tost.activation(config, steps)
        alpha = tost.skip_alpha(config, steps)
        skip = None
        if config.skips is not None and alpha is not None:
            skip = models.Skip(config.skips, alpha(step))
        if activation is None:
            return {"ghosts": models.Ghosts(skip=skip)}
        return {"ghosts": models.Ghosts(lambda x: activation(x, step), skip)}


def _key(seed: Array, purpose: str, number: Array | int) -> Array:
    streams = {"init": 0, "order": 1, "shift": 2, "flip": 3}
    stream = jax.random.fold_in(jax.random.key(seed), streams[purpose])
    return jax.random.fold_in(stream, number)
