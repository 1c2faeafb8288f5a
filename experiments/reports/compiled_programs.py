"""What the text of a compiled program tells: its operations, copies and collectives."""

import math
import re
from typing import Any, NamedTuple

import jax

_ITEM_BYTES = {"pred": 1, "token": 0}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
    "reduce-scatter",
    "send",
    "recv",
)


class Operation(NamedTuple):
    """One instruction of a compiled program.

    Attributes:
      kind: Name of the operation in XLA, such as "copy" or "all-reduce".
      bytes: Size of its result on one device.
      looped: Whether a loop runs it. Mask updates are loops of one trip or none, so an
        operation outside of loops runs in every step.
    """

    kind: str
    bytes: int
    looped: bool


def compiled_text(program: jax.stages.Compiled) -> str:
    """Returns a compiled program's text."""
    text = program.as_text()
    assert text is not None, "this backend shows no programs"
    return text


def memory(program: jax.stages.Compiled) -> Any:
    """Returns XLA's account of a compiled program's memory."""
    analysis = program.memory_analysis()
    assert analysis is not None, "this backend reports no memory"
    return analysis


def copies(text: str) -> list[Operation]:
    """Lists all copies in a compiled program's text.

    A copy inside a fused kernel changes the order of what the kernel writes anyway, and
    is not one of them.
    """
    return [x for x in operations(text, fused=False) if x.kind == "copy"]


def collectives(text: str) -> list[Operation]:
    """Lists all communication between devices in a compiled program's text."""
    return [
        x._replace(kind=kind)
        for x in operations(text)
        if (kind := x.kind.removesuffix("-start")) in COLLECTIVES
    ]


def operations(text: str, *, fused: bool = True) -> list[Operation]:
    """Lists all operations in a compiled program's text.

    Args:
      text: The text.
      fused: Whether to list also those inside of fused kernels.
    """
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            lines = computations.setdefault(header[1], [])
        elif " = " in line:
            lines.append(line)
    looped = _reached(computations, r"(?:body|condition)=%?([\w.\-]+)", text)
    kernels = _reached(computations, r" fusion\(.*calls=%?([\w.\-]+)", text)
    return [
        Operation(match[2], type_bytes(match[1]), name in looped)
        for name, lines in computations.items()
        if fused or name not in kernels
        for line in lines
        if (match := re.search(r"= (\([^=]*?\)|\S+) ([\w\-]+)\(", _plain(line)))
    ]


def _reached(computations: dict[str, list[str]], start: str, text: str) -> set[str]:
    """Names the computations that a pattern finds in the text, and all they call."""
    reached: set[str] = set()
    waiting = re.findall(start, text)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            for line in computations.get(name, ()):
                waiting += _called(line)
    return reached


def _called(line: str) -> list[str]:
    single = r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    names = re.findall(single, line)
    for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
        names += [name.strip().lstrip("%") for name in group.split(",")]
    return names


def _plain(line: str) -> str:
    """Drops the comments that XLA puts into long tuple types."""
    return re.sub(r"/\*.*?\*/", "", line)


def type_bytes(types: str) -> int:
    """Adds up the arrays in a type, such as "(f32[8,2]{1,0}, u8[])"."""
    total = 0
    for kind, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", types):
        width = _ITEM_BYTES.get(kind)
        if width is None:
            width = int(re.sub(r"\D", "", kind)) // 8
        total += width * math.prod(int(n) for n in dims.split(",") if n)
    return total
