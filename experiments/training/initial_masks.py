"""Initial masks from scores of the initial weights, instead of random masks."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments import models
from experiments.data import Stream
from experiments.training.step import TrainStep
from granet_jax import mask_sources

PyTree = Any
# Largest number of examples in a batch.
_BATCH = 128
# The number in the authors' code of GraSP and of SynFlow.
_IMAGES_PER_CLASS = 10
# Rounds of iterative SNIP: the default of FORCE, whose authors use the same for both.
_ROUNDS = 60
# The authors' code of GraSP divides the logits by this number.
_TEMPERATURE = 200.0


def masks(
    train_step: TrainStep, params: PyTree, statistics: PyTree, seed: int
) -> PyTree:
    """Return the masks of the configured source.

    Args:
      train_step: Pure functions for one device, without ghosts; the configuration has
        a source of masks.
      params: Initial parameters.
      statistics: Initial batch statistics.
      seed: Seed of the run.

    Raises:
      ValueError: The source does not support the data or the network.
    """
    masks, method = train_step.config.masks, train_step.method
    assert method is not None
    sparsity, where = method.sparsity(0), models.maskable
    rounds: dict[str, Any] = {} if masks.rounds is None else {"rounds": masks.rounds}
    if masks.source == "magnitude":
        return mask_sources.magnitude(params, sparsity, where=where)
    if masks.source == "synflow":
        _check_images(train_step)
        image = jnp.ones((1, *train_step.input_shape))
        # SynFlow uses float64 parameters, and dtype=None computes in their precision.
        model = train_step.model.clone(dtype=None)
        return mask_sources.synflow(
            inference(model, statistics), params, image, sparsity, where=where, **rounds
        )

    def training(params: PyTree, inputs: Array) -> Array:
        return train_step.logits(params, statistics, inputs, 0)[0]

    # Batch norms are in the mode of each method's own code: batch statistics for GraSP
    # and FORCE, running statistics (0 and 1) for SNIP and SynFlow.
    score, apply, temperature = {
        "snip": (mask_sources.snip, inference(train_step.model, statistics), 1.0),
        "iterative-snip": (_iterative_snip, training, 1.0),
        "force": (mask_sources.force, training, 1.0),
        "grasp": (mask_sources.grasp, training, _TEMPERATURE),
    }[masks.source or ""]
    loss = mask_sources.cross_entropy(apply, temperature)
    batches = examples(train_step, seed)
    return score(loss, params, batches, sparsity, where=where, **rounds)


_iterative_snip = functools.partial(mask_sources.snip, rounds=_ROUNDS)


def inference(model: nn.Module, statistics: PyTree) -> Callable[..., Array]:
    """Return the function (params, inputs) -> logits of a network in test mode."""

    def apply(params: PyTree, inputs: Array) -> Array:
        variables = {"params": params, "batch_stats": statistics}
        return jnp.asarray(model.apply(variables, inputs, train=False))

    return apply


def examples(train_step: TrainStep, seed: int) -> list[tuple[Array, Array]]:
    """Return training examples for a source, as batches of (inputs, labels).

    The seed chooses the examples, with equal numbers per class as far as possible and
    without augmentation. For a stream they are its first examples, with augmentation.

    Raises:
      ValueError: The configuration asks for more examples than there are.
    """
    config, dataset = train_step.config, train_step.dataset
    number = config.masks.images or _IMAGES_PER_CLASS * dataset.classes
    batches = math.ceil(number / _BATCH)
    if isinstance(dataset, Stream):
        size = math.ceil(number / batches)
        stream = dataset.train_batches(
            seed=seed, start=0, batch_size=size, process=0, processes=1, workers=0
        )
        splits = [next(stream) for _ in range(batches)]
        return [(train_step.inputs(x.inputs), jnp.asarray(x.labels)) for x in splits]
    inputs, labels = map(np.asarray, dataset.train)
    if number > len(labels):
        raise ValueError(
            f"masks.images must be at most the {len(labels)} training examples of "
            f"{dataset.name}, got {number}."
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    if labels.ndim == 1:
        # Sort: the first example of every class, the second of every class, ...
        rank = np.zeros(len(labels), int)
        for label in range(dataset.classes):
            members = labels[order] == label
            rank[members] = np.arange(members.sum())
        order = order[np.argsort(rank, kind="stable")]
    return [
        (train_step.inputs(inputs[rows]), jnp.asarray(labels[rows]))
        for rows in np.array_split(order[:number], batches)
    ]


def _check_images(train_step: TrainStep) -> None:
    dataset = train_step.dataset
    if not dataset.mean:
        raise ValueError(
            f"masks.source synflow takes a network of images, and {dataset.name} is "
            "text: choose another source."
        )
