"""Structured sparsity: N:M, constant or least fan-in, blocks and whole output units.

A structure divides every layer into boxes of equal shape. There are three kinds.
`block` and `channel` keep or prune a box as a whole, and rank boxes by the norm of
their scores. With `n_of_m` and `constant_fan_in`, all boxes of a layer keep the same
number of weights. With `at_least`, every box keeps some weights, and the others compete
as they would without a structure. Methods and mask sources take a structure as an
argument::

    method = granet_jax.gmp(0.9, 10_000, structure=structures.block(4, 4))

Numbers are exact. With scope "global", whole boxes compete across layers, and the
number of active boxes is (1 - sparsity) times the number of all boxes, rounded. With
scope "layer", each layer has the density that the distribution gives its shape, and
keeps the nearest number of boxes, or of weights in a box (at least one). So the share
of active *weights* can differ from the density by the rounding in each layer. With
`channel` and scope "global" it can also differ because units have different sizes.

Nothing is sorted. If boxes of `block` or `n_of_m` are divided among devices along an
axis, every device gathers the leaf along that axis for the selection. Nothing else is
gathered.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeGuard

from granet_jax import distributions
from granet_jax.checks import check_choice, check_integer
from granet_jax.distributions import Distribution, Shape
from granet_jax.layers import Axes, layer_shape
from granet_jax.selection import Scope

Norm = Literal["l1", "l2"]
NORMS: tuple[str, ...] = ("l1", "l2")


@dataclasses.dataclass(frozen=True)
class Structure:
    """The structure of masks.

    See `block`, `channel`, `n_of_m`, `constant_fan_in` and `at_least`.

    Attributes:
      name: The name for messages.
      box: A function from the shape of a layer to the shape of its boxes, which has the
        same number of axes.
      whole: Whether a box is kept or pruned as a whole. Otherwise all boxes of a layer
        keep the same number of weights, or at least `least`.
      norm: The norm of the non-negative scores in a box that is kept as a whole: "l1"
        for their mean, "l2" for the root of their mean square. They are means, so that
        boxes of different sizes compare.
      density: The only final density that the structure allows; None for any.
      least: The number of weights that every box keeps at least, where boxes may keep
        more; else 0.
    """

    name: str
    box: Callable[[Shape], Shape]
    whole: bool
    norm: Norm = "l1"
    density: float | None = None
    least: int = 0


def block(*shape: int, norm: Norm = "l1") -> Structure:
    """Blocks of weights, kept or pruned as a whole.

    Args:
      *shape: Sides of a block along the last axes of a leaf; its sides along the other
        axes are 1. A `block(4, 1)` holds four inputs of one output, in a dense kernel
        (in, out) and in a convolution (height, width, in, out).
      norm: Norm of the scores in a block by which it ranks, "l1" or "l2".

    Returns:
      A structure.

    Raises:
      TypeError, ValueError: A side is not a positive integer, or the norm is unknown.

    References:
      Gray et al., GPU Kernels for Block-Sparse Weights, 2017.
    """
    for side in shape:
        check_integer("shape", side)
    if not shape or min(shape) < 1:
        raise ValueError(f"shape must be of positive sides, got {shape}.")
    check_choice("norm", norm, NORMS)
    return Structure(
        name=f"block{shape}",
        box=_Block(shape),
        whole=True,
        norm=norm,
    )


@dataclasses.dataclass(frozen=True)
class _Block:
    sides: Shape

    def __call__(self, leaf: Shape) -> Shape:
        return (1,) * (len(leaf) - len(self.sides)) + self.sides


def channel(*, norm: Norm = "l1", axis: int = -1) -> Structure:
    """Output units of a kernel, kept or pruned with all their inputs.

    Args:
      norm: Norm of the scores of a unit by which it ranks, "l1" or "l2".
      axis: Axis of a leaf that counts the outputs. -1 for kernels of shape (..., in,
        out), as flax has them; 0 for weights of shape (out, in, ...), as equinox and
        PyTorch have them.

    Returns:
      A structure. It does not prune the bias of a unit, or the weights of the next
      layer that read the unit.

    Raises:
      TypeError, ValueError: The norm is unknown, or axis is not an integer.

    References:
      Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017 (filters by norm).
    """
    check_choice("norm", norm, NORMS)
    check_integer("axis", axis)
    name = _with_axis("channel", axis)
    return Structure(name, _Unit(axis), whole=True, norm=norm)


def constant_fan_in(*, axis: int = -1) -> Structure:
    """Every output unit of a leaf keeps the same number of inputs, at least one.

    An exchange drops the lowest weights of the leaf, and every unit regrows the number
    of weights that it lost. The method `srigl` also prunes whole units.

    Args:
      axis: Axis of a leaf that counts the outputs, as in `channel`: -1 for flax, 0 for
        equinox and PyTorch.

    Returns:
      A structure. A method that prunes or chooses weights needs scope "layer" with it.

    Raises:
      TypeError: axis is not an integer.

    References:
      Lasby et al., Dynamic Sparse Training with Structured Sparsity, ICLR 2024 (SRigL).
    """
    check_integer("axis", axis)
    name = _with_axis("constant fan-in", axis)
    return Structure(name, _Unit(axis), whole=False)


def at_least(number: int, *, axis: int = -1) -> Structure:
    """Every output unit keeps at least some inputs; the other weights are free.

    A unit without inputs has no gradient, so that methods which regrow by the gradient
    never revive it. Each unit keeps its best `number` weights first, and if it has
    fewer, it regrows its best ones first. The total number of active weights is the
    same as without a structure.

    Args:
      number: Inputs that a unit keeps at least, 1 or more.
      axis: Axis of a leaf that counts the outputs, as in `channel`.

    Returns:
      A structure.

    Raises:
      TypeError, ValueError: An argument is not an integer, or `number` is below 1.

    References:
      Gao et al., Weight-sparse transformers have interpretable circuits, 2025.
    """
    check_integer("number", number, least=1)
    check_integer("axis", axis)
    name = _with_axis(f"at least {number} inputs", axis)
    return Structure(name, _Unit(axis), whole=False, least=int(number))


def n_of_m(n: int, m: int, *, axis: int = -2) -> Structure:
    """N:M sparsity: of every `m` neighbours along an axis, the `n` best are active.

    The final sparsity of the method must be 1 - n/m, the same in all maskable leaves.
    While the sparsity rises, all groups of a leaf also have the same number of active
    weights, the nearest to the schedule: 4:4, 3:4, 2:4. For SR-STE use
    `straight_through(penalty=2e-4)`.

    Args:
      n: Active weights of a group at the end, in [1, m).
      m: Weights of a group.
      axis: Axis of a leaf along which a group lies. -2 means the inputs of a dense
        layer (in, out), or the input channels of a convolution (height, width, in,
        out).

    Returns:
      A structure for scope "layer" and distribution "uniform".

    Raises:
      TypeError, ValueError: n, m or axis is not an integer, or is out of range.

    References:
      Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From
      Scratch, ICLR 2021 (also along the input channels). Kao et al., Training Recipe
      for N:M Structured Sparsity with Decaying Pruning Mask, 2022 (also in stages).
    """
    for name, value in (("n", n), ("m", m), ("axis", axis)):
        check_integer(name, value)
    if not 1 <= n < m:
        raise ValueError(
            f"n must be at least 1 and below m, got n={n} with m={m}: that is no "
            "sparsity."
        )

    return Structure(
        name=f"{n}:{m} sparsity along axis {axis}",
        box=_Group(m, axis),
        whole=False,
        density=n / m,
    )


@dataclasses.dataclass(frozen=True)
class _Group:
    size: int
    axis: int

    def __call__(self, leaf: Shape) -> Shape:
        ndim = len(leaf)
        if not -ndim <= self.axis < ndim:
            return ()
        return tuple(self.size if i == self.axis % ndim else 1 for i in range(ndim))


def check_use(
    structure: Structure | None,
    *,
    sparsity: float,
    scope: Scope,
    distribution: Distribution,
) -> None:
    """Raise ValueError or TypeError unless a structure fits the other arguments.

    Args:
      structure: Structure to check, or None.
      sparsity: Final sparsity of the masks.
      scope: Whether weights compete across leaves or within each leaf.
      distribution: Distribution of the sparsity over leaves.
    """
    if structure is None:
        return
    if not isinstance(structure, Structure):
        raise TypeError(
            "structure must be one of granet_jax.structures, such as "
            f"structures.block(4, 1), or None, got {structure!r}."
        )
    if not has_equal_boxes(structure):
        return
    if scope == "global":
        raise ValueError(
            f'scope must be "layer" with {structure.name}: every part of a leaf has '
            "the same number of weights, and so they cannot compete across leaves."
        )
    if structure.density is None:
        return
    if not math.isclose(1.0 - sparsity, structure.density, abs_tol=1e-9):
        raise ValueError(
            f"sparsity must end at {1.0 - structure.density} for {structure.name}, "
            f"got {sparsity}."
        )
    if not callable(distribution) and distribution != "uniform":
        raise ValueError(
            f'distribution must be "uniform" for {structure.name}, which all leaves '
            f"have alike, got {distribution!r}."
        )


def check_leaves(
    structure: Structure | None,
    leaves: Iterable[tuple[str, Shape]],
    stacks: Iterable[Axes],
) -> None:
    """Raise ValueError unless the structure's boxes divide the layers of all leaves.

    Args:
      structure: Structure of the masks, or None.
      leaves: Name and shape of every maskable leaf.
      stacks: The axes of every leaf that count layers.
    """
    if structure is None:
        return
    for (name, leaf), axes in zip(leaves, stacks, strict=True):
        shape = layer_shape(leaf, axes)
        box = structure.box(shape)
        if (
            not box
            or len(box) != len(shape)
            or any(not b or n % b for n, b in zip(shape, box, strict=True))
        ):
            parts = f"parts of shape {box}" if box else "such an axis"
            raise ValueError(
                f"structure {structure.name} needs leaves of {parts}, and {name!r} "
                f"has {'layers of ' if axes else ''}shape {shape}: leave it out by "
                "`where`, or take another structure."
            )
        if structure.least > math.prod(box):
            raise ValueError(
                f"structure {structure.name} needs units of as many inputs, and "
                f"{name!r} of shape {shape} has {math.prod(box)}: leave it out by "
                "`where`, or ask for fewer."
            )


def has_equal_boxes(structure: Structure | None) -> TypeGuard[Structure]:
    """Whether all boxes of a layer keep the same number of weights."""
    return structure is not None and not structure.whole and not structure.least


def has_least(structure: Structure | None) -> TypeGuard[Structure]:
    """Whether every box keeps at least some weights, and the others are free."""
    return structure is not None and structure.least > 0


def parts(structure: Structure | None, shapes: Sequence[Shape]) -> list[int]:
    """The number of parts of every layer, the units in which masks are counted.

    The parts of a layer are its boxes if they are kept or pruned as a whole, the
    weights of one of its boxes if all boxes keep the same number, and else its single
    weights.

    Args:
      structure: Structure of the masks, or None.
      shapes: The shapes of all layers.
    """
    if structure is None or structure.least:
        return [math.prod(s) for s in shapes]
    boxes = [math.prod(structure.box(s)) for s in shapes]
    if not structure.whole:
        return boxes
    return [math.prod(s) // b for s, b in zip(shapes, boxes, strict=True)]


def counts(
    structure: Structure | None,
    shapes: Sequence[Shape],
    sparsity: float,
    distribution: Distribution,
    caps: Sequence[int] | None = None,
    floors: Sequence[int] | None = None,
) -> list[int]:
    """The number of active parts of every layer; see `parts`.

    The arguments are the same as of `distributions.counts`. With a structure, the
    number of every layer is rounded independently, half up.
    """
    if structure is None:
        return distributions.counts(shapes, sparsity, distribution, caps, floors)
    if structure.least:
        check_least(structure, shapes, sparsity)
        least = least_counts(structure, shapes)
        floors = least if floors is None else [*map(max, floors, least)]
        return distributions.counts(shapes, sparsity, distribution, caps, floors)
    sizes = parts(structure, shapes)
    shares = distributions.densities(shapes, sparsity, distribution)
    least = [0 if structure.whole else 1] * len(sizes) if floors is None else floors
    most = sizes if caps is None else caps
    return [
        min(max(distributions.total_count(n, 1.0 - d), low), high)
        for n, d, low, high in zip(sizes, shares, least, most, strict=True)
    ]


def least_counts(structure: Structure, shapes: Sequence[Shape]) -> list[int]:
    """The number of weights that every layer keeps at least."""
    units = [math.prod(s) // math.prod(structure.box(s)) for s in shapes]
    return [structure.least * n for n in units]


def check_least(structure: Structure, shapes: Sequence[Shape], sparsity: float) -> None:
    """Raise ValueError if the units keep more weights than the sparsity leaves."""
    total = distributions.total_count(sum(map(math.prod, shapes)), sparsity)
    least = sum(least_counts(structure, shapes))
    if least > total:
        raise ValueError(
            f"structure {structure.name} keeps {least} weights, more than the {total} "
            f"that are active at sparsity {sparsity:g}: ask for fewer inputs of a "
            "unit, or a lower sparsity."
        )


@dataclasses.dataclass(frozen=True)
class _Unit:
    """The shape of one output with all its inputs; () where there is no such axis."""

    axis: int

    def __call__(self, leaf: Shape) -> Shape:
        ndim = len(leaf)
        if not -ndim <= self.axis < ndim:
            return ()
        return tuple(1 if i == self.axis % ndim else n for i, n in enumerate(leaf))


def _with_axis(name: str, axis: int) -> str:
    return name if axis == -1 else f"{name} along axis {axis}"
