"""Sweep files: from TOML to checked configurations."""

import dataclasses
import difflib
import pathlib
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from etils import epath

from experiments.config.methods import OPTIONS, MethodName
from experiments.config.run import Config

METHODS: tuple[str, ...] = typing.get_args(MethodName)

# Options that the sweep sets itself.
_SET_BY_SWEEP = (
    *("method", "sparsity", "seeds", "seed", "vmap_seeds", "baseline"),
    *("out", "progress", "distributed"),
)
# Options that may differ between methods. All methods have the same budget.
_PER_METHOD = ("masks", "optimizer", "tost")
# Names of rows are also names of folders.
_LABEL = re.compile(r"[\w.+-]+")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A checked sweep.

    Attributes:
      methods: Names of the rows in the order of the file: methods, or the file's own
        names for methods with options. Each row is followed by its variants, which are
        called "row+variant".
      sparsities: Sparsities in increasing order.
      seeds: Number of seeds; the first is 0.
      vmap_seeds: Whether all seeds of a cell train as one program; None means whichever
        is faster.
      cells: Configuration of every cell, by its name, which is also its folder's name.
      variants: Suffixes of the variants, "+variant".
    """

    methods: tuple[str, ...]
    sparsities: tuple[float, ...]
    seeds: int
    vmap_seeds: bool | None
    cells: dict[str, Config]
    variants: tuple[str, ...] = ()

    @property
    def plain(self) -> tuple[str, ...]:
        """Rows that are not variants."""
        return self.methods[:: 1 + len(self.variants)]

    def cell(self, method: str, sparsity: float) -> str:
        """Return the name of a cell. A row of dense training has a single cell."""
        return method if method in self.cells else _cell_name(method, sparsity)

    @property
    def first(self) -> Config:
        """The configuration of one cell, for the options that all cells share."""
        return next(iter(self.cells.values()))


def read(path: pathlib.Path) -> Sweep:
    """Read the sweep that a file describes.

    Raises:
      OSError: The file cannot be read.
      ValueError: The file is not TOML, or an option is unknown or invalid.
    """
    try:
        values = tomllib.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a TOML file: {error}.") from error
    try:
        return _parse(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _cell_name(method: str, sparsity: float) -> str:
    return f"{method}-{sparsity}"


def _parse(values: dict[str, Any]) -> Sweep:
    required = ("methods", "sparsities", "seeds")
    _check_keys("", values, (*required, "vmap_seeds", "train", "method", "variants"))
    for name in required:
        if name not in values:
            raise ValueError(f"{name} is missing: a sweep needs it.")
    own = _table("method", values.get("method", {}))
    methods = _distinct("methods", values["methods"], tuple[str, ...])
    bases = {name: _base(name, own) for name in methods}
    variants = _variants(values.get("variants", {}), methods)
    sparsities = _distinct("sparsities", values["sparsities"], tuple[float, ...])
    seeds = _convert("seeds", values["seeds"], int)
    vmap_seeds = _convert(
        "vmap_seeds", values.get("vmap_seeds", "auto"), bool | Literal["auto"]
    )
    common = _common_options(_table("train", values.get("train", {})))
    _check_keys("method.", own, (*METHODS, *methods))
    for method in own:
        if method not in methods:
            raise ValueError(f"method.{method}: {method} is not one of methods.")
    _check_used(common.get("masks", {}), list(bases.values()))
    rows = {}
    for method in methods:
        table = {k: v for k, v in own.get(method, {}).items() if k != "method"}
        options = _own_options(f"method.{method}", table)
        for suffix, more in {"": {}, **variants}.items():
            rows[method + suffix] = (bases[method], _merged(options, more))
    cells = {}
    for row, (base, options) in rows.items():
        for sparsity in (0.0,) if base == "dense" else sparsities:
            name = row if base == "dense" else _cell_name(row, sparsity)
            cell = {"method": base, "sparsity": sparsity, "seeds": seeds}
            cell["vmap_seeds"] = vmap_seeds is True
            try:
                cells[name] = _config(cell, common, options)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    return Sweep(
        methods=tuple(rows),
        sparsities=sparsities,
        seeds=seeds,
        vmap_seeds=None if vmap_seeds == "auto" else vmap_seeds,
        cells=cells,
        variants=tuple(variants),
    )


def _common_options(table: Mapping[str, Any]) -> dict[str, Any]:
    options = _options("train", table, Config)
    for name in options:
        if name in _SET_BY_SWEEP:
            raise ValueError(
                f"train.{name} is not for a sweep, which sets it itself or from "
                "methods, sparsities, seeds and vmap_seeds."
            )
    return options


def _variants(value: Any, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the options of every variant, by its suffix."""
    result = {}
    for name, table in _table("variants", value).items():
        _check_label("variants", name)
        for method in methods:
            if f"{method}+{name}" in methods:
                raise ValueError(
                    f"methods has {method}+{name}, which is also the name of variant "
                    f"{name} of {method}: leave one of the two out."
                )
        full = f"variants.{name}"
        result[f"+{name}"] = _own_options(full, _table(full, table))
    return result


def _own_options(name: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a row or variant; rows may differ in no others."""
    options = _options(name, table, Config)
    for key in options:
        if key not in _PER_METHOD:
            raise ValueError(
                f"{name}.{key} must be the same for all methods: set it in [train]. "
                f"Methods may differ in {' and '.join(_PER_METHOD)} only."
            )
    return options


def _merged(
    options: Mapping[str, dict[str, Any]], later: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    names = {**options, **later}
    return {name: options.get(name, {}) | later.get(name, {}) for name in names}


def _base(name: str, own: Mapping[str, Any]) -> str:
    """Return the method of a row: its name, or the `method` in its table."""
    table = _table(f"method.{name}", own.get(name, {}))
    if name in METHODS:
        if "method" in table:
            raise ValueError(
                f"method.{name}.method is for rows with names of their own, and {name} "
                "is a method: choose another name."
            )
        return name
    if name not in own:
        near = difflib.get_close_matches(name, METHODS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"methods must be one of {', '.join(METHODS)}, or have a table "
            f'[method.NAME] that says method = "..."; got {name!r}.{hint}'
        )
    _check_label("methods", name)
    if "method" not in table:
        raise ValueError(f"method.{name}.method is missing: which method is it?")
    return _convert(f"method.{name}.method", table["method"], MethodName)


def _check_label(key: str, name: str) -> None:
    if not _LABEL.fullmatch(name):
        raise ValueError(
            f"{key} has {name!r}: the name of a row is also the name of a folder, and "
            "must consist of letters, digits, '_', '.', '+' and '-'."
        )


def _config(
    cell: dict[str, Any],
    common: dict[str, Any],
    own: dict[str, Any],
) -> Config:
    """Return the configuration of a cell: common options, then options of its row."""
    values: dict[str, Any] = dict(common)
    known = OPTIONS[cell["method"]]
    if "masks" in common:
        values["masks"] = {k: v for k, v in common["masks"].items() if k in known}
    for name, options in own.items():
        values[name] = values.get(name, {}) | options
    hints = typing.get_type_hints(Config)
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            values[name] = hints[name](**value)
    return Config(**cell, **values, baseline=False)


def _check_used(masks: Mapping[str, Any], methods: Sequence[str]) -> None:
    for name in masks:
        if not any(name in OPTIONS[method] for method in methods):
            raise ValueError(
                f"train.masks.{name} is not an option of any of the methods "
                f"{', '.join(methods)}."
            )


def _options(prefix: str, table: Mapping[str, Any], record: Any) -> dict[str, Any]:
    """Convert a table to values for the fields of `record`; nested ones are dicts."""
    hints = typing.get_type_hints(record)
    # Names may have hyphens, as on the command line.
    renamed = {name.replace("-", "_"): name for name in table}
    if len(renamed) < len(table):
        twice = next(name for name in table if renamed[name.replace("-", "_")] != name)
        raise ValueError(f"{prefix}.{twice} is given twice, with - and with _.")
    _check_keys(f"{prefix}.", renamed, tuple(hints))
    result = {}
    for name, hint in hints.items():
        if name not in renamed:
            continue
        full, value = f"{prefix}.{name}", table[renamed[name]]
        if dataclasses.is_dataclass(hint):
            result[name] = _options(full, _table(full, value), hint)
        else:
            result[name] = _convert(full, value, hint)
    return result


def _convert(name: str, value: Any, hint: Any) -> Any:
    """Convert a value to the type of an option."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for choice in arguments:
            try:
                return _convert(name, value, choice)
            except ValueError:
                continue
    elif origin is Literal:
        if value in arguments:
            return value
        near = difflib.get_close_matches(str(value), arguments, 1)
        hinted = f" Did you mean {near[0]!r}?" if near else ""
        choices = ", ".join(map(str, arguments))
        raise ValueError(f"{name} must be one of {choices}; got {value!r}.{hinted}")
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_convert(name, item, arguments[0]) for item in value)
    elif hint is epath.Path:
        if isinstance(value, str):
            return epath.Path(value)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif type(value) is hint:
        return value
    raise ValueError(f"{name} must be {_type_name(hint)}, got {value!r}.")


def _type_name(hint: Any) -> str:
    """Describe a type."""
    words = {int: "an integer", float: "a number", str: "a string"}
    words |= {bool: "true or false", epath.Path: "a string with a path"}
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_type_name(a) for a in arguments if a is not types.NoneType)
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, arguments))
    if typing.get_origin(hint) is tuple:
        return f"a list, of each {_type_name(arguments[0])}"
    return words.get(hint, str(hint))


def _distinct(name: str, value: Any, hint: Any) -> tuple[Any, ...]:
    values = _convert(name, value, hint)
    if not values:
        raise ValueError(f"{name} must not be empty.")
    if len(set(values)) < len(values):
        raise ValueError(f"{name} has a value twice: {value}.")
    return tuple(sorted(values)) if hint == tuple[float, ...] else values


def _table(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a table, [{name}], got {value!r}.")
    return value


def _check_keys(prefix: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = (
                f"Did you mean {prefix}{near[0]}?"
                if near
                else f"There are {', '.join(known)}."
            )
            raise ValueError(f"{prefix}{name} is unknown. {hint}")
