"""The documentation: its code runs, its commands exist, its reference is complete."""

import contextlib
import importlib
import importlib.util
import inspect
import io
import re
from collections import Counter
from typing import Any

import jax
import numpy as np
import optax
import pytest

import granet_jax
from tests.helpers.blocks import ROOT, commands, python_blocks, run_page

PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (ROOT / "docs").rglob("*.md")
    if not {"_build", "_generated"} & set(page.parts)
)
README, CONTRIBUTING, RESULTS = (
    "README.md",
    "CONTRIBUTING.md",
    "experiments/results/README.md",
)
ALL = [*PAGES, README, CONTRIBUTING, "experiments/README.md", RESULTS]
WITH_CODE = [page for page in [*PAGES, CONTRIBUTING] if python_blocks(ROOT / page)]
FOREIGN = ("pip", "venv", "pytest", "sphinx")  # programs of others
PUBLIC = [
    f"granet_jax{name}"
    for name in (
        *("", ".phases", ".schedules", ".scores", ".penalties", ".structures"),
        *(".distributions", ".mask_sources", ".export", ".tost", ".tost.linen"),
        *(".analysis", ".analysis.plots"),
    )
]


@pytest.mark.parametrize("page", WITH_CODE)
def test_code_of_a_page_runs(page: str):
    run_page(page)


def test_pages_with_code_are_found():
    assert {"docs/index.md", "docs/methods.md", "docs/migrating.md"} <= {*WITH_CODE}


def active(tree: Any) -> int:
    return sum(int(mask.sum()) for mask in jax.tree.leaves(tree))


def assert_zero_outside(params: Any, masks: Any) -> None:
    for p, m in zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True):
        assert not np.any(np.asarray(p)[~np.asarray(m)])


def test_quickstart_learns_and_reaches_its_sparsity_exactly():
    scope = run_page("docs/quickstart.md")
    masks = granet_jax.get_masks(scope["opt_state"])
    kernels = 64 * 128 + 128 * 128 + 128 * 10
    assert active(masks) == (kernels + 5) // 10  # 90% sparsity, rounded to nearest
    assert_zero_outside(scope["params"]["w"], masks["w"])
    # Ten classes: chance is 0.1, and a linear classifier reaches about 0.9.
    assert scope["accuracy"] > 0.93


def test_sparse_view_of_quickstart_has_the_largest_weights():
    scope = run_page("docs/quickstart.md")
    (mask,) = jax.tree.leaves(granet_jax.get_masks(scope["dense_state"]))
    weights, mask = np.asarray(scope["dense"]["w"]), np.asarray(mask)
    assert mask.sum() == 32
    np.testing.assert_array_equal(scope["exported"]["w"], np.where(mask, weights, 0))
    assert np.abs(weights)[mask].min() >= np.abs(weights)[~mask].max()


def test_quickstart_prints_the_table_that_it_shows():
    table = str(run_page("docs/quickstart.md")["table"])
    text = (ROOT / "docs/quickstart.md").read_text()
    assert "".join(f"    {line}\n" for line in table.splitlines()) in text


def test_initial_masks_have_the_sparsity_asked_for():
    scope = run_page("docs/initial_masks.md")
    state = scope["tx"].init(scope["params"])
    report = granet_jax.sparsity(granet_jax.get_masks(state))
    total = 64 * 128 + 128 * 10
    assert (report.active, report.total) == ((total + 10) // 20, total)


def test_tost_rescales_and_ends_at_relu():
    scope = run_page("docs/tost.md")
    assert all(float(scale) != 1 for scale in scope["rescaled"].scales["w"])
    x = np.linspace(-3, 3, 13, dtype=np.float32)
    np.testing.assert_array_equal(scope["soft"](x, 150), np.maximum(x, 0))
    assert np.any(scope["soft"](x, 149) != np.maximum(x, 0))


def test_cyclical_pruning_starts_dense():
    params = {"w": np.ones((20, 10), np.float32)}
    state = run_page("docs/methods.md")["cyclical_tx"].init(params)
    assert active(granet_jax.get_masks(state)) == 200


def test_structures_have_their_form():
    scope = run_page("docs/structures.md")
    params = {"w": np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)}
    tx = granet_jax.transform(scope["srigl"], optax.sgd(0.1))
    (mask,) = jax.tree.leaves(granet_jax.get_masks(tx.init(params)))
    # A tenth of sixteen inputs, rounded.
    assert np.asarray(mask).sum(0).tolist() == [2] * 8
    (mask,) = jax.tree.leaves(granet_jax.init_masks(scope["blocks"], params))
    assert np.asarray(mask).all()
    for name in ("two_of_four", "sr_ste"):
        assert scope[name].structure.name == granet_jax.structures.n_of_m(2, 4).name


def test_a_pruned_network_recovers():
    scope = run_page("docs/plasticity.md")
    size = sum(mask.size for mask in jax.tree.leaves(scope["full"]))
    masks, keep = scope["pruned"].masks, int(scope["keep"])
    assert keep == (size + 5) // 10  # 90% sparsity, rounded to nearest
    assert active(masks) == active(scope["tx"].init(scope["start"]).masks) == keep
    for name in ("start", "sparse"):
        assert_zero_outside(scope[name], masks)
    recovery = scope["recovery"]
    assert recovery.pruned < recovery.before
    assert recovery.regained > 0
    assert recovery.plasticity == recovery.after - recovery.before


def test_a_step_compiles_from_shapes():
    # A key and two masks a weight.
    assert 0 < run_page("docs/sharding.md")["temporary"] < 9 * 4096**2


def test_a_checkpoint_restores_every_bit():
    scope = run_page("docs/checkpoints.md")
    expected = jax.tree.leaves_with_path((scope["params"], scope["opt_state"]))
    restored = jax.tree.leaves_with_path(scope["again"])
    assert [path for path, _ in expected] == [path for path, _ in restored]
    for (_, a), (_, b) in zip(expected, restored, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_sparse_formats_have_the_active_weights():
    scope = run_page("docs/exporting.md")
    kernel = np.asarray(scope["kernel"])
    np.testing.assert_array_equal(scope["csr"].toarray(), kernel)
    np.testing.assert_array_equal(scope["bcoo"].todense(), kernel)
    assert scope["fast"]["hidden"]["kernel"].values.size == np.count_nonzero(kernel)


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """The options of every module that a page runs, from `--help`."""
    found = {}
    for module in {c.module for page in ALL for c in commands(ROOT / page)}:
        assert importlib.util.find_spec(module) is not None, module
        if module in FOREIGN:
            continue
        package = hasattr(importlib.import_module(module), "__path__")
        main = importlib.import_module(f"{module}.__main__" if package else module).main
        text = io.StringIO()
        with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as stopped:
            main(["--help"])
        assert not stopped.value.code
        found[module] = set(re.findall(r"--[\w.-]+", text.getvalue()))
    return found


@pytest.mark.parametrize("page", ALL)
def test_commands_exist(page: str, options: dict[str, set[str]]):
    for command in commands(ROOT / page):
        for argument in command.arguments:
            if argument.startswith("--") and command.module not in FOREIGN:
                option = argument.rstrip(",.:)").split("=")[0]
                assert option in options[command.module], command
            elif re.fullmatch(r"(experiments|tests|docs)/[\w/.-]+\.\w+", argument):
                assert (ROOT / argument).exists(), command


def test_commands_are_found():
    faq = commands(ROOT / "docs/faq.md")
    assert ("benchmarks.optimizer_step", ()) in faq
    sparser = ("--method", "rigl", "--sparsity", "0.95")
    assert ("experiments.train", sparser) in commands(ROOT / README)
    assert any("--model" in c.arguments for c in commands(ROOT / RESULTS))


@pytest.mark.parametrize("page", ALL)
def test_links_lead_to_files(page: str):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in link:
            assert (ROOT / page).parent.joinpath(link).exists(), link


def public(module: Any) -> list[tuple[str, Any]]:
    members = inspect.getmembers(
        module, lambda x: inspect.isfunction(x) or inspect.isclass(x)
    )
    return [(name, member) for name, member in members if not name.startswith("_")]


def documented() -> Counter[Any]:
    """How often the API reference has every function and class."""
    found: Counter[Any] = Counter()
    directive = re.compile(r"\.\. auto(module|function|class):: (\S+)\n((?: +:.*\n)*)")
    for page in PAGES:
        for kind, name, settings in directive.findall((ROOT / page).read_text()):
            if kind != "module":
                module, _, name = f"granet_jax.{name}".rpartition(".")
                found[getattr(importlib.import_module(module), name)] += 1
                continue
            module = importlib.import_module(name)
            excluded = re.search(r":exclude-members: (.*)", settings)
            excluded = excluded[1].split(", ") if excluded else []
            found.update(
                member
                for name, member in public(module)
                if ":members:" in settings
                and name not in excluded
                and (
                    ":imported-members:" in settings
                    or member.__module__ == module.__name__
                )
            )
    return found


def test_the_reference_is_complete_and_without_repetition():
    counts = documented()
    assert not [member for member, number in counts.items() if number > 1]
    missing = set()
    for name in PUBLIC:
        module = importlib.import_module(name)
        package = hasattr(module, "__path__")
        missing |= {
            f"{name}.{member.__qualname__}"
            for _, member in public(module)
            if member not in counts and (package or member.__module__ == name)
        }
    assert not missing


def test_every_method_has_its_place():
    constructors = {
        name
        for name, member in public(granet_jax)
        if inspect.isfunction(member)
        and inspect.signature(member).return_annotation is granet_jax.Method
    }
    assert {"granet", "acdc", "greg2"} <= constructors
    methods, choosing, readme = (
        (ROOT / page).read_text()
        for page in ("docs/methods.md", "docs/choosing.md", README)
    )
    for name in constructors:
        assert f"`granet_jax.{name}(" in methods
        for table in (choosing, readme):
            assert re.search(rf"^\|.*`{name}[`(]", table, re.MULTILINE), name
