"""`top_k` against a stable NumPy sort, on inputs chosen to be hard."""

import contextlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from granet_jax import selection
from granet_jax.selection import SCOPES, Scope, shuffled, top_k
from tests.helpers import numpy_reference
from tests.helpers.profile import NIGHTLY

# Fixed shapes, so that a dtype and a scope compile once. One shape occurs three times,
# not all in a row.
SHAPES = [(5, 4), (), (0, 3), (1,), (2, 3, 2), (5, 4), (), (5, 4)]
SIZES = list(map(math.prod, SHAPES))
SIZE = sum(SIZES)


@np.errstate(invalid="ignore")  # Signalling NaNs.
def expected_masks(
    scores: list[Any], among: list[Any], k: Any, scope: Scope, key: Any = None
) -> list[np.ndarray]:
    factors = None
    if key is not None:
        # The odd numbers that `top_k` draws, which put ties in a random order.
        rows = 1 if scope == "global" else len(scores)
        factors = np.asarray(jax.random.bits(key, (rows, 3), "uint32")) | 1
    if scope == "global":
        return numpy_reference.best_across(scores, among, k, factors)
    ks = list(np.broadcast_to(k, len(scores)))
    return numpy_reference.best_per_leaf(scores, among, ks, factors)


def check(
    scores: Any, k: Any, scope: Scope, among: Any = None, host: Any = None, **key: Any
) -> list[Any]:
    """Compare with the sort; `host` has the scores where they are sharded."""
    found = top_k(scores, k, among=among, scope=scope, **key)
    host = scores if host is None else host
    if among is None:
        among = [np.ones(x.shape, bool) for x in host]
    among = [np.asarray(x) for x in among]
    expected = expected_masks(host, among, k, scope, **key)
    for mask, want in zip(found, expected, strict=True):
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, want, strict=True)
    return found


# --- Drawn inputs -----------------------------------------------------------------


def score_values(rng: np.random.Generator, dtype: str) -> np.ndarray:
    """Numbers of `dtype`: from few distinct ones (many ties) to any bit pattern."""
    wanted = jnp.dtype(dtype)
    info = jnp.finfo(dtype)
    size = np.float64([np.nan, np.inf, 0, info.smallest_subnormal, info.max, 1])
    few = np.concatenate([size, -size]).astype(wanted)
    grid = (np.arange(-3, 4) / 2).astype(wanted)
    patterns = rng.integers(2 ** (8 * wanted.itemsize), size=SIZE, dtype="uint64")
    any_bits = patterns.astype(f"uint{8 * wanted.itemsize}").view(wanted)
    kinds = [rng.choice(few, SIZE), rng.choice(grid, SIZE), any_bits]
    mixed = np.where(rng.random(SIZE) < 0.5, kinds[0], any_bits)
    return [*kinds, mixed][rng.integers(4)]


def split(flat: np.ndarray) -> list[np.ndarray]:
    parts = np.split(flat, np.cumsum(SIZES)[:-1])
    return [p.reshape(s) for p, s in zip(parts, SHAPES, strict=True)]


@pytest.mark.parametrize(
    ("dtype", "random_order"),
    [("float32", False), ("bfloat16", False), ("float16", False), ("float32", True)],
)
def test_drawn_scores(dtype: str, random_order: bool) -> None:
    for seed in range(1000 if NIGHTLY else 100):
        rng = np.random.default_rng(seed)
        scores = split(score_values(rng, dtype))
        among = split(rng.random(SIZE) < rng.choice([0.0, 0.2, 0.5, 0.8, 1.0]))
        key = {"key": jax.random.key(seed)} if random_order else {}
        if seed % 2:
            check(scores, rng.integers(SIZE + 3), "global", among, **key)
        else:
            ks = [rng.integers(n + 3) for n in SIZES]
            check(scores, ks, "layer", among, **key)


# --- Hard inputs, at every k ------------------------------------------------------


def floats(*values: float) -> np.ndarray:
    return np.asarray(values, np.float32)


SUBNORMALS = np.arange(24, dtype=np.uint32).view(np.float32)
ONE = np.float32(1).view(np.int32)
HARD = {
    "all equal": np.full(24, 0.5, np.float32),
    "zeros of either sign": floats(*[0.0, -0.0] * 12),
    "all nan": np.full(24, np.nan, np.float32),
    "all -inf": np.full(24, -np.inf, np.float32),
    "nan and -inf": floats(*[np.nan, -np.inf] * 12),
    "nan and the lowest": floats(*[np.nan, -np.nan, np.finfo("f4").min] * 8),
    "inf and the largest": floats(*[np.inf, np.finfo("f4").max] * 12),
    "subnormals": SUBNORMALS,
    "subnormals of either sign": np.concatenate([SUBNORMALS[:12], -SUBNORMALS[:12]]),
    "neighbours": (ONE + np.arange(24, dtype=np.int32)).view(np.float32)[::-1],
    "ties at the threshold": floats(*[3] * 4, *[2] * 16, *[1] * 4),
    "ties, the best last": floats(*[1] * 4, *[2] * 16, *[3] * 4),
    "ascending": np.arange(24, dtype=np.float32),
    "powers of two": np.ldexp(np.float32(1), np.arange(-149, 91, 10)).astype("f4"),
    "mixed signs": np.arange(-12, 12, dtype=np.float32)[::-1],
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("scope", SCOPES)
def test_hard_inputs_at_every_k(name: str, scope: Scope) -> None:
    flat = HARD[name]
    assert (flat.dtype, flat.shape) == (np.float32, (24,))
    scores = [flat[:12].reshape(3, 4), flat[12:]]
    for k in range(26 if scope == "global" else 14):
        check(scores, k if scope == "global" else [k, 13 - k], scope)


def test_ties_by_leaf_order_then_row_major_index() -> None:
    scores = [np.ones((2, 2), np.float32), np.ones((3,), np.float32)]
    first, second = top_k(scores, 5, scope="global")
    assert first.tolist() == [[True, True], [True, True]]
    assert second.tolist() == [True, False, False]
    # One integer is the number for every leaf.
    first, second = top_k(scores, 1)
    assert first.tolist() == [[True, False], [False, False]]
    assert second.tolist() == [True, False, False]


def test_a_tie_between_leaves_at_every_low_byte() -> None:
    # A radix search reads the low bits last; each of their values is a tie here.
    for bits in range(2**8):
        tie = np.array(0x3F800000 + bits, np.uint32).view(np.float32)
        scores = [np.array([tie]), np.array([tie, 2], "f4")]
        one, other = top_k(scores, 2, scope="global")
        assert (one.tolist(), other.tolist()) == ([True], [False, True])


def test_more_than_available_selects_exactly_the_candidates() -> None:
    scores = [floats(1, 2, 3), floats(9, 9)]
    among = [np.asarray([True, False, True]), np.asarray([False, False])]
    check(scores, [3, 3], "layer", among)
    for k in (99, np.uint32(2**32 - 1)):
        check(scores, k, "global", among)


def test_no_leaves_and_no_entries() -> None:
    assert top_k([], 3) == []
    for scope in SCOPES:
        check([np.zeros((0, 4), np.float32)], 3, scope)


# --- Other dtypes -----------------------------------------------------------------


def test_leaves_of_several_dtypes_compare_exactly() -> None:
    # 1 + 2^-7 is a bfloat16; 1 + 2^-8 is not, and must rank below it.
    scores = [
        np.asarray([1.0, 1.0 + 2**-7], jnp.bfloat16),
        floats(1.0 + 2**-8, 1.0 + 2**-6),
        np.asarray([1.0 + 2**-10], np.float16),
    ]
    for k in range(6):
        check(scores, k, "global")


def test_integer_scores() -> None:
    scores = [np.asarray([5, -7, 5, 0], np.int32), np.asarray([6, 5], np.int32)]
    for k in range(7):
        check(scores, k, "global")
    rng = np.random.default_rng(0)
    scores = [rng.permutation(np.arange(-128, 128).astype(np.int8)).reshape(16, 16)]
    for k in (1, 2, 3, 128, 253, 254, 255, 256):
        check(scores, k, "global")


def test_integer_scores_at_the_ends_of_their_range() -> None:
    # As documented, the two lowest values and the highest count as their neighbours.
    low, high = np.iinfo(np.int16).min, np.iinfo(np.int16).max
    lowest, highest = [low, low + 1, low + 2, low + 3], [high - 2, high - 1, high]
    scores = [np.asarray(lowest + highest, np.int16)]
    for k, chosen in enumerate(([5], [5, 6], [4, 5, 6], [3, 4, 5, 6], [0, 3, 4, 5, 6])):
        (found,) = top_k(scores, k + 1)
        assert np.flatnonzero(found).tolist() == chosen


def test_float64_under_x64() -> None:
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        # Equal as float32.
        scores = [1.0 + 2.0**-40 * rng.integers(0, 9, n) for n in (40, 3)]
        for k in (0, 1, 7, 20, 43):
            check(scores, k, "global")


# --- Large leaves -----------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
def test_large_leaves(scope: Scope) -> None:
    # As in training: many distinct values, most of them masked.
    rng = np.random.default_rng(1)
    scores = [rng.standard_normal(n, np.float32) for n in (300_000, 70_001, 12)]
    among = [rng.random(x.shape) < 0.3 for x in scores]
    check(scores, 12_345 if scope == "global" else [9_000, 1, 5], scope, among)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    "shape",
    [
        *((65536,), (3, 32768), (70000, 3), (2, 257, 255)),
        *(
            pytest.param(shape, marks=pytest.mark.slow)
            for shape in ((2, 65535), (65535,), (1, 65537), (3, 32767), (300, 255))
        ),
    ],
    ids=str,
)
def test_at_the_limits_of_narrow_integers(shape: tuple[int, ...], scope: Scope) -> None:
    # Counts and positions that do or do not fit 15 or 16 bits, along each axis.
    rng = np.random.default_rng(math.prod(shape))
    # The scores of a small leaf before it tie with its own.
    small = np.zeros(7, np.float32)
    equal = [small, np.zeros(shape, np.float32)]
    few = [small, rng.integers(0, 3, shape).astype(np.float32)]
    somewhere = [np.ones(7, bool), rng.random(shape) < 0.5]
    everywhere = [np.ones(7, bool), np.ones(shape, bool)]
    size, row = math.prod(shape), shape[-1]
    for k in (0, 1, row - 1, row, row + 1, size // 2, size - row, size - 1, size):
        number = 7 + k if scope == "global" else [7, k]
        check(equal, number, scope, everywhere)
        check(few, number, scope, somewhere)


# --- Under transformations --------------------------------------------------------


def test_traced_k_and_no_recompilation() -> None:
    traces = []

    @jax.jit
    def count(scores: Any, k: Any) -> Any:
        traces.append(None)
        return sum(m.sum() for m in top_k(scores, k, scope="global"))

    scores = [jnp.arange(10.0), jnp.arange(4.0)]
    assert [int(count(scores, jnp.uint32(k))) for k in range(15)] == list(range(15))
    assert len(traces) == 1


@pytest.mark.parametrize("scope", SCOPES)
def test_vmap_with_a_k_per_lane(scope: Scope) -> None:
    rng = np.random.default_rng(2)
    scores = [rng.integers(0, 5, (6, n)).astype(np.float32) for n in (30, 9)]
    k = np.asarray([0, 1, 7, 15, 38, 39])
    found = jax.vmap(lambda x, n: top_k(x, n, scope=scope))(scores, k)
    for lane in range(6):
        alone = [s[lane] for s in scores]
        everything = [np.ones(s.shape, bool) for s in alone]
        expected = expected_masks(alone, everything, k[lane], scope)
        for mask, want in zip(found, expected, strict=True):
            np.testing.assert_array_equal(mask[lane], want)


# --- On eight devices -------------------------------------------------------------

# Meshes, and shapes of leaves with how each is sharded. Leaves of one shape may be
# sharded differently, and some have no sharding at all.
MESHES: dict[str, tuple[tuple[int, int], list[tuple[tuple[int, ...], P | None]]]] = {
    "every kind of leaf": (
        (4, 2),
        [
            *(((8, 8), spec) for spec in (P("x", "y"), P("y", "x"), P("x"), P())),
            *(((8, 8), P("x", "y")), ((3, 16), P(None, ("y", "x")))),
            *(((6,), P("y")), ((5, 3), P()), ((), P())),
        ],
    ),
    "an axis of one device": ((8, 1), [((8, 6), P("x", "y")), ((8, 3), P("x"))]),
    "a leaf on no mesh": ((4, 2), [((8, 6), P("x")), ((5, 3), None)]),
}


@pytest.mark.parametrize(
    ("name", "kind", "in_context"),
    [
        ("every kind of leaf", AxisType.Auto, True),
        ("every kind of leaf", AxisType.Explicit, False),
        ("an axis of one device", AxisType.Auto, False),
        ("an axis of one device", AxisType.Explicit, True),
        ("a leaf on no mesh", AxisType.Auto, True),
        ("a leaf on no mesh", AxisType.Explicit, False),
    ],
)
def test_scores_on_eight_devices(name: str, kind: AxisType, in_context: bool) -> None:
    mesh_shape, leaves = MESHES[name]
    mesh = jax.make_mesh(mesh_shape, ("x", "y"), axis_types=(kind, kind))
    rng = np.random.default_rng(0)
    host = [rng.integers(0, 9, shape).astype(np.float32) for shape, _ in leaves]
    among = [rng.random(shape) < 0.7 for shape, _ in leaves]

    def place(x: np.ndarray, spec: P | None) -> Any:
        return x if spec is None else jax.device_put(x, NamedSharding(mesh, spec))

    specs = [spec for _, spec in leaves]
    scores, candidates = (list(map(place, x, specs)) for x in (host, among))
    size = sum(x.size for x in host)
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        for k in (1, size // 4, size):
            check(scores, k, "global", candidates, host)
        found = check(scores, [9] * len(leaves), "layer", None, host)
    for mask, score, spec in zip(found, scores, specs, strict=True):
        if kind == AxisType.Explicit and spec is not None:
            assert mask.sharding.is_equivalent_to(score.sharding, mask.ndim)


def equations(jaxpr: Any) -> Any:
    """All equations of a program and of its inner programs."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in core.jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("scope", SCOPES)
def test_no_leaf_is_sorted_gathered_or_reshaped(scope: Scope) -> None:
    # XLA would move the parts of a sharded leaf between devices for any of these.
    scores = [jnp.zeros((30, 40)), jnp.zeros((3, 3, 8, 16))]
    traced = jax.make_jaxpr(lambda x, k: top_k(x, k, scope=scope))(scores, 50)
    moving = ("sort", "top_k", "gather", "scatter", "concatenate", "reshape", "cumsum")
    moving += ("dynamic_slice", "transpose", "argsort")
    loops = 0
    for equation in equations(traced.jaxpr):
        loops += equation.primitive.name == "while"
        if equation.primitive.name.startswith(moving):
            sizes = [v.aval.size for v in (*equation.invars, *equation.outvars)]
            assert max(sizes) <= 64, equation
    assert loops


# --- Random order of ties -----------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 8, 9), (5, 2**15, 2**16), (3, 2**16, 2**16)])
def test_layers_of_any_size_are_counted_exactly(shape: tuple[int, ...]) -> None:
    """In 32 bits, row by row in 32 bits, and in 64 bits."""
    with jax.enable_x64(True):
        # XLA multiplies instead of adding so many equal numbers.
        count = jax.jit(
            lambda flag: selection._sum_layers(
                jnp.broadcast_to(flag, shape), (0, 1, 2), jnp.dtype("uint64")
            )
        )(True)
        assert count.dtype == "uint64"
        assert int(count) == math.prod(shape)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
def test_shuffled_ranks_are_distinct_and_leave_the_ends_free(dtype: str) -> None:
    with jax.enable_x64(dtype == "uint64"):
        top = np.iinfo(dtype).max
        ranks = np.arange(1, min(top, 2**16), dtype=dtype)
        factors = np.asarray([3, 2**7 + 1, top], dtype)
        mixed = np.asarray(jax.jit(shuffled)(ranks, factors))
        assert mixed.dtype == dtype
        assert len(set(mixed.tolist())) == len(ranks)
        assert mixed.min() > 0
        assert mixed.max() < top
        if dtype == "uint32":
            expected = numpy_reference.shuffled(ranks, factors.tolist())
            np.testing.assert_array_equal(mixed, expected)


def test_tied_entries_are_chosen_equally_often_and_apart_from_each_other() -> None:
    draws, size, k = 2000, 400, 40
    select = jax.vmap(lambda key: top_k([jnp.zeros((20, size // 20))] * 2, k, key=key))
    found = jax.jit(select)(jax.random.split(jax.random.key(0), draws))
    one, other = (np.asarray(x).reshape(draws, -1) for x in found)
    p = k / size
    # 400 counts with variance n p (1 - p), so that chi-squared is 399 ± 28.
    chi = ((one.sum(0) - draws * p) ** 2).sum() / (draws * p * (1 - p))
    assert abs(chi - (size - 1)) < 5 * math.sqrt(2 * size)
    pairs = p * (k - 1) / (size - 1)
    for apart in (1, 2, 3, 16, 20, 64, 128, 256):
        both = (one[:, apart:] & one[:, :-apart]).mean()
        assert abs(both - pairs) < 0.05 * pairs, apart
    # Two leaves of one shape have different orders.
    assert abs((one & other).mean() - p * p) < 0.05 * p * p
