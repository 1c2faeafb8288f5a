"""Public functions change nothing: no argument, no setting, no folder.

And inside `jit` they look at nothing on the host. `tests/arguments.py` has arguments
for every one.
"""

import copy
import functools
import inspect
import os
import random
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core

import granet_jax
from granet_jax import analysis, mask_sources, structures, tost
from tests.helpers import arguments, trees
from tests.helpers.arguments import Entry

PUBLIC = arguments.public()
MASK = np.eye(4, dtype=bool)
HISTORY = {0: granet_jax.sparsity({"w": MASK})}
# Arguments of functions that `arguments` has none for, as they need no more than one;
# and others where those there are refused for the sake of the test of an error.
GOOD: dict[str, Any] = {
    "granet_jax.get_masks": {"opt_state": arguments.state()},
    "granet_jax.get_state": {"opt_state": arguments.state()},
    "granet_jax.sparsity": {"masks": arguments.masks()},
    "granet_jax.pack_masks": {"masks": arguments.masks()},
    "granet_jax.unpack_masks": {"packed": granet_jax.pack_masks(arguments.masks())},
    "granet_jax.accelerate": {
        "params": {"w": np.eye(64, dtype=np.float32)},
        "masks": {"w": np.eye(64, dtype=bool)},
    },
    "granet_jax.masking.active_counts": {"masks": arguments.masks()},
    "granet_jax.schedules.listed": {"steps": [1, 2]},
    "granet_jax.schedules.constant": {"value": 0.5},
    "granet_jax.scores.lookahead": {"order": ["a", "b"]},
    "granet_jax.penalties.outside": {"size": 0.5},
    "granet_jax.tost.drop_ghosts": {"tree": {"a": {"ghost_w": MASK}, "w": MASK}},
    "granet_jax.tost.is_ghost": {"name": "ghost_w"},
    "granet_jax.export.mask_entropy": {"masks": {"w": MASK}},
    "granet_jax.analysis.exploration": {"history": [{"w": MASK}, {"w": ~MASK}]},
    "granet_jax.analysis.exploration_over_time": {"history": {0: {"w": MASK}}},
    "granet_jax.analysis.plots.exploration": {"histories": {"a": {0: {"w": MASK}}}},
    "granet_jax.analysis.channel_density": {"mask": MASK},
    "granet_jax.analysis.connectivity": {"chain": [MASK, MASK]},
    "granet_jax.analysis.plots.densities": {"networks": {"a": HISTORY[0]}},
    "granet_jax.analysis.plots.densities_over_time": {"history": HISTORY},
    "granet_jax.analysis.plots.mask": {"mask": MASK},
    "granet_jax.analysis.plots.churn": {"history": {0: {"w": MASK}, 1: {"w": MASK}}},
    "granet_jax.analysis.plots.looks": {"labels": ["rigl", "mine"]},
    "granet_jax.analysis.plots.inputs": {"mask": MASK, "image_shape": (2, 2)},
}
FILES = {"granet_jax.export.save", "granet_jax.export.load"}
FILES |= {"granet_jax.export.read_metadata"}


def calls() -> dict[str, tuple[Entry, dict[str, Any]]]:
    return {
        name: (entry, GOOD.get(name, entry.good))
        for name, entry in arguments.every().items()
        if name not in FILES
    }


def frozen(value: Any) -> Any:
    """What can be compared of a value: its containers, and the bytes of its arrays."""
    leaves, treedef = jax.tree.flatten(value)
    parts = []
    for x in leaves:
        array = isinstance(x, np.ndarray | jax.Array) and not jax.dtypes.issubdtype(
            x.dtype, jax.dtypes.prng_key
        )
        # Of an array that was donated there are no bytes: an error.
        parts.append((x.dtype, x.shape, np.asarray(x).tobytes()) if array else repr(x))
    return treedef, parts


def world() -> Any:
    """What others see of this process."""
    return (
        dict(jax.config.values),
        random.getstate(),
        repr(np.random.get_state()),  # noqa: NPY002
        np.geterr(),
        dict(os.environ),
        os.getcwd(),
        sys.getrecursionlimit(),
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_function_changes_its_arguments_or_the_world() -> None:
    """Twice, with the same result: nothing is remembered either."""
    for name, (entry, given) in calls().items():
        needed = {
            key
            for key, parameter in inspect.signature(PUBLIC[name]).parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind is not parameter.VAR_POSITIONAL
        }
        assert needed <= set(given), name
        before, around = frozen(given), world()
        first = frozen_result(entry.call(**given))
        assert frozen(given) == before, name
        assert world() == around, name
        if not name.startswith("granet_jax.analysis.plots."):
            again = copy.copy(given)
            assert frozen_result(entry.call(**again)) == first, name


def frozen_result(value: Any) -> Any:
    """As `frozen`, of what can be compared: functions and figures are other objects."""
    _, parts = frozen(list(value) if inspect.isgenerator(value) else value)
    return [p for p in parts if not isinstance(p, str) or " at 0x" not in p]


# --- inside jit


@functools.cache
def on_device() -> tuple[Any, Any]:
    params = trees.parameters()
    return params, granet_jax.init_masks(granet_jax.static(0.5), params)


def steps() -> dict[str, Any]:
    """Functions of arrays alone, that are to be compiled, and their arguments."""
    params, masks = on_device()
    found: dict[str, Any] = {}
    methods = {
        "granet": granet_jax.granet(0.9, 100, interval=10),
        "snfs packed": granet_jax.snfs(0.9, 100, interval=10),
        "cyclical": granet_jax.cyclical(
            0.9, 100, cycles=2, interval=10, initial_sparsity=0.1
        ),
        "greg2": granet_jax.greg2(0.5, settle_steps=10),
        "top_kast n:m": granet_jax.top_kast(
            0.5, backward_sparsity=0.5, structure=structures.n_of_m(1, 2)
        ),
    }
    for name, method in methods.items():
        tx = granet_jax.transform(method, optax.adam(0.1), packed="packed" in name)
        state = tx.init(params)
        found[name] = (tx.update, (trees.gradients(1), state, params))
    found |= {
        "apply_masks": (granet_jax.apply_masks, (params, masks)),
        "sparse_view": (
            lambda p, m: granet_jax.sparse_view(
                p, granet_jax.set_masks(arguments.state(), m)
            ),
            (params, masks),
        ),
        "pack": (
            lambda m: granet_jax.unpack_masks(granet_jax.pack_masks(m)),
            (masks,),
        ),
        "magnitude": (lambda p: mask_sources.magnitude(p, 0.5), (params,)),
        "random": (
            lambda p, key: mask_sources.random(p, 0.5, key=key),
            (params, jax.random.key(0)),
        ),
        "snip": (
            lambda p, x: mask_sources.snip(arguments.loss, p, [x], 0.5),
            (params, arguments.BATCHES[0]),
        ),
        "gradient_flow": (analysis.gradient_flow, (params, masks)),
        "prune": (
            lambda p, m, g: analysis.prune(p, m, 10, regrow=0.5, grads=g),
            (params, masks, trees.gradients(1)),
        ),
        "ghosts": (
            lambda x, step: tost.ghost_activation(ghost_steps=10)(x, step),
            (jnp.ones(3), jnp.int32(1)),
        ),
        "labels": (
            lambda x, y, a: tost.smoothed_cross_entropy(x, y, a),
            (jnp.ones((2, 3)), jnp.zeros(2, jnp.int32), jnp.float32(0.1)),
        ),
        "rescale_init": (
            lambda p, m, x: (
                tost.rescale_init(
                    arguments.loss, p, m, [x], tost.LRsI(iterations=1)
                ).params
            ),
            (params, masks, arguments.BATCHES[0]),
        ),
    }
    return found


def primitives(jaxpr: Any) -> set[str]:
    """Names of those in a program, and in the programs within it."""
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        for inner in core.jaxprs_in_params(equation.params):
            found |= primitives(inner)
    return found


HOST = ("callback", "infeed", "outfeed", "debug_print", "device_put")


def test_nothing_inside_jit_looks_at_the_host() -> None:
    seen = set()
    for name, (function, given) in steps().items():
        names = primitives(jax.make_jaxpr(function)(*given).jaxpr)
        assert not [n for n in names if any(word in n for word in HOST)], name
        seen |= names
    # The walk gets into loops and inner functions.
    assert {"while", "cond", "sub", "select_n"} <= seen, seen

    def looking(x: Any) -> Any:
        return jax.lax.fori_loop(
            0, 2, lambda i, y: jax.pure_callback(np.sin, jnp.float32(0), y), x
        )

    found = primitives(jax.make_jaxpr(looking)(jnp.float32(0)).jaxpr)
    assert any("callback" in n for n in found)


def test_compiled_steps_transfer_nothing() -> None:
    """Whether it updates masks or not, and no more is compiled than one program."""
    params, _ = on_device()
    tx = granet_jax.transform(granet_jax.granet(0.9, 6, interval=2), optax.adam(0.1))

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = jax.device_put((params, tx.init(params)))
    grads = jax.device_put(trees.gradients(1))
    with jax.transfer_guard("disallow"):
        for _ in range(4):
            params, state = step(params, state, grads)
    assert step._cache_size() == 1


# (SciPy comes with jax, whose sparse matrices import it: granet_jax.export does.)
HEAVY = {
    *("flax", "grain", "matplotlib", "orbax", "pandas", "rich", "safetensors"),
    *("tensorflow", "tensorstore", "tqdm"),
}
PLAIN = """
import sys, time
import jax, numpy, optax
before = set(sys.modules)
start = time.perf_counter()
import {first}
import {second}
seconds = time.perf_counter() - start
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(new - set(sys.stdlib_module_names)))
from jax._src import xla_bridge
print(sorted(xla_bridge._backends))
print(f"{{seconds:.2f}} s", file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("granet_jax", "granet_jax.schedules"),
        (
            "granet_jax.export, granet_jax.analysis.plots, granet_jax.tost",
            "granet_jax.mask_sources, granet_jax",
        ),
    ],
)
def test_an_import_needs_nothing_else_and_starts_no_backend(first, second) -> None:
    """Beyond jax, numpy and optax; in whatever order."""
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", PLAIN.format(first=first, second=second)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    others, backends = process.stdout.splitlines()
    assert not set(others.split()) & HEAVY
    if "," not in first:
        assert set(others.split()) <= {"granet_jax", "jax", "jaxlib"}
    assert backends == "[]"
    print(process.stderr)
