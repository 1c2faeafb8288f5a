"""Methods of sparse training, one file each, and the record that describes them."""

from granet_jax.methods.method import Method as Method
from granet_jax.methods.method import check_method as check_method
