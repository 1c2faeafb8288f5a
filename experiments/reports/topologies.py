"""The training step compiled for accelerators that this machine does not have.

`python -m experiments.train ... --dry-run --topology v5e:4x4` lowers the step that
training would run, from shapes alone, and gives it to the compiler of the accelerator.
The package libtpu has the compiler for TPUs and needs no TPU, and JAX's plugin for CUDA
has the one for NVIDIA GPUs and needs no GPU. Nothing is run.
"""

import dataclasses
import importlib.util
import math
import os
import sys
import time
import types
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from experiments.config.recipes import columns
from experiments.config.run import Config
from experiments.data import Dataset, Stream
from experiments.reports import compiled_programs
from experiments.training.devices import CompiledStep, compile_step

PyTree = Any

# Memory of one device in GiB, from Google's documentation of Cloud TPU. A device of JAX
# is a chip, except for v2 and v3.
TPUS = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}


class _Gpu(NamedTuple):
    """A kind of GPU, from NVIDIA's documentation: what its compiler must know.

    Attributes:
      memory: Memory in GiB.
      capability: Major version of its compute capability; the minor one is 0.
      cores: Number of streaming multiprocessors.
      fpus: Number of units for float32 in each of them.
      clock: Clock rate in GHz.
      bandwidth: Bytes that its memory reads or writes in a second.
      cache: Bytes of the second-level cache.
      shared: Bytes of memory that the threads of a multiprocessor share.
    """

    memory: int
    capability: int
    cores: int
    fpus: int
    clock: float
    bandwidth: float
    cache: int
    shared: int


GPUS = {
    "a100": _Gpu(80, 8, 108, 64, 1.41, 2.039e12, 40 * 2**20, 164 * 2**10),
    "h100": _Gpu(80, 9, 132, 128, 1.98, 3.352e12, 50 * 2**20, 228 * 2**10),
    "h200": _Gpu(141, 9, 132, 128, 1.98, 4.8e12, 50 * 2**20, 228 * 2**10),
}
MEMORY = TPUS | {name: gpu.memory for name, gpu in GPUS.items()}


class Compiled(NamedTuple):
    """What the compiler says of one step.

    Attributes:
      name: Name of the method.
      error: Why there is no program, in the compiler's words; None if there is one.
      state: Bytes on each device of the parameters, optimizer, masks and the rest.
      data: Bytes of data on each device.
      temporary: Bytes on each device of activations, gradients and everything else that
        lives within a step.
      sent: Bytes of the results of the collectives of every step, by kind.
      sent_in_update: The same, of the collectives in loops, which a mask update runs.
      optimal_seconds: The compiler's own estimate of the time of a step; None if it
        gives none.
      seconds: Seconds to compile.
    """

    name: str
    error: str | None
    state: dict[str, int]
    data: int = 0
    temporary: int = 0
    sent: Mapping[str, list[int]] = types.MappingProxyType({})
    sent_in_update: Mapping[str, list[int]] = types.MappingProxyType({})
    optimal_seconds: float | None = None
    seconds: float = 0.0

    @property
    def total(self) -> int:
        """Bytes on each device at the most."""
        return sum(self.state.values()) + self.data + self.temporary


def devices_of(topology: str) -> Sequence[Any]:
    """The devices of a topology: "v5e:4x4" for TPUs, "h100:8" for GPUs.

    Raises:
      ValueError: There is no such topology, or the compiler is not installed.
    """
    kind, _, shape = topology.partition(":")
    if kind not in MEMORY or not shape:
        raise ValueError(
            f"topology must be KIND:SHAPE with KIND one of {', '.join(MEMORY)}, such "
            f"as v5e:4x4, v4:2x2x1 or h100:8, got {topology!r}."
        )
    return _gpus(kind, shape) if kind in GPUS else _tpus(topology)


def _tpus(topology: str) -> Sequence[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "topology needs the compiler for TPUs: run `pip install '.[tpu]'`, which "
            "also works on a machine without a TPU."
        )
    # Without it, libtpu asks Google's cloud for minutes what machine this is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # One process at a time may use a TPU, but any number may compile.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # The compiler ends the process at a flag that only JAX's own XLA knows.
    os.environ.pop("XLA_FLAGS", None)
    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"topology {topology} is not known to the compiler ({_first_line(error)}). "
            "Examples are v5e:2x2, v5e:4x4, v5e:16x16, v6e:4x4 and v4:2x2x1."
        ) from error


def _gpus(kind: str, number: str) -> Sequence[Any]:
    """Describe GPUs of one machine to the compiler, in its own words."""
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(
            f"topology must have the number of GPUs, such as {kind}:8, got "
            f"{kind}:{number}."
        )
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise ValueError(
            "topology needs the compiler for GPUs: run "
            "`pip install '.[gpu-compiler]'`, which also works on a machine without a "
            "GPU."
        )
    # The compiler warns that it cannot measure which of its kernels are fastest.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    gpu = GPUS[kind]
    # One block of threads may take all shared memory but a kibibyte.
    target = f"""
        platform_name: "CUDA"
        device_description_str: "{kind.upper()}"
        dnn_version_info {{ major: 9 minor: 12 }}
        runtime_version {{ major: 12 minor: 9 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {gpu.capability} }}
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: {gpu.shared - 2**10}
          shared_memory_per_core: {gpu.shared}
          core_count: {gpu.cores}
          fpus_per_core: {gpu.fpus}
          clock_rate_ghz: {gpu.clock}
          memory_bandwidth: {gpu.bandwidth:.0f}
          l2_cache_size: {gpu.cache}
          device_memory_size: {gpu.memory * 2**30}
        }}"""
    return topologies.get_topology_desc(
        platform="cuda", target_config=target, topology=f"1x1x{number}"
    ).devices


def report(
    config: Config, dataset: Dataset | Stream, topology: str, devices: Sequence[Any]
) -> str:
    """Compile the step, and the step of dense training, and describe both.

    Args:
      config: The configuration.
      dataset: Its data set; only sizes and shapes are used.
      topology: Kind and arrangement of the devices, such as "v5e:4x4".
      devices: These devices, from `devices_of`.

    Raises:
      ValueError: The devices cannot share a batch.
    """
    config = dataclasses.replace(config, vmap_seeds=False)
    configs = [config]
    if config.method != "dense":
        configs.insert(0, config.dense())
    # Wrong batches are reported before the first compilation, which takes a minute.
    steps = [compile_step(each, dataset, devices) for each in configs]
    results = []
    for each, step in zip(configs, steps, strict=True):
        print(f"compiling {each.method} for {topology}", file=sys.stderr, flush=True)
        results.append(compiled(each.method, step))
    memory = MEMORY[topology.partition(":")[0]] * 2**30
    return "\n".join(_lines(results, config, topology, len(devices), memory))


def compiled(name: str, step: CompiledStep) -> Compiled:
    """Compile one step and read what the compiler says of it."""
    state = _state_bytes(step.abstract())
    lowered = step.lower()
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            # A program for devices that are not there can be put into JAX's cache of
            # programs, but not be read from it.
            warnings.filterwarnings("ignore", "Error reading persistent compilation")
            program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return Compiled(name, _first_line(error), state)
    seconds = time.perf_counter() - start
    memory = compiled_programs.memory(program)
    text = compiled_programs.compiled_text(program)
    collectives = compiled_programs.collectives(text)
    costs: Any = program.cost_analysis() or {}
    optimal = costs.get("optimal_seconds", 0.0)
    return Compiled(
        name=name,
        error=None,
        state=state,
        data=memory.argument_size_in_bytes - sum(state.values()),
        temporary=memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        sent=_by_kind([x for x in collectives if not x.looped]),
        sent_in_update=_by_kind([x for x in collectives if x.looped]),
        optimal_seconds=optimal if optimal > 0 else None,
        seconds=seconds,
    )


def _state_bytes(state: Any) -> dict[str, int]:
    """Bytes of each part of a training state on one device."""
    opt_state = jax.tree.leaves(state.opt_state)
    # Masks are the only arrays with one byte per element.
    masks = [x for x in opt_state if x.dtype.itemsize == 1]
    others = [x for x in opt_state if x.dtype.itemsize != 1]
    rest = (state.step, state.seed, state.order, state.statistics, state.average)
    return {
        "parameters": _bytes(state.params),
        "optimizer": _bytes(others),
        "masks": _bytes(masks),
        "other state": _bytes(rest),
    }


def _bytes(tree: PyTree) -> int:
    """Bytes on one device."""
    return sum(
        x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
        for x in jax.tree.leaves(tree)
    )


def _by_kind(
    collectives: Sequence[compiled_programs.Operation],
) -> dict[str, list[int]]:
    kinds: dict[str, list[int]] = {}
    for each in collectives:
        kinds.setdefault(each.kind, []).append(each.bytes)
    return kinds


def _lines(
    results: Sequence[Compiled],
    config: Config,
    topology: str,
    devices: int,
    memory: int,
) -> list[str]:
    layout = f"fsdp {config.fsdp}" if config.fsdp > 1 else "replicated"
    rows = [("on each device", *(each.name for each in results))]

    def row(title: str, cells: Sequence[str]) -> None:
        rows.append((title, *cells))

    for part in results[-1].state:
        row(part, [_mebibytes(each.state[part]) for each in results])
    ready = [each.error is None for each in results]

    def measured(cells: Sequence[str]) -> list[str]:
        return [x if ok else "-" for x, ok in zip(cells, ready, strict=True)]

    row("data", measured([_mebibytes(each.data) for each in results]))
    row("activations, gradients", measured([_mebibytes(x.temporary) for x in results]))
    row("all", measured([_mebibytes(each.total) for each in results]))
    fits = ["yes" if x.total <= memory else "no" for x in results]
    fits = [x if ok else "no" for x, ok in zip(fits, ready, strict=True)]
    row(f"fits into {memory / 2**30:.0f} GiB", fits)
    row("sent in every step", measured([_sent(each.sent) for each in results]))
    updates = [_sent(each.sent_in_update, "a pass ") for each in results]
    row("sent in a mask update", measured(updates))
    estimates = [
        "-" if x.optimal_seconds is None else f"{1000 * x.optimal_seconds:.3f} ms"
        for x in results
    ]
    if any(x != "-" for x in estimates):
        row("step, by the compiler", estimates)
    row("seconds to compile", measured([f"{x.seconds:.0f}" for x in results]))
    lines = [
        f"Compiled for {topology}: {devices} devices, {config.parallel}, {layout}, "
        f"batches of {config.data.batch_size}.",
        "",
        *columns(rows, "<" + ">" * len(results)),
    ]
    for each in results:
        if each.error is not None:
            lines += ["", f"{each.name}: {each.error}"]
    return [
        *lines,
        "",
        "Sent: bytes of the results of the collectives on one device. A mask update",
        "makes several passes over the scores.",
    ]


def _sent(kinds: Mapping[str, list[int]], prefix: str = "") -> str:
    if not kinds:
        return "nothing"
    total = sum(sum(sizes) for sizes in kinds.values())
    names = ", ".join(f"{len(sizes)} {kind}" for kind, sizes in kinds.items())
    return f"{prefix}{total:,} ({names})"


def _mebibytes(number: int) -> str:
    return f"{number / 2**20:,.2f} MiB"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
