"""Statistics of inputs, against the Jacobian of each product."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from granet_jax import mask_sources as ms
from tests.mask_sources.helpers import draw

Product = Callable[[Any, Any], Any]


def conv(numbers: tuple[str, str, str], **options: Any) -> Product:
    def product(w: Any, x: Any) -> Any:
        return lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)

    return product


def in_a_loop(w: Any, x: Any) -> Any:
    def body(i: Any, y: Any) -> Any:
        return y.at[i].set(x[i] @ w[i])

    return lax.fori_loop(0, 3, body, jnp.zeros((3, 5, 2)))


def over_layers(w: Any, x: Any) -> Any:
    @jax.checkpoint
    def layer(x: Any, w: Any) -> Any:
        return x @ w

    return lax.scan(lambda _, pair: (None, layer(pair[1], pair[0])), None, (w, x))[1]


def over_time(w: Any, x: Any) -> Any:
    return lax.scan(lambda _, x: (None, jnp.dot(x, w)), None, x)[1]


def read_in_parts(w: Any, x: Any) -> Any:
    first, second = jnp.split(w, [1])
    return x[:, :1] @ first + x[:, 1:] @ second


def joined(w: Any, x: Any) -> Any:
    return (x @ jnp.concatenate([jnp.ones((4, 2)), w], axis=1))[:, 2:]


def merged_with_an_adapter(w: Any, x: Any) -> Any:
    mask = jnp.arange(12).reshape(4, 3) % 2 == 0
    return x @ (jnp.where(mask, w, w) + jnp.ones((4, 1)) @ jnp.ones((1, 3)))


NHWC = ("NHWC", "HWIO", "NHWC")
# Name, product, and the shapes of kernel and data.
PRODUCTS: list[tuple[str, Product, tuple[int, ...], tuple[int, ...]]] = [
    ("dense", lambda w, x: x @ w, (4, 3), (5, 4)),
    ("out, in", lambda w, x: x @ w.T, (3, 4), (5, 4)),
    ("left", lambda w, x: w @ x, (3, 4), (4, 5)),
    ("heads", lambda w, x: jnp.einsum("nti,ihd->nthd", x, w), (4, 3, 2), (5, 2, 4)),
    ("of heads", lambda w, x: jnp.einsum("nhd,hdo->no", x, w), (3, 2, 4), (5, 3, 2)),
    ("experts", lambda w, x: jnp.einsum("eni,eio->eno", x, w), (2, 4, 3), (2, 5, 4)),
    ("reshaped", lambda w, x: x @ w.reshape(4, 6), (4, 3, 2), (5, 4)),
    ("vmapped", lambda w, x: jax.vmap(lambda x: w @ x)(x), (3, 4), (5, 4)),
    ("a layer", lambda w, x: x @ w[1], (3, 4, 2), (5, 4)),
    ("loop", in_a_loop, (3, 4, 2), (3, 5, 4)),
    ("layers", over_layers, (3, 4, 2), (3, 5, 4)),
    ("time", over_time, (4, 2), (3, 5, 4)),
    ("joined", joined, (4, 3), (5, 4)),
    ("merged", merged_with_an_adapter, (4, 3), (5, 4)),
    (
        "convolution",
        conv(NHWC, window_strides=(2, 1), padding="SAME"),
        *((3, 2, 2, 4), (2, 5, 4, 2)),
    ),
    (
        "dilated",
        conv(
            ("NCW", "OIW", "NCW"),
            window_strides=(1,),
            padding=[(2, 0)],
            lhs_dilation=(2,),
            rhs_dilation=(2,),
        ),
        *((3, 2, 3), (2, 2, 6)),
    ),
    (
        "groups",
        conv(NHWC, window_strides=(1, 1), padding="VALID", feature_group_count=2),
        *((2, 2, 3, 4), (2, 3, 4, 6)),
    ),
]


@pytest.mark.parametrize(("_", "product", "kernel", "data"), PRODUCTS)
def test_statistics_are_those_of_the_derivatives_of_the_outputs(
    _: str, product: Product, kernel: tuple[int, ...], data: tuple[int, ...]
) -> None:
    """The derivative of an output with respect to a weight is the input it meets."""
    w, x = draw({"w": kernel, "x": data}).values()
    found = ms.input_statistics(
        lambda p, x: product(p["w"], x), {"w": w}, [x], products=True, where="w"
    )["w"]
    inputs = np.asarray(jax.jacobian(product)(w, x)).reshape(-1, *kernel)
    axes = [axis for axis in range(len(kernel)) if axis not in found.input_axes]
    units = np.any(inputs != 0, axis=(0, *(1 + axis for axis in found.input_axes)))
    count = len(inputs) / np.count_nonzero(units)
    for value, power in ((found.mean, 1), (found.mean_square, 2)):
        expected = np.sum(inputs**power, axis=0) / count
        np.testing.assert_allclose(
            np.broadcast_to(value, kernel), expected, rtol=1e-5, atol=1e-6
        )
        assert all(value.shape[axis] in (1, kernel[axis]) for axis in axes)
    flat = inputs.reshape(len(inputs), -1)
    expected = (flat.T @ flat).reshape(*kernel, *kernel) / count
    same_output = np.ones((*kernel, *kernel))
    for axis in axes:
        shape = [1] * (2 * len(kernel))
        shape[axis] = shape[len(kernel) + axis] = kernel[axis]
        same_output = same_output * np.eye(kernel[axis]).reshape(shape)
    assert found.products is not None
    np.testing.assert_allclose(
        found.products * same_output, expected, rtol=1e-5, atol=1e-5
    )


def test_every_layer_sees_the_outputs_of_the_one_before_over_all_batches() -> None:
    params = draw({"table": (7, 4), "first": (4, 6), "second": (6, 4)})
    batches = [jnp.asarray(x) for x in ([[0, 1, 2]], [[3, 3, 6], [5, 4, 0]])]

    @jax.jit
    def apply(params: Any, tokens: Any) -> Any:
        h = params["table"][tokens]
        for _ in range(2):  # The kernels are used twice.
            h = h + jax.nn.gelu(h @ params["first"]) @ params["second"]
        return jnp.mean(jax.nn.log_softmax(h @ params["table"].T))

    found = ms.input_statistics(apply, params, batches)
    seen: dict[str, list[Any]] = {"table": [], "first": [], "second": []}
    for tokens in batches:
        h = np.asarray(params["table"])[tokens].reshape(-1, 4)
        for _ in range(2):
            seen["first"].append(h)
            a = np.asarray(jax.nn.gelu(h @ params["first"]))
            seen["second"].append(a)
            h = h + a @ params["second"]
        seen["table"].append(h)
    for name, axis in (("table", 1), ("first", 0), ("second", 0)):
        x = np.concatenate(seen[name])
        assert found[name].input_axes == (axis,)
        np.testing.assert_allclose(found[name].mean.ravel(), x.mean(0), atol=1e-6)
        squares = np.square(x).mean(0)
        np.testing.assert_allclose(found[name].mean_square.ravel(), squares, rtol=1e-5)


def test_any_framework_and_dtype() -> None:
    x = draw({"x": (2, 6, 8)})["x"]
    attention = nn.MultiHeadDotProductAttention(2, dtype=jnp.bfloat16)
    params = attention.init(jax.random.key(0), x)
    found = ms.input_statistics(attention.apply, params, [x])
    inputs = {name: value.input_axes for name, value in found.items()}
    assert inputs == {
        "params/key/kernel": (0,),
        "params/out/kernel": (0, 1),
        "params/query/kernel": (0,),
        "params/value/kernel": (0,),
    }
    square = np.mean(np.square(np.asarray(x)), (0, 1))
    value = found["params/query/kernel"].mean_square.ravel()
    np.testing.assert_allclose(value, square, rtol=2e-2)
    assert value.dtype == jnp.float32

    graph, state = nnx.split(nnx.Conv(8, 4, (3,), rngs=nnx.Rngs(0)))
    (conv,) = ms.input_statistics(
        lambda p, x: nnx.merge(graph, p)(x), state, [x]
    ).values()
    assert conv.input_axes == (0, 1)

    mlp = eqx.nn.MLP(8, 3, 5, 1, key=jax.random.key(0))
    arrays, static = eqx.partition(mlp, eqx.is_array)
    layers = ms.input_statistics(
        lambda p, x: jax.vmap(eqx.combine(p, static))(x), arrays, [x[0], x[1]]
    )
    assert [layer.input_axes for layer in layers.values()] == [(1,), (1,)]


def test_sharded_batches_give_the_sums_over_all_devices() -> None:
    params, x = draw({"w": (4, 6)}), draw({"x": (16, 4)})["x"]
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))

    def apply(params: Any, x: Any) -> Any:
        return x @ params["w"]

    one, many = (
        ms.input_statistics(apply, params, [batch], products=True)["w"]
        for batch in (x, sharded)
    )
    for a, b in zip(one[:3], many[:3], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


W = jnp.ones((4, 3))
BAD: list[tuple[Callable[[Any, Any], Any], str]] = [
    (lambda p, x: x * 2, "no product of the batch with 'w'"),
    (lambda p, x: x @ jnp.tanh(p["w"]), "values computed from its weights"),
    (lambda p, x: x @ p["w"][:, 1:], "a part of its outputs"),
    (lambda p, x: (x @ p["w"]) @ p["w"].T, r"along the axes \[0\], and .* \[1\]"),
    (lambda p, x: x[:, :2] @ p["w"].reshape(2, 6), "joins"),
    (
        lambda p, x: lax.while_loop(
            lambda s: s.sum() < 9, lambda s: s + (x @ p["w"]).sum(), x
        ),
        "it enters 'while'",
    ),
    (
        lambda p, x: lax.scan(
            lambda c, _: (c, x @ jnp.sin(p["w"])), None, None, length=2
        ),
        "computed from its weights",
    ),
]


@pytest.mark.parametrize(("apply", "message"), BAD)
def test_a_kernel_whose_inputs_cannot_be_told_is_named(
    apply: Callable[[Any, Any], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ms.input_statistics(apply, {"w": W}, [jnp.ones((1, 4))])
    assert "'w'" in str(error.value)


def test_there_must_be_a_batch() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        ms.input_statistics(lambda p, x: x @ p["w"], {"w": W}, [])
