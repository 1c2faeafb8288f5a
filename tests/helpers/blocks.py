"""Code blocks and commands of Markdown pages, run as a reader runs them."""

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax

ROOT = Path(__file__).parents[2]
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"python3? -m ([a-z]\w*(?:\.[a-z]\w*)*)(?=[\s,]|$)(.*)")


class Command(NamedTuple):
    """`python -m module arguments`."""

    module: str
    arguments: tuple[str, ...]


def python_blocks(page: Path) -> list[str]:
    """Return the Python blocks of a page, in order."""
    return re.findall(
        r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL
    )


def run(block: str, scope: dict[str, Any], name: str) -> dict[str, Any]:
    """Run a block in the namespace `scope`, and return the namespace."""
    # Readers have jax's defaults, which are less strict than the tests' settings.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        exec(compile(block, name, "exec"), scope)
    return scope


@functools.cache
def run_page(name: str) -> dict[str, Any]:
    """Run all blocks of a page in one namespace, once, and return the namespace."""
    scope: dict[str, Any] = {"__name__": name}
    for number, block in enumerate(python_blocks(ROOT / name)):
        run(block, scope, f"{name}, block {number}")
    return scope


def commands(page: Path) -> list[Command]:
    """Return every `python -m` command of a page, in blocks and in text."""
    text = page.read_text()
    spans = re.findall(r"`([^`]+)`", _FENCED.sub("", text))
    lines = [re.sub(r"\s+", " ", span) for span in spans]
    joined = re.sub(r"\\\n\s*", " ", text)  # a backslash continues a command
    lines += [line for line in joined.splitlines() if re.match(r" {4}\S", line)]
    for block in _FENCED.findall(joined):
        lines += block.splitlines()
    found = []
    for line in lines:
        for module, rest in _COMMAND.findall(line):
            arguments = re.split(r"\s#|[&|;>]", rest)[0]  # where the shell ends it
            found.append(Command(module, tuple(arguments.split())))
    return found
