"""Parameters spread over eight devices, and what a program sends between these."""

import contextlib
import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers.trees import is_shape

PyTree = Any
DEVICES = 8
# All meshes below divide every leaf with a mask. A device's part of such a leaf is
# larger than `SMALL`, so that sending it cannot pass for sending counts.
SHAPES = {
    "conv": {"kernel": (3, 3, 8, 16)},
    "dense": {"bias": (32,), "kernel": (64, 32)},
}
SMALL = 64
WEIGHTS = 3 * 3 * 8 * 16 + 32 + 64 * 32


class Layout(NamedTuple):
    """A mesh, and how the parameters are sharded over it."""

    mesh: tuple[int, ...]
    kind: AxisType
    conv: P
    kernel: P
    bias: P

    def make_mesh(self) -> jax.sharding.Mesh:
        names = ("x", "y")[: len(self.mesh)]
        return jax.make_mesh(self.mesh, names, axis_types=(self.kind,) * len(names))

    def place(self, tree: PyTree) -> PyTree:
        mesh = self.make_mesh()
        specs = {
            "conv": {"kernel": self.conv},
            "dense": {"bias": self.bias, "kernel": self.kernel},
        }
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        return jax.device_put(tree, shardings)

    def context(self) -> Any:
        """Explicit axes need their mesh in context; Auto axes do not."""
        if self.kind == AxisType.Auto:
            return contextlib.nullcontext()
        return jax.set_mesh(self.make_mesh())


ONE = (P(None, None, None, "x"), P("x", None), P("x"))
TWO = (P(None, None, "x", "y"), P("y", "x"), P(("x", "y")))
LAYOUTS = {
    "auto_1d": Layout((8,), AxisType.Auto, *ONE),
    "auto_2d": Layout((4, 2), AxisType.Auto, *TWO),
    "explicit_1d": Layout((8,), AxisType.Explicit, *ONE),
    "explicit_2d": Layout((4, 2), AxisType.Explicit, *TWO),
}


def sixteenths(seed: int, most: int, *lead: int) -> PyTree:
    """Multiples of 1/16, at most `most` of them: their sums are exact in any order."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: (
            rng.integers(-most, most + 1, size=(*lead, *shape)).astype("f4") / 16
        ),
        SHAPES,
        is_leaf=is_shape,
    )


def exact_parameters() -> PyTree:
    return sixteenths(0, 32)


def gradient_batch(step: int) -> PyTree:
    """A gradient for each device, stacked.

    There are so few values that many weights tie with weights on other devices.
    """
    return sixteenths(1 + step, 2, DEVICES)


def mean_gradient(step: int) -> PyTree:
    return jax.tree.map(lambda g: g.mean(axis=0, dtype=g.dtype), gradient_batch(step))


class Collective(NamedTuple):
    """A communication; `sizes` are the elements of its results on one device."""

    kind: str
    sizes: tuple[int, ...]


def collectives(program: str) -> list[Collective]:
    """All communication between devices in a compiled program's text."""
    kinds = (
        "all-gather|all-reduce|all-to-all|ragged-all-to-all|collective-permute"
        "|collective-broadcast|reduce-scatter|send|recv"
    )
    found = []
    for types, kind in re.findall(
        rf"= ([^=]*?) ({kinds})(?:-start)?\(", program.replace("/*index=", "/*")
    ):
        shapes = re.findall(r"[a-z]+\d*\[([\d,]*)\]", types)
        sizes = tuple(
            math.prod(int(n) for n in shape.split(",") if n) for shape in shapes
        )
        assert sizes, types
        found.append(Collective(kind, sizes))
    return found
