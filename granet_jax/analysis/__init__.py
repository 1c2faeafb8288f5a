"""Looking at sparse training: how well a network recovers from pruning."""

from granet_jax.analysis.plasticity import Pruned as Pruned
from granet_jax.analysis.plasticity import Recovery as Recovery
from granet_jax.analysis.plasticity import apply_pruned as apply_pruned
from granet_jax.analysis.plasticity import keep_counts as keep_counts
from granet_jax.analysis.plasticity import prune as prune
from granet_jax.analysis.plasticity import sparsities as sparsities
