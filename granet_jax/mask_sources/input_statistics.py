"""Statistics of the inputs of every kernel, of any model, from batches of data.

Wanda, RIA, OWL, SparseGPT and DSnoT compare weights by the inputs that they meet. The
program of the model is read, so that linen, nnx, equinox and plain functions need no
hooks. The statistics are sums over the batches, and each batch is dropped after its
turn.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from granet_jax import masking
from granet_jax.checks import check_flag, check_function
from granet_jax.mask_sources.input_sums import InputSums
from granet_jax.mask_sources.loss_gradients import check_batches
from granet_jax.mask_sources.product_inputs import (
    ProductInputs,
    UnknownInputsError,
    Value,
)
from granet_jax.mask_sources.weight_places import INPUT, Weights, keep
from granet_jax.masking import PyTree, Where

ApplyFn = Callable[[PyTree, Any], Any]


class InputStatistics(NamedTuple):
    """Statistics of the inputs that meet the weights of one kernel.

    The arrays but `products` broadcast over the kernel: they have its axes, with length
    1 along axes that count outputs, whose inputs are the same. All are float32 or
    wider.

    Attributes:
      mean: The mean of the inputs.
      mean_square: The mean of their squares. It times the number of inputs is the
        squared norm of the papers.
      products: The mean of the products of each pair of inputs of an output, for
        SparseGPT; else None. It has the kernel's axes twice; axes of groups have length
        1 in the second set.
      roles: "input", "output" or "group" for each axis of the kernel. Outputs along an
        axis of groups have inputs of their own, as in stacked layers.
    """

    mean: Array
    mean_square: Array
    products: Array | None
    roles: tuple[str, ...]

    @property
    def input_axes(self) -> tuple[int, ...]:
        """The axes of the kernel that count the inputs of an output."""
        return tuple(axis for axis, role in enumerate(self.roles) if role == INPUT)


def input_statistics(
    apply_fn: ApplyFn,
    params: PyTree,
    batches: Iterable[Any],
    *,
    products: bool = False,
    where: Where = None,
) -> dict[str, InputStatistics]:
    """Return statistics of the inputs of every maskable kernel.

    A kernel may be transposed, reshaped, cast, masked, joined with others, sliced along
    its inputs or layers, stacked for `lax.scan`, or used several times. The products
    may be matrix products or convolutions, in `jit`, `vmap` or `remat`. With sharded
    batches, the sums are over all devices.

    Args:
      apply_fn: Function (params, batch) -> anything, such as a loss or logits.
      params: Pytree of arrays.
      batches: List, loader or other iterable of pytrees of arrays. Each input counts
        the same.
      products: Whether to compute the mean of the products of each pair of inputs. It
        takes memory for the squared number of inputs of every kernel.
      where: Which leaves carry a mask, as in `granet_jax.transform`.

    Returns:
      The statistics of each maskable leaf by its name ("dense/kernel").

    Raises:
      ValueError: There is no batch, or the inputs of a leaf cannot be told: there is no
        product with it, it enters a product in a form that is computed from its
        weights, or its outputs are read in parts.
      TypeError: `apply_fn` is not a function, or `batches` is not iterable.
    """
    check_function("apply_fn", apply_fn, "a function (params, batch) -> outputs")
    check_flag("products", products)
    check_batches(batches, passes=1)
    chosen = tuple(jax.tree.leaves(masking.maskable(params, where)))
    total: dict[str, InputSums] | None = None
    with jax.default_matmul_precision("highest"):
        for batch in batches:
            sums = _sums(apply_fn, params, batch, chosen, products)
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    if total is None:
        raise ValueError("batches must hold at least one batch, got none.")
    return {name: _statistics(sums) for name, sums in total.items()}


# Blocks of a network that are the same function share the compiled program.
@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _sums(
    apply_fn: ApplyFn,
    params: PyTree,
    batch: Any,
    chosen: tuple[bool, ...],
    products: bool,
) -> dict[str, InputSums]:
    """The sums of one batch, for every leaf that is True in `chosen`."""
    program = jax.make_jaxpr(apply_fn)(params, batch)
    named = jax.tree_util.tree_leaves_with_path(params)
    names = [masking.leaf_name(path) for path, _ in named]
    values = [
        Value(leaf, (Weights(i, keep),) if is_chosen else ())
        for i, ((_, leaf), is_chosen) in enumerate(zip(named, chosen, strict=True))
    ]
    values += [Value(x, from_batch=True) for x in jax.tree.leaves(batch)]
    try:
        _, sums = ProductInputs(products).evaluate(
            program.jaxpr, program.consts, values
        )
    except UnknownInputsError as error:
        parameter, cause = error.args
        raise ValueError(
            f"the inputs of {names[parameter]!r} cannot be told: {cause}. Write "
            "apply_fn otherwise, or leave the kernel out by `where`."
        ) from None
    missing = [
        repr(name)
        for i, (name, value) in enumerate(zip(names, values, strict=False))
        if value.weights and i not in sums
    ]
    if missing:
        raise ValueError(
            f"apply_fn has no product of the batch with {', '.join(missing)}, so they "
            "have no inputs: leave them out by `where`, which takes a regular "
            "expression or a function of (name, leaf)."
        )
    return {names[i]: found for i, found in sums.items()}


def _statistics(sums: InputSums) -> InputStatistics:
    count = jnp.maximum(sums.count, 1)
    pairs = sums.products
    if pairs is not None:
        pairs = pairs / jnp.expand_dims(count, range(count.ndim, pairs.ndim))
    return InputStatistics(sums.total / count, sums.squares / count, pairs, sums.roles)
