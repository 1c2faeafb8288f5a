"""Distributions of a sparsity over leaves (uniform, ER, ERK), in exact counts.

All functions are plain Python on shapes, in float64. Nothing here is traced.
"""

import math
from collections.abc import Callable, Sequence

from granet_jax.checks import check_fraction, check_integer, got

Shape = tuple[int, ...]
# A name, or a function from shapes and an overall sparsity to a density per leaf.
Distribution = str | Callable[[Sequence[Shape], float], Sequence[float]]
DISTRIBUTIONS: tuple[str, ...] = ("uniform", "er", "erk")


def total_count(size: int, sparsity: float) -> int:
    """The number of active weights among `size` at `sparsity`, rounded half up.

    Raises:
      TypeError, ValueError: `size` is not a number of weights, or `sparsity` is not a
        number in [0, 1].
    """
    check_integer("size", size, least=0)
    check_fraction("sparsity", sparsity)
    return math.floor((1.0 - sparsity) * size + 0.5)


def densities(
    shapes: Sequence[Shape], sparsity: float, distribution: Distribution = "erk"
) -> list[float]:
    """The density of every leaf, at an overall density of 1 - `sparsity`.

    - "uniform": Every leaf has the same density.
    - "er": The density is proportional to (n_in + n_out) / (n_in n_out), with the last
      two dimensions of the shape (Mocanu et al. 2018).
    - "erk": The density is proportional to sum(shape) / prod(shape), with all
      dimensions of the shape (Evci et al. 2020).

    If densities exceed 1, the leaves of largest density become dense and the other
    leaves share the rest. This is repeated until no density exceeds 1, as in the
    epsilon loop of the RigL code.

    Args:
      shapes: Shapes of the maskable leaves.
      sparsity: Overall sparsity, in [0, 1].
      distribution: "uniform", "er", "erk", or a function of (shapes, sparsity) that
        returns the densities.

    Returns:
      One density in [0, 1] per leaf.

    Raises:
      ValueError: The distribution is unknown, or is a function that does not return one
        density in [0, 1] per leaf; or the sparsity is out of range.
      TypeError: An argument has the wrong type.
    """
    _check_shapes(shapes)
    check_fraction("sparsity", sparsity)
    check_distribution(distribution)
    if callable(distribution):
        values = [float(d) for d in distribution(shapes, sparsity)]
        if len(values) != len(shapes) or not all(0.0 <= d <= 1.0 for d in values):
            raise ValueError(
                "distribution must return one density in [0, 1] for each of the "
                f"{len(shapes)} leaves, got {values}."
            )
        return values
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
    """The number of active weights in every leaf.

    The numbers follow the `densities`, rounded by the largest-remainder rule (the first
    leaf wins ties), so that they sum exactly to the `total_count` of all weights. The
    GraNet code draws a Bernoulli mask instead, which has this total only on average.

    Args:
      shapes: Shapes of the maskable leaves.
      sparsity: Overall sparsity, in [0, 1].
      distribution: Distribution of the sparsity over leaves, see `densities`.
      caps: Largest number for each leaf, such as its present number; None for the size
        of the leaf.
      floors: Smallest number for each leaf, such as its present number; None for 0.

    Returns:
      One integer per leaf.

    Raises:
      ValueError: As `densities`; or the total exceeds the sum of the caps, or is less
        than the sum of the floors.
      TypeError: An argument has the wrong type.
    """
    _check_shapes(shapes)
    sizes = [math.prod(s) for s in shapes]
    for name, bounds in (("caps", caps), ("floors", floors)):
        if bounds is not None and len(bounds) != len(sizes):
            raise ValueError(
                f"{name} must be one for each of the {len(sizes)} leaves, got {bounds}."
            )
        for bound in () if bounds is None else bounds:
            check_integer(name, bound, least=0)
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
    numbers = [
        max(min(math.floor(x), limit), low)
        for x, limit, low in zip(ideal, limits, least, strict=True)
    ]
    # The sort is stable, so the first of two leaves with equal remainders comes first.
    by_remainder = sorted(range(len(sizes)), key=lambda i: numbers[i] - ideal[i])
    missing = total - sum(numbers)
    while missing > 0:
        for i in by_remainder:
            if missing > 0 and numbers[i] < limits[i]:
                numbers[i] += 1
                missing -= 1
    # Floors, or the densities of a user's function, may sum to more than the total.
    while missing < 0:
        for i in reversed(by_remainder):
            if missing < 0 and numbers[i] > least[i]:
                numbers[i] -= 1
                missing += 1
    return numbers


def _check_shapes(shapes: Sequence[Shape]) -> None:
    if not isinstance(shapes, Sequence) or isinstance(shapes, str):
        raise TypeError(f"shapes must be a sequence of shapes, got {got(shapes)}.")
    for shape in shapes:
        if not isinstance(shape, Sequence) or isinstance(shape, str):
            raise TypeError(f"shapes must hold tuples of integers, got {got(shape)}.")
        for side in shape:
            check_integer("shapes", side, least=0)


def check_distribution(distribution: Distribution) -> None:
    """Raise ValueError unless `distribution` is a known name or a function."""
    if not callable(distribution) and distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"distribution must be one of {', '.join(map(repr, DISTRIBUTIONS))} or a "
            f"function of (shapes, sparsity), got {distribution!r}."
        )


def _erdos_renyi(shape: Shape, *, kernel: bool) -> float:
    # A scalar is a vector of one weight. For an empty leaf any value is right.
    dims = (shape if kernel else shape[-2:]) or (1,)
    return sum(dims) / max(math.prod(dims), 1)


def _scale_to_density(
    raw: Sequence[float], sizes: Sequence[int], density: float
) -> list[float]:
    """Densities min(1, epsilon * raw), with epsilon such that the mean is `density`."""
    dense = [False] * len(raw)
    while True:
        budget = density * sum(sizes) - sum(
            n for n, d in zip(sizes, dense, strict=True) if d
        )
        room = sum(p * n for p, n, d in zip(raw, sizes, dense, strict=True) if not d)
        if room <= 0:  # No weights are left, so the density is 1, or there are none.
            return [density] * len(raw)
        epsilon = max(budget, 0.0) / room
        largest = max(p for p, d in zip(raw, dense, strict=True) if not d)
        if epsilon * largest <= 1.0:
            return [1.0 if d else epsilon * p for p, d in zip(raw, dense, strict=True)]
        dense = [d or p == largest for p, d in zip(raw, dense, strict=True)]
