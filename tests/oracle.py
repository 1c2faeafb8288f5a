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
) -> list[int]:
    """Largest remainder: the floors, then one more each, in order of the remainder."""
    sizes = [math.prod(shape) for shape in shapes]
    caps = sizes if caps is None else caps
    share = densities(shapes, sparsity, distribution)
    ideal = [d * n for d, n in zip(share, sizes, strict=True)]
    kept = [min(math.floor(x), cap) for x, cap in zip(ideal, caps, strict=True)]
    order = sorted(range(len(sizes)), key=lambda i: (kept[i] - ideal[i], i))
    total = total_count(sum(sizes), sparsity)
    while sum(kept) < total:
        for i in order:
            if sum(kept) < total and kept[i] < caps[i]:
                kept[i] += 1
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


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What happens when.

    Attributes:
      start: sparsity of the initial masks.
      targets: sparsity to prune to, by step; only the steps that prune.
      fractions: prune fraction of the exchange, by step; only the steps that exchange.
      distribution: of initial masks and of pruning within layers.
      scope: of pruning.
      grow: "gradient", "random" or "momentum".
      decay: of the moving average of the dense gradient, or None.
      across: whether the exchange moves weights from leaf to leaf.
    """

    start: float
    targets: dict[int, float] = dataclasses.field(default_factory=dict)
    fractions: dict[int, float] = dataclasses.field(default_factory=dict)
    distribution: str = "erk"
    scope: str = "global"
    grow: str = "gradient"
    decay: float | None = None
    across: bool = False

    @property
    def update_steps(self) -> list[int]:
        return sorted(self.targets | self.fractions)


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


# --- Training -----------------------------------------------------------------------


def initial_masks(recipe: Recipe, random_scores: list) -> list:
    """The best-scored of every leaf, as many as the distribution gives it."""
    number = counts([s.shape for s in random_scores], recipe.start, recipe.distribution)
    everywhere = [np.ones(s.shape, bool) for s in random_scores]
    return best_per_leaf(random_scores, everywhere, number)


class Trainer:
    """SGD with momentum on maskable leaves, under a recipe, one step at a time.

    Attributes:
      step_count: steps done.
      params, moments, masks, accumulators: lists of arrays, one per maskable leaf.
    """

    def __init__(
        self,
        recipe: Recipe,
        params: list,
        masks: list,
        *,
        rate: float,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        steers: bool = True,
    ):
        """`steers`: the optimizer sees masked gradients and its moments are masked
        (transform with `inner`), or else dense ones (transform as the last link)."""
        self.recipe = recipe
        self.params = [p.copy() for p in params]
        self.masks = [m.copy() for m in masks]
        self.moments = [np.zeros_like(p) for p in params]
        self.accumulators = [np.zeros(p.shape, np.float32) for p in params]
        self.rate, self.momentum, self.nesterov = rate, momentum, nesterov
        self.weight_decay, self.steers = weight_decay, steers
        self.step_count = 0

    def step(
        self,
        grads: list,
        random_scores: Callable[[int], list] | None = None,
    ) -> None:
        """One optimizer step with these dense gradients, and the mask update if due.

        `random_scores(t)` gives the scores of step t, for recipes that grow at random.
        """
        self.step_count += 1
        recipe, t = self.recipe, self.step_count
        stepped = []
        for i, (p, g, m) in enumerate(zip(self.params, grads, self.masks, strict=True)):
            scalar = p.dtype.type
            if self.steers:
                g = np.where(m, g, scalar(0))
            g = g + scalar(self.weight_decay) * p
            self.moments[i] = g + scalar(self.momentum) * self.moments[i]
            if self.nesterov:
                direction = g + scalar(self.momentum) * self.moments[i]
            else:
                direction = self.moments[i]
            stepped.append(np.where(m, p + scalar(-self.rate) * direction, scalar(0)))
        if recipe.decay is not None:
            decay = np.float32(recipe.decay)
            self.accumulators = [
                decay * a + np.float32(1.0 - recipe.decay) * g
                for a, g in zip(self.accumulators, grads, strict=True)
            ]
        old = survivors = new = self.masks
        size = [np.abs(p) for p in stepped]
        if t in recipe.targets:
            survivors = new = self._prune(size, new, recipe.targets[t])
        if t in recipe.fractions:
            new = self._exchange(size, grads, old, new, random_scores)
        # The schedule's pruning is for good: what regrowth takes back starts at zero.
        for i, (survivor, after) in enumerate(zip(survivors, new, strict=True)):
            both = survivor & after
            self.params[i] = np.where(both, stepped[i], stepped[i].dtype.type(0))
            if self.steers:
                zero = self.moments[i].dtype.type(0)
                self.moments[i] = np.where(both, self.moments[i], zero)
        self.masks = new

    def _prune(self, size: list, masks: list, sparsity: float) -> list:
        recipe = self.recipe
        if recipe.scope == "global":
            total = total_count(sum(m.size for m in masks), sparsity)
            return best_across(size, masks, total)
        shapes = [m.shape for m in masks]
        present = [int(m.sum()) for m in masks]
        number = counts(shapes, sparsity, recipe.distribution, caps=present)
        return best_per_leaf(size, masks, number)

    def _exchange(self, size, grads, old, masks, random_scores) -> list:
        recipe, t = self.recipe, self.step_count
        dropped = [number_dropped(recipe.fractions[t], int(m.sum())) for m in masks]
        left = [int(m.sum()) - d for m, d in zip(masks, dropped, strict=True)]
        kept = best_per_leaf(size, masks, left)
        if recipe.grow == "gradient":
            scores = [np.abs(g) for g in grads]
        elif recipe.grow == "momentum":
            scores = [np.abs(a) for a in self.accumulators]
        else:
            scores = random_scores(t)
        grown = dropped
        if recipe.across:
            means = [
                float(s[m].mean(dtype=np.float64)) if m.any() else 0.0
                for s, m in zip(scores, old, strict=True)
            ]
            room = [int((~m).sum()) for m in kept]
            grown = redistributed(sum(dropped), means, room)
        chosen = best_per_leaf(scores, [~m for m in kept], grown)
        return [m | c for m, c in zip(kept, chosen, strict=True)]
