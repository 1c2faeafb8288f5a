"""Settings of the whole test suite."""

import collections
import zlib
from typing import Any

import hypothesis
import jax
import pytest

from tests.nightly import AT_NIGHT, LONG, NIGHTLY, ONE_OF, PROFILE

# Before any backend starts: eight virtual devices, on which the sharding tests run.
# Everything else uses the first. With several CPU devices, steps with collectives must
# be waited for one by one, or a machine of few cores can deadlock.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# An array of one rank that silently meets another is a bug. (Promotion of dtypes stays
# at the default: optax's own optimizers are not written for the strict one.)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation takes nearly all of the time, so examples are few in `ci` and the same in
# every run; `HYPOTHESIS_PROFILE=nightly` searches wider, and anew each time.
hypothesis.settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "nightly",
    hypothesis.settings.get_profile("ci"),
    derandomize=False,
    max_examples=500,
    print_blob=True,
)
hypothesis.settings.load_profile(PROFILE)


# Modules whose programs are compiled as those of users are: where results are compared
# with an oracle's or another process's, or whole networks run for long. The others take
# a half to two thirds of the time without LLVM's optimizations (and `.ci/run` has them
# compiled by XLA's older emitters, which takes a third of that); XLA's own passes,
# which decide what is fused, copied and sent between devices, are the same. All are
# compiled as for users in the nightly run.
OPTIMIZED = (
    "experiments",
    "fuzz",
    "synflow",
    "oracle",
    "processes",
    "readme",
    "reference",
    "selection",
)


@pytest.fixture(autouse=True, scope="module")
def _optimizations(request: pytest.FixtureRequest) -> None:
    quick = not NIGHTLY and not _is_optimized(request.node)
    jax.config.update("jax_disable_most_optimizations", quick)


def _is_optimized(node: pytest.Module | pytest.Item) -> bool:
    return node.path.stem.removeprefix("test_") in OPTIMIZED


def _name(item: pytest.Item) -> str:
    """`test_file::test_function`, as the lists of `nightly` have it."""
    assert isinstance(item, pytest.Function)
    return f"{item.path.stem}::{item.originalname}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leaves cases to the nightly run; none of what is asked for by its name."""
    for item in filter(_is_optimized, items):
        item.add_marker("optimized")
    items.sort(key=lambda item: not item.path.stem.endswith(LONG))
    named = config.option.keyword or any("::" in x for x in config.args)
    if NIGHTLY or named:
        return
    places: collections.Counter[str] = collections.Counter()
    kept: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        name = _name(item)
        # From another one on in each test, so that all occur in some.
        place = places[name] + zlib.crc32(name.encode())
        chosen = place % ONE_OF.get(name, 1) == 0 and name not in AT_NIGHT
        kept[chosen].append(item)
        places[name] += 1
    # Of every test something is left but of those for the night.
    left = set(map(_name, kept[True]))
    assert places.keys() - left <= set(AT_NIGHT), places.keys() - left
    items[:] = kept[True]
    config.hook.pytest_deselected(items=kept[False])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of a file run in one process, where they share what is compiled."""
    from xdist.scheduler import LoadFileScheduling  # only with -n

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)
