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
from typing import Any, Literal, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer

from granet_jax import distributions, masking, selection
from granet_jax.checks import check_choice, check_integer
from granet_jax.distributions import Distribution, Shape
from granet_jax.dtypes import wider
from granet_jax.layers import Axes, divide, layer_shape, layer_shapes, no_stacks
from granet_jax.positions import from_end, mesh_axes
from granet_jax.selection import (
    Scope,
    count_layers,
    counter_dtype,
    find_threshold,
    highest,
    odd_factors,
    shuffled,
    sort_keys,
    ties_by_rank,
)

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
    of weights that it lost. The paper's ablation of whole units is not included.

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


def check_masks(
    structure: Structure | None,
    masks: Iterable[tuple[str, Array]],
    stacks: Iterable[Axes],
) -> None:
    """Raise ValueError unless masks have the structure. Traced masks always pass.

    Args:
      structure: Structure that the masks must have, or None.
      masks: Name of the leaf and mask, for every maskable leaf.
      stacks: The axes of every leaf that count layers.
    """
    for (name, mask), axes in zip(masks, stacks, strict=True):
        if structure is None or structure.least or isinstance(mask, Tracer):
            return
        counts = box_counts(structure, mask, axes)
        size = math.prod(structure.box(layer_shape(mask.shape, axes)))
        within = [axis for axis in range(mask.ndim) if axis not in axes]
        largest = jnp.max(counts, axis=within, keepdims=True, initial=0)
        most = size if structure.whole else largest
        fits = (counts == most) | (structure.whole & (counts == 0))
        if not bool(jnp.all(fits)):
            raise ValueError(
                f"masks must have the structure {structure.name} of the method, and "
                f"the mask at {name!r} does not have it."
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


def select(
    structure: Structure | None,
    scores: Sequence[Array],
    number: Any,
    *,
    among: Sequence[Array] | None = None,
    scope: Scope,
    stacks: tuple[Axes, ...] | None = None,
    key: Array | None = None,
) -> list[Array]:
    """Select the weights of largest score, as `selection.top_k`, in a structure.

    Args:
      structure: Structure of the selection; None for single weights.
      scores: One array of scores per leaf.
      number: Number of parts to select, see `parts`: one number per layer, or a single
        number for all layers with scope "global".
      among: One boolean array of candidates per leaf; None for all weights.
      scope: "global" if weights or whole boxes compete across layers, "layer" if they
        compete within each layer.
      stacks: The axes of every leaf that count layers; None if each leaf is one layer.
      key: A random key, which decides the order of equal scores of single weights; None
        for the lowest index first.

    Returns:
      One boolean array per leaf, of the shapes of `scores`.
    """
    if structure is None:
        return selection.top_k(
            scores, number, among=among, scope=scope, stacks=stacks, key=key
        )
    stacks = no_stacks(scores) if stacks is None else stacks
    if structure.least:
        return _select_with_least(structure, scores, number, among, scope, stacks, key)
    if structure.whole:
        ranked = merge(structure, scores, stacks)
        candidates = among and merge_masks(structure, among, stacks)
        chosen = selection.top_k(
            ranked, number, among=candidates, scope=scope, stacks=stacks
        )
        return spread(structure, chosen, scores, stacks)
    numbers = divide(jnp.asarray(number), [x.shape for x in scores], stacks)
    chosen = [
        _best_of_boxes(structure, k, n, axes)
        for k, n, axes in zip(sort_keys(scores, among), numbers, stacks, strict=True)
    ]
    if among is None:
        return chosen
    return [c & m for c, m in zip(chosen, among, strict=True)]


def _select_with_least(
    structure: Structure,
    scores: Sequence[Array],
    number: Any,
    among: Sequence[Array] | None,
    scope: Scope,
    stacks: tuple[Axes, ...],
    key: Array | None,
) -> list[Array]:
    """Select the best weights of every unit first, then the best of the others."""
    among = [jnp.ones_like(x, bool) for x in scores] if among is None else among
    least = jnp.asarray(structure.least, jnp.uint32)
    keys = zip(sort_keys(scores, among), among, stacks, strict=True)
    first = [_best_of_boxes(structure, k, least, axes) & m for k, m, axes in keys]
    others = [m & ~f for m, f in zip(among, first, strict=True)]
    sizes = [math.prod(s) for s in layer_shapes([f.shape for f in first], stacks)]
    (taken,) = count_layers([[f] for f in first], stacks, counter_dtype(sizes, scope))
    if scope == "global":
        taken = jnp.sum(taken, dtype=taken.dtype)
    number = jnp.asarray(number).astype(taken.dtype)
    chosen = selection.top_k(
        scores,
        number - jnp.minimum(number, taken),
        among=others,
        scope=scope,
        stacks=stacks,
        key=key,
    )
    return [f | c for f, c in zip(first, chosen, strict=True)]


def fill(
    structure: Structure,
    masks: Sequence[Array],
    scores: Sequence[Array],
    numbers: Sequence[Array],
    stacks: tuple[Axes, ...],
    *,
    key: Array | None = None,
) -> list[Array]:
    """Activate the best inactive weights of every box, up to a number of active ones.

    Args:
      structure: Structure whose boxes are not kept or pruned as a whole.
      masks: One boolean array per leaf.
      scores: One array of scores per leaf. Weights of larger score come first.
      numbers: Number of active weights per box after the call, at least: for every leaf
        a scalar, or an array as from `box_counts` or `layers.divide`.
      stacks: The axes of every leaf that count layers.
      key: A random key, which decides the order of equal scores; None for the lowest
        index first.

    Returns:
      One boolean array per leaf, which contains the weights of `masks`.
    """
    shapes = [m.shape for m in masks]
    factors: Any = [None] * len(masks)
    if key is not None:
        layers = len(layer_shapes(shapes, stacks))
        drawn = odd_factors(key, layers, "layer", jnp.dtype(jnp.uint32))
        columns = [divide(column, shapes, stacks) for column in drawn.T]
        factors = list(zip(*columns, strict=True))
    filled = []
    for i, (x, mask) in enumerate(zip(sort_keys(scores), masks, strict=True)):
        # No score has the highest key, so the active weights come first.
        ranked = jnp.where(mask, highest(x.dtype), x)
        best = _best_of_boxes(structure, ranked, numbers[i], stacks[i], factors[i])
        filled.append(best | mask)
    return filled


def box_counts(structure: Structure, mask: Array, axes: Axes) -> Array:
    """The number of active weights of every box of a leaf, uint32.

    Args:
      structure: Structure of the mask.
      mask: Mask of one leaf.
      axes: The axes of the leaf that count layers.

    Returns:
      An array with the axes of `mask`, along which it counts boxes.
    """
    boxes, values = _boxed(structure, mask, axes)
    counts = jnp.sum(values, axis=boxes.inside, keepdims=True, dtype=jnp.uint32)
    return jnp.squeeze(counts, boxes.added)


def merge(
    structure: Structure | None, scores: Sequence[Array], stacks: Iterable[Axes]
) -> list[Array]:
    """The norm of every box's scores, if boxes are kept as a whole; else the scores.

    The norms of a leaf have its axes, along which they count boxes.
    """
    if structure is None or not structure.whole:
        return list(scores)
    merged = []
    for score, axes in zip(scores, stacks, strict=True):
        wide = score.astype(wider(score.dtype, jnp.float32))
        boxes, values = _boxed(structure, wide, axes)
        if structure.norm == "l1":
            norm = jnp.mean(values, axis=boxes.inside, keepdims=True)
        else:
            squares = jnp.square(values)
            norm = jnp.sqrt(jnp.mean(squares, axis=boxes.inside, keepdims=True))
        merged.append(jnp.squeeze(norm, boxes.added))
    return merged


def merge_masks(
    structure: Structure | None, masks: Sequence[Array], stacks: Iterable[Axes]
) -> list[Array]:
    """The active boxes, if boxes are kept as a whole; else the masks themselves."""
    if structure is None or not structure.whole:
        return list(masks)
    merged = []
    for mask, axes in zip(masks, stacks, strict=True):
        boxes, values = _boxed(structure, mask, axes)
        active = jnp.all(values, axis=boxes.inside, keepdims=True)
        merged.append(jnp.squeeze(active, boxes.added))
    return merged


def spread(
    structure: Structure | None,
    chosen: Sequence[Array],
    like: Sequence[Array],
    stacks: Iterable[Axes],
) -> list[Array]:
    """The inverse of `merge_masks`: masks with the shapes and shardings of `like`."""
    if structure is None or not structure.whole:
        return list(chosen)
    masks = []
    for whole, x, axes in zip(chosen, like, stacks, strict=True):
        boxes = _boxes(structure, x.shape, axes)
        wide = jnp.broadcast_to(jnp.expand_dims(whole, boxes.added), boxes.shape)
        masks.append(masking.placed_like(_unboxed(wide, x), x))
    return masks


class _Boxes(NamedTuple):
    """The boxes of a leaf, as axes of their own.

    Attributes:
      shape: The shape of the leaf, with two axes instead of one where a box is longer
        than 1 and shorter than the layer: one that counts boxes, and one inside them.
      inside: The axes inside the boxes.
      added: Those axes inside the boxes that the leaf itself does not have.
      stack: The axes that count layers.
      sides: The sides of a box along the axes of the leaf.
    """

    shape: Shape
    inside: Axes
    added: Axes
    stack: Axes
    sides: Shape


def _best_of_boxes(
    structure: Structure,
    keys: Array,
    number: Array,
    axes: Axes,
    factors: Sequence[Array] | None = None,
) -> Array:
    """Select the `number` largest keys of every box.

    Args:
      structure: Structure whose boxes all keep the same number of weights.
      keys: Keys of one leaf from `sort_keys`.
      number: An unsigned integer, or an array as from `box_counts` or `layers.divide`.
      axes: The axes of the leaf that count layers.
      factors: Three odd numbers, which put equal keys in a random order, another one in
        every box; None for the lowest index first.

    Returns:
      Boolean array of the shape of `keys`.
    """
    boxes, values = _boxed(structure, keys, axes)
    number = _with_axes(number.astype(jnp.uint32), boxes)
    factors = factors and [_with_axes(factor, boxes) for factor in factors]
    if len(boxes.inside) == 1 and values.shape[boxes.inside[0]] <= _FEW:
        values = _whole_along(values, boxes.inside[0])
        best = _best_by_comparison(values, number, boxes, factors)
    else:
        best = _best_by_digits(values, number, boxes, factors)
    return _unboxed(best, keys)


def _with_axes(number: Array, boxes: _Boxes) -> Array:
    """Numbers of a leaf's boxes or layers, such that they broadcast over its boxes."""
    return jnp.expand_dims(number, boxes.added) if number.ndim else number


# In boxes of at most this size, every weight is compared with all the others, which
# takes a single pass over memory.
_FEW = 16


def _best_by_comparison(
    keys: Array, number: Array, boxes: _Boxes, factors: Sequence[Array] | None
) -> Array:
    (axis,) = boxes.inside
    rank = _rank_in_box(keys, boxes, factors)
    better = jnp.zeros_like(keys, jnp.uint32)
    for j in range(keys.shape[axis]):
        other, other_rank = (
            lax.slice_in_dim(x, j, j + 1, axis=axis) for x in (keys, rank)
        )
        ahead = (other > keys) | ((other == keys) & (other_rank > rank))
        better += ahead.astype(jnp.uint32)
    return better < number


def _rank_in_box(keys: Array, boxes: _Boxes, factors: Sequence[Array] | None) -> Array:
    """The rank of every entry of a box among equal keys, uint32, higher first."""
    size = jnp.asarray(math.prod(keys.shape[i] for i in boxes.inside), jnp.uint32)
    rank = from_end(size, keys, boxes.inside)
    if factors is None:
        return rank
    # An odd number for every box of a layer gives each another order.
    other = {*boxes.inside, *boxes.stack}
    grid = [axis for axis in range(keys.ndim) if axis not in other]
    box = from_end(jnp.zeros_like(size), keys, grid)
    return shuffled(rank * (2 * box + 1), factors)


def _best_by_digits(
    keys: Array, number: Array, boxes: _Boxes, factors: Sequence[Array] | None
) -> Array:
    """Select by a threshold for each box, as `selection.top_k` does for each layer."""
    bits = jnp.asarray(8 * keys.dtype.itemsize, jnp.int32)
    keys = keys.astype(wider(keys.dtype, jnp.uint32))

    def sums(flags: Array) -> Array:
        return jnp.sum(flags, axis=boxes.inside, keepdims=True, dtype=jnp.uint32)

    numbers = jnp.broadcast_to(number, sums(keys > 0).shape)

    def threshold(keys: Array, bits: Array) -> Array:
        def count(bounds: list[Array]) -> list[Array]:
            return [sums(keys >= bound) for bound in bounds]

        return find_threshold(count, numbers, bits, keys.dtype)[0]

    rank = _rank_in_box(keys, boxes, factors).astype(keys.dtype)
    ties = ties_by_rank(keys, threshold(keys, bits), rank)
    return ties >= threshold(ties, jnp.full_like(bits, 32))


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


def _boxes(structure: Structure, leaf: Shape, axes: Axes) -> _Boxes:
    """The boxes of a leaf whose layers are counted along some axes."""
    box = iter(structure.box(layer_shape(leaf, axes)))
    sides = tuple(1 if i in axes else next(box) for i in range(len(leaf)))
    shape: list[int] = []
    inside: list[int] = []
    added: list[int] = []
    stack: list[int] = []
    for i, (n, b) in enumerate(zip(leaf, sides, strict=True)):
        if i in axes:
            stack.append(len(shape))
        elif b == n > 1:
            inside.append(len(shape))
        elif b > 1:
            shape.append(n // b)
            inside.append(len(shape))
            added.append(len(shape))
            n = b
        shape.append(n)
    return _Boxes(tuple(shape), tuple(inside), tuple(added), tuple(stack), sides)


def _boxed(structure: Structure, x: Array, axes: Axes) -> tuple[_Boxes, Array]:
    """The boxes of a leaf whose layers are counted along `axes`, and `x` in them."""
    boxes = _boxes(structure, x.shape, axes)
    sharding = jax.typeof(x).sharding
    if boxes.shape == x.shape or not masking.is_explicit(sharding):
        return boxes, x.reshape(boxes.shape)
    # With Explicit mesh axes, a reshape needs the sharding of its result. We keep the
    # sharding of `x`, except along axes whose boxes span devices.
    spec: list[Any] = []
    for n, b, names in zip(x.shape, boxes.sides, sharding.spec, strict=True):
        if b in (1, n):
            spec.append(names)
            continue
        parts = math.prod(sharding.mesh.shape[name] for name in mesh_axes([names]))
        spec += [names if n // b % parts == 0 else None, None]
    out_sharding = sharding.update(spec=jax.sharding.PartitionSpec(*spec))
    return boxes, lax.reshape(x, boxes.shape, out_sharding=out_sharding)


def _whole_along(x: Array, axis: int) -> Array:
    """`x`, with its sharding along an axis removed."""
    sharding = jax.typeof(x).sharding
    if not masking.is_explicit(sharding) or sharding.spec[axis] is None:
        return x
    spec = jax.sharding.PartitionSpec(
        *(None if i == axis else names for i, names in enumerate(sharding.spec))
    )
    return jax.sharding.reshard(x, sharding.update(spec=spec))


def _unboxed(x: Array, like: Array) -> Array:
    """The inverse of `_boxed`: `x` with the shape and the sharding of `like`."""
    sharding = jax.typeof(like).sharding
    if not masking.is_explicit(sharding):
        return x.reshape(like.shape)
    if x.shape == like.shape:
        return jax.sharding.reshard(x, sharding)
    return lax.reshape(x, like.shape, out_sharding=sharding)
