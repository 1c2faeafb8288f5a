"""Public functions change no argument, no setting, and no folder.

Under `jit` they never call back to the host, and importing the library is cheap.
"""

import copy
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

FILES = {f"granet_jax.export.{name}" for name in ("save", "load", "read_metadata")}
# The table's arguments provoke an error that depends on their size.
ACCELERATE = {
    "params": {"w": np.eye(64, dtype=np.float32)},
    "masks": {"w": np.eye(64, dtype=bool)},
}


def frozen(value: Any) -> Any:
    """A copy to compare with: the structure, and the bytes of every array."""
    leaves, treedef = jax.tree.flatten(value)
    parts = []
    for x in leaves:
        array = isinstance(x, np.ndarray | jax.Array) and not jax.dtypes.issubdtype(
            x.dtype, jax.dtypes.prng_key
        )
        # Reading a donated array would be an error.
        parts.append((x.dtype, x.shape, np.asarray(x).tobytes()) if array else repr(x))
    return treedef, parts


def frozen_result(value: Any) -> Any:
    """As `frozen`, without objects such as functions, which differ in every call."""
    _, parts = frozen(list(value) if inspect.isgenerator(value) else value)
    return [p for p in parts if not isinstance(p, str) or " at 0x" not in p]


def process_state() -> Any:
    """What other code in this process could notice."""
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
def test_no_function_changes_its_arguments_or_the_process() -> None:
    """Every function, called twice, also returns the same result."""
    for name, entry in arguments.every().items():
        if name in FILES:
            continue
        good = ACCELERATE if name == "granet_jax.accelerate" else entry.good
        before, around = frozen(good), process_state()
        first = frozen_result(entry.call(**good))
        assert frozen(good) == before, name
        assert process_state() == around, name
        if not name.startswith("granet_jax.analysis.plots."):
            assert frozen_result(entry.call(**copy.copy(good))) == first, name


# --- Under jit --------------------------------------------------------------------


def functions_to_compile() -> dict[str, Any]:
    """Functions of arrays alone, with arguments."""
    params, masks, batch = trees.parameters(), arguments.masks(), arguments.BATCHES[0]
    grads = trees.gradients(1)
    found: dict[str, Any] = {}
    methods = {
        "granet": granet_jax.granet(0.9, 100, interval=10),
        "snfs packed": granet_jax.snfs(0.9, 100, interval=10),
        "cyclical": granet_jax.cyclical(0.9, 100, interval=10, initial_sparsity=0.1),
        "greg2": granet_jax.greg2(0.5, settle_steps=10),
        "top_kast n:m": granet_jax.top_kast(
            0.5, backward_sparsity=0.5, structure=structures.n_of_m(1, 2)
        ),
    }
    for name, method in methods.items():
        tx = granet_jax.transform(method, optax.adam(0.1), packed="packed" in name)
        found[name] = (tx.update, grads, jax.eval_shape(tx.init, params), params)
    return found | {
        "apply_masks": (granet_jax.apply_masks, params, masks),
        "pack": (lambda m: granet_jax.unpack_masks(granet_jax.pack_masks(m)), masks),
        "random": (
            lambda p, key: mask_sources.random(p, 0.5, key=key),
            *(params, jax.random.key(0)),
        ),
        "snip": (
            lambda p, x: mask_sources.snip(arguments.loss, p, [x], 0.5),
            *(params, batch),
        ),
        "prune": (
            lambda p, m, g: analysis.prune(p, m, 10, regrow=0.5, grads=g),
            *(params, masks, grads),
        ),
        "ghosts": (tost.ghost_activation(ghost_steps=10), jnp.ones(3), jnp.int32(1)),
        "rescale_init": (
            lambda *args: (
                tost.rescale_init(
                    arguments.loss, *args[:2], [args[2]], tost.LRsI(iterations=1)
                ).params
            ),
            *(params, masks, batch),
        ),
    }


def primitives(jaxpr: Any) -> set[str]:
    """Names of all primitives in a program, including its inner programs."""
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        for inner in core.jaxprs_in_params(equation.params):
            found |= primitives(inner)
    return found


def host_primitives(function: Any, *args: Any) -> list[str]:
    words = ("callback", "infeed", "outfeed", "debug_print", "device_put")
    names = primitives(jax.make_jaxpr(function)(*args).jaxpr)
    return [name for name in names if any(word in name for word in words)]


def test_nothing_under_jit_calls_the_host() -> None:
    for name, (function, *args) in functions_to_compile().items():
        assert not host_primitives(function, *args), name

    def calling(x: Any) -> Any:
        return jax.lax.fori_loop(
            0, 2, lambda i, y: jax.pure_callback(np.sin, jnp.float32(0), y), x
        )

    # The search enters loops and inner functions.
    assert host_primitives(jax.jit(calling), jnp.float32(0))


# --- Imports ----------------------------------------------------------------------

# Packages that only some functions need. (JAX's sparse matrices import SciPy.)
OPTIONAL = {
    *("flax", "grain", "matplotlib", "orbax", "pandas", "rich", "safetensors"),
    *("tensorflow", "tensorstore", "tqdm"),
}
PROGRAM = """
import sys
import jax, numpy, optax

def imported():
    new = {name.partition(".")[0] for name in set(sys.modules) - before}
    print(*sorted(new - set(sys.stdlib_module_names)))

before = set(sys.modules)
import granet_jax
imported()
import granet_jax.export, granet_jax.analysis.plots, granet_jax.mask_sources
import granet_jax.schedules, granet_jax.tost
imported()
from jax._src import xla_bridge
print(sorted(xla_bridge._backends))
"""


def test_an_import_is_cheap_and_starts_no_backend() -> None:
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    first, packages, backends = process.stdout.splitlines()
    assert set(first.split()) <= {"granet_jax", "jax", "jaxlib"}
    assert not set(packages.split()) & OPTIONAL
    assert backends == "[]"
