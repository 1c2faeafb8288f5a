"""Sparse parameters on disk, and in the sparse formats of JAX and SciPy.

::

    from granet_jax import export

    export.save("net.safetensors", params, granet_jax.get_masks(opt_state))
    params, masks = export.load("net.safetensors")
    kernel = export.to_bcsr(params["dense"]["kernel"], masks["dense"]["kernel"])

A file is one of safetensors: arrays and JSON, nothing that runs when it is read. A leaf
without a mask is an array of its own name. A leaf with one is two: `NAME.values`, its
active weights in row-major order, and `NAME.mask`, bytes of the mask.

The bytes of a mask are a Rice code of the gaps between active weights, or, where more
than half are active, between pruned ones. A gap, the number of others before one, is
split at its k lowest bits. First come those of all gaps, k bits each; then, for each
gap, as many zeros as the rest says, and a one. The best k follows from the density: 5
at 98% sparsity, and at 2%. From 39 to 61% it is 0, and the code is the plain bit mask
(or its inverse), without the zero bytes at its end. A mask without structure takes
within 3% of its entropy (`mask_entropy`).

Needs the extra `granet_jax[export]`: safetensors, and scipy for `to_csr`.

References:
  Rice, Plaunt, Adaptive Variable-Length Coding for Efficient Compression of Spacecraft
  Television Data, IEEE Transactions on Communication Technology, 1971.
  Kiely, Selecting the Golomb Parameter in Rice Coding, IPN Progress Report 42-159,
  2004.
"""

import contextlib
import hashlib
import json
import math
import os
import types
from collections.abc import Generator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import sparse
from jax.typing import ArrayLike

from granet_jax.masking import (
    PyTree,
    check_concrete,
    check_masks,
    flags,
    given_masks,
    is_masked_node,
    is_packed,
    leaf_name,
)

if TYPE_CHECKING:
    import scipy.sparse

VERSION = 2
"""Of the format, which a file states; `load` reads 1, without a checksum, as well."""

# The types of safetensors, under their names there.
_DTYPES: dict[str, np.dtype] = {
    code: jax.numpy.dtype(name)
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
_KEY = "granet_jax"


class _Header(NamedTuple):
    """What a file says besides its arrays, as JSON, with its version.

    Attributes:
      metadata: the user's.
      shapes: by name, of every leaf with a mask.
      paths: by name, the keys of every leaf; None for a tree that is not nested dicts,
        which `load` cannot make without `like`.
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
    """Writes parameters, the active weights alone where there is a mask, to one file.

    The file appears under its name when it is complete, and replaces another at once.
    The same arguments give the same bytes.

    Args:
      path: of the file; its folder exists.
      params: pytree of arrays, of which this process can read every element. Exactly
        zero (not -0.0) where a mask is False.
      masks: pytree of masks of the same structure (`optax.MaskedNode()` or None at
        dense leaves), from `get_masks`.
      metadata: anything that JSON holds, for `read_metadata`.

    Raises:
      ImportError: safetensors is missing.
      ValueError: a pruned weight that is not zero; masks of another structure or shape;
        two leaves of one name.
      TypeError: a leaf that is no array, or of a type that safetensors has not;
        metadata that JSON has not.
      OSError: the file cannot be written.
    """
    safetensors = _import("safetensors.numpy")
    path = _path(path)
    check_concrete("params", params)
    check_concrete("masks", masks)
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(
            f"metadata must be a dict of what JSON holds, got {metadata!r}."
        )
    masks = jax.device_get(check_masks(masks, params))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    mask_leaves = iter(jax.tree.leaves(masks))
    shapes, paths = {}, {}
    tensors: dict[str, np.ndarray] = {}
    for (keys, leaf), is_masked in zip(leaves, flags(params, masks), strict=True):
        name = leaf_name(keys)
        x = _host_array(name, leaf)
        parts = {name: x}
        if is_masked:
            mask = next(mask_leaves)
            values = _active_values(name, x, mask)
            parts = {_values(name): values, _mask(name): _encode(mask.reshape(-1))}
            shapes[name] = list(x.shape)
        if not tensors.keys().isdisjoint(parts):
            raise ValueError(
                f"params has two leaves that would both be stored as {name!r}: rename "
                "one of them."
            )
        tensors |= parts
        paths[name] = [getattr(key, "key", None) for key in keys]
    header = _Header(
        metadata=None if metadata is None else dict(metadata),
        shapes=shapes,
        paths=paths if _are_nested_dicts(paths, treedef) else None,
    )
    try:
        about = {"version": VERSION, **header._asdict()}
        about = json.loads(json.dumps(about, allow_nan=False))
        text = json.dumps({**about, "sha256": _digest(about, tensors)})
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be what JSON holds: {error}.") from error
    content = safetensors.save(tensors, metadata={_KEY: text})
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load(
    path: str | os.PathLike[str], *, like: PyTree | None = None
) -> tuple[PyTree, PyTree]:
    """The parameters and masks of a file, equal to those saved to the bit.

    Args:
      path: of a file that `save` wrote.
      like: pytree of arrays or `jax.ShapeDtypeStruct`s whose structure the parameters
        are to have, with the shapes and dtypes of the file (`jax.eval_shape` of the
        function that initialises them). Not needed for nested dicts with strings as
        keys.

    Returns:
      - params: dense, as NumPy arrays: `jax.device_put` brings them to devices, under
        any sharding.
      - masks: NumPy arrays of bool, `optax.MaskedNode()` at dense leaves.

    Raises:
      ImportError: safetensors is missing.
      ValueError: the file is damaged, of another kind or version; its parameters are
        not `like`; or `like` is needed.
      OSError: the file cannot be read.
    """
    header, tensors = _read(path)
    if like is None:
        if header.paths is None:
            raise ValueError(
                f"{path} holds another structure than nested dicts: pass it as `like` "
                "(arrays or shapes; jax.eval_shape of what initialises the parameters)."
            )
        with _understood(path):
            names = list(header.paths)
            _check_names(header, tensors, names)
            found = {name: _leaf(name, header, tensors) for name in names}
            params = _nested({k: x for k, (x, _) in found.items()}, header.paths)
            masks = _nested({k: mask for k, (_, mask) in found.items()}, header.paths)
        return params, masks
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    wanted = {leaf_name(keys): leaf for keys, leaf in leaves}
    with _understood(path):
        _check_like(path, header, tensors, wanted)
        found = {name: _leaf(name, header, tensors) for name in wanted}
    pairs = [found[leaf_name(keys)] for keys, _ in leaves]
    return (
        treedef.unflatten([x for x, _ in pairs]),
        treedef.unflatten([mask for _, mask in pairs]),
    )


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What was given to `save` as metadata.

    Raises:
      ImportError, ValueError, OSError: as `load`.
    """
    return _read(path)[0].metadata


def mask_entropy(masks: PyTree) -> float:
    """Bits that masks of these densities take at least, if they have no structure.

    For a leaf of n weights and density d it is n H(d), with
    H(d) = -d log2(d) - (1 - d) log2(1 - d). No code is shorter on average over all
    masks with as many active weights, but for the logarithm of n. Masks of blocks or of
    N:M have less.

    Args:
      masks: pytree of masks, packed or not. Must be concrete.

    Raises:
      TypeError, ValueError: what is no mask; traced masks.
    """
    masks = given_masks(masks)
    check_concrete("masks", masks)
    bits = 0.0
    for mask in jax.tree.leaves(masks):
        size = math.prod(mask.shape)
        active = int(np.count_nonzero(mask))
        for count in (active, size - active):
            bits += count * math.log2(size / count) if count else 0.0
    return bits


def to_bcoo(param: ArrayLike, mask: ArrayLike) -> sparse.BCOO:
    """The active weights of a leaf of any shape, for `jax.experimental.sparse`.

    Args:
      param: array, zero where `mask` is False.
      mask: of the same shape.

    Returns:
      BCOO of that shape with all dimensions sparse; `nse` is the number of active
      weights, those that happen to be zero included. Its dtype is the parameter's, or
      float32 for float64 unless jax has 64-bit types enabled.

    Raises:
      ValueError: other shapes, or a pruned weight that is not zero.
    """
    x, chosen = _checked(param, mask)
    indices = np.argwhere(chosen).astype(np.int32)
    return sparse.BCOO(
        (jax.numpy.asarray(x[chosen]), jax.numpy.asarray(indices)),
        shape=x.shape,
        indices_sorted=True,
        unique_indices=True,
    )


def to_bcsr(param: ArrayLike, mask: ArrayLike) -> sparse.BCSR:
    """The active weights of a matrix, by rows, for `jax.experimental.sparse`.

    See `to_bcoo`; `param` has two dimensions.
    """
    values, columns, starts, shape = _rows(param, mask)
    put = jax.numpy.asarray
    return sparse.BCSR(
        (put(values), put(columns), put(starts)),
        shape=shape,
        indices_sorted=True,
        unique_indices=True,
    )


def to_csr(param: ArrayLike, mask: ArrayLike) -> "scipy.sparse.csr_array":
    """The active weights of a matrix, by rows, for SciPy.

    See `to_bcoo`; `param` has two dimensions and keeps its dtype.

    Raises:
      ImportError: scipy is missing.
      TypeError: a dtype that SciPy's sparse arrays have not: float16, bfloat16.
    """
    scipy_sparse = _import("scipy.sparse")
    values, columns, starts, shape = _rows(param, mask)
    if values.dtype.name not in ("float32", "float64"):
        raise TypeError(
            f"param has dtype {values.dtype}, which SciPy's sparse arrays have not: "
            "convert it with .astype(np.float32)."
        )
    return scipy_sparse.csr_array((values, columns, starts), shape=shape)


def _rows(
    param: ArrayLike, mask: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int]]:
    """Active weights, their columns, and where each row starts."""
    x, chosen = _checked(param, mask)
    if x.ndim != 2:
        raise ValueError(
            f"param must have two dimensions, got shape {x.shape}: reshape it and its "
            "mask, or use to_bcoo."
        )
    columns = np.nonzero(chosen)[1].astype(np.int32)
    starts = np.zeros(x.shape[0] + 1, np.int32)
    np.cumsum(chosen.sum(axis=1), out=starts[1:])
    return x[chosen], columns, starts, x.shape


def _checked(param: ArrayLike, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    check_concrete("mask", mask)
    check_concrete("param", param)
    x = np.asarray(param)
    if not jax.numpy.issubdtype(x.dtype, jax.numpy.floating):
        raise TypeError(f"param must be a floating array, got {param!r}.")
    if mask is None or is_masked_node(mask):
        raise ValueError(f"mask must be one, and this leaf has no mask, got {mask!r}.")
    if not (is_packed(mask) or hasattr(mask, "dtype")):
        mask = np.asarray(mask)
    chosen = jax.device_get(given_masks({"mask": mask}))["mask"]
    if chosen.shape != x.shape:
        raise ValueError(
            f"mask must have the shape of param, {x.shape}, got {chosen.shape}."
        )
    _active_values("param", x, chosen)
    return x, chosen


def _active_values(name: str, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    # By bytes, since -0.0 equals 0.0 and would not come back.
    lost = np.count_nonzero(
        x[~mask].view(np.uint8).reshape(-1, x.dtype.itemsize).any(axis=1)
    )
    if lost:
        raise ValueError(
            f"{name!r} has {lost} pruned weights that are not exactly 0.0, which would "
            "be lost: use granet_jax.apply_masks(params, masks), or, for a method that "
            "keeps its weights dense, granet_jax.sparse_view(params, opt_state)."
        )
    return x[mask]


def _host_array(name: str, leaf: Any) -> np.ndarray:
    if not hasattr(leaf, "dtype"):
        raise TypeError(f"params must hold arrays, got {leaf!r} at {name!r}.")
    if leaf.dtype not in _DTYPES.values():
        raise TypeError(
            f"params has dtype {leaf.dtype} at {name!r}, which safetensors has not: "
            "convert it."
        )
    return np.asarray(jax.device_get(leaf), order="C")


def _values(name: str) -> str:
    return f"{name}.values"


def _mask(name: str) -> str:
    return f"{name}.mask"


# The code of a mask.


def _low_bits(size: int, marked: int) -> int:
    """How many bits of each gap between `marked` weights are stored as they are.

    floor(1 + log2(log(phi - 1) / log(1 - density))), of at least 0, with phi the golden
    ratio (Kiely, equation 8), is the best for gaps of a geometric distribution. Here in
    integers, alike on every machine, by log(phi - 1) = -0.481 and
    log(1 - density) = -1 / (1 / density - 1/2), to second order.
    """
    if marked == 0:
        return 0
    return (481 * (2 * size - marked) // (2000 * marked)).bit_length()


def _encode(mask: np.ndarray) -> np.ndarray:
    """Bytes of a mask of one dimension."""
    rarer = ~mask if 2 * np.count_nonzero(mask) > mask.size else mask
    gaps = np.diff(np.flatnonzero(rarer), prepend=-1) - 1
    if gaps.size == 0:
        return np.zeros(0, np.uint8)
    width = _low_bits(mask.size, gaps.size)
    low = (gaps[:, None] >> np.arange(width)[::-1]) & 1
    ends = np.cumsum((gaps >> width) + 1) - 1
    high = np.zeros(ends[-1] + 1, np.uint8)
    high[ends] = 1
    return np.packbits(np.concatenate([low.astype(np.uint8).reshape(-1), high]))


def _decode(code: np.ndarray, size: int, active: int) -> np.ndarray:
    """The mask of `size` weights, `active` of them True, of its bytes."""
    inverted = 2 * active > size
    marked = size - active if inverted else active
    width = _low_bits(size, marked)
    bits = np.unpackbits(code)
    low, high = bits[: marked * width], bits[marked * width :]
    ends = np.flatnonzero(high)
    used = low.size + (int(ends[-1]) + 1 if ends.size else 0)
    counts_agree = ends.size == marked >= 0 and low.size == marked * width
    if not counts_agree or code.size != -(-used // 8):
        raise ValueError(f"a mask does not have the {active} active weights stored")
    gaps = np.diff(ends, prepend=-1) - 1
    # Checked before the shift, which could overflow.
    if int(gaps.sum()) << width > size:
        raise ValueError(f"a mask has more than its {size} weights")
    for bit in low.reshape(marked, width).T:
        gaps = 2 * gaps + bit
    positions = np.cumsum(gaps + 1) - 1
    if marked and positions[-1] >= size:
        raise ValueError(f"a mask has more than its {size} weights")
    mask = np.full(size, inverted)
    mask[positions] = not inverted
    return mask


def _path(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be that of a file, got {path!r}.")
    return Path(path)


# Reading a file, which may be anything.


def _read(path: str | os.PathLike[str]) -> tuple[_Header, dict[str, np.ndarray]]:
    """Header and arrays of a file."""
    safetensors = _import("safetensors")
    content = _path(path).read_bytes()
    with _understood(path):
        try:
            stored = safetensors.deserialize(content)
        except safetensors.SafetensorError as error:
            raise ValueError(str(error)) from error
        # It has checked the lengths; but what else the header says it keeps to itself.
        length = int.from_bytes(content[:8], "little")
        about = json.loads(content[8 : 8 + length]).get("__metadata__", {})
        content = json.loads(about[_KEY])
        version = content.pop("version")
    if version not in (1, VERSION):
        raise ValueError(
            f"{path} has version {version!r} of the format, and this version of "
            f"granet_jax reads versions 1 and {VERSION}: use the one that wrote it."
        )
    with _understood(path):
        expected = None if version == 1 else content.pop("sha256")
        header = _Header(**content)
        tensors = {
            name: np.frombuffer(x["data"], _DTYPES[x["dtype"]]).reshape(x["shape"])
            for name, x in stored
        }
        for name, shape in header.shapes.items():
            if not all(type(n) is int and n >= 0 for n in shape):
                raise ValueError(f"{name!r} has shape {shape}")
        if expected is not None:
            found = _digest({"version": version, **content}, tensors)
            if found != expected:
                raise ValueError("its contents have another SHA-256 than it states")
    return header, tensors


def _digest(about: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of all that a file says, however it is laid out.

    Safetensors checks lengths alone: a flipped bit would be another weight.
    """
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(json.dumps([name, x.dtype.name, x.shape]).encode())
        digest.update(np.ascontiguousarray(x).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


# What taking apart JSON and arrays of any other form than ours can raise.
_MALFORMED = (
    LookupError,
    TypeError,
    AttributeError,
    ValueError,
    OverflowError,
    RecursionError,
)


@contextlib.contextmanager
def _understood(path: str | os.PathLike[str]) -> Generator[None]:
    """Has any error of a file's content say which file it is, and what to do."""
    try:
        yield
    except _MALFORMED as error:
        if isinstance(error, _UnlikeError):
            raise
        raise ValueError(
            f"{path} is no file of granet_jax.export, or it is damaged "
            f"({type(error).__name__}: {error}): save it again, or copy it anew."
        ) from error


class _UnlikeError(ValueError):
    """The file is in order, and `like` is another tree."""


def _leaf(
    name: str, header: _Header, tensors: dict[str, np.ndarray]
) -> tuple[np.ndarray, Any]:
    """A leaf, dense, and its mask."""
    shape = header.shapes.get(name)
    if shape is None:
        return tensors[name], optax.MaskedNode()
    values, code = tensors[_values(name)], tensors[_mask(name)]
    if values.ndim != 1 or code.ndim != 1 or code.dtype != np.uint8:
        raise ValueError(f"{name!r} has arrays of another form")
    mask = _decode(code, math.prod(shape), values.size)
    x = np.zeros(mask.size, values.dtype)
    x[mask] = values
    return x.reshape(shape), mask.reshape(shape)


def _stored_as(header: _Header, names: Sequence[str]) -> set[str]:
    """Names of the arrays of leaves."""
    masked = [name for name in names if name in header.shapes]
    dense = [name for name in names if name not in header.shapes]
    return {*dense, *map(_values, masked), *map(_mask, masked)}


def _check_names(
    header: _Header, tensors: dict[str, np.ndarray], names: Sequence[str]
) -> None:
    if different := _stored_as(header, names) ^ tensors.keys():
        raise ValueError(f"header and arrays disagree on {sorted(different)[:4]}")


def _check_like(
    path: str | os.PathLike[str],
    header: _Header,
    tensors: dict[str, np.ndarray],
    wanted: dict[str, Any],
) -> None:
    """Raises an error unless the file has the leaves that are wanted."""
    shapes = header.shapes
    parts = {_values(name) for name in shapes} | {_mask(name) for name in shapes}
    names = {*shapes, *(tensors.keys() - parts)}
    missing, left = sorted(wanted.keys() - names), sorted(names - wanted.keys())
    if missing or left:
        raise _UnlikeError(
            f"like has leaves that {path} has not: {missing[:4]}; and {path} has "
            f"others that like has not: {left[:4]}. Pass the structure that was saved."
        )
    _check_names(header, tensors, list(names))
    for name, leaf in wanted.items():
        array = tensors[_values(name) if name in shapes else name]
        form = (tuple(shapes.get(name, array.shape)), array.dtype)
        if form != (tuple(leaf.shape), leaf.dtype):
            raise _UnlikeError(
                f"like has shape {tuple(leaf.shape)} and dtype {leaf.dtype} at "
                f"{name!r}, where {path} has {form[0]} and {form[1]}. Pass what was "
                "saved."
            )


def _are_nested_dicts(paths: dict[str, list[Any]], treedef: Any) -> bool:
    """Whether a tree is what `_nested` makes of the paths of its leaves."""
    if not all(path and all(type(k) is str for k in path) for path in paths.values()):
        return False
    return jax.tree.structure(_nested(dict.fromkeys(paths, 0), paths)) == treedef


def _nested(leaves: dict[str, Any], paths: dict[str, list[str]]) -> PyTree:
    """Nested dicts of leaves, each of which has the keys of its path."""
    tree: dict[str, Any] = {}
    for name, path in paths.items():
        inner = tree
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        if path[-1] in inner:
            raise ValueError(f"{name!r} is both a leaf and a branch")
        inner[path[-1]] = leaves[name]
    return tree


def _import(name: str) -> types.ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"granet_jax.export needs {name.partition('.')[0]}: pip install "
            "'granet_jax[export]'."
        ) from error
