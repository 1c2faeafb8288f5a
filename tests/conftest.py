"""Settings of the whole test suite."""

from typing import Any

import hypothesis
import jax
import pytest

from tests.helpers.profile import NIGHTLY, PROFILE

# Sharding tests need several devices, which must be requested before JAX starts a
# backend. All other tests use the first device.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# Broadcasting between arrays of different rank is an error. Promotion between dtypes is
# not, because optax's own optimizers rely on it.
jax.config.update("jax_numpy_rank_promotion", "raise")

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

# Test files whose programs are compiled as a user's are, because they compare with
# another process or an oracle, or train for long. Without LLVM's optimizations the
# other files take about half the time; XLA's own passes are the same in both cases.
OPTIMIZED = (*("test_methods", "test_readme", "test_selection", "test_synflow"),)
# The files that take longest start first, so that no process is left with one at the
# end.
LONGEST = (
    *("test_resume", "test_methods", "test_train", "test_synflow", "test_sharding"),
    *("test_initial_state", "test_lottery", "test_ghosts", "test_scale"),
    *("test_contract", "test_selection", "test_devices", "test_plasticity_study"),
)


def is_optimized(node: pytest.Module | pytest.Item) -> bool:
    return node.path.stem in OPTIMIZED


@pytest.fixture(autouse=True, scope="module")
def _optimizations(request: pytest.FixtureRequest) -> None:
    """Compile quickly, except where the test file or the nightly run says otherwise."""
    quick = not NIGHTLY and not is_optimized(request.node)
    jax.config.update("jax_disable_most_optimizations", quick)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leave `slow` tests to the nightly run, unless the command line names them."""
    for item in filter(is_optimized, items):
        item.add_marker("optimized")
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    by_name = config.option.keyword or any("::" in x for x in config.args)
    if NIGHTLY or by_name or "slow" in config.option.markexpr:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if item not in slow]
    config.hook.pytest_deselected(items=slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run all tests of a file in one process, where they share compiled programs."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)
