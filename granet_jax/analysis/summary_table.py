"""A table of a sparse network: weights, active weights and FLOPs of every leaf."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from granet_jax.analysis.named_leaves import pair_with_masks
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
_TEXT_COLUMNS = 2  # Left-aligned columns; the others hold numbers.


@dataclasses.dataclass(frozen=True)
class Summary:
    """Size and cost of a sparse network, leaf by leaf and in total.

    `print` and `rich.print` show it as a table. Each record is a dict with::

      path: Name of the leaf ("dense/kernel").
      shape: Tuple of integers; None for totals.
      masked: Whether the leaf has a mask.
      weights: Number of weights.
      active: Number of active weights; all of them without a mask.
      sparsity: Fraction of its weights that are pruned.
      share: Its share of all active weights of the network.
      dense_flops, flops: FLOPs of the products with the leaf, without and with the
        mask; present only if FLOPs were passed.

    Attributes:
      records: One record for each leaf, ready for `pandas.DataFrame`.
      masked: Total over the leaves with a mask, as in `granet_jax.sparsity`.
      total: Total over the whole network. Its FLOPs include products without a
        parameter.
    """

    records: list[Record]
    masked: Record
    total: Record

    def __str__(self) -> str:
        """Return the table as plain text."""
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

        def line(row: list[str]) -> str:
            cells = [
                cell.ljust(width) if i < _TEXT_COLUMNS else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            return "  ".join(cells).rstrip()

        lines = [*map(line, rows)]
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-2], rule, *lines[-2:]])

    def __rich__(self) -> "Table":
        """Return the table for `rich.print`."""
        from rich import box, table

        headings, *rows = self._rows()
        result = table.Table(box=box.SIMPLE_HEAD)
        for i, heading in enumerate(headings):
            is_text = i < _TEXT_COLUMNS
            result.add_column(
                heading,
                justify="left" if is_text else "right",
                overflow="fold",
                no_wrap=not is_text,
            )
        for i, row in enumerate(rows):
            result.add_row(*row, end_section=i == len(rows) - 3)
        return result

    def _rows(self) -> list[list[str]]:
        keys = [key for key in _HEADINGS if key in self.total]
        records = [*self.records, self.masked, self.total]
        return [
            [_HEADINGS[key] for key in keys],
            *([_cell(key, record) for key in keys] for record in records),
        ]


def summary(params: PyTree, masks: PyTree, flops: Flops | None = None) -> Summary:
    """Summarize a sparse network, leaf by leaf and in total.

    Args:
      params: Pytree of arrays or `jax.ShapeDtypeStruct`, in any container.
      masks: Concrete masks of these leaves, packed or not, matched by name, with None
        or `optax.MaskedNode()` at leaves without one.
      flops: Result of `flops(apply_fn, params, masks, ...)` with the same masks.

    Returns:
      The records of all leaves and their totals, see `Summary`.

    Raises:
      ValueError: Masks that do not match the parameters, or FLOPs of other leaves or
        masks.
    """
    pairs = pair_with_masks(params, masks)
    if flops is not None:
        check_type("flops", flops, Flops, "from granet_jax.analysis.flops, or None")
        _check_flops(flops, pairs)
    records: list[Record] = []
    for name, (leaf, mask) in pairs.items():
        size = math.prod(leaf.shape)
        active = size if mask is None else int(np.count_nonzero(mask))
        record = _record(name, tuple(leaf.shape), mask is not None, size, active)
        if flops is not None:
            costs = flops.leaves[name]
            record |= {"dense_flops": costs.dense, "flops": costs.sparse}
        records.append(record)
    masked = _total("with a mask", [r for r in records if r["masked"]])
    total = _total("all", records)
    if flops is not None:
        total |= {"dense_flops": flops.dense, "flops": flops.sparse}
    for record in (*records, masked, total):
        all_active = total["active"]
        record["share"] = record["active"] / all_active if all_active else 0.0
    return Summary(records, masked, total)


def _check_flops(flops: Flops, pairs: dict[str, tuple[Any, np.ndarray | None]]) -> None:
    if set(flops.leaves) != set(pairs):
        raise ValueError(
            f"flops must be of the leaves of params, {sorted(pairs)}, got "
            f"{sorted(flops.leaves)}."
        )
    for name, (leaf, mask) in pairs.items():
        costs = flops.leaves[name]
        active = math.prod(leaf.shape) if mask is None else np.count_nonzero(mask)
        if (costs.masked, costs.active) != (mask is not None, active):
            raise ValueError(
                f"flops must be of these masks, got {costs.active} active weights "
                f"at {name!r}, which has {active}."
            )


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


def _total(path: str, records: list[Record]) -> Record:
    weights, active = (sum(r[key] for r in records) for key in ("weights", "active"))
    masked = all(r["masked"] for r in records)
    result = _record(path, None, masked, weights, active)
    for key in ("dense_flops", "flops"):
        if any(key in r for r in records):
            result[key] = sum(r[key] for r in records)
    return result


def _cell(key: str, record: Record) -> str:
    value = record[key]
    is_dense_leaf = not record["masked"] and record["shape"] is not None
    match key:
        case "path":
            return value
        case "shape":
            return "" if value is None else " x ".join(map(str, value))
        case "active" if is_dense_leaf:
            return "dense"
        case "sparsity":
            return "" if is_dense_leaf else f"{100 * value:.2f}"
        case "share":
            return f"{100 * value:.2f}"
        case _:
            return f"{value:,.0f}"
