"""The networks: one contract, published sizes, and what they compute.

Nearly everything is checked on traced shapes. Only small networks are compiled.
"""

import functools
import itertools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models
from experiments.models import layers
from experiments.models.resnet import Block
from granet_jax import analysis, masking

LARGE = ("resnet-50", "mobilenet-v1", "mobilenet-v2", "vit-s-16")
IMAGE_MODELS = [name for name in models.NAMES if name != "gpt"]
GREY = ("lenet-300-100", "lenet-5", "cnn", "cnn-bn", "cnn-bn-small")
# These differ from another network in numbers alone.
SISTERS = (
    *("resnet-8-width-8", "resnet-20", "resnet-32", "resnet-56", "resnet-104"),
    *("resnet-110", "resnet-34-cifar", "vgg-16", "vgg-19"),
)


def conv_norm(kernel: int, inputs: int, outputs: int) -> int:
    return kernel * kernel * inputs * outputs + 2 * outputs


def plain_convolutions(channels: list[int]) -> int:
    return sum(conv_norm(3, a, b) for a, b in itertools.pairwise(channels))


def normed_cnn(colours: int, side: int) -> int:
    return plain_convolutions([colours, 16, 32, 64]) + side * side * 640 + 10


def thin_resnet(n: int, width: int = 16) -> int:
    """He et al.'s network of 6n + 2 layers for ten classes."""
    total = conv_norm(3, 3, width) + 4 * width * 10 + 10
    for inputs, outputs in ((1, 1), (1, 2), (2, 4)):
        inputs, outputs = inputs * width, outputs * width
        total += conv_norm(3, inputs, outputs)
        total += (2 * n - 1) * conv_norm(3, outputs, outputs)
        total += conv_norm(1, inputs, outputs) if inputs != outputs else 0
    return total


def wide_resnet(n: int, factor: int) -> int:
    """A pre-activation network of 6n + 4 layers for ten classes."""
    total, inputs = 9 * 3 * 16, 16
    for outputs in (16 * factor, 32 * factor, 64 * factor):
        total += 9 * inputs * outputs + (2 * n - 1) * 9 * outputs**2  # 3 x 3 kernels
        total += inputs * outputs  # shortcut
        total += 2 * inputs + (2 * n - 1) * 2 * outputs  # a norm before each 3 x 3
        inputs = outputs
    return total + 2 * inputs + 10 * inputs + 10


def gpt(width: int, depth: int) -> int:
    attention = width * 3 * width + 3 * width + width * width + width
    mlp = width * 4 * width + 4 * width + 4 * width * width + width
    block = attention + mlp + 2 * 2 * width  # two norms
    return 256 * width + 128 * width + depth * block + 2 * width + width * 256 + 256


# Trainable parameters as published, or by hand where nobody has published a number.
PARAMETERS = {
    # LeCun et al. 1998 has 266,610; Caffe's examples/mnist/lenet 431,080.
    "lenet-300-100": 266_610,
    "lenet-5": 431_080,
    "cnn": (9 * 16 + 16) + (9 * 16 * 32 + 32) + (9 * 32 * 64 + 64) + 7 * 7 * 640 + 10,
    "cnn-bn": normed_cnn(1, 7),
    "cnn-bn-small": normed_cnn(1, 4),
    "cnn-bn-gap": normed_cnn(3, 1),
    "resnet-8-width-8": thin_resnet(1, 8),
    "resnet-20-width-8": thin_resnet(3, 8),
    # The model zoo osmr/imgclsmob, of CIFAR-10, for -20, -56 and -110 ("option B");
    # counted so in several repositories for -32.
    "resnet-20": 272_474,
    "resnet-32": 466_906,
    "resnet-56": 855_770,
    "resnet-104": thin_resnet(17),
    "resnet-110": 1_730_714,
    # kuangliu/pytorch-cifar and its forks list these.
    "resnet-18-cifar": 11_173_962,
    "resnet-34-cifar": 21_282_122,
    "resnet-50-cifar": 23_520_842,
    # Network-slimming VGG ("#params=20,035,018" of CIFAR-10); -16 of the same family.
    "vgg-11-width-16": plain_convolutions([3, 16, 32, 64, 64, 128, 128, 128, 128])
    + 128 * 10
    + 10,
    "vgg-16": 14_724_042,
    "vgg-19": 20_035_018,
    "wrn-22-2": wide_resnet(3, 2),
    # torchvision's documentation, num_params.
    "resnet-50": 25_557_032,
    "mobilenet-v2": 3_504_872,
    # tensorflow.org's and GluonCV's MobileNet x1.0.
    "mobilenet-v1": 4_231_976,
    # timm's vit_small_patch16_224.
    "vit-s-16": 22_050_664,
    "gpt": gpt(128, 4),
}
# Multiply-accumulates at 224 x 224: exact numbers that counters of torchvision's models
# agree on. Howard et al. have 569 million for MobileNet.
MULTIPLIED = {
    "resnet-50": 4_089_184_256,
    "mobilenet-v2": 300_774_272,
    "mobilenet-v1": 568_740_352,
}


def classes(name: str) -> int:
    return 1000 if name in LARGE else 256 if name == "gpt" else 10


def input_shape(name: str) -> tuple[int, ...]:
    if name == "gpt":
        return (128,)
    side = 224 if name in LARGE else 28 if name in GREY else 32
    return (side, side, 1 if name in GREY else 3)


def example(name: str, number: int = 1) -> jax.ShapeDtypeStruct:
    dtype = jnp.uint8 if name == "gpt" else jnp.float32
    return jax.ShapeDtypeStruct((number, *input_shape(name)), dtype)


def network(name: str, dtype: str = "float32", axis_name: str | None = None):
    return models.create(
        name, classes=classes(name), dtype=jnp.dtype(dtype), axis_name=axis_name
    )


def variable_shapes(model: nn.Module, x: Any) -> Any:
    """Shapes of the variables."""
    init = functools.partial(model.init, train=False)
    return jax.eval_shape(init, jax.random.key(0), x)


@functools.cache
def shapes(name: str):
    return variable_shapes(network(name), example(name))


def leaves(tree) -> dict[str, Any]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {masking.leaf_name(path): leaf for path, leaf in paths}


def kernels(name: str) -> list[str]:
    return [x for x in leaves(shapes(name)["params"]) if x.endswith("/kernel")]


def watch_layers(name: str, calls: list, *, train: bool, dtype: str, axis_name=None):
    """A forward pass that notes (path, module, output) of its layers in `seen`."""

    def watch(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if context.method_name == "__call__":
            calls.append(("/".join(context.module.path), context.module, y))
        return y

    def forward(variables, x):
        with nn.intercept_methods(watch):
            return network(name, dtype, axis_name).apply(
                variables, x, train=train, mutable=["batch_stats"]
            )

    return forward


@pytest.mark.parametrize("name", models.NAMES)
def test_parameter_count(name: str) -> None:
    assert set(models.NAMES) == set(PARAMETERS)
    sizes = [x.size for x in jax.tree.leaves(shapes(name)["params"])]
    assert sum(sizes) == PARAMETERS[name]
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(shapes(name)))
    if not name.startswith(("resnet", "vgg", "wrn")):
        return
    # The depth in the name. He et al. leave out the shortcuts. Zagoruyko & Komodakis
    # count those of the three groups, and leave out the classifier. Two of VGG's three
    # linear layers are not there.
    kind, depth = name.split("-")[:2]
    left_out = "output" if kind == "wrn" else "shortcut"
    kernel_costs = sum(left_out not in x for x in kernels(name))
    assert kernel_costs == int(depth) - 2 * (kind == "vgg")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=pytest.mark.slow if x == "resnet-50" else ())
        for x in models.NAMES
        if x not in SISTERS
    ],
)
def test_contract_of_a_network(name: str) -> None:
    # In training: float32 logits, and all between in bfloat16.
    forward = watch_layers(name, training_calls := [], train=True, dtype="bfloat16")
    logits, changed = jax.eval_shape(forward, shapes(name), example(name, 3))
    positions = (128,) if name == "gpt" else ()
    assert logits.shape == (3, *positions, classes(name))
    assert logits.dtype == jnp.float32
    new, old = (x.get("batch_stats", {}) for x in (changed, shapes(name)))
    assert jax.tree.structure(new) == jax.tree.structure(old)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    for path, module, y in training_calls:
        if isinstance(module, nn.Conv | nn.Dense | nn.BatchNorm):
            wanted = "float32" if path == "output" else "bfloat16"
            assert y.dtype == jnp.dtype(wanted), path

    # In evaluation the name of the axis may be unbound.
    axis_name = "batch" if "batch_stats" in shapes(name) else None
    forward = watch_layers(
        name, evaluation_calls := [], train=False, dtype="float32", axis_name=axis_name
    )
    jaxpr = jax.make_jaxpr(forward)(shapes(name), example(name)).jaxpr
    assert jaxpr.outvars[0].aval.shape == (1, *logits.shape[1:])
    dtypes = {x.aval.dtype for e in jaxpr.eqns for x in e.outvars}
    assert jnp.dtype("bfloat16") not in dtypes
    # Batch statistics change in training only: evaluation returns its inputs. The
    # inputs are "batch_stats", then "params".
    statistics = jax.tree.leaves(old)
    assert jaxpr.outvars[1:] == jaxpr.invars[: len(statistics)]
    for train, calls in ((True, training_calls), (False, evaluation_calls)):
        norms = [x for _, x, _ in calls if isinstance(x, nn.BatchNorm)]
        assert 2 * len(norms) == len(statistics)
        for norm in norms:
            assert norm.use_running_average is not train
            assert (norm.momentum, norm.epsilon) == (0.9, 1e-5)
            assert norm.axis_name == (None if train else "batch")
    # Kernels are listed in the order in which the network applies them.
    layer_calls = [
        (p, x) for p, x, _ in evaluation_calls if isinstance(x, nn.Conv | nn.Dense)
    ]
    assert kernels(name) == [f"{path}/kernel" for path, _ in layer_calls]
    # The logits depend on everything.
    inputs = {jaxpr.outvars[0]}
    for equation in reversed(jaxpr.eqns):
        if inputs & set(equation.outvars):
            inputs |= {x for x in equation.invars if not hasattr(x, "val")}
    assert set(jaxpr.invars) <= inputs
    # Kernels are pruned; the library's default rule also takes embeddings.
    params = shapes(name)["params"]
    maskable = leaves(masking.maskable(params, models.maskable))
    assert [x for x in maskable if maskable[x]] == kernels(name)
    default = leaves(masking.maskable(params))
    extra = {x for x in default if default[x] and not maskable[x]}
    assert extra == ({"embedding/embedding"} if name == "gpt" else set())
    # Multiply-accumulates are those of the products in the traced program.
    rest = {key: x for key, x in shapes(name).items() if key != "params"}

    def evaluate(params, rest, x):
        return network(name).apply({"params": params, **rest}, x, train=False)

    flops = analysis.flops(evaluate, params, None, rest, example(name))
    # Queries times keys and weights times values, (positions, positions, width) each.
    attention = {"vit-s-16": 12 * 2 * 197**2 * 384, "gpt": 4 * 2 * 128**2 * 128}
    assert flops.dense == 2 * products(jaxpr)
    assert flops.other == 2 * attention.get(name, 0)
    costs = {name: x.dense // 2 for name, x in flops.leaves.items() if x.dense}
    assert list(costs) == kernels(name)
    if name in MULTIPLIED:
        assert sum(costs.values()) == MULTIPLIED[name]


def products(jaxpr) -> int:
    """Multiply-accumulates of all products in a jaxpr."""
    total = 0
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "jaxpr"):
                total += products(inner.jaxpr)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            taps = math.prod(shape[i] for i in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            spec = equation.params["dimension_numbers"].rhs_spec
            kernel = equation.invars[1].aval
            taps = kernel.size // kernel.shape[spec[0]]
        else:
            continue
        total += taps * equation.outvars[0].aval.size
    return total


def test_every_initialiser_has_the_stated_variance() -> None:
    key, shape = jax.random.key(0), (3, 3, 40, 80)
    for init, variance in (
        (layers.he_fan_out, 2 / (9 * 80)),
        (layers.he_fan_in, 2 / (9 * 40)),
        (layers.torch_default, 1 / (3 * 9 * 40)),
    ):
        kernel = np.asarray(init(key, shape, jnp.float32), np.float64)
        # 28,800 draws: the standard error of their variance is below 1 %.
        assert np.mean(kernel**2) == pytest.approx(variance, rel=0.04)
    bound = np.abs(layers.torch_default(key, shape, jnp.float32)).max()
    assert bound == pytest.approx(1 / math.sqrt(9 * 40), rel=1e-3)


@functools.cache
def images(number: int = 8) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(number, 6, 6, 3)).astype(np.float32)


def random_variables(model: nn.Module, x: np.ndarray):
    """Variables without compiling anything: all in [-0.3, 0.3], variances near 1."""
    rng = np.random.default_rng(0)

    def draw(path, x) -> np.ndarray:
        low, high = (0.5, 1.5) if path[-1].key in ("var", "scale") else (-0.3, 0.3)
        return rng.uniform(low, high, x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, variable_shapes(model, x))


def convolve(x: np.ndarray, kernel: np.ndarray, strides: int = 1) -> np.ndarray:
    k, side = len(kernel), len(kernel) // 2
    x = np.pad(x, ((0, 0), (side, side), (side, side), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), (1, 2))
    return np.einsum("nhwcij,ijco->nhwo", windows[:, ::strides, ::strides], kernel)


def test_block_is_the_papers_formula() -> None:
    block = Block(
        features=5,
        strides=2,
        bottleneck=False,
        kernel_init=layers.he_fan_in,
        dtype=jnp.dtype("float32"),
        axis_name=None,
    )
    variables = random_variables(block, images())
    params, stats = variables["params"], variables["batch_stats"]

    def conv_norm(x: np.ndarray, conv: str, name: str, strides: int) -> np.ndarray:
        y = convolve(x, params[conv]["kernel"], strides) - stats[name]["mean"]
        y = y / np.sqrt(stats[name]["var"] + 1e-5)
        return y * params[name]["scale"] + params[name]["bias"]

    x = images().astype(np.float64)
    y = np.maximum(conv_norm(x, "conv_1", "norm_1", 2), 0)
    y = conv_norm(y, "conv_2", "norm_2", 1)
    expected = np.maximum(y + conv_norm(x, "shortcut", "shortcut_norm", 2), 0)
    actual = jax.jit(functools.partial(block.apply, train=False))(variables, images())
    assert 0 < (expected > 0).mean() < 1
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_gpt_is_causal() -> None:
    text = np.random.default_rng(0).integers(0, 256, (2, 24), dtype=np.uint8)
    model = network("gpt")
    variables = random_variables(model, text)
    apply = jax.jit(functools.partial(model.apply, variables, train=False))
    before = np.asarray(apply(text))
    for t in (0, 11, 23):
        other = text.copy()
        other[1, t] += 1
        after = np.asarray(apply(other))
        np.testing.assert_array_equal(after[0], before[0])
        np.testing.assert_array_equal(after[1, :t], before[1, :t])
        # The change shows at t and at every later position.
        assert (np.abs(after[1, t:] - before[1, t:]).max(axis=-1) > 1e-5).all()
    # A position knows where it is: the same byte twice gives two different logits.
    same = np.asarray(apply(np.zeros_like(text)))
    assert np.abs(same[0, 0] - same[0, 1]).max() > 1e-3


def test_inputs_that_do_not_fit_are_refused() -> None:
    for name, shape, message in (
        ("vgg-19", (1, 8, 8, 1), r"vgg-19 takes images of 16 x 16 .* got 8 x 8"),
        ("vgg-16", (1, 15, 32, 3), r"vgg-16 takes images of 16 x 16 .* got 15 x 32"),
        ("lenet-5", (1, 8, 8, 1), r"lenet-5 takes images of 16 x 16 .* got 8 x 8"),
        ("vit-s-16", (1, 28, 28, 1), r"vit-s-16 .* multiples of 16, got 28 x 28"),
        ("vit-s-16", (1, 8, 8, 1), r"vit-s-16 takes images of 16 x 16"),
        ("gpt", (1, 28, 28, 1), r"gpt takes text .* \(1, 28, 28, 1\)"),
        ("gpt", (1, 129), r"gpt takes texts of at most 128 bytes, got 129"),
        *((x, (1, 128), r"takes images .* \(1, 128\)") for x in IMAGE_MODELS),
    ):
        x = jax.ShapeDtypeStruct(shape, jnp.uint8 if len(shape) == 2 else jnp.float32)
        with pytest.raises(ValueError, match=message):
            variable_shapes(network(name), x)


def test_other_sizes_of_images_fit() -> None:
    for name, size, channels in (
        ("vgg-19", 28, 1),  # Fashion-MNIST
        ("vgg-16", 16, 1),
        ("lenet-5", 16, 1),
        ("cnn", 8, 1),  # digits
        ("resnet-20", 8, 1),
        ("wrn-22-2", 8, 1),
        ("mobilenet-v2", 8, 1),
        ("vit-s-16", 64, 3),  # Tiny ImageNet
    ):
        x = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
        init = functools.partial(network(name).init_with_output, train=False)
        logits, _ = jax.eval_shape(init, jax.random.key(0), x)
        assert logits.shape == (2, classes(name))
