"""The code that stores a mask: a Rice code of the gaps between active weights.

A gap is the number of pruned weights before an active one, in row-major order. It is
split into its k lowest bits and the rest. The code holds first the k low bits of every
gap, then for every gap as many zero bits as the rest says and a one bit. It ends with
zero bits up to a whole byte.

Where more than half of the weights are active, the roles are exchanged: the gaps are
those between pruned weights. The best k follows from the density; it is 5 at 98%
sparsity and at 2%. From 39% to 61% it is 0, and the code is the plain bit mask (or its
inverse) without the zero bytes at its end. A mask without structure takes at most 3%
more than its entropy (`mask_entropy`).

References:
  Rice, Plaunt, Adaptive Variable-Length Coding for Efficient Compression of Spacecraft
  Television Data, IEEE Transactions on Communication Technology, 1971.
  Kiely, Selecting the Golomb Parameter in Rice Coding, IPN Progress Report 42-159,
  2004.
"""

import math

import jax
import numpy as np

from granet_jax.masking import PyTree, check_concrete, given_masks


def mask_entropy(masks: PyTree) -> float:
    """Return the bits that masks of these densities need if they have no structure.

    A leaf with n weights and density d needs n H(d) bits, where
    H(d) = -d log2(d) - (1 - d) log2(1 - d). Apart from the logarithm of n, no code is
    shorter on average over all masks with the same number of active weights. Masks of
    blocks or with N:M structure need fewer.

    Args:
      masks: Pytree of masks, packed or not, with known (not traced) values.

    Raises:
      TypeError, ValueError: A leaf is not a mask, or is traced.
    """
    masks = given_masks(masks)
    check_concrete("masks", masks)
    bits = 0.0
    for mask in jax.tree.leaves(masks):
        size = math.prod(mask.shape)
        active = int(np.count_nonzero(mask))
        for count in (active, size - active):
            bits += count * math.log2(size / count) if count else 0.0
    return bits


def encode(mask: np.ndarray) -> np.ndarray:
    """Return the bytes (uint8) of a one-dimensional mask."""
    rarer = ~mask if 2 * np.count_nonzero(mask) > mask.size else mask
    gaps = np.diff(np.flatnonzero(rarer), prepend=-1) - 1
    if gaps.size == 0:
        return np.zeros(0, np.uint8)
    width = low_bits(mask.size, gaps.size)
    low = (gaps[:, None] >> np.arange(width)[::-1]) & 1
    ends = np.cumsum((gaps >> width) + 1) - 1
    high = np.zeros(ends[-1] + 1, np.uint8)
    high[ends] = 1
    return np.packbits(np.concatenate([low.astype(np.uint8).reshape(-1), high]))


def decode(code: np.ndarray, size: int, active: int) -> np.ndarray:
    """Return the mask of `size` weights, `active` of them True, from its bytes.

    Raises:
      ValueError: The bytes are not the code of such a mask.
    """
    inverted = 2 * active > size
    gap_count = size - active if inverted else active
    width = low_bits(size, gap_count)
    bits = np.unpackbits(code)
    low, high = bits[: gap_count * width], bits[gap_count * width :]
    ends = np.flatnonzero(high)
    used = low.size + (int(ends[-1]) + 1 if ends.size else 0)
    counts_agree = ends.size == gap_count >= 0 and low.size == gap_count * width
    if not counts_agree or code.size != -(-used // 8):
        raise ValueError(f"a mask does not have the {active} active weights stored")
    gaps = np.diff(ends, prepend=-1) - 1
    # Checked before the shift, which could overflow.
    if int(gaps.sum()) << width > size:
        raise ValueError(f"a mask has more than its {size} weights")
    for bit in low.reshape(gap_count, width).T:
        gaps = 2 * gaps + bit
    positions = np.cumsum(gaps + 1) - 1
    if gap_count and positions[-1] >= size:
        raise ValueError(f"a mask has more than its {size} weights")
    mask = np.full(size, inverted)
    mask[positions] = not inverted
    return mask


def low_bits(size: int, gap_count: int) -> int:
    """Return k, the number of low bits of every gap that are stored as they are.

    For geometrically distributed gaps at density d, the best k is
    max(0, floor(1 + log2(log(phi - 1) / log(1 - d)))), where phi is the golden ratio
    (Kiely, equation 8). Integers give the same k on every machine, so we use
    log(phi - 1) = -0.481 and log(1 - d) = -1 / (1 / d - 1/2), exact to second order.
    """
    if gap_count == 0:
        return 0
    return (481 * (2 * size - gap_count) // (2000 * gap_count)).bit_length()
