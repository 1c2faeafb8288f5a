"""What a step with its mask update costs on many devices, read off compiled programs.

    python -m benchmarks.scale                       # the usual cases
    python -m benchmarks.scale --trees 70b-layers --methods granet rigl --devices 8

For each case (tree of parameters, method, number of virtual CPU devices, kind of mesh
axes) the whole optimizer step, sgd with momentum inside, is compiled ahead of time from
shapes and shardings alone: nothing is allocated and nothing runs. Parameters,
gradients, moments and masks are float32 or bool, sharded over a mesh (fsdp x tensor),
which is set (`jax.set_mesh`). Each case has a process of its own, in which the number
of devices can be set.

Read off the compiled text and its analysis, per device:

- every collective: its kind, how many there are, and bytes. Those in a loop are of the
  mask update, and run at most `passes` times: the bound of the loops of the selection,
  see `search_passes`, times the phases of the update (GraNet: prune, drop, grow; RigL:
  drop, grow). Bytes are those of the array that a collective yields on a device; for
  an all-reduce, a ring sends up to twice as many.
- memory: arguments, what of them the results take over (aliases), and temporaries.
- seconds to trace, to lower and to compile, by the clock and of the processor.

With `--quick` one small case is compiled.
"""

import argparse
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh
from tqdm import tqdm

import granet_jax
from benchmarks import commands, programs, timing, trees

PyTree = Any
METHODS = {
    "granet": granet_jax.granet(0.9, 100_000, initial_sparsity=0.5, interval=1000),
    "rigl": granet_jax.rigl(0.9, 100_000, interval=1000),
}
PHASES = {"granet": 3, "rigl": 2}
# Without the transformers whose layers are leaves of their own, but for the smallest.
USUAL = (
    "resnet50",
    *trees.MANY,
    "100m-layers",
    *(f"{n}-stacked" for n in trees.TRANSFORMERS),
)
AXES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
    "reduce-scatter",
    "send",
    "recv",
)


class Case(NamedTuple):
    """What is compiled: names of a tree, a method, and a kind of mesh axes."""

    tree: str
    method: str
    devices: int
    axes: str

    def __str__(self) -> str:
        return f"{self.tree}, {self.method}, {self.devices} devices, {self.axes}"


class Collective(NamedTuple):
    """One collective of a program: bytes of what it yields on a device."""

    kind: str
    bytes: int
    looped: bool


def compile_step(
    shapes: PyTree, method: granet_jax.Method, mesh: Mesh, *, donate: bool = True
) -> tuple[jax.stages.Compiled, dict[str, float]]:
    """The step of `method` with sgd and momentum, compiled from shapes alone.

    Args:
      shapes: tree of shapes of the parameters.
      method: a record of a method.
      mesh: with axes "fsdp" and "tensor".
      donate: whether parameters and optimizer state are donated.

    Returns:
      The compiled step (params, state, grads) -> (params, state), and the seconds of
      each part of compilation: by the clock and of the processor.
    """
    params = trees.place(shapes, mesh)
    tx = granet_jax.transform(
        method, optax.sgd(0.1, momentum=0.9), where=trees.carries_mask
    )
    state = trees.place_like(jax.eval_shape(tx.init, params), params)

    def step(params: PyTree, state: PyTree, grads: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    seconds = {}

    def timed(name: str, f: Any, *arguments: Any) -> Any:
        clock, cpu = time.perf_counter(), time.process_time()
        result = f(*arguments)
        seconds[name] = time.perf_counter() - clock
        seconds[f"{name}_cpu"] = time.process_time() - cpu
        return result

    jitted = jax.jit(step, donate_argnums=(0, 1) if donate else ())
    traced = timed("trace", jitted.trace, params, state, params)
    lowered = timed("lower", traced.lower)
    return timed("compile", lowered.compile), seconds


def make_mesh(devices: int, axes: str) -> Mesh:
    """A mesh (fsdp, tensor) of this many devices: (1, 1), (2, 1), (2, 2), (4, 2) ..."""
    tensor = 2 if devices >= 4 else 1
    return jax.make_mesh(
        (devices // tensor, tensor),
        ("fsdp", "tensor"),
        axis_types=(AXES[axes],) * 2,
        devices=jax.devices()[:devices],
    )


def search_passes(largest_leaf: int, *, bits: int = 32) -> int:
    """Most passes of one selection, see `granet_jax.search.search`.

    Those of stages of eight bits of keys of `bits` bits, in which a pass leaves the
    largest of four parts of the range. (The first pass counts the candidates, and
    leaves half.) Two more in stages of fewer keys a code than have 16 bits in common,
    where the first passes compare with what is to be expected, which may leave nearly
    all. One more where a key is among the largest (of floats over 1e38), which the
    first stage leaves with twice as many others. And those of stages of positions,
    among ties in a leaf.
    """

    def search(width: int) -> int:
        passes = 0
        while width > 1:
            parts = [0, *(width * m // 4 for m in (1, 2, 3)), width]
            width = max(b - a for a, b in itertools.pairwise(parts))
            passes += 1
        return passes

    shifts = range(bits - 16, -1, -8)
    stages = sum(search(2**8) + 2 * (shift < bits - 16) for shift in shifts)
    return 1 + search(2**7) + stages + 1 + search(largest_leaf)


def collectives(program: str) -> list[Collective]:
    """All communication between devices in a compiled program's text."""
    kinds = "|".join(COLLECTIVES)
    found = []
    for looped, line in programs.in_loops(program):
        line = line.replace("/*index=", "/*")
        if match := re.search(rf"= ([^=]*?) ({kinds})(?:-start)?\(", line):
            found.append(Collective(match[2], programs.type_bytes(match[1]), looped))
    return found


def measure(case: Case) -> dict[str, Any]:
    """Compiles a case, and what is read off it; see the module's text."""
    shapes = trees.shapes(case.tree)
    leaves = jax.tree.leaves_with_path(shapes, is_leaf=trees.is_shape)
    # More weights to be ranked together than 32 bits count.
    jax.config.update("jax_enable_x64", trees.size(shapes) >= 2**32)
    mesh = make_mesh(case.devices, case.axes)
    with jax.set_mesh(mesh):
        compiled, seconds = compile_step(shapes, METHODS[case.method], mesh)
    masked = [
        math.prod(shape)
        for path, shape in leaves
        if trees.carries_mask(
            jax.tree_util.keystr(path, simple=True, separator="/"),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        )
    ]
    text = compiled.as_text()
    memory = compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    passes = PHASES[case.method] * search_passes(max(masked))
    found = collectives(text)
    kinds: dict[str, int] = {}
    for c in found:
        kinds[c.kind] = kinds.get(c.kind, 0) + 1
    return {
        **case._asdict(),
        "mesh": list(mesh.devices.shape),
        "parameters": trees.size(shapes),
        "leaves": len(leaves),
        "masked_leaves": len(masked),
        "masked_weights": sum(masked),
        "collectives": kinds,
        "largest_collective_bytes": max((c.bytes for c in found), default=0),
        "bytes_per_pass": sum(c.bytes for c in found if c.looped),
        "bytes_every_step": sum(c.bytes for c in found if not c.looped),
        "passes": passes,
        "bytes_per_update": passes * sum(c.bytes for c in found if c.looped),
        "argument_bytes": memory.argument_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "copied_every_step_bytes": sum(
            c.bytes for c in programs.copies(text) if not c.looped
        ),
        "seconds": seconds,
    }


def run_case(case: Case, timeout: float) -> dict[str, Any]:
    """`measure` in a process with the devices of the case."""
    flags = os.environ.get("XLA_FLAGS", "")
    count = f"--xla_force_host_platform_device_count={case.devices}"
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{flags} {count}".strip(),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "benchmarks.scale", "--case", *map(str, case)]
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {**case._asdict(), "error": f"not compiled within {timeout:.0f} s"}
    if done.returncode:
        return {**case._asdict(), "error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def report(results: Sequence[dict[str, Any]]) -> str:
    """The table of all cases; devices as fsdp x tensor, memory of one device."""
    header = [
        "tree",
        "masked leaves",
        "method",
        "devices",
        "axes",
        "collectives",
        "bytes a pass",
        "passes, at most",
        "KiB an update, at most",
        "arguments MiB",
        "aliased MiB",
        "temporary MiB",
        "trace and lower s",
        "compile s",
        "processor s",
    ]
    rows = []
    for r in results:
        start = [r["tree"], str(r.get("masked_leaves", "")), r["method"]]
        start += ["x".join(map(str, r["mesh"])) if "mesh" in r else str(r["devices"])]
        start += [r["axes"]]
        if "error" in r:
            rows.append([*start, r["error"], *[""] * (len(header) - len(start) - 1)])
            continue
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(r["collectives"].items()))
        s = r["seconds"]
        processor = sum(s[f"{part}_cpu"] for part in ("trace", "lower", "compile"))
        rows.append(
            [
                *start,
                kinds or "none",
                f"{r['bytes_per_pass']:,}",
                str(r["passes"]),
                f"{r['bytes_per_update'] / 2**10:,.1f}",
                f"{r['argument_bytes'] / 2**20:,.1f}",
                f"{r['alias_bytes'] / 2**20:,.1f}",
                f"{r['temporary_bytes'] / 2**20:,.1f}",
                f"{s['trace'] + s['lower']:.1f}",
                f"{s['compile']:.1f}",
                f"{processor:.1f}",
            ]
        )
    return timing.table(header, rows)


def most_sent(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """KiB of an update by tree and axes, at most: of all methods and meshes."""
    most: dict[str, float] = {}
    for r in results:
        if r["devices"] > 1 and "error" not in r:
            name, sent = f"{r['tree']}, {r['axes']}", r["bytes_per_update"] / 2**10
            most[name] = max(sent, most.get(name, 0.0))
    return most


def compile_seconds(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds to trace, lower and compile a step for one device, at most, by tree."""
    most: dict[str, float] = {}
    for r in results:
        if r["devices"] == 1 and "error" not in r:
            name = f"{r['tree']}, seconds to compile"
            taken = sum(r["seconds"][part] for part in ("trace", "lower", "compile"))
            most[name] = max(taken, most.get(name, 0.0))
    return most


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles all cases, each in its process, and writes table and figures."""
    parser = commands.parser(__doc__)
    parser.add_argument("--trees", nargs="+", default=USUAL, choices=trees.TREES)
    parser.add_argument("--methods", nargs="+", default=["granet"], choices=METHODS)
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--axes", nargs="+", default=[*AXES], choices=AXES)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds a case")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case:
        tree, method, devices, axes = options.case
        print(json.dumps(measure(Case(tree, method, int(devices), axes))))
        return
    if options.quick:
        options.trees, options.methods = ["100m-stacked"], ["rigl"]
        options.devices, options.axes = [2], ["explicit"]
    cases = [
        Case(tree, method, devices, axes)
        for tree in options.trees
        for method in options.methods
        for devices in options.devices
        for axes in (options.axes if devices > 1 else options.axes[:1])
        # Trees of many leaves show the time to compile, and that takes one device.
        if devices == 1 or tree not in trees.MANY
    ]
    results: list[dict[str, Any]] = []
    with tqdm(cases) as bar:
        for case in bar:
            bar.set_description(str(case))
            results.append(run_case(case, options.timeout))
            # After every case: a run that is stopped has been of use.
            table, values = report(results), {"cases": results}
            figures = most_sent(results) | compile_seconds(results)
            commands.write(options, "scale", table, values, figures)
    if options.quick:
        assert not any("error" in r for r in results), results
        assert results[0]["bytes_every_step"] == 0, results
        return
    print(report(results))


if __name__ == "__main__":
    main()
