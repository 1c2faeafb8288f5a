"""The file that describes a sweep, read and checked: TOML to configurations."""

import dataclasses
import difflib
import pathlib
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from experiments.config.methods import OPTIONS, MethodName
from experiments.config.run import Config

METHODS: tuple[str, ...] = typing.get_args(MethodName)

# What the sweep itself decides.
_DECIDED = (
    *("method", "sparsity", "seeds", "seed", "vmap_seeds", "baseline"),
    *("out", "progress", "distributed"),
)
# What a single method may have of its own: the budget is the same for all.
_OWN = ("masks", "optimizer", "tost")
# Names of rows are names of folders.
_LABEL = re.compile(r"[\w.+-]+")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep file says, checked.

    Attributes:
      methods: the rows, in the order of the file: methods, or the file's own names for
        methods with options; each followed by its variants, called "row+variant".
      sparsities: in rising order.
      seeds: number of seeds, from 0.
      vmap_seeds: whether all seeds of a cell train as one program; None: what is
        faster.
      cells: the configuration of every cell by its name, which its folder has too.
      variants: what the names of the variants add to those of the rows, "+variant".
    """

    methods: tuple[str, ...]
    sparsities: tuple[float, ...]
    seeds: int
    vmap_seeds: bool | None
    cells: dict[str, Config]
    variants: tuple[str, ...] = ()

    @property
    def plain(self) -> tuple[str, ...]:
        """The rows that are not variants of others."""
        return self.methods[:: 1 + len(self.variants)]

    def cell(self, method: str, sparsity: float) -> str:
        """The name of the cell in a row and a column; dense training has but one."""
        return method if method in self.cells else _cell_name(method, sparsity)

    @property
    def first(self) -> Config:
        """One of the cells: what all have in common can be read off it."""
        return next(iter(self.cells.values()))


def read(path: pathlib.Path) -> Sweep:
    """The sweep that a file describes.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not TOML, or an option in it is unknown or cannot be used; the
        message names it.
    """
    try:
        values = tomllib.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a TOML file: {error}.") from error
    try:
        return _sweep(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _cell_name(method: str, sparsity: float) -> str:
    return f"{method}-{sparsity}"


def _sweep(values: dict[str, Any]) -> Sweep:
    known = ("methods", "sparsities", "seeds", "vmap_seeds", "train", "method")
    known += ("variants",)
    _check_keys("", values, known)
    for name in known[:3]:
        if name not in values:
            raise ValueError(f"{name} is missing: a sweep needs it.")
    own = _table("method", values.get("method", {}))
    methods = _distinct("methods", values["methods"], tuple[str, ...])
    bases = {name: _base(name, own) for name in methods}
    variants = _variants(values.get("variants", {}), methods)
    sparsities = _distinct("sparsities", values["sparsities"], tuple[float, ...])
    seeds = _converted("seeds", values["seeds"], int)
    vmap = _converted(
        "vmap_seeds", values.get("vmap_seeds", "auto"), bool | Literal["auto"]
    )
    common = _table("train", values.get("train", {}))
    _check_keys("method.", own, (*METHODS, *methods))
    for method in own:
        if method not in methods:
            raise ValueError(f"method.{method}: {method} is not one of methods.")
    options = _options("train", common, Config)
    for name in options:
        if name in _DECIDED:
            raise ValueError(
                f"train.{name} is not for a sweep, which sets it by itself or by "
                "methods, sparsities, seeds and vmap_seeds."
            )
    _check_used(options.get("masks", {}), list(bases.values()))
    rows = {}
    for method in methods:
        table = {k: v for k, v in own.get(method, {}).items() if k != "method"}
        extra = _own_options(f"method.{method}", table)
        for suffix, more in {"": {}, **variants}.items():
            rows[method + suffix] = (bases[method], _merged(extra, more))
    cells = {}
    for row, (base, extra) in rows.items():
        for sparsity in (0.0,) if base == "dense" else sparsities:
            name = row if base == "dense" else _cell_name(row, sparsity)
            given = {"method": base, "sparsity": sparsity, "seeds": seeds}
            try:
                cells[name] = _config(given, options, extra, bool(vmap is True))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    vmap_seeds = None if vmap == "auto" else vmap
    return Sweep(tuple(rows), sparsities, seeds, vmap_seeds, cells, tuple(variants))


def _variants(value: Any, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The options of each variant of the rows, by what its name adds to theirs."""
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
    """The options of some rows, which are only those that rows may differ in."""
    options = _options(name, table, Config)
    for key in options:
        if key not in _OWN:
            raise ValueError(
                f"{name}.{key} must be the same for all methods: set it in [train]. "
                f"A method has its own {' and '.join(_OWN)} only."
            )
    return options


def _merged(
    options: Mapping[str, dict[str, Any]], later: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    names = {**options, **later}
    return {name: options.get(name, {}) | later.get(name, {}) for name in names}


def _base(name: str, own: Mapping[str, Any]) -> str:
    """The method that a row is of: its name, or what the file says beside it."""
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
    return _converted(f"method.{name}.method", table["method"], MethodName)


def _check_label(key: str, name: str) -> None:
    if not _LABEL.fullmatch(name):
        raise ValueError(
            f"{key} has {name!r}: the name of a row is that of a folder, and must be "
            "of letters, digits, '_', '.', '+' and '-'."
        )


def _config(
    given: dict[str, Any],
    common: dict[str, Any],
    own: dict[str, Any],
    vmap_seeds: bool,
) -> Config:
    """The configuration of a cell, from the options that all have and its method's."""
    values: dict[str, Any] = dict(common)
    having = OPTIONS[given["method"]]
    if "masks" in common:
        values["masks"] = {k: v for k, v in common["masks"].items() if k in having}
    for name, options in own.items():
        values[name] = values.get(name, {}) | options
    hints = typing.get_type_hints(Config)
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            values[name] = hints[name](**value)
    return Config(**given, **values, vmap_seeds=vmap_seeds, baseline=False)


def _check_used(masks: Mapping[str, Any], methods: Sequence[str]) -> None:
    for name in masks:
        if not any(name in OPTIONS[method] for method in methods):
            raise ValueError(
                f"train.masks.{name} is not an option of any of the methods "
                f"{', '.join(methods)}."
            )


def _options(prefix: str, table: Mapping[str, Any], record: Any) -> dict[str, Any]:
    """The values of a table as the fields of `record`, nested ones as dictionaries."""
    hints = typing.get_type_hints(record)
    # On the command line, words are joined by hyphens.
    renamed = {name.replace("-", "_"): name for name in table}
    if len(renamed) < len(table):
        twice = next(name for name in table if renamed[name.replace("-", "_")] != name)
        raise ValueError(f"{prefix}.{twice} is there twice, with - and with _.")
    _check_keys(f"{prefix}.", renamed, tuple(hints))
    result = {}
    for name, hint in hints.items():
        if name not in renamed:
            continue
        full, value = f"{prefix}.{name}", table[renamed[name]]
        if dataclasses.is_dataclass(hint):
            result[name] = _options(full, _table(full, value), hint)
        else:
            result[name] = _converted(full, value, hint)
    return result


def _converted(name: str, value: Any, hint: Any) -> Any:
    """A value of a file as the type that an option has."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for choice in arguments:
            try:
                return _converted(name, value, choice)
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
            return tuple(_converted(name, item, arguments[0]) for item in value)
    elif hint is pathlib.Path:
        if isinstance(value, str):
            return pathlib.Path(value)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif type(value) is hint:
        return value
    raise ValueError(f"{name} must be {_called(hint)}, got {value!r}.")


def _called(hint: Any) -> str:
    """A type in words."""
    words = {int: "an integer", float: "a number", str: "a string"}
    words |= {bool: "true or false", pathlib.Path: "a string with a path"}
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_called(a) for a in arguments if a is not types.NoneType)
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, arguments))
    if typing.get_origin(hint) is tuple:
        return f"a list, of each {_called(arguments[0])}"
    return words.get(hint, str(hint))


def _distinct(name: str, value: Any, hint: Any) -> tuple[Any, ...]:
    values = _converted(name, value, hint)
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
