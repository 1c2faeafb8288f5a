"""Exact top-k against a stable NumPy sort, on inputs chosen to be hard."""

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from granet_jax import selection
from granet_jax.counting import places, sum_before
from granet_jax.keys import sort_keys
from tests.helpers import oracle

FLOATS = ("float32", "bfloat16", "float16")
# One compilation per dtype and scope: shapes are fixed, values and k vary.
# (Leaves of one shape, not all neighbours, are searched as one array.)
SHAPES = [(5, 4), (), (0, 3), (1,), (2, 3, 2), (5, 4), (), (5, 4)]
SIZES = list(map(math.prod, SHAPES))
SIZE = sum(SIZES)
# Ordinary numbers, and all that orders or rounds in its own way. The smallest
# denormal and the largest number are those of the dtype under test.
NAMED = ("nan", "-nan", "inf", "-inf", "0", "-0", "tiny", "-tiny", "max", "-max", "1")


def special(name: str, dtype: Any) -> np.ndarray:
    info = jnp.finfo(dtype)
    sign = -1.0 if name.startswith("-") else 1.0
    values = {
        "nan": np.nan,
        "inf": np.inf,
        "0": 0.0,
        "tiny": float(info.smallest_subnormal),
        "max": float(info.max),
        "1": 1.0,
    }
    return np.asarray(np.copysign(values[name.lstrip("-")], sign), np.float64)


@st.composite
def score_values(draw: Any, dtype: str, size: int) -> np.ndarray:
    """Numbers of `dtype`: from few distinct ones (many ties) to any bit pattern."""
    bits = 8 * jnp.dtype(dtype).itemsize
    few = st.sampled_from(NAMED).map(lambda name: special(name, dtype))
    grid = st.integers(-3, 3).map(lambda n: np.asarray(n / 2))
    pattern = st.integers(0, 2**bits - 1).map(
        lambda n: np.asarray(n, f"uint{bits}").view(jnp.dtype(dtype))
    )
    chosen = draw(st.sampled_from([few, grid, pattern, few | grid | pattern]))
    values = draw(st.lists(chosen, min_size=size, max_size=size))
    # Bit patterns stay as they are: a cast of a NaN may quieten it.
    out = np.zeros(size, jnp.dtype(dtype))
    for i, value in enumerate(values):
        out[i] = value if value.dtype == out.dtype else value.astype(out.dtype)
    return out


def split(flat: np.ndarray) -> list[np.ndarray]:
    parts = np.split(flat, np.cumsum(SIZES)[:-1])
    return [p.reshape(s) for p, s in zip(parts, SHAPES, strict=True)]


def check(scores: Any, candidates: Any, k: Any, scope: selection.Scope) -> None:
    found = selection.top_k(scores, k, among=candidates, scope=scope)
    if scope == "global":
        expected = oracle.best_across(scores, candidates, k)
    else:
        expected = oracle.best_per_leaf(scores, candidates, k)
    for got, want, score in zip(found, expected, scores, strict=True):
        assert got.shape == score.shape
        assert got.dtype == bool
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", FLOATS)
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=100)
def test_top_k_equals_a_stable_sort(dtype: str, data: st.DataObject) -> None:
    scores = split(data.draw(score_values(dtype, SIZE)))
    flags = st.one_of(
        st.just([True] * SIZE),
        st.lists(st.booleans(), min_size=SIZE, max_size=SIZE),
    )
    candidates = split(np.asarray(data.draw(flags), bool))
    if data.draw(st.booleans()):
        check(scores, candidates, data.draw(st.integers(0, SIZE + 2)), "global")
    else:
        k = [data.draw(st.integers(0, n + 2)) for n in SIZES]
        check(scores, candidates, k, "layer")


def leaf(*values: float, dtype: Any = np.float32) -> np.ndarray:
    return np.asarray(values, dtype)


HARD = {
    "all equal": np.full(24, 0.5, np.float32),
    "all zero, either sign": leaf(*[0.0, -0.0] * 12),
    "all nan": np.full(24, np.nan, np.float32),
    "all -inf": np.full(24, -np.inf, np.float32),
    "nan and -inf": leaf(*[np.nan, -np.inf] * 12),
    "nan, -nan and the lowest": leaf(
        *[np.nan, -np.nan, np.finfo(np.float32).min] * 8,
    ),
    "inf and the largest": leaf(*[np.inf, np.finfo(np.float32).max] * 12),
    "denormals": np.arange(24, dtype=np.uint32).view(np.float32),
    "denormals of either sign": np.concatenate(
        [
            np.arange(12, dtype=np.uint32).view(np.float32),
            -np.arange(12, dtype=np.uint32).view(np.float32),
        ]
    ),
    "neighbours": (np.float32(1).view(np.int32) + np.arange(24, dtype=np.int32)).view(
        np.float32
    )[::-1],
    "ties at the threshold": leaf(*[3] * 4, *[2] * 16, *[1] * 4),
    "ties, last come first": leaf(*[1] * 4, *[2] * 16, *[3] * 4),
    "ascending": np.arange(24, dtype=np.float32),
    "powers of two": np.ldexp(np.float32(1), np.arange(-149, 91, 10)).astype(
        np.float32
    ),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("scope", selection.SCOPES)
def test_hard_inputs_at_every_k(name: str, scope: selection.Scope) -> None:
    flat = HARD[name]
    assert flat.dtype == np.float32
    assert flat.shape == (24,)
    # Denormals are flushed to zero by some hardware, but never by this comparison.
    scores = [flat[:12].reshape(3, 4), flat[12:]]
    everything = [np.ones(x.shape, bool) for x in scores]
    for k in range(26 if scope == "global" else 14):
        check(scores, everything, k if scope == "global" else [k, 13 - k], scope)


def test_ties_by_leaf_order_then_row_major_index() -> None:
    scores = [np.ones((2, 2), np.float32), np.ones((3,), np.float32)]
    first, second = selection.top_k(scores, 5, scope="global")
    assert first.tolist() == [[True, True], [True, True]]
    assert second.tolist() == [True, False, False]
    first, second = selection.top_k(scores, [3, 1])
    assert first.tolist() == [[True, True], [True, False]]
    assert second.tolist() == [True, False, False]


def test_a_leaf_that_gets_no_share_of_ties() -> None:
    """Wherever the key of the ties lies in the parts that a stage makes of a range."""
    for bits in range(2**8):
        tie = np.array(0x3F800000 + bits, np.uint32).view(np.float32)
        scores = [np.array([tie]), np.array([tie, 2], "f4")]
        one, other = selection.top_k(scores, 2, scope="global")
        assert one.tolist() == [True]
        assert other.tolist() == [False, True]


@pytest.mark.parametrize("kind", list(AxisType)[:2], ids=str)
@pytest.mark.parametrize("in_context", [False, True], ids=["", "a mesh is set"])
def test_scores_on_eight_devices(kind: AxisType, in_context: bool) -> None:
    """Sharded over both axes of a mesh, one, or none: counted by each device once."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    specs = [P("x", "y"), P(None, ("y", "x")), P("y"), P(), P()]
    shapes = [(8, 6), (3, 16), (6,), (5, 3), ()]
    rng = np.random.default_rng(0)
    scores = [rng.integers(0, 9, shape).astype(np.float32) for shape in shapes]
    among = [rng.random(shape) < 0.7 for shape in shapes]
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    placed, candidates = jax.device_put((scores, among), (shardings, shardings))
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        for k in (1, 40, 200):
            found = selection.top_k(placed, k, among=candidates, scope="global")
            expected = oracle.best_across(scores, among, k)
            for x, y in zip(found, expected, strict=True):
                np.testing.assert_array_equal(x, y)
        number = [9, 7, 2, 8, 1]
        found = selection.top_k(placed, number, among=candidates)
        expected = oracle.best_per_leaf(scores, among, number)
        for x, y, leaf in zip(found, expected, placed, strict=True):
            np.testing.assert_array_equal(x, y)
            if kind == AxisType.Explicit:
                assert x.sharding.is_equivalent_to(leaf.sharding, x.ndim)


def test_a_mesh_with_an_axis_of_one_device() -> None:
    mesh = jax.make_mesh((8, 1), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    rng = np.random.default_rng(0)
    scores = [rng.integers(0, 9, n).astype(np.float32) for n in ((8, 6), (8, 3))]
    placed = jax.device_put(
        scores, [NamedSharding(mesh, P("x", "y")), NamedSharding(mesh, P("x"))]
    )
    everything = [np.ones(x.shape, bool) for x in scores]
    found = selection.top_k(placed, 40, scope="global")
    expected = oracle.best_across(scores, everything, 40)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", list(AxisType)[:2], ids=str)
def test_a_leaf_on_no_mesh_beside_a_sharded_one(kind: AxisType) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    rng = np.random.default_rng(0)
    scores = [rng.integers(0, 9, n).astype(np.float32) for n in ((8, 6), (5, 3))]
    placed = [jax.device_put(scores[0], NamedSharding(mesh, P("x"))), scores[1]]
    everything = [np.ones(x.shape, bool) for x in scores]
    for k in (1, 20, 50):
        found = selection.top_k(placed, k, scope="global")
        expected = oracle.best_across(scores, everything, k)
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_array_equal(x, y)


def test_k_as_one_integer_for_all_leaves() -> None:
    scores = [leaf(1, 2, 3), leaf(5, 4)]
    first, second = selection.top_k(scores, 1)
    assert first.tolist() == [False, False, True]
    assert second.tolist() == [True, False]


def test_more_than_available_selects_all_candidates_and_no_other() -> None:
    scores = [leaf(1, 2, 3), leaf(9, 9)]
    among = [np.asarray([True, False, True]), np.asarray([False, False])]
    for scope, k in (
        ("layer", [3, 3]),
        ("global", 99),
        ("global", np.uint32(2**32 - 1)),
    ):
        found = selection.top_k(scores, k, among=among, scope=scope)
        assert [x.tolist() for x in found] == [x.tolist() for x in among]


def test_leaves_of_several_dtypes_compare_exactly() -> None:
    # 1 + 2^-7 is a bfloat16; 1 + 2^-8 is not, and must rank between.
    scores = [
        np.asarray([1.0, 1.0 + 2**-7], jnp.bfloat16),
        leaf(1.0 + 2**-8, 1.0 + 2**-6),
        np.asarray([1.0 + 2**-10], np.float16),
    ]
    order = []
    before = 0
    for k in range(1, 6):
        found = np.concatenate(selection.top_k(scores, k, scope="global"))
        assert found.sum() == k
        order.append(int(np.flatnonzero(found).sum()) - before)
        before = int(np.flatnonzero(found).sum())
    assert order == [3, 1, 2, 4, 0]


def test_integer_scores() -> None:
    scores = [np.asarray([5, -7, 5, 0], np.int32), np.asarray([6, 5], np.int32)]
    first, second = selection.top_k(scores, 3, scope="global")
    assert first.tolist() == [True, False, True, False]
    assert second.tolist() == [True, False]


def test_integer_scores_at_the_ends_of_their_range() -> None:
    # The two lowest and the highest value count as their neighbours, as documented.
    low, high = np.iinfo(np.int16).min, np.iinfo(np.int16).max
    lowest, highest = [low, low + 1, low + 2, low + 3], [high - 2, high - 1, high]
    scores = [np.asarray(lowest + highest, np.int16)]
    for k, best in enumerate(([5], [5, 6], [4, 5, 6], [3, 4, 5, 6], [0, 3, 4, 5, 6])):
        (found,) = selection.top_k(scores, k + 1)
        assert np.flatnonzero(found).tolist() == best


def test_integers_of_8_bits_are_all_told_apart() -> None:
    rng = np.random.default_rng(0)
    scores = [rng.permutation(np.arange(-128, 128).astype(np.int8)).reshape(16, 16)]
    for k in (1, 2, 3, 128, 253, 254, 255, 256):
        check(scores, [np.ones((16, 16), bool)], k, "global")


def test_float64_under_x64() -> None:
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        scores = [1.0 + 2.0**-40 * rng.integers(0, 9, n) for n in (40, 3)]
        assert sort_keys(scores)[0].dtype == jnp.int64
        everything = [np.ones(x.shape, bool) for x in scores]
        for k in (0, 1, 7, 20, 43):
            check(scores, everything, k, "global")


@pytest.mark.parametrize("scope", selection.SCOPES)
def test_large_leaves(scope: selection.Scope) -> None:
    # As in training: millions of distinct values, most of them masked.
    rng = np.random.default_rng(1)
    scores = [rng.standard_normal(n, np.float32) for n in (300_000, 70_001, 12)]
    candidates = [rng.random(x.shape) < 0.3 for x in scores]
    check(scores, candidates, 12_345 if scope == "global" else [9_000, 1, 5], scope)


# Rows are counted in 16 bits if they fit, and columns are signed integers of 16 if they
# do: shapes at and beside those limits.
@pytest.mark.parametrize("scope", selection.SCOPES)
@pytest.mark.parametrize(
    "shape",
    [
        *((2, 65535), (2, 65536), (65535,), (65536,), (1, 65537), (3, 32767)),
        *((3, 32768), (3, 32769), (2, 257, 255), (5, 300, 256), (70000, 3), (300, 255)),
    ],
    ids=str,
)
def test_at_the_limits_of_narrow_integers(
    shape: tuple[int, ...], scope: selection.Scope
) -> None:
    rng = np.random.default_rng(math.prod(shape))
    equal = np.zeros(shape, np.float32)
    few = rng.integers(0, 3, shape).astype(np.float32)
    size, row = equal.size, shape[-1]
    # With a small leaf before it, whose scores tie with its own.
    first = np.zeros(7, np.float32)
    everywhere, somewhere = np.ones(shape, bool), rng.random(shape) < 0.5
    everything = [np.ones(7, bool), everywhere]
    for k in (0, 1, row - 1, row, row + 1, size // 2, size - row, size - 1, size):
        number = 7 + k if scope == "global" else [7, k]
        check([first, equal], everything, number, scope)
        check([first, few], everything, number, scope)
        check([first, few], [np.ones(7, bool), somewhere], number, scope)


def test_traced_k_and_no_recompilation() -> None:
    traces = []

    @jax.jit
    def count(scores: Any, k: Any) -> Any:
        traces.append(None)
        return sum(m.sum() for m in selection.top_k(scores, k, scope="global"))

    scores = [jnp.arange(10.0), jnp.arange(4.0)]
    assert [int(count(scores, jnp.uint32(k))) for k in range(15)] == list(range(15))
    assert len(traces) == 1


def test_vmap() -> None:
    rng = np.random.default_rng(2)
    scores = rng.integers(0, 5, (6, 30)).astype(np.float32)
    k = np.asarray([0, 1, 7, 15, 29, 30])
    found = jax.vmap(lambda x, n: selection.top_k([x], n)[0])(scores, k)
    for row, score, n in zip(found, scores, k, strict=True):
        np.testing.assert_array_equal(row, oracle.best(score, np.ones(30, bool), n))


def test_no_leaves() -> None:
    assert selection.top_k([], 3) == []


def test_only_empty_leaves() -> None:
    (found,) = selection.top_k([np.zeros((0, 4), np.float32)], 3, scope="global")
    assert found.shape == (0, 4)


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("scope", selection.SCOPES)
def test_nothing_is_sorted_concatenated_gathered_or_reshaped(
    scope: selection.Scope,
) -> None:
    scores = [jnp.zeros((30, 40)), jnp.zeros((3, 3, 8, 16))]
    rows = len(scores)
    traced = jax.make_jaxpr(lambda x, k: selection.top_k(x, k, scope=scope))(scores, 50)
    moving = ("sort", "top_k", "gather", "scatter", "concatenate", "reshape", "cumsum")
    moving += ("dynamic_slice", "transpose", "argsort")
    seen = {"while": 0, "reduce_sum": 0}
    for equation in equations(traced.jaxpr):
        name = equation.primitive.name
        if name in seen:
            seen[name] += 1
        if name.startswith(moving):
            # A row per leaf at most, never a leaf.
            sizes = [v.aval.size for v in (*equation.invars, *equation.outvars)]
            assert max(sizes) <= rows, equation
    # Stages, the passes of one, and what ends a selection: loops over all leaves.
    assert seen["while"] == 3
    assert seen["reduce_sum"] >= rows


def test_float_keys_order_as_the_numbers_do() -> None:
    with np.errstate(invalid="ignore"):
        values = np.concatenate([special(n, "float32")[None] for n in NAMED])
        values = values.astype(np.float32)
    (keys,) = sort_keys([values])
    keys = np.asarray(keys)
    info = np.iinfo(np.int32)
    nan = np.isnan(values)
    assert (keys[nan] == info.min + 1).all()
    assert (keys[~nan] > info.min + 1).all()
    assert (keys < info.max).all()
    for i in np.flatnonzero(~nan):
        for j in np.flatnonzero(~nan):
            assert (keys[i] < keys[j]) == (values[i] < values[j])


@pytest.mark.parametrize(
    ("dtypes", "width", "expected"),
    [
        (["bfloat16"], 2, "int16"),
        (["bfloat16"], 4, "int32"),
        (["float16", "bfloat16"], 2, "int32"),
        (["float32"], 2, "int32"),
        (["float32", "float16"], 4, "int32"),
        (["int8", "int8"], 2, "int16"),
        (["int16"], 4, "int32"),
        (["int32"], 2, "int32"),
    ],
    ids=str,
)
def test_keys_are_as_wide_as_scores_or_wider(
    dtypes: list[str], width: int, expected: str
) -> None:
    scores = [jnp.zeros(3, dtype) for dtype in dtypes]
    candidates = [jnp.asarray([True, False, True])] * len(scores)
    for key in sort_keys(scores, candidates, width=width):
        assert key.dtype == expected
        assert key.tolist() == [0, jnp.iinfo(expected).min, 0]


@pytest.mark.parametrize(
    "dtypes",
    [
        *(["uint32"], ["bool"], ["int32", "float32"], ["float32", "int32"]),
        *(["int8", "int16"], ["int32", "uint32"]),
    ],
    ids=str,
)
def test_scores_of_no_common_order_are_refused(dtypes: list[str]) -> None:
    scores = [jnp.zeros(3, dtype) for dtype in dtypes]
    with pytest.raises(TypeError, match="all be floating, or all of one signed"):
        sort_keys(scores)


def test_sum_before_is_an_exclusive_sum() -> None:
    counts = jnp.asarray([3, 0, 2, 7], jnp.uint32)
    assert sum_before(counts).tolist() == [0, 3, 3, 5]
    assert sum_before(counts).dtype == jnp.uint32


@pytest.mark.parametrize("scope", selection.SCOPES)
def test_a_byte_a_score_is_all_that_is_kept(scope: selection.Scope) -> None:
    scores = [jax.ShapeDtypeStruct((256, 512), jnp.float32)] * 2
    wanted = jax.ShapeDtypeStruct((), jnp.uint32)
    compiled = selection.top_k.lower(scores, wanted, scope=scope).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    size = sum(x.size for x in scores)
    assert size <= memory.temp_size_in_bytes < 1.1 * size


@pytest.mark.parametrize(("rows", "bits"), [(2**31 - 1, 32), (2**31, 64)])
def test_positions_are_counted_past_32_bits(rows: int, bits: int) -> None:
    # A position may be that past the last entry, so 2**32 entries take more.
    def shape(*axes: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(axes, dtype)

    with jax.enable_x64(True):
        scores = shape(rows, 2, dtype=jnp.bfloat16)
        found = jax.eval_shape(lambda: places(scores))
        assert (found.start.shape, found.start.dtype) == ((rows, 1), f"uint{bits}")
        text = str(jax.make_jaxpr(selection.top_k)([scores], 1))
    assert set(re.findall(rf":u(\d+)\[1,{rows},1\] = (?:min|sub)", text)) == {str(bits)}


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (2**15 - 1, "int16"),
        (2**15, "uint32"),
        (2**32 - 1, "uint32"),
        (2**32, "uint64"),
    ],
)
def test_columns_are_as_narrow_as_their_number_allows(size: int, dtype: str) -> None:
    # They are compared with numbers up to that of all columns.
    with jax.enable_x64(True):
        codes = jax.ShapeDtypeStruct((3, size), jnp.int8)
        found = jax.eval_shape(lambda: places(codes)).column
    assert found.shape == (1, size)
    assert found.dtype == dtype


def test_counter_dtype() -> None:
    assert selection.counter_dtype([2**32 - 1], "global") == jnp.uint32
    assert selection.counter_dtype([2**31] * 4, "layer") == jnp.uint32
    with pytest.raises(ValueError, match=r'scope="layer".*jax_enable_x64'):
        selection.counter_dtype([2**31, 2**31], "global")
    with pytest.raises(ValueError, match="4294967296 scores"):
        selection.counter_dtype([2**32], "layer")
    with jax.enable_x64(True):
        assert selection.counter_dtype([2**31, 2**31], "global") == jnp.uint64
