"""The documentation: its code runs, its commands exist, its reference is complete."""

import contextlib
import importlib
import importlib.util
import inspect
import io
import re
from collections import Counter
from typing import Any

import pytest

import granet_jax
from tests.helpers.blocks import ROOT, commands, python_blocks, run_page

PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (ROOT / "docs").rglob("*.md")
    if not {"_build", "_generated"} & set(page.parts)
)
README, CONTRIBUTING = "README.md", "CONTRIBUTING.md"
OTHERS = [README, CONTRIBUTING, "experiments/README.md", "experiments/clusters.md"]
RESULTS = [
    f"experiments/results/{name}.md"
    for name in ("README", "methods", "plasticity", "cyclical", "tost")
]
ALL = [*PAGES, *OTHERS, *RESULTS]
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


def test_quickstart_learns_and_shows_its_table():
    scope = run_page("docs/quickstart.md")
    # Ten classes: chance is 0.1, and a linear classifier reaches about 0.9.
    assert scope["accuracy"] > 0.93
    table = "".join(f"    {line}\n" for line in str(scope["table"]).splitlines())
    assert table in (ROOT / "docs/quickstart.md").read_text()


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
    assert any("--model" in c.arguments for c in commands(ROOT / RESULTS[1]))


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
