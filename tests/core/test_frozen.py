"""The warning of masked parameters that the inner optimizer never trains."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest

import granet_jax

PARAMS = {
    "body": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)},
    "head": {"kernel": jnp.ones((6, 2)), "bias": jnp.ones(2)},
}
METHOD = granet_jax.rigl(0.5, 8, interval=2)
ADAM = optax.adam(0.1)
WARMUP = optax.linear_schedule(0.0, 0.1, 10)


def is_body(params: Any) -> Any:
    return {name: name == "body" for name in params}


def parted(body: Any, head: Any = ADAM) -> optax.GradientTransformation:
    labels = {name: name for name in PARAMS}
    return optax.multi_transform({"body": body, "head": head}, labels)


def warnings_of(init: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        init(PARAMS)
    return [str(warning.message) for warning in caught]


FROZEN = {
    "set_to_zero": parted(optax.set_to_zero()),
    "rate zero": parted(optax.adam(0.0)),
    "before": optax.chain(optax.masked(optax.set_to_zero(), is_body), ADAM),
    "after": optax.chain(
        optax.clip_by_global_norm(1.0), ADAM, optax.masked(optax.set_to_zero(), is_body)
    ),
    "injected": optax.inject_hyperparams(
        lambda rate: parted(optax.set_to_zero(), optax.adam(rate))
    )(0.1),
}
TRAINED = {
    "all alike": optax.sgd(0.0),
    "none": parted(optax.set_to_zero(), optax.set_to_zero()),
    "warm-up": parted(optax.sgd(WARMUP)),
    "steps": parted(optax.MultiSteps(ADAM, 100).gradient_transformation()),
    "decay": optax.adamw(0.1, mask=is_body),
    # Not seen: `init` does not have this argument.
    "extra argument": optax.chain(
        parted(optax.set_to_zero()), optax.contrib.reduce_on_plateau()
    ),
}


@pytest.mark.parametrize("inner", FROZEN.values(), ids=FROZEN)
def test_frozen_masked_parameters_cause_a_warning(inner: Any) -> None:
    tx = granet_jax.transform(METHOD, inner)
    shapes = functools.partial(jax.eval_shape, tx.init)
    for init in (tx.init, shapes):
        (message,) = warnings_of(init)
        assert message.startswith("inner never trains 'body/kernel', which carry masks")
    lanes = jax.tree.map(lambda p: jnp.stack([p, p]), PARAMS)
    assert len(warnings_of(lambda _: jax.vmap(tx.init)(lanes))) == 1
    # The remedy.
    tx = granet_jax.transform(METHOD, inner, where="head/kernel")
    assert not warnings_of(tx.init)


@pytest.mark.parametrize("inner", TRAINED.values(), ids=TRAINED)
def test_other_optimizers_cause_no_warning(inner: Any) -> None:
    init = granet_jax.transform(METHOD, inner).init
    assert not warnings_of(functools.partial(jax.eval_shape, init))
