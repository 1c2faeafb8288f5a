"""Empty leaves and disconnected networks, against a count of paths."""

import functools
import math
import warnings
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from granet_jax import mask_sources as ms
from tests.helpers import trees

CHAIN = {
    "first": jax.ShapeDtypeStruct((4, 6), jnp.float32),
    "bias": jax.ShapeDtypeStruct((6,), jnp.float32),
    "last": jax.ShapeDtypeStruct((3, 2), jnp.float32),
}
POINT = jax.ShapeDtypeStruct((1, 4), jnp.float32)


def chain(params: Any, x: Any) -> Any:
    """Two layers with a bias, and pooling over pairs of units between them."""
    x = jax.nn.relu(x @ params["first"] + params["bias"][None])
    x = jnp.max(x.reshape(-1, 3, 2), axis=-1)
    return x @ params["last"]


@hypothesis.given(st.integers(0, 2**24 - 1), st.integers(0, 2**6 - 1))
@hypothesis.settings(max_examples=3)
@hypothesis.example(0, 63)
@hypothesis.example(2**24 - 1, 1)
@hypothesis.example(0b001100, 0b110000)
def test_connected_means_that_there_is_a_path(first: int, last: int) -> None:
    def bits(number: int, *shape: int) -> np.ndarray:
        flat = [number >> i & 1 for i in range(math.prod(shape))]
        return np.asarray(flat, bool).reshape(shape)

    masks = {"first": bits(first, 4, 6), "bias": None, "last": bits(last, 3, 2)}
    pooled = masks["first"].any(0).reshape(3, 2).any(1)
    expected = bool((pooled[:, None] & masks["last"]).any())
    assert ms.connected(chain, CHAIN, masks, POINT) == expected
    empty = tuple(k for k in ("first", "last") if not masks[k].any())
    result = ms.collapse(masks, apply_fn=chain, params=CHAIN, inputs=POINT)
    assert result == ms.Collapse(empty, expected)
    assert ms.collapse(masks) == ms.Collapse(empty, None)


def test_connected_neither_overflows_nor_vanishes() -> None:
    # The 512^15 paths, and more with shortcuts, are too many for float32, in which this
    # network insists on computing.
    params = {f"{i:02}": jnp.zeros((512, 512)) for i in range(15)}
    masks = {k: np.ones((512, 512), bool) for k in params}

    def apply(params: Any, x: Any, shortcut: bool = False) -> Any:
        for w in params.values():
            x = x.astype(jnp.float32)
            y = jax.nn.relu(x @ w.astype(jnp.float32))
            x = x + y if shortcut else y
        return x

    point = jax.ShapeDtypeStruct((1, 512), jnp.float32)
    assert ms.connected(apply, params, masks, point)
    # One path of single weights, then none.
    for w in masks.values():
        w[:] = False
        w[3, 3] = True
    assert ms.connected(apply, params, masks, point)
    masks["07"][3] = False
    assert not ms.connected(apply, params, masks, point)
    residual = functools.partial(apply, shortcut=True)
    assert ms.connected(residual, params, masks, point)


def test_connected_refuses_networks_that_normalize_their_input() -> None:
    def normalized(params: Any, x: Any) -> Any:
        return jax.nn.standardize(x) @ params["w"]

    params = {"w": jnp.ones((4, 3))}
    with pytest.raises(ValueError, match="even with nothing pruned"):
        ms.connected(normalized, params, {"w": np.zeros((4, 3), bool)}, POINT)


def test_a_collapse_is_warned_of_refused_or_ignored() -> None:
    # The second leaf is a thousand times smaller and is emptied first.
    params = {"a": jnp.ones((4, 4)), "b": jnp.full((4, 4), 1e-3)}
    with pytest.warns(UserWarning, match=r"no active weight is left at 'b'.*connected"):
        masks = ms.magnitude(params, 0.5)
    assert ms.collapse(masks).empty == ("b",)
    with pytest.raises(ValueError, match="no active weight is left at 'b'"):
        ms.magnitude(params, 0.5, on_collapse="error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trees.assert_same(ms.magnitude(params, 0.5, on_collapse="ignore"), masks)
        ms.magnitude(params, 0.4, on_collapse="error")
