"""Structured sparsity: N:M, constant fan-in, blocks and whole output units.

A structure divides every leaf into boxes of equal shape. Either a box is kept or pruned
as a whole (`block`, `channel`), and ranks by the norm of its scores; or all boxes of a
leaf keep the same number of weights (`n_of_m`, `constant_fan_in`). It is an argument of
methods and of mask sources::

    method = granet_jax.gmp(0.9, 10_000, structure=structures.block(4, 4))

Numbers are exact. Where weights compete across leaves (scope "global"), whole boxes do,
and their number is (1 - sparsity) times all boxes, to the nearest. Within leaves, each
leaf has the density that the distribution gives its shape, and keeps the nearest number
of boxes, or of weights in a box (one at least). So the share of active *weights* may
miss the sparsity by the rounding of each leaf; and with `channel`, across leaves, by
the different sizes of their units.

Nothing is sorted, and nothing gathered but where boxes of `block` or `n_of_m` lie
across devices: along that axis each then has a copy while it chooses.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from granet_jax import distributions, masking, selection
from granet_jax.checks import check_choice, check_integer
from granet_jax.distributions import Distribution, Shape
from granet_jax.positions import iota, mesh_axes
from granet_jax.selection import Scope, find_threshold, sort_keys

Norm = Literal["l1", "l2"]
NORMS: tuple[str, ...] = ("l1", "l2")


@dataclasses.dataclass(frozen=True)
class Structure:
    """The form of masks, by boxes of weights; see `block` and the others.

    Attributes:
      name: for messages.
      box: from the shape of a leaf to that of its boxes, of as many axes.
      whole: whether a box is kept or pruned as a whole; or else all boxes of a leaf
        keep the same number.
      norm: of the (non-negative) scores in a box that is kept as a whole: "l1", their
        mean, or "l2", the root of their mean square. (Means, so that boxes of different
        sizes compare.)
      density: the share of weights that the structure is named after; None for any.
    """

    name: str
    box: Callable[[Shape], Shape]
    whole: bool
    norm: Norm = "l1"
    density: float | None = None


def block(*shape: int, norm: Norm = "l1") -> Structure:
    """Blocks of weights, kept or pruned as a whole.

    Args:
      *shape: sides of a block along the last axes of a leaf: `block(4, 1)` is of four
        inputs of an output, for a dense kernel (in, out) as for a convolution (height,
        width, in, out). The other axes have sides of 1.
      norm: of the scores in a block, by which it ranks: "l1" or "l2".

    Returns:
      A structure.

    Raises:
      TypeError, ValueError: sides that are no positive integers; unknown norm.

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
        box=lambda leaf: (1,) * (len(leaf) - len(shape)) + shape,
        whole=True,
        norm=norm,
    )


def channel(*, norm: Norm = "l1") -> Structure:
    """Output units (the last axis of a kernel), kept or pruned with all their inputs.

    Args:
      norm: of a unit's scores, by which it ranks: "l1" or "l2".

    Returns:
      A structure. Biases and what follows the unit are left to the user.

    Raises:
      ValueError: unknown norm.

    References:
      Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017 (filters by norm).
    """
    check_choice("norm", norm, NORMS)
    return Structure(name="channel", box=_unit, whole=True, norm=norm)


def constant_fan_in() -> Structure:
    """Every output unit of a leaf keeps the same number of inputs, one at least.

    An exchange drops the worst weights of the leaf, and every unit regrows as many as
    it has lost (without the ablation of units of the paper).

    Returns:
      A structure. What is ranked within layers needs scope "layer".

    References:
      Lasby et al., Dynamic Sparse Training with Structured Sparsity, ICLR 2024 (SRigL).
    """
    return Structure(name="constant fan-in", box=_unit, whole=False)


def n_of_m(n: int, m: int, *, axis: int = -2) -> Structure:
    """N:M sparsity: of every `m` neighbours along an axis the `n` best are active.

    A method must end at sparsity 1 - n/m, the same in all maskable leaves. On the way
    there every group has the same number too, the nearest to what the schedule says:
    4:4, 3:4, 2:4. For SR-STE take `straight_through(penalty=2e-4)`.

    Args:
      n: active weights of a group at the end, in [1, m).
      m: neighbours that are a group.
      axis: of a leaf, along which they are neighbours; -2, the inputs of a dense layer
        (in, out) and the input channels of a convolution (height, width, in, out).

    Returns:
      A structure, for scope "layer" and distribution "uniform".

    Raises:
      TypeError, ValueError: n, m or axis are no integers, or out of range.

    References:
      Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From
      Scratch, ICLR 2021 (along the input channels, as here). Kao et al., Training
      Recipe for N:M Structured Sparsity with Decaying Pruning Mask, 2022 (by stages).
    """
    for name, value in (("n", n), ("m", m), ("axis", axis)):
        check_integer(name, value)
    if not 1 <= n < m:
        raise ValueError(
            f"n must be at least 1 and below m, got n={n} with m={m}: that is no "
            "sparsity."
        )

    def box(leaf: Shape) -> Shape:
        if not -len(leaf) <= axis < len(leaf):
            return ()
        return tuple(m if i == axis % len(leaf) else 1 for i in range(len(leaf)))

    return Structure(
        name=f"{n}:{m} sparsity along axis {axis}",
        box=box,
        whole=False,
        density=n / m,
    )


def check_use(
    structure: Structure | None,
    *,
    sparsity: float,
    scope: Scope,
    distribution: Distribution,
) -> None:
    """Raises ValueError or TypeError for a structure that cannot be had so.

    Args:
      structure: what was given.
      sparsity: that masks end with.
      scope: within which they are ranked.
      distribution: of the sparsity over leaves.
    """
    if structure is None:
        return
    if not isinstance(structure, Structure):
        raise TypeError(
            "structure must be one of granet_jax.structures, such as "
            f"structures.block(4, 1), or None, got {structure!r}."
        )
    if structure.whole:
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
    structure: Structure | None, leaves: Iterable[tuple[str, Shape]]
) -> None:
    """Raises ValueError unless boxes divide all leaves, given by name and shape."""
    if structure is None:
        return
    for name, shape in leaves:
        box = structure.box(shape)
        if len(box) != len(shape) or any(
            not b or n % b for n, b in zip(shape, box, strict=True)
        ):
            parts = f"parts of shape {box}" if box else "such an axis"
            raise ValueError(
                f"structure {structure.name} needs leaves of {parts}, and {name!r} "
                f"has shape {shape}: leave it out by `where`, or take another "
                "structure."
            )


def check_masks(
    structure: Structure | None, masks: Iterable[tuple[str, Array]]
) -> None:
    """Raises ValueError for given masks, by leaf name, that have not the structure.

    Masks whose values are not at hand are taken as they are.
    """
    for name, mask in masks:
        if structure is None or isinstance(mask, Tracer):
            return
        boxes, axes = _boxed(structure, mask)
        counts = jnp.sum(boxes, axis=axes, dtype=jnp.uint32)
        size = math.prod(boxes.shape[axis] for axis in axes)
        most = size if structure.whole else jnp.max(counts, initial=0)
        fits = (counts == most) | (structure.whole & (counts == 0))
        if not bool(jnp.all(fits)):
            raise ValueError(
                f"masks must have the structure {structure.name} of the method, and "
                f"the one at {name!r} has not."
            )


def parts(structure: Structure | None, shapes: Sequence[Shape]) -> list[int]:
    """What numbers count of each leaf: its weights; its boxes; the weights of a box."""
    if structure is None:
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
    """Number of active parts (see `parts`) of every leaf; see `distributions.counts`.

    With a structure each leaf's density is rounded by itself, half up.
    """
    if structure is None:
        return distributions.counts(shapes, sparsity, distribution, caps, floors)
    sizes = parts(structure, shapes)
    shares = distributions.densities(shapes, sparsity, distribution)
    least = [0 if structure.whole else 1] * len(sizes) if floors is None else floors
    most = sizes if caps is None else caps
    return [
        min(max(distributions.total_count(n, 1.0 - d), low), high)
        for n, d, low, high in zip(sizes, shares, least, most, strict=True)
    ]


def select(
    structure: Structure | None,
    scores: Sequence[Array],
    number: Any,
    *,
    among: Sequence[Array] | None = None,
    scope: Scope,
) -> list[Array]:
    """`selection.top_k`, with a structure: of its parts, see `parts`.

    Args:
      structure: of the masks.
      scores: one array per leaf; larger is kept.
      number: how many parts to select: of each leaf, or, with scope "global", of all.
      among: boolean arrays; only True entries are candidates.
      scope: whether weights, or whole boxes, compete across leaves or within.

    Returns:
      Boolean arrays of the shapes of `scores`.
    """
    if structure is None:
        return selection.top_k(scores, number, among=among, scope=scope)
    if structure.whole:
        ranked = [merge(structure, s) for s in scores]
        candidates = among and [merge_mask(structure, m) for m in among]
        chosen = selection.top_k(ranked, number, among=candidates, scope=scope)
        return [spread(structure, c, x) for c, x in zip(chosen, scores, strict=True)]
    keys = sort_keys(scores, among)
    chosen = [
        _best_of_boxes(structure, k, jnp.asarray(number)[i]) for i, k in enumerate(keys)
    ]
    if among is None:
        return chosen
    return [c & m for c, m in zip(chosen, among, strict=True)]


def fill(
    structure: Structure, masks: Sequence[Array], scores: Sequence[Array], number: Any
) -> list[Array]:
    """Activates in every box the best of the inactive, up to its number of active ones.

    Args:
      structure: one whose boxes have equal numbers.
      masks: boolean arrays.
      scores: one array per mask; larger is activated.
      number: for every leaf, an integer or an array from `box_counts`.

    Returns:
      Masks; supersets of `masks`.
    """
    filled = []
    for i, (key, mask) in enumerate(zip(sort_keys(scores), masks, strict=True)):
        first = jnp.asarray(jnp.iinfo(key.dtype).max, key.dtype)  # No score has it.
        best = _best_of_boxes(structure, jnp.where(mask, first, key), number[i])
        filled.append(best | mask)
    return filled


def box_counts(structure: Structure, mask: Array) -> Array:
    """Number of active weights of every box, uint32, its sides left as axes of 1."""
    boxes, axes = _boxed(structure, mask)
    return jnp.sum(boxes, axis=axes, keepdims=True, dtype=jnp.uint32)


def merge(structure: Structure | None, score: Array) -> Array:
    """The norm of the scores of every box, if they are kept whole; else the scores."""
    if structure is None or not structure.whole:
        return score
    wide = score.astype(jnp.promote_types(score.dtype, jnp.float32))
    values, axes = _boxed(structure, wide)
    if structure.norm == "l1":
        return jnp.mean(values, axis=axes)
    return jnp.sqrt(jnp.mean(jnp.square(values), axis=axes))


def merge_mask(structure: Structure | None, mask: Array) -> Array:
    """Which boxes are active, if they are so as a whole; else the mask itself."""
    if structure is None or not structure.whole:
        return mask
    boxes, axes = _boxed(structure, mask)
    return jnp.all(boxes, axis=axes)


def spread(structure: Structure | None, chosen: Array, like: Array) -> Array:
    """The mask from what `merge_mask` makes of it, placed like the leaf `like`."""
    if structure is None or not structure.whole:
        return chosen
    split, axes = _split(structure, like.shape)
    wide = jnp.broadcast_to(jnp.expand_dims(chosen, axes), split)
    return masking.placed_like(_unboxed(wide, like), like)


def _best_of_boxes(structure: Structure, keys: Array, number: ArrayLike) -> Array:
    """The `number` largest keys of every box; equal ones by lowest index in it first.

    Args:
      structure: one whose boxes have equal numbers.
      keys: integers, from `sort_keys`, of a leaf's shape.
      number: unsigned integer, or an array from `box_counts`; may be traced.

    Returns:
      Boolean array of the shape of `keys`.
    """
    values, axes = _boxed(structure, keys)
    number = jnp.asarray(number, jnp.uint32)
    if len(axes) == 1 and values.shape[axes[0]] <= _FEW:
        best = _best_by_comparison(_whole_along(values, axes[0]), number, axes[0])
    else:
        best = _best_by_digits(values, number, axes)
    return _unboxed(best, keys)


# Up to so many in a box each is compared with all: one pass over memory.
_FEW = 16


def _best_by_comparison(keys: Array, number: Array, axis: int) -> Array:
    place = iota(jax.typeof(keys), jnp.dtype(jnp.uint32), axis)
    better = jnp.zeros_like(keys, jnp.uint32)
    for j in range(keys.shape[axis]):
        other = lax.slice_in_dim(keys, j, j + 1, axis=axis)
        ahead = (other > keys) | ((other == keys) & (j < place))
        better += ahead.astype(jnp.uint32)
    return better < number


def _best_by_digits(keys: Array, number: Array, axes: tuple[int, ...]) -> Array:
    """Find the threshold of every box as `selection.top_k` finds that of every leaf."""
    index, size = jnp.zeros_like(keys, jnp.uint32), 1
    for axis in reversed(axes):
        along = iota(jax.typeof(keys), jnp.dtype(jnp.uint32), axis)
        index, size = index + along * jnp.uint32(size), size * keys.shape[axis]
    from_end = jnp.uint32(size) - index

    def reaches(over_keys: Array | bool, key: Array, bound: Array) -> Array:
        tied = keys == key.astype(keys.dtype)
        above = keys >= bound.astype(keys.dtype)
        return jnp.where(over_keys, above, tied & (from_end >= bound))

    def sums(flags: Array) -> Array:
        return jnp.sum(flags, axis=axes, keepdims=True, dtype=jnp.uint32)

    def count(over_keys: Array, key: Array, bounds: list[Array]) -> list[Array]:
        return [sums(reaches(over_keys, key, bound)) for bound in bounds]

    wanted = jnp.broadcast_to(number, sums(keys > 0).shape)
    key, place = find_threshold(count, wanted, keys.dtype, size)
    return (keys > key) | reaches(False, key, place)


def _unit(leaf: Shape) -> Shape:
    return (*leaf[:-1], 1)


def _split(structure: Structure, shape: Shape) -> tuple[Shape, tuple[int, ...]]:
    """The shape in which boxes have axes of their own, and which those are."""
    split: list[int] = []
    axes: list[int] = []
    for n, b in zip(shape, structure.box(tuple(shape)), strict=True):
        if b == 1:
            split.append(n)
        elif b == n:
            axes.append(len(split))
            split.append(n)
        else:
            axes.append(len(split) + 1)
            split += [n // b, b]
    return tuple(split), tuple(axes)


def _boxed(structure: Structure, x: Array) -> tuple[Array, tuple[int, ...]]:
    """`x` with axes of their own for boxes, and which those are."""
    split, axes = _split(structure, x.shape)
    sharding = jax.typeof(x).sharding
    if split == x.shape or not masking.is_explicit(sharding):
        return x.reshape(split), axes
    # On Explicit mesh axes it is to be said how the result is sharded: as `x` is, but
    # along an axis whose boxes lie across devices.
    spec: list[Any] = []
    boxes = structure.box(tuple(x.shape))
    for n, b, names in zip(x.shape, boxes, sharding.spec, strict=True):
        if b in (1, n):
            spec.append(names)
            continue
        parts = math.prod(sharding.mesh.shape[name] for name in mesh_axes([names]))
        spec += [names if n // b % parts == 0 else None, None]
    spread_out = sharding.update(spec=jax.sharding.PartitionSpec(*spec))
    return lax.reshape(x, split, out_sharding=spread_out), axes


def _whole_along(x: Array, axis: int) -> Array:
    """`x`, not sharded along an axis."""
    sharding = jax.typeof(x).sharding
    if not masking.is_explicit(sharding) or sharding.spec[axis] is None:
        return x
    spec = jax.sharding.PartitionSpec(
        *(None if i == axis else names for i, names in enumerate(sharding.spec))
    )
    return jax.sharding.reshard(x, sharding.update(spec=spec))


def _unboxed(x: Array, like: Array) -> Array:
    """What `_boxed` split, with the shape and the sharding of `like`."""
    sharding = jax.typeof(like).sharding
    if not masking.is_explicit(sharding):
        return x.reshape(like.shape)
    if x.shape == like.shape:
        return jax.sharding.reshard(x, sharding)
    return lax.reshape(x, like.shape, out_sharding=sharding)
