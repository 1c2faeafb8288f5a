"""Initial masks from scores of the initial weights, instead of drawn ones."""

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
# Examples at once, at most.
_BATCH = 128
# As in the code of GraSP and of SynFlow.
_IMAGES_A_CLASS = 10
# Of iterative SNIP, as the library has it for FORCE: the authors' for both.
_ROUNDS = 60
# GraSP's code divides the logits by it.
_TEMPERATURE = 200.0


def masks(
    train_step: TrainStep, params: PyTree, statistics: PyTree, seed: int
) -> PyTree:
    """The configured masks.

    Args:
      functions: of a configuration with a source, for one device and without ghosts.
      params: initial parameters.
      statistics: initial batch statistics.
      seed: of the run.

    Raises:
      ValueError: the data, or the network, is not for the source.
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
        # In the precision of the parameters, which SynFlow makes float64.
        wide = train_step.model.clone(dtype=None)
        return mask_sources.synflow(
            inference(wide, statistics), params, image, sparsity, where=where, **rounds
        )

    def in_training(params: PyTree, inputs: Array) -> Array:
        return train_step.logits(params, statistics, inputs, 0)[0]

    # The mode of the norms is that of each method's own code: batch statistics for
    # GraSP and FORCE, running ones (0 and 1) for SNIP and SynFlow.
    score, apply, temperature = {
        "snip": (mask_sources.snip, inference(train_step.model, statistics), 1.0),
        "iterative-snip": (_iterative_snip, in_training, 1.0),
        "force": (mask_sources.force, in_training, 1.0),
        "grasp": (mask_sources.grasp, in_training, _TEMPERATURE),
    }[masks.source or ""]
    loss = mask_sources.cross_entropy(apply, temperature)
    batches = examples(train_step, seed)
    return score(loss, params, batches, sparsity, where=where, **rounds)


_iterative_snip = functools.partial(mask_sources.snip, rounds=_ROUNDS)


def inference(model: nn.Module, statistics: PyTree) -> Callable[..., Array]:
    """A network without ghosts as a function of (params, inputs), as it is tested."""

    def apply(params: PyTree, inputs: Array) -> Array:
        variables = {"params": params, "batch_stats": statistics}
        return jnp.asarray(model.apply(variables, inputs, train=False))

    return apply


def examples(train_step: TrainStep, seed: int) -> list[tuple[Array, Array]]:
    """Training examples for a source: batches of (inputs, labels), not augmented.

    They are drawn by the seed, as many of each class as can be. (Of a stream they are
    its first ones, with its augmentation.)

    Raises:
      ValueError: more are asked for than there are.
    """
    config, dataset = train_step.config, train_step.dataset
    wanted = config.masks.images or _IMAGES_A_CLASS * dataset.classes
    batches = math.ceil(wanted / _BATCH)
    if isinstance(dataset, Stream):
        size = math.ceil(wanted / batches)
        stream = dataset.train_batches(
            seed=seed, start=0, batch_size=size, process=0, processes=1, workers=0
        )
        drawn = [next(stream) for _ in range(batches)]
        return [(train_step.inputs(x.inputs), jnp.asarray(x.labels)) for x in drawn]
    inputs, labels = map(np.asarray, dataset.train)
    if wanted > len(labels):
        raise ValueError(
            f"masks.images must be at most the {len(labels)} training examples of "
            f"{dataset.name}, got {wanted}."
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    if labels.ndim == 1:
        # The first example of every class, then the second of every class, ...
        number = np.zeros(len(labels), int)
        for label in range(dataset.classes):
            members = labels[order] == label
            number[members] = np.arange(members.sum())
        order = order[np.argsort(number, kind="stable")]
    return [
        (train_step.inputs(inputs[rows]), jnp.asarray(labels[rows]))
        for rows in np.array_split(order[:wanted], batches)
    ]


def _check_images(train_step: TrainStep) -> None:
    dataset = train_step.dataset
    if not dataset.mean:
        raise ValueError(
            f"masks.source synflow takes a network of images, and {dataset.name} is "
            "text: choose another source."
        )
