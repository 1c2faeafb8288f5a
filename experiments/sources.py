"""Initial masks from scores of the initial weights, instead of drawn ones."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments import models
from experiments.data import Stream
from experiments.step import Functions
from granet_jax import mask_sources

PyTree = Any
# Examples at once, at most.
_BATCH = 128
# As in the code of GraSP and of SynFlow.
_IMAGES_A_CLASS = 10
# The authors' of FORCE and of SynFlow.
_ROUNDS = {"iterative-snip": 60, "force": 60, "synflow": 100}
# GraSP's code divides the logits by it.
_TEMPERATURE = 200.0


def masks(
    functions: Functions, params: PyTree, statistics: PyTree, seed: int
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
    config, method = functions.config, functions.method
    assert method is not None
    sparsity = method.sparsity(0)
    rounds = config.masks.rounds or _ROUNDS.get(config.masks.source or "", 1)

    def loss(*, train: bool, temperature: float = 1.0) -> Callable[..., Array]:
        return mask_sources.cross_entropy(
            _apply(functions, statistics, train=train), temperature=temperature
        )

    # The mode of the norms is that of each method's own code: batch statistics for
    # GraSP and FORCE, running ones (0 and 1) for SNIP and SynFlow.
    match config.masks.source:
        case "magnitude":
            return mask_sources.magnitude(params, sparsity, where=models.maskable)
        case "snip":
            return mask_sources.snip(
                loss(train=False),
                params,
                examples(functions, seed),
                sparsity,
                where=models.maskable,
            )
        case "iterative-snip":
            return mask_sources.snip(
                loss(train=True),
                params,
                examples(functions, seed),
                sparsity,
                where=models.maskable,
                rounds=rounds,
            )
        case "force":
            return mask_sources.force(
                loss(train=True),
                params,
                examples(functions, seed),
                sparsity,
                where=models.maskable,
                rounds=rounds,
            )
        case "grasp":
            return mask_sources.grasp(
                loss(train=True, temperature=_TEMPERATURE),
                params,
                examples(functions, seed),
                sparsity,
                where=models.maskable,
            )
        case "synflow":
            return mask_sources.synflow(
                _linear(functions, statistics),
                params,
                _image(functions),
                sparsity,
                where=models.maskable,
                rounds=rounds,
            )
        case source:
            raise ValueError(f"masks.source must be a source, got {source!r}.")


def examples(functions: Functions, seed: int) -> list[tuple[Array, Array]]:
    """Training examples for a source: batches of (inputs, labels), not augmented.

    They are drawn by the seed, as many of each class as can be. (Of a stream they are
    its first ones, with its augmentation.)

    Raises:
      ValueError: more are asked for than there are.
    """
    config, dataset = functions.config, functions.dataset
    wanted = config.masks.images or _IMAGES_A_CLASS * dataset.classes
    batches = math.ceil(wanted / _BATCH)
    if isinstance(dataset, Stream):
        size = math.ceil(wanted / batches)
        stream = dataset.train_batches(
            seed=seed, start=0, batch_size=size, process=0, processes=1, workers=0
        )
        drawn = [next(stream) for _ in range(batches)]
        return [(functions.inputs(x.inputs), jnp.asarray(x.labels)) for x in drawn]
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
        (functions.inputs(inputs[rows]), jnp.asarray(labels[rows]))
        for rows in np.array_split(order[:wanted], batches)
    ]


def _apply(
    functions: Functions, statistics: PyTree, *, train: bool
) -> Callable[[PyTree, Array], Array]:
    """The network as a function of (params, inputs); norms change no statistics."""

    def apply(params: PyTree, inputs: Array) -> Array:
        variables = {"params": params, "batch_stats": statistics}
        logits, _ = functions.model.apply(
            variables, inputs, train=train, mutable=["batch_stats"]
        )
        return jnp.asarray(logits)

    return apply


def _linear(
    functions: Functions, statistics: PyTree
) -> Callable[[PyTree, Array], Array]:
    """The network in inference form and in the precision of its parameters."""
    model = functions.model.clone(dtype=None)

    def apply(params: PyTree, inputs: Array) -> Array:
        variables = {"params": params, "batch_stats": statistics}
        return jnp.asarray(model.apply(variables, inputs, train=False))

    return apply


def _image(functions: Functions) -> Array:
    dataset = functions.dataset
    if not dataset.mean:
        raise ValueError(
            f"masks.source synflow takes a network of images, and {dataset.name} is "
            "text: choose another source."
        )
    if isinstance(dataset, Stream):
        shape = dataset.image_shape
    else:
        shape = dataset.train.inputs.shape[1:]
    return jnp.ones((1, *shape))
