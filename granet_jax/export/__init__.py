"""Sparse parameters on disk, and in the sparse formats of JAX and SciPy."""

from granet_jax.export.safetensors_file import VERSION as VERSION
from granet_jax.export.safetensors_file import load as load
from granet_jax.export.safetensors_file import mask_entropy as mask_entropy
from granet_jax.export.safetensors_file import read_metadata as read_metadata
from granet_jax.export.safetensors_file import save as save
from granet_jax.export.safetensors_file import to_bcoo as to_bcoo
from granet_jax.export.safetensors_file import to_bcsr as to_bcsr
from granet_jax.export.safetensors_file import to_csr as to_csr
