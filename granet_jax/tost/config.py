"""`ToST`: one record that says which of the techniques to use, and how.

The techniques are independent of each other and do not change masks, so they work with
any source of masks. Their order is fixed: choose masks, choose weights (initial or
rewound), apply LRsI, train with ghosts and smoothed labels, call `drop_ghosts`, train
the plain network.
"""

import dataclasses
import math
from collections.abc import Callable

from jax import Array

from granet_jax.checks import (
    check_choice,
    check_flag,
    check_number,
    check_steps,
    check_type,
)
from granet_jax.tost import (
    ghost_activations,
    ghost_schedules,
    ghost_skips,
    label_smoothing,
)
from granet_jax.tost.scale_descent import LRsI


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neurons:
    """Ghost activations, see `ghost_activation`.

    Attributes:
      kind: "swish" or "mish".
      beta_0: Sharpness at step 0, or at every step if ghosts are kept.
      beta_1: Sharpness at the end of the ghost phase.
      form: "sharpen" or "blend".
    """

    kind: ghost_activations.Kind = "swish"
    beta_0: float = 1.0
    beta_1: float = 100.0
    form: ghost_activations.Form = "sharpen"

    def __post_init__(self) -> None:
        """Raise TypeError or ValueError for an invalid setting."""
        _ghost_activation(self, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skips:
    """Ghost skips, see `ghost_skip` and `linen.make_skip`.

    Attributes:
      kind: "identity", which adds no weights, for fair comparisons; or "conv".
      alpha_0: Coefficient at step 0, or at every step if ghosts are kept.
      decay: "linear" or "cosine".
      constant_init: Whether kernels of "conv" start at 1e-4, as in the authors' code
        (`linen.constant_init`), instead of LeCun-normal.
    """

    kind: ghost_skips.SkipKind = "identity"
    alpha_0: float = 1.0
    decay: ghost_schedules.Decay = "linear"
    constant_init: bool = False

    def __post_init__(self) -> None:
        """Raise TypeError or ValueError for an invalid setting."""
        check_choice("kind", self.kind, ghost_skips.SKIP_KINDS)
        ghost_schedules.fading(1, alpha_0=self.alpha_0, decay=self.decay)
        check_flag("constant_init", self.constant_init)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labels:
    """Smoothed labels, see `smoothed_cross_entropy`.

    Attributes:
      alpha: Amount of smoothing, in [0, 1].
      convention: "tost" or "standard".
      fraction: Fraction of the training, from its start, in which labels are smoothed,
        in (0, 1]; 1 for the whole training, as in the authors' code.
    """

    alpha: float = 0.1
    convention: label_smoothing.Convention = "tost"
    fraction: float = 1.0

    def __post_init__(self) -> None:
        """Raise TypeError or ValueError for an invalid setting."""
        check_number("alpha", self.alpha, least=0.0, most=1.0)
        check_choice("convention", self.convention, label_smoothing.CONVENTIONS)
        check_number("fraction", self.fraction, above=0.0, most=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToST:
    """Any subset of the training techniques for a sparse network.

    The default uses none. `ToST(neurons=Neurons(), skips=Skips())` uses both ghosts.

    Attributes:
      neurons: Ghost activations; None for ReLU.
      skips: Ghost skips; None for no skips.
      lrsi: Settings of the rescaled initialization; None for no rescaling.
      labels: Smoothed labels; None for no smoothing.
      ghost_fraction: Fraction of the training that uses ghosts, in (0, 1]; None to keep
        them in the trained network. The ghosts should end before the learning rate
        first drops. Beyond 0.5, norms have little time to adapt their statistics.

    References:
      Jaiswal et al., Training Your Sparse Neural Network Better with Any Mask, ICML
      2022.
    """

    neurons: Neurons | None = None
    skips: Skips | None = None
    lrsi: LRsI | None = None
    labels: Labels | None = None
    ghost_fraction: float | None = 0.25

    def __post_init__(self) -> None:
        """Raise TypeError or ValueError for an invalid setting."""
        for name, kind in (
            ("neurons", Neurons),
            ("skips", Skips),
            ("lrsi", LRsI),
            ("labels", Labels),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise TypeError(
                    f"{name} must be None or a record {kind.__name__}, got {value!r}."
                )
        if self.ghost_fraction is not None:
            check_number("ghost_fraction", self.ghost_fraction, above=0.0, most=1.0)


def reproduce() -> ToST:
    """Return the techniques as in the authors' code, where ghosts stay to the end.

    They are PSwish with beta = 2; 1 x 1 convolutions with coefficient 1 and constant
    initial kernels; LRsI on the masked network with a dense look-ahead (their `type2`);
    and labels smoothed by 0.1 in the whole training. None of their scripts combines all
    four. Select some with `dataclasses.replace(tost.reproduce(), lrsi=None)`.

    In the paper, ghosts exist in the early stage of training only, but the paper does
    not publish its schedules. The defaults of `ToST` are ours.
    """
    return ToST(
        neurons=Neurons(beta_0=2.0),
        skips=Skips(kind="conv", constant_init=True),
        lrsi=LRsI(mask_lookahead=False),
        labels=Labels(),
        ghost_fraction=None,
    )


def ghost_steps(config: ToST, total_steps: int) -> int | None:
    """Return the length of the ghost phase in steps; None if the ghosts are kept.

    Args:
      config: The record.
      total_steps: Number of optimizer steps of the whole training.

    Raises:
      TypeError, ValueError: `total_steps` is not a number of steps, or is too small.
    """
    _check_arguments(config, total_steps)
    if config.ghost_fraction is None:
        return None
    return _steps_of("ghost_fraction", config.ghost_fraction, total_steps)


def activation(
    config: ToST, total_steps: int
) -> Callable[[Array, Array | int], Array] | None:
    """Return the ghost activation f(x, step); None if `config` has none."""
    _check_arguments(config, total_steps)
    if config.neurons is None:
        return None
    return _ghost_activation(config.neurons, ghost_steps(config, total_steps))


def skip_alpha(config: ToST, total_steps: int) -> ghost_schedules.Schedule | None:
    """Return the coefficient of ghost skips by step; None if `config` has none."""
    _check_arguments(config, total_steps)
    if config.skips is None:
        return None
    return ghost_schedules.fading(
        ghost_steps(config, total_steps),
        alpha_0=config.skips.alpha_0,
        decay=config.skips.decay,
    )


def label_alpha(config: ToST, total_steps: int) -> ghost_schedules.Schedule | None:
    """Return the smoothing of labels by step; None if `config` has none."""
    _check_arguments(config, total_steps)
    if config.labels is None:
        return None
    steps = _steps_of("fraction", config.labels.fraction, total_steps)
    if steps == total_steps:
        return ghost_schedules.constant(config.labels.alpha)
    return ghost_schedules.early(config.labels.alpha, steps)


def _check_arguments(config: object, total_steps: object) -> None:
    check_type("config", config, ToST, "a record granet_jax.tost.ToST(...)")
    check_steps("total_steps", total_steps)


def _steps_of(name: str, fraction: float, total_steps: int) -> int:
    steps = math.floor(fraction * total_steps)
    if not steps:
        raise ValueError(
            f"{name} must leave at least one step, got {fraction} of "
            f"total_steps={total_steps}."
        )
    return steps


def _ghost_activation(
    neurons: Neurons, steps: int | None
) -> Callable[[Array, Array | int], Array]:
    return ghost_activations.ghost_activation(
        neurons.kind,
        ghost_steps=steps,
        beta_0=neurons.beta_0,
        beta_1=neurons.beta_1,
        form=neurons.form,
    )
