"""One file with parameters and masks, at the size of the active weights.

It is a safetensors file, with arrays and JSON, so reading it executes nothing. A leaf
without a mask is stored as an array of its own name. A leaf with a mask is stored as
two: `NAME.values` holds its active weights in row-major order, and `NAME.mask` the
bytes of the mask (`granet_jax.export.mask_code`). The JSON holds the user's metadata,
the shapes of the leaves with a mask, the tree's keys, and a SHA-256 of everything.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from granet_jax.export.mask_code import decode, encode
from granet_jax.export.sparse_formats import active_values, import_extra
from granet_jax.masking import PyTree, check_concrete, check_masks, flags, leaf_name

VERSION = 2
"""Version of the file format, which every file states."""

# The names that safetensors gives to dtypes.
_DTYPES: dict[str, np.dtype] = {
    code: jnp.dtype(name)
    for code, name in {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "U16": "uint16",
        "I16": "int16",
        "U32": "uint32",
        "I32": "int32",
        "U64": "uint64",
        "I64": "int64",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F16": "float16",
        "BF16": "bfloat16",
        "F32": "float32",
        "F64": "float64",
        "C64": "complex64",
    }.items()
}
# The entry of a safetensors file's metadata that holds our JSON.
_METADATA_KEY = "granet_jax"

Tensors = dict[str, np.ndarray]


class _Header(NamedTuple):
    """The JSON of a file, apart from its version and checksum.

    Attributes:
      metadata: The user's metadata.
      shapes: Shape of every leaf with a mask, by name.
      paths: Keys of every leaf, by name. None for a tree other than nested dicts, which
        `load` can rebuild only with `like`.
    """

    metadata: dict[str, Any] | None
    shapes: dict[str, list[int]]
    paths: dict[str, list[str]] | None


def save(
    path: str | os.PathLike[str],
    params: PyTree,
    masks: PyTree,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write parameters and masks to one file, which stores only the active weights.

    The file appears under its name when it is complete, and replaces an existing one
    atomically. The same arguments produce the same bytes.

    Args:
      path: Path of the file, in an existing folder.
      params: Pytree of arrays that this process can read in full. Pruned weights must
        be exactly zero (not -0.0).
      masks: Pytree of masks with the same structure (`optax.MaskedNode()` or None at
        leaves without a mask), as from `get_masks`.
      metadata: Dict of values that JSON can hold, for `read_metadata`.

    Raises:
      ImportError: safetensors is missing.
      ValueError: A pruned weight is not zero, the masks have another structure or
        shape, or two leaves have the same name.
      TypeError: A leaf is not an array or has a dtype that safetensors does not
        support, or JSON cannot hold the metadata.
      OSError: The file cannot be written.
    """
    safetensors = import_extra("safetensors.numpy")
    path = _check_path(path)
    check_concrete("params", params)
    check_concrete("masks", masks)
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(
            f"metadata must be a dict of values that JSON can hold, got {metadata!r}."
        )
    header, tensors = _split(params, check_masks(masks, params, integers=True))
    try:
        stated = {
            "version": VERSION,
            "metadata": None if metadata is None else dict(metadata),
            "shapes": header.shapes,
            "paths": header.paths,
        }
        stated = json.loads(json.dumps(stated, allow_nan=False))
        text = json.dumps({**stated, "sha256": _digest(stated, tensors)})
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be what JSON can hold: {error}.") from error
    _write(path, safetensors.save(tensors, metadata={_METADATA_KEY: text}))


def load(
    path: str | os.PathLike[str], *, like: PyTree | None = None
) -> tuple[PyTree, PyTree]:
    """Read parameters and masks, bit-identical to those that were saved.

    Args:
      path: Path of a file that `save` has written.
      like: Pytree of arrays or `jax.ShapeDtypeStruct` with the structure that the
        parameters should have, and with the shapes and dtypes of the file (for example
        `jax.eval_shape` of the function that initializes them). Nested dicts with
        string keys do not need it.

    Returns:
      - params: Dense NumPy arrays. `jax.device_put` moves them to devices, with any
        sharding.
      - masks: Boolean NumPy arrays, `optax.MaskedNode()` at leaves without a mask.

    Raises:
      ImportError: safetensors is missing.
      ValueError: The file is damaged, was written by something else or has another
        version; its parameters do not match `like`; or `like` is needed.
      OSError: The file cannot be read.
    """
    header, tensors = _read(path)
    with _naming_the_file(path):
        params, masks = _join(header, tensors)
        if like is None and header.paths is not None:
            return _nest(params, header.paths), _nest(masks, header.paths)
    if like is None:
        raise ValueError(
            f"{path} holds a structure other than nested dicts: pass it as `like` "
            "(arrays or shapes; jax.eval_shape of the function that initializes the "
            "parameters)."
        )
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    named = {leaf_name(keys): leaf for keys, leaf in leaves}
    _check_like(path, named, params)
    names = [leaf_name(keys) for keys, _ in leaves]
    return (
        treedef.unflatten([params[name] for name in names]),
        treedef.unflatten([masks[name] for name in names]),
    )


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read the metadata that was passed to `save`.

    Raises:
      ImportError, ValueError, OSError: As `load`.
    """
    return _read(path)[0].metadata


# Writing.


def _split(params: PyTree, masks: PyTree) -> tuple[_Header, Tensors]:
    """Return the arrays to store, and a header without the user's metadata."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    mask_leaves = iter(jax.tree.leaves(jax.device_get(masks)))
    tensors: Tensors = {}
    shapes: dict[str, list[int]] = {}
    paths: dict[str, list[Any]] = {}
    for (keys, leaf), is_masked in zip(leaves, flags(params, masks), strict=True):
        name = leaf_name(keys)
        x = _host_array(name, leaf)
        parts = {name: x}
        if is_masked:
            mask = next(mask_leaves)
            parts = {
                _values_name(name): active_values(name, x, mask),
                _mask_name(name): encode(mask.reshape(-1)),
            }
            shapes[name] = list(x.shape)
        if name in paths or not tensors.keys().isdisjoint(parts):
            raise ValueError(
                f"params has two leaves that would both be stored as {name!r}: rename "
                "one of them."
            )
        tensors |= parts
        paths[name] = [getattr(key, "key", None) for key in keys]
    is_nested_dicts = _are_nested_dicts(paths, treedef)
    return _Header(None, shapes, paths if is_nested_dicts else None), tensors


def _host_array(name: str, leaf: Any) -> np.ndarray:
    if not hasattr(leaf, "dtype"):
        raise TypeError(f"params must hold arrays, got {leaf!r} at {name!r}.")
    if leaf.dtype not in _DTYPES.values():
        raise TypeError(
            f"params has dtype {leaf.dtype} at {name!r}, which safetensors does not "
            "support: convert it."
        )
    return np.asarray(jax.device_get(leaf), order="C")


def _are_nested_dicts(paths: dict[str, list[Any]], treedef: Any) -> bool:
    """Return whether `_nest` rebuilds the tree from the paths of its leaves."""
    if not all(path and all(type(k) is str for k in path) for path in paths.values()):
        return False
    return jax.tree.structure(_nest(dict.fromkeys(paths, 0), paths)) == treedef


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# Reading a file, which may hold anything.

# The errors that unexpected JSON and arrays can cause.
_MALFORMED = (
    LookupError,
    TypeError,
    AttributeError,
    ValueError,
    OverflowError,
    RecursionError,
)


@contextlib.contextmanager
def _naming_the_file(path: str | os.PathLike[str]) -> Generator[None]:
    """Turn any error about a file's content into one that names the file."""
    try:
        yield
    except _MALFORMED as error:
        raise ValueError(
            f"{path} is not a file of granet_jax.export, or is damaged "
            f"({type(error).__name__}: {error}): save it again, or copy it again."
        ) from error


def _read(path: str | os.PathLike[str]) -> tuple[_Header, Tensors]:
    """Return the header and the arrays of a file, after checking its SHA-256."""
    safetensors = import_extra("safetensors")
    content = _check_path(path).read_bytes()
    with _naming_the_file(path):
        try:
            stored = safetensors.deserialize(content)
        except safetensors.SafetensorError as error:
            raise ValueError(str(error)) from error
        # `deserialize` has checked the lengths, but returns no metadata.
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
        stated = json.loads(metadata[_METADATA_KEY])
        version = stated["version"]
    if version != VERSION:
        raise ValueError(
            f"{path} has version {version!r} of the format, but this version of "
            f"granet_jax reads version {VERSION}: use the one that wrote it."
        )
    with _naming_the_file(path):
        tensors = {
            name: np.frombuffer(x["data"], _DTYPES[x["dtype"]]).reshape(x["shape"])
            for name, x in stored
        }
        if stated.pop("sha256") != _digest(stated, tensors):
            raise ValueError("the SHA-256 that it states is not that of its contents")
        del stated["version"]
        return _Header(**stated), tensors


def _join(
    header: _Header, tensors: Tensors
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the dense leaves and their masks, by name."""
    dense = dict(tensors)
    params: dict[str, np.ndarray] = {}
    masks: dict[str, Any] = {}
    for name, shape in header.shapes.items():
        values, code = dense.pop(_values_name(name)), dense.pop(_mask_name(name))
        if not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"{name!r} has shape {shape}")
        if values.ndim != 1 or code.ndim != 1 or code.dtype != np.uint8:
            raise ValueError(f"{name!r} has arrays of another form")
        mask = decode(code, math.prod(shape), values.size)
        x = np.zeros(mask.size, values.dtype)
        x[mask] = values
        params[name], masks[name] = x.reshape(shape), mask.reshape(shape)
    masks |= dict.fromkeys(dense, optax.MaskedNode())
    params |= dense
    if header.paths is not None and (wrong := header.paths.keys() ^ params.keys()):
        raise ValueError(f"header and arrays disagree on {sorted(wrong)[:4]}")
    return params, masks


def _check_like(
    path: str | os.PathLike[str], like: dict[str, Any], params: dict[str, np.ndarray]
) -> None:
    """Raise ValueError unless both have the same names, shapes and dtypes."""
    missing = sorted(like.keys() - params.keys())
    surplus = sorted(params.keys() - like.keys())
    if missing or surplus:
        raise ValueError(
            f"like has leaves that {path} does not have: {missing[:4]}; and {path} has "
            f"others that like does not have: {surplus[:4]}. Pass the structure that "
            "was saved."
        )
    for name, leaf in like.items():
        x = params[name]
        if (x.shape, x.dtype) != (tuple(leaf.shape), leaf.dtype):
            raise ValueError(
                f"like has shape {tuple(leaf.shape)} and dtype {leaf.dtype} at "
                f"{name!r}, where {path} has {x.shape} and {x.dtype}. Pass the "
                "structure that was saved."
            )


# Parts that both directions share.


def _digest(stated: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    """Return a SHA-256 of the whole content, independent of the layout of the file.

    safetensors checks lengths only, so a flipped bit would become another weight.
    """
    digest = hashlib.sha256(json.dumps(stated, sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(json.dumps([name, x.dtype.name, x.shape]).encode())
        digest.update(np.ascontiguousarray(x).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def _nest(leaves: dict[str, Any], paths: dict[str, list[str]]) -> PyTree:
    """Return nested dicts with every leaf at the keys of its path."""
    tree: dict[str, Any] = {}
    for name, path in paths.items():
        parent = tree
        for key in path[:-1]:
            parent = parent.setdefault(key, {})
        if path[-1] in parent:
            raise ValueError(f"{name!r} is both a leaf and a branch")
        parent[path[-1]] = leaves[name]
    return tree


def _values_name(name: str) -> str:
    return f"{name}.values"


def _mask_name(name: str) -> str:
    return f"{name}.mask"


def _check_path(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be the path of a file, got {path!r}.")
    return Path(path)
