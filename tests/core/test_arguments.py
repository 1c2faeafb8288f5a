"""Every argument of every public function refuses unusable values, and says why.

The values are in `tests/helpers/arguments.py`. A new public function with an argument
that has no values there fails.
"""

import inspect
import math
import re
from typing import Any

import jax
import pytest

from granet_jax import checks
from tests.helpers import arguments
from tests.helpers.arguments import Bad, Entry, Free, Traced

# Some calls warn, of collapsed masks for example, before they fail.
pytestmark = pytest.mark.filterwarnings("ignore")
PUBLIC = arguments.public()
CHECKED = sorted(PUBLIC.keys() - arguments.RESULTS - arguments.INTERNAL)


def test_every_public_function_has_an_entry() -> None:
    assert sorted(arguments.every()) == CHECKED
    # No value is for an argument that no longer exists.
    names = {name for entry in arguments.every().values() for name in entry.bad}
    assert names >= arguments.BAD.keys()
    # The exceptions exist, and none is listed twice.
    assert PUBLIC.keys() >= arguments.RESULTS | arguments.INTERNAL
    assert not arguments.RESULTS & arguments.INTERNAL
    assert all(inspect.isclass(PUBLIC[name]) for name in arguments.RESULTS)
    assert not any(inspect.isclass(PUBLIC[name]) for name in arguments.INTERNAL)


@pytest.mark.parametrize("name", CHECKED)
def test_bad_values_are_refused(name: str) -> None:
    entry = arguments.every()[name]
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


def test_ends_of_ranges_are_accepted() -> None:
    checks.check_decay("decay", 0.0)
    checks.check_number("clip", math.inf, above=0.0, finite=False)
    checks.check_axis_name(("data", "model"))
    # A key without a type is still in use.
    checks.check_key(jax.random.PRNGKey(0))


def check_refused(entry: Entry, argument: str, bad: Bad) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        call_with(entry, argument, bad.value)
    message = str(caught.value)
    about = (argument, bad, message)
    # JAX's errors about tracers are subclasses of these two.
    assert caught.type in (TypeError, ValueError), about
    assert re.search(rf"\b{argument}\b", message), about
    assert bad.says in message, about
    # The message says which values are allowed, or what to do.
    advice = r"(?i)\b(must|needs|has|holds?|use|lower|raise)\b"
    assert re.search(advice, message), about


def call_with(entry: Entry, argument: str, value: Any) -> None:
    """Call the function, under a trace if the value stands for a tracer."""

    def is_traced(x: Any) -> bool:
        return isinstance(x, Traced)

    leaves, treedef = jax.tree.flatten(value, is_leaf=is_traced)
    if not any(map(is_traced, leaves)):
        entry.call(**{**entry.good, argument: value})
        return

    def call(tracers: list[Any]) -> None:
        remaining = iter(tracers)
        filled = [next(remaining) if is_traced(x) else x for x in leaves]
        entry.call(**{**entry.good, argument: treedef.unflatten(filled)})

    jax.eval_shape(call, [x.value for x in leaves if is_traced(x)])
