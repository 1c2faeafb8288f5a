"""Prunes a network block by block, each on the outputs of the blocks before it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from granet_jax.checks import check_function
from granet_jax.mask_sources.loss_gradients import check_batches
from granet_jax.masking import PyTree

Block = Callable[[PyTree, Any], Any]
# From the number of a block, the block, its parameters and the batches that enter it:
# parameters and masks.
PruneBlock = Callable[[int, Block, PyTree, list[Any]], tuple[PyTree, PyTree]]


def block_by_block(
    blocks: Sequence[Block],
    params: Sequence[PyTree],
    batches: Iterable[Any],
    prune: PruneBlock,
) -> tuple[list[PyTree], list[PyTree]]:
    """Prune one block after another, with inputs from the pruned blocks before it.

    The authors of Wanda and SparseGPT prune this way, so that a block sees the errors
    of those before it. Only the inputs of one block are in memory::

        def prune(i, block, params, batches):
            statistics = mask_sources.input_statistics(block, params, batches)
            masks = mask_sources.wanda(params, statistics, 0.5)
            return granet_jax.apply_masks(params, masks), masks

        params, masks = mask_sources.block_by_block(blocks, params, batches, prune)

    Args:
      blocks: Functions (parameters of the block, inputs) -> outputs, which enter the
        next block. Blocks that are the same function share their compiled program.
      params: The parameters of each block.
      batches: Inputs of the first block: an iterable of pytrees of arrays.
      prune: Function (number of the block, block, its parameters, its batches) ->
        (parameters, masks), of which the parameters must be zero where the masks prune.

    Returns:
      The parameters and the masks of each block.

    Raises:
      ValueError: There are not as many parameters as blocks, or no batches.
      TypeError: An argument has another type.
    """
    check_function("prune", prune, "a function (number, block, params, batches)")
    check_batches(batches, passes=1)
    if not isinstance(blocks, Sequence) or not all(map(callable, blocks)):
        raise TypeError(f"blocks must be a sequence of functions, got {blocks!r}.")
    if len(blocks) != len(params):
        raise ValueError(
            f"params must hold the parameters of each block, got {len(params)} for "
            f"{len(blocks)} blocks."
        )
    inputs = list(batches)
    if not inputs:
        raise ValueError("batches must hold at least one batch, got none.")
    compiled = {block: jax.jit(block) for block in blocks}
    pruned, masks = [], []
    for i, (block, given) in enumerate(zip(blocks, params, strict=True)):
        after, mask = prune(i, block, given, inputs)
        pruned.append(after)
        masks.append(mask)
        if i + 1 < len(blocks):
            inputs = [compiled[block](after, batch) for batch in inputs]
    return pruned, masks
