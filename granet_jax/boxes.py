"""A layer as boxes: the parts in which a structure keeps or prunes its weights.

Boxes become axes of their own, so that counting within a box is a sum over axes.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer

from granet_jax import masking
from granet_jax.distributions import Shape
from granet_jax.dtypes import wider
from granet_jax.layers import Axes, layer_axes, layer_shape
from granet_jax.shardings import is_explicit
from granet_jax.structures import Structure


class Boxes(NamedTuple):
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


def boxes_of(structure: Structure, leaf: Shape, axes: Axes) -> Boxes:
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
    return Boxes(tuple(shape), tuple(inside), tuple(added), tuple(stack), sides)


def boxed(structure: Structure, x: Array, axes: Axes) -> tuple[Boxes, Array]:
    """The boxes of a leaf whose layers are counted along `axes`, and `x` in them."""
    boxes = boxes_of(structure, x.shape, axes)
    sharding = jax.typeof(x).sharding
    if boxes.shape == x.shape or not is_explicit(sharding):
        return boxes, x.reshape(boxes.shape)
    # With Explicit mesh axes, a reshape needs the sharding of its result. We keep the
    # sharding of `x`, except along axes whose boxes span devices.
    spec: list[Any] = []
    for n, b, names in zip(x.shape, boxes.sides, sharding.spec, strict=True):
        if b in (1, n):
            spec.append(names)
            continue
        group = names if isinstance(names, tuple) else (names,)
        parts = math.prod(sharding.mesh.shape[x] for x in group if x is not None)
        spec += [names if n // b % parts == 0 else None, None]
    out_sharding = sharding.update(spec=jax.sharding.PartitionSpec(*spec))
    return boxes, lax.reshape(x, boxes.shape, out_sharding=out_sharding)


def unboxed(x: Array, like: Array) -> Array:
    """The inverse of `boxed`: `x` with the shape and the sharding of `like`."""
    sharding = jax.typeof(like).sharding
    if not is_explicit(sharding):
        return x.reshape(like.shape)
    if x.shape == like.shape:
        return jax.sharding.reshard(x, sharding)
    return lax.reshape(x, like.shape, out_sharding=sharding)


def with_axes(number: Array, boxes: Boxes) -> Array:
    """Numbers of a leaf's boxes or layers, such that they broadcast over its boxes."""
    return jnp.expand_dims(number, boxes.added) if number.ndim else number


def box_counts(structure: Structure, mask: Array, axes: Axes) -> Array:
    """The number of active weights of every box of a leaf, uint32.

    Args:
      structure: Structure of the mask.
      mask: Mask of one leaf.
      axes: The axes of the leaf that count layers.

    Returns:
      An array with the axes of `mask`, along which it counts boxes.
    """
    boxes, values = boxed(structure, mask, axes)
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
        boxes, values = boxed(structure, wide, axes)
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
        boxes, values = boxed(structure, mask, axes)
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
        boxes = boxes_of(structure, x.shape, axes)
        wide = jnp.broadcast_to(jnp.expand_dims(whole, boxes.added), boxes.shape)
        masks.append(masking.placed_like(unboxed(wide, x), x))
    return masks


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
        within = layer_axes(mask.ndim, axes)
        largest = jnp.max(counts, axis=within, keepdims=True, initial=0)
        most = size if structure.whole else largest
        fits = (counts == most) | (structure.whole & (counts == 0))
        if not bool(jnp.all(fits)):
            raise ValueError(
                f"masks must have the structure {structure.name} of the method, and "
                f"the mask at {name!r} does not have it."
            )
