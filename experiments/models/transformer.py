"""Transformers with norms before the layers: ViT for images, GPT for text.

Softmax and norms compute in float32. One kernel produces queries, keys and values, so
that every kernel has two dimensions.

References:
  Vaswani et al., Attention Is All You Need, NeurIPS 2017.
  Dosovitskiy et al., An Image Is Worth 16x16 Words, ICLR 2021.
  Radford et al., Language Models Are Unsupervised Multitask Learners, 2019.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models import layers


class Block(nn.Module):
    """Attention, then two linear layers with GELU, each with a residual connection.

    Attributes:
      heads: Number of attention heads.
      causal: Whether a position attends only to itself and earlier positions.
      epsilon: Epsilon of the norms.
      kernel_init: Initializer of the kernels.
      last_init: Initializer of the last kernel before each residual connection.
      dtype: Dtype of the output.
    """

    heads: int
    causal: bool
    epsilon: float
    kernel_init: layers.Initializer
    last_init: layers.Initializer
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (n, length, width) to the same shape."""
        n, length, width = x.shape
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        norm = functools.partial(nn.LayerNorm, epsilon=self.epsilon, dtype=self.dtype)

        y = dense(3 * width, kernel_init=self.kernel_init, name="attention_1")(
            norm(name="norm_1")(x)
        )
        y = y.reshape(n, length, 3, self.heads, width // self.heads)
        y = jax.nn.dot_product_attention(
            y[:, :, 0], y[:, :, 1], y[:, :, 2], is_causal=self.causal
        )
        y = y.reshape(x.shape)
        x = x + dense(width, kernel_init=self.last_init, name="attention_2")(y)

        y = dense(4 * width, kernel_init=self.kernel_init, name="mlp_1")(
            norm(name="norm_2")(x)
        )
        y = nn.gelu(y, approximate=False)
        return x + dense(width, kernel_init=self.last_init, name="mlp_2")(y)


class ViT(nn.Module):
    """ViT-S/16: 12 blocks of width 384 over patches of 16 x 16 pixels.

    It has a class token, learned positions, and no dropout. The initialisation is that
    of timm: kernels and positions are normal with standard deviation 0.02, and the
    patch kernel has PyTorch's default.

    Attributes:
      classes: Number of logits.
      dtype: Dtype of the blocks.
    """

    classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return logits (n, classes) for images (n, height, width, channels)."""
        layers.check_images("vit-s-16", x, smallest=16)
        if x.shape[1] % 16 or x.shape[2] % 16:
            raise ValueError(
                "model vit-s-16 takes images whose height and width are multiples of "
                f"16, got {x.shape[1]} x {x.shape[2]}; resize them, or choose another "
                "model."
            )
        width = 384
        init = nn.initializers.normal(0.02)
        patches = nn.Conv(
            width,
            (16, 16),
            16,
            kernel_init=layers.torch_default,
            dtype=self.dtype,
            name="embedding",
        )
        x = patches(x).reshape(x.shape[0], -1, width)
        token = self.param("token", nn.initializers.normal(1e-6), (1, 1, width))
        token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, width))
        x = jnp.concatenate([token, x], axis=1)
        position = self.param("position", init, (1, *x.shape[1:]))
        x = x + position.astype(x.dtype)
        for i in range(12):
            x = Block(
                heads=6,
                causal=False,
                epsilon=1e-6,
                kernel_init=init,
                last_init=init,
                dtype=self.dtype,
                name=f"layer_{i:02}",
            )(x)
        x = nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name="norm")(x[:, 0])
        return layers.output(self.classes, init=init)(x)


class GPT(nn.Module):
    """A small decoder for bytes: 4 blocks of width 128, contexts of 128 bytes.

    Position i of the output depends on the bytes up to i. The initialisation is that of
    GPT-2: normal with standard deviation 0.02, in the last layer before each residual
    connection divided by the square root of the number of such layers. The classifier
    does not share its kernel with the embedding.

    Attributes:
      classes: Number of logits.
      dtype: Dtype of the blocks.
    """

    classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return logits (n, length, classes) for bytes (n, length)."""
        context, width, depth = 128, 128, 4
        layers.check_text("gpt", x, longest=context)
        init = nn.initializers.normal(0.02)
        position = self.param("position", init, (context, width))
        embed = nn.Embed(
            256, width, embedding_init=init, dtype=self.dtype, name="embedding"
        )
        x = embed(x) + position[None, : x.shape[1]].astype(self.dtype)
        for i in range(depth):
            x = Block(
                heads=4,
                causal=True,
                epsilon=1e-5,
                kernel_init=init,
                last_init=nn.initializers.normal(0.02 / (2 * depth) ** 0.5),
                dtype=self.dtype,
                name=f"layer_{i:02}",
            )(x)
        x = nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, name="norm")(x)
        return layers.output(self.classes, init=init)(x)
