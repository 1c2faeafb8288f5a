"""Inference with active weights alone: the same products, where they are faster."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import granet_jax
from granet_jax.export.sparse_inference import FanIn
from tests.export.helpers import DENSE


@functools.cache
def example() -> tuple[Any, Any, Any]:
    """Two sparse matrices, leaves to leave alone, and what `accelerate` makes of them.

    "uneven" has outputs with different numbers of inputs, one of them with none. The
    parameters are not masked, since pruned weights count as zero whatever their value.
    """
    rng = np.random.default_rng(0)
    masks: dict[str, Any] = {
        "uneven": rng.random((200, 30)) < 0.01,
        "constant": np.argsort(rng.random((40, 50)), axis=0) < 2,
        "empty": np.zeros((20, 3), bool),
        "denser": rng.random((50, 20)) < 0.5,
        "conv": np.zeros((3, 3, 2, 4), bool),
        "bias": DENSE,
        "dense": DENSE,
    }
    masks["uneven"][:, 3] = False
    shapes = {"bias": (30,), "dense": (20, 10)}
    shapes |= {k: m.shape for k, m in masks.items() if k not in shapes}
    params = {
        k: jnp.asarray(rng.standard_normal(shapes[k]), jnp.float32) for k in masks
    }
    return params, masks, granet_jax.accelerate(params, masks)


@pytest.mark.parametrize(
    ("name", "batch"),
    [("uneven", (3, 5)), ("uneven", ()), ("constant", (3, 5)), ("empty", ())],
)
def test_products_are_those_of_the_dense_matrices(name: str, batch: Any):
    params, masks, fast = example()
    matrix, dense = fast[name], np.where(masks[name], params[name], 0.0)
    assert isinstance(matrix, FanIn)
    assert matrix.shape == dense.shape
    assert matrix.values.shape == (masks[name].sum(axis=0).max(), dense.shape[1])
    x = np.random.default_rng(1).standard_normal((*batch, len(dense)))
    x = x.astype(np.float32)
    product = jax.jit(lambda x, w: x @ w)
    products = [product(x, matrix), x @ matrix]
    if batch:
        products.append(jax.vmap(product, (0, None))(x, matrix))
    for found in products:
        assert (found.shape, found.dtype) == ((*batch, dense.shape[1]), "f4")
        np.testing.assert_allclose(found, x @ dense, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=rf"needs x of shape \(\.\.\., {len(dense)}\)"):
        jnp.ones((100, 30)) @ matrix
    with pytest.raises(ValueError, match="needs x of shape"):
        jnp.ones(()) @ matrix


def test_leaves_that_would_not_gain_are_unchanged():
    params, _, fast = example()
    unchanged = ("denser", "conv", "bias", "dense")
    for name in unchanged:
        assert fast[name] is params[name]
    # `FanIn` is a pytree of its two arrays.
    assert len(jax.tree.leaves(fast)) == len(unchanged) + 2 * 3


@pytest.mark.parametrize(
    "use",
    [
        lambda kernel: nnx_layer(kernel)(jnp.ones((2, 40))),
        lambda kernel: kernel.mean(),
        jnp.asarray,
        np.asarray,
    ],
)
def test_other_uses_of_the_matrix_say_what_it_is_for(use: Any):
    kernel = example()[2]["constant"]
    with pytest.raises((TypeError, AttributeError), match="for products with @"):
        use(kernel)


def nnx_layer(kernel: Any) -> nnx.Linear:
    layer = nnx.Linear(40, 50, rngs=nnx.Rngs(0))
    nnx.update(layer, {"kernel": kernel})
    return layer


def test_half_precision_is_summed_in_float32():
    mask = np.zeros((10_000, 1), bool)
    mask[:300] = True
    params = {"w": jnp.ones((10_000, 1), jnp.bfloat16)}
    matrix = granet_jax.accelerate(params, {"w": mask})["w"]
    product = jnp.ones((1, 10_000), jnp.bfloat16) @ matrix
    # In bfloat16, 256 + 1 is 256.
    assert product.dtype == jnp.bfloat16
    assert float(product[0, 0]) == 300.0


def test_matrices_with_outputs_first():
    rng = np.random.default_rng(0)
    mask = np.argsort(rng.random((50, 40)), axis=1) < 2  # 2 of 40 inputs.
    weight = np.float32(rng.standard_normal((50, 40)))
    dense = np.where(mask, weight, 0)
    matrix = granet_jax.accelerate({"w": weight}, {"w": mask}, axis=0)["w"]
    assert (matrix.shape, matrix.T.shape) == ((50, 40), (40, 50))
    assert matrix.values.shape == (2, 50)
    for shape in ((40,), (40, 3), (2, 40, 3)):
        x = np.float32(rng.standard_normal(shape))
        found = jax.jit(lambda w, x: w @ x)(matrix, x)
        np.testing.assert_allclose(found, dense @ x, rtol=1e-5, atol=1e-6)
    x = np.float32(rng.standard_normal((5, 40)))
    np.testing.assert_allclose(x @ matrix.T, x @ dense.T, rtol=1e-5, atol=1e-6)
    # Linear layers of equinox compute `weight @ x`.
    layer = eqx.nn.Linear(40, 50, use_bias=False, key=jax.random.key(0))
    layer = eqx.tree_at(lambda m: m.weight, layer, matrix)
    np.testing.assert_allclose(layer(x[0]), dense @ x[0], rtol=1e-5, atol=1e-6)
    # A product on the wrong side says so, and so does the wrong axis.
    with pytest.raises(ValueError, match=r"x @ matrix needs .* got \(50, 40\)"):
        x @ matrix
    with pytest.raises(ValueError, match=r"matrix @ x needs .* got \(40, 50\)"):
        matrix.T @ x
    with pytest.raises(ValueError, match="5% of the inputs"):
        granet_jax.accelerate({"w": weight}, {"w": mask})
