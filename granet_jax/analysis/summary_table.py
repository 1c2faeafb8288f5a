"""A table of a sparse network: weights, active weights and FLOPs of every leaf."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from granet_jax.analysis.named_leaves import paired
from granet_jax.analysis.network_flops import Flops
from granet_jax.checks import check_type
from granet_jax.masking import PyTree

if TYPE_CHECKING:
    from rich.table import Table

Record = dict[str, Any]

_HEADINGS = {
    "path": "parameter",
    "shape": "shape",
    "weights": "weights",
    "active": "active",
    "sparsity": "sparsity / %",
    "share": "share / %",
    "dense_flops": "dense FLOPs",
    "flops": "FLOPs",
}


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a sparse network has, leaf by leaf; `print` and `rich.print` show a table.

    Each is a dict with::

      path: name of the leaf ("dense/kernel").
      shape: tuple of integers; None for totals.
      masked: whether it carries a mask.
      weights: number of weights.
      active: number of active weights; all of them without a mask.
      sparsity: share of its weights that are pruned.
      share: its share of all active weights of the network.
      dense_flops, flops: of the products with it, without and with the mask; only where
        FLOPs were given.

    Attributes:
      records: of every leaf, ready for `pandas.DataFrame`.
      masked: of all leaves with a mask together, as `granet_jax.sparsity` has it.
      total: of the whole network; its FLOPs are those of products without a parameter
        as well.
    """

    records: list[Record]
    masked: Record
    total: Record

    def __str__(self) -> str:
        """A table of plain text, with totals below a line."""
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

        def line(row: list[str]) -> str:
            cells = [
                cell.ljust(width) if i < _LEFT else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            return "  ".join(cells).rstrip()

        lines = [*map(line, rows)]
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-2], rule, *lines[-2:]])

    def __rich__(self) -> "Table":
        """The same table for `rich.print`."""
        from rich import box, table

        headings, *rows = self._rows()
        result = table.Table(box=box.SIMPLE_HEAD)
        for i, heading in enumerate(headings):
            words = i < _LEFT
            result.add_column(
                heading,
                justify="left" if words else "right",
                overflow="fold",
                no_wrap=not words,
            )
        for i, row in enumerate(rows):
            result.add_row(*row, end_section=i == len(rows) - 3)
        return result

    def _rows(self) -> list[list[str]]:
        keys = [key for key in _HEADINGS if key in self.total]
        every = [*self.records, self.masked, self.total]
        return [
            [_HEADINGS[key] for key in keys],
            *([_cell(key, record) for key in keys] for record in every),
        ]


_LEFT = 2  # Columns of words.


def summary(params: PyTree, masks: PyTree, flops: Flops | None = None) -> Summary:
    """What a sparse network has, leaf by leaf and in total.

    Args:
      params: pytree of arrays or `jax.ShapeDtypeStruct`, of any container.
      masks: concrete masks of these leaves (None or `optax.MaskedNode()` at leaves
        without one, packed or not), matched by name.
      flops: from `flops(apply_fn, params, masks, ...)`, with these masks.

    Returns:
      See `Summary`.

    Raises:
      ValueError: masks that do not fit, or FLOPs of other leaves or of other masks.
    """
    pairs = paired(params, masks)
    if flops is not None:
        check_type("flops", flops, Flops, "from granet_jax.analysis.flops, or None")
    if flops is not None and set(flops.leaves) != set(pairs):
        raise ValueError(
            f"flops must be of the leaves of params, {sorted(pairs)}, got "
            f"{sorted(flops.leaves)}."
        )
    records: list[Record] = []
    for name, (leaf, mask) in pairs.items():
        size = math.prod(leaf.shape)
        active = size if mask is None else int(np.count_nonzero(mask))
        record = _record(name, tuple(leaf.shape), mask is not None, size, active)
        if flops is not None:
            found = flops.leaves[name]
            if (found.masked, found.active) != (mask is not None, active):
                raise ValueError(
                    f"flops must be of these masks, got {found.active} active weights "
                    f"at {name!r}, which has {active}."
                )
            record |= {"dense_flops": found.dense, "flops": found.sparse}
        records.append(record)
    masked = _sum("with a mask", [r for r in records if r["masked"]])
    total = _sum("all", records)
    if flops is not None:
        total |= {"dense_flops": flops.dense, "flops": flops.sparse}
    for record in (*records, masked, total):
        everything = total["active"]
        record["share"] = record["active"] / everything if everything else 0.0
    return Summary(records, masked, total)


def _record(
    path: str, shape: tuple[int, ...] | None, masked: bool, weights: int, active: int
) -> Record:
    return {
        "path": path,
        "shape": shape,
        "masked": masked,
        "weights": weights,
        "active": active,
        "sparsity": 1.0 - active / weights if weights else 0.0,
        "share": 0.0,
    }


def _sum(path: str, records: list[Record]) -> Record:
    weights, active = (sum(r[key] for r in records) for key in ("weights", "active"))
    masked = all(r["masked"] for r in records)
    result = _record(path, None, masked, weights, active)
    for key in ("dense_flops", "flops"):
        if any(key in r for r in records):
            result[key] = sum(r[key] for r in records)
    return result


def _cell(key: str, record: Record) -> str:
    value = record[key]
    match key:
        case "path":
            return value
        case "shape":
            return "" if value is None else " x ".join(map(str, value))
        case "active" if not record["masked"] and record["shape"] is not None:
            return "dense"
        case "sparsity":
            dense = not record["masked"] and record["shape"] is not None
            return "" if dense else f"{100 * value:.2f}"
        case "share":
            return f"{100 * value:.2f}"
        case _:
            return f"{value:,.0f}"
