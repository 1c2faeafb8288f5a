"""Analysis of sparse networks: tables, FLOPs, mask metrics, plots, plasticity."""

from granet_jax.analysis.average_density import average_density as average_density
from granet_jax.analysis.batch_norms import batch_statistics as batch_statistics
from granet_jax.analysis.metrics import Churn as Churn
from granet_jax.analysis.metrics import Connectivity as Connectivity
from granet_jax.analysis.metrics import Overlap as Overlap
from granet_jax.analysis.metrics import PerLeaf as PerLeaf
from granet_jax.analysis.metrics import chance_iou as chance_iou
from granet_jax.analysis.metrics import channel_density as channel_density
from granet_jax.analysis.metrics import churn as churn
from granet_jax.analysis.metrics import connectivity as connectivity
from granet_jax.analysis.metrics import dead_units as dead_units
from granet_jax.analysis.metrics import exploration as exploration
from granet_jax.analysis.metrics import (
    exploration_over_time as exploration_over_time,
)
from granet_jax.analysis.metrics import gradient_flow as gradient_flow
from granet_jax.analysis.metrics import overlap as overlap
from granet_jax.analysis.network_flops import Flops as Flops
from granet_jax.analysis.network_flops import LeafFlops as LeafFlops
from granet_jax.analysis.network_flops import flops as flops
from granet_jax.analysis.plasticity import Pruned as Pruned
from granet_jax.analysis.plasticity import Recovery as Recovery
from granet_jax.analysis.plasticity import apply_pruned as apply_pruned
from granet_jax.analysis.plasticity import keep_counts as keep_counts
from granet_jax.analysis.plasticity import prune as prune
from granet_jax.analysis.plasticity import sparsities as sparsities
from granet_jax.analysis.sharpness import sharpness as sharpness
from granet_jax.analysis.summary_table import Summary as Summary
from granet_jax.analysis.summary_table import summary as summary
from granet_jax.analysis.training_run_flops import training_flops as training_flops
from granet_jax.masking import by_layer as by_layer
