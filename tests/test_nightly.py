"""The lists of what CI leaves to the nightly run are of tests that there are."""

import importlib
import pathlib

import pytest

from tests import nightly


def module_of(name: str) -> str:
    """The dotted name of a test file, whichever folder it is in."""
    (path,) = pathlib.Path(__file__).parent.rglob(f"{name}.py")
    return f"tests.{path.parent.name}.{name}"


@pytest.mark.parametrize("name", [*nightly.ONE_OF, *nightly.AT_NIGHT])
def test_what_is_left_to_the_night_exists(name: str) -> None:
    module, _, function = name.partition("::")
    assert callable(getattr(importlib.import_module(module_of(module)), function))
