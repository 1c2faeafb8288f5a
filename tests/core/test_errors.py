"""Error messages word for word: examples of each kind, and errors of several arguments.

`test_arguments.py` checks that every argument of every function refuses bad values.
"""

import builtins
import dataclasses
import functools
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
from granet_jax import masking, phases, schedules, scores, selection
from tests.helpers import own_methods
from tests.helpers.arguments import with_kernel
from tests.helpers.trees import gradients, parameters, shape_tree

RIGL = granet_jax.rigl(0.5, 100, interval=10)
SGD = optax.sgd(0.5)
METHODS: dict[str, Callable[..., granet_jax.Method]] = {
    "granet": granet_jax.granet,
    "gmp": granet_jax.gmp,
    "rigl": granet_jax.rigl,
    "set": granet_jax.set_,
    "snfs": granet_jax.snfs,
    "static": lambda sparsity, steps, interval: granet_jax.static(sparsity),
}


def exactly(message: str) -> str:
    """A pattern for this message, to which JAX may append a note on tracebacks."""
    return rf"^{re.escape(message)}(\n-+\nFor simplicity, JAX .*)?$"


def own_exchange(**parts: Any) -> granet_jax.Method:
    return own_methods.exchange(updates=schedules.every(1, last=5), **parts)


def eval_update(method: granet_jax.Method, inner: Any) -> Any:
    tx = granet_jax.transform(method, inner)
    state = tx.init(parameters())
    return jax.eval_shape(tx.update, gradients(0), state, parameters())


INTEGERS = {"table": jnp.zeros((2, 2), jnp.int32), "w": jnp.zeros((2, 2))}


@functools.cache
def names() -> dict[str, Any]:
    """What the expressions below refer to."""
    params = parameters()
    return {
        **vars(granet_jax),
        **vars(masking),
        "RIGL": RIGL,
        "SGD": SGD,
        "INTEGERS": INTEGERS,
        "PARAMS": params,
        "ALL": jax.tree.map(lambda x: np.ones(x.shape, bool), params),
        "FLAT": optax.flatten(optax.sgd(0.5, 0.5)),
        "GRADS": gradients(0),
        "STATE": granet_jax.transform(RIGL, SGD).init(params),
        "check_traced": lambda mask: jax.eval_shape(
            lambda m: masking.check_masks(with_kernel(m), shape_tree()), mask
        ),
        "phase": lambda phase: dataclasses.replace(RIGL, phases=(phase,)),
        "top_k": lambda *dtypes: selection.top_k([jnp.ones(3, x) for x in dtypes], 1),
        "eval_update": eval_update,
        "own_exchange": own_exchange,
        "scores": scores,
        "np": np,
        "optax": optax,
        "phases": phases,
    }


# Expressions, with the error that each raises, word for word.
ERRORS = """
static(90)
    ValueError: sparsity must be in [0, 1), got 90: it is the share of pruned weights
    (0.9 for 90%).
static("0.5")
    TypeError: sparsity must be a number in [0, 1), got '0.5'.
gmp(0.9, 10**12)
    ValueError: end_step must be at least 1 and below 2**31, got 1000000000000.
static(0.9, distribution="ERK")
    ValueError: distribution must be one of 'uniform', 'er', 'erk' or a function of
    (shapes, sparsity), got 'ERK'.
init_masks(static(0.5, distribution=lambda shapes, sparsity: [0.5]), PARAMS)
    ValueError: distribution must return one density in [0, 1] for each of the 2 leaves,
    got [0.5].
gmp(0.5, 100, interval=10, initial_sparsity=0.75)
    ValueError: initial_sparsity must be at most sparsity, got initial_sparsity=0.75
    with sparsity=0.5.
gmp(0.9, 50, begin_step=50)
    ValueError: end_step must be after begin_step, got end_step=50 with begin_step=50.
gmp(0.9, 50, begin_step=20, interval=31)
    ValueError: interval must fit between begin_step and end_step, got interval=31 with
    begin_step=20 and end_step=50: no update would prune. Take a shorter interval or a
    later end_step.
granet(0.9, 800)
    ValueError: interval must fit between begin_step and end_step, got interval=1000
    with begin_step=0 and end_step=400: no update would prune. Take a shorter interval
    or a later end_step.
granet(0.9, 100, interval=10, end_step=101)
    ValueError: end_step must be at most total_steps, got end_step=101 with
    total_steps=100.
rigl(0.9, 100, interval=51)
    ValueError: interval must be at most 50, got 51: updates end at step 75 of 100, and
    one interval before the end of training, so the masks would never change. For fixed
    masks use static().
set_(0.9, 100, interval=31, stop=0.3)
    ValueError: interval must be at most 30, got 31: updates end at step 30 of 100, and
    one interval before the end of training, so the masks would never change. For fixed
    masks use static().
transform(RIGL, where=lambda *_: True, masks={})
    ValueError: where and masks cannot both be given: masks already say which leaves
    carry one (None at the others).
eval_update(own_exchange(grow=scores.momentum), SGD)
    ValueError: score `momentum` needs the method's `average_decay` to be set.
eval_update(own_exchange(grow=lambda x: scores.gradient(x)), None)
    ValueError: score `gradient` needs the dense gradient, and has none.
transform(RIGL, FLAT).init(PARAMS)
    ValueError: inner keeps its state as one flat vector over all parameters (shape
    (128,)), as optax.flatten does: the moments of pruned weights cannot be addressed.
    Use the optimizer without optax.flatten.
set_masks(STATE, ALL)
    ValueError: masks must have masks at the same leaves as the state, which has none at
    'dense/bias': put None there.
transform(RIGL, SGD).update(GRADS, STATE)
    ValueError: params must be given to update: call tx.update(grads, state, params).
get_state((STATE, STATE))
    ValueError: opt_state must hold one state of granet_jax.transform, got 2: pass the
    state of one of them, such as opt_state.inner_states[label] of
    optax.multi_transform.
get_masks((STATE, STATE))
    ValueError: opt_state holds several states of granet_jax.transform, which must mask
    different parameters of one tree: both mask 'conv/kernel'. Pass one of these states.
maskable({"b": np.zeros(3, "f4"), "table": INTEGERS["table"]})
    ValueError: no maskable leaf: the default takes floating leaves with ndim >= 2 that
    are not named as biases, scales, tokens, positions or adapters, and params has 'b'
    float32[3], 'table' int32[2, 2]. Pass `where=` to choose leaves.
maskable(INTEGERS, {"table": 0, "w": False})
    ValueError: no maskable leaf: `where` selects none, and params has 'table' int32[2,
    2], 'w' float32[2, 2]. Pass `where=` to choose leaves.
maskable(INTEGERS, lambda name, leaf: name == "table")
    TypeError: where selects 'table' of dtype int32: only floating leaves can carry a
    mask; exclude it in `where`.
maskable(INTEGERS, {"table": True, "w": False})
    TypeError: where selects 'table' of dtype int32: only floating leaves can carry a
    mask; exclude it in `where`.
check_masks({"w": None}, {"w": INTEGERS["w"]})
    ValueError: masks holds no mask, got {'w': None}.
transform(RIGL, masks={"table": np.eye(2), "w": np.eye(2)}).init(INTEGERS)
    TypeError: masks has a mask at 'table' of dtype int32: only floating leaves can
    carry one; put None there.
check_traced(np.ones((6, 8)))
    TypeError: masks has dtype float32 at 'dense/kernel' inside a traced function, where
    its values cannot be checked: convert it to bool.
transform(RIGL, SGD).update(GRADS, (), PARAMS)
    TypeError: state must be the SparseState that init returned, got tuple. Restore a
    checkpoint onto jax.eval_shape(tx.init, params), which gives it its types back.
transform(RIGL, SGD).update(GRADS, None, PARAMS)
    TypeError: state must be the SparseState that init returned, got NoneType. Restore a
    checkpoint onto jax.eval_shape(tx.init, params), which gives it its types back.
transform(RIGL, SGD).update(GRADS, optax.EmptyState(), PARAMS)
    TypeError: state must be the SparseState that init returned, got EmptyState. Restore
    a checkpoint onto jax.eval_shape(tx.init, params), which gives it its types back.
phase(phases.Exchange(3))
    TypeError: fraction must be a function, got 3.
phase(phases.Exchange(RIGL.sparsity, grow=3))
    TypeError: grow must be a function, got 3.
phase(phases.Prune(by=3))
    TypeError: by must be a function, got 3.
phase(phases.Revive(by=3))
    TypeError: by must be a function, got 3.
top_k("int16", "int32")
    TypeError: scores must all be floating, or all of one signed integer dtype; got
    ['int16', 'int32'].
top_k("uint32")
    TypeError: scores must all be floating, or all of one signed integer dtype; got
    ['uint32'].
top_k("bool")
    TypeError: scores must all be floating, or all of one signed integer dtype; got
    ['bool'].
top_k("complex64")
    TypeError: scores must all be floating, or all of one signed integer dtype; got
    ['complex64'].
top_k("float32", "int32")
    TypeError: scores must all be floating, or all of one signed integer dtype; got
    ['float32', 'int32'].
maskable({"dense": {}})
    ValueError: params has no leaves, got {'dense': {}}: nothing to make sparse.
maskable(None)
    ValueError: params has no leaves, got None: nothing to make sparse.
"""


@pytest.mark.parametrize("case", re.split(r"\n(?=\S)", ERRORS.strip()))
def test_message(case: str) -> None:
    call, rest = case.split("\n", maxsplit=1)
    error, message = re.sub(r"\n +", " ", rest.strip()).split(": ", maxsplit=1)
    with pytest.raises(getattr(builtins, error), match=exactly(message)):
        eval(call, names())


# --- Schedules and limits ---------------------------------------------------------


@pytest.mark.parametrize("argument", ["seed", "stacked"])
def test_transform_checks_before_there_are_parameters(argument: str) -> None:
    arguments: dict[str, Any] = {argument: 1.5}
    with pytest.raises(TypeError, match=f"{argument} must be"):
        granet_jax.transform(RIGL, SGD, **arguments)


def test_schedules_are_checked_at_every_update() -> None:
    updates = schedules.listed([25, 50, 75])
    bad_at = lambda t, value: lambda step: value if step == t else 0.5  # noqa: E731
    for step in (0, 25, 50, 75):
        for name, value, error in (
            ("sparsity", 1.0, ValueError),
            ("fraction", -0.1, ValueError),
            ("sparsity", None, TypeError),
        ):
            with pytest.raises(error, match=rf"^{name}\({step}\) must be .*\[0, 1"):
                own_methods.exchange(updates=updates, **{name: bad_at(step, value)})
    # A schedule may return anything at steps that no update reads.
    unread = {"sparsity": bad_at(26, None), "fraction": bad_at(26, 9.0)}
    own_methods.exchange(updates=updates, **unread)


@pytest.mark.parametrize("name", METHODS)
def test_extreme_values_are_accepted(name: str) -> None:
    make = METHODS[name]
    for sparsity in (0, 0.0, 1.0 - 2**-53, np.float32(0.5)):
        method = make(sparsity, 100, interval=10)
        assert method.sparsity(method.updates.last) == sparsity
    if name == "static":
        return
    largest = 2**31 - 1
    assert 0 < make(0.9, largest, interval=largest // 3).updates.last <= largest
    single: dict[str, Any] = {"granet": {"end_step": 1}, "rigl": {"stop": 1}}.get(
        name, {}
    )
    # Weights that grow are trained for an interval, so one step is not enough.
    steps = np.int32(1 if name == "gmp" else 2)
    assert list(make(0.9, steps, interval=1, **single).updates.steps()) == [1]
    if name != "gmp":
        for fraction in (0, 1, 1.0):
            make(0.9, 100, interval=10, fraction=fraction)


@pytest.mark.parametrize("name", ["granet", "snfs"])
def test_sparsity_zero_trains_dense(name: str) -> None:
    tx = granet_jax.transform(METHODS[name](0.0, 100, interval=1), SGD)
    params, grads = parameters(), gradients(0)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert granet_jax.sparsity(granet_jax.get_masks(state)).overall == 0.0
    for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
        np.testing.assert_array_equal(u, -0.5 * g)


def test_more_scores_than_32_bits_count() -> None:
    half = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    almost = jax.ShapeDtypeStruct((2**31 - 2,), jnp.float32)
    huge = jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32)

    def shapes(scope: Any, *scores: Any) -> Any:
        found = jax.eval_shape(lambda *x: selection.top_k(x, 1, scope=scope), *scores)
        return [x.shape for x in found]

    message = (
        f"{2**32} scores to rank together are too many for 32-bit integers "
        '(2**32 - 2): use scope="layer", or enable 64-bit types with '
        'jax.config.update("jax_enable_x64", True).'
    )
    with pytest.raises(ValueError, match=exactly(message)):
        shapes("global", half, half)
    with pytest.raises(ValueError, match=f"^{2**32} scores to rank together"):
        shapes("layer", huge)
    # Two scores fewer are accepted, and both remedies work.
    assert shapes("global", half, almost) == [half.shape, almost.shape]
    assert shapes("layer", half, half) == [half.shape] * 2
    assert selection.counter_dtype([2**32 - 2], "global") == jnp.uint32
    assert selection.counter_dtype([2**31] * 4, "layer") == jnp.uint32
    with pytest.raises(ValueError, match=f"^{2**32 - 1} scores"):
        selection.counter_dtype([2**32 - 1], "layer")
    with jax.enable_x64(True):
        assert shapes("global", half, half) == [half.shape] * 2
        assert selection.counter_dtype([2**31] * 2, "global") == jnp.uint64


# --- Leaves and masks -------------------------------------------------------------


@pytest.mark.parametrize(
    "where",
    [{"dense": True}, [True, True, False], {"dense": {"kernel": True}}, 1],
)
def test_where_of_another_structure(where: Any) -> None:
    message = (
        "where must be None, a regular expression, a function of (name, leaf), or a "
        "pytree of bools of the structure of params; got structure "
        f"{jax.tree.structure(where)} for params of "
        f"{jax.tree.structure(parameters())}."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        masking.maskable(parameters(), where)


def test_long_lists_of_leaves_are_cut() -> None:
    with pytest.raises(ValueError, match=r"'7' float32\[2\], \.\.\.\. Pass `where=`"):
        masking.maskable([jnp.zeros(2)] * 9)


ONES = with_kernel(np.ones((6, 8), bool))
STRUCTURE = (
    r"masks must have the structure of params \(None or optax.MaskedNode\(\) at "
)
OTHER_STRUCTURES: tuple[Any, ...] = (
    {"dense": ONES["dense"]},
    {**ONES, "head": np.ones((2, 2), bool)},
    {**ONES, "dense": {"kernel": np.ones((6, 8), bool)}},
    [np.ones((6, 8), bool)],
    {**ONES, "dense": (np.ones((6, 8), bool), None)},
)
# Masks, and a pattern for the message.
MASKS: list[tuple[Any, str]] = [
    *((masks, STRUCTURE) for masks in OTHER_STRUCTURES),
    *(
        (
            with_kernel(np.ones(shape, bool)),
            rf"^masks has shape {re.escape(str(shape))} "
            r"at 'dense/kernel', where params has \(6, 8\)\.$",
        )
        for shape in ((8, 6), (48,), (6, 1), (), (6, 8, 1))
    ),
    *(
        (
            with_kernel(np.where(np.arange(48).reshape(6, 8) < 47, 1, x)),
            r"^masks has values other than 0 and 1 at 'dense/kernel'\.$",
        )
        for x in (2, -1, 0.5, math.nan, math.inf)
    ),
]


@pytest.mark.parametrize(("masks", "pattern"), MASKS)
def test_masks_that_do_not_fit(masks: Any, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        masking.check_masks(masks, parameters())


def test_set_masks_needs_a_mask_at_every_leaf_of_the_state() -> None:
    state = granet_jax.transform(RIGL).init(parameters())
    message = "masks must have masks at the same leaves as the state: expected .*, got "
    with pytest.raises(ValueError, match="^" + message):
        granet_jax.set_masks(state, {**ONES, "conv": {"kernel": None}})


# --- The dense gradient -----------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_the_last_link_of_a_chain_has_no_dense_gradient(name: str) -> None:
    def update(tx: Any, *, pass_along: bool = False) -> None:
        def step(p: Any) -> Any:
            extra = {"grads": p} if pass_along else {}
            return tx.update(p, tx.init(p), p, **extra)

        jax.eval_shape(step, shape_tree())

    method = METHODS[name](0.9, 100, interval=10)
    tx = granet_jax.transform(method)
    if name not in ("granet", "rigl", "snfs"):
        update(tx)
        return
    message = (
        f"{name} needs the dense gradient, and as the last link of a chain it only "
        "sees updates. Either give it the optimizer, transform(method, "
        "inner=optimizer), or pass the gradient along, tx.update(grads, state, "
        "params, grads=grads)."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        update(tx)
    # Both remedies work.
    update(optax.chain(SGD, tx), pass_along=True)
    update(granet_jax.transform(method, SGD))
