"""Functional sparse training for JAX: GraNet and the field around it."""

from granet_jax import phases as phases
from granet_jax import schedules as schedules
from granet_jax import structures as structures
from granet_jax._transform import transform as transform
from granet_jax.export.sparse_inference import accelerate as accelerate
from granet_jax.hyperbolic import hyperbolic as hyperbolic
from granet_jax.initial_masks import init_masks as init_masks
from granet_jax.masking import Sparsity as Sparsity
from granet_jax.masking import apply_masks as apply_masks
from granet_jax.masking import pack_masks as pack_masks
from granet_jax.masking import sparsity as sparsity
from granet_jax.masking import unpack_masks as unpack_masks
from granet_jax.methods.acdc import acdc as acdc
from granet_jax.methods.cyclical import cyclical as cyclical
from granet_jax.methods.dsr import dsr as dsr
from granet_jax.methods.gmp import gmp as gmp
from granet_jax.methods.granet import granet as granet
from granet_jax.methods.greg import greg1 as greg1
from granet_jax.methods.greg import greg2 as greg2
from granet_jax.methods.mest import mest as mest
from granet_jax.methods.method import Method as Method
from granet_jax.methods.rigl import rigl as rigl
from granet_jax.methods.sculpt import sculpt as sculpt
from granet_jax.methods.set import set_ as set_
from granet_jax.methods.snfs import snfs as snfs
from granet_jax.methods.srigl import srigl as srigl
from granet_jax.methods.static import static as static
from granet_jax.methods.straight_through import straight_through as straight_through
from granet_jax.methods.top_kast import top_kast as top_kast
from granet_jax.packed_masks import PackedMask as PackedMask
from granet_jax.scores import ScoreInputs as ScoreInputs
from granet_jax.state import SparseState as SparseState
from granet_jax.state import get_masks as get_masks
from granet_jax.state import get_state as get_state
from granet_jax.state import set_masks as set_masks
from granet_jax.state import sparse_view as sparse_view

__version__ = "0.1.0"
