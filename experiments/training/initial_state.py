"""The state at the start of training, with masks and scales computed from the weights.

Masks from a source and the scales of LRsI (ToST) are computed before training, by every
process on its own first device, so they do not depend on the number of devices. With
`init_from`, the weights are those of a finished run.
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
from experiments.training import finished_run, initial_masks, ticket_files
from experiments.training.devices import CompiledStep
from experiments.training.step import TrainState, TrainStep
from granet_jax import distributions, mask_sources, masking, tost

PyTree = Any


def state(compiled_step: CompiledStep, seeds: Sequence[int]) -> PyTree:
    """Return the state at step 0, with the configured masks and scales.

    Args:
      compiled_step: Compiled functions for step 0.
      seeds: Seeds, one per lane.

    Raises:
      ValueError: The source of the masks does not support the data or the network.
    """
    train_step = compiled_step.train_step
    config = train_step.config
    random_state = compiled_step.create(seeds)
    if (
        config.masks.source is None
        and config.init_from is None
        and not config.tost.lrsi
    ):
        return random_state
    single_device = TrainStep(config, train_step.dataset, ghosts=train_step.ghosts)
    lanes = [weights(single_device, seed) for seed in seeds]
    if config.vmap_seeds and config.seeds > 1:
        params, statistics, masks = jax.tree.map(
            lambda *leaves: np.stack(leaves), *lanes
        )
    else:
        ((params, statistics, masks),) = lanes
    return with_weights(compiled_step, random_state, params, masks, statistics)


def with_weights(
    compiled_step: CompiledStep,
    state: PyTree,
    params: PyTree,
    masks: PyTree | None,
    statistics: PyTree | None = None,
) -> PyTree:
    """Replace the parameters and masks of a state. Moments are left unchanged.

    Args:
      compiled_step: Compiled functions to which the state belongs.
      state: State on the devices.
      params: Parameters on the host, with a lane axis if there are several lanes.
      masks: Masks on the host, with the same axes; None for dense training.
      statistics: Batch statistics on the host, likewise; None to keep those of `state`.
    """

    def replace(
        state: TrainState, params: PyTree, masks: PyTree, statistics: PyTree
    ) -> TrainState:
        average = () if state.average == () else jax.tree.map(jnp.copy, params)
        opt_state = state.opt_state
        if masks is not None:
            opt_state = granet_jax.set_masks(opt_state, masks)
        return state._replace(
            params=params,
            statistics=state.statistics if statistics is None else statistics,
            opt_state=opt_state,
            average=average,
        )

    shardings = jax.tree.map(lambda x: x.sharding, compiled_step.abstract())
    replace_on_devices = jax.jit(replace, out_shardings=shardings)
    snapshot = compiled_step.snapshot(state)
    return compiled_step.restore(
        replace_on_devices(snapshot, params, masks, statistics)
    )


def weights(train_step: TrainStep, seed: int) -> tuple[PyTree, PyTree, PyTree]:
    """Return the initial parameters, batch statistics and masks of a run, on the host.

    The masks are computed from the plain network, without ghosts.

    Args:
      train_step: Pure functions for one device.
      seed: Seed of the run.

    Returns:
      (parameters, statistics, masks); the masks are None for dense training.
    """
    variables = jax.jit(train_step.variables)(np.uint32(seed))
    params, statistics = variables["params"], variables.get("batch_stats", {})
    masks = held = None
    if train_step.config.init_from is not None:
        params, statistics, held = _result(train_step, params, statistics, seed)
    if train_step.method is not None:
        params, masks = _params_and_masks(train_step, params, statistics, seed, held)
        if not train_step.has_dense_weights:
            params = granet_jax.apply_masks(params, masks)
    lrsi = train_step.config.tost.build().lrsi
    if lrsi is not None:

        def logits(params: PyTree, inputs: Array) -> Array:
            return train_step.logits(params, statistics, inputs, 0)[0]

        loss = mask_sources.cross_entropy(logits)
        batches = _batches(train_step, seed)
        params = tost.rescale_init(loss, params, masks, batches, lrsi).params
    return jax.device_get((params, statistics, masks))


def _result(
    train_step: TrainStep, params: PyTree, statistics: PyTree, seed: int
) -> finished_run.Result:
    """Return the result of the run to start from. Ghosts keep their initial values."""
    assert train_step.config.init_from is not None
    plain_params, plain_statistics = tost.drop_ghosts((params, statistics))
    all_masks = functools.partial(
        granet_jax.init_masks, granet_jax.static(0.0), where=models.maskable
    )
    shapes = jax.eval_shape(all_masks, plain_params)
    result = finished_run.read(
        train_step.config.init_from, seed, plain_params, plain_statistics, shapes
    )
    return result._replace(
        params=_with_leaves(params, result.params),
        statistics=_with_leaves(statistics, result.statistics),
    )


def _params_and_masks(
    train_step: TrainStep,
    params: PyTree,
    statistics: PyTree,
    seed: int,
    held: PyTree | None,
) -> tuple[PyTree, PyTree]:
    """Return the masks from the configured source, and a ticket's parameters.

    Without a source they are random, or `held`, the masks of the run to start from.
    """
    config, method = train_step.config, train_step.method
    assert method is not None
    random_masks = functools.partial(
        granet_jax.init_masks, method, where=models.maskable, seed=seed
    )
    if config.masks_from is None:
        return params, jax.jit(random_masks)(params)
    plain_params, plain_statistics = tost.drop_ghosts((params, statistics))
    if config.masks.source is None:
        _check_held(train_step, held)
        plain_masks = held
    elif config.masks.tickets is not None:
        plain_params, plain_masks = ticket_files.read(
            config.masks.tickets,
            seed,
            method.sparsity(0),
            plain_params,
            jax.eval_shape(random_masks, plain_params),
        )
        params = _with_leaves(params, plain_params)
    else:
        plain_step = TrainStep(config, train_step.dataset)
        plain_masks = initial_masks.masks(
            plain_step, plain_params, plain_statistics, seed
        )
    shapes = jax.eval_shape(random_masks, params)
    return params, _with_leaves(shapes, plain_masks)


def _check_held(train_step: TrainStep, held: PyTree | None) -> None:
    config, method = train_step.config, train_step.method
    assert method is not None
    start = method.sparsity(0)
    if held is None:
        raise ValueError(
            f"init_from: {config.init_from} was trained densely, and {config.method} "
            f"starts at sparsity {start:g}: give --masks.source magnitude to prune its "
            "weights at once, or a method that prunes gradually, such as gmp."
        )
    report = granet_jax.sparsity(held)
    if report.active != distributions.total_count(report.total, start):
        raise ValueError(
            f"init_from: {config.init_from} ended at sparsity {report.overall:g}, and "
            f"{config.method} starts at {start:g}: give that sparsity "
            "(--masks.initial-sparsity for a method that prunes further)."
        )


def _with_leaves(tree: PyTree, leaves: PyTree) -> PyTree:
    """Replace the leaves of `tree` whose names occur in `leaves`."""
    by_name = {
        masking.leaf_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(leaves)
    }
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: by_name.get(masking.leaf_name(path), leaf), tree
    )


def _batches(train_step: TrainStep, seed: int) -> Iterator[tuple[Array, Array]]:
    """Yield random training batches without end and without augmentation."""
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
