"""The code of a mask, against a reader that follows its documentation bit by bit."""

import math

import hypothesis
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from granet_jax import export
from granet_jax.export import mask_code


def read(code: np.ndarray, size: int, active: int) -> list[bool]:
    """The mask, decoded as the docstring of `mask_code` says."""
    if 2 * active > size:
        return [not bit for bit in read(code, size, size - active)]
    bits = [byte >> (7 - i) & 1 for byte in code.tolist() for i in range(8)]
    width = 0
    if active:
        golden = (1 + math.sqrt(5)) / 2
        # The logarithm of 1 - density, to the order that the format uses.
        ratio = -math.log(golden - 1) * (size / active - 0.5)
        width = max(0, math.floor(1 + math.log2(ratio)))
    place = active * width
    mask: list[bool] = []
    for i in range(active):
        low = bits[i * width : (i + 1) * width]
        gap = sum(bit << j for j, bit in enumerate(reversed(low)))
        while not bits[place]:
            gap += 2**width
            place += 1
        place += 1
        mask += [False] * gap + [True]
    assert len(bits) - place < 8
    assert not any(bits[place:])
    return mask + [False] * (size - len(mask))


@hypothesis.given(
    st.integers(0, 300),
    st.sampled_from([0.0, 0.003, 0.02, 0.1, 0.3, 0.5, 0.9, 1.0]),
    st.integers(0, 1000),
)
@hypothesis.settings(max_examples=100)
def test_a_mask_is_read_as_it_was_written(size: int, density: float, seed: int):
    mask = np.random.default_rng(seed).random(size) < density
    active = int(mask.sum())
    code = mask_code.encode(mask)
    np.testing.assert_array_equal(mask_code.decode(code, size, active), mask)
    assert read(code, size, active) == mask.tolist()


def test_a_code_by_hand():
    # The gaps 0, 7, 13 at k = 3: low bits 000 111 101, then ones after 0, 0, 1 zeros.
    mask = np.zeros(30, bool)
    mask[[0, 8, 22]] = True
    assert mask_code.low_bits(30, 3) == 3
    expected = np.packbits([0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 1])
    np.testing.assert_array_equal(mask_code.encode(mask), expected)


def test_at_half_density_the_code_is_the_bit_mask():
    mask = np.random.default_rng(0).permuted(np.arange(64 * 30) % 2 == 0)
    mask = np.append(mask, [False, True])
    np.testing.assert_array_equal(mask_code.encode(mask), np.packbits(mask))


@pytest.mark.parametrize("beyond", [8, 9])
def test_codes_that_reach_beyond_their_mask_are_refused(beyond: int):
    # 4 of 16 weights: one low bit of every gap, then the rest in unary.
    code = np.packbits(np.asarray([0] * 4 + [0] * beyond + [1] * 4, np.uint8))
    with pytest.raises(ValueError, match="a mask has more than its 16 weights"):
        mask_code.decode(code, 16, 4)


@pytest.mark.parametrize(
    "density", [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.95, 0.99]
)
def test_the_code_is_at_most_3_percent_longer_than_the_entropy(density: float):
    size = 150_000
    mask = np.random.default_rng(0).permuted(np.arange(size) < density * size)
    entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    bits = export.mask_entropy({"w": mask, "bias": optax.MaskedNode()})
    assert bits == pytest.approx(size * entropy, rel=1e-9)
    assert 0.99 * bits < 8 * mask_code.encode(mask).size < 1.03 * bits


def test_the_entropy_of_several_leaves_by_hand():
    masks = {"a": np.array([1, 0, 0, 0], bool), "b": np.ones(5, bool)}
    expected = math.log2(4) + 3 * math.log2(4 / 3)
    assert export.mask_entropy(masks) == pytest.approx(expected, rel=1e-12)
