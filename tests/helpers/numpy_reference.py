"""A slow, plain NumPy reference of every method, to compare the library with.

It is written from the specification alone and imports nothing from granet_jax. It sorts
one leaf, or all leaves in one vector, and counts in Python integers and float64. Random
scores and the random order of equal scores are inputs (see `luck`).

Parameters and moments are float32 arrays, and every operation rounds once. If learning
rate, momentum and decays are powers of two, products are exact, and a fused
multiply-add gives the same bits.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Leaves = list[Any]
LAST_STEP = 2**31 - 1  # The step counter stops here.


def each(function: Callable[..., Any], *lists: Any) -> list[Any]:
    """The function of the first items of the lists, of the second ones, and so on."""
    return [function(*row) for row in zip(*lists, strict=True)]


# --- Numbers of weights -------------------------------------------------------------


def total_count(size: int, sparsity: float) -> int:
    return math.floor((1.0 - sparsity) * size + 0.5)


def densities(shapes: Sequence[tuple], sparsity: float, distribution: Any) -> list:
    """The density of every leaf; ER and ERK by the epsilon loop of the RigL code."""
    density = 1.0 - sparsity
    if callable(distribution):
        return distribution(shapes, sparsity)
    if distribution == "uniform":
        return [density for _ in shapes]
    sizes = list(map(math.prod, shapes))
    dims = [shape if distribution == "erk" else shape[-2:] for shape in shapes]
    raw = [
        sum(d) / math.prod(d) if n else 0.0 for d, n in zip(dims, sizes, strict=True)
    ]
    dense = {i for i, size in enumerate(sizes) if size == 0}
    while len(dense) < len(shapes):
        sparse = [i for i in range(len(shapes)) if i not in dense]
        right = sum(density * sizes[i] for i in sparse)
        right -= sum((1.0 - density) * sizes[i] for i in dense)
        epsilon = right / sum(raw[i] * sizes[i] for i in sparse)
        largest = max(raw[i] for i in sparse)
        if epsilon * largest <= 1.0:
            break
        dense |= {i for i in sparse if raw[i] == largest}
    return [1.0 if i in dense else epsilon * raw[i] for i in range(len(shapes))]


def counts(
    shapes: Sequence[tuple],
    sparsity: float,
    distribution: Any,
    caps: Sequence[int] | None = None,
    floors: Sequence[int] | None = None,
) -> list[int]:
    """Active weights per leaf by largest remainder, within `caps` and `floors`."""
    sizes = list(map(math.prod, shapes))
    caps = sizes if caps is None else caps
    floors = [0] * len(sizes) if floors is None else floors
    ideal = each(operator.mul, densities(shapes, sparsity, distribution), sizes)
    kept = each(max, each(min, map(math.floor, ideal), caps), floors)
    order = sorted(range(len(sizes)), key=lambda i: (kept[i] - ideal[i], i))
    total = total_count(sum(sizes), sparsity)
    while sum(kept) < total:
        for i in order:
            if sum(kept) < total and kept[i] < caps[i]:
                kept[i] += 1
    while sum(kept) > total:
        for i in reversed(order):
            if sum(kept) > total and kept[i] > floors[i]:
                kept[i] -= 1
    return kept


def number_dropped(fraction: float, active: int) -> int:
    fixed = min(math.floor(fraction * 2**32), 2**32 - 1)
    return -(-fixed * active // 2**32)


def redistributed(total: int, weights: Sequence[float], room: Sequence[int]) -> list:
    """Splits `total` over leaves in proportion to `weights`, within their `room`.

    Shares are rounded down. A full leaf passes its excess on to the others, again in
    proportion; what rounding leaves over goes to the first leaves with room, one each.
    """
    shares = [0 for _ in room]
    while sum(shares) < total:
        left = total - sum(shares)
        space = each(operator.sub, room, shares)
        mass = each(lambda w, s: w if s else 0.0, weights, space)
        if sum(mass) == 0.0:
            mass = list(map(float, space))
        parts = np.float32(mass) / np.float32(math.fsum(mass)) * np.float32(left)
        more = each(lambda x, s: min(math.floor(x), s), parts, space)
        if sum(more) == 0:
            more = [int(s > 0) for s in space]
            for i in range(len(room)):
                more[i] = min(more[i], left - sum(more[:i]))
        shares = each(operator.add, shares, more)
    return shares


def within_reach(target: Sequence[int], present: Sequence[int]) -> list[int]:
    """The target; leaves above theirs make up for those below."""
    kept = each(min, target, present)
    room = each(operator.sub, present, kept)
    missing = min(sum(target) - sum(kept), sum(room))
    return each(
        operator.add, kept, redistributed(missing, list(map(float, room)), room)
    )


# --- Structures ---------------------------------------------------------------------


class Structure(NamedTuple):
    """Boxes of weights, kept as a whole, by a norm, or with equally many weights."""

    sides: Callable[[tuple], tuple]  # From the shape of a leaf to that of its boxes.
    whole: bool
    norm: str = "l1"  # Or "l2".


def block(*sides: int, norm: str = "l1") -> Structure:
    return Structure(lambda shape: (1,) * (len(shape) - len(sides)) + sides, True, norm)


def unit(axis: int) -> Callable[[tuple], tuple]:
    def sides(shape: tuple) -> tuple:
        return tuple(1 if i == axis % len(shape) else n for i, n in enumerate(shape))

    return sides


def channel(*, norm: str = "l1", axis: int = -1) -> Structure:
    return Structure(unit(axis), True, norm)


def constant_fan_in(*, axis: int = -1) -> Structure:
    return Structure(unit(axis), False)


def n_of_m(n: int, m: int, *, axis: int = -2) -> Structure:
    def sides(shape: tuple) -> tuple:
        return tuple(m if i == axis % len(shape) else 1 for i in range(len(shape)))

    return Structure(sides, False)


def boxed(x: np.ndarray, sides: tuple) -> np.ndarray:
    """The boxes of a leaf as the rows of a matrix."""
    pairs = zip(x.shape, sides, strict=True)
    split = [n for size, side in pairs for n in (size // side, side)]
    axes = [*range(0, 2 * x.ndim, 2), *range(1, 2 * x.ndim, 2)]
    return x.reshape(split).transpose(axes).reshape(-1, math.prod(sides))


def unboxed(rows: np.ndarray, shape: tuple, sides: tuple) -> np.ndarray:
    """The inverse of `boxed`."""
    grid = [n // side for n, side in zip(shape, sides, strict=True)]
    axes = [axis for i in range(len(shape)) for axis in (i, len(shape) + i)]
    return rows.reshape(*grid, *sides).transpose(axes).reshape(shape)


# --- Selection ----------------------------------------------------------------------


def best(
    score: np.ndarray, candidate: np.ndarray, k: int, rank: np.ndarray | None = None
) -> np.ndarray:
    """Selects the k best candidates of a vector: largest first, then highest rank.

    Without ranks, the lowest index. NaN is below every number, and -0.0 equals 0.0.
    """
    score = score.astype(np.float64)
    nan = np.isnan(score)
    last = np.arange(score.size) if rank is None else -rank.astype(np.int64)
    # `lexsort` sorts by its last key first.
    order = np.lexsort((last, np.where(nan, 0.0, -score), nan, ~candidate))
    chosen = np.zeros(score.size, bool)
    chosen[order[: min(int(k), int(candidate.sum()))]] = True
    return chosen


def shuffled(rank: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    """Ranks, put in another order by a bijection of the integers below 2**32."""
    words = np.uint64(2**32 - 1)

    def mixed(x: np.ndarray) -> np.ndarray:
        for factor in factors:
            x = (x * np.uint64(factor)) & words
            x = x ^ (x >> np.uint64(16))
        return x

    x = mixed(rank.astype(np.uint64) & words)
    return np.where(x == words, mixed(np.asarray([words]))[0], x)


def tie_ranks(size: int, factors: Sequence[int] | None) -> np.ndarray:
    """The ranks of equal scores: the first index first, or a random order."""
    ranks = size - np.arange(size)
    return ranks if factors is None else shuffled(ranks, factors)


def best_per_leaf(
    scores: Leaves, candidates: Leaves, ks: Sequence[int], factors: Any = None
) -> Leaves:
    def in_leaf(s: np.ndarray, c: np.ndarray, k: int, odd: Any) -> np.ndarray:
        return best(s.ravel(), c.ravel(), k, tie_ranks(s.size, odd)).reshape(s.shape)

    factors = [None] * len(scores) if factors is None else factors
    return each(in_leaf, scores, candidates, ks, factors)


def best_across(
    scores: Leaves, candidates: Leaves, k: int, factors: Any = None
) -> Leaves:
    flat = np.concatenate([s.ravel().astype(np.float64) for s in scores])
    among = np.concatenate([c.ravel() for c in candidates])
    ranks = tie_ranks(flat.size, None if factors is None else factors[0])
    ends = np.cumsum([s.size for s in scores])[:-1]
    parts = np.split(best(flat, among, k, ranks), ends)
    return each(lambda part, s: part.reshape(s.shape), parts, scores)


# --- Scores -------------------------------------------------------------------------


class Inputs(NamedTuple):
    """The inputs of a score, named as in `granet_jax.ScoreInputs`: one leaf."""

    param: np.ndarray
    grad: np.ndarray
    mask: np.ndarray
    average: np.ndarray | None
    marked: np.ndarray | None
    random: np.ndarray | None


Score = Callable[[Any], Any]


def magnitude(x: Inputs) -> np.ndarray:
    return np.abs(x.param)


def gradient(x: Inputs) -> np.ndarray:
    return np.abs(x.grad)


def momentum(x: Inputs) -> np.ndarray:
    return np.abs(x.average)


def random(x: Inputs) -> np.ndarray:
    assert x.random is not None
    return x.random


def marked_first(x: Inputs) -> np.ndarray:
    return np.where(x.marked, np.float64(np.inf), np.abs(x.param))


# --- Methods ------------------------------------------------------------------------


# A function from (steps before this one, mask, marked) to a leaf's L2 coefficients.
Coefficients = Callable[[int, np.ndarray, np.ndarray | None], np.ndarray]


@dataclasses.dataclass(frozen=True)
class ReferenceMethod:
    """A method as tables by step."""

    start: float  # Sparsity of the initial masks.
    # Sparsity from a step on, by step; methods without any never prune.
    targets: dict[int, float] = dataclasses.field(default_factory=dict)
    # Prune fraction of the exchange, by step; only steps that exchange.
    fractions: dict[int, float] = dataclasses.field(default_factory=dict)
    distribution: Any = "erk"  # How the sparsity is split over leaves.
    scope: str = "global"
    structure: Structure | None = None  # None for single weights.
    prune: Score = (
        magnitude  # By which pruning and every choice among all weights rank.
    )
    revive: Score | None = None  # By which weights return where the sparsity falls.
    drop: Score = magnitude  # By which the exchange drops.
    grow: Score = gradient
    across: bool = False  # The exchange moves weights between leaves, by mean score.
    threshold: float | None = None  # The first of DSR, which drops all weights below.
    decay: float | None = None  # Of the moving average of the dense gradient.
    resets: frozenset[int] = frozenset()  # Steps after which the moments start anew.
    weights: str = "sparse"  # Or "projected" or "dense", as in `granet_jax.Method`.
    refresh: int = 1  # Steps between two choices among all weights.
    marked: float | None = None  # Sparsity of the second masks.
    # Steps that choose the second masks again, with sparse weights.
    marks: frozenset[int] = frozenset()
    penalty: Coefficients | None = None  # Extra L2 coefficients.
    floor: float = 0.0  # The density that global pruning leaves in every leaf.

    @property
    def update_steps(self) -> list[int]:
        return sorted(self.targets | self.fractions)

    def sparsity(self, step: int) -> float:
        """The sparsity that the schedule wants after a step."""
        reached = [t for t in self.targets if t <= step]
        return self.targets[max(reached)] if reached else self.start

    @property
    def ranks_across(self) -> bool:
        return self.scope == "global" and (
            self.structure is None or self.structure.whole
        )

    @property
    def makes_up(self) -> bool:
        """Whether denser leaves make up for sparser ones when weights are pruned."""
        boxes = self.structure is not None and not self.structure.whole
        return self.scope == "layer" and not boxes and self.revive is None

    @property
    def draws_boxes(self) -> bool:
        """Whether the initial masks are drawn, in whole boxes."""
        whole = self.structure is not None and self.structure.whole
        return whole and self.start > 0 and self.weights == "sparse"

    def leaf_numbers(
        self,
        shapes: Sequence[tuple],
        sparsity: float,
        caps: Sequence[int] | None = None,
        floors: Sequence[int] | None = None,
    ) -> list[int]:
        """Active parts of every leaf: weights, whole boxes, or weights of each box."""
        if self.structure is None:
            return counts(shapes, sparsity, self.distribution, caps, floors)
        sizes = self.sizes(shapes)
        caps = sizes if caps is None else caps
        if floors is None:
            floors = [0 if self.structure.whole else 1] * len(sizes)
        share = densities(shapes, sparsity, self.distribution)
        rounded = [math.floor(d * n + 0.5) for d, n in zip(share, sizes, strict=True)]
        return each(min, each(max, rounded, floors), caps)

    def sizes(self, shapes: Sequence[tuple]) -> list[int]:
        """Parts of every leaf: weights, whole boxes, or the weights of each box."""
        weights = [math.prod(shape) for shape in shapes]
        if self.structure is None:
            return weights
        boxes = [math.prod(self.structure.sides(shape)) for shape in shapes]
        if not self.structure.whole:
            return boxes
        return [n // size for n, size in zip(weights, boxes, strict=True)]

    def numbers(self, shapes: Sequence[tuple], sparsity: float, **bounds) -> list[int]:
        """As `leaf_numbers`, or one number for all leaves if they compete."""
        if self.ranks_across:
            return [total_count(sum(self.sizes(shapes)), sparsity)]
        return self.leaf_numbers(shapes, sparsity, **bounds)

    def plan(self, shapes: Sequence[tuple]) -> dict[int, list[int]]:
        """The numbers of active parts that the schedule asks for at every update."""
        present = self.leaf_numbers(shapes, self.start)
        if self.ranks_across:
            present = [sum(present)]
        rows = {}
        for step in self.update_steps:
            wanted = self.numbers(shapes, self.sparsity(step))
            change = sum(wanted) - sum(present)
            if change and not self.ranks_across:
                bound = {"caps": present} if change < 0 else {"floors": present}
                wanted = self.numbers(shapes, self.sparsity(step), **bound)
            if change < 0 or (change > 0 and self.revive is not None):
                present = wanted
            rows[step] = present
        return rows

    def choose(
        self,
        scores: Leaves,
        among: Leaves,
        numbers: Sequence[int],
        factors: Any = None,
    ) -> Leaves:
        """Selects as many of the best parts among candidates as `numbers` says.

        `factors` are three for each leaf, which put equal scores in a random order.
        """
        structure = self.structure
        if structure is None:
            return self._select(scores, among, numbers, factors)
        boxes = [structure.sides(s.shape) for s in scores]
        rows = each(boxed, scores, boxes)
        open_ = each(boxed, among, boxes)
        if structure.whole:
            norms = [_norm(r, structure.norm) for r in rows]
            whole = [o.all(axis=-1) for o in open_]
            ranks = self._select(norms, whole, numbers, factors)
            chosen = each(lambda c, r: c[:, None] & np.ones_like(r, bool), ranks, rows)
        else:
            chosen = each(
                lambda r, o, k: np.stack(each(best, r, o, [k] * len(r))),
                *(rows, open_, numbers),
            )
        return each(unboxed, chosen, [s.shape for s in scores], boxes)

    def pruned(self, scores: Leaves, masks: Leaves, number: list[int]) -> Leaves:
        """Keeps the best weights, but in every leaf those that `floor` keeps there."""
        if not self.floor or sum(self.active(masks)) <= number[0]:
            return self.choose(scores, masks, number)
        sizes = self.sizes([m.shape for m in masks])
        least = [math.floor(self.floor * size + 1e-6) for size in sizes]
        within = dataclasses.replace(self, scope="layer")
        first = within.choose(scores, masks, least)
        others = each(lambda m, f: m & ~f, masks, first)
        rest = self.choose(scores, others, [number[0] - sum(self.active(first))])
        return each(operator.or_, first, rest)

    def _select(
        self, scores: Leaves, among: Leaves, numbers: Sequence[int], factors: Any
    ) -> Leaves:
        if self.ranks_across:
            return best_across(scores, among, numbers[0], factors)
        return best_per_leaf(scores, among, numbers, factors)

    def active(self, masks: Leaves) -> list[int]:
        """Active weights, or whole boxes, of every leaf."""
        if self.structure is None or not self.structure.whole:
            return [int(m.sum()) for m in masks]
        sides = self.structure.sides
        return [int(boxed(m, sides(m.shape)).all(axis=-1).sum()) for m in masks]

    def filled(
        self, masks: Leaves, scores: Leaves, numbers: Leaves, factors: Any = None
    ) -> Leaves:
        """Activates the best of each box, up to `numbers` (an integer or one a box)."""
        assert self.structure is not None
        sides = self.structure.sides

        def fill(mask: Any, score: Any, number: Any, odd: Any) -> np.ndarray:
            rows = boxed(mask, sides(mask.shape))
            missing = np.maximum(number - rows.sum(axis=-1), 0)
            order = [tie_ranks(rows.shape[1], None)] * len(rows)
            if odd is not None:  # Another order in every box.
                order = [
                    shuffled(r * (1 - 2 * box), odd) for box, r in enumerate(order)
                ]
            back = each(best, boxed(score, sides(mask.shape)), ~rows, missing, order)
            return unboxed(rows | np.stack(back), mask.shape, sides(mask.shape))

        factors = [None] * len(masks) if factors is None else factors
        return each(fill, masks, scores, numbers, factors)


def _norm(rows: np.ndarray, norm: str) -> np.ndarray:
    rows = rows.astype(np.float32)
    if norm == "l1":
        return rows.mean(axis=-1)
    return np.sqrt(np.square(rows).mean(axis=-1))


def _cubic(final, initial, begin, end, interval) -> dict[int, float]:
    n = (end - begin) // interval
    targets = {
        begin + j * interval: final + (initial - final) * (1.0 - j / n) ** 3
        for j in range(1, n)
    }
    return {**targets, begin + n * interval: final}


def _steps(interval: int, last: int, begin: int = 0) -> list[int]:
    return [t for t in range(1, last + 1) if (t - begin) % interval == 0]


def _exchanges(interval: int, total: int, stop: float) -> list[int]:
    """Steps until the share `stop` of the training, one interval before the end."""
    return _steps(interval, min(math.floor(stop * total + 1e-6), total - interval))


def _cosine(steps, first: float, last: float, end: float) -> dict[int, float]:
    wave = {t: (1 + math.cos(math.pi * t / end)) / 2 for t in steps}
    return {t: last + (first - last) * w for t, w in wave.items()}


def gmp(
    sparsity, end_step, *, initial_sparsity=0.0, begin_step=0, interval=1000, **rest
) -> ReferenceMethod:
    targets = _cubic(sparsity, initial_sparsity, begin_step, end_step, interval)
    rest = {"distribution": "uniform", **rest}
    return ReferenceMethod(start=initial_sparsity, targets=targets, **rest)


def granet(
    sparsity,
    total_steps,
    *,
    begin_step=0,
    end_step=None,
    interval=1000,
    fraction=0.5,
    final_fraction=0.005,
    grow="gradient",
    **rest,
) -> ReferenceMethod:
    steps = _steps(interval, total_steps - interval, begin_step)
    return gmp(
        sparsity,
        total_steps // 2 if end_step is None else end_step,
        begin_step=begin_step,
        interval=interval,
        fractions=_cosine(steps, fraction, final_fraction, total_steps),
        grow={"gradient": gradient, "random": random, "momentum": momentum}[grow],
        decay=0.9 if grow == "momentum" else None,
        **{"distribution": "erk", **rest},
    )


def rigl(
    sparsity, total_steps, *, interval=100, fraction=0.3, stop=0.75, **rest
) -> ReferenceMethod:
    steps = _exchanges(interval, total_steps, stop)
    fractions = _cosine(steps, fraction, 0.0, stop * total_steps)
    return ReferenceMethod(start=sparsity, fractions=fractions, **rest)


def set_(
    sparsity, total_steps, *, interval=100, fraction=0.3, stop=0.75, **rest
) -> ReferenceMethod:
    fractions = dict.fromkeys(_exchanges(interval, total_steps, stop), fraction)
    return ReferenceMethod(start=sparsity, fractions=fractions, grow=random, **rest)


def snfs(sparsity, total_steps, *, fraction=0.5, decay=0.9, **rest) -> ReferenceMethod:
    parts = {"grow": momentum, "across": True, "distribution": "uniform", **rest}
    return rigl(sparsity, total_steps, fraction=fraction, stop=1, decay=decay, **parts)


def mest(sparsity, total_steps, *, gradient_weight=0.01, **rest) -> ReferenceMethod:
    def importance(x: Inputs) -> np.ndarray:
        weight = x.param.dtype.type(gradient_weight)
        return np.abs(x.param) + weight * np.abs(x.grad)

    parts = {"drop": importance, "grow": random, **rest}
    return rigl(sparsity, total_steps, stop=1, **parts)


def dsr(
    sparsity, total_steps, *, interval=1000, fraction=0.01, threshold=1e-3, **rest
) -> ReferenceMethod:
    parts = {"threshold": threshold, "distribution": "uniform", **rest}
    return set_(sparsity, total_steps, interval=interval, fraction=fraction, **parts)


def static(sparsity, **rest) -> ReferenceMethod:
    return ReferenceMethod(start=sparsity, **rest)


own = ReferenceMethod  # A user's own method, from tables and score functions.


def cyclical(
    sparsity,
    total_steps,
    *,
    cycles=4,
    initial_sparsity=0.0,
    ramp=0.75,
    interval=100,
    recovery="hard",
    **rest,
) -> ReferenceMethod:
    period = total_steps // cycles
    # A product such as 0.29 * 100 lies a little below the integer it stands for.
    end = math.floor(ramp * period + 1e-6)
    rise = _cubic(sparsity, initial_sparsity, 0, end, interval)
    targets = {}
    for cycle in range(cycles):
        if cycle:
            targets[cycle * period] = initial_sparsity
        targets |= {cycle * period + t: s for t, s in rise.items()}
    return ReferenceMethod(
        start=initial_sparsity,
        targets=targets,
        revive=gradient if initial_sparsity > 0 and cycles > 1 else magnitude,
        weights={"hard": "sparse", "straight_through": "dense"}.get(recovery, recovery),
        **{"distribution": "uniform", **rest},
    )


def acdc(sparsity, switches, **rest) -> ReferenceMethod:
    return ReferenceMethod(
        start=0.0,
        targets={t: 0.0 if i % 2 else sparsity for i, t in enumerate(switches)},
        revive=magnitude,
        resets=frozenset(switches[1::2]),
        **{"distribution": "uniform", **rest},
    )


def sculpt(
    sparsity, total_steps, *, cycles, initial_sparsity=0.8, **rest
) -> ReferenceMethod:
    ends = [total_steps // (cycles + 1) * (i + 1) for i in range(cycles)]
    targets, resets = {ends[-1]: sparsity}, frozenset(ends)
    return ReferenceMethod(
        start=initial_sparsity, targets=targets, resets=resets, **rest
    )


def straight_through(
    sparsity, end_step, *, interval=100, penalty=0.0, **rest
) -> ReferenceMethod:
    def outside(_, mask, marked):
        return np.where(mask, 0.0, penalty)

    parts = {"scope": "layer", "penalty": outside if penalty else None, **rest}
    return gmp(sparsity, end_step, interval=interval, weights="dense", **parts)


def top_kast(
    sparsity, *, backward_sparsity, interval=100, penalty=1e-4, **rest
) -> ReferenceMethod:
    def exploration(_, mask, marked):
        explored = np.where(marked, penalty / (1.0 - sparsity), 0.0)
        return np.where(mask, penalty, explored)

    return ReferenceMethod(
        start=sparsity,
        weights="dense",
        refresh=interval,
        marked=backward_sparsity,
        penalty=exploration if penalty else None,
        **{"scope": "layer", "distribution": "uniform", **rest},
    )


def greg1(sparsity, **rest) -> ReferenceMethod:
    # The weights are picked at once, by no penalty.
    return greg2(sparsity, pick_growth=1.0, pick_ceiling=0.0, **rest)


def greg2(
    sparsity,
    *,
    interval=10,
    growth=1e-4,
    ceiling=1.0,
    settle_steps=10_000,
    pick_growth=1e-5,
    pick_ceiling=1e-2,
    weight_decay=0.0,
    **rest,
) -> ReferenceMethod:
    increases = math.floor((ceiling - pick_ceiling) / growth + 1e-6) + 1
    pick = interval * math.ceil(pick_ceiling / pick_growth - 1e-6)
    prune = pick + increases * interval + settle_steps

    def growing(before, _, marked):
        if before >= prune:
            return np.zeros(marked.shape)
        if before < pick:
            return np.full(marked.shape, pick_growth * (before // interval + 1))
        grown = min((before - pick) // interval + 1, increases)
        return np.where(marked, 0.0 - weight_decay, pick_ceiling + growth * grown)

    return ReferenceMethod(
        start=0.0,
        targets={prune: sparsity},
        prune=marked_first,
        marked=sparsity,
        marks=frozenset({pick}),
        penalty=growing,
        **{"scope": "layer", "distribution": "uniform", **rest},
    )


# --- Training -----------------------------------------------------------------------


def initial_masks(
    method: ReferenceMethod, random_scores: Leaves, params: Leaves
) -> Leaves:
    """The masks that a method draws, or chooses among `params`, at the start."""
    everywhere = [np.ones(s.shape, bool) for s in random_scores]
    shapes = [s.shape for s in random_scores]
    if method.weights != "sparse" and method.start > 0:
        numbers = method.numbers(shapes, method.start)
        return method.choose([np.abs(p) for p in params], everywhere, numbers)
    within = dataclasses.replace(method, scope="layer")
    numbers = within.leaf_numbers(shapes, method.start)
    return within.choose(random_scores, everywhere, numbers)


class Sgd:
    """SGD with momentum; any other optimizer has these methods."""

    def __init__(self, params: Leaves, *, rate: float, momentum: float = 0.0) -> None:
        self.rate, self.momentum = np.float32(rate), np.float32(momentum)
        self.restart(params)

    def step(self, grads: Leaves, params: Leaves) -> Leaves:
        """Returns the updates to add to the parameters."""
        self.moments = each(lambda g, m: g + self.momentum * m, grads, self.moments)
        return [-self.rate * m for m in self.moments]

    def keep(self, keeps: Leaves) -> None:
        """Zeroes moments outside of `keeps`, which has None at leaves without masks."""
        self.moments = each(zeroed, self.moments, keeps)

    def restart(self, params: Leaves) -> None:
        self.moments = [np.zeros_like(p) for p in params]


def zeroed(x: np.ndarray, keep: np.ndarray | None) -> np.ndarray:
    return x if keep is None else np.where(keep, x, x.dtype.type(0))


def _added(p: np.ndarray, update: np.ndarray) -> np.ndarray:
    return (p + update).astype(p.dtype)


class ReferenceTraining:
    """Training by a method, one step at a time.

    Lists have an item for every parameter, None for one that carries no mask. `marked`
    are the second masks, `averages` those of the gradient; `keeps` are the weights that
    kept value and moments, None also where the method moves all weights.
    """

    def __init__(
        self,
        method: ReferenceMethod,
        params: Leaves,
        masks: Leaves,
        optimizer: Any,
        *,
        steers: bool = True,
    ) -> None:
        """Begins training.

        With `steers`, the method wraps the optimizer (`Sgd`, or another one with its
        methods), which then sees masked gradients. Else it comes after it as the last
        link of a chain.
        """
        self.method, self.optimizer, self.steers = method, optimizer, steers
        self.params = [p.copy() for p in params]
        self.masks = [None if m is None else m.copy() for m in masks]
        self.step_count = 0
        self.threshold = method.threshold
        self.updates, self.keeps = [], []
        self.averages = [
            None if m is None else np.zeros(m.shape, np.float32) for m in masks
        ]
        self.plan = method.plan([m.shape for m in self.masked(masks)])
        self.marked = [None for _ in masks]
        if method.marked is not None:
            self._mark(self.params)

    def masked(self, arrays: Leaves) -> Leaves:
        """The arrays of parameters that carry a mask."""
        return [x for x, m in zip(arrays, self.masks, strict=True) if m is not None]

    def spread(self, arrays: Leaves) -> Leaves:
        """The inverse of `masked`, with None at parameters that carry no mask."""
        rest = iter(arrays)
        return [None if m is None else next(rest) for m in self.masks]

    @np.errstate(invalid="ignore", over="ignore")
    def step(
        self,
        grads: Leaves,
        random_scores: Callable[[int], Leaves] | None = None,
        adjust: Callable[[list[int], list[int]], None] | None = None,
        factors: Callable[[int], dict[str, Any]] | None = None,
    ) -> None:
        """Takes one optimizer step, and updates the masks if the step is due.

        `random_scores` gives an array for each mask, by the step. `adjust(grown, room)`
        may change in place how many weights each leaf grows where they move between
        leaves. `factors` gives, by the step, the odd numbers that put equal scores in a
        random order when weights are dropped, grown and revived; without it the first
        index comes first.
        """
        method, old = self.method, self.masks
        advances = self.step_count < LAST_STEP
        self.step_count += advances
        t = self.step_count
        if advances and t - 1 in method.resets:
            self.optimizer.restart(self.params)
            self.optimizer.keep(old)
        reach = {"sparse": old, "dense": self.marked}.get(method.weights)
        seen = self._penalised(grads)
        if self.steers and reach is not None:
            seen = each(zeroed, seen, reach)
        changes = self.optimizer.step(seen, self.params)
        if method.weights == "dense":
            changes = each(zeroed, changes, reach)
        stepped = each(_added, self.params, changes)
        if method.decay is not None:
            self.averages = self._averaged(grads)
        if method.weights != "sparse":
            self._choose_again(stepped, changes)
            return
        stepped = each(zeroed, stepped, old)
        new = kept = self.masked(old)
        if advances:
            odd = {} if factors is None else factors(t)
            new, kept = self._update(stepped, grads, random_scores, adjust, odd)
        self.keeps = self.spread(each(operator.and_, kept, new))
        self.masks = self.spread(new)
        self._move(changes)
        if t in method.marks and advances:
            self._mark(self.params)
        if self.steers:
            self.optimizer.keep(self.keeps)

    def _choose_again(self, stepped: Leaves, changes: Leaves) -> None:
        """Chooses masks among all weights, for methods whose weights are not sparse."""
        method, t = self.method, self.step_count
        if t % method.refresh == 0 or t in method.targets:
            weights = self.masked(stepped)
            numbers = method.numbers([p.shape for p in weights], method.sparsity(t))
            everywhere = [np.ones(p.shape, bool) for p in weights]
            chosen = method.choose([np.abs(p) for p in weights], everywhere, numbers)
            self.masks = self.spread(chosen)
            if method.marked is not None:
                self._mark(stepped)
        projects = method.weights == "projected"
        self.keeps = self.masks if projects else [None for _ in self.masks]
        self._move(changes)
        if self.steers and (projects or method.marked is not None):
            self.optimizer.keep(self.masks if projects else self.marked)

    def _move(self, changes: Leaves) -> None:
        """Adds the updates, and zeroes the other weights by adding their negative.

        So a weight that is not finite becomes NaN where it should become zero.
        """

        def update(p: np.ndarray, u: np.ndarray, keep: np.ndarray | None) -> np.ndarray:
            u = u.astype(np.promote_types(u.dtype, p.dtype))
            return u if keep is None else np.where(keep, u, -p.astype(u.dtype))

        self.updates = each(update, self.params, changes, self.keeps)
        self.params = each(_added, self.params, self.updates)

    def _averaged(self, grads: Leaves) -> Leaves:
        decay = np.float32(self.method.decay)
        rest = np.float32(1.0 - self.method.decay)
        return each(
            lambda a, g: None if a is None else decay * a + rest * g.astype(np.float32),
            *(self.averages, grads),
        )

    def _mark(self, params: Leaves) -> None:
        method, weights = self.method, self.masked(params)
        among = self.masked(self.masks)
        if method.weights == "dense":
            among = [np.ones(p.shape, bool) for p in weights]
        numbers = method.numbers([p.shape for p in weights], method.marked)
        if method.weights == "sparse" and method.makes_up:
            numbers = within_reach(numbers, method.active(among))
        chosen = method.choose([np.abs(p) for p in weights], among, numbers)
        self.marked = self.spread(chosen)

    def _penalised(self, grads: Leaves) -> Leaves:
        if self.method.penalty is None:
            return grads
        penalty, before = self.method.penalty, self.step_count - 1

        def add(p: Any, g: np.ndarray, mask: Any, marked: Any) -> np.ndarray:
            if mask is None:
                return g
            size = penalty(before, mask, marked).astype(np.float32)
            return g + (size * p.astype(np.float32)).astype(g.dtype)

        return each(add, self.params, grads, self.masks, self.marked)

    def _update(
        self, stepped, grads, random_scores, adjust, odd
    ) -> tuple[Leaves, Leaves]:
        """The new masks, and the old weights that no phase before the last removed."""
        method, t = self.method, self.step_count
        old = self.masked(self.masks)
        weights, dense = self.masked(stepped), self.masked(grads)

        def score(function: Score, weights: Leaves, present: Leaves) -> Leaves:
            averages, marked = self.masked(self.averages), self.masked(self.marked)
            drawn = [None] * len(old)
            if function is random:
                drawn = random_scores(t)
            columns = (weights, dense, present, averages, marked, drawn)
            return each(lambda *row: np.asarray(function(Inputs(*row))), *columns)

        new = kept = old
        if method.targets and t in self.plan:
            number = self.plan[t]
            if method.makes_up:
                number = within_reach(number, method.active(new))
            scores = score(method.prune, weights, new)
            new = kept = method.pruned(scores, new, number)
            if method.revive is not None:
                scores = score(method.revive, weights, new)
                new = self._revived(new, scores, number, odd)
        if t not in method.fractions:
            return new, each(operator.and_, old, kept)
        present = each(zeroed, weights, new)
        left, freed = self._dropped(
            new, score(method.drop, present, new), odd.get("drop")
        )
        scores = score(method.grow, weights, left)
        grown = freed
        if method.across or method.threshold is not None:
            shares = [int(m.sum()) for m in left]
            if method.across:
                shares = each(_mean, scores, old)
            room = method.active([~m for m in left])
            grown = redistributed(sum(freed), shares, room)
            if adjust is not None:
                adjust(grown, room)
        if method.structure is not None and not method.structure.whole:
            sides = method.structure.sides
            before = [boxed(m, sides(m.shape)).sum(axis=-1) for m in new]
            new = method.filled(left, scores, before, odd.get("grow"))
        else:
            within = dataclasses.replace(method, scope="layer")
            unused = [~m for m in left]
            chosen = within.choose(scores, unused, grown, odd.get("grow"))
            new = each(operator.or_, left, chosen)
        return new, each(operator.and_, old, kept)

    def _revived(
        self, masks: Leaves, scores: Leaves, number: list[int], odd: dict[str, Any]
    ) -> Leaves:
        method = self.method
        if method.structure is not None and not method.structure.whole:
            return method.filled(masks, scores, number, odd.get("revive"))
        active = method.active(masks)
        if method.ranks_across:
            active = [sum(active)]
        missing = each(lambda n, a: max(n - a, 0), number, active)
        factors = odd.get("revive across" if method.ranks_across else "revive")
        back = method.choose(scores, [~m for m in masks], missing, factors)
        return each(operator.or_, masks, back)

    def _dropped(
        self, masks: Leaves, scores: Leaves, factors: Any
    ) -> tuple[Leaves, list[int]]:
        """The masks without what the exchange drops, and how much each leaf drops."""
        method = self.method
        fraction = method.fractions[self.step_count]
        active = method.active(masks)
        if method.threshold is not None:
            left = each(lambda m, s: m & (s >= self.threshold), masks, scores)
            freed = each(lambda a, m: a - int(m.sum()), active, left)
            wanted = fraction * sum(active)
            if sum(freed) < 0.9 * wanted:
                self.threshold *= 2
            elif sum(freed) > 1.1 * wanted:
                self.threshold /= 2
            return left, freed
        freed = [number_dropped(fraction, a) for a in active]
        number = each(operator.sub, active, freed)
        within = dataclasses.replace(method, scope="layer")
        if method.structure is not None and not method.structure.whole:
            within = dataclasses.replace(within, structure=None)
        return within.choose(scores, masks, number, factors), freed


def _mean(score: np.ndarray, mask: np.ndarray) -> float:
    """Mean score of the active weights of a leaf; what is not finite counts as zero."""
    finite = np.where(np.isfinite(score), score, 0)[mask]
    return float(finite.mean(dtype=np.float64)) if mask.any() else 0.0
