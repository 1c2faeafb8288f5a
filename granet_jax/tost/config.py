"""`ToST`: which of the techniques to use, and how, as one record.

The techniques are independent and touch no mask: they go with any of its sources.
Their order is fixed: masks, weights (initial or rewound), LRsI, training with ghosts
and smoothed labels, `drop_ghosts`, training of the plain network.
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
from granet_jax.tost.rescaled_init import LRsI


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neurons:
    """Ghost activations, see `ghost_activation`.

    Attributes:
      kind: "swish" or "mish".
      beta_0: sharpness at step 0, or throughout if ghosts are kept.
      beta_1: sharpness towards the end of the ghost phase.
      form: "sharpen" or "blend".
    """

    kind: ghost_activations.Kind = "swish"
    beta_0: float = 1.0
    beta_1: float = 100.0
    form: ghost_activations.Form = "sharpen"

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for a setting that cannot be used."""
        _ghost_activation(self, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skips:
    """Ghost skips, see `ghost_skip` and `linen.make_skip`.

    Attributes:
      kind: "identity" (adds no weights, for fair comparisons) or "conv".
      alpha_0: coefficient at step 0, or throughout if ghosts are kept.
      decay: "linear" or "cosine".
      constant_init: whether kernels of "conv" start at 1e-4, as in the authors' code
        (`linen.constant_init`), instead of LeCun-normal.
    """

    kind: ghost_skips.SkipKind = "identity"
    alpha_0: float = 1.0
    decay: ghost_schedules.Decay = "linear"
    constant_init: bool = False

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for a setting that cannot be used."""
        check_choice("kind", self.kind, ghost_skips.SKIP_KINDS)
        ghost_schedules.fading(1, alpha_0=self.alpha_0, decay=self.decay)
        check_flag("constant_init", self.constant_init)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labels:
    """Smoothed labels, see `smoothed_cross_entropy`.

    Attributes:
      alpha: amount of smoothing, in [0, 1].
      convention: "tost" or "standard".
      fraction: share of the training at whose start labels are smoothed, in (0, 1];
        1 for the whole of it, as in the authors' code.
    """

    alpha: float = 0.1
    convention: label_smoothing.Convention = "tost"
    fraction: float = 1.0

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for a setting that cannot be used."""
        check_number("alpha", self.alpha, least=0.0, most=1.0)
        check_choice("convention", self.convention, label_smoothing.CONVENTIONS)
        check_number("fraction", self.fraction, above=0.0, most=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToST:
    """Training techniques for a sparse network, any subset of them.

    The default uses none, `ToST(neurons=Neurons(), skips=Skips())` both ghosts.

    Attributes:
      neurons: ghost activations; None for ReLU.
      skips: ghost skips; None for none.
      lrsi: settings of the re-scaled initialisation; None for none.
      labels: smoothed labels; None for labels as they are.
      ghost_fraction: share of the training in which there are ghosts, in (0, 1]; None
        to keep them throughout and in the result. Best over before the learning rate
        first drops; beyond 0.5, little training is left for the statistics of norms.

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
        """Raises TypeError or ValueError for a setting that cannot be used."""
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
    """The techniques as in the authors' code, where ghosts stay to the end.

    PSwish with beta = 2; 1 x 1 convolutions with coefficient 1 from constant kernels;
    LRsI on the masked network with a dense look-ahead (their `type2`); labels smoothed
    by 0.1 throughout. None of their scripts combines all four: take a part of it with
    `dataclasses.replace(tost.reproduce(), lrsi=None)`.

    The paper has the ghosts in the early stage of training only; its schedules could
    not be had. The defaults of `ToST` are ours.
    """
    return ToST(
        neurons=Neurons(beta_0=2.0),
        skips=Skips(kind="conv", constant_init=True),
        lrsi=LRsI(mask_lookahead=False),
        labels=Labels(),
        ghost_fraction=None,
    )


def ghost_steps(config: ToST, total_steps: int) -> int | None:
    """Length of the ghost phase in steps; None if the ghosts are kept.

    Args:
      config: the record.
      total_steps: optimizer steps of the whole training.

    Raises:
      TypeError, ValueError: `total_steps` no number of steps, or too few of them.
    """
    _check_config(config)
    check_steps("total_steps", total_steps)
    if config.ghost_fraction is None:
        return None
    return _share("ghost_fraction", config.ghost_fraction, total_steps)


def activation(
    config: ToST, total_steps: int
) -> Callable[[Array, Array | int], Array] | None:
    """The ghost activation f(x, step); None if `config` has none: ReLU."""
    _check_config(config)
    check_steps("total_steps", total_steps)
    if config.neurons is None:
        return None
    return _ghost_activation(config.neurons, ghost_steps(config, total_steps))


def skip_alpha(config: ToST, total_steps: int) -> ghost_schedules.Schedule | None:
    """The coefficient of ghost skips by the step; None if `config` has none."""
    _check_config(config)
    check_steps("total_steps", total_steps)
    if config.skips is None:
        return None
    return ghost_schedules.fading(
        ghost_steps(config, total_steps),
        alpha_0=config.skips.alpha_0,
        decay=config.skips.decay,
    )


def label_alpha(config: ToST, total_steps: int) -> ghost_schedules.Schedule | None:
    """The smoothing of labels by the step; None if `config` has none."""
    _check_config(config)
    check_steps("total_steps", total_steps)
    if config.labels is None:
        return None
    steps = _share("fraction", config.labels.fraction, total_steps)
    if steps == total_steps:
        return ghost_schedules.constant(config.labels.alpha)
    return ghost_schedules.early(config.labels.alpha, steps)


def _check_config(config: object) -> None:
    check_type("config", config, ToST, "a record granet_jax.tost.ToST(...)")


def _share(name: str, fraction: float, total_steps: int) -> int:
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
