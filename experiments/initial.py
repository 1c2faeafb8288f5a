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
from experiments import models, sources
from experiments.data import Stream
from experiments.parallel import Program
from experiments.step import Functions, TrainState
from granet_jax import mask_sources, masking, tost

PyTree = Any


def replaced(program: Program, state: PyTree, seeds: Sequence[int]) -> PyTree:
    """A state at step 0 with the configured masks and scales, if there are some.

    Args:
      program: for step 0.
      state: of the program, at step 0.
      seeds: of its lanes.

    Raises:
      ValueError: the data, or the network, is not for the source of masks.
    """
    config = program.functions.config
    if config.masks.source is None and not config.tost.lrsi:
        return state
    functions = Functions(
        config, program.functions.dataset, ghosts=program.functions.ghosts
    )
    found = [weights(functions, seed) for seed in seeds]
    if config.vmap_seeds and config.seeds > 1:
        params, masks = jax.tree.map(lambda *lanes: np.stack(lanes), *found)
    else:
        ((params, masks),) = found

    def put(state: TrainState, params: PyTree, masks: PyTree) -> TrainState:
        average = () if state.average == () else jax.tree.map(jnp.copy, params)
        opt_state = state.opt_state
        if masks is not None:
            opt_state = granet_jax.set_masks(opt_state, masks)
        return state._replace(params=params, opt_state=opt_state, average=average)

    shardings = jax.tree.map(lambda x: x.sharding, program.abstract())
    into = jax.jit(put, out_shardings=shardings)
    return program.restore(into(program.snapshot(state), params, masks))


def weights(functions: Functions, seed: int) -> tuple[PyTree, PyTree]:
    """Initial parameters and masks of a run, on the host.

    The masks are those of the plain network, whatever ghosts there are.

    Args:
      functions: for one device.
      seed: of the run.

    Returns:
      (parameters, masks); None for the masks of dense training.
    """
    config, method = functions.config, functions.method
    variables = jax.jit(functions.variables)(np.uint32(seed))
    params, statistics = variables["params"], variables.get("batch_stats", {})
    masks = None
    if method is not None:
        draw = functools.partial(
            granet_jax.init_masks, method, where=models.maskable, seed=seed
        )
        if config.masks.source is None:
            masks = jax.jit(draw)(params)
        else:
            plain = Functions(config, functions.dataset)
            kept, kept_statistics = tost.drop_ghosts((params, statistics))
            found = sources.masks(plain, kept, kept_statistics, seed)
            masks = _as_in(jax.eval_shape(draw, params), found)
        params = granet_jax.apply_masks(params, masks)
    settings = config.tost.build().lrsi
    if settings is not None:

        def logits(params: PyTree, inputs: Array) -> Array:
            return functions.logits(params, statistics, inputs, 0)[0]

        loss = mask_sources.cross_entropy(logits)
        batches = _batches(functions, seed)
        params = tost.rescale_init(loss, params, masks, batches, settings).params
    return jax.device_get((params, masks))


def _as_in(tree: PyTree, masks: PyTree) -> PyTree:
    """Masks at the leaves of a tree of more leaves that have none."""
    by_name = {
        masking.leaf_name(path): mask
        for path, mask in jax.tree_util.tree_leaves_with_path(masks)
    }
    return jax.tree_util.tree_map_with_path(
        lambda path, _: by_name[masking.leaf_name(path)], tree
    )


def _batches(functions: Functions, seed: int) -> Iterator[tuple[Array, Array]]:
    """Random batches of training examples without end, not augmented."""
    config, dataset = functions.config, functions.dataset
    size = config.data.batch_size
    if isinstance(dataset, Stream):
        stream = dataset.train_batches(
            seed=seed, start=0, batch_size=size, process=0, processes=1, workers=0
        )
        for batch in stream:
            yield functions.inputs(batch.inputs), jnp.asarray(batch.labels)
    else:
        inputs, labels = map(np.asarray, dataset.train)
        rng = np.random.default_rng(seed)
        while True:
            rows = rng.choice(len(labels), size, replace=False)
            yield functions.inputs(inputs[rows]), jnp.asarray(labels[rows])
