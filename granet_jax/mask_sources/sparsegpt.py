"""SparseGPT: prune a pretrained network, and repair each layer's remaining weights."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from granet_jax import structured_selection, structures
from granet_jax.checks import check_integer, check_number
from granet_jax.distributions import total_count
from granet_jax.mask_sources.by_inputs import (
    Sparsities,
    Statistics,
    as_float,
    leaves_with_statistics,
    sparsity_of_each,
    tree_like,
)
from granet_jax.mask_sources.matrices import (
    as_matrices,
    from_matrices,
    group_length,
    input_products,
)
from granet_jax.mask_sources.select import with_weights
from granet_jax.masking import PyTree
from granet_jax.selection import top_k
from granet_jax.structures import Structure


def sparsegpt(
    params: PyTree,
    statistics: Statistics,
    sparsity: Sparsities,
    *,
    structure: Structure | None = None,
    block_size: int = 128,
    damping: float = 0.01,
) -> tuple[PyTree, PyTree]:
    """Return the parameters and masks of SparseGPT.

    Each layer's outputs on the batches stay as close as they can: whenever a weight is
    pruned, the later weights of its row change to make up for it, as in Optimal Brain
    Surgeon. Rows are processed in blocks of inputs, and each block keeps the same share
    of weights::

        statistics = mask_sources.input_statistics(
            apply_fn, params, batches, products=True
        )
        params, masks = mask_sources.sparsegpt(params, statistics, 0.5)

    Args:
      params: Pytree of arrays, the pretrained parameters.
      statistics: Result of `input_statistics` with `products=True`, from at least as
        many inputs as the widest layer has.
      sparsity: Share of pruned weights, see `wanda`.
      structure: None for single weights, or `structures.n_of_m` along the inputs.
      block_size: Inputs whose weights are chosen at once, without a structure.
      damping: What is added to the mean squares of the inputs, as a share of their
        mean, above 0.

    Returns:
      The parameters, with the repaired weights, and zeros where pruned; and masks with
      their structure. Each layer has exactly the sparsity asked for. Weights whose
      inputs are always zero become zero.

    Raises:
      ValueError, TypeError: An argument is out of range, statistics have no products or
        are of other parameters, or the structure is another.

    References:
      Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned
      in One-Shot, ICML 2023, algorithm 1.
    """
    check_integer("block_size", block_size, least=1)
    check_number("damping", damping, above=0.0)
    leaves = leaves_with_statistics(params, statistics)
    wanted = sparsity_of_each(statistics, sparsity, structure)
    repaired, masks = {}, {}
    for name, leaf in leaves.items():
        found = statistics[name]
        length = group_length(structure, name, leaf.shape, found)
        weights, products = as_matrices(as_float(leaf), found), input_products(found)
        _, rows, inputs = weights.shape
        block = min(block_size, inputs) if length is None else length
        with jax.default_matmul_precision("highest"):
            values, chosen = _prune(
                weights,
                products,
                numbers=_numbers(rows, inputs, block, wanted[name]),
                block=block,
                by_row=length is not None,
                damping=damping,
            )
        repaired[name] = from_matrices(values, leaf.shape, found).astype(leaf.dtype)
        masks[name] = from_matrices(chosen, leaf.shape, found)
    weights = tree_like(params, repaired)
    return with_weights(params, weights), tree_like(params, masks)


def _numbers(rows: int, inputs: int, block: int, sparsity: float) -> tuple[int, ...]:
    """The number of weights that each block of inputs keeps, which sum to the total."""
    ends = [min(end, inputs) for end in range(0, inputs + block, block)]
    totals = [total_count(rows * end, sparsity) for end in ends]
    return tuple(b - a for a, b in itertools.pairwise(totals))


@functools.partial(jax.jit, static_argnames=("numbers", "block", "by_row"))
def _prune(
    weights: Array,
    products: Array,
    *,
    numbers: tuple[int, ...],
    block: int,
    by_row: bool,
    damping: float,
) -> tuple[Array, Array]:
    """Prune matrices (groups, rows, inputs), whose inputs have these mean products."""
    _, rows, inputs = weights.shape
    padding = len(numbers) * block - inputs
    columns = jnp.arange(len(numbers) * block)

    def choose(scores: Array, start: Array, number: Array) -> Array:
        """Choose the weights of a block that stay."""
        if by_row:
            row = structures.constant_fan_in(axis=0)
            each = (number // rows)[None]
            return structured_selection.select(row, [scores], each, scope="layer")[0]
        real = jnp.broadcast_to(start + jnp.arange(block) < inputs, scores.shape)
        return top_k([scores], number, among=[real])[0]

    def prune_block(w: Array, step: Any, root: Array) -> tuple[Array, Array]:
        start, number = step
        part = lax.dynamic_slice_in_dim(w, start, block, axis=1)
        after = lax.dynamic_slice_in_dim(root, start, block, axis=0)
        within = lax.dynamic_slice_in_dim(after, start, block, axis=1)
        scale = jnp.diagonal(within)
        mask = choose(jnp.square(part / scale[None]), start, number)

        def prune_column(j: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            part, errors = state
            error = jnp.where(mask[:, j], 0, part[:, j]) / scale[j]
            # The root is upper triangular, so only this column and later ones change.
            return part - jnp.outer(error, within[j]), errors.at[:, j].set(error)

        part, errors = lax.fori_loop(
            0, block, prune_column, (part, jnp.zeros_like(part))
        )
        w -= errors @ jnp.where(columns[None] >= start + block, after, 0)
        kept = jnp.where(mask, part, 0)
        return lax.dynamic_update_slice_in_dim(w, kept, start, axis=1), mask

    def prune_matrix(pair: tuple[Array, Array]) -> tuple[Array, Array]:
        w, square = pair
        dead = jnp.diagonal(square) == 0
        w = jnp.pad(jnp.where(dead[None], 0, w), ((0, 0), (0, padding)))
        root = _root_of_inverse(square, dead, damping)
        root = jnp.pad(root, (0, padding)) + jnp.diag(1.0 * (columns >= inputs))
        starts = block * jnp.arange(len(numbers))
        w, masks = lax.scan(
            functools.partial(prune_block, root=root),
            w,
            (starts, jnp.asarray(numbers)),
        )
        masks = jnp.moveaxis(masks, 0, 1).reshape(rows, -1)
        return w[:, :inputs], masks[:, :inputs]

    return lax.map(prune_matrix, (weights, products))


def _root_of_inverse(products: Array, dead: Array, damping: float) -> Array:
    """The upper triangular U with U^T U = H^-1, for the damped products H."""
    diagonal = jnp.where(dead, 1, jnp.diagonal(products))
    hessian = products + jnp.diag(damping * jnp.mean(diagonal) + jnp.where(dead, 1, 0))
    # H = R R^T with an upper triangular R, whose inverse is U.
    upper = jnp.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    identity = jnp.eye(len(upper), dtype=upper.dtype)
    return jax.scipy.linalg.solve_triangular(upper, identity, lower=False)
