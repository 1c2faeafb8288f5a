"""The documentation: its code runs, its commands exist, its reference is complete."""

import contextlib
import importlib
import importlib.util
import inspect
import io
import pkgutil
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import granet_jax
from tests.helpers.blocks import ROOT, commands, python_blocks, run

BUILT = ("_build", "_generated")
PAGES = sorted(
    page
    for page in (ROOT / "docs").rglob("*.md")
    if not set(BUILT) & set(page.relative_to(ROOT / "docs").parts)
)
# The other pages with commands. (The blocks of the README run in test_readme.)
OTHERS = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "experiments/README.md",
        "experiments/clusters.md",
        "experiments/results/README.md",
    )
]
# Options of these are their own business.
FOREIGN = ("pip", "venv", "pytest", "sphinx")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "page", [p for p in [*PAGES, *OTHERS[1:2]] if python_blocks(p)], ids=name_of
)
def test_code_of_a_page_runs(page: Path) -> None:
    scope: dict[str, Any] = {"__name__": name_of(page)}
    for number, block in enumerate(python_blocks(page)):
        run(block, scope, f"{name_of(page)}, block {number}")


def test_pages_with_code_are_found() -> None:
    names = {name_of(p) for p in PAGES if python_blocks(p)}
    assert {"docs/index.md", "docs/methods.md", "docs/migrating.md"} <= names


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """The options of every module that a page names, by `--help`."""
    found = {}
    for module in {c.module for page in [*PAGES, *OTHERS] for c in commands(page)}:
        assert importlib.util.find_spec(module) is not None, module
        if module in FOREIGN:
            continue
        text = io.StringIO()
        # That of a package is in its `__main__`.
        package = hasattr(importlib.import_module(module), "__path__")
        main = importlib.import_module(f"{module}.__main__" if package else module).main
        with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as stopped:
            main(["--help"])
        assert not stopped.value.code
        found[module] = set(re.findall(r"--[\w.-]+", text.getvalue()))
    return found


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_commands_exist(page: Path, options: dict[str, set[str]]) -> None:
    for command in commands(page):
        for argument in command.arguments:
            if argument.startswith("--") and command.module not in FOREIGN:
                option = argument.rstrip(",.:)").split("=")[0]
                assert option in options[command.module], command
            elif re.fullmatch(r"(experiments|tests|docs)/[\w/.-]+\.\w+", argument):
                assert (ROOT / argument).exists(), command


def test_commands_are_found() -> None:
    (command,) = [c for c in commands(ROOT / "docs/faq.md") if "step" in c.module]
    assert command == ("benchmarks.step", ())
    readme = commands(ROOT / "README.md")
    assert ("experiments.train", ("--method", "METHOD")) in readme
    results = commands(ROOT / "experiments/results/README.md")
    assert any("--model" in c.arguments for c in results)


def documented() -> Counter[Any]:
    """How often the API reference has every function and class."""
    found: Counter[Any] = Counter()
    for page in PAGES:
        context = granet_jax
        lines = page.read_text().splitlines()
        for i, line in enumerate(lines):
            match = re.match(r"\.\. auto(module|function|class):: (\S+)", line)
            if not match:
                continue
            if match[1] != "module":
                found[getattr(context, match[2])] += 1
                continue
            settings = "\n".join(lines[i + 1 : lines.index("```", i)])
            module = importlib.import_module(match[2])
            excluded = re.search(r":exclude-members: (.*)", settings)
            left_out = excluded[1].split(", ") if excluded else []
            if ":members:" in settings:
                found.update(
                    member
                    for name, member in public(module)
                    if name not in left_out
                    and (":imported-members:" in settings or own(member, module))
                )
    return found


def public(module: Any) -> list[tuple[str, Any]]:
    members = inspect.getmembers(
        module, lambda x: inspect.isfunction(x) or inspect.isclass(x)
    )
    return [(name, member) for name, member in members if not name.startswith("_")]


def own(member: Any, module: Any) -> bool:
    return member.__module__ == module.__name__


def test_the_reference_is_complete_and_says_nothing_twice() -> None:
    counts = documented()
    twice = [member for member, number in counts.items() if number > 1]
    assert not twice
    packages = ["granet_jax", "granet_jax.analysis", "granet_jax.mask_sources"]
    wanted = {
        member
        for name in [*packages, "granet_jax.tost"]
        for _, member in public(importlib.import_module(name))
    }
    for info in pkgutil.iter_modules(granet_jax.__path__, "granet_jax."):
        module = importlib.import_module(info.name)
        if not info.ispkg and "._" not in info.name:
            wanted |= {member for _, member in public(module) if own(member, module)}
    missing = wanted - set(counts)
    assert not {f"{m.__module__}.{m.__qualname__}" for m in missing}


def test_every_method_has_its_place() -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    choosing = (ROOT / "docs" / "choosing.md").read_text()
    constructors = {
        name
        for name, member in public(granet_jax)
        if inspect.isfunction(member)
        and inspect.signature(member).return_annotation is granet_jax.Method
    }
    assert {"granet", "acdc", "greg2"} <= constructors
    for name in constructors:
        assert f"`granet_jax.{name}(" in page
        assert re.search(rf"^\|.*`{name}[`(]", choosing, re.MULTILINE)
