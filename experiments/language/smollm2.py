"""SmolLM2-135M-Instruct: a pretrained transformer of 135 million parameters.

The network is that of Llama: RMS norms before the layers, rotary positions, attention
whose queries share keys and values in groups, and a feed-forward layer with a gate. It
has no biases, and the head shares its kernel with the embedding.

Parameters are a tree of nested dictionaries of float32 arrays, with kernels of shape
(in, out). Their names are `embedding/embedding`, `norm/scale`, and in each of the 30
layers `layer_00` to `layer_29`: `norm_1/scale`, `query/kernel`, `key/kernel`,
`value/kernel`, `output/kernel`, `norm_2/scale`, `gate/kernel`, `up/kernel` and
`down/kernel`. Kernels come from a file with 4 bits a weight, so they are close to those
of the published model, but not equal.

Everything computes in float32. GPUs and TPUs round the inputs of products by default;
`jax.default_matmul_precision("float32")` prevents it.

References:
  Ben Allal et al., SmolLM2: When Smol Goes Big, 2025.
  Touvron et al., LLaMA: Open and Efficient Foundation Language Models, 2023.
  Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.language import preparation

DEPTH = 30
HEAD_WIDTH = 64
EPSILON = 1e-5
ROTARY_BASE = 1e5

# Names of the parameters of a layer, here and in the file.
_LAYER_NAMES = {
    "norm_1": "attn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "output": "attn_output",
    "norm_2": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def load(data_dir: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Read the parameters from the file of the prepared model.

    Args:
      data_dir: Folder of prepared data sets; None means the folder in TFDS_DATA_DIR,
        otherwise ~/tensorflow_datasets.

    Returns:
      The tree of float32 arrays that the top of this file describes.

    Raises:
      FileNotFoundError: The model is not prepared.
      ModuleNotFoundError: The package gguf is missing.
    """
    tensors = {
        tensor.name.removesuffix(".weight"): tensor
        for tensor in preparation.reader(data_dir).tensors
    }
    dequantize = preparation.package("gguf").dequantize

    def values(name: str) -> np.ndarray:
        return dequantize(tensors[name].data, tensors[name].tensor_type)

    params: dict[str, Any] = {
        "embedding": {"embedding": jnp.asarray(values("token_embd"))},
        "norm": {"scale": jnp.asarray(values("output_norm"))},
    }
    for i in range(DEPTH):
        # Matrices of the file have the shape (out, in).
        params[f"layer_{i:02}"] = {
            name: {"scale": jnp.asarray(values(f"blk.{i}.{source}"))}
            if name.startswith("norm")
            else {"kernel": jnp.asarray(values(f"blk.{i}.{source}").T)}
            for name, source in _LAYER_NAMES.items()
        }
    return params


def apply(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """Return logits (n, length, 49152) of the next tokens for tokens (n, length).

    Position i of the logits depends on the tokens up to i. The model was trained on
    lengths up to 8,192.
    """
    hidden = embed(params, tokens)
    for name in layer_names():
        hidden = block(params[name], hidden)
    return head(params, hidden)


def layer_names() -> list[str]:
    """Return the names of the layers, in the order of the network."""
    return [f"layer_{i:02}" for i in range(DEPTH)]


def embed(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """Return the input (n, length, 576) of the first layer for tokens (n, length)."""
    return params["embedding"]["embedding"][tokens]


def block(layer: dict[str, Any], hidden: jax.Array) -> jax.Array:
    """Apply one layer: attention, then the feed-forward layer.

    The widths are those of the kernels. Attention heads have width 64.

    Args:
      layer: Parameters of the layer, such as `params["layer_00"]`.
      hidden: Output of the previous layer, (n, length, width).

    Returns:
      An array of the shape of `hidden`.
    """

    def dense(name: str, x: jax.Array) -> jax.Array:
        return x @ layer[name]["kernel"]

    n, length, _ = hidden.shape
    x = _rms_norm(layer["norm_1"], hidden)
    query, key, value = (
        dense(name, x).reshape(n, length, -1, HEAD_WIDTH)
        for name in ("query", "key", "value")
    )
    x = jax.nn.dot_product_attention(
        _rotate(query), _rotate(key), value, is_causal=True
    )
    hidden = hidden + dense("output", x.reshape(n, length, -1))

    x = _rms_norm(layer["norm_2"], hidden)
    x = jax.nn.silu(dense("gate", x)) * dense("up", x)
    return hidden + dense("down", x)


def head(params: dict[str, Any], hidden: jax.Array) -> jax.Array:
    """Return logits (n, length, 49152) for the output of the last layer."""
    return _rms_norm(params["norm"], hidden) @ params["embedding"]["embedding"].T


def _rms_norm(norm: dict[str, Any], x: jax.Array) -> jax.Array:
    square = jnp.mean(x**2, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(square + EPSILON) * norm["scale"][None, None]


def _rotate(x: jax.Array) -> jax.Array:
    """Rotate each pair of neighbours in (n, length, heads, width) by its position.

    Pair i of position p turns by p / base^(2 i / width). The file has the two members
    of a pair side by side; the published model has them width / 2 apart.
    """
    width = x.shape[-1]
    frequency = ROTARY_BASE ** (-jnp.arange(0, width, 2) / width)
    angle = jnp.arange(x.shape[1])[:, None] * frequency[None]
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    first, second = x[..., ::2], x[..., 1::2]
    pairs = [first * cos - second * sin, first * sin + second * cos]
    return jnp.stack(pairs, axis=-1).reshape(x.shape)
