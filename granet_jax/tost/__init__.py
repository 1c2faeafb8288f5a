"""ToST: techniques for training a sparse network with any mask.

They are ghost activations and ghost skips, which exist early in training only; a
rescaled initialization; and smoothed labels. The flax module of ghost skips is in
`granet_jax.tost.linen`, which must be imported explicitly because the rest of the
library does not need flax.

References:
  Jaiswal et al., Training Your Sparse Neural Network Better with Any Mask, ICML 2022.
"""

from granet_jax.tost.config import Labels as Labels
from granet_jax.tost.config import Neurons as Neurons
from granet_jax.tost.config import Skips as Skips
from granet_jax.tost.config import ToST as ToST
from granet_jax.tost.config import activation as activation
from granet_jax.tost.config import ghost_steps as ghost_steps
from granet_jax.tost.config import label_alpha as label_alpha
from granet_jax.tost.config import reproduce as reproduce
from granet_jax.tost.config import skip_alpha as skip_alpha
from granet_jax.tost.ghost_activations import ghost_activation as ghost_activation
from granet_jax.tost.ghost_activations import soft_relu as soft_relu
from granet_jax.tost.ghost_schedules import early as early
from granet_jax.tost.ghost_schedules import fading as fading
from granet_jax.tost.ghost_schedules import sharpening as sharpening
from granet_jax.tost.ghost_skips import drop_ghosts as drop_ghosts
from granet_jax.tost.ghost_skips import ghost_skip as ghost_skip
from granet_jax.tost.ghost_skips import is_ghost as is_ghost
from granet_jax.tost.ghost_skips import without_ghosts as without_ghosts
from granet_jax.tost.label_smoothing import smooth_targets as smooth_targets
from granet_jax.tost.label_smoothing import (
    smoothed_cross_entropy as smoothed_cross_entropy,
)
from granet_jax.tost.rescaled_init import Rescaled as Rescaled
from granet_jax.tost.rescaled_init import rescale_init as rescale_init
from granet_jax.tost.scale_descent import LRsI as LRsI
