"""Code blocks of Markdown pages, run as a reader runs them; and commands on them."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import jax

ROOT = Path(__file__).parents[2]
# A name in capitals stands for others.
_MODULE = re.compile(r"python3? -m ([a-z]\w*(?:\.[a-z]\w*)*)(?=[\s,]|$)(.*)")


class Command(NamedTuple):
    """`python -m module arguments`, as a page has it."""

    module: str
    arguments: tuple[str, ...]


def python_blocks(page: Path) -> list[str]:
    """The Python blocks of a page, in order."""
    return re.findall(
        r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL
    )


def run(block: str, scope: dict[str, Any], name: str) -> dict[str, Any]:
    """Runs a block in the namespace `scope` and returns that."""
    # As a reader runs it, whatever stricter settings the other tests are under.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        exec(compile(block, name, "exec"), scope)
    return scope


def commands(page: Path) -> list[Command]:
    """Every `python -m` command of a page, in blocks and in lines of text."""
    text = page.read_text()
    fenced = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`]+)`", fenced.sub("", text))
    lines = [re.sub(r"\s+", " ", span) for span in spans]
    # Indented lines and fenced blocks, with those that a backslash continues.
    joined = re.sub(r"\\\n\s*", " ", text)
    lines += [x for x in joined.splitlines() if re.match(r" {4}\S", x)]
    for block in fenced.findall(joined):
        lines += block.splitlines()
    found = []
    for line in lines:
        for module, rest in _MODULE.findall(line):
            # As a shell ends it.
            rest = re.split(r"\s#|[&|;>]", rest)[0]
            found.append(Command(module, tuple(rest.split())))
    return found
