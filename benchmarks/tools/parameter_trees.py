"""Parameter trees as shapes, for benchmarks: ResNet-50, transformers, many kernels.

The leaves of a transformer are those of each layer ("layers"), or one array per kind of
weight for all layers, as `lax.scan` over the layers has them ("stacked").
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

PyTree = Any
# A tree of tuples, the shapes of arrays.
Shapes = dict[str, Any]

# ResNet-50 as flax and torchvision build it (He et al. 2016): convolutions without
# bias, each followed by a batch normalisation.
RESNET50_PARAMETERS = 25_557_032
RESNET50_KERNELS = 54
_STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))
_EXPANSION = 4


class Transformer(NamedTuple):
    """Sizes of a decoder with gated feed-forward layers and untied embeddings.

    Attributes:
      layers: Number of blocks.
      width: Width of the residual stream.
      hidden: Width of the feed-forward layers.
      heads: Number of query heads.
      kv_heads: Number of key and value heads.
      vocabulary: Number of tokens.
    """

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int = 32_000


# 7b and 70b: Touvron et al., Llama 2, 2023. 1b: Zhang et al., TinyLlama, 2024. 100m has
# the layers and the width of GPT-2 small (Radford et al. 2019) in the same form.
TRANSFORMERS = {
    "100m": Transformer(12, 768, 2048, 12, 12),
    "1b": Transformer(22, 2048, 5632, 32, 4),
    "7b": Transformer(32, 4096, 11_008, 32, 32),
    "70b": Transformer(80, 8192, 28_672, 64, 8),
}
NAMES = (
    "resnet50",
    *(f"{size}-{form}" for size in TRANSFORMERS for form in ("stacked", "layers")),
)


def shapes(name: str) -> Shapes:
    """Returns the tree of shapes with one of the `NAMES`."""
    if name == "resnet50":
        return resnet50()
    size, _, form = name.partition("-")
    return transformer(TRANSFORMERS[size], stacked=form == "stacked")


def resnet50() -> Shapes:
    """Returns ResNet-50 for ImageNet: 161 arrays, 54 of them kernels."""
    return _resnet(stages=_STAGES, stem=64, classes=1000)


def small_resnet() -> Shapes:
    """Returns the same structure with one block and few channels, to check results."""
    return _resnet(stages=((1, 8),), stem=8, classes=10)


def transformer(sizes: Transformer, *, stacked: bool) -> Shapes:
    """Returns kernels (in, out), or (layers, in, out) if `stacked`."""
    width, hidden = sizes.width, sizes.hidden
    kv = width // sizes.heads * sizes.kv_heads
    layer: Shapes = {
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
        blocks = jax.tree.map(
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


def _resnet(stages: tuple[tuple[int, int], ...], stem: int, classes: int) -> Shapes:
    tree: Shapes = {"stem": _convolution(7, 3, stem)}
    channels = stem
    for i, (blocks, width) in enumerate(stages):
        for j in range(blocks):
            out = _EXPANSION * width
            block = {
                "conv1": _convolution(1, channels, width),
                "conv2": _convolution(3, width, width),
                "conv3": _convolution(1, width, out),
            }
            if j == 0:
                block["shortcut"] = _convolution(1, channels, out)
            tree[f"stage{i + 1}_block{j + 1}"] = block
            channels = out
    tree["head"] = {"kernel": (channels, classes), "bias": (classes,)}
    return tree


def _convolution(kernel: int, inputs: int, outputs: int) -> Shapes:
    return {
        "kernel": (kernel, kernel, inputs, outputs),
        "scale": (outputs,),
        "bias": (outputs,),
    }


def draw(tree: Shapes, seed: int) -> PyTree:
    """Draws float32 NumPy arrays as an initializer would.

    Kernels are normal with variance 2 / fan-in, the scales of norms one, biases zero.

    Args:
      tree: Tree of shapes.
      seed: Seed of the random numbers.
    """
    rng = np.random.default_rng(seed)

    def leaf(path: Any, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) < 2:
            return np.full(shape, path[-1].key == "scale", np.float32)
        deviation = math.sqrt(2 / math.prod(shape[:-1]))
        return rng.standard_normal(shape, np.float32) * np.float32(deviation)

    return jax.tree.map_with_path(leaf, tree, is_leaf=is_shape)


def size(tree: Shapes) -> int:
    """Counts the parameters."""
    return sum(math.prod(s) for s in jax.tree.leaves(tree, is_leaf=is_shape))


def carries_mask(name: str, leaf: Any) -> bool:
    """Gives masks to kernels, but not to stacked scales of norms (argument `where`)."""
    return leaf.ndim >= 2 and "norm" not in name


def masked_sizes(tree: Shapes) -> list[int]:
    """Counts the weights of every leaf that carries a mask."""
    return [
        math.prod(shape)
        for path, shape in jax.tree.leaves_with_path(tree, is_leaf=is_shape)
        if len(shape) >= 2 and "norm" not in jax.tree_util.keystr(path)
    ]


def place(tree: Shapes, mesh: Mesh, dtype: Any = jnp.float32) -> PyTree:
    """Turns shapes into sharded `jax.ShapeDtypeStruct`s; allocates nothing.

    The last axis of a leaf is sharded over "tensor" and the one before over "fsdp",
    if the mesh axis divides it. All other leaves are whole on every device.

    Args:
      tree: Tree of shapes.
      mesh: Mesh with the axes "fsdp" and "tensor".
      dtype: Dtype of all leaves.
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
    """Shards optimizer state like the parameters it belongs to.

    A leaf belongs to the parameter with as many axes whose path ends the leaf's path.
    The bits of a packed mask do too. Other leaves are whole on every device.
    """
    known = jax.tree.leaves_with_path(params)
    whole = NamedSharding(known[0][1].sharding.mesh, P())
    # Looking up the last key first keeps this fast in trees of many leaves.
    by_key: dict[Any, list[tuple[Any, NamedSharding]]] = {}
    for path, p in known:
        by_key.setdefault((path[-1:], p.ndim), []).append((path, p.sharding))

    def leaf(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        if path[-1:] == (jax.tree_util.GetAttrKey("bits"),):
            path = path[:-1]
        candidates = by_key.get((path[-1:], x.ndim), [])
        matches = [s for tail, s in candidates if path[-len(tail) :] == tail]
        sharding = matches[0] if matches else whole
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map_with_path(leaf, tree)


def is_shape(x: Any) -> bool:
    """Tells whether `x` is a leaf of a tree of shapes."""
    return isinstance(x, tuple) and all(isinstance(n, int) for n in x)
