"""Sparse parameters on disk: exact, compact, and safe to read."""

import json
import math
import os
import pathlib
import pickle
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy

import granet_jax
from granet_jax import export
from tests.export.helpers import DENSE, example, random_mask
from tests.helpers.trees import Layer, assert_same, parameters

FLOATS = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")
OTHERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
W, MASK = np.eye(4, dtype=np.float32), np.eye(4, dtype=bool)


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "net.safetensors"


def random_bits(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> np.ndarray:
    """Values with every bit random: NaNs with payloads, subnormals, negative zeros."""
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    content = np.random.default_rng(seed).bytes(size)
    return np.frombuffer(content, jnp.dtype(dtype)).reshape(shape).copy()


def shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


# --- Saving and loading.


@pytest.mark.parametrize("shape", [(40, 7), (3, 1, 5, 2), (1, 1), (0, 4)])
@pytest.mark.parametrize("dtype", [*FLOATS, "int8"])
def test_every_bit_of_sparse_leaves_returns(path: Any, dtype: str, shape: Any):
    params, masks = {}, {}
    for i, density in enumerate([0.0, 0.02, 0.5, 1.0]):
        masks[f"w{i}"] = mask = random_mask(shape, density, seed=i)
        params[f"w{i}"] = x = random_bits(shape, dtype, seed=i)
        x[~mask] = np.zeros((), x.dtype)
    export.save(path, params, masks)
    assert_same(export.load(path), (params, masks))
    assert_same(export.load(path, like=shapes_of(params)), (params, masks))


def test_every_bit_of_dense_leaves_returns(path: Any):
    names = (*OTHERS, *FLOATS, "complex64")
    params: dict[str, Any] = {name: random_bits((3, 2), name) for name in names}
    params["bool"] = np.array([True, False])
    params["scalar"] = np.float32(3.0)
    params["transposed"] = np.arange(6.0, dtype=np.float32).reshape(2, 3).T
    masks = dict.fromkeys(params, DENSE)
    # Names with slashes, dots and other characters.
    params |= {"mlp/~/linear.0": {"w": W, "w.b": W[0]}, "": {"é\n": W}}
    masks |= {"mlp/~/linear.0": {"w": MASK, "w.b": DENSE}, "": {"é\n": MASK}}
    export.save(path, params, masks)
    assert_same(export.load(path), (params, masks))


@pytest.mark.parametrize(
    ("params", "masks"),
    [
        ([W, {"a": W[0]}], [MASK, {"a": DENSE}]),
        ({"a": Layer(kernel=W, bias=W[0])}, {"a": Layer(kernel=MASK, bias=DENSE)}),
        ({"a": W, "gone": {}, "none": None}, {"a": MASK, "gone": {}, "none": None}),
        ({1: W}, {1: MASK}),
        (W, MASK),
    ],
)
def test_structures_other_than_nested_dicts_need_like(
    path: Any, params: Any, masks: Any
):
    export.save(path, params, masks)
    assert_same(export.load(path, like=shapes_of(params)), (params, masks))
    with pytest.raises(ValueError, match="as `like`"):
        export.load(path)


def test_loaded_masks_and_parameters_continue_a_training(path: Any):
    params = parameters()
    tx = granet_jax.transform(granet_jax.static(0.75), optax.adam(0.1))
    state = tx.init(params)
    sparse, masks = granet_jax.sparse_view(params, state), granet_jax.get_masks(state)
    export.save(path, sparse, masks, metadata={"steps": [1, 2]})
    assert export.read_metadata(path) == {"steps": [1, 2]}
    assert_same(export.load(path), (sparse, masks))
    again = granet_jax.transform(
        granet_jax.static(0.0), optax.adam(0.1), masks=export.load(path)[1]
    )
    assert_same(granet_jax.get_masks(again.init(sparse)), masks)


def test_the_file_is_plain_safetensors_and_the_same_for_sharded_arrays(path: Any):
    mesh = jax.make_mesh((8,), ("x",))
    mask = {"w": random_mask((16, 4), 0.3), "bias": DENSE}
    params = {"w": mask["w"].astype(np.float32), "bias": np.ones(8, np.float32)}
    export.save(path, params, mask, metadata={"b": 1, "a": 2})
    content = path.read_bytes()
    placed = jax.device_put((params, mask), jax.NamedSharding(mesh, jax.P("x")))
    export.save(path, *placed, metadata={"b": 1, "a": 2})
    assert path.read_bytes() == content
    tensors, header = parts(path)
    assert sorted(tensors) == ["bias", "w.mask", "w.values"]
    assert header["version"] == export.VERSION
    assert len(header["sha256"]) == 64
    np.testing.assert_array_equal(tensors["w.values"], params["w"][mask["w"]])
    np.testing.assert_array_equal(tensors["bias"], params["bias"])


def test_the_old_file_stays_until_the_new_one_is_complete(
    path: Any, monkeypatch: pytest.MonkeyPatch
):
    params, masks = example()
    export.save(path, params, masks, metadata={"run": 1})

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            export.save(path, params, masks, metadata={"run": 2})
    assert list(path.parent.iterdir()) == [path]
    assert export.read_metadata(path) == {"run": 1}
    export.save(path, params, masks)
    assert export.read_metadata(path) is None
    assert list(path.parent.iterdir()) == [path]


# --- Arguments that are refused.


@pytest.mark.parametrize("lost", [np.nan, -0.0])
def test_pruned_weights_must_be_zero(path: Any, lost: float):
    params = {"w": W.copy()}
    params["w"][0, 1] = lost
    with pytest.raises(ValueError, match=r"'w' has 1 pruned.*apply_masks.*view"):
        export.save(path, params, {"w": MASK})
    assert not path.exists()
    export.save(path, granet_jax.apply_masks(params, {"w": MASK}), {"w": MASK})


@pytest.mark.parametrize(
    ("params", "masks", "error", "match"),
    [
        *(
            ({"w": W, "x": x}, {"w": MASK, "x": None}, TypeError, f"{x.dtype} at 'x'")
            for x in (np.ones(2, np.complex128), jnp.ones(2, jnp.int4))
        ),
        *(
            ({"a/b": W, "a": {"b": W}}, {"a/b": m, "a": {"b": MASK}}, ValueError, "two")
            for m in (MASK, None)
        ),
        ({"a": W, "a.mask": W}, {"a": MASK, "a.mask": None}, ValueError, "two leaves"),
    ],
)
def test_trees_that_cannot_be_stored(path, params, masks, error, match):
    with pytest.raises(error, match=match):
        export.save(path, params, masks)
    assert not path.exists()


def test_like_must_be_the_tree_that_was_saved(path: Any):
    params, masks = example()
    export.save(path, params, masks)
    like = shapes_of(params)
    others = {"bias": ((8,), jnp.bfloat16), "kernel": ((8, 6), jnp.float32)}
    for name, form in others.items():
        wrong = {**like["dense"], name: jax.ShapeDtypeStruct(*form)}
        with pytest.raises(ValueError, match=f"dense/{name}"):
            export.load(path, like=like | {"dense": wrong})
    with pytest.raises(ValueError, match=r"has others that.*\['conv/kernel'\]"):
        export.load(path, like={"dense": like["dense"]})
    with pytest.raises(ValueError, match=r"like has leaves.*\['more'\]"):
        export.load(path, like=like | {"more": like["dense"]["bias"]})


# --- Files that are damaged, or written by something else.


def parts(path: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with safetensors.safe_open(path, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["granet_jax"])


def test_damaged_files_are_refused(path: Any):
    params, masks = example()
    export.save(path, params, masks)
    content, (tensors, header) = path.read_bytes(), parts(path)
    for length in (*range(0, len(content), 7), None):
        path.write_bytes(content + b"\0" if length is None else content[:length])
        with pytest.raises(ValueError, match=r"net\.safetensors is not a file of"):
            export.load(path)

    def refuse(match: str, tensors: Any = tensors, **changes: Any) -> None:
        """Write a file whose checksum is correct, unless that is changed, too."""
        stated = {k: v for k, v in (header | changes).items() if k != "sha256"}
        checksum = export.safetensors_file._digest(stated, tensors)
        stated["sha256"] = changes.get("sha256", checksum)
        text = {"granet_jax": json.dumps(stated)}
        safetensors.numpy.save_file(tensors, path, metadata=text)
        with pytest.raises(ValueError, match=match):
            export.load(path)

    refuse("the SHA-256 that it states is not", sha256="0" * 64)
    for version in (1, 3):
        refuse(f"version {version} of the format", version=version)
    shapes, paths = header["shapes"], header["paths"]
    refuse("damaged", shapes={"dense/kernel": [6, 8]})
    for shape in ([-6, -8], ["6", 8]):
        refuse("damaged", shapes=shapes | {"dense/kernel": shape})
    refuse("more than its 1 weights|active", shapes=shapes | {"dense/kernel": [1, 1]})
    refuse("damaged", paths={})
    refuse("damaged", paths=paths | {"dense/bias": ["dense"]})
    refuse("damaged", tensors | {"more": np.zeros(2)})
    values, code = tensors["dense/kernel.values"], tensors["dense/kernel.mask"]
    for wrong in (values[1:], values[:0], np.append(values, values)):
        refuse("active weights stored", tensors | {"dense/kernel.values": wrong})
    for wrong in (code[:-1], np.append(code, np.uint8(0))):
        refuse("active weights stored", tensors | {"dense/kernel.mask": wrong})
    later = np.append(np.zeros(8, np.uint8), code)
    for wrong in (code.astype(np.int32), later):
        refuse("damaged", tensors | {"dense/kernel.mask": wrong})
    for metadata in (None, {"granet_jax": "[" * 100_000}):
        safetensors.numpy.save_file(tensors, path, metadata=metadata)
        with pytest.raises(ValueError, match="is not a file of granet_jax"):
            export.read_metadata(path)


def test_a_wrong_byte_is_found_or_has_no_consequence(path: Any):
    params, masks = example()
    export.save(path, params, masks)
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(len(content)):
        changed = content.copy()
        changed[i] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        for like in (None, shapes_of(params)):
            try:
                assert_same(export.load(path, like=like), (params, masks))
            except ValueError:
                refused += 1
    assert refused > len(content)


class Executed:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_a_wrong_file_cannot_execute_code(path: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(path.parent)
    pickled = pickle.dumps(Executed())
    path.write_bytes(pickled)
    with pytest.raises(ValueError, match="is not a file of granet_jax"):
        export.load(path)
    assert not (path.parent / "executed").exists()
    pickle.loads(pickled)
    assert (path.parent / "executed").exists()  # The test could have failed.


def test_missing_packages_are_named(path: Any, monkeypatch: pytest.MonkeyPatch):
    for name in ("safetensors", "safetensors.numpy", "scipy.sparse"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (
        lambda: export.save(path, {"w": W}, {"w": MASK}),
        lambda: export.load(path),
        lambda: export.to_csr(W, MASK),
    ):
        with pytest.raises(ImportError, match=r"pip install 'granet_jax\[export\]'"):
            call()
