"""Sparse parameters on disk and in sparse formats: exact, compact, and safe to read."""

import json
import math
import os
import pathlib
import pickle
import subprocess
import sys
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy
import scipy.sparse
from hypothesis import strategies as st

import granet_jax
from granet_jax import export, mask_sources
from granet_jax.export import mask_code
from tests.helpers.trees import Layer, assert_same, parameters

DENSE = optax.MaskedNode()


def random_mask(shape: tuple[int, ...], density: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < density


def random_bits(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> np.ndarray:
    """Every bit at random: NaNs with payloads, subnormals, negative zeros."""
    dtype = jnp.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    content = np.random.default_rng(seed).bytes(size)
    return np.frombuffer(content, dtype).reshape(shape).copy()


def masked(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    x = x.copy()
    x[~mask] = np.zeros((), x.dtype)
    return x


def example() -> tuple[Any, Any]:
    """Nested dicts, with weights that are active and zero."""
    masks = {
        "conv": {"kernel": random_mask((3, 3, 2, 4), 0.3, 1)},
        "dense": {"bias": DENSE, "kernel": random_mask((6, 8), 0.1, 2)},
    }
    params = jax.tree.map(np.asarray, parameters())
    params = jax.device_get(granet_jax.apply_masks(params, masks))
    first = tuple(np.argwhere(masks["dense"]["kernel"])[0])
    params["dense"]["kernel"] = params["dense"]["kernel"].copy()
    params["dense"]["kernel"][first] = 0.0
    return params, masks


def shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


# The code of a mask.


def decoded(code: np.ndarray, size: int, active: int) -> list[bool]:
    """The mask of its bytes, read bit by bit as the module's docstring says."""
    if 2 * active > size:
        return [not bit for bit in decoded(code, size, size - active)]
    bits = [byte >> (7 - i) & 1 for byte in code.tolist() for i in range(8)]
    width = 0
    if active:
        golden = (1 + math.sqrt(5)) / 2
        # The logarithm of 1 - density to the order that the format uses.
        ratio = -math.log(golden - 1) * (size / active - 0.5)
        width = max(0, math.floor(1 + math.log2(ratio)))
    low = [bits[i * width : (i + 1) * width] for i in range(active)]
    place = active * width
    mask: list[bool] = []
    for digits in low:
        gap = 0
        while not bits[place]:
            gap += 2**width
            place += 1
        place += 1
        gap += sum(bit << i for i, bit in enumerate(reversed(digits)))
        mask += [False] * gap + [True]
    assert len(bits) - place < 8
    assert not any(bits[place:])
    return mask + [False] * (size - len(mask))


@hypothesis.given(
    size=st.integers(0, 300),
    density=st.sampled_from([0.0, 0.003, 0.02, 0.1, 0.3, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
def test_a_mask_is_read_as_it_was_written(size: int, density: float, seed: int):
    mask = random_mask((size,), density, seed)
    active = int(mask.sum())
    code = mask_code.encode(mask)
    np.testing.assert_array_equal(mask_code.decode(code, size, active), mask)
    assert decoded(code, size, active) == mask.tolist()


def test_mask_by_hand():
    # Gaps 0, 7, 13 at k = 3: low bits 000 111 101, then ones after 0, 0, 1 zeros.
    mask = np.zeros(30, bool)
    mask[[0, 8, 22]] = True
    assert mask_code.low_bits(30, 3) == 3
    expected = np.packbits([0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 1])
    np.testing.assert_array_equal(mask_code.encode(mask), expected)


def test_at_half_it_is_the_bit_mask():
    mask = np.random.default_rng(0).permuted(np.arange(64 * 30) % 2 == 0)
    mask = np.concatenate([mask, [False, True]]).reshape(2, -1)
    np.testing.assert_array_equal(mask_code.encode(mask.reshape(-1)), np.packbits(mask))


# There and back.


@pytest.mark.parametrize("shape", [(40, 7), (3, 1, 5, 2), (1, 1), (0, 4)])
@pytest.mark.parametrize(
    "dtype",
    ["float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2"],
)
def test_every_bit_comes_back(tmp_path: pathlib.Path, dtype: str, shape: Any):
    params, masks = {}, {}
    for i, density in enumerate([0.0, 0.02, 0.5, 1.0]):
        name = f"w{i}"
        masks[name] = random_mask(shape, density, seed=i)
        params[name] = masked(random_bits(shape, dtype, seed=i), masks[name])
    path = tmp_path / "net.safetensors"
    export.save(path, params, masks)
    loaded, loaded_masks = export.load(path)
    assert_same(loaded, params)
    assert_same(loaded_masks, masks)
    assert_same(export.load(path, like=shapes_of(params))[0], params)


def test_dense_leaves_of_every_type_come_back(tmp_path: pathlib.Path):
    names = "int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 bfloat16 "
    names += "float32 float64 complex64 float8_e4m3fn float8_e5m2"
    params: dict[str, Any] = {name: random_bits((3, 2), name) for name in names.split()}
    params["bool"] = np.array([True, False])
    params["scalar"] = np.float32(3.0)
    params["transposed"] = np.arange(6.0, dtype=np.float32).reshape(2, 3).T
    params["w"] = np.eye(3, dtype=np.float32)
    masks = dict.fromkeys(params) | {"w": np.eye(3, dtype=bool)}
    path = tmp_path / "net.safetensors"
    export.save(path, params, masks)
    loaded, loaded_masks = export.load(path)
    assert_same(loaded, params)
    expected = dict.fromkeys(params, DENSE) | {"w": masks["w"]}
    assert_same(loaded_masks, expected)


def test_names_with_slashes_and_dots(tmp_path: pathlib.Path):
    w = np.ones((2, 2), np.float32)
    params = {"mlp/~/linear.0": {"w": w, "w.b": w[0]}, "": {"é\n": 2 * w}}
    masks = {
        "mlp/~/linear.0": {"w": w > 0, "w.b": None},
        "": {"é\n": w > 0},
    }
    path = tmp_path / "net.safetensors"
    export.save(path, params, masks)
    assert_same(export.load(path)[0], params)


def test_other_structures_need_like(tmp_path: pathlib.Path):
    mask = random_mask((4, 6), 0.4)
    w = masked(np.ones((4, 6), np.float32), mask)
    trees = [
        ([w, {"a": w[0]}], [mask, {"a": DENSE}]),
        ({"a": Layer(kernel=w, bias=w[0])}, {"a": Layer(kernel=mask, bias=DENSE)}),
        ({"a": w, "gone": {}, "none": None}, {"a": mask, "gone": {}, "none": None}),
        ({1: w}, {1: mask}),
        (w, mask),
    ]
    for i, (params, masks) in enumerate(trees):
        path = tmp_path / f"{i}.safetensors"
        export.save(path, params, masks)
        with pytest.raises(ValueError, match="as `like`"):
            export.load(path)
        loaded, loaded_masks = export.load(path, like=shapes_of(params))
        assert_same(loaded, params)
        assert_same(loaded_masks, masks)


def test_what_is_loaded_trains_on(tmp_path: pathlib.Path):
    tx = granet_jax.transform(granet_jax.static(0.75), optax.adam(0.1))
    params = parameters()
    state = tx.init(params)
    sparse = granet_jax.sparse_view(params, state)
    path = tmp_path / "net.safetensors"
    export.save(path, sparse, granet_jax.get_masks(state), metadata={"steps": [1, 2]})
    assert export.read_metadata(path) == {"steps": [1, 2]}
    loaded, masks = export.load(path)
    again = granet_jax.transform(granet_jax.static(0.0), optax.adam(0.1), masks=masks)
    assert_same(granet_jax.get_masks(again.init(loaded)), granet_jax.get_masks(state))
    assert_same(loaded, sparse)


def test_sharded_parameters_give_the_same_file(tmp_path: pathlib.Path):
    mesh = jax.make_mesh((8,), ("x",))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    mask = random_mask((16, 4), 0.3)
    params = {"w": masked(np.ones((16, 4), np.float32), mask)}
    export.save(tmp_path / "a", params, {"w": mask}, metadata={"b": 1, "a": 2})
    placed = jax.device_put((params, {"w": mask}), sharding)
    export.save(tmp_path / "b", *placed, metadata={"b": 1, "a": 2})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# Size.


@pytest.mark.parametrize(
    "sparsity", [0.01, 0.05, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99]
)
def test_size_is_near_the_entropy(tmp_path: pathlib.Path, sparsity: float):
    rng = np.random.default_rng(0)
    params = {
        "a": rng.standard_normal((400, 300)).astype(np.float32),
        "b": rng.standard_normal((300, 100)).astype(np.float32),
    }
    masks = mask_sources.magnitude(params, sparsity, scope="global")
    params = jax.device_get(granet_jax.apply_masks(params, masks))
    path = tmp_path / "net.safetensors"
    export.save(path, params, masks)
    active, total = granet_jax.sparsity(masks).active, 150_000
    header = 600  # bytes; names and shapes
    bound = export.mask_entropy(masks) / 8
    assert 4 * active + 0.99 * bound < path.stat().st_size
    assert path.stat().st_size < 4 * active + 1.03 * bound + header
    # Half the weights take a bit each; 2% of them a seventh of one.
    density = active / total
    entropy = -density * math.log2(density)
    entropy -= (1 - density) * math.log2(1 - density)
    assert bound <= total * entropy / 8 * (1 + 1e-9)  # equal densities are the most
    assert bound > 0.99 * total * entropy / 8


def test_entropy_by_hand():
    masks = {"a": np.array([1, 0, 0, 0], bool), "b": np.ones(5, bool), "c": DENSE}
    expected = math.log2(4) + 3 * math.log2(4 / 3)
    assert export.mask_entropy(masks) == pytest.approx(expected, rel=1e-12)


# What is refused.


def test_pruned_weights_must_be_zero(tmp_path: pathlib.Path):
    path = tmp_path / "net.safetensors"
    mask = {"w": np.eye(3, dtype=bool)}
    for lost in (1.0, np.nan, -0.0):
        params = {"w": np.eye(3, dtype=np.float32)}
        params["w"][0, 1] = lost
        with pytest.raises(ValueError, match=r"'w' has 1 pruned.*apply_masks.*view"):
            export.save(path, params, mask)
    assert not list(tmp_path.iterdir())
    export.save(path, granet_jax.apply_masks(params, mask), mask)


def test_leaves_that_cannot_be_stored(tmp_path: pathlib.Path):
    path = tmp_path / "net.safetensors"
    w, mask = np.ones((2, 2), np.float32), np.ones((2, 2), bool)
    for other, error, match in [
        (1.5, TypeError, "arrays, got 1.5 at 'x'"),
        (np.ones(2, np.complex128), TypeError, "complex128 at 'x'"),
        (jax.random.key(0), TypeError, "at 'x'"),
        (jnp.ones(2, jnp.int4), TypeError, "int4 at 'x'"),
    ]:
        with pytest.raises(error, match=match):
            export.save(path, {"w": w, "x": other}, {"w": mask, "x": None})
    with pytest.raises(ValueError, match="structure of params"):
        export.save(path, {"w": w}, {"v": mask})
    with pytest.raises(ValueError, match="two leaves"):
        export.save(path, {"a/b": w, "a": {"b": w}}, {"a/b": mask, "a": {"b": mask}})
    with pytest.raises(ValueError, match="two leaves"):
        export.save(path, {"a": w, "a.mask": w}, {"a": mask, "a.mask": None})
    with pytest.raises(TypeError, match="metadata"):
        export.save(path, {"w": w}, {"w": mask}, metadata={"w": w})
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        export.save(tmp_path / "none" / "net", {"w": w}, {"w": mask})


def test_like_must_be_what_was_saved(tmp_path: pathlib.Path):
    params, masks = example()
    path = tmp_path / "net.safetensors"
    export.save(path, params, masks)
    like = shapes_of(params)
    short = {"dense": like["dense"]}
    with pytest.raises(ValueError, match=r"has others that.*\['conv/kernel'\]"):
        export.load(path, like=short)
    with pytest.raises(ValueError, match=r"like has leaves.*\['more'\]"):
        export.load(path, like=like | {"more": jax.ShapeDtypeStruct((), jnp.int32)})
    for name, other in [
        ("kernel", jax.ShapeDtypeStruct((8, 6), jnp.float32)),
        ("bias", jax.ShapeDtypeStruct((8,), jnp.bfloat16)),
    ]:
        wrong = like | {"dense": like["dense"] | {name: other}}
        with pytest.raises(ValueError, match=f"dense/{name}"):
            export.load(path, like=wrong)


# Files that are damaged, or another's.


def parts(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with safetensors.safe_open(path, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["granet_jax"])


def write(path: pathlib.Path, tensors: dict[str, np.ndarray], header: Any) -> None:
    about = {"granet_jax": json.dumps(header)}
    safetensors.numpy.save_file(tensors, path, metadata=about)


@pytest.mark.parametrize("beyond", [8, 9])
def test_codes_that_reach_beyond_their_mask_are_refused(beyond: int):
    """Four of 16 weights: a bit of each gap as it is, and the rest in unary."""
    as_they_are, unary = [0, 0, 0, 0], [0] * beyond + [1, 1, 1, 1]
    code = np.packbits(np.asarray(as_they_are + unary, np.uint8))
    with pytest.raises(ValueError, match="a mask has more than its 16 weights"):
        mask_code.decode(code, 16, 4)


def test_a_file_is_plain_safetensors(tmp_path: pathlib.Path):
    params, masks = example()
    path = tmp_path / "net.safetensors"
    export.save(path, params, masks)
    tensors, header = parts(path)
    names = ["conv/kernel.mask", "conv/kernel.values", "dense/bias"]
    names += ["dense/kernel.mask", "dense/kernel.values"]
    assert sorted(tensors) == names
    assert header["version"] == export.VERSION == 2
    assert len(header["sha256"]) == 64
    kernel, mask = params["dense"]["kernel"], masks["dense"]["kernel"]
    np.testing.assert_array_equal(tensors["dense/kernel.values"], kernel[mask])
    np.testing.assert_array_equal(tensors["dense/bias"], params["dense"]["bias"])


def test_damaged_files_are_refused(tmp_path: pathlib.Path):
    params, masks = example()
    good, bad = tmp_path / "good", tmp_path / "bad"
    export.save(good, params, masks)
    content = good.read_bytes()
    for length in range(0, len(content), 7):
        bad.write_bytes(content[:length])
        with pytest.raises(ValueError, match="bad is no file of"):
            export.load(bad)
    bad.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="damaged"):
        export.load(bad)
    tensors, header = parts(good)
    write(bad, tensors | {"dense/bias": tensors["dense/bias"] + 1}, header)
    with pytest.raises(ValueError, match="another SHA-256"):
        export.load(bad)
    # Consistent otherwise, and without a sum to tell, as files of version 1 are.
    del header["sha256"]
    write(bad, tensors, header)
    with pytest.raises(ValueError, match="sha256"):
        export.load(bad)
    header["version"] = 1
    write(bad, tensors, header)
    assert_same(export.load(bad), export.load(good))

    def refused(match: str, **changes: Any) -> None:
        write(bad, tensors | changes.pop("tensors", {}), header | changes)
        with pytest.raises(ValueError, match=match):
            export.load(bad)

    refused("version 3 of the format", version=3)
    refused("damaged", shapes={"dense/kernel": [6, 8]})
    refused("damaged", shapes=header["shapes"] | {"dense/kernel": [-6, -8]})
    refused("damaged", shapes=header["shapes"] | {"dense/kernel": ["6", 8]})
    refused(
        "more than its 1 weights|active",
        shapes=header["shapes"] | {"dense/kernel": [1, 1]},
    )
    refused("damaged", paths={})
    refused("damaged", paths=header["paths"] | {"dense/bias": ["dense"]})
    refused("damaged", tensors={"more": np.zeros(2)})
    values, code = tensors["dense/kernel.values"], tensors["dense/kernel.mask"]
    refused("active weights stored", tensors={"dense/kernel.values": values[1:]})
    refused("active weights stored", tensors={"dense/kernel.values": values[:0]})
    longer = np.append(values, values)
    refused("active weights stored", tensors={"dense/kernel.values": longer})
    refused("active weights stored", tensors={"dense/kernel.mask": code[:-1]})
    padded = np.append(code, np.uint8(0))
    refused("active weights stored", tensors={"dense/kernel.mask": padded})
    refused("damaged", tensors={"dense/kernel.mask": code.astype(np.int32)})
    later = np.append(np.zeros(8, np.uint8), code)
    refused("damaged", tensors={"dense/kernel.mask": later})
    safetensors.numpy.save_file(tensors, bad)
    with pytest.raises(ValueError, match="no file of granet_jax"):
        export.load(bad)
    safetensors.numpy.save_file(tensors, bad, metadata={"granet_jax": "[" * 100_000})
    with pytest.raises(ValueError, match="no file of granet_jax"):
        export.read_metadata(bad)


def test_any_byte_that_is_wrong_is_found_or_of_no_consequence(tmp_path: pathlib.Path):
    params, masks = example()
    good, bad = tmp_path / "good", tmp_path / "bad"
    export.save(good, params, masks)
    content = bytearray(good.read_bytes())
    expected = export.load(good)
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(len(content)):
        changed = content.copy()
        changed[i] ^= int(rng.integers(1, 256))
        bad.write_bytes(changed)
        for like in (None, shapes_of(params)):
            try:
                found = export.load(bad, like=like)
            except ValueError:
                refused += 1
            else:
                assert_same(found, expected)
    assert refused > len(content)


class Executed:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_a_wrong_file_cannot_execute_code(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.safetensors"
    path.write_bytes(pickle.dumps(Executed()))
    with pytest.raises(ValueError, match="no file of granet_jax"):
        export.load(path)
    with path.open("wb") as file:
        np.save(file, np.array([Executed()], object), allow_pickle=True)
    with pytest.raises(ValueError, match="no file of granet_jax"):
        export.load(path)
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Executed()))
    assert (tmp_path / "executed").exists()  # so that the above could have failed


def test_the_old_file_stays_until_the_new_one_is_complete(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    params, masks = example()
    path = tmp_path / "net.safetensors"
    export.save(path, params, masks, metadata={"run": 1})

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            export.save(path, params, masks, metadata={"run": 2})
    assert list(tmp_path.iterdir()) == [path]
    assert export.read_metadata(path) == {"run": 1}
    export.save(path, params, masks)
    assert export.read_metadata(path) is None
    assert list(tmp_path.iterdir()) == [path]


# Sparse formats.


def test_sparse_formats_hold_the_active_weights():
    params, masks = example()
    w, mask = params["dense"]["kernel"], masks["dense"]["kernel"]
    active = int(mask.sum())
    assert np.count_nonzero(w) == active - 1  # one active weight is zero
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    bcoo, bcsr, csr = (
        f(w, mask) for f in (export.to_bcoo, export.to_bcsr, export.to_csr)
    )
    assert (bcoo.nse, bcsr.nse, csr.nnz) == (active,) * 3
    assert isinstance(csr, scipy.sparse.csr_array)
    for dense in (bcoo.todense(), bcsr.todense(), csr.todense()):
        assert_same(np.asarray(dense), w)
    np.testing.assert_allclose(
        jax.jit(lambda a, b: a @ b)(bcoo, x.T), w @ x.T, rtol=1e-5
    )
    np.testing.assert_allclose(
        jax.jit(lambda a, b: a @ b)(bcsr, x.T), w @ x.T, rtol=1e-5
    )
    np.testing.assert_allclose(csr @ x.T, w @ x.T, rtol=1e-5)


def test_sparse_formats_of_other_leaves():
    params, masks = example()
    kernel, mask = params["conv"]["kernel"], masks["conv"]["kernel"]
    half = jnp.asarray(kernel, jnp.bfloat16)
    bcoo = export.to_bcoo(half, mask)
    assert (bcoo.nse, bcoo.dtype) == (int(mask.sum()), jnp.bfloat16)
    assert_same(bcoo.todense(), half)
    for convert in (export.to_bcsr, export.to_csr):
        with pytest.raises(ValueError, match="two dimensions"):
            convert(kernel, mask)
    with pytest.raises(TypeError, match=r"bfloat16.*astype"):
        export.to_csr(half.reshape(-1, 4), mask.reshape(-1, 4))
    for convert in (export.to_bcoo, export.to_bcsr, export.to_csr):
        with pytest.raises(ValueError, match="pruned weights that are not"):
            convert(np.ones((2, 2), np.float32), np.eye(2, dtype=bool))
        with pytest.raises(ValueError, match="shape"):
            convert(np.ones((2, 2), np.float32), np.ones((2, 3), bool))
        with pytest.raises(ValueError, match="no mask"):
            convert(np.ones((2, 2), np.float32), DENSE)


# What it needs.


def test_the_library_does_without_safetensors(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    code = "import granet_jax, sys; assert 'safetensors' not in sys.modules; "
    code += "from granet_jax import export; assert 'safetensors' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    params, masks = example()
    for name in ("safetensors", "safetensors.numpy", "scipy.sparse"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (
        lambda: export.save(tmp_path / "net", params, masks),
        lambda: export.load(tmp_path / "net"),
        lambda: export.to_csr(params["dense"]["kernel"], masks["dense"]["kernel"]),
    ):
        with pytest.raises(ImportError, match=r"pip install 'granet_jax\[export\]'"):
            call()
