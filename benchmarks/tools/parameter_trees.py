"""Parameter trees for benchmarks, as shapes: ResNet-50, and transformers like Llama.

And trees of so many small leaves, for the time it takes to compile.

Of a transformer, the leaves are those of one layer after the other, or, as under
`lax.scan` over the layers, one stacked leaf for each kind of weight.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import resnet50

PyTree = Any


class Transformer(NamedTuple):
    """Sizes of a decoder with gated feed-forward layers and untied embeddings.

    Attributes:
      layers: number of blocks.
      width: of the residual stream.
      hidden: width of the feed-forward layers.
      heads: query heads.
      kv_heads: key and value heads (grouped-query attention where fewer).
      vocabulary: tokens.
    """

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int = 32_000


# 7b and 70b: Touvron et al., Llama 2, 2023. 1b: Zhang et al., TinyLlama, 2024. 100m has
# the layers and width of GPT-2 small (Radford et al. 2019) in the same form.
TRANSFORMERS = {
    "100m": Transformer(12, 768, 2048, 12, 12),
    "1b": Transformer(22, 2048, 5632, 32, 4),
    "7b": Transformer(32, 4096, 11_008, 32, 32),
    "70b": Transformer(80, 8192, 28_672, 64, 8),
}
# Kernels of five shapes in turn, as deep networks have them.
MANY = {"54-leaves": 54, "200-leaves": 200, "1000-leaves": 1000}
TURNS = ((128, 128), (3, 3, 64, 64), (64, 256), (1, 1, 128, 64), (256, 32))
TREES = (
    "resnet50",
    *MANY,
    *(f"{size}-{form}" for size in TRANSFORMERS for form in ("stacked", "layers")),
)


def transformer(sizes: Transformer, *, stacked: bool) -> PyTree:
    """The tree of shapes: kernels (in, out), under `stacked` (layers, in, out)."""
    width, hidden = sizes.width, sizes.hidden
    kv = width // sizes.heads * sizes.kv_heads
    layer = {
        "attention": {
            "query": (width, width),
            "key": (width, kv),
            "value": (width, kv),
            "out": (width, width),
        },
        "feed_forward": {
            "gate": (width, hidden),
            "up": (width, hidden),
            "down": (hidden, width),
        },
        "norm_1": (width,),
        "norm_2": (width,),
    }
    if stacked:
        blocks: PyTree = jax.tree.map(
            lambda shape: (sizes.layers, *shape), layer, is_leaf=is_shape
        )
    else:
        blocks = {f"layer_{i}": layer for i in range(sizes.layers)}
    return {
        "embedding": (sizes.vocabulary, width),
        "blocks": blocks,
        "norm": (width,),
        "head": (width, sizes.vocabulary),
    }


def shapes(name: str) -> PyTree:
    """The tree of shapes of one of `TREES`."""
    if name == "resnet50":
        return resnet50.shapes()
    if name in MANY:
        return {f"layer_{i}": TURNS[i % len(TURNS)] for i in range(MANY[name])}
    size, _, form = name.partition("-")
    return transformer(TRANSFORMERS[size], stacked=form == "stacked")


def carries_mask(name: str, leaf: Any) -> bool:
    """The rule `where`: kernels, not the stacked scales of the norms."""
    return leaf.ndim >= 2 and "norm" not in name


def size(tree: PyTree) -> int:
    """Number of parameters in a tree of shapes."""
    return sum(math.prod(s) for s in jax.tree.leaves(tree, is_leaf=is_shape))


def place(tree: PyTree, mesh: Mesh, dtype: Any = jnp.float32) -> PyTree:
    """A tree of shapes as `jax.ShapeDtypeStruct`s, sharded: nothing is allocated.

    Args:
      tree: tree of shapes.
      mesh: with axes "fsdp" and "tensor".
      dtype: of all leaves.

    Returns:
      Leaves with their last axis over "tensor" and the one before over "fsdp", each
      where the axis divides; the others are whole on every device.
    """

    def leaf(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        spec: list[str | None] = [None] * len(shape)
        if len(shape) >= 2:
            for axis, name in ((-1, "tensor"), (-2, "fsdp")):
                if shape[axis] % mesh.shape[name] == 0:
                    spec[axis] = name
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, P(*spec))
        )

    return jax.tree.map(leaf, tree, is_leaf=is_shape)


def place_like(tree: PyTree, params: PyTree) -> PyTree:
    """The leaves of `tree` sharded as the parameter whose path and shape they end in.

    So masks and moments lie with their parameters; what has none is on every device.
    """
    known = jax.tree.leaves_with_path(params)
    whole = NamedSharding(known[0][1].sharding.mesh, P())
    # By the last key first: every leaf against every parameter takes long.
    by_key: dict[Any, list[tuple[Any, NamedSharding]]] = {}
    for path, p in known:
        by_key.setdefault((path[-1:], p.shape), []).append((path, p.sharding))

    def leaf(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        candidates = by_key.get((path[-1:], x.shape), [])
        found = [s for tail, s in candidates if path[-len(tail) :] == tail]
        sharding = found[0] if found else whole
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map_with_path(leaf, tree)


def is_shape(x: Any) -> bool:
    """Whether `x` is a leaf of a tree of shapes."""
    return isinstance(x, tuple) and all(isinstance(n, int) for n in x)
