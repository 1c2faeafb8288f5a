"""What is refused, and how: every message names argument, value and remedy."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax import distributions, masking, schedules, scores, selection
from tests.helpers.trees import gradients, parameters, shape_tree

# Every constructor with arguments it takes; a test replaces one of them.
MAKERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "granet": (granet_jax.granet, {"sparsity": 0.9, "total_steps": 100}),
    "gmp": (granet_jax.gmp, {"sparsity": 0.9, "end_step": 100}),
    "rigl": (granet_jax.rigl, {"sparsity": 0.9, "total_steps": 100}),
    "set": (granet_jax.set_, {"sparsity": 0.9, "total_steps": 100}),
    "snfs": (granet_jax.snfs, {"sparsity": 0.9, "total_steps": 100}),
    "static": (granet_jax.static, {"sparsity": 0.9}),
}
WITH_STEPS = tuple(name for name in MAKERS if name != "static")
GRADUAL = ("granet", "gmp")
EXCHANGING = ("granet", "rigl", "set", "snfs")
NOT_NUMBERS = ["0.5", True, None, 0.5j, [0.5], np.float32([0.5])]
NAN_AND_INFINITE = [math.nan, math.inf, -math.inf]


def make(maker: str, **changed: Any) -> granet_jax.Method:
    function, arguments = MAKERS[maker]
    more = {} if maker == "static" else {"interval": 10}
    return function(**{**arguments, **more, **changed})


def says(text: str) -> str:
    """A pattern for `match` that finds this text, word for word."""
    return re.escape(text)


def exactly(message: str) -> str:
    """A pattern for `match`: this and no more, but for what JAX says of tracebacks."""
    return rf"^{re.escape(message)}(\n-+\nFor simplicity, JAX .*)?$"


def on(names: tuple[str, ...], values: list[Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name in names for value in values]


# Constructors: numbers.


@pytest.mark.parametrize(
    ("maker", "value"), on(tuple(MAKERS), [-0.1, 1.0, 1, 1.5, 90, *NAN_AND_INFINITE])
)
def test_sparsity_out_of_range(maker: str, value: Any) -> None:
    message = (
        f"sparsity must be in [0, 1), got {value}: it is the share of pruned weights "
        "(0.9 for 90%)."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        make(maker, sparsity=value)


@pytest.mark.parametrize(("maker", "value"), on(tuple(MAKERS), NOT_NUMBERS))
def test_sparsity_is_no_number(maker: str, value: Any) -> None:
    message = f"sparsity must be a number in [0, 1), got {value!r}."
    with pytest.raises(TypeError, match=exactly(message)):
        make(maker, sparsity=value)


@pytest.mark.parametrize(("maker", "value"), on(GRADUAL, [-0.1, 1.0, math.nan]))
def test_initial_sparsity_out_of_range(maker: str, value: Any) -> None:
    message = f"initial_sparsity must be in [0, 1), got {value}: "
    with pytest.raises(ValueError, match="^" + says(message)):
        make(maker, initial_sparsity=value)


@pytest.mark.parametrize(("maker", "value"), on(GRADUAL, NOT_NUMBERS))
def test_initial_sparsity_is_no_number(maker: str, value: Any) -> None:
    message = f"initial_sparsity must be a number in [0, 1), got {value!r}."
    with pytest.raises(TypeError, match=exactly(message)):
        make(maker, initial_sparsity=value)


@pytest.mark.parametrize("maker", GRADUAL)
def test_initial_sparsity_above_sparsity(maker: str) -> None:
    message = (
        "initial_sparsity must be at most sparsity, got initial_sparsity=0.75 with "
        "sparsity=0.5."
    )
    with pytest.raises(ValueError, match=says(message)):
        make(maker, sparsity=0.5, initial_sparsity=0.75)
    assert make(maker, sparsity=0.5, initial_sparsity=0.5).sparsity(0) == 0.5


@pytest.mark.parametrize(
    ("maker", "value"), on(EXCHANGING, [-0.1, 1.0 + 2**-52, 50, *NAN_AND_INFINITE])
)
def test_fraction_out_of_range(maker: str, value: Any) -> None:
    message = f"fraction must be in [0, 1], got {value}."
    with pytest.raises(ValueError, match=exactly(message)):
        make(maker, fraction=value)


@pytest.mark.parametrize(("maker", "value"), on(EXCHANGING, NOT_NUMBERS))
def test_fraction_is_no_number(maker: str, value: Any) -> None:
    message = f"fraction must be a number in [0, 1], got {value!r}."
    with pytest.raises(TypeError, match=exactly(message)):
        make(maker, fraction=value)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_final_fraction_out_of_range(value: Any) -> None:
    message = f"final_fraction must be in [0, 1], got {value}."
    with pytest.raises(ValueError, match=exactly(message)):
        make("granet", final_fraction=value)


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_final_fraction_is_no_number(value: Any) -> None:
    message = f"final_fraction must be a number in [0, 1], got {value!r}."
    with pytest.raises(TypeError, match=exactly(message)):
        make("granet", final_fraction=value)


@pytest.mark.parametrize(
    "value", [0.0, -0.5, 1.5, 75, *NAN_AND_INFINITE, "0.75", True, None]
)
def test_stop_out_of_range_or_no_number(value: Any) -> None:
    message = f"stop must be a number in (0, 1], got {value!r}."
    with pytest.raises(ValueError, match=exactly(message)):
        make("rigl", stop=value)


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_decay_out_of_range(value: Any) -> None:
    message = f"decay must be in [0, 1), got {value}."
    with pytest.raises(ValueError, match=exactly(message)):
        make("snfs", decay=value)
    with pytest.raises(ValueError, match=exactly(f"accumulator_{message}")):
        dataclasses.replace(make("snfs"), accumulator_decay=value)


@pytest.mark.parametrize("value", ["0.9", True, 0.5j])
def test_decay_is_no_number(value: Any) -> None:
    message = f"decay must be a number in [0, 1), got {value!r}."
    with pytest.raises(TypeError, match=exactly(message)):
        make("snfs", decay=value)
    with pytest.raises(TypeError, match=exactly(f"accumulator_{message}")):
        dataclasses.replace(make("snfs"), accumulator_decay=value)


# Constructors: steps.


def step_arguments() -> list[tuple[str, str, int]]:
    """Constructor, argument and the least value it takes."""
    found = [(maker, "interval", 1) for maker in WITH_STEPS]
    found += [(maker, "total_steps", 1) for maker in EXCHANGING]
    found += [(maker, "end_step", 1) for maker in GRADUAL]
    return found + [(maker, "begin_step", 0) for maker in GRADUAL]


@pytest.mark.parametrize(("maker", "argument", "least"), step_arguments())
def test_steps_out_of_range(maker: str, argument: str, least: int) -> None:
    for value in (least - 1, -10, 2**31, 10**12):
        message = f"{argument} must be at least {least} and below 2**31, got {value}."
        with pytest.raises(ValueError, match=exactly(message)):
            make(maker, **{argument: value})


@pytest.mark.parametrize(("maker", "argument", "least"), step_arguments())
def test_steps_are_no_integers(maker: str, argument: str, least: int) -> None:
    del least
    for value in (10.0, 0.5, "10", True, math.nan, math.inf, [10]):
        message = f"{argument} must be an integer number of steps, got {value!r}."
        with pytest.raises(TypeError, match=exactly(message)):
            make(maker, **{argument: value})


@pytest.mark.parametrize("maker", GRADUAL)
@pytest.mark.parametrize("begin", [50, 51, 1000])
def test_end_not_after_begin(maker: str, begin: int) -> None:
    message = (
        f"end_step must be after begin_step, got end_step=50 with begin_step={begin}."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        make(maker, begin_step=begin, end_step=50)


@pytest.mark.parametrize("maker", GRADUAL)
def test_interval_longer_than_pruning(maker: str) -> None:
    message = (
        "interval must fit between begin_step and end_step, got interval=31 with "
        "begin_step=20 and end_step=50: no update would prune. Take a shorter "
        "interval or a later end_step."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        make(maker, begin_step=20, end_step=50, interval=31)
    method = make(maker, begin_step=20, end_step=50, interval=30)
    assert (method.sparsity(49), method.sparsity(50)) == (0.0, 0.9)


def test_default_interval_is_explained_where_it_does_not_fit() -> None:
    message = "interval=1000 with begin_step=0 and end_step=400: no update would prune"
    with pytest.raises(ValueError, match=says(message)):
        granet_jax.granet(0.9, 800)


def test_end_after_the_training() -> None:
    message = (
        "end_step must be at most total_steps, got end_step=101 with total_steps=100."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        make("granet", end_step=101)
    assert make("granet", end_step=100).sparsity(100) == 0.9


@pytest.mark.parametrize("maker", ["rigl", "set", "snfs"])
def test_interval_longer_than_the_training(maker: str) -> None:
    last = {"rigl": 75, "set": 100, "snfs": 100}[maker]
    message = (
        f"interval must be at most the last step that updates masks ({last}), got "
        f"{last + 1}: the masks would never change. For fixed masks use static()."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        make(maker, interval=last + 1)
    assert list(make(maker, interval=last).updates.steps()) == [last]


# Constructors: names.


@pytest.mark.parametrize(
    ("maker", "value"), on(tuple(MAKERS), ["ERK", "gaussian", "", None, 3])
)
def test_unknown_distribution(maker: str, value: Any) -> None:
    message = (
        "distribution must be one of 'uniform', 'er', 'erk' or a function of (shapes, "
        f"sparsity), got {value!r}."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        make(maker, distribution=value)


@pytest.mark.parametrize(
    ("maker", "value"), on(GRADUAL, ["Global", "layers", "", None, 3])
)
def test_unknown_scope(maker: str, value: Any) -> None:
    message = f'scope must be "layer" or "global", got {value!r}.'
    with pytest.raises(ValueError, match=exactly(message)):
        make(maker, scope=value)


@pytest.mark.parametrize("value", ["gradients", "", None, 3, scores.gradient])
def test_unknown_grow(value: Any) -> None:
    message = f"grow must be one of 'gradient', 'momentum', 'random', got {value!r}."
    with pytest.raises(ValueError, match=exactly(message)):
        make("granet", grow=value)


def test_distribution_that_returns_no_densities() -> None:
    for given in ([0.5], [0.5] * 3, [0.5, 1.5], [-0.1, 0.5], [0.5, math.nan]):
        method = granet_jax.static(0.5, distribution=lambda s, d, x=given: x)
        message = (
            "distribution must return one density in [0, 1] for each of the 2 leaves, "
            f"got {given}."
        )
        with pytest.raises(ValueError, match=exactly(message)):
            granet_jax.transform(method).init(parameters())


def test_caps_without_room() -> None:
    message = (
        "sparsity 0.5 asks for 60 active weights, but caps let the leaves hold 30 at "
        "most: raise one of them."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        distributions.counts([(6, 8), (3, 3, 2, 4)], 0.5, "uniform", caps=[10, 20])


# One's own method.


@pytest.mark.parametrize("part", ["sparsity", "prune", "drop", "fraction"])
@pytest.mark.parametrize("value", [None, 0.5, "magnitude"])
def test_part_is_no_function(part: str, value: Any) -> None:
    message = f"{part} must be a function, got {value!r}."
    with pytest.raises(TypeError, match=exactly(message)):
        dataclasses.replace(make("rigl"), **{part: value})


def test_grow_is_no_function() -> None:
    message = "grow must be a function or None, got 'random'."
    with pytest.raises(TypeError, match=exactly(message)):
        dataclasses.replace(make("rigl"), grow="random")


def test_schedules_are_checked_at_every_update() -> None:
    method = make("rigl", interval=25)  # Updates at 25, 50, 75.
    bad_at = lambda t, value: lambda step: value if step == t else 0.5  # noqa: E731
    for step in (0, 25, 50, 75):
        with pytest.raises(ValueError, match=says(f"sparsity({step}) must be in [0, ")):
            dataclasses.replace(method, sparsity=bad_at(step, 1.0))
        with pytest.raises(ValueError, match=says(f"fraction({step}) must be in [0, ")):
            dataclasses.replace(method, fraction=bad_at(step, -0.1))
        with pytest.raises(TypeError, match=says(f"sparsity({step}) must be a number")):
            dataclasses.replace(method, sparsity=bad_at(step, None))
    # Where it is never looked at, a schedule may return anything.
    dataclasses.replace(method, sparsity=bad_at(26, None), fraction=bad_at(26, 9.0))


@pytest.mark.parametrize("changed", [{"scope": "leaf"}, {"distribution": "erdos"}])
def test_names_in_a_record(changed: dict[str, Any]) -> None:
    (argument,) = changed
    with pytest.raises(ValueError, match=f"^{argument} must be .* got "):
        dataclasses.replace(make("rigl"), **changed)


def test_momentum_score_without_accumulator() -> None:
    method = dataclasses.replace(
        make("set", sparsity=0.0),
        grow=scores.momentum,
        updates=schedules.every(1, last=5),
    )
    tx = granet_jax.transform(method, optax.sgd(0.5))
    state = tx.init(parameters())
    message = "score `momentum` needs the method's `accumulator_decay` to be set."
    with pytest.raises(ValueError, match=exactly(message)):
        jax.eval_shape(tx.update, gradients(0), state, parameters())


def test_gradient_score_without_gradient() -> None:
    method = make("rigl", sparsity=0.0, interval=1)
    method = dataclasses.replace(method, needs_gradient=False)
    tx = granet_jax.transform(method)
    state = tx.init(parameters())
    message = "score `gradient` needs the dense gradient, and has none."
    with pytest.raises(ValueError, match=exactly(message)):
        jax.eval_shape(tx.update, gradients(0), state, parameters())


# Extremes that are allowed.


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("sparsity", [0, 0.0, 1.0 - 2**-53, np.float32(0.5)])
def test_extreme_sparsities_are_accepted(maker: str, sparsity: Any) -> None:
    method = make(maker, sparsity=sparsity)
    assert method.sparsity(method.updates.last) == sparsity


@pytest.mark.parametrize("maker", EXCHANGING)
@pytest.mark.parametrize("fraction", [0, 0.0, 1, 1.0])
def test_extreme_fractions_are_accepted(maker: str, fraction: Any) -> None:
    assert make(maker, fraction=fraction).fraction(0) == fraction


@pytest.mark.parametrize("maker", WITH_STEPS)
def test_extreme_steps_are_accepted(maker: str) -> None:
    argument = "end_step" if maker == "gmp" else "total_steps"
    largest = 2**31 - 1
    method = make(maker, **{argument: largest, "interval": largest // 3})
    assert 0 < method.updates.last <= largest
    if maker == "granet":
        # With a single step, pruning has to end at the last one.
        method = make(maker, total_steps=1, interval=1, end_step=1)
    elif maker == "rigl":
        method = make(maker, total_steps=1, interval=1, stop=1.0)
    else:
        method = make(maker, **{argument: np.int32(1), "interval": 1})
    assert list(method.updates.steps()) == [1]


def test_extremes_of_the_other_arguments_are_accepted() -> None:
    assert make("granet", final_fraction=0.9, fraction=0.1).fraction(100) == 0.9
    assert make("snfs", decay=0.0).accumulator_decay == 0.0
    assert make("rigl", stop=1).updates.last == 100


def test_sparsity_zero_trains_dense() -> None:
    params = parameters()
    for maker in MAKERS:
        tx = granet_jax.transform(make(maker, sparsity=0.0), optax.sgd(0.5))
        updates, state = tx.update(gradients(0), tx.init(params), params)
        assert granet_jax.sparsity(state.masks).overall == 0.0
        for u, g in zip(
            jax.tree.leaves(updates), jax.tree.leaves(gradients(0)), strict=True
        ):
            np.testing.assert_array_equal(u, -0.5 * g)


# transform.


@pytest.mark.parametrize("value", [granet_jax.rigl, "rigl", None, 0.9, optax.sgd(0.5)])
def test_method_is_no_record(value: Any) -> None:
    message = (
        "method must be a record such as granet_jax.granet(sparsity, total_steps), "
        f"got {value!r}."
    )
    with pytest.raises(TypeError, match=exactly(message)):
        granet_jax.transform(value)


@pytest.mark.parametrize("value", [optax.sgd, 0.1, "sgd", make("rigl")])
def test_inner_is_no_optimizer(value: Any) -> None:
    message = f"inner must be an optax optimizer or None, got {value!r}."
    with pytest.raises(TypeError, match=exactly(message)):
        granet_jax.transform(make("rigl"), value)


def test_where_and_masks() -> None:
    message = (
        "where and masks cannot both be given: masks already say which leaves carry "
        "one (None at the others)."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        granet_jax.transform(make("rigl"), where=lambda *_: True, masks={})


@pytest.mark.parametrize("value", [0.0, "0", True, None, jax.random.key(0)])
def test_seed_is_no_integer(value: Any) -> None:
    message = f"seed must be an integer, got {value!r}."
    with pytest.raises(TypeError, match=exactly(message)):
        granet_jax.transform(make("rigl"), seed=value)


def test_flattened_inner() -> None:
    tx = granet_jax.transform(make("rigl"), optax.flatten(optax.sgd(0.5, 0.5)))
    message = (
        "inner keeps its state as one flat vector over all parameters (shape (128,)), "
        "as optax.flatten does: the moments of pruned weights cannot be addressed. "
        "Use the optimizer without optax.flatten."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        tx.init(parameters())


# init.


def every_init(method: Any, params: Any, where: Any) -> list[Callable[[], Any]]:
    """All the ways to make initial masks."""
    return [
        lambda: granet_jax.transform(method, where=where).init(params),
        lambda: granet_jax.transform(method, optax.sgd(0.5), where=where).init(params),
        lambda: granet_jax.init_masks(method, params, where=where),
        lambda: masking.maskable(params, where),
    ]


@pytest.mark.parametrize("params", [{}, (), None, {"dense": {}}])
def test_no_leaves(params: Any) -> None:
    message = f"params has no leaves, got {params!r}: nothing to make sparse."
    for init in every_init(make("rigl"), params, None):
        with pytest.raises(ValueError, match=exactly(message)):
            init()


def test_no_maskable_leaf_by_default() -> None:
    params = {"bias": jnp.zeros(3), "table": jnp.zeros((2, 2), jnp.int32)}
    message = (
        "no maskable leaf: the default takes floating leaves with ndim >= 2, and "
        "params has 'bias' float32[3], 'table' int32[2, 2]. Pass `where=` to choose "
        "leaves."
    )
    for init in every_init(make("rigl"), params, None):
        with pytest.raises(ValueError, match=exactly(message)):
            init()


@pytest.mark.parametrize(
    "where",
    [lambda name, leaf: False, {"dense": {"kernel": 0, "bias": 0}, "conv": [False]}],
)
def test_where_selects_nothing(where: Any) -> None:
    params = {"dense": parameters()["dense"], "conv": [jnp.zeros((2, 2))]}
    message = (
        "no maskable leaf: `where` selects none, and params has 'conv/0' "
        "float32[2, 2], 'dense/bias' float32[8], 'dense/kernel' float32[6, 8]. Pass "
        "`where=` to choose leaves."
    )
    for init in every_init(make("rigl"), params, where):
        with pytest.raises(ValueError, match=exactly(message)):
            init()


def test_only_some_of_many_leaves_are_listed() -> None:
    params = [jnp.zeros(2)] * 9
    with pytest.raises(ValueError, match=r"'7' float32\[2\], \.\.\.\. Pass `where=`"):
        granet_jax.init_masks(make("rigl"), params)


@pytest.mark.parametrize(
    "where", [lambda name, leaf: name == "table", {"table": True, "w": False}]
)
def test_where_selects_integers(where: Any) -> None:
    params = {"table": jnp.zeros((2, 2), jnp.int32), "w": jnp.zeros((2, 2))}
    message = (
        "where selects 'table' of dtype int32: only floating leaves can carry a mask; "
        "exclude it in `where`."
    )
    for init in every_init(make("rigl"), params, where):
        with pytest.raises(TypeError, match=exactly(message)):
            init()


@pytest.mark.parametrize(
    "where",
    [{"dense": True}, [True, True, False], {"dense": {"kernel": True}}, "kernel", 1],
)
def test_where_of_another_structure(where: Any) -> None:
    params = parameters()
    message = (
        "where must be None, a function of (name, leaf), or a pytree of bools of the "
        f"structure of params; got structure {jax.tree.structure(where)} for params of "
        f"{jax.tree.structure(params)}."
    )
    for init in every_init(make("rigl"), params, where):
        with pytest.raises(ValueError, match=exactly(message)):
            init()


def ones() -> dict[str, Any]:
    """Masks of `parameters`, all active."""
    return {
        "dense": {"kernel": np.ones((6, 8), bool), "bias": None},
        "conv": {"kernel": np.ones((3, 3, 2, 4), bool)},
    }


def with_kernel(kernel: Any) -> dict[str, Any]:
    return {**ones(), "dense": {"kernel": kernel, "bias": None}}


def every_use(masks: Any) -> list[Callable[[], Any]]:
    """All that takes masks from a user."""
    state = granet_jax.transform(make("rigl"), masks=ones()).init(parameters())
    return [
        lambda: granet_jax.transform(make("rigl"), masks=masks).init(parameters()),
        lambda: granet_jax.apply_masks(parameters(), masks),
        lambda: masking.check_masks(masks, parameters()),
        lambda: granet_jax.set_masks((optax.EmptyState(), state), masks),
    ]


@pytest.mark.parametrize(
    "masks",
    [
        {"dense": ones()["dense"]},
        {**ones(), "head": np.ones((2, 2), bool)},
        {**ones(), "dense": {"kernel": np.ones((6, 8), bool)}},
        [np.ones((6, 8), bool)],
        {**ones(), "dense": (np.ones((6, 8), bool), None)},
    ],
)
def test_masks_of_another_structure(masks: Any) -> None:
    message = (
        "masks must have the structure of params (None or optax.MaskedNode() at "
        "leaves without a mask): "
    )
    for use in every_use(masks):
        with pytest.raises(ValueError, match="^" + says(message) + "."):
            use()


@pytest.mark.parametrize("shape", [(8, 6), (48,), (6, 1), (), (6, 8, 1)])
def test_masks_of_another_shape(shape: tuple[int, ...]) -> None:
    message = f"masks has shape {shape} at 'dense/kernel', where params has (6, 8)."
    for use in every_use(with_kernel(np.ones(shape, bool))):
        with pytest.raises(ValueError, match=exactly(message)):
            use()


@pytest.mark.parametrize("value", [2, -1, 0.5, math.nan, math.inf])
def test_masks_that_are_not_binary(value: float) -> None:
    kernel = np.ones((6, 8))
    kernel[5, 7] = value
    message = "masks has values other than 0 and 1 at 'dense/kernel'."
    for use in every_use(with_kernel(kernel)):
        with pytest.raises(ValueError, match=exactly(message)):
            use()


def test_masks_of_strings() -> None:
    message = "masks has dtype <U1 at 'dense/kernel'; it must be boolean."
    for use in every_use(with_kernel(np.full((6, 8), "1"))):
        with pytest.raises(TypeError, match=exactly(message)):
            use()


def test_no_mask_at_all() -> None:
    masks = {"dense": {"kernel": None, "bias": None}, "conv": {"kernel": None}}
    message = f"masks holds no mask, got {masks!r}."
    for use in every_use(masks):
        with pytest.raises(ValueError, match=exactly(message)):
            use()


def test_mask_at_an_integer_leaf() -> None:
    params = {"table": jnp.zeros((2, 2), jnp.int32), "w": jnp.zeros((2, 2))}
    masks = {"table": np.ones((2, 2), bool), "w": np.ones((2, 2), bool)}
    message = (
        "masks has a mask at 'table' of dtype int32: only floating leaves can carry "
        "one; put None there."
    )
    with pytest.raises(TypeError, match=exactly(message)):
        granet_jax.transform(make("rigl"), masks=masks).init(params)


def test_traced_masks_that_are_not_boolean() -> None:
    message = (
        "masks has dtype float32 at 'dense/kernel' inside a traced function, where its "
        "values cannot be checked: convert it to bool."
    )
    check = lambda kernel: masking.check_masks(  # noqa: E731
        with_kernel(kernel), shape_tree()
    )
    with pytest.raises(TypeError, match=exactly(message)):
        jax.eval_shape(check, jnp.ones((6, 8)))
    jax.eval_shape(check, jnp.ones((6, 8), bool))


def test_set_masks_at_other_leaves() -> None:
    state = granet_jax.transform(make("rigl")).init(parameters())
    masks = {**ones(), "conv": {"kernel": None}}
    message = "masks must have masks at the same leaves as the state: expected "
    with pytest.raises(ValueError, match="^" + says(message) + ".*, got .*"):
        granet_jax.set_masks(state, masks)
    masks = {**ones(), "dense": {**ones()["dense"], "bias": np.ones(8, bool)}}
    message = (
        "masks must have masks at the same leaves as the state, which has none at "
        "'dense/bias': put None there."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        granet_jax.set_masks(state, masks)


# update.


@pytest.mark.parametrize("inner", [None, optax.sgd(0.5)])
def test_params_missing(inner: Any) -> None:
    tx = granet_jax.transform(make("rigl"), inner)
    message = "params must be given to update: call tx.update(grads, state, params)."
    with pytest.raises(ValueError, match=exactly(message)):
        tx.update(gradients(0), tx.init(parameters()))


@pytest.mark.parametrize("inner", [None, optax.sgd(0.5)])
def test_state_of_another_type(inner: Any) -> None:
    tx = granet_jax.transform(make("rigl"), inner)
    state = tx.init(parameters())
    for wrong in (tuple(state), state._asdict(), None, optax.EmptyState(), (state,)):
        message = (
            "state must be the SparseState that init returned, got "
            f"{type(wrong).__name__}. Restore a checkpoint onto "
            "jax.eval_shape(tx.init, params), which gives it its types back."
        )
        with pytest.raises(TypeError, match=exactly(message)):
            tx.update(gradients(0), wrong, parameters())


@pytest.mark.parametrize("maker", MAKERS)
def test_dense_gradient_missing(maker: str) -> None:
    tx = granet_jax.transform(make(maker))
    state = tx.init(parameters())
    if maker not in ("granet", "rigl", "snfs"):
        tx.update(gradients(0), state, parameters())
        return
    message = (
        f"{maker} needs the dense gradient, and as the last link of a chain it only "
        "sees updates. Either give it the optimizer, transform(method, "
        "inner=optimizer), or pass the gradient along, tx.update(grads, state, "
        "params, grads=grads)."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        tx.update(gradients(0), state, parameters())
    # Both of the remedies it names are ones.
    tx.update(gradients(0), state, parameters(), grads=gradients(0))
    chain = optax.chain(optax.sgd(0.5), tx)
    state = chain.init(parameters())
    chain.update(gradients(0), state, parameters(), grads=gradients(0))
    steering = granet_jax.transform(make(maker), optax.sgd(0.5))
    steering.update(gradients(0), steering.init(parameters()), parameters())


# States.


def test_no_sparse_state() -> None:
    state = optax.adam(0.1).init(parameters())
    message = (
        "opt_state must hold one state of granet_jax.transform, got 0: is transform "
        "part of the optimizer?"
    )
    for use in (
        lambda: granet_jax.get_state(state),
        lambda: granet_jax.get_masks(state),
        lambda: granet_jax.set_masks(state, ones()),
        lambda: granet_jax.get_state(()),
    ):
        with pytest.raises(ValueError, match=exactly(message)):
            use()


def test_several_sparse_states() -> None:
    tx = granet_jax.transform(make("rigl"))
    state = optax.chain(tx, optax.sgd(0.5), tx).init(parameters())
    message = (
        "opt_state must hold one state of granet_jax.transform, got 2: pass the state "
        "of one of them."
    )
    for use in (
        lambda: granet_jax.get_state(state),
        lambda: granet_jax.get_masks(state),
        lambda: granet_jax.set_masks(state, ones()),
    ):
        with pytest.raises(ValueError, match=exactly(message)):
            use()
    assert granet_jax.get_state(state[0]) is state[0]


# Selection.


@pytest.mark.parametrize("scope", ["leaf", "", None])
def test_scope_of_top_k(scope: Any) -> None:
    message = f'scope must be "layer" or "global", got {scope!r}.'
    with pytest.raises(ValueError, match=exactly(message)):
        selection.top_k([jnp.ones(3)], 1, scope=scope)


@pytest.mark.parametrize(
    "dtypes",
    [("float32", "int32"), ("int16", "int32"), ("uint32",), ("bool",), ("complex64",)],
)
def test_scores_of_mixed_kinds(dtypes: tuple[str, ...]) -> None:
    message = (
        "scores must all be floating, or all of one signed integer dtype; got "
        f"{sorted(dtypes)}."
    )
    with pytest.raises(TypeError, match=exactly(message)):
        selection.top_k([jnp.ones(3, dtype) for dtype in dtypes], 1)


def test_more_scores_than_32_bits_count() -> None:
    half = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    almost = jax.ShapeDtypeStruct((2**31 - 1,), jnp.float32)

    def shapes(scope: Any, *scores: Any) -> Any:
        return jax.eval_shape(lambda *x: selection.top_k(x, 1, scope=scope), *scores)

    message = (
        f"{2**32} scores to rank together are more than a 32-bit counter holds "
        '(2**32 - 1): use scope="layer", or enable 64-bit types with '
        'jax.config.update("jax_enable_x64", True).'
    )
    with pytest.raises(ValueError, match=exactly(message)):
        shapes("global", half, half)
    # One score fewer, and the remedies.
    assert [x.shape for x in shapes("global", half, almost)] == [
        half.shape,
        almost.shape,
    ]
    assert [x.dtype for x in shapes("layer", half, half)] == [jnp.bool_] * 2
    with jax.enable_x64(True):
        assert [x.shape for x in shapes("global", half, half)] == [half.shape] * 2
    huge = jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32)
    with pytest.raises(ValueError, match=f"^{2**32} scores to rank together"):
        shapes("layer", huge)
