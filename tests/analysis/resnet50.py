"""FLOPs of ResNet-50 for ImageNet, which two test modules share."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import models
from granet_jax import analysis
from granet_jax.analysis import Flops


@functools.cache
def resnet50_flops() -> Flops:
    """FLOPs for one image; all kernels have a mask in which every weight is active."""
    model = models.create("resnet-50", classes=1000)
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), x)
    params = variables.pop("params")
    masks = jax.tree.map(
        lambda leaf: np.broadcast_to(True, leaf.shape) if leaf.ndim > 1 else None,
        params,
    )

    def apply(params: Any, rest: Any, x: Any) -> Any:
        return model.apply({"params": params, **rest}, x, train=False)

    return analysis.flops(apply, params, masks, variables, x)
