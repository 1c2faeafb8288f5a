"""The tokens of SmolLM2: byte-level pairs, and every digit on its own.

The vocabulary and the merges are in the file of the model.

References:
  Sennrich et al., Neural Machine Translation of Rare Words with Subword Units, 2016.
"""

import os
from typing import Any

import numpy as np

from experiments.language import preparation


def tokenizer(data_dir: str | os.PathLike[str] | None = None) -> Any:
    """Read the tokenizer from the file of the prepared model.

    Args:
      data_dir: Folder of prepared data sets; None means the folder in TFDS_DATA_DIR,
        otherwise ~/tensorflow_datasets.

    Returns:
      A `tokenizers.Tokenizer`.

    Raises:
      FileNotFoundError: The model is not prepared.
      ModuleNotFoundError: The package gguf or tokenizers is missing.
    """
    tokenizers = preparation.package("tokenizers")
    fields = preparation.reader(data_dir).fields
    parts = tokenizers.pre_tokenizers

    def content(name: str) -> Any:
        return fields[f"tokenizer.ggml.{name}"].contents()

    tokens: list[str] = content("tokens")
    pairs = [tuple(merge.split(" ")) for merge in content("merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=pairs)
    result = tokenizers.Tokenizer(model)
    # The file names this rule "smollm".
    result.pre_tokenizer = parts.Sequence(
        [
            parts.Digits(individual_digits=True),
            parts.ByteLevel(add_prefix_space=False),
        ]
    )
    result.decoder = tokenizers.decoders.ByteLevel()
    # Type 3 marks control tokens, such as <|im_start|>.
    result.add_special_tokens(
        [
            token
            for token, kind in zip(tokens, content("token_type"), strict=True)
            if kind == 3
        ]
    )
    return result


def encode(tokenizer: Any, text: str) -> np.ndarray:
    """Return the int32 tokens of `text`, in which control tokens have their names."""
    return np.asarray(tokenizer.encode(text).ids, np.int32)


def decode(tokenizer: Any, tokens: np.ndarray) -> str:
    """Return the text of tokens: the inverse of `encode`."""
    return tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=False)
