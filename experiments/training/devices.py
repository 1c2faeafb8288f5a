"""A configuration compiled for the devices there are: one program, in three forms.

- `jit` over a mesh with the axes "data" and "fsdp": each batch is split over all
  devices, and parameters, moments and masks over those of the axis "fsdp".
- `pmap`: one program a device, gradients averaged.
- `vmap` over seeds: several training runs at once, on one device.

All give states of the same meaning: a checkpoint of one form resumes in the others, on
any number of devices, `vmap` aside, which holds several runs.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.config.run import Config
from experiments.data import Dataset, Split, Stream
from experiments.training.step import Score, TrainState, TrainStep
from granet_jax import masking

PyTree = Any
# A leaf with fewer elements costs less to keep whole than to gather in every step.
_SHARDED_FROM = 1024
_BATCH = P(("data", "fsdp"))


class Inspection(NamedTuple):
    """What a look at a state tells.

    Attributes:
      active: int32 (leaves,), active weights of every maskable leaf.
      broken: int32 (leaves,), pruned weights that are not zero.
      finite: bool scalar, whether all parameters are.
    """

    active: Array
    broken: Array
    finite: Array


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """The compiled functions of a configuration.

    Attributes:
      functions: what they were compiled from.
      lanes: training runs at once: seeds under `vmap`, else 1.
      devices: that a batch is split over.
      create: from seeds (lanes,) to the state at step 0.
      steps: from (state, data, number of steps) to (state, losses (lanes, number)). The
        given state is donated. Does not wait for the device.
      evaluate: from (state, batch) to the scores, (lanes,) each.
      inspect: an `Inspection` of the state, with a leading axis of lanes.
      place: training data, or a batch of a stream (of this process), on the devices.
      place_test: a test batch on the devices, from all rows (or of a stream those of
        this process).
      snapshot: a copy of the state, to be saved: one state over all processes.
      abstract: shapes, dtypes and shardings of a snapshot.
      restore: from a snapshot to a state.
    """

    train_step: TrainStep
    lanes: int
    devices: int
    create: Callable[[Sequence[int]], PyTree]
    steps: Callable[[PyTree, PyTree, int], tuple[PyTree, Array]]
    evaluate: Callable[[PyTree, PyTree], Score]
    inspect: Callable[[PyTree], Inspection]
    place: Callable[[Split], PyTree]
    place_test: Callable[[Split], PyTree]
    snapshot: Callable[[PyTree], TrainState]
    abstract: Callable[[], TrainState]
    restore: Callable[[TrainState], PyTree]


def compile_step(
    config: Config,
    dataset: Dataset | Stream,
    devices: Sequence[Any] | None = None,
    *,
    ghosts: bool = False,
) -> CompiledStep:
    """The program of a configuration; nothing is compiled before it is needed.

    Args:
      config: see `parallel`, `fsdp`, `vmap_seeds` and `data.batch_size`.
      dataset: what it trains on.
      devices: JAX devices to use; by default all, of all processes.
      ghosts: whether the network has the configured ghosts.

    Raises:
      ValueError: a batch that cannot be split over the devices; more seeds at once
        than one device can take.
    """
    devices = jax.devices() if devices is None else devices
    if config.vmap_seeds and config.seeds > 1:
        if len(devices) > 1:
            raise ValueError(
                f"vmap_seeds trains on one device, got {len(devices)}: leave it out, "
                "or make one visible (CUDA_VISIBLE_DEVICES, JAX_NUM_CPU_DEVICES)."
            )
        return _vmapped(TrainStep(config, dataset, ghosts=ghosts))
    part = config.data.batch_size // config.optimizer.accumulate
    if part % len(devices):
        raise ValueError(
            f"data.batch_size / optimizer.accumulate must be a multiple of the "
            f"{len(devices)} devices, got {part}."
        )
    if config.parallel == "pmap":
        return _pmapped(config, dataset, devices, ghosts)
    return _jitted(config, dataset, devices, ghosts)


def _jitted(
    config: Config, dataset: Dataset | Stream, devices: Sequence[Any], ghosts: bool
) -> CompiledStep:
    fsdp = config.fsdp
    if len(devices) % fsdp:
        raise ValueError(
            f"fsdp must divide the number of devices, {len(devices)}, got {fsdp}."
        )
    mesh = jax.make_mesh(
        (len(devices) // fsdp, fsdp),
        ("data", "fsdp"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=tuple(devices),
    )
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, _BATCH)

    def split(batch: PyTree) -> PyTree:
        return jax.tree.map(lambda x: lax.with_sharding_constraint(x, rows), batch)

    train_step = TrainStep(config, dataset, split=split, ghosts=ghosts)
    shapes = jax.eval_shape(train_step.create, jnp.uint32(0))
    shardings = _state_shardings(shapes, mesh, fsdp)
    streamed = isinstance(dataset, Stream)

    def steps(state: PyTree, data: Split, number: int) -> tuple[PyTree, Array]:
        state, losses = train_step.steps(state, data, number)
        return state, losses[None]

    create = jax.jit(train_step.create, out_shardings=shardings)
    return CompiledStep(
        train_step=train_step,
        lanes=1,
        devices=len(devices),
        create=lambda seeds: create(np.uint32(seeds[0])),
        steps=jax.jit(
            steps,
            static_argnums=2,
            donate_argnums=0,
            out_shardings=(shardings, whole),
        ),
        evaluate=jax.jit(_lane(train_step.evaluate), out_shardings=whole),
        inspect=jax.jit(_lane(_inspector(train_step)), out_shardings=whole),
        place=_local_rows(rows) if streamed else _copies(whole),
        place_test=_local_rows(rows) if streamed else _copies(rows),
        snapshot=jax.jit(_copy, out_shardings=shardings),
        abstract=lambda: _abstract(shapes, shardings),
        restore=lambda state: state,
    )


def _pmapped(
    config: Config, dataset: Dataset | Stream, devices: Sequence[Any], ghosts: bool
) -> CompiledStep:
    axis = "devices"
    here = [d for d in devices if d.process_index == jax.process_index()]
    pmap = functools.partial(jax.pmap, axis_name=axis, devices=devices)

    def split(batch: PyTree) -> PyTree:
        def part(x: Array) -> Array:
            size = x.shape[0] // len(devices)
            return lax.dynamic_slice_in_dim(x, lax.axis_index(axis) * size, size)

        return jax.tree.map(part, batch)

    train_step = TrainStep(
        config,
        dataset,
        split=split,
        mean=lambda tree: lax.pmean(tree, axis),
        axis_name=axis,
        ghosts=ghosts,
    )
    # Outside pmap there is no axis: the same functions, of the whole batch.
    plain = TrainStep(config, dataset, ghosts=ghosts)
    shapes = jax.eval_shape(plain.create, jnp.uint32(0))
    mesh = Mesh(np.asarray(devices), (axis,))
    whole = NamedSharding(mesh, P())
    shardings = jax.tree.map(lambda _: whole, shapes)

    def evaluate(state: PyTree, batch: Split) -> Score:
        return lax.psum(train_step.evaluate(state, batch), axis)

    def replicated(tree: PyTree) -> PyTree:
        copy = jax.pmap(lambda _, x: x, in_axes=(0, None), devices=here)
        return copy(np.arange(len(here)), tree)

    def first(tree: PyTree) -> PyTree:
        """Of every array what this process's first device has."""
        return jax.tree.map(lambda x: x.addressable_shards[0].data[0], tree)

    def snapshot(state: PyTree) -> TrainState:
        def one(x: Array) -> Array:
            local = np.array(x.addressable_shards[0].data[0])
            return jax.make_array_from_callback(
                local.shape, whole, lambda index: local[index]
            )

        return jax.tree.map(one, state)

    def spread(batch: Split) -> PyTree:
        """The rows of this process, with a leading axis of its devices."""
        return jax.tree.map(
            lambda x: np.reshape(x, (len(here), len(x) // len(here), *x.shape[1:])),
            batch,
        )

    def place_test(batch: Split) -> PyTree:
        if isinstance(dataset, Stream):
            return spread(batch)
        size = len(batch.labels) // len(devices)
        start = devices.index(here[0]) * size
        return spread(
            jax.tree.map(lambda x: x[start : start + size * len(here)], batch)
        )

    create = jax.jit(plain.create)
    steps = pmap(train_step.steps, static_broadcasted_argnums=2, donate_argnums=0)
    test = pmap(evaluate)
    look = jax.jit(_inspector(plain))
    return CompiledStep(
        train_step=train_step,
        lanes=1,
        devices=len(devices),
        create=lambda seeds: replicated(jax.device_get(create(np.uint32(seeds[0])))),
        steps=lambda state, data, number: _unmapped(steps(state, data, number)),
        evaluate=lambda state, batch: _row(first(test(state, batch))),
        inspect=lambda state: _row(look(first(state))),
        place=spread if isinstance(dataset, Stream) else replicated,
        place_test=place_test,
        snapshot=snapshot,
        abstract=lambda: _abstract(shapes, shardings),
        restore=lambda state: replicated(jax.device_get(state)),
    )


def _vmapped(train_step: TrainStep) -> CompiledStep:
    config, dataset = train_step.config, train_step.dataset
    if isinstance(dataset, Stream):
        raise ValueError(f"vmap_seeds is not for streamed data ({dataset.name}).")
    one = jax.eval_shape(train_step.create, jnp.uint32(0))
    # The counters are the same in all lanes and stay without an axis, so that "is this
    # an update step?" is one question: an axis would turn the branches into selects,
    # and each step into a mask update.
    axes = jax.tree.map(
        lambda x: None if x.ndim == 0 and x.dtype == jnp.int32 else 0, one
    )
    create = jax.jit(jax.vmap(train_step.create, out_axes=axes))

    def steps(state: PyTree, data: Split, number: int) -> tuple[PyTree, Array]:
        mapped = jax.vmap(
            functools.partial(train_step.steps, number=number),
            in_axes=(axes, None),
            out_axes=(axes, 0),
        )
        return mapped(state, data)

    seeds = np.arange(config.seed, config.seed + config.seeds, dtype=np.uint32)
    shapes = jax.eval_shape(create, seeds)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return CompiledStep(
        train_step=train_step,
        lanes=config.seeds,
        devices=1,
        create=lambda seeds: create(np.asarray(seeds, np.uint32)),
        steps=jax.jit(steps, static_argnums=2, donate_argnums=0),
        evaluate=jax.jit(jax.vmap(train_step.evaluate, in_axes=(axes, None))),
        inspect=jax.jit(jax.vmap(_inspector(train_step), in_axes=(axes,))),
        place=jax.device_put,
        place_test=jax.device_put,
        snapshot=jax.jit(_copy),
        abstract=lambda: _abstract(shapes, jax.tree.map(lambda _: place, shapes)),
        restore=lambda state: state,
    )


def _inspector(train_step: TrainStep) -> Callable[[TrainState], Inspection]:
    def inspect(state: TrainState) -> Inspection:
        masks = train_step.masks(state)
        weights = masking.maskable_leaves(train_step.forward_params(state), masks)
        leaves = jax.tree.leaves(masks)

        def count(arrays: Sequence[Array]) -> Array:
            return jnp.stack([jnp.sum(x, dtype=jnp.int32) for x in arrays])

        finite = [jnp.isfinite(p).all() for p in jax.tree.leaves(state.params)]
        return Inspection(
            active=count(leaves),
            broken=count([~m & (p != 0) for m, p in zip(leaves, weights, strict=True)]),
            finite=jnp.stack(finite).all(),
        )

    return inspect


def _state_shardings(shapes: TrainState, mesh: Mesh, fsdp: int) -> TrainState:
    """Of parameters and all that has their shapes, over "fsdp"; the rest whole."""
    whole = NamedSharding(mesh, P())

    def sharding(x: jax.ShapeDtypeStruct) -> NamedSharding:
        fitting = [i for i, n in enumerate(x.shape) if n % fsdp == 0]
        if fsdp == 1 or x.size < _SHARDED_FROM or not fitting:
            return whole
        longest = max(fitting, key=lambda i: x.shape[i])
        return NamedSharding(mesh, P(*[None] * longest, "fsdp"))

    result = jax.tree.map(lambda _: whole, shapes)
    return result._replace(
        **{
            field: jax.tree.map(sharding, getattr(shapes, field))
            for field in ("params", "opt_state", "average")
        }
    )


def _abstract(shapes: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings,
    )


def _copies(sharding: NamedSharding) -> Callable[[Split], PyTree]:
    """Places arrays that every process has whole."""

    def place(split: Split) -> PyTree:
        def one(x: Any) -> Array:
            array = np.asarray(x)
            return jax.make_array_from_callback(
                array.shape, sharding, lambda index: array[index]
            )

        return jax.tree.map(one, split)

    return place


def _local_rows(sharding: NamedSharding) -> Callable[[Split], PyTree]:
    """Places arrays of which every process has its part of the rows."""

    def place(split: Split) -> PyTree:
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
            split,
        )

    return place


def _copy(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, tree)


def _lane(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """`function` with an axis of one lane in front of all it returns."""

    def with_axis(*args: Any) -> PyTree:
        return _row(function(*args))

    return with_axis


def _row(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[None], tree)


def _unmapped(result: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
    """The losses of one device instead of all, which are the same."""
    state, losses = result
    return state, losses.addressable_shards[0].data
