"""Small trees of parameters and gradients that the tests of the contract share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any

# 48 and 72 weights carry a mask. No shape occurs twice, so that the shape of a moment
# alone says which parameter it belongs to.
SHAPES = {
    "dense": {"kernel": (6, 8), "bias": (8,)},
    "conv": {"kernel": (3, 3, 2, 4)},
}
MASKABLE = 48 + 72


class Layer(NamedTuple):
    """A layer as a NamedTuple."""

    kernel: Any
    bias: Any


def is_shape(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(n, int) for n in x)


def normal(tree: PyTree, seed: int, scale: float = 1.0) -> PyTree:
    """Normal numbers of the shapes and dtypes of `tree`, moved away from zero.

    An active weight is therefore never zero by accident.
    """
    rng = np.random.default_rng(seed)

    def draw(x: Any) -> jax.Array:
        values = rng.normal(size=x.shape)
        values = np.sign(values) * (0.1 + np.abs(values))
        return jnp.asarray(values * scale, x.dtype)

    return jax.tree.map(draw, tree)


def shape_tree(dtype: Any = jnp.float32) -> PyTree:
    """The tree as `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype), SHAPES, is_leaf=is_shape
    )


def parameters(dtype: Any = jnp.float32) -> PyTree:
    return normal(shape_tree(dtype), seed=0, scale=0.5)


def gradients(step: int, dtype: Any = jnp.float32) -> PyTree:
    """The gradient of a step, without zeros."""
    return normal(shape_tree(dtype), seed=1000 + step)


def eighths(step: int) -> PyTree:
    """Multiples of 1/8 without zeros, whose sums and products are exact; some tie."""
    rng = np.random.default_rng(step)
    return jax.tree.map(
        lambda shape: jnp.asarray(
            rng.choice([-1, 1], shape) * rng.integers(1, 17, shape) / 8, jnp.float32
        ),
        SHAPES,
        is_leaf=is_shape,
    )


def types(tree: PyTree) -> list[tuple[str, tuple[int, ...], Any, bool]]:
    """Path, shape, dtype and weak type of every leaf."""
    return [
        (jax.tree_util.keystr(path), x.shape, x.dtype, bool(x.weak_type))
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    ]


def assert_same(actual: PyTree, expected: PyTree) -> None:
    """The same structure, and arrays of equal types and bits (which NaNs have too)."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(actual),
        jax.tree.leaves(expected),
        strict=True,
    )
    for (path, a), e in pairs:
        name = jax.tree_util.keystr(path)
        a, e = np.asarray(a), np.asarray(e)
        assert (a.shape, a.dtype) == (e.shape, e.dtype), name
        assert a.tobytes() == e.tobytes(), name
