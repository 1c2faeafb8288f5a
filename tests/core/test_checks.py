"""Values that checks accept at the ends of ranges; `test_arguments` has bad values."""

import math

import jax

from granet_jax import checks


def test_ends_are_accepted() -> None:
    checks.check_decay("decay", 0.0)
    checks.check_number("clip", math.inf, above=0.0, finite=False)
    checks.check_axis_name(("data", "model"))
    # A key without a type is still in use.
    checks.check_key(jax.random.PRNGKey(0))
