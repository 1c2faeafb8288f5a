"""Inference by active weights alone: the same results, where it is worth it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax.export import sparse_inference as acceleration

DENSE = optax.MaskedNode()


def example(dtype: Any = np.float32) -> tuple[Any, Any]:
    """Two sparse matrices, of uneven and of constant fan-in, and leaves to leave."""
    rng = np.random.default_rng(0)
    masks: dict[str, Any] = {
        "uneven": rng.random((200, 30)) < 0.01,
        "constant": np.argsort(rng.random((40, 50)), axis=0) < 2,
        "fuller": rng.random((50, 20)) < 0.5,
        "kernel": np.zeros((3, 3, 2, 4), bool),
        "bias": DENSE,
        "dense": DENSE,
    }
    masks["uneven"][:, 3] = False
    shapes = {k: m.shape for k, m in masks.items() if k not in ("bias", "dense")}
    shapes |= {"bias": (30,), "dense": (20, 10)}
    params = {k: jnp.asarray(rng.standard_normal(shapes[k]), dtype) for k in masks}
    return granet_jax.apply_masks(params, masks), masks


def test_products_are_those_of_the_dense_matrices():
    params, masks = example()
    fast = granet_jax.accelerate(params, masks)
    for name, shape in {"uneven": (3, 5), "constant": ()}.items():
        matrix, dense = fast[name], np.asarray(params[name], np.float64)
        assert isinstance(matrix, acceleration.FanIn)
        assert matrix.shape == dense.shape
        fan_in = masks[name].sum(axis=0).max()
        assert matrix.values.shape == (fan_in, dense.shape[1])
        x = np.random.default_rng(1).standard_normal((*shape, len(dense)))
        x = x.astype(np.float32)
        for product in (
            jax.jit(lambda x, w: x @ w)(x, matrix),
            x @ matrix,
            jax.vmap(lambda x, w: x @ w, (0, None))(x, matrix) if shape else x @ matrix,
        ):
            assert (product.shape, product.dtype) == ((*shape, dense.shape[1]), "f4")
            np.testing.assert_allclose(product, x @ dense, rtol=1e-5, atol=1e-6)


def test_a_single_weight_gives_its_input_times_it():
    mask = np.zeros((20, 3), bool)
    mask[7, 1] = True
    fast = granet_jax.accelerate({"w": jnp.full((20, 3), 2.0)}, {"w": mask})
    x = np.arange(20, dtype=np.float32)
    # The weights that are pruned count as zero, whatever they are.
    np.testing.assert_array_equal(x @ fast["w"], [0.0, 14.0, 0.0])


def test_matrices_without_weights_give_zero():
    fast = granet_jax.accelerate(
        {"w": jnp.ones((20, 3))}, {"w": np.zeros((20, 3), bool)}
    )
    np.testing.assert_array_equal(np.ones((2, 20)) @ fast["w"], np.zeros((2, 3)))


def test_what_would_not_gain_stays_as_it_is():
    params, masks = example()
    fast = granet_jax.accelerate(params, masks)
    for name in ("fuller", "kernel", "bias", "dense"):
        assert fast[name] is params[name]
    rest = [k for k in params if k not in ("uneven", "constant")]
    with pytest.raises(ValueError, match="5% of the inputs"):
        granet_jax.accelerate({k: params[k] for k in rest}, {k: masks[k] for k in rest})
    with pytest.raises(ValueError, match="structure of params"):
        granet_jax.accelerate(params, {"uneven": masks["uneven"]})


def test_half_precision_is_added_up_in_float32():
    mask = np.zeros((10_000, 1), bool)
    mask[:300] = True
    params = {"w": jnp.ones((10_000, 1), jnp.bfloat16)}
    product = (
        jnp.ones((1, 10_000), jnp.bfloat16)
        @ granet_jax.accelerate(params, {"w": mask})["w"]
    )
    # In bfloat16, 256 + 1 is 256.
    assert product.dtype == jnp.bfloat16
    assert float(product[0, 0]) == 300.0


def test_inputs_of_another_size_are_refused():
    params, masks = example()
    matrix = granet_jax.accelerate(params, masks)["uneven"]
    for shape in [(), (30,), (100, 30)]:
        with pytest.raises(ValueError, match=r"needs x of shape \(\.\.\., 200\)"):
            jnp.ones(shape) @ matrix


def test_accelerated_parameters_are_a_pytree():
    params, masks = example()
    fast = granet_jax.accelerate(params, masks)
    half = jax.tree.map(lambda x: x, fast)
    assert jax.tree.structure(half) == jax.tree.structure(fast)
    assert len(jax.tree.leaves(fast["uneven"])) == 2
