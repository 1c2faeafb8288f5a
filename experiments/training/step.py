"""The training step, its state, and evaluation: pure functions, for any compilation.

The step holds all that changes in `TrainState`, its random numbers being functions of
the seed and the step, so that a state is all one needs to go on from. Nothing here
knows of devices: `experiments.training.devices` says how a batch is split, by two
functions.
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
      step: int32 scalar, optimizer steps done.
      seed: uint32 scalar, which all random numbers follow from (with `step`).
      order: int32 (n,), the order in which this epoch goes through the training data;
        () for data that is streamed, which comes in order.
      params: the network's parameters.
      statistics: its batch statistics; empty if it has none.
      opt_state: the optimizer's state, masks included.
      average: moving average of `params`; () without one.
    """

    step: Array
    seed: Array
    order: Array | tuple[()]
    params: PyTree
    statistics: PyTree
    opt_state: optax.OptState
    average: PyTree


class Score(NamedTuple):
    """What evaluation adds up over batches.

    Attributes:
      correct: int32 scalar, labels predicted correctly.
      loss: float32 scalar, sum of the cross-entropy over all labels, in nats.
    """

    correct: Array
    loss: Array


def _whole(batch: PyTree) -> PyTree:
    return batch


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A configuration as pure functions.

    Attributes:
      config: the configuration.
      dataset: what it trains on; only its sizes and statistics are used.
      split: from arrays of a row for each example of the batch to those of this
        device, or the same arrays with their sharding.
      mean: over the devices of what each computed from its part of the batch.
      axis_name: that batch statistics are averaged over, in a mapped function.
      ghosts: whether the network has the configured ghosts (`config.tost`).
    """

    config: Config
    dataset: Dataset | Stream
    split: Callable[[PyTree], PyTree] = _whole
    mean: Callable[[PyTree], PyTree] = _whole
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
        """Learning rate as a function of the steps done."""
        return optimizer.learning_rate(self.config.optimizer, self.config.steps)

    @functools.cached_property
    def method(self) -> granet_jax.Method | None:
        """The library's record of the method; None for dense training."""
        return build_method(self.config)

    @property
    def has_dense_weights(self) -> bool:
        """Whether pruned weights live on, and only the forward pass is sparse."""
        return self.method is not None and self.method.weights == "dense"

    def optimizer(self, seed: Array) -> optax.GradientTransformation:
        """The whole optimizer, masks included, for a seed that may be traced."""
        inner = optimizer.create(
            self.config.optimizer,
            self.schedule,
            functools.partial(optimizer.decay_mask, maskable=models.maskable),
        )
        if self.method is None:
            return inner
        return granet_jax.transform(
            self.method, inner, where=models.maskable, seed=seed
        )

    def variables(self, seed: Array) -> PyTree:
        """The network's initial "params" and, if it has some, "batch_stats".

        Args:
          seed: uint32 scalar.
        """
        example = self.inputs(jnp.zeros((1, *self.input_shape), jnp.uint8))
        key = _key(seed, "init", 0)
        return self.model.init(key, example, train=False, **self._with_ghosts(0))

    def create(self, seed: Array) -> TrainState:
        """The state at step 0, pruned weights already zero.

        Args:
          seed: uint32 scalar.
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
            # A buffer of its own, so that both can be donated.
            average=() if self._decay is None else jax.tree.map(jnp.copy, params),
        )

    def step(self, state: TrainState, data: Split) -> tuple[TrainState, Array]:
        """One optimizer step.

        Args:
          state: see `TrainState`.
          data: all training examples, on the device; of a stream, the batch of this
            step (of this device, in a mapped function).

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
        average = state.average
        if self._decay is not None:
            # In the first steps the decay is lower, so that the average soon forgets
            # the initial weights: the rule of TensorFlow's ExponentialMovingAverage.
            t = state.step.astype(jnp.float32)
            decay = jnp.minimum(self._decay, (1 + t) / (10 + t))
            average = optax.incremental_update(params, average, 1 - decay)
        return (
            TrainState(
                state.step + 1,
                state.seed,
                state.order,
                params,
                statistics,
                opt_state,
                average,
            ),
            loss,
        )

    def gradient(self, state: TrainState, data: Split) -> PyTree:
        """The dense gradient that the next step sees; arguments as those of `step`."""
        state, batch = self._batch(state, data)
        return self.mean(self._gradient(state, batch)[2])

    def steps(
        self, state: TrainState, data: Split, number: int
    ) -> tuple[TrainState, Array]:
        """`number` steps, as a scan if more than one: (state, losses (number,))."""
        if number == 1:
            state, loss = self.step(state, data)
            return state, loss[None]
        return lax.scan(lambda s, _: self.step(s, data), state, length=number)

    def evaluate(self, state: TrainState, batch: Split) -> Score:
        """What the network makes of one batch; a label of -1 is no example."""
        params = self.evaluation_params(state)
        variables = {"params": params, "batch_stats": state.statistics}
        logits = self.model.apply(
            variables,
            self.inputs(batch.inputs),
            train=False,
            **self._with_ghosts(state.step),
        )
        logits = jnp.asarray(logits)
        counted = batch.labels >= 0
        labels = jnp.where(counted, batch.labels, 0)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        right = counted & (jnp.argmax(logits, axis=-1) == labels)
        return Score(
            jnp.sum(right, dtype=jnp.int32), jnp.sum(jnp.where(counted, losses, 0.0))
        )

    def forward_params(self, state: TrainState) -> PyTree:
        """The parameters of the forward pass, at which the gradient is taken."""
        if not self.has_dense_weights:
            return state.params
        return granet_jax.sparse_view(state.params, state.opt_state)

    def evaluation_params(self, state: TrainState) -> PyTree:
        """The parameters that are evaluated: a moving average is masked."""
        if self._decay is None:
            return self.forward_params(state)
        if self.method is None:
            return state.average
        masks = granet_jax.get_masks(state.opt_state)
        return granet_jax.apply_masks(state.average, masks)

    def masks(self, state: TrainState) -> PyTree:
        """The masks; for dense training, masks of which every weight is active."""
        if self.method is not None:
            return granet_jax.get_masks(state.opt_state)
        return granet_jax.init_masks(
            granet_jax.static(0.0), state.params, where=models.maskable
        )

    @property
    def _decay(self) -> float | None:
        return self.config.optimizer.ema

    def _batch(self, state: TrainState, data: Split) -> tuple[TrainState, Split]:
        """The batch of this step as the network takes it, drawn or given."""
        if isinstance(self.dataset, Stream):
            return state, Split(self.inputs(data.inputs), data.labels)
        return self._draw(state, data)

    def _draw(self, state: TrainState, train: Split) -> tuple[TrainState, Split]:
        """The batch of this step, augmented, and the order it was taken from."""
        size, number = len(train.labels), self.config.data.batch_size
        epoch, batch = jnp.divmod(state.step, size // number)
        order = lax.cond(
            batch == 0,
            lambda: jax.random.permutation(_key(state.seed, "order", epoch), size),
            lambda: state.order,
        )
        rows = lax.dynamic_slice_in_dim(order, batch * number, number)
        # Drawn for the whole batch, then split: the same on any number of devices.
        draws: dict[str, Array] = {"rows": rows}
        shift = self.config.shift
        if shift:
            key = _key(state.seed, "shift", state.step)
            draws["corners"] = augment.shifts(key, number, shift)
        if self.config.flip:
            key = _key(state.seed, "flip", state.step)
            draws["mirrored"] = jax.random.bernoulli(key, shape=(number,))
        draws = self.split(draws)
        inputs = jnp.asarray(train.inputs)[draws["rows"]]
        if shift:
            inputs = augment.shifted(inputs, draws["corners"], shift)
        if self.config.flip:
            inputs = augment.mirrored(inputs, draws["mirrored"])
        labels = jnp.asarray(train.labels)[draws["rows"]]
        return state._replace(order=order), Split(self.inputs(inputs), labels)

    def inputs(self, raw: Any) -> Array:
        """What the network takes: normalised images, or text as it is."""
        if not self.dataset.mean:
            return jnp.asarray(raw)
        return augment.normalised(raw, self.dataset.mean, self.dataset.std)

    def _gradient(
        self, state: TrainState, batch: Split
    ) -> tuple[Array, PyTree, PyTree]:
        """(loss, batch statistics, gradient) of a batch, cut into parts if so told."""
        parts = self.config.optimizer.accumulate
        differentiate = jax.value_and_grad(self._loss, has_aux=True)
        params = self.forward_params(state)
        if parts == 1:
            (loss, statistics), grads = differentiate(
                params, state.statistics, batch, state.step
            )
            return loss, statistics, grads

        # Part i takes every parts-th row: the rows stay on the devices they are on.
        cut = jax.tree.map(
            lambda x: jnp.moveaxis(
                x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0
            ),
            batch,
        )

        def add(carry: PyTree, part: Split) -> tuple[PyTree, None]:
            loss, statistics, grads = carry
            (more, statistics), new = differentiate(
                params, statistics, part, state.step
            )
            return (loss + more, statistics, jax.tree.map(jnp.add, grads, new)), None

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        start = (jnp.float32(0), state.statistics, zeros)
        (loss, statistics, grads), _ = lax.scan(add, start, cut)
        return loss / parts, statistics, jax.tree.map(lambda g: g / parts, grads)

    def _loss(
        self, params: PyTree, statistics: PyTree, batch: Split, step: Array
    ) -> tuple[Array, PyTree]:
        logits, statistics = self.logits(
            params, statistics, jnp.asarray(batch.inputs), step
        )
        labels = jnp.asarray(batch.labels)
        smoothing = self.config.optimizer.label_smoothing
        refined = tost.label_alpha(self.config.tost.build(), self.config.steps)
        if refined is not None:
            losses = tost.smoothed_cross_entropy(logits, labels, refined(step))
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
        """What the network in training makes of a batch, and its new statistics."""
        logits, changed = self.model.apply(
            {"params": params, "batch_stats": statistics},
            inputs,
            train=True,
            mutable=["batch_stats"],
            **self._with_ghosts(step),
        )
        return jnp.asarray(logits), changed.get("batch_stats", statistics)

    def _with_ghosts(self, step: Array | int) -> dict[str, Any]:
        """Arguments of the network's call that put the ghosts of a step into it."""
        if not self.ghosts:
            return {}
        config, steps = self.config.tost.build(), self.config.steps
        soft, alpha = tost.activation(config, steps), tost.skip_alpha(config, steps)
        skip = None
        if config.skips is not None and alpha is not None:
            skip = models.Skip(config.skips, alpha(step))
        if soft is None:
            return {"ghosts": models.Ghosts(skip=skip)}
        return {"ghosts": models.Ghosts(lambda x: soft(x, step), skip)}


def _key(seed: Array, purpose: str, number: Array | int) -> Array:
    streams = {"init": 0, "order": 1, "shift": 2, "flip": 3}
    stream = jax.random.fold_in(jax.random.key(seed), streams[purpose])
    return jax.random.fold_in(stream, number)
