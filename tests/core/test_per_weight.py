"""Which optimizers treat every weight by itself."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest

import granet_jax
from granet_jax.per_weight import is_per_weight


def is_kernel(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (optax.sgd(0.1, momentum=0.9, nesterov=True), True),
        (optax.adamw(0.1), True),
        (optax.lion(0.1), True),
        # Fresh moments other than zero.
        (optax.adagrad(0.1), True),
        (optax.rprop(0.1), True),
        (optax.masked(optax.adam(0.1), is_kernel), True),
        (optax.inject_hyperparams(optax.adam)(learning_rate=0.1), True),
        # Norms, matrix products and factors over a leaf, and a mean over it.
        (optax.lamb(0.1), False),
        (optax.contrib.muon(0.1), False),
        (optax.adafactor(0.1), False),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)), False),
        (optax.chain(optax.centralize(), optax.trace(0.9)), False),
        # Looks at all gradients to see whether they are finite.
        (optax.apply_if_finite(optax.sgd(0.1), 3), False),
        # An epsilon makes a moment of zeros more than zero.
        (optax.adabelief(0.1), False),
    ],
)
def test_is_per_weight(optimizer: Any, expected: bool) -> None:
    params = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones((3,))}
    masks = granet_jax.init_masks(granet_jax.static(0.5), params)
    answers = []

    def ask(params: Any, masks: Any) -> None:
        wrapped = optax.with_extra_args_support(optimizer)
        answers.append(is_per_weight(wrapped, params, masks, {}))

    jax.eval_shape(ask, params, masks)
    assert answers == [expected]
