"""Masks from sources other than a training method: before, between or after trainings.

Each source returns masks with the structure of the parameters. Pass them to
`granet_jax.transform(granet_jax.static(0.0), inner, masks=masks)` to train with fixed
masks, or to any other method that should start from them.
"""

from granet_jax.mask_sources.block_by_block import block_by_block as block_by_block
from granet_jax.mask_sources.dsnot import dsnot as dsnot
from granet_jax.mask_sources.force import force as force
from granet_jax.mask_sources.grasp import grasp as grasp
from granet_jax.mask_sources.grasp import grasp_scores as grasp_scores
from granet_jax.mask_sources.input_statistics import InputStatistics as InputStatistics
from granet_jax.mask_sources.input_statistics import (
    input_statistics as input_statistics,
)
from granet_jax.mask_sources.layer_collapse import Collapse as Collapse
from granet_jax.mask_sources.layer_collapse import collapse as collapse
from granet_jax.mask_sources.layer_collapse import connected as connected
from granet_jax.mask_sources.loss_gradients import cross_entropy as cross_entropy
from granet_jax.mask_sources.lottery_tickets import Ticket as Ticket
from granet_jax.mask_sources.lottery_tickets import lottery_tickets as lottery_tickets
from granet_jax.mask_sources.magnitude import magnitude as magnitude
from granet_jax.mask_sources.owl import owl as owl
from granet_jax.mask_sources.random import random as random
from granet_jax.mask_sources.random import shuffle as shuffle
from granet_jax.mask_sources.select import from_score as from_score
from granet_jax.mask_sources.select import select as select
from granet_jax.mask_sources.snip import snip as snip
from granet_jax.mask_sources.snip import snip_scores as snip_scores
from granet_jax.mask_sources.sparsegpt import sparsegpt as sparsegpt
from granet_jax.mask_sources.synflow import synflow as synflow
from granet_jax.mask_sources.synflow import synflow_scores as synflow_scores
from granet_jax.mask_sources.wanda import ria as ria
from granet_jax.mask_sources.wanda import wanda as wanda
