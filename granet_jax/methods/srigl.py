"""SRigL: RigL with a constant fan-in that ablates whole units (Lasby et al. 2024).

At every update step t, in every layer of a active weights and fan-in k, the number
n = ceil(r(t) a) of weights is to be replaced. A weight is salient if it is among the
a - n active ones of largest magnitude, or among the n others of largest abs(dense
gradient). Units with fewer than max(1, floor(gamma k)) salient weights are ablated: all
their inputs are pruned. The other units share the weights of the layer: each keeps at
most its new fan-in by magnitude, and regrows the rest by abs(dense gradient).
"""

import dataclasses
import math
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from granet_jax import schedules, scores, structures
from granet_jax.boxes import box_counts
from granet_jax.checks import check_fraction
from granet_jax.distributions import Distribution
from granet_jax.layers import divide, layer_axes, layer_shapes
from granet_jax.methods.arguments import constant_sparsity
from granet_jax.methods.method import Method
from granet_jax.phases import Masks, Phase, UpdateInputs, active, grow
from granet_jax.schedules import Schedule
from granet_jax.selection import top_k
from granet_jax.structured_selection import fill, select
from granet_jax.structures import Structure


def srigl(
    sparsity: float,
    total_steps: int,
    *,
    keep_units: str,
    interval: int = 100,
    fraction: float = 0.3,
    stop: float = 0.75,
    min_salient: float = 0.3,
    distribution: Distribution = "erk",
    axis: int = -1,
) -> Method:
    """SRigL: constant fan-in, drop by magnitude, regrow by gradient, ablate units.

    At high sparsity a layer does better with fewer units of more inputs each. All units
    of a layer that are not ablated have the same number of inputs: the layer's active
    weights, divided by these units and rounded. So the number of active weights may
    differ by half a weight for each of these units from that of
    `rigl(..., structure=structures.constant_fan_in())`. A unit is ablated or not anew
    in every update.

    Args:
      sparsity: Constant sparsity, in [0, 1).
      total_steps: Optimizer steps of the whole training.
      keep_units: A regular expression that is searched for in the names of the leaves:
        their units are never ablated. Name the last layer, whose units are the outputs
        of the network.
      interval: Steps between mask updates.
      fraction: Prune fraction at the start, in [0, 1].
      stop: Share of the training after which masks no longer change, in (0, 1].
      min_salient: Share gamma of the fan-in that a unit must have in salient weights,
        in [0, 1]. The paper takes 0.3 for convolutional networks and 0.95 for
        transformers.
      distribution: Distribution of the initial masks: "uniform", "er", "erk" or a
        function.
      axis: Axis of a leaf that counts the units, as in `structures.constant_fan_in`: -1
        for flax, 0 for equinox and PyTorch.

    Returns:
      A record for `transform`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong type. In the
        first update of the masks: `keep_units` is found in no name.

    References:
      Lasby et al., Dynamic Sparse Training with Structured Sparsity, ICLR 2024. (We
      have the rule of ablation from a description of their code.)
    """
    shared = constant_sparsity(
        sparsity, total_steps, interval, fraction, distribution, stop
    )
    decaying = schedules.cosine(fraction, 0.0, steps=stop * total_steps)
    return Method(
        name="srigl",
        **shared,
        structure=structures.constant_fan_in(axis=axis),
        phases=(ExchangeAndAblate(decaying, min_salient, keep_units),),
        needs_gradient=True,
    )


@dataclasses.dataclass(frozen=True)
class ExchangeAndAblate(Phase):
    """An exchange at constant fan-in that ablates units without salient weights.

    Attributes:
      fraction: The prune fraction, in [0, 1], as a function of the step.
      min_salient: Share of the fan-in that a unit must have in salient weights.
      keep_units: Regular expression of the leaves whose units are never ablated.
    """

    fraction: Schedule
    min_salient: float
    keep_units: str

    def check(self, method: Method) -> None:
        """Raise TypeError or ValueError if an attribute is not valid."""
        check_fraction("min_salient", self.min_salient)
        try:
            re.compile(self.keep_units)
        except (re.error, TypeError) as error:
            raise ValueError(
                "keep_units must be a regular expression that is found in the name of "
                f"the last layer, such as 'output/', got {self.keep_units!r}."
            ) from error

    def __call__(self, masks: Masks, state: Any, at: UpdateInputs) -> tuple[Masks, Any]:
        """Drop, ablate, then grow."""
        stacks, boxes = at.stacks, at.boxes
        assert boxes is not None
        number = active(masks, stacks)
        fraction = at.at_this_update(
            lambda step: schedules.fixed_point(self.fraction(step)), jnp.uint32
        )
        freed = schedules.ceil_of(fraction, number)
        weights = at.score(scores.magnitude, masks)
        stay = top_k(
            weights, number - freed, among=masks, stacks=stacks, key=at.order_of("drop")
        )
        gradients = at.score(scores.gradient, stay, growing=True)
        key = at.order_of("grow")
        salient = grow(stay, gradients, freed, stacks, key=key)

        # Units are arrays with the axes of their leaf, of length 1 along the inputs.
        shapes = layer_shapes([m.shape for m in masks], stacks)
        inputs = np.asarray([math.prod(boxes.box(s)) for s in shapes], number.dtype)
        units = np.asarray([*map(math.prod, shapes)], number.dtype) // inputs
        total = at.target.astype(number.dtype) * units
        enough = self._salient_units(masks, salient, boxes, at)
        # At least as many units stay as the weights of the layer can fill.
        kept = jnp.maximum(active(enough, stacks), (total + inputs - 1) // inputs)
        counts = [box_counts(boxes, m, a) for m, a in zip(salient, stacks, strict=True)]
        ranked = [count.astype(jnp.int32) for count in counts]
        alive = top_k(ranked, kept, stacks=stacks)
        fan_in = jnp.clip((total + kept // 2) // kept, 1, inputs)

        stay = [m & unit for m, unit in zip(stay, alive, strict=True)]
        stay = select(boxes, weights, fan_in, among=stay, scope="layer", stacks=stacks)
        wanted = divide(fan_in, [m.shape for m in masks], stacks)
        wanted = [u.astype(n.dtype) * n for u, n in zip(alive, wanted, strict=True)]
        return fill(boxes, stay, gradients, wanted, stacks, key=key), state

    def _salient_units(
        self, masks: Masks, salient: Masks, boxes: Structure, at: UpdateInputs
    ) -> list[Array]:
        """The units with enough salient weights, and all where none may go."""
        spared = [re.search(self.keep_units, name) is not None for name in at.names]
        if not any(spared):
            raise ValueError(
                f"keep_units is {self.keep_units!r}, which is found in no name of a "
                f"leaf with a mask: there are {', '.join(map(repr, at.names))}."
            )
        enough: list[Array] = []
        for mask, found, axes, spare in zip(
            masks, salient, at.stacks, spared, strict=True
        ):
            counts = box_counts(boxes, found, axes)
            within = layer_axes(mask.ndim, axes)
            fan_in = jnp.max(box_counts(boxes, mask, axes), within, keepdims=True)
            # The addend undoes the rounding error of a product such as 0.29 * 100.
            least = jnp.floor(self.min_salient * fan_in.astype(jnp.float32) + 1e-3)
            least = jnp.maximum(least.astype(counts.dtype), 1)
            enough.append((counts >= least) | spare)
        return enough
