"""What an optimizer step with its mask update costs on many devices.

    python -m benchmarks.scale                       # the usual cases
    python -m benchmarks.scale --trees 70b-layers --methods granet rigl --devices 8

A case is a tree of parameters, a method, a number of virtual CPU devices, and a kind of
mesh axes. For each case the whole optimizer step, SGD with momentum inside, is compiled
from shapes and shardings alone: nothing is allocated and nothing runs. Parameters,
gradients and moments are float32, masks are booleans, and all are sharded over a mesh
(fsdp x tensor), which is set by `jax.set_mesh`. Each case has a process of its own, in
which the number of devices can be set.

From the compiled program the benchmark reads, per device:

- the collectives, and the bytes of the arrays that they yield. (The ring of an
  all-reduce sends up to twice as many.) Those in loops belong to the mask update, and
  run once in each pass over the scores;
- the memory of arguments, of results that take their place, and of temporary arrays;
- seconds to trace, lower and compile, by the clock and of the processor.

With `--quick` it compiles one small case, and asserts that a step between updates sends
nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AxisType, Mesh
from tqdm import tqdm

import granet_jax
from benchmarks.tools import command_line, parameter_trees, results
from experiments.reports import compiled_programs

PyTree = Any
METHODS = {
    "granet": granet_jax.granet(0.9, 100_000, initial_sparsity=0.5, interval=1000),
    "rigl": granet_jax.rigl(0.9, 100_000, interval=1000),
}
USUAL_TREES = (
    "resnet50",
    *parameter_trees.MANY,
    "100m-layers",
    *(f"{name}-stacked" for name in parameter_trees.TRANSFORMERS),
)
AXES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
PARTS = ("trace", "lower", "compile")


class Case(NamedTuple):
    """What is compiled: a tree, a method, a number of devices, a kind of mesh axes."""

    tree: str
    method: str
    devices: int
    axes: str

    def __str__(self) -> str:
        return f"{self.tree}, {self.method}, {self.devices} devices, {self.axes}"


def compile_step(
    shapes: PyTree, method: granet_jax.Method, mesh: Mesh, *, donate: bool = True
) -> tuple[jax.stages.Compiled, dict[str, float]]:
    """Compiles the step of `method` with SGD and momentum from shapes alone.

    Args:
      shapes: Tree of shapes of the parameters.
      method: Record of the method.
      mesh: Mesh with the axes "fsdp" and "tensor".
      donate: Whether parameters and optimizer state are donated.

    Returns:
      The compiled step (params, state, grads) -> (params, state), and the seconds of
      each part of the compilation, by the clock and of the processor.
    """
    params = parameter_trees.place(shapes, mesh)
    tx = granet_jax.transform(
        method, optax.sgd(0.1, momentum=0.9), where=parameter_trees.carries_mask
    )
    state = parameter_trees.place_like(jax.eval_shape(tx.init, params), params)

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
    """Makes a mesh (fsdp, tensor): (1, 1), (2, 1), (2, 2), (4, 2), ..."""
    tensor = 2 if devices >= 4 else 1
    return jax.make_mesh(
        (devices // tensor, tensor),
        ("fsdp", "tensor"),
        axis_types=(AXES[axes],) * 2,
        devices=jax.devices()[:devices],
    )


def measure(case: Case) -> dict[str, Any]:
    """Compiles a case in this process, and reads its costs; see the module's text."""
    shapes = parameter_trees.shapes(case.tree)
    # Counting 2**32 weights or more together takes 64 bits.
    jax.config.update("jax_enable_x64", parameter_trees.size(shapes) >= 2**32)
    mesh = make_mesh(case.devices, case.axes)
    with jax.set_mesh(mesh):
        compiled, seconds = compile_step(shapes, METHODS[case.method], mesh)
    masked = parameter_trees.masked_sizes(shapes)
    text = compiled_programs.compiled_text(compiled)
    memory = compiled_programs.memory(compiled)
    collectives = compiled_programs.collectives(text)
    return {
        **case._asdict(),
        "mesh": list(mesh.devices.shape),
        "parameters": parameter_trees.size(shapes),
        "masked_leaves": len(masked),
        "masked_weights": sum(masked),
        "collectives": {
            kind: sum(c.kind == kind for c in collectives)
            for kind in sorted({c.kind for c in collectives})
        },
        "largest_collective_bytes": max((c.bytes for c in collectives), default=0),
        "bytes_in_loops": sum(c.bytes for c in collectives if c.looped),
        "bytes_every_step": sum(c.bytes for c in collectives if not c.looped),
        "argument_bytes": memory.argument_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "copied_every_step_bytes": sum(
            c.bytes for c in compiled_programs.copies(text) if not c.looped
        ),
        "seconds": seconds,
    }


def run_case(case: Case, timeout: float) -> dict[str, Any]:
    """Runs `measure` in a process with as many devices as the case has."""
    flags = os.environ.get("XLA_FLAGS", "")
    count = f"--xla_force_host_platform_device_count={case.devices}"
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{flags} {count}".strip(),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "benchmarks.scale", "--case", *map(str, case)]
    try:
        process = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {**case._asdict(), "error": f"not compiled within {timeout:.0f} s"}
    if process.returncode:
        return {**case._asdict(), "error": process.stderr.strip().splitlines()[-1]}
    return json.loads(process.stdout.splitlines()[-1])


def report(cases: Sequence[dict[str, Any]]) -> str:
    """Formats a table for each of communication, memory and compilation."""
    communication, memory, compilation, errors = [], [], [], []
    for case in cases:
        label = [case["tree"], case["method"]]
        devices = "x".join(map(str, case.get("mesh", [case["devices"]])))
        label += [devices, case["axes"] if case["devices"] > 1 else ""]
        if "error" in case:
            errors.append([*label, case["error"]])
            continue
        if case["devices"] > 1:
            kinds = ", ".join(f"{n} {kind}" for kind, n in case["collectives"].items())
            largest = case["largest_collective_bytes"]
            cells = [str(case["masked_leaves"]), kinds or "none", f"{largest:,}"]
            communication.append([*label, *cells, f"{case['bytes_every_step']:,}"])
        parts = [case[f"{kind}_bytes"] for kind in ("argument", "alias", "temporary")]
        cells = [f"{part / 2**20:,.1f}" for part in parts]
        memory.append([*label, *cells, f"{_temporary_a_weight(case):.1f}"])
        seconds = case["seconds"]
        times = [
            seconds["trace"] + seconds["lower"],
            seconds["compile"],
            sum(seconds[f"{part}_cpu"] for part in PARTS),
        ]
        cells = [str(case["masked_leaves"]), *(f"{time:.1f}" for time in times)]
        compilation.append([*label, *cells])
    label = ["tree", "method", "devices", "axes"]
    tables = {
        "Communication": (
            ["masked leaves", "collectives", "largest, bytes", "every step, bytes"],
            communication,
        ),
        "Memory": (
            ["arguments MiB", "aliased MiB", "temporary MiB", "temporary, B a weight"],
            memory,
        ),
        "Compilation": (
            ["masked leaves", "trace and lower s", "compile s", "processor s"],
            compilation,
        ),
        "Failures": (["error"], errors),
    }
    return "\n\n".join(
        f"## {title}\n\n{results.table([*label, *header], rows)}"
        for title, (header, rows) in tables.items()
        if rows
    )


def _temporary_a_weight(case: dict[str, Any]) -> float:
    """Temporary bytes of a device, for each masked weight that it holds."""
    return case["temporary_bytes"] * case["devices"] / case["masked_weights"]


def figures(cases: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Takes the largest costs of each tree, over all methods and numbers of devices."""
    most: dict[str, float] = {}

    def record(name: str, value: float) -> None:
        most[name] = max(value, most.get(name, 0.0))

    for case in cases:
        if "error" in case:
            continue
        tree, axes = case["tree"], case["axes"]
        if case["devices"] > 1:
            sent = case["largest_collective_bytes"] / case["masked_leaves"]
            record(f"{tree}, {axes}, bytes a leaf and collective", sent)
            record(f"{tree}, {axes}, bytes every step", case["bytes_every_step"])
            record(
                f"{tree}, {axes}, temporary bytes a weight", _temporary_a_weight(case)
            )
        else:
            taken = sum(case["seconds"][part] for part in PARTS)
            record(f"{tree}, seconds to compile", taken)
    return most


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles all cases, each in its process, and writes the table and the figures."""
    parser = command_line.parser(__doc__)
    parser.add_argument(
        "--trees", nargs="+", default=USUAL_TREES, choices=parameter_trees.NAMES
    )
    parser.add_argument("--methods", nargs="+", default=["granet"], choices=METHODS)
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 8])
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
    selected = [
        Case(tree, method, devices, axes)
        for tree in options.trees
        for method in options.methods
        for devices in options.devices
        for axes in (options.axes if devices > 1 else options.axes[:1])
        # Trees of many leaves are there for their compile time, on one device.
        if devices == 1 or tree not in parameter_trees.MANY
    ]
    cases: list[dict[str, Any]] = []
    with tqdm(selected) as bar:
        for case in bar:
            bar.set_description(str(case))
            cases.append(run_case(case, options.timeout))
            # Saved after every case, in case the run is stopped.
            content = {"cases": cases}
            results.save(options, "scale", report(cases), content, figures(cases))
    if options.quick:
        assert not any("error" in case for case in cases), cases
        assert cases[0]["bytes_every_step"] == 0, cases
        return
    print(report(cases))


if __name__ == "__main__":
    main()
