"""The training step compiled for the available devices, in one of three forms.

- `jit` over a mesh with the axes "data" and "fsdp": each batch is split over all
  devices; parameters, moments and masks are split over the axis "fsdp".
- `pmap`: every device runs the same program, and gradients are averaged.
- `vmap` over seeds: one device trains several runs ("lanes") at once.

A checkpoint written by `jit` or `pmap` resumes in either, on any number of devices. A
checkpoint of `vmap` contains several runs and resumes only in the same form.
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
from experiments.data import Dataset, Split, Stream, as_rows
from experiments.training.step import Score, TrainState, TrainStep
from granet_jax import masking

PyTree = Any
# Gathering a smaller leaf in every step costs more than keeping it whole.
_MIN_SHARDED_SIZE = 1024
_BATCH = P(("data", "fsdp"))


class Inspection(NamedTuple):
    """Properties of a state.

    Attributes:
      active: Number of active weights of every maskable leaf, int32 (leaves,).
      broken: Number of pruned weights that are not zero, int32 (leaves,).
      finite: Whether all parameters are finite, bool scalar.
    """

    active: Array
    broken: Array
    finite: Array


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """The compiled functions of a configuration.

    Attributes:
      train_step: Pure functions from which they are compiled.
      lanes: Number of runs trained at once: the seeds with `vmap`, otherwise 1.
      devices: Number of devices that share a batch.
      create: Function from the seeds (lanes,) to the state at step 0.
      steps: Function from (state, data, number of steps) to (state, losses of shape
        (lanes, number)). It donates the state and does not wait for the device.
      lower: Function that lowers one step from shapes alone, to compile it for devices
        that are not there.
      evaluate: Function from (state, batch) to a `Score` of arrays (lanes,).
      inspect: Function from the state to an `Inspection` with a leading axis of lanes.
      place: Function that puts training data on the devices; for a stream, this
        process's part of a batch.
      place_test: Function that puts a whole test batch on the devices; for a stream,
        this process's part of it.
      snapshot: Function that copies the state into the form of a checkpoint.
      abstract: Function that returns shapes, dtypes and shardings of a snapshot.
      restore: Function from a snapshot to a state.
    """

    train_step: TrainStep
    lanes: int
    devices: int
    create: Callable[[Sequence[int]], PyTree]
    steps: Callable[[PyTree, PyTree, int], tuple[PyTree, Array]]
    lower: Callable[[], jax.stages.Lowered]
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
    """Prepare the functions of a configuration; each is compiled when first called.

    Args:
      config: Configuration; `parallel`, `fsdp` and `vmap_seeds` choose the form.
      dataset: Training and test data.
      devices: JAX devices to use; by default all devices of all processes.
      ghosts: Whether the network has the configured ghosts.

    Raises:
      ValueError: The devices cannot share a batch, or several seeds are to be trained
        at once on several devices or on streamed data.
    """
    devices = jax.devices() if devices is None else devices
    if config.vmap_seeds and config.seeds > 1:
        if len(devices) > 1:
            raise ValueError(
                f"vmap_seeds trains on one device, got {len(devices)}: leave it out, "
                "or make one visible (CUDA_VISIBLE_DEVICES, JAX_NUM_CPU_DEVICES)."
            )
        return _with_vmap(TrainStep(config, dataset, ghosts=ghosts))
    part = config.data.batch_size // config.optimizer.accumulate
    if part % len(devices):
        raise ValueError(
            f"data.batch_size / optimizer.accumulate must be a multiple of the "
            f"{len(devices)} devices, got {part}."
        )
    if config.parallel == "pmap":
        return _with_pmap(config, dataset, devices, ghosts)
    return _with_jit(config, dataset, devices, ghosts)


def _with_jit(
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
    replicated, by_rows = NamedSharding(mesh, P()), NamedSharding(mesh, _BATCH)

    def split(batch: PyTree) -> PyTree:
        return jax.tree.map(lambda x: lax.with_sharding_constraint(x, by_rows), batch)

    train_step = TrainStep(config, dataset, split=split, ghosts=ghosts)
    shapes = jax.eval_shape(train_step.create, jnp.uint32(0))
    shardings = _state_shardings(shapes, mesh, fsdp)
    streamed = isinstance(dataset, Stream)

    def steps(state: PyTree, data: Split, number: int) -> tuple[PyTree, Array]:
        state, losses = train_step.steps(state, data, number)
        return state, losses[None]

    create = jax.jit(train_step.create, out_shardings=shardings)
    compiled_steps = jax.jit(
        steps,
        static_argnums=2,
        donate_argnums=0,
        out_shardings=(shardings, replicated),
    )

    def lower() -> jax.stages.Lowered:
        data = _abstract_data(config, dataset)
        rows = by_rows if streamed else replicated
        data = _abstract(data, jax.tree.map(lambda _: rows, data))
        return compiled_steps.lower(_abstract(shapes, shardings), data, 1)

    return CompiledStep(
        train_step=train_step,
        lanes=1,
        devices=len(devices),
        create=lambda seeds: create(np.uint32(seeds[0])),
        steps=compiled_steps,
        lower=lower,
        evaluate=jax.jit(
            _returning_lanes(train_step.evaluate), out_shardings=replicated
        ),
        inspect=jax.jit(
            _returning_lanes(_inspect_with(train_step)), out_shardings=replicated
        ),
        place=_place_local_rows(by_rows) if streamed else _place_whole(replicated),
        place_test=_place_local_rows(by_rows) if streamed else _place_whole(by_rows),
        snapshot=jax.jit(_copy, out_shardings=shardings),
        abstract=lambda: _abstract(shapes, shardings),
        restore=lambda state: state,
    )


def _with_pmap(
    config: Config, dataset: Dataset | Stream, devices: Sequence[Any], ghosts: bool
) -> CompiledStep:
    axis = "devices"
    local_devices = [d for d in devices if d.process_index == jax.process_index()]
    pmap = functools.partial(jax.pmap, axis_name=axis, devices=devices)

    def split(batch: PyTree) -> PyTree:
        def own_rows(x: Array) -> Array:
            size = x.shape[0] // len(devices)
            return lax.dynamic_slice_in_dim(x, lax.axis_index(axis) * size, size)

        return jax.tree.map(own_rows, batch)

    train_step = TrainStep(
        config,
        dataset,
        split=split,
        mean=lambda tree: lax.pmean(tree, axis),
        axis_name=axis,
        ghosts=ghosts,
    )
    # The mapped axis exists only within pmap. Other functions use this one.
    unmapped_step = TrainStep(config, dataset, ghosts=ghosts)
    shapes = jax.eval_shape(unmapped_step.create, jnp.uint32(0))
    mesh = Mesh(np.asarray(devices), (axis,))
    replicated = NamedSharding(mesh, P())
    shardings = jax.tree.map(lambda _: replicated, shapes)

    def evaluate(state: PyTree, batch: Split) -> Score:
        return lax.psum(train_step.evaluate(state, batch), axis)

    def replicate(tree: PyTree) -> PyTree:
        copy = jax.pmap(lambda _, x: x, in_axes=(0, None), devices=local_devices)
        return copy(np.arange(len(local_devices)), tree)

    def snapshot(state: PyTree) -> TrainState:
        def global_array(x: Array) -> Array:
            local = np.array(x.addressable_shards[0].data[0])
            return jax.make_array_from_callback(
                local.shape, replicated, lambda index: local[index]
            )

        return jax.tree.map(global_array, state)

    def split_by_device(batch: Split) -> PyTree:
        n = len(local_devices)
        return jax.tree.map(lambda x: np.reshape(x, (n, -1, *x.shape[1:])), batch)

    def place_test(batch: Split) -> PyTree:
        if isinstance(dataset, Stream):
            return split_by_device(batch)
        size = len(batch.labels) // len(devices)
        start = devices.index(local_devices[0]) * size
        rows = slice(start, start + size * len(local_devices))
        return split_by_device(jax.tree.map(lambda x: x[rows], batch))

    create = jax.jit(unmapped_step.create)
    mapped_steps = pmap(
        train_step.steps, static_broadcasted_argnums=2, donate_argnums=0
    )
    mapped_evaluate = pmap(evaluate)
    inspect = jax.jit(_inspect_with(unmapped_step))

    def steps(state: PyTree, data: PyTree, number: int) -> tuple[PyTree, Array]:
        state, losses = mapped_steps(state, data, number)
        # The losses are the same on all devices.
        return state, losses.addressable_shards[0].data

    def lower() -> jax.stages.Lowered:
        n = len(devices)

        def with_axis(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((n, *x.shape), x.dtype)

        data = _abstract_data(config, dataset, parts=n)
        state, data = jax.tree.map(with_axis, (shapes, data))
        return mapped_steps.lower(state, data, 1)

    return CompiledStep(
        train_step=train_step,
        lanes=1,
        devices=len(devices),
        create=lambda seeds: replicate(jax.device_get(create(np.uint32(seeds[0])))),
        steps=steps,
        lower=lower,
        evaluate=lambda state, batch: _add_lane_axis(
            _first_device(mapped_evaluate(state, batch))
        ),
        inspect=lambda state: _add_lane_axis(inspect(_first_device(state))),
        place=split_by_device if isinstance(dataset, Stream) else replicate,
        place_test=place_test,
        snapshot=snapshot,
        abstract=lambda: _abstract(shapes, shardings),
        restore=lambda state: replicate(jax.device_get(state)),
    )


def _with_vmap(train_step: TrainStep) -> CompiledStep:
    config, dataset = train_step.config, train_step.dataset
    if isinstance(dataset, Stream):
        raise ValueError(f"vmap_seeds is not for streamed data ({dataset.name}).")
    one_lane = jax.eval_shape(train_step.create, jnp.uint32(0))
    # The counters are equal in all lanes and have no lane axis. With such an axis, the
    # question "is this an update step?" would have one answer per lane, and vmap would
    # turn its branches into selects that run a mask update in every step.
    axes = jax.tree.map(
        lambda x: None if x.ndim == 0 and x.dtype == jnp.int32 else 0, one_lane
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
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    compiled_steps = jax.jit(steps, static_argnums=2, donate_argnums=0)
    return CompiledStep(
        train_step=train_step,
        lanes=config.seeds,
        devices=1,
        create=lambda seeds: create(np.asarray(seeds, np.uint32)),
        steps=compiled_steps,
        lower=lambda: compiled_steps.lower(shapes, _abstract_data(config, dataset), 1),
        evaluate=jax.jit(jax.vmap(train_step.evaluate, in_axes=(axes, None))),
        inspect=jax.jit(jax.vmap(_inspect_with(train_step), in_axes=(axes,))),
        place=jax.device_put,
        place_test=jax.device_put,
        snapshot=jax.jit(_copy),
        abstract=lambda: _abstract(shapes, jax.tree.map(lambda _: device, shapes)),
        restore=lambda state: state,
    )


def _inspect_with(train_step: TrainStep) -> Callable[[TrainState], Inspection]:
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
    """Split parameters and arrays of their shapes over "fsdp"; replicate the rest."""
    replicated = NamedSharding(mesh, P())

    def sharding(x: jax.ShapeDtypeStruct) -> NamedSharding:
        divisible = [i for i, n in enumerate(x.shape) if n % fsdp == 0]
        if fsdp == 1 or x.size < _MIN_SHARDED_SIZE or not divisible:
            return replicated
        longest = max(divisible, key=lambda i: x.shape[i])
        return NamedSharding(mesh, P(*[None] * longest, "fsdp"))

    shardings = jax.tree.map(lambda _: replicated, shapes)
    return shardings._replace(
        **{
            field: jax.tree.map(sharding, getattr(shapes, field))
            for field in ("params", "opt_state", "average")
        }
    )


def _abstract_data(config: Config, dataset: Dataset | Stream, parts: int = 1) -> PyTree:
    """Shapes of the data that a step takes: all of it, or one batch of a stream.

    Args:
      config: The configuration.
      dataset: The data set.
      parts: Number of parts into which a batch of a stream is split; the shapes are
        those of one part.
    """
    if isinstance(dataset, Stream):
        rows = config.data.batch_size // parts
        images: Any = jax.ShapeDtypeStruct((rows, *dataset.image_shape), jnp.uint8)
        labels: Any = jax.ShapeDtypeStruct((rows,), jnp.int32)
        return Split(images, labels)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), as_rows(dataset.train)
    )


def _abstract(shapes: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings,
    )


def _place_whole(sharding: NamedSharding) -> Callable[[Split], PyTree]:
    """Place arrays that every process has completely."""

    def place_array(x: Any) -> Array:
        array = np.asarray(x)
        return jax.make_array_from_callback(
            array.shape, sharding, lambda index: array[index]
        )

    return lambda split: jax.tree.map(place_array, split)


def _place_local_rows(sharding: NamedSharding) -> Callable[[Split], PyTree]:
    """Place arrays of which every process has its own rows."""

    def place_array(x: Any) -> Array:
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return lambda split: jax.tree.map(place_array, split)


def _copy(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, tree)


def _first_device(tree: PyTree) -> PyTree:
    """Return the values on this process's first device, without the device axis."""
    return jax.tree.map(lambda x: x.addressable_shards[0].data[0], tree)


def _add_lane_axis(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[None], tree)


def _returning_lanes(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Add a leading axis of one lane to the results of a function."""

    def with_axis(*args: Any) -> PyTree:
        return _add_lane_axis(function(*args))

    return with_axis
