"""Where masks come from: at initialisation from scores, or from lottery tickets.

Each source gives masks of the structure of the parameters, for
`granet_jax.transform(granet_jax.static(0.0), inner, masks=masks)` or any other method
that is to start from them.
"""

from granet_jax.mask_sources.connectivity import Collapse as Collapse
from granet_jax.mask_sources.connectivity import collapse as collapse
from granet_jax.mask_sources.connectivity import connected as connected
from granet_jax.mask_sources.flow import synflow as synflow
from granet_jax.mask_sources.flow import synflow_scores as synflow_scores
from granet_jax.mask_sources.lottery import Ticket as Ticket
from granet_jax.mask_sources.lottery import lottery_tickets as lottery_tickets
from granet_jax.mask_sources.saliency import cross_entropy as cross_entropy
from granet_jax.mask_sources.saliency import force as force
from granet_jax.mask_sources.saliency import grasp as grasp
from granet_jax.mask_sources.saliency import grasp_scores as grasp_scores
from granet_jax.mask_sources.saliency import snip as snip
from granet_jax.mask_sources.saliency import snip_scores as snip_scores
from granet_jax.mask_sources.selecting import from_score as from_score
from granet_jax.mask_sources.selecting import magnitude as magnitude
from granet_jax.mask_sources.selecting import random as random
from granet_jax.mask_sources.selecting import select as select
from granet_jax.mask_sources.selecting import shuffle as shuffle
