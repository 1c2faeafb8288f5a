"""Target numbers where `test_methods`, whose leaves are small, does not reach."""

import numpy as np
import pytest

import granet_jax
from granet_jax import structures, targets


@pytest.mark.parametrize(("total", "dtype"), [(2**32 - 1, "uint32"), (2**32, "uint64")])
def test_numbers_have_64_bits_where_32_do_not_hold_them(total: int, dtype: str) -> None:
    shapes = [(2**31,), (total - 2**31,)]
    number = targets.counts_at(granet_jax.static(0.0), shapes, 0.0)
    assert (int(number), number.dtype) == (total, dtype)


def test_boxes_of_equal_numbers_do_not_compete_across_leaves() -> None:
    # At constant sparsity the scope makes no difference, and may be "global".
    method = granet_jax.granet(
        0.5,
        8,
        interval=1,
        initial_sparsity=0.5,
        scope="global",
        distribution="uniform",
        structure=structures.n_of_m(2, 4),
    )
    actual = targets.active_counts(method, ((8, 4), (4, 2)))
    assert np.array_equal(actual, [[2, 2]] * len(method.updates.steps()))
