"""The experiments' networks: sizes, published counts, dtypes, names; what they compute.

Nearly all is checked on traced shapes; only small networks are compiled.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from experiments import models
from experiments.models import layers
from experiments.models.resnet import Block, ResNet
from granet_jax import analysis, masking

LARGE = ("resnet-50", "mobilenet-v1", "mobilenet-v2", "vit-s-16")
GREY = ("lenet-300-100", "lenet-5", "cnn", "cnn-bn", "cnn-bn-small")

# Trainable parameters as published, with the number of classes of `classes`.
PUBLISHED = {
    # LeCun et al. 1998 has 266,610; Caffe's examples/mnist/lenet 431,080.
    "lenet-300-100": 266_610,
    "lenet-5": 431_080,
    # The model zoo osmr/imgclsmob, of CIFAR-10, for -20, -56 and -110 ("option B");
    # counted so in several repositories for -32.
    "resnet-20": 272_474,
    "resnet-32": 466_906,
    "resnet-56": 855_770,
    "resnet-110": 1_730_714,
    # kuangliu/pytorch-cifar and its forks list these.
    "resnet-18-cifar": 11_173_962,
    "resnet-34-cifar": 21_282_122,
    "resnet-50-cifar": 23_520_842,
    # Network-slimming VGG ("#params=20,035,018" of CIFAR-10); -16 of the same family.
    "vgg-16": 14_724_042,
    "vgg-19": 20_035_018,
    # torchvision's documentation, num_params.
    "resnet-50": 25_557_032,
    "mobilenet-v2": 3_504_872,
    # tensorflow.org's and GluonCV's MobileNet x1.0.
    "mobilenet-v1": 4_231_976,
    # timm's vit_small_patch16_224.
    "vit-s-16": 22_050_664,
}


def conv_norm(kernel: int, inputs: int, outputs: int) -> int:
    return kernel * kernel * inputs * outputs + 2 * outputs


def thin_resnet(n: int) -> int:
    """He et al.'s network of 6n + 2 layers for ten classes, by hand."""
    total = conv_norm(3, 3, 16) + 64 * 10 + 10
    for inputs, outputs in ((16, 16), (16, 32), (32, 64)):
        total += conv_norm(3, inputs, outputs)
        total += (2 * n - 1) * conv_norm(3, outputs, outputs)
        total += conv_norm(1, inputs, outputs) if inputs != outputs else 0
    return total


def wide_resnet(n: int, factor: int) -> int:
    """A pre-activation network of 6n + 4 layers for ten classes, by hand."""
    total, inputs = 9 * 3 * 16, 16
    for outputs in (16 * factor, 32 * factor, 64 * factor):
        total += 9 * inputs * outputs + (2 * n - 1) * 9 * outputs**2  # 3 x 3 kernels
        total += inputs * outputs  # shortcut
        total += 2 * inputs + (2 * n - 1) * 2 * outputs  # a norm before each 3 x 3
        inputs = outputs
    return total + 2 * inputs + 10 * inputs + 10


def gpt(width: int, depth: int) -> int:
    block = (
        width * 3 * width + 3 * width  # queries, keys, values
        + width * width + width  # what leaves the attention
        + width * 4 * width + 4 * width
        + 4 * width * width + width
        + 2 * 2 * width  # norms
    )  # fmt: skip
    return 256 * width + 128 * width + depth * block + 2 * width + width * 256 + 256


BY_HAND = {
    "cnn": (9 * 16 + 16) + (9 * 16 * 32 + 32) + (9 * 32 * 64 + 64) + 7 * 7 * 640 + 10,
    "cnn-bn": conv_norm(3, 1, 16)
    + conv_norm(3, 16, 32)
    + conv_norm(3, 32, 64)
    + (7 * 7 * 640 + 10),
    "cnn-bn-small": conv_norm(3, 1, 16)
    + conv_norm(3, 16, 32)
    + conv_norm(3, 32, 64)
    + (4 * 4 * 640 + 10),
    "resnet-104": thin_resnet(17),
    "wrn-22-2": wide_resnet(3, 2),
    "gpt": gpt(128, 4),
}


def classes(name: str) -> int:
    return 1000 if name in LARGE else 256 if name == "gpt" else 10


def input_shape(name: str) -> tuple[int, ...]:
    if name == "gpt":
        return (128,)
    if name in GREY:
        return (28, 28, 1)
    return (224, 224, 3) if name in LARGE else (32, 32, 3)


def example(name: str, number: int = 1) -> jax.ShapeDtypeStruct:
    dtype = jnp.uint8 if name == "gpt" else jnp.float32
    return jax.ShapeDtypeStruct((number, *input_shape(name)), dtype)


@functools.cache
def network(name: str, dtype: str = "float32", axis_name: str | None = None):
    return models.create(
        name, classes=classes(name), dtype=jnp.dtype(dtype), axis_name=axis_name
    )


@functools.cache
def shapes(name: str):
    """Shapes of the variables."""
    init = functools.partial(network(name).init, train=False)
    return jax.eval_shape(init, jax.random.key(0), example(name))


def leaves(tree) -> dict[str, jax.ShapeDtypeStruct]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {masking.leaf_name(path): leaf for path, leaf in paths}


def kernels(name: str) -> list[str]:
    return [x for x in leaves(shapes(name)["params"]) if x.endswith("/kernel")]


def watched(name: str, seen: list, *, train: bool, dtype: str, axis_name=None):
    """A forward pass that notes (path, module, output) of its layers in `seen`."""

    def watch(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if context.method_name == "__call__":
            seen.append(("/".join(context.module.path), context.module, y))
        return y

    def forward(variables, x):
        with nn.intercept_methods(watch):
            return network(name, dtype, axis_name).apply(
                variables, x, train=train, mutable=["batch_stats"]
            )

    return forward


@functools.cache
def training(name: str):
    """(output, layers) in bfloat16 of 3 examples, with train=True."""
    forward = watched(name, seen := [], train=True, dtype="bfloat16")
    return jax.eval_shape(forward, shapes(name), example(name, 3)), seen


@functools.cache
def evaluation(name: str):
    """(jaxpr, layers) of one example, with train=False and an unbound axis name."""
    axis_name = "batch" if "batch_stats" in shapes(name) else None
    forward = watched(
        name, seen := [], train=False, dtype="float32", axis_name=axis_name
    )
    return jax.make_jaxpr(forward)(shapes(name), example(name)).jaxpr, seen


def close(actual, expected) -> None:
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


def test_every_model_is_counted() -> None:
    assert set(models.NAMES) == {*PUBLISHED, *BY_HAND}
    assert len(set(models.NAMES)) == len(models.NAMES)


@pytest.mark.parametrize("name", models.NAMES)
def test_parameter_count(name: str) -> None:
    found = sum(x.size for x in jax.tree.leaves(shapes(name)["params"]))
    assert found == {**PUBLISHED, **BY_HAND}[name]


@pytest.mark.parametrize("name", models.NAMES)
def test_shapes_and_dtypes(name: str) -> None:
    (logits, changed), seen = training(name)
    positions = (128,) if name == "gpt" else ()
    assert logits.shape == (3, *positions, classes(name))
    assert logits.dtype == jnp.float32
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(shapes(name)))
    found, expected = (x.get("batch_stats", {}) for x in (changed, shapes(name)))
    assert jax.tree.map(lambda x, y: x == y, found, expected) == jax.tree.map(
        lambda _: True, expected
    )
    layers_ = [x for x in seen if isinstance(x[1], nn.Conv | nn.Dense | nn.BatchNorm)]
    assert {y.dtype for p, _, y in layers_ if p != "output"} == {jnp.dtype("bfloat16")}
    assert {y.dtype for p, _, y in layers_ if p == "output"} == {jnp.dtype("float32")}

    jaxpr, _ = evaluation(name)
    assert jaxpr.outvars[0].aval.shape == (1, *logits.shape[1:])
    computed = {x.aval.dtype for e in jaxpr.eqns for x in e.outvars}
    assert jnp.dtype("bfloat16") not in computed


@pytest.mark.parametrize("name", models.NAMES)
def test_batch_statistics_change_in_training_only(name: str) -> None:
    statistics = jax.tree.leaves(shapes(name).get("batch_stats", {}))
    for train, (_, seen) in ((True, training(name)), (False, evaluation(name))):
        norms = [x for _, x, _ in seen if isinstance(x, nn.BatchNorm)]
        assert 2 * len(norms) == len(statistics)
        for norm in norms:
            assert norm.use_running_average is not train
            assert (norm.momentum, norm.epsilon) == (0.9, 1e-5)
            assert norm.axis_name == (None if train else "batch")
    # Those that come out are those that went in, untouched; "batch_stats" is before
    # "params", and after the logits.
    jaxpr, _ = evaluation(name)
    assert len(jaxpr.outvars) == 1 + len(statistics)
    assert jaxpr.outvars[1:] == jaxpr.invars[: len(statistics)]


@pytest.mark.parametrize("name", models.NAMES)
def test_order_of_kernels_is_order_in_the_network(name: str) -> None:
    _, seen = evaluation(name)
    called = [f"{p}/kernel" for p, x, _ in seen if isinstance(x, nn.Conv | nn.Dense)]
    assert kernels(name) == called


@pytest.mark.parametrize("name", models.NAMES)
def test_logits_depend_on_every_parameter(name: str) -> None:
    jaxpr, _ = evaluation(name)
    needed = {jaxpr.outvars[0]}
    for equation in reversed(jaxpr.eqns):
        if needed & set(equation.outvars):
            needed |= {x for x in equation.invars if not hasattr(x, "val")}
    names = leaves((shapes(name), example(name)))
    unused = {n for n, x in zip(names, jaxpr.invars, strict=True) if x not in needed}
    assert not unused


@pytest.mark.parametrize("name", models.NAMES)
def test_maskable(name: str) -> None:
    params = shapes(name)["params"]
    chosen = leaves(masking.maskable(params, models.maskable))
    assert [x for x in chosen if chosen[x]] == kernels(name)
    # Nothing else has two dimensions but what embeds.
    default = leaves(masking.maskable(params))
    extra = {x for x in default if default[x] and not chosen[x]}
    assert extra == {
        "vit-s-16": {"position", "token"},
        "gpt": {"position", "embedding/embedding"},
    }.get(name, set())


@pytest.mark.parametrize(
    "name", [x for x in models.NAMES if x.startswith(("resnet", "vgg", "wrn"))]
)
def test_depth_is_the_number_in_the_name(name: str) -> None:
    kind, _, rest = name.partition("-")
    # He et al. leave out the shortcuts; Zagoruyko & Komodakis count those of the three
    # groups, and leave out the classifier.
    left_out = "output" if kind == "wrn" else "shortcut"
    depth = int(rest.split("-")[0])
    found = sum(left_out not in x for x in kernels(name))
    # Two of VGG's three linear layers are not there.
    assert found == (depth - 2 if kind == "vgg" else depth)


def test_every_linen_initialiser_has_the_stated_variance() -> None:
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


# What they compute: small networks of the same code.


def small(**changes) -> ResNet:
    given = {
        "classes": 3,
        "dtype": jnp.dtype("float32"),
        "axis_name": None,
        "blocks": (1, 1),
        "width": 4,
        "bottleneck": False,
        "large": False,
        "kernel_init": layers.he_fan_in,
        "output_init": layers.torch_default,
    }
    return ResNet(**(given | changes))


@functools.cache
def images(number: int = 8) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(number, 6, 6, 3)).astype(np.float32)


def drawn(shapes_, seed: int = 0):
    """Variables without compiling anything: all in [-0.3, 0.3], variances near 1."""
    rng = np.random.default_rng(seed)

    def draw(path, x) -> np.ndarray:
        low, high = (0.5, 1.5) if path[-1].key in ("var", "scale") else (-0.3, 0.3)
        return rng.uniform(low, high, x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes_)


def drawn_for(model: nn.Module, x: np.ndarray):
    init = functools.partial(model.init, train=False)
    return drawn(jax.eval_shape(init, jax.random.key(0), x))


def test_block_is_the_papers_formula() -> None:
    block = Block(
        features=5,
        strides=2,
        bottleneck=False,
        kernel_init=layers.he_fan_in,
        dtype=jnp.dtype("float32"),
        axis_name=None,
    )
    variables = drawn_for(block, images())
    params, stats = variables["params"], variables["batch_stats"]

    def conv(x: np.ndarray, name: str, strides: int) -> np.ndarray:
        kernel = params[name]["kernel"]
        k, side = len(kernel), len(kernel) // 2
        x = np.pad(x, ((0, 0), (side, side), (side, side), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), (1, 2))
        return np.einsum("nhwcij,ijco->nhwo", windows[:, ::strides, ::strides], kernel)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        root = np.sqrt(stats[name]["var"] + 1e-5)
        y = (x - stats[name]["mean"]) / root
        return y * params[name]["scale"] + params[name]["bias"]

    x = images().astype(np.float64)
    y = np.maximum(norm(conv(x, "conv_1", 2), "norm_1"), 0)
    y = norm(conv(y, "conv_2", 1), "norm_2")
    expected = np.maximum(y + norm(conv(x, "shortcut", 2), "shortcut_norm"), 0)
    found = jax.jit(functools.partial(block.apply, train=False))(variables, images())
    assert 0 < (expected > 0).mean() < 1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_pmap_with_axis_name_is_the_whole_batch_under_jit() -> None:
    variables = drawn_for(small(), images())
    labels = np.arange(8) % 3

    def loss(params, model, x, y):
        logits, new = model.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        rows = jnp.arange(len(y))
        return -jax.nn.log_softmax(logits)[rows, y].mean(), (logits, new)

    def gradient(model, x, y):
        return jax.grad(loss, has_aux=True)(variables["params"], model, x, y)

    whole = jax.jit(functools.partial(gradient, small()))
    grads, (logits, new) = whole(images(), labels)

    def part(axis_name, x, y):
        grads, aux = gradient(small(axis_name=axis_name), x, y)
        return lax.pmean(grads, "batch"), aux

    split = [x.reshape(2, 4, *x.shape[1:]) for x in (images(), labels)]
    for axis_name, equal in (("batch", True), (None, False)):
        mapped = jax.pmap(
            functools.partial(part, axis_name),
            axis_name="batch",
            devices=jax.devices()[:2],
        )
        found_grads, (found_logits, found_new) = mapped(*split)
        if not equal:
            assert np.abs(found_logits.reshape(8, 3) - logits).max() > 1e-2
            continue
        close(found_logits.reshape(8, 3), logits)
        for device in range(2):
            at = functools.partial(jax.tree.map, lambda x, d=device: x[d])
            jax.tree.map(close, at(found_new), new)
            jax.tree.map(close, at(found_grads), grads)

    # The statistics move by a tenth towards those of the batch.
    x = np.pad(images().astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))
    kernel = variables["params"]["conv"]["kernel"]
    stem = np.einsum("nhwcij,ijco->nhwo", windows, kernel)
    old, new = variables["batch_stats"]["conv_norm"], new["batch_stats"]["conv_norm"]
    close(new["mean"], 0.9 * old["mean"] + 0.1 * stem.mean((0, 1, 2)))
    close(new["var"], 0.9 * old["var"] + 0.1 * stem.var((0, 1, 2)))


def test_gpt_is_causal() -> None:
    text = np.random.default_rng(0).integers(0, 256, (2, 24), dtype=np.uint8)
    variables = drawn(shapes("gpt"))
    apply = jax.jit(functools.partial(network("gpt").apply, variables, train=False))
    before = np.asarray(apply(text))
    for t in (0, 11, 23):
        other = text.copy()
        other[1, t] += 1
        after = np.asarray(apply(other))
        np.testing.assert_array_equal(after[0], before[0])
        np.testing.assert_array_equal(after[1, :t], before[1, :t])
        # It is told apart at t and at every position from there on.
        assert (np.abs(after[1, t:] - before[1, t:]).max(axis=-1) > 1e-5).all()
    # A position knows where it is: the same byte twice gives two different logits.
    same = np.asarray(apply(np.zeros_like(text)))
    assert np.abs(same[0, 0] - same[0, 1]).max() > 1e-3


@pytest.mark.parametrize("name", ["lenet-5", "cnn", "small", "gpt"])
def test_gradient_reaches_every_parameter(name: str) -> None:
    rng = np.random.default_rng(0)
    if name == "gpt":
        model, x = network(name), rng.integers(0, 256, (4, 24), dtype=np.uint8)
    else:
        large = {"bottleneck": True, "large": True, "blocks": (1,)}
        model = small(**large) if name == "small" else network(name)
        x = rng.normal(size=(4, 16, 16, 1)).astype(np.float32)
    variables = drawn_for(model, x)

    def loss(params):
        logits, _ = model.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return -jax.nn.log_softmax(logits)[..., 0].mean()

    grads = leaves(jax.jit(jax.grad(loss))(variables["params"]))
    for leaf, gradient in grads.items():
        gradient = np.asarray(gradient)
        assert np.isfinite(gradient).all(), leaf
        if leaf == "position":
            gradient = gradient[:24]  # of the positions that the text has
        assert (gradient != 0).any(), leaf


# What does not fit.


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("vgg-19", (1, 8, 8, 1), r"vgg-19 takes images of 16 x 16 .* got 8 x 8"),
        ("vgg-16", (1, 15, 32, 3), r"vgg-16 takes images of 16 x 16 .* got 15 x 32"),
        ("lenet-5", (1, 8, 8, 1), r"lenet-5 takes images of 16 x 16 .* got 8 x 8"),
        ("vit-s-16", (1, 28, 28, 1), r"vit-s-16 .* multiples of 16, got 28 x 28"),
        ("vit-s-16", (1, 8, 8, 1), r"vit-s-16 takes images of 16 x 16"),
        ("gpt", (1, 28, 28, 1), r"gpt takes text .* \(1, 28, 28, 1\)"),
        ("gpt", (1, 129), r"gpt takes texts of at most 128 bytes, got 129"),
    ],
)
def test_an_input_that_does_not_fit(name, shape, message: str) -> None:
    x = jax.ShapeDtypeStruct(shape, example(name).dtype)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            functools.partial(network(name).init, train=False), jax.random.key(0), x
        )


@pytest.mark.parametrize("name", [x for x in models.NAMES if x != "gpt"])
def test_text_does_not_fit_a_model_of_images(name: str) -> None:
    with pytest.raises(ValueError, match=r"takes images .* \(1, 128\)"):
        jax.eval_shape(
            functools.partial(network(name).init, train=False),
            jax.random.key(0),
            example("gpt"),
        )


@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [
        ("vgg-19", 28, 1),  # Fashion-MNIST
        ("vgg-16", 16, 1),
        ("vgg-19", 64, 3),  # Tiny ImageNet
        ("lenet-5", 16, 1),
        ("cnn", 8, 1),  # digits
        ("resnet-20", 8, 1),
        ("resnet-50-cifar", 8, 1),
        ("wrn-22-2", 8, 1),
        ("mobilenet-v2", 8, 1),
        ("resnet-50", 8, 1),
        ("vit-s-16", 64, 3),
    ],
)
def test_other_sizes_of_images_fit(name: str, size: int, channels: int) -> None:
    x = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    init = functools.partial(network(name).init_with_output, train=False)
    logits, _ = jax.eval_shape(init, jax.random.key(0), x)
    assert logits.shape == (2, classes(name))


def test_unknown_names_and_dtypes() -> None:
    with pytest.raises(ValueError, match=r"one of lenet-300-100, .*, got 'resnet'"):
        models.create("resnet", classes=10)
    with pytest.raises(ValueError, match="float32, bfloat16, got int32"):
        models.create("cnn", classes=10, dtype=jnp.int32)


# Multiply-accumulates.


def from_jaxpr(jaxpr) -> int:
    """Multiply-accumulates of all products in a jaxpr, whatever they are of."""
    total = 0
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "jaxpr"):
                total += from_jaxpr(inner.jaxpr)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            operand = equation.invars[0].aval
            taps = math.prod(operand.shape[i] for i in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            spec = equation.params["dimension_numbers"].rhs_spec
            operand = equation.invars[1].aval
            taps = operand.size // operand.shape[spec[0]]
        else:
            continue
        total += taps * equation.outvars[0].aval.size
    return total


def multiplied(model: nn.Module, shape: tuple[int, ...]) -> analysis.Flops:
    """FLOPs of a forward pass of one example."""
    x = jax.ShapeDtypeStruct((1, *shape), jnp.uint8 if len(shape) == 1 else jnp.float32)
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), x)
    params = variables.pop("params")

    def forward(params, rest, x):
        return model.apply({"params": params, **rest}, x, train=False)

    return analysis.flops(forward, params, None, variables, x)


@functools.cache
def flops(name: str) -> analysis.Flops:
    return multiplied(network(name), input_shape(name))


def counted(name: str) -> dict[str, int]:
    """Multiply-accumulates of every kernel."""
    leaves = flops(name).leaves.items()
    return {leaf: found.dense // 2 for leaf, found in leaves if found.dense}


@pytest.mark.parametrize("name", models.NAMES)
def test_multiply_accumulates_are_those_of_the_jaxpr(name: str) -> None:
    jaxpr, _ = evaluation(name)
    # Queries times keys and weights times values, (positions, positions, width) each.
    attention = {"vit-s-16": 12 * 2 * 197**2 * 384, "gpt": 4 * 2 * 128**2 * 128}
    assert flops(name).dense == 2 * from_jaxpr(jaxpr)
    assert flops(name).other == 2 * attention.get(name, 0)
    assert list(counted(name)) == kernels(name)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        # Exact numbers that counters of torchvision's models agree on, at 224 x 224.
        ("resnet-50", 4_089_184_256),
        ("mobilenet-v2", 300_774_272),
        # Howard et al. have 569 million.
        ("mobilenet-v1", 568_740_352),
    ],
)
def test_published_multiply_accumulates(name: str, published: int) -> None:
    assert sum(counted(name).values()) == published


def test_multiply_accumulates_by_hand() -> None:
    assert counted("lenet-5") == {
        "conv_0/kernel": 24 * 24 * 25 * 20,
        "conv_1/kernel": 8 * 8 * 25 * 20 * 50,
        "hidden/kernel": 800 * 500,
        "output/kernel": 5_000,
    }
    # The padding counts as the rest: 28 x 28 positions, then 14 x 14, then 7 x 7.
    assert counted("cnn") == {
        "conv_0/kernel": 28 * 28 * 9 * 16,
        "conv_1/kernel": 14 * 14 * 9 * 16 * 32,
        "conv_2/kernel": 7 * 7 * 9 * 32 * 64,
        "output/kernel": 7 * 7 * 64 * 10,
    }
    # Depthwise: one channel in for each one out.
    assert counted("mobilenet-v1")["layer_02/conv_1/kernel"] == 56 * 56 * 9 * 64
    assert counted("mobilenet-v1")["layer_02/conv_2/kernel"] == 56 * 56 * 64 * 128
    # The class token is one position, the patches and the token 197.
    assert counted("vit-s-16")["embedding/kernel"] == 196 * 768 * 384
    assert counted("vit-s-16")["layer_00/attention_1/kernel"] == 197 * 384 * 1152
    assert counted("vit-s-16")["output/kernel"] == 384 * 1000
    assert counted("gpt")["output/kernel"] == 128 * 128 * 256


class Twice(nn.Module):
    """A layer that is applied two times, at two sizes."""

    @nn.compact
    def __call__(self, x, train):
        conv = nn.Conv(1, (3, 3), (2, 2), name="conv")
        return conv(conv(x))


def test_a_shared_kernel_counts_every_time() -> None:
    found = multiplied(Twice(), (8, 8, 1))
    assert found.leaves["conv/kernel"].dense == 2 * 9 * (4 * 4 + 2 * 2) == found.dense
