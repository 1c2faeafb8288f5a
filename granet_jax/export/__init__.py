"""Sparse parameters on disk, and in the sparse formats of JAX and SciPy.

::

    from granet_jax import export

    export.save("net.safetensors", params, granet_jax.get_masks(opt_state))
    params, masks = export.load("net.safetensors")
    kernel = export.to_bcsr(params["dense"]["kernel"], masks["dense"]["kernel"])

Needs the extra `granet_jax[export]`: safetensors, and SciPy for `to_csr`.
"""

from granet_jax.export.mask_code import mask_entropy as mask_entropy
from granet_jax.export.safetensors_file import VERSION as VERSION
from granet_jax.export.safetensors_file import load as load
from granet_jax.export.safetensors_file import read_metadata as read_metadata
from granet_jax.export.safetensors_file import save as save
from granet_jax.export.sparse_formats import to_bcoo as to_bcoo
from granet_jax.export.sparse_formats import to_bcsr as to_bcsr
from granet_jax.export.sparse_formats import to_csr as to_csr
