"""Prunes the language model by each of the methods for pretrained networks."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

import granet_jax
from experiments.language import smollm2
from granet_jax import mask_sources, scores, structures
from granet_jax.structures import Structure

METHODS = (
    *("magnitude", "magnitude-row", "wanda", "ria", "owl", "sparsegpt", "dsnot"),
)
Params = dict[str, Any]


def parse_sparsity(text: str) -> tuple[float, Structure | None]:
    """Read a sparsity such as "0.5", or a pattern such as "2:4" along the inputs.

    Raises:
      ValueError: The text is neither.
    """
    try:
        if ":" in text:
            n, m = map(int, text.split(":"))
            return 1.0 - n / m, structures.n_of_m(n, m)
        if 0.0 <= float(text) < 1.0:
            return float(text), None
    except (ValueError, ZeroDivisionError):
        pass
    raise ValueError(
        "sparsity must be a number in [0, 1) such as 0.5, or a pattern n:m such as "
        f"2:4, got {text!r}."
    )


def check_method(method: str, structure: Structure | None) -> None:
    """Raise ValueError unless the method exists and allows the structure."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    if structure is not None and method in ("magnitude-row", "owl"):
        raise ValueError(
            f"method {method} decides how many weights a row or a layer keeps, which "
            f"{structure.name} does already: take another method, or a sparsity."
        )


def prune(
    method: str,
    params: Params,
    batches: Sequence[jax.Array],
    sparsity: float,
    structure: Structure | None,
    on_layer: Callable[[], object],
) -> tuple[Params, Params]:
    """Prune the kernels of each layer, on the outputs of the pruned layers before it.

    The embedding, which is also the head, stays dense, as in the papers.

    Args:
      method: One of `METHODS`.
      params: Parameters of the network.
      batches: Tokens for calibration, each (n, length).
      sparsity: Share of pruned weights of the layers.
      structure: Structure of the masks, or None.
      on_layer: Function that is called after each layer.

    Returns:
      The parameters, with zeros where pruned; and masks with their structure.
    """
    check_method(method, structure)
    if method.startswith("magnitude"):
        rows = structures.constant_fan_in() if method == "magnitude-row" else structure
        masks = mask_sources.from_score(
            *(scores.magnitude, params, sparsity),
            scope="layer",
            structure=rows,
            where="layer_.*kernel",
        )
        return granet_jax.apply_masks(params, masks), masks
    names = smollm2.layer_names()
    hidden = [smollm2.embed(params, tokens) for tokens in batches]
    by_layer = (
        _owl(params, hidden, sparsity)
        if method == "owl"
        else dict.fromkeys(names, sparsity)
    )

    def prune_layer(
        i: int, block: Any, layer: Params, batches: list[jax.Array]
    ) -> tuple[Params, Params]:
        sparsity = by_layer[names[i]]
        pruned = _prune_layer(method, block, layer, batches, sparsity, structure)
        on_layer()
        return pruned

    layers, masks = mask_sources.block_by_block(
        [smollm2.block] * len(names),
        [params[name] for name in names],
        hidden,
        prune_layer,
    )
    dense = jax.tree.map(lambda _: optax.MaskedNode(), params)
    return (
        params | dict(zip(names, layers, strict=True)),
        dense | dict(zip(names, masks, strict=True)),
    )


def _prune_layer(
    method: str,
    block: Any,
    layer: Params,
    batches: list[jax.Array],
    sparsity: float,
    structure: Structure | None,
) -> tuple[Params, Params]:
    products = method == "sparsegpt"
    found = mask_sources.input_statistics(block, layer, batches, products=products)
    if method == "sparsegpt":
        return mask_sources.sparsegpt(layer, found, sparsity, structure=structure)
    source = mask_sources.ria if method == "ria" else mask_sources.wanda
    masks = source(layer, found, sparsity, structure=structure)
    if method == "dsnot":
        masks = mask_sources.dsnot(layer, masks, found, structure=structure)
    return granet_jax.apply_masks(layer, masks), masks


def _owl(params: Params, hidden: list[jax.Array], sparsity: float) -> dict[str, float]:
    """The sparsity of each layer, by the outliers in the dense network."""
    names = smollm2.layer_names()
    statistics: dict[str, Any] = {}

    def observe(
        i: int, block: Any, layer: Params, batches: list[jax.Array]
    ) -> tuple[Params, None]:
        found = mask_sources.input_statistics(block, layer, batches)
        statistics.update({f"{names[i]}/{k}": value for k, value in found.items()})
        return layer, None

    mask_sources.block_by_block(
        [smollm2.block] * len(names), [params[name] for name in names], hidden, observe
    )
    sparsities = mask_sources.owl(
        params, statistics, sparsity, block=lambda name: name.split("/")[0]
    )
    return {name.split("/")[0]: value for name, value in sparsities.items()}
