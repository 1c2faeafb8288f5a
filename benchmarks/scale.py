r"""What an optimizer step with its mask update costs on many TPUs or GPUs.

    python -m benchmarks.scale                       # the usual cases, an hour
    python -m benchmarks.scale --trees 7b-stacked --methods dense rigl \
        --topologies v5e:16x16

A case is a tree of parameters, a method, a topology of devices, and a kind of mesh
axes. For each case the whole optimizer step, SGD with momentum inside, is compiled by
the compiler of these devices, from shapes and shardings alone: nothing is allocated,
nothing runs, and no such device is needed. Parameters, gradients and moments are
float32, masks are booleans, and all are sharded over a mesh (fsdp x tensor), which is
set by `jax.set_mesh`. Each case has a process of its own.

From the compiled program the benchmark reads, per device:

- the collectives, and the bytes of the arrays that they yield. (The ring of an
  all-reduce sends up to twice as many.) Those in loops belong to the mask update, and
  run once in each pass over the scores;
- the memory of arguments, of results that take their place, and of temporary arrays;
- the bytes of arrays that every step copies;
- seconds to compile, by the clock and of the processor.

With `--quick` it compiles one dense step, and asserts that it sends nothing. What holds
for sparse steps is tested in tests/core/test_tpu.py.
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
from experiments.reports import compiled_programs, topologies

PyTree = Any
METHODS: dict[str, granet_jax.Method | None] = {
    "dense": None,
    "granet": granet_jax.granet(0.9, 100_000, initial_sparsity=0.5, interval=1000),
    "rigl": granet_jax.rigl(0.9, 100_000, interval=1000),
}
USUAL_TREES = {
    "v5e:4x4": ("resnet50", "1b-stacked"),
    "h100:8": ("resnet50", "1b-stacked"),
    "v5e:16x16": ("7b-stacked", "70b-stacked"),
}
AXES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


class Case(NamedTuple):
    """What is compiled: a tree, a method, a topology, a kind of mesh axes."""

    tree: str
    method: str
    topology: str
    axes: str

    def __str__(self) -> str:
        return ", ".join(self)


def compile_step(
    shapes: PyTree,
    method: granet_jax.Method | None,
    mesh: Mesh,
    *,
    donate: bool = True,
    packed: bool = False,
) -> jax.stages.Compiled:
    """Compiles the step of `method` with SGD and momentum from shapes alone.

    Args:
      shapes: Tree of shapes of the parameters.
      method: Record of the method; None for the dense optimizer.
      mesh: Mesh with the axes "fsdp" and "tensor".
      donate: Whether parameters and optimizer state are donated.
      packed: Whether masks take one bit a weight.

    Returns:
      The compiled step (params, state, grads) -> (params, state).
    """
    params = parameter_trees.place(shapes, mesh)
    tx = optax.sgd(0.1, momentum=0.9)
    if method is not None:
        where = parameter_trees.carries_mask
        tx = granet_jax.transform(method, tx, where=where, packed=packed)
    state = parameter_trees.place_like(jax.eval_shape(tx.init, params), params)

    def step(params: PyTree, state: PyTree, grads: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1) if donate else ())
    return jitted.lower(params, state, params).compile()


def make_mesh(devices: Sequence[Any], axes: str) -> Mesh:
    """Makes a mesh (fsdp, tensor): (1, 1), (2, 1), (2, 2), (4, 2), ..."""
    tensor = 2 if len(devices) >= 4 else 1
    return jax.make_mesh(
        (len(devices) // tensor, tensor),
        ("fsdp", "tensor"),
        axis_types=(AXES[axes],) * 2,
        devices=devices,
    )


def measure(case: Case) -> dict[str, Any]:
    """Compiles a case in this process, and reads its costs; see the module's text."""
    shapes = parameter_trees.shapes(case.tree)
    # Counting 2**32 weights or more together takes 64 bits.
    jax.config.update("jax_enable_x64", parameter_trees.size(shapes) >= 2**32)
    mesh = make_mesh(topologies.devices_of(case.topology), case.axes)
    clock, cpu = time.perf_counter(), time.process_time()
    with jax.set_mesh(mesh):
        compiled = compile_step(shapes, METHODS[case.method], mesh)
    seconds = time.perf_counter() - clock
    processor_seconds = time.process_time() - cpu
    masked = parameter_trees.masked_sizes(shapes)
    text = compiled_programs.compiled_text(compiled)
    memory = compiled_programs.memory(compiled)
    collectives = compiled_programs.collectives(text)
    return {
        **case._asdict(),
        "mesh": list(mesh.devices.shape),
        "device_count": mesh.size,
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
        "processor_seconds": processor_seconds,
    }


def run_case(case: Case, timeout: float) -> dict[str, Any]:
    """Runs `measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", "--case", *map(str, case)]
    try:
        process = subprocess.run(
            command,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
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
        label = [case[name] for name in ("topology", "tree", "method", "axes")]
        if "error" in case:
            errors.append([*label, case["error"]])
            continue
        kinds = ", ".join(f"{n} {kind}" for kind, n in case["collectives"].items())
        sent = (case["bytes_in_loops"], case["bytes_every_step"])
        communication.append([*label, kinds or "none", *(f"{x:,}" for x in sent)])
        parts = [case[f"{kind}_bytes"] for kind in ("argument", "alias", "temporary")]
        parts.append(case["copied_every_step_bytes"])
        memory.append([*label, *(f"{part / 2**20:,.1f}" for part in parts)])
        times = (case["seconds"], case["processor_seconds"])
        leaves = str(case["masked_leaves"])
        compilation.append([*label, leaves, *(f"{time:.1f}" for time in times)])
    label = ["topology", "tree", "method", "axes"]
    tables = {
        "Communication": (
            ["collectives", "bytes, a pass of each search", "bytes every step"],
            communication,
        ),
        "Memory": (
            ["arguments MiB", "aliased MiB", "temporary MiB", "copied every step MiB"],
            memory,
        ),
        "Compilation": (["masked leaves", "seconds", "processor seconds"], compilation),
        "Failures": (["error"], errors),
    }
    return "\n\n".join(
        f"## {title}\n\n{results.table([*label, *header], rows)}"
        for title, (header, rows) in tables.items()
        if rows
    )


def figures(cases: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Takes the largest costs of each topology and tree, over all sparse methods."""
    most: dict[str, float] = {}
    for case in cases:
        if "error" in case or case["method"] == "dense":
            continue
        weights = case["masked_weights"] / case["device_count"]
        for name, value in {
            "bytes a leaf and pass": case["bytes_in_loops"] / case["masked_leaves"],
            "bytes every step": case["bytes_every_step"],
            "temporary bytes a weight": case["temporary_bytes"] / weights,
            "processor seconds to compile": case["processor_seconds"],
        }.items():
            name = f"{case['topology']}, {case['tree']}, {name}"
            most[name] = max(value, most.get(name, 0.0))
    return most


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles all cases, each in its process, and writes the table and the figures."""
    parser = command_line.parser(__doc__)
    parser.add_argument(
        "--trees",
        nargs="+",
        choices=parameter_trees.NAMES,
        help="by default two trees of the topology's size",
    )
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    parser.add_argument("--topologies", nargs="+", default=[*USUAL_TREES])
    parser.add_argument("--axes", nargs="+", default=["explicit"], choices=AXES)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds a case")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case:
        print(json.dumps(measure(Case(*options.case))))
        return
    if options.quick:
        options.trees, options.methods = ["100m-stacked"], ["dense"]
        options.topologies = ["v5e:2x2"]
    if not (options.trees or USUAL_TREES.keys() >= {*options.topologies}):
        parser.error(f"give --trees for topologies other than {', '.join(USUAL_TREES)}")
    selected = [
        Case(tree, method, topology, axes)
        for topology in options.topologies
        for tree in options.trees or USUAL_TREES[topology]
        for method in options.methods
        for axes in options.axes
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
