"""The state that training starts from, where it is not the drawn one.

Masks from a source, and scales of the initial parameters (LRsI of ToST), are computed
on the host's first device before training, by every process alike, so that they are the
same on any number of devices.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import granet_jax
from experiments import models
from experiments.data import Stream
from experiments.training import initial_masks, ticket_files
from experiments.training.devices import CompiledStep
from experiments.training.step import TrainState, TrainStep
from granet_jax import mask_sources, masking, tost

PyTree = Any


def state(compiled_step: CompiledStep, seeds: Sequence[int]) -> PyTree:
    """The state at step 0, with the configured masks and scales, if there are some.

    Args:
      program: for step 0.
      seeds: of its lanes.

    Raises:
      ValueError: the data, or the network, is not for the source of masks.
    """
    config = compiled_step.train_step.config
    drawn = compiled_step.create(seeds)
    if config.masks.source is None and not config.tost.lrsi:
        return drawn
    train_step = TrainStep(
        config, compiled_step.train_step.dataset, ghosts=compiled_step.train_step.ghosts
    )
    found = [weights(train_step, seed) for seed in seeds]
    if config.vmap_seeds and config.seeds > 1:
        params, masks = jax.tree.map(lambda *lanes: np.stack(lanes), *found)
    else:
        ((params, masks),) = found
    return with_weights(compiled_step, drawn, params, masks)


def with_weights(
    compiled_step: CompiledStep, state: PyTree, params: PyTree, masks: PyTree | None
) -> PyTree:
    """A state with these parameters and masks, on the program's devices.

    Args:
      program: of the state.
      state: its moments are left as they are.
      params: on the host, with an axis of lanes where the program has several.
      masks: likewise; None for dense training.
    """

    def put(state: TrainState, params: PyTree, masks: PyTree) -> TrainState:
        average = () if state.average == () else jax.tree.map(jnp.copy, params)
        opt_state = state.opt_state
        if masks is not None:
            opt_state = granet_jax.set_masks(opt_state, masks)
        return state._replace(params=params, opt_state=opt_state, average=average)

    shardings = jax.tree.map(lambda x: x.sharding, compiled_step.abstract())
    into = jax.jit(put, out_shardings=shardings)
    return compiled_step.restore(into(compiled_step.snapshot(state), params, masks))


def weights(train_step: TrainStep, seed: int) -> tuple[PyTree, PyTree]:
    """Initial parameters and masks of a run, on the host.

    The masks are those of the plain network, whatever ghosts there are.

    Args:
      functions: for one device.
      seed: of the run.

    Returns:
      (parameters, masks); None for the masks of dense training.
    """
    config, method = train_step.config, train_step.method
    variables = jax.jit(train_step.variables)(np.uint32(seed))
    params, statistics = variables["params"], variables.get("batch_stats", {})
    masks = None
    if method is not None:
        draw = functools.partial(
            granet_jax.init_masks, method, where=models.maskable, seed=seed
        )
        if config.masks.source is None:
            masks = jax.jit(draw)(params)
        else:
            plain = TrainStep(config, train_step.dataset)
            kept, kept_statistics = tost.drop_ghosts((params, statistics))
            if config.masks.tickets is not None:
                kept, found = ticket_files.read(
                    config.masks.tickets,
                    seed,
                    method.sparsity(0),
                    kept,
                    jax.eval_shape(draw, kept),
                )
                params = _with(params, kept)
            else:
                found = initial_masks.masks(plain, kept, kept_statistics, seed)
            masks = _with(jax.eval_shape(draw, params), found)
        if not train_step.has_dense_weights:
            params = granet_jax.apply_masks(params, masks)
    settings = config.tost.build().lrsi
    if settings is not None:

        def logits(params: PyTree, inputs: Array) -> Array:
            return train_step.logits(params, statistics, inputs, 0)[0]

        loss = mask_sources.cross_entropy(logits)
        batches = _batches(train_step, seed)
        params = tost.rescale_init(loss, params, masks, batches, settings).params
    return jax.device_get((params, masks))


def _with(tree: PyTree, leaves: PyTree) -> PyTree:
    """A tree with those of its leaves replaced that another one has."""
    by_name = {
        masking.leaf_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(leaves)
    }
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: by_name.get(masking.leaf_name(path), leaf), tree
    )


def _batches(train_step: TrainStep, seed: int) -> Iterator[tuple[Array, Array]]:
    """Random batches of training examples without end, not augmented."""
    config, dataset = train_step.config, train_step.dataset
    size = config.data.batch_size
    if isinstance(dataset, Stream):
        stream = dataset.train_batches(
            seed=seed, start=0, batch_size=size, process=0, processes=1, workers=0
        )
        for batch in stream:
            yield train_step.inputs(batch.inputs), jnp.asarray(batch.labels)
    else:
        inputs, labels = map(np.asarray, dataset.train)
        rng = np.random.default_rng(seed)
        while True:
            rows = rng.choice(len(labels), size, replace=False)
            yield train_step.inputs(inputs[rows]), jnp.asarray(labels[rows])
