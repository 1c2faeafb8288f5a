"""The lists of what CI leaves to the nightly run are of tests that there are."""

import importlib

import pytest

from tests import nightly


@pytest.mark.parametrize("name", [*nightly.ONE_OF, *nightly.AT_NIGHT])
def test_what_is_left_to_the_night_exists(name: str) -> None:
    module, _, function = name.partition("::")
    assert callable(getattr(importlib.import_module(f"tests.{module}"), function))
