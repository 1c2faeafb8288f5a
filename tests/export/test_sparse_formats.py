"""The sparse formats of JAX and SciPy hold exactly the active weights."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from granet_jax import export
from tests.export.helpers import DENSE, example
from tests.helpers.trees import assert_same

CONVERSIONS = (export.to_bcoo, export.to_bcsr, export.to_csr)


def test_they_hold_the_active_weights():
    params, masks = example()
    w, mask = params["dense"]["kernel"], masks["dense"]["kernel"]
    active = int(mask.sum())
    assert np.count_nonzero(w) == active - 1  # One active weight is zero.
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    bcoo, bcsr, csr = (convert(w, mask) for convert in CONVERSIONS)
    assert (bcoo.nse, bcsr.nse, csr.nnz) == (active,) * 3
    assert isinstance(csr, scipy.sparse.csr_array)
    product = jax.jit(lambda a, b: a @ b)
    for matrix, multiply in ((bcoo, product), (bcsr, product), (csr, operator.matmul)):
        assert_same(np.asarray(matrix.todense()), w)
        np.testing.assert_allclose(multiply(matrix, x), w @ x, rtol=1e-5)


def test_convolutions_and_half_precision():
    params, masks = example()
    half = jnp.asarray(params["conv"]["kernel"], jnp.bfloat16)
    mask = masks["conv"]["kernel"]
    bcoo = export.to_bcoo(half, mask)
    assert (bcoo.nse, bcoo.dtype) == (int(mask.sum()), jnp.bfloat16)
    assert_same(bcoo.todense(), half)
    for convert in (export.to_bcsr, export.to_csr):
        with pytest.raises(ValueError, match="two dimensions"):
            convert(half, mask)
    with pytest.raises(TypeError, match=r"bfloat16.*astype"):
        export.to_csr(half.reshape(-1, 4), mask.reshape(-1, 4))
    for convert in CONVERSIONS:
        with pytest.raises(ValueError, match="no mask"):
            convert(half, DENSE)


def test_quantised_weights():
    mask = np.arange(12).reshape(3, 4) % 3 == 0
    w = np.where(mask, np.arange(12).reshape(3, 4) - 6, 0).astype(np.int8)
    for convert in CONVERSIONS:
        matrix = convert(w, mask)
        assert matrix.dtype == np.int8
        assert_same(np.asarray(matrix.todense()), w)
