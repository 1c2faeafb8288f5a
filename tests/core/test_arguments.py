"""Every argument of every public function refuses what it cannot use, and says why.

`tests/arguments.py` has the values. A new function, or a new argument of an old one, is
an error here until it has some there.
"""

import functools
import inspect
import re
from typing import Any

import jax
import pytest

import granet_jax
from granet_jax import export, masking
from tests.helpers import arguments, trees
from tests.helpers.arguments import Bad, Entry, Free, Traced

# Collapsed masks, say, on the way to the error.
pytestmark = pytest.mark.filterwarnings("ignore")
PUBLIC = arguments.public()
CHECKED = sorted(PUBLIC.keys() - arguments.RESULTS - arguments.INTERNAL)


@functools.cache
def entries() -> dict[str, Entry]:
    return arguments.every()


def test_every_public_function_is_listed_and_no_other() -> None:
    assert sorted(entries()) == CHECKED
    # What is excepted is there, and for one reason only.
    assert PUBLIC.keys() >= arguments.RESULTS | arguments.INTERNAL
    assert not arguments.RESULTS & arguments.INTERNAL
    assert all(inspect.isclass(PUBLIC[name]) for name in arguments.RESULTS)
    assert not any(inspect.isclass(PUBLIC[name]) for name in arguments.INTERNAL)


@pytest.mark.parametrize("name", CHECKED)
def test_bad_values_are_refused(name: str) -> None:
    entry = entries()[name]
    assert set(entry.bad) == set(inspect.signature(PUBLIC[name]).parameters)
    for argument, values in entry.bad.items():
        if isinstance(values, Free):
            continue
        assert values, argument
        for value in values:
            if not isinstance(value, Bad):
                says = "traced" if isinstance(value, Traced) else str(value)
                value = Bad(value, says)
            check_refused(entry, argument, value)


def test_packed_masks_count_as_the_weights_they_stand_for() -> None:
    masks = granet_jax.init_masks(granet_jax.static(0.75), trees.parameters())
    packed = granet_jax.pack_masks(masks)
    assert granet_jax.sparsity(packed) == granet_jax.sparsity(masks)
    assert granet_jax.sparsity(packed).total == trees.MASKABLE
    assert export.mask_entropy(packed) == export.mask_entropy(masks) > 0
    trees.assert_same(granet_jax.pack_masks(packed), packed)
    for found, expected in (
        (masking.check_masks(packed, trees.parameters()), masks),
        (
            granet_jax.apply_masks(trees.parameters(), packed),
            granet_jax.apply_masks(trees.parameters(), masks),
        ),
    ):
        trees.assert_same(found, expected)


def check_refused(entry: Entry, argument: str, bad: Bad) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        call_with(entry, argument, bad.value)
    message = str(caught.value)
    about = (argument, bad, message)
    # JAX's own, of tracers and the like, are other classes.
    assert caught.type in (TypeError, ValueError), about
    assert re.search(rf"\b{argument}\b", message), about
    assert bad.says in message, about
    # What it may be, or what to do.
    advice = r"(?i)\b(must|needs|has|holds?|use|lower|raise)\b"
    assert re.search(advice, message), about


def call_with(entry: Entry, argument: str, value: Any) -> None:
    """Calls the function, inside a traced one if the value has a tracer in it."""

    def is_traced(x: Any) -> bool:
        return isinstance(x, Traced)

    leaves, treedef = jax.tree.flatten(value, is_leaf=is_traced)
    if not any(map(is_traced, leaves)):
        entry.call(**{**entry.good, argument: value})
        return

    def traced(given: list[Any]) -> None:
        tracers = iter(given)
        filled = [next(tracers) if is_traced(x) else x for x in leaves]
        entry.call(**{**entry.good, argument: treedef.unflatten(filled)})

    jax.eval_shape(traced, [x.value for x in leaves if is_traced(x)])
