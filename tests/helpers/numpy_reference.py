"""A slow, plain NumPy implementation of the methods, to hold the library against.

Written from the specification alone; nothing here comes from granet_jax. Everything is
sorted, one leaf or one concatenated vector at a time, and every number is an integer or
a float64 on the host. Random scores are an input (see `Trainer.step`).

Arithmetic: parameters and moments are float32 arrays, stepped one rounding at a time.
With a learning rate, momentum, weight decay and accumulator decay that are powers of
two, every product is exact, and a fused multiply-add gives the same bits.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

# --- Numbers of weights -------------------------------------------------------------


def total_count(size: int, sparsity: float) -> int:
    return math.floor((1.0 - sparsity) * size + 0.5)


def densities(shapes: Sequence[tuple], sparsity: float, distribution: str) -> list:
    """The epsilon loop, as the specification tells it."""
    density = 1.0 - sparsity
    if distribution == "uniform":
        return [density for _ in shapes]
    sizes = [math.prod(shape) for shape in shapes]
    raw = []
    for shape, size in zip(shapes, sizes, strict=True):
        dims = shape if distribution == "erk" else shape[-2:]
        raw.append(sum(dims) / math.prod(dims) if size else 0.0)
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
    distribution: str,
    caps: Sequence[int] | None = None,
    least: Sequence[int] | None = None,
) -> list[int]:
    """Largest remainder: the floors, then one more each, in order of the remainder.

    `caps` and `least`: the most and the fewest that each leaf may have. Where those
    that must have more leave too little, the last of the order give theirs up.
    """
    sizes = [math.prod(shape) for shape in shapes]
    caps = sizes if caps is None else caps
    least = [0 for _ in sizes] if least is None else least
    share = densities(shapes, sparsity, distribution)
    ideal = [d * n for d, n in zip(share, sizes, strict=True)]
    kept = [
        max(min(math.floor(x), cap), low)
        for x, cap, low in zip(ideal, caps, least, strict=True)
    ]
    order = sorted(range(len(sizes)), key=lambda i: (kept[i] - ideal[i], i))
    total = total_count(sum(sizes), sparsity)
    while sum(kept) < total:
        for i in order:
            if sum(kept) < total and kept[i] < caps[i]:
                kept[i] += 1
    while sum(kept) > total:
        for i in reversed(order):
            if sum(kept) > total and kept[i] > least[i]:
                kept[i] -= 1
    return kept


def number_dropped(fraction: float, active: int) -> int:
    fixed = min(math.floor(fraction * 2**32), 2**32 - 1)
    return -(-fixed * active // 2**32)


def redistributed(total: int, weights: Sequence[float], room: Sequence[int]) -> list:
    """`total` in proportion to `weights`, floors first; what a full leaf cannot take
    goes to the others in proportion, and the rest one each to the first with room."""
    given = [0 for _ in room]
    while sum(given) < total:
        left = total - sum(given)
        space = [r - g for r, g in zip(room, given, strict=True)]
        mass = [w if s else 0.0 for w, s in zip(weights, space, strict=True)]
        if sum(mass) == 0.0:
            mass = [float(s) for s in space]
        poured = [
            min(math.floor(left * m / math.fsum(mass)), s)
            for m, s in zip(mass, space, strict=True)
        ]
        if sum(poured) == 0:
            poured = [int(s > 0) for s in space]
            for i in range(len(room)):
                poured[i] = min(poured[i], left - sum(poured[:i]))
        given = [g + p for g, p in zip(given, poured, strict=True)]
    return given


# --- Selection ----------------------------------------------------------------------


def best(score: np.ndarray, candidate: np.ndarray, k: int) -> np.ndarray:
    """True at the k best candidates: larger first, NaN last, then lowest index first.

    One vector of scores in, one boolean vector out.
    """
    score = score.astype(np.float64)
    nan = np.isnan(score)
    # The last key is the first that lexsort looks at. -0.0 == 0.0 to it.
    order = np.lexsort(
        (np.arange(score.size), np.where(nan, 0.0, -score), nan, ~candidate)
    )
    chosen = np.zeros(score.size, bool)
    chosen[order[: min(int(k), int(candidate.sum()))]] = True
    return chosen


def best_per_leaf(scores: list, candidates: list, ks: Sequence[int]) -> list:
    return [
        best(s.ravel(), c.ravel(), k).reshape(s.shape)
        for s, c, k in zip(scores, candidates, ks, strict=True)
    ]


def best_across(scores: list, candidates: list, k: int) -> list:
    chosen = best(
        np.concatenate([s.ravel().astype(np.float64) for s in scores]),
        np.concatenate([c.ravel() for c in candidates]),
        k,
    )
    ends = np.cumsum([s.size for s in scores])[:-1]
    parts = np.split(chosen, ends)
    return [part.reshape(s.shape) for part, s in zip(parts, scores, strict=True)]


def continuing(stepped: np.ndarray, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The weights of a leaf that go on with their value and moments.

    Those active before and after, but for what pruning by magnitude had removed in
    between. An exchange within the leaf leaves its number of active weights as it is,
    so pruning kept the `new.sum()` largest.
    """
    size = np.abs(stepped.astype(np.float64))
    kept = best(size.ravel(), old.ravel(), int(new.sum())).reshape(old.shape)
    return new & kept


# --- Methods ------------------------------------------------------------------------


# From (steps before this one, mask, marked) to the L2 coefficients of a leaf.
Coefficients = Callable[[int, np.ndarray, np.ndarray | None], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What happens when.

    Attributes:
      start: sparsity of the initial masks.
      targets: sparsity from a step on, by step; only the steps that change masks for
        it.
      fractions: prune fraction of the exchange, by step; only the steps that exchange.
      distribution: of initial masks, and of all that is done within layers.
      scope: of pruning, reviving and choosing.
      grow: "gradient", "random" or "momentum".
      decay: of the moving average of the dense gradient, or None.
      across: whether the exchange moves weights from leaf to leaf.
      revive: "magnitude" or "gradient", by which weights come back where the sparsity
        falls; None if none do.
      resets: the steps after which moments start anew, as the next one begins.
      weights: "sparse"; "projected", where the optimizer moves all weights and the
        largest stay; or "dense", where all live on.
      refresh: steps from one choice among all weights to the next.
      marked: sparsity of the second masks, or None.
      marks: the steps that choose them anew, with sparse weights.
      penalty: extra L2 coefficients, or None.
    """

    start: float
    targets: dict[int, float] = dataclasses.field(default_factory=dict)
    fractions: dict[int, float] = dataclasses.field(default_factory=dict)
    distribution: str = "erk"
    scope: str = "global"
    grow: str = "gradient"
    decay: float | None = None
    across: bool = False
    revive: str | None = None
    resets: frozenset[int] = frozenset()
    weights: str = "sparse"
    refresh: int = 1
    marked: float | None = None
    marks: frozenset[int] = frozenset()
    penalty: Coefficients | None = None

    @property
    def update_steps(self) -> list[int]:
        return sorted(self.targets | self.fractions)

    def sparsity(self, step: int) -> float:
        """That the masks are to have after a step."""
        reached = [t for t in self.targets if t <= step]
        return self.targets[max(reached)] if reached else self.start

    def number(self, shapes: Sequence[tuple], sparsity: float, **bounds) -> list[int]:
        """Weights per leaf; with global scope one number, of all."""
        if self.scope == "global":
            return [total_count(sum(map(math.prod, shapes)), sparsity)]
        return counts(shapes, sparsity, self.distribution, **bounds)

    def plan(self, shapes: Sequence[tuple]) -> dict[int, tuple[list[int], int]]:
        """By step of `targets`: the numbers to reach, and whether they fall or rise.

        -1 where fewer weights are to be active than after the target before, 1 where
        more (and some come back), else 0.
        """
        now = counts(shapes, self.start, self.distribution)
        if self.scope == "global":
            now = [sum(now)]
        found = {}
        for step in sorted(self.targets):
            wanted = self.number(shapes, self.targets[step])
            change = sum(wanted) - sum(now)
            if change < 0 and self.scope == "layer":
                wanted = self.number(shapes, self.targets[step], caps=now)
            elif change > 0 and self.scope == "layer" and self.revive is not None:
                wanted = self.number(shapes, self.targets[step], least=now)
            if change < 0 or (change > 0 and self.revive is not None):
                now = wanted
            else:
                change = 0
            found[step] = (now, int(np.sign(change)))
        return found


def _cubic(final, initial, begin, end, interval) -> dict[int, float]:
    n = (end - begin) // interval
    targets = {
        begin + j * interval: final + (initial - final) * (1.0 - j / n) ** 3
        for j in range(1, n)
    }
    return {**targets, begin + n * interval: final}


def _steps(interval: int, last: int, begin: int = 0) -> list[int]:
    return [t for t in range(1, last + 1) if (t - begin) % interval == 0]


def granet(
    sparsity,
    total_steps,
    *,
    initial_sparsity=0.0,
    begin_step=0,
    end_step=None,
    interval=1000,
    fraction=0.5,
    final_fraction=0.005,
    distribution="erk",
    scope="global",
    grow="gradient",
) -> Recipe:
    end_step = total_steps // 2 if end_step is None else end_step
    return Recipe(
        start=initial_sparsity,
        targets=_cubic(sparsity, initial_sparsity, begin_step, end_step, interval),
        fractions={
            t: final_fraction
            + (fraction - final_fraction)
            * (1 + math.cos(math.pi * t / total_steps))
            / 2
            for t in _steps(interval, total_steps, begin_step)
        },
        distribution=distribution,
        scope=scope,
        grow=grow,
        decay=0.9 if grow == "momentum" else None,
    )


def gmp(
    sparsity,
    end_step,
    *,
    initial_sparsity=0.0,
    begin_step=0,
    interval=1000,
    scope="global",
    distribution="uniform",
) -> Recipe:
    return Recipe(
        start=initial_sparsity,
        targets=_cubic(sparsity, initial_sparsity, begin_step, end_step, interval),
        distribution=distribution,
        scope=scope,
    )


def rigl(
    sparsity, total_steps, *, interval=100, fraction=0.3, stop=0.75, distribution="erk"
) -> Recipe:
    return Recipe(
        start=sparsity,
        fractions={
            t: fraction / 2 * (1 + math.cos(math.pi * t / (stop * total_steps)))
            for t in _steps(interval, math.floor(stop * total_steps))
        },
        distribution=distribution,
    )


def set_(
    sparsity, total_steps, *, interval=100, fraction=0.3, distribution="erk"
) -> Recipe:
    return Recipe(
        start=sparsity,
        fractions=dict.fromkeys(_steps(interval, total_steps), fraction),
        distribution=distribution,
        grow="random",
    )


def snfs(
    sparsity,
    total_steps,
    *,
    interval=100,
    fraction=0.5,
    decay=0.9,
    distribution="uniform",
) -> Recipe:
    return Recipe(
        start=sparsity,
        fractions={
            t: fraction / 2 * (1 + math.cos(math.pi * t / total_steps))
            for t in _steps(interval, total_steps)
        },
        distribution=distribution,
        grow="momentum",
        decay=decay,
        across=True,
    )


def static(sparsity, *, distribution="erk") -> Recipe:
    return Recipe(start=sparsity, distribution=distribution)


def cyclical(
    sparsity,
    total_steps,
    *,
    cycles=4,
    initial_sparsity=0.0,
    ramp=0.75,
    interval=100,
    recovery="hard",
    scope="global",
    distribution="uniform",
) -> Recipe:
    period = total_steps // cycles
    # Above the rounding of a product such as 0.29 * 100.
    end = math.floor(ramp * period + 1e-6)
    rise = _cubic(sparsity, initial_sparsity, 0, end, interval)
    targets = {}
    for cycle in range(cycles):
        if cycle:
            targets[cycle * period] = initial_sparsity
        targets |= {cycle * period + t: s for t, s in rise.items()}
    return Recipe(
        start=initial_sparsity,
        targets=targets,
        distribution=distribution,
        scope=scope,
        revive="gradient" if initial_sparsity > 0 and cycles > 1 else "magnitude",
        weights={"hard": "sparse", "straight_through": "dense"}.get(recovery, recovery),
    )


def acdc(sparsity, switches, *, scope="global", distribution="uniform") -> Recipe:
    return Recipe(
        start=0.0,
        targets={t: 0.0 if i % 2 else sparsity for i, t in enumerate(switches)},
        distribution=distribution,
        scope=scope,
        revive="magnitude",
        resets=frozenset(switches[1::2]),
    )


def sculpt(
    sparsity,
    total_steps,
    *,
    cycles,
    initial_sparsity=0.8,
    scope="global",
    distribution="erk",
) -> Recipe:
    period = total_steps // (cycles + 1)
    return Recipe(
        start=initial_sparsity,
        targets={cycles * period: sparsity},
        distribution=distribution,
        scope=scope,
        resets=frozenset(period * (i + 1) for i in range(cycles)),
    )


def straight_through(
    sparsity,
    end_step,
    *,
    initial_sparsity=0.0,
    begin_step=0,
    interval=100,
    penalty=0.0,
    scope="layer",
    distribution="uniform",
) -> Recipe:
    return Recipe(
        start=initial_sparsity,
        targets=_cubic(sparsity, initial_sparsity, begin_step, end_step, interval),
        distribution=distribution,
        scope=scope,
        weights="dense",
        penalty=(lambda _, mask, marked: np.where(mask, 0.0, penalty))
        if penalty
        else None,
    )


def top_kast(
    sparsity,
    *,
    backward_sparsity,
    interval=100,
    penalty=1e-4,
    scope="layer",
    distribution="uniform",
) -> Recipe:
    def coefficients(_, mask, marked):
        explored = np.where(marked, penalty / (1.0 - sparsity), 0.0)
        return np.where(mask, penalty, explored)

    return Recipe(
        start=sparsity,
        distribution=distribution,
        scope=scope,
        weights="dense",
        refresh=interval,
        marked=backward_sparsity,
        penalty=coefficients if penalty else None,
    )


def greg1(
    sparsity,
    *,
    interval=10,
    growth=1e-4,
    ceiling=1.0,
    settle_steps=10_000,
    scope="layer",
    distribution="uniform",
) -> Recipe:
    increases = math.floor(ceiling / growth + 1e-6) + 1
    last = increases * interval

    def coefficients(before, _, marked):
        size = growth * min(before // interval + 1, increases)
        return np.where(marked | (before >= last + settle_steps), 0.0, size)

    return Recipe(
        start=0.0,
        targets={last + settle_steps: sparsity},
        distribution=distribution,
        scope=scope,
        marked=sparsity,
        penalty=coefficients,
    )


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
    scope="layer",
    distribution="uniform",
) -> Recipe:
    increases = math.floor((ceiling - pick_ceiling) / growth + 1e-6) + 1
    pick = interval * math.ceil(pick_ceiling / pick_growth - 1e-6)
    prune = pick + increases * interval + settle_steps

    def coefficients(before, _, marked):
        if before >= prune:
            return np.zeros(marked.shape)
        if before < pick:
            return np.full(marked.shape, pick_growth * (before // interval + 1))
        grown = min((before - pick) // interval + 1, increases)
        return np.where(marked, -weight_decay, pick_ceiling + growth * grown)

    return Recipe(
        start=0.0,
        targets={prune: sparsity},
        distribution=distribution,
        scope=scope,
        marked=sparsity,
        marks=frozenset({pick}),
        penalty=coefficients,
    )


# --- Training -----------------------------------------------------------------------

LAST_STEP = 2**31 - 1


def initial_masks(recipe: Recipe, random_scores: list, params: list) -> list:
    """The best-scored of every leaf, as many as the distribution gives it.

    But those of a method that chooses among all weights are chosen among `params`.
    """
    everywhere = [np.ones(s.shape, bool) for s in random_scores]
    if recipe.weights != "sparse" and recipe.start > 0:
        return _choice(recipe, recipe.start, params, everywhere)
    number = counts([s.shape for s in random_scores], recipe.start, recipe.distribution)
    return best_per_leaf(random_scores, everywhere, number)


def _choice(recipe: Recipe, sparsity: float, params: list, among: list) -> list:
    """The masks of a sparsity among weights, by magnitude."""
    number = recipe.number([p.shape for p in params], sparsity)
    return _best(recipe, [np.abs(p) for p in params], among, number)


def _best(recipe: Recipe, scores: list, among: list, number: list[int]) -> list:
    if recipe.scope == "global":
        return best_across(scores, among, number[0])
    return best_per_leaf(scores, among, number)


class Sgd:
    """SGD with momentum, one rounding at a time.

    Any other optimizer of a `Trainer` has the same methods.

    Attributes:
      moments: list of arrays, one per parameter.
    """

    def __init__(
        self, params: list, *, rate, momentum=0.0, nesterov=False, weight_decay=0.0
    ):
        self.moments = [np.zeros_like(p) for p in params]
        self.rate, self.momentum, self.nesterov = rate, momentum, nesterov
        self.weight_decay = weight_decay

    def step(self, grads: list, params: list) -> list:
        """What to add to the parameters."""
        updates = []
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            scalar = p.dtype.type
            g = g + scalar(self.weight_decay) * p
            self.moments[i] = g + scalar(self.momentum) * self.moments[i]
            direction = self.moments[i]
            if self.nesterov:
                direction = g + scalar(self.momentum) * direction
            updates.append(scalar(-self.rate) * direction)
        return updates

    def keep(self, keeps: list) -> None:
        """Zeroes moments elsewhere; None at parameters without masks."""
        self.moments = [zeroed(x, k) for x, k in zip(self.moments, keeps, strict=True)]

    def restart(self, params: list) -> None:
        """Starts all moments anew."""
        self.moments = [np.zeros_like(p) for p in params]


def zeroed(x: np.ndarray, keep: np.ndarray | None) -> np.ndarray:
    return x if keep is None else np.where(keep, x, x.dtype.type(0))


class Trainer:
    """Training under a recipe, one step at a time.

    Attributes:
      step_count: steps done.
      params: list of arrays.
      masks: list of boolean arrays, None at parameters that carry no mask.
      marked: the second masks, likewise.
      accumulators: list of arrays, likewise.
      updates: what the last step added to the parameters.
      keeps: the weights that it moved, None at parameters that carry no mask, or where
        the method moves all.
    """

    def __init__(
        self,
        recipe: Recipe,
        params: list,
        masks: list,
        optimizer,
        *,
        steers: bool = True,
        drawn: list | None = None,
    ):
        """The start of training.

        Args:
          recipe: the method.
          params: as training begins.
          masks: as training begins.
          optimizer: such as `Sgd`.
          steers: the optimizer sees masked gradients and its moments are masked
            (transform with `inner`), or else dense ones (transform as the last link).
          drawn: the parameters among which the first marked weights are chosen, where
            they are others than `params`.
        """
        self.recipe, self.optimizer, self.steers = recipe, optimizer, steers
        self.params = [p.copy() for p in params]
        self.masks = [None if m is None else m.copy() for m in masks]
        self.step_count = 0
        self.updates, self.keeps = [], []
        self.accumulators = [
            None if m is None else np.zeros(m.shape, np.float32) for m in masks
        ]
        self.plan = recipe.plan([m.shape for m in self.masked(masks)])
        self.marked = [None for _ in masks]
        if recipe.marked is not None:
            self._mark(self.params if drawn is None else drawn)

    def masked(self, arrays: list) -> list:
        """Those of the parameters that carry a mask."""
        pairs = zip(arrays, self.masks, strict=True)
        return [x for x, m in pairs if m is not None]

    def spread(self, arrays: list) -> list:
        """The reverse: with None at the parameters without."""
        rest = iter(arrays)
        return [None if m is None else next(rest) for m in self.masks]

    # What is not finite is calculated with as anything else.
    @np.errstate(invalid="ignore", over="ignore")
    def step(
        self,
        grads: list,
        random_scores: Callable[[int], list] | None = None,
        given: Callable[[list[int], list[int]], None] | None = None,
    ) -> None:
        """One optimizer step with these dense gradients, and the mask update if due.

        `random_scores(t)` gives the scores of step t, for recipes that grow at random.
        `given(grown, room)` may change how many weights each leaf is given, where the
        exchange moves them between leaves.
        """
        # The counter of steps ends there.
        advances = self.step_count < LAST_STEP
        self.step_count += advances
        recipe, t, old = self.recipe, self.step_count, self.masks
        if advances and t - 1 in recipe.resets:
            self.optimizer.restart(self.params)
            self.optimizer.keep(old)
        reach = {"sparse": old, "dense": self.marked}.get(recipe.weights)
        seen = self._pressed(grads)
        if self.steers and reach is not None:
            seen = [zeroed(g, r) for g, r in zip(seen, reach, strict=True)]
        changes = self.optimizer.step(seen, self.params)
        if recipe.weights == "dense":
            changes = [zeroed(u, r) for u, r in zip(changes, reach, strict=True)]
        stepped = [
            (p + u).astype(p.dtype) for p, u in zip(self.params, changes, strict=True)
        ]
        if recipe.decay is not None:
            decay = np.float32(recipe.decay)
            self.accumulators = [
                None
                if a is None
                else decay * a + np.float32(1.0 - recipe.decay) * g.astype(np.float32)
                for a, g in zip(self.accumulators, grads, strict=True)
            ]
        if recipe.weights == "sparse":
            stepped = [zeroed(p, m) for p, m in zip(stepped, old, strict=True)]
            new, survivors = [self.masked(old)] * 2
            if advances:
                new, survivors = self._update(stepped, grads, random_scores, given)
            # The schedule's pruning is for good: what regrowth takes back starts anew.
            self.keeps = self.spread(
                [s & n for s, n in zip(survivors, new, strict=True)]
            )
            self.masks = self.spread(new)
            self._move(changes)
            if t in recipe.marks and advances:
                self._mark(self.params)
            if self.steers:
                self.optimizer.keep(self.keeps)
        else:
            if t % recipe.refresh == 0 or t in recipe.targets:
                weights = self.masked(stepped)
                everywhere = [np.ones(p.shape, bool) for p in weights]
                chosen = _choice(recipe, recipe.sparsity(t), weights, everywhere)
                self.masks = self.spread(chosen)
                if recipe.marked is not None:
                    self._mark(stepped)
            projects = recipe.weights == "projected"
            self.keeps = self.masks if projects else [None for _ in old]
            self._move(changes)
            if self.steers and (projects or recipe.marked is not None):
                self.optimizer.keep(self.masks if projects else self.marked)

    def _move(self, changes: list) -> None:
        """To the stepped parameters, or to zero.

        By adding: what was not finite and is to be zero becomes NaN.
        """
        wide = [
            u.astype(np.promote_types(u.dtype, p.dtype))
            for p, u in zip(self.params, changes, strict=True)
        ]
        self.updates = [
            u if k is None else np.where(k, u, -p.astype(u.dtype))
            for p, u, k in zip(self.params, wide, self.keeps, strict=True)
        ]
        self.params = [
            (p + u).astype(p.dtype)
            for p, u in zip(self.params, self.updates, strict=True)
        ]

    def _mark(self, params: list) -> None:
        weights, among = self.masked(params), self.masked(self.masks)
        if self.recipe.weights == "dense":
            among = [np.ones(p.shape, bool) for p in weights]
        self.marked = self.spread(
            _choice(self.recipe, self.recipe.marked, weights, among)
        )

    def _pressed(self, grads: list) -> list:
        """The gradients with that of the penalty."""
        if self.recipe.penalty is None:
            return grads
        pressed = []
        for p, g, mask, marked in zip(
            self.params, grads, self.masks, self.marked, strict=True
        ):
            if mask is not None:
                size = self.recipe.penalty(self.step_count - 1, mask, marked)
                term = size.astype(np.float32) * p.astype(np.float32)
                g = g + term.astype(g.dtype)
            pressed.append(g)
        return pressed

    def _update(self, stepped, grads, random_scores, given) -> tuple[list, list]:
        """The masks after this step, and the weights that no pruning took from it."""
        recipe, t = self.recipe, self.step_count
        old = survivors = new = self.masked(self.masks)
        size = [np.abs(p) for p in self.masked(stepped)]
        dense = [np.abs(g) for g in self.masked(grads)]
        falling = any(change < 0 for _, change in self.plan.values())
        rising = any(change > 0 for _, change in self.plan.values())
        number, change = self.plan.get(t, ([], 0))
        # Where nothing is exchanged or revived, pruning is all that an update does, and
        # it prunes masks from elsewhere at any.
        alone = falling and not (recipe.fractions or rising)
        if number and (change < 0 or alone):
            first = size
            if recipe.marked is not None:
                first = [
                    np.where(m, np.float64(np.inf), s)
                    for m, s in zip(self.masked(self.marked), size, strict=True)
                ]
            survivors = new = _best(recipe, first, new, number)
        if rising and change:
            active = [int(m.sum()) for m in new]
            if recipe.scope == "global":
                active = [sum(active)]
            missing = [max(n - a, 0) for n, a in zip(number, active, strict=True)]
            scores = dense if recipe.revive == "gradient" else size
            back = _best(recipe, scores, [~m for m in new], missing)
            new = [m | b for m, b in zip(new, back, strict=True)]
        if t in recipe.fractions:
            new = self._exchange(size, dense, old, new, random_scores, given)
        # What was revived was not active before.
        kept = [o & s for o, s in zip(old, survivors, strict=True)]
        return new, kept

    def _exchange(self, size, dense, old, masks, random_scores, given) -> list:
        recipe, t = self.recipe, self.step_count
        dropped = [number_dropped(recipe.fractions[t], int(m.sum())) for m in masks]
        left = [int(m.sum()) - d for m, d in zip(masks, dropped, strict=True)]
        kept = best_per_leaf(size, masks, left)
        if recipe.grow == "gradient":
            scores = dense
        elif recipe.grow == "momentum":
            scores = [np.abs(a) for a in self.masked(self.accumulators)]
        else:
            scores = random_scores(t)
        grown = dropped
        if recipe.across:
            # As `mean_score` has it: what is not finite is left out of the sum.
            means = [
                float(np.where(np.isfinite(s), s, 0)[m].mean(dtype=np.float64))
                if m.any()
                else 0.0
                for s, m in zip(scores, old, strict=True)
            ]
            room = [int((~m).sum()) for m in kept]
            grown = redistributed(sum(dropped), means, room)
            if given is not None:
                given(grown, room)
        chosen = best_per_leaf(scores, [~m for m in kept], grown)
        return [m | c for m, c in zip(kept, chosen, strict=True)]
