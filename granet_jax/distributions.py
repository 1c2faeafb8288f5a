"""How a density is split over the leaves: uniform, ER, ERK; exact integer counts.

Plain Python on shapes, in float64: nothing here is traced.
"""

import math
from collections.abc import Callable, Sequence

from granet_jax.checks import check_fraction, check_integer, got

Shape = tuple[int, ...]
# Densities per leaf from shapes and an overall sparsity.
Distribution = str | Callable[[Sequence[Shape], float], Sequence[float]]
DISTRIBUTIONS: tuple[str, ...] = ("uniform", "er", "erk")


def total_count(size: int, sparsity: float) -> int:
    """Number of active weights among `size` at `sparsity`, rounded half up.

    Raises:
      TypeError, ValueError: no number of weights; a sparsity that is none in [0, 1].
    """
    check_integer("size", size, least=0)
    check_fraction("sparsity", sparsity)
    return math.floor((1.0 - sparsity) * size + 0.5)


def densities(
    shapes: Sequence[Shape], sparsity: float, distribution: Distribution = "erk"
) -> list[float]:
    """Density of every leaf, so that the whole has density 1 - `sparsity`.

    - "uniform": the same density in every leaf.
    - "er": proportional to (n_in + n_out) / (n_in n_out), the last two dimensions of
      the shape (Mocanu et al. 2018).
    - "erk": proportional to sum(shape) / prod(shape), kernel dimensions included
      (Evci et al. 2020).

    Where the proportional rule asks for more than 1, the leaves with the largest
    excess become dense and the others share what is left; repeated until none exceeds
    1 (the epsilon loop of the RigL code).

    Args:
      shapes: shapes of the maskable leaves.
      sparsity: overall sparsity in [0, 1].
      distribution: "uniform", "er", "erk", or a function of (shapes, sparsity) that
        returns the densities.

    Returns:
      One density in [0, 1] per leaf.

    Raises:
      ValueError: unknown distribution, or a function that returned densities that are
        not one number in [0, 1] per leaf; a sparsity out of range.
      TypeError: what is no shape, or no number.
    """
    _check_shapes(shapes)
    check_fraction("sparsity", sparsity)
    check_distribution(distribution)
    if callable(distribution):
        given = [float(d) for d in distribution(shapes, sparsity)]
        if len(given) != len(shapes) or not all(0.0 <= d <= 1.0 for d in given):
            raise ValueError(
                "distribution must return one density in [0, 1] for each of the "
                f"{len(shapes)} leaves, got {given}."
            )
        return given
    if distribution == "uniform":
        return [1.0 - sparsity] * len(shapes)
    raw = [_erdos_renyi(shape, kernel=distribution == "erk") for shape in shapes]
    return _scale_to_density(raw, [math.prod(s) for s in shapes], 1.0 - sparsity)


def counts(
    shapes: Sequence[Shape],
    sparsity: float,
    distribution: Distribution = "erk",
    caps: Sequence[int] | None = None,
    floors: Sequence[int] | None = None,
) -> list[int]:
    """Number of active weights in every leaf; they sum to the total exactly.

    The densities of `densities`, rounded by the largest-remainder rule (ties: the
    first leaf) so that the sum is `total_count` of all weights. The reference draws
    a Bernoulli mask instead, which hits the total only on average.

    Args:
      shapes: shapes of the maskable leaves.
      sparsity: overall sparsity in [0, 1].
      distribution: see `densities`.
      caps: most weights that each leaf may keep (those active now, say); default the
        leaf's size.
      floors: fewest weights that each leaf must keep (those active now, where weights
        are only to be added); default none.

    Returns:
      One integer per leaf.

    Raises:
      ValueError: as `densities`; or the caps leave less room than the total, or the
        floors ask for more.
    """
    _check_shapes(shapes)
    sizes = [math.prod(s) for s in shapes]
    for name, given in (("caps", caps), ("floors", floors)):
        if given is not None and len(given) != len(sizes):
            raise ValueError(
                f"{name} must be one for each of the {len(sizes)} leaves, got {given}."
            )
        for number in () if given is None else given:
            check_integer(name, number, least=0)
    limits = (
        sizes if caps is None else [min(c, n) for c, n in zip(caps, sizes, strict=True)]
    )
    total = total_count(sum(sizes), sparsity)
    if sum(limits) < total:
        raise ValueError(
            f"sparsity {sparsity} asks for {total} active weights, but caps let the "
            f"leaves hold {sum(limits)} at most: raise one of them."
        )
    least = [0] * len(sizes) if floors is None else list(floors)
    if sum(least) > total:
        raise ValueError(
            f"sparsity {sparsity} asks for {total} active weights, but floors make the "
            f"leaves keep {sum(least)} at least: lower one of them."
        )
    shares = densities(shapes, sparsity, distribution)
    ideal = [d * n for d, n in zip(shares, sizes, strict=True)]
    kept = [
        max(min(math.floor(x), limit), low)
        for x, limit, low in zip(ideal, limits, least, strict=True)
    ]
    # A stable sort: among equal remainders the first leaf is served first.
    by_remainder = sorted(range(len(sizes)), key=lambda i: kept[i] - ideal[i])
    missing = total - sum(kept)
    while missing > 0:
        for i in by_remainder:
            if missing > 0 and kept[i] < limits[i]:
                kept[i] += 1
                missing -= 1
    # A user's densities may ask for more than the total, and so may floors.
    while missing < 0:
        for i in reversed(by_remainder):
            if missing < 0 and kept[i] > least[i]:
                kept[i] -= 1
                missing += 1
    return kept


def _check_shapes(shapes: Sequence[Shape]) -> None:
    if not isinstance(shapes, Sequence) or isinstance(shapes, str):
        raise TypeError(f"shapes must be a sequence of shapes, got {got(shapes)}.")
    for shape in shapes:
        if not isinstance(shape, Sequence) or isinstance(shape, str):
            raise TypeError(f"shapes must hold tuples of integers, got {got(shape)}.")
        for side in shape:
            check_integer("shapes", side, least=0)


def check_distribution(distribution: Distribution) -> None:
    """Raises ValueError unless `distribution` is a known name or a function."""
    if not callable(distribution) and distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"distribution must be one of {', '.join(map(repr, DISTRIBUTIONS))} or a "
            f"function of (shapes, sparsity), got {distribution!r}."
        )


def _erdos_renyi(shape: Shape, *, kernel: bool) -> float:
    dims = shape if kernel else shape[-2:]
    if math.prod(shape) == 0 or not dims:
        return 1.0  # An empty or a scalar leaf: any value does.
    return sum(dims) / math.prod(dims)


def _scale_to_density(
    raw: Sequence[float], sizes: Sequence[int], density: float
) -> list[float]:
    """The epsilon loop: densities min(1, epsilon * raw) with the exact overall mean."""
    dense = [False] * len(raw)
    while True:
        wanted = density * sum(sizes) - sum(
            n for n, d in zip(sizes, dense, strict=True) if d
        )
        room = sum(p * n for p, n, d in zip(raw, sizes, dense, strict=True) if not d)
        if room <= 0:
            return [1.0 if d else density for d in dense]
        epsilon = max(wanted, 0.0) / room
        largest = max(p for p, d in zip(raw, dense, strict=True) if not d)
        if epsilon * largest <= 1.0:
            return [1.0 if d else epsilon * p for p, d in zip(raw, dense, strict=True)]
        dense = [d or p == largest for p, d in zip(raw, dense, strict=True)]
