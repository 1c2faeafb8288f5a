"""The methods by their names on the command line, and their options."""

import dataclasses
import math
import pathlib
from typing import Any, Literal

import granet_jax

MethodName = Literal[
    "granet",
    "granet-st",
    "gmp",
    "rigl",
    "set",
    "snfs",
    "static",
    "cyclical",
    "acdc",
    "sculpt",
    "straight-through",
    "top-kast",
    "greg2",
    "dense",
]

SourceName = Literal[
    "magnitude", "snip", "iterative-snip", "grasp", "force", "synflow", "tickets"
]
# Which of `rounds`, `images` and `tickets` each source has.
_SOURCES: dict[str | None, frozenset[str]] = {
    None: frozenset(),
    "magnitude": frozenset(),
    "snip": frozenset({"images"}),
    "grasp": frozenset({"images"}),
    "iterative-snip": frozenset({"rounds", "images"}),
    "force": frozenset({"rounds", "images"}),
    "synflow": frozenset({"rounds"}),
    "tickets": frozenset({"tickets"}),
}

# Which of the options in MaskConfig each method has.
_START = frozenset({"distribution", "source", "rounds", "images", "tickets"})
_GRADUAL = frozenset({"interval", "initial_sparsity", "pruning_end"})
OPTIONS: dict[str, frozenset[str]] = {
    "granet": _START | _GRADUAL | {"fraction"},
    "granet-st": _START | _GRADUAL | {"fraction"},
    "gmp": _START | _GRADUAL,
    "rigl": _START | {"interval", "fraction", "stop"},
    "set": _START | {"interval", "fraction", "stop"},
    "snfs": _START | {"interval", "fraction"},
    "static": _START,
    "cyclical": frozenset({"interval", "initial_sparsity", "cycles", "recovery"}),
    "acdc": frozenset({"cycles"}),
    "sculpt": _START | {"initial_sparsity", "cycles"},
    "straight-through": _GRADUAL,
    "top-kast": frozenset({"interval", "backward_sparsity"}),
    "greg2": frozenset({"interval", "pruning_end"}),
    "dense": frozenset(),
}

# Mask updates in a training run where no interval is given. The GraNet code makes 80 on
# CIFAR: every 1,000 of 80,000 steps.
_UPDATES = 80


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    """When and how the masks change; None for the default.

    An option that the method does not have is an error.
    """

    interval: int | None = None
    """Steps between mask updates; by default an eightieth of the steps.
    All methods but static, acdc, sculpt and dense."""

    fraction: float | None = None
    """Share of each layer's active weights that the first update drops
    and regrows, in [0, 1]; by default 0.5, and 0.3 for rigl and set.
    granet, granet-st, rigl, set, snfs."""

    initial_sparsity: float | None = None
    """Sparsity at the start, in [0, sparsity]; by default 0, 0.5 for
    granet-st and 0.8 for sculpt. granet, granet-st, gmp, cyclical,
    sculpt, straight-through."""

    pruning_end: float | None = None
    """Share of the steps after which gradual pruning has reached the
    final sparsity, in (0, 1]; by default 0.5. granet, granet-st, gmp,
    straight-through, greg2."""

    stop: float | None = None
    """Share of the steps after which the masks no longer change, in
    (0, 1]; by default 0.75. rigl, set."""

    distribution: Literal["uniform", "er", "erk"] | None = None
    """How the sparsity of the initial masks is split over the layers; by
    default erk, and uniform for gmp and snfs. All methods up to static,
    and sculpt."""

    cycles: int | None = None
    """Number of cycles; by default 4, and 3 for sculpt (and one after the
    pruning). The steps must be a multiple of it. cyclical, acdc,
    sculpt."""

    recovery: Literal["hard", "projected", "straight_through"] | None = None
    """How pruned weights come back in the next cycle; by default hard:
    from zero. cyclical."""

    backward_sparsity: float | None = None
    """Share of the weights that the gradient does not move, in [0,
    sparsity]; by default twice as many are moved as are active.
    top-kast."""

    source: SourceName | None = None
    """Where the initial masks come from, instead of being drawn: scores
    of the initial weights by magnitude, snip, iterative-snip, grasp,
    force or synflow, ranked over all layers; or lottery tickets. All
    methods that start sparse."""

    rounds: int | None = None
    """Rounds in which the source prunes; by default 100 for synflow, and
    60 for iterative-snip and force, which have several."""

    images: int | None = None
    """Training examples that the source sees, not augmented; by default
    ten a class. snip, iterative-snip, grasp, force."""

    tickets: pathlib.Path | None = None
    """Folder that `python -m experiments.lottery` wrote. Weights are
    those of the ticket, too. tickets."""


def interval(masks: MaskConfig, steps: int) -> int:
    """Steps between mask updates in a training of so many steps."""
    return masks.interval or max(1, steps // _UPDATES)


def build(
    name: str, sparsity: float, steps: int, masks: MaskConfig, *, weight_decay: float
) -> granet_jax.Method | None:
    """The library's record of a method; None for dense training.

    Args:
      name: one of `MethodName`.
      sparsity: at the end, in [0, 1).
      steps: of the training.
      masks: the options; those not given are the defaults.
      weight_decay: that the optimizer adds to the gradient.

    Raises:
      ValueError: an option that the method does not have, or a value out of range.
    """
    options = {
        option: value
        for option, value in dataclasses.asdict(masks).items()
        if value is not None
    }
    for option in options:
        if option not in OPTIONS[name]:
            having = [m for m, has in OPTIONS.items() if option in has]
            raise ValueError(
                f"masks.{option} is not an option of method {name!r}, only of "
                f"{', '.join(having)}."
            )
    for option in ("source", "rounds", "images", "tickets"):
        options.pop(option, None)
    if "interval" in OPTIONS[name]:
        options["interval"] = interval(masks, steps)
    method = _record(name, sparsity, steps, options, weight_decay)
    if method is not None:
        _check_source(masks, method)
    return method


def _record(
    name: str,
    sparsity: float,
    steps: int,
    options: dict[str, Any],
    weight_decay: float,
) -> granet_jax.Method | None:
    """The record, from those of `MaskConfig` that are given and meant for it."""
    share = 1.0
    if "pruning_end" in OPTIONS[name]:
        share = options.pop("pruning_end", 0.5)
    elif "stop" in OPTIONS[name]:
        share = options.pop("stop", 0.75)
    end = math.floor(share * steps)
    if "interval" in OPTIONS[name] and end < options["interval"]:
        raise ValueError(
            f"steps must leave time for a mask update: {name} needs one in the first "
            f"{end} of {steps} steps, and masks.interval is {options['interval']}."
        )
    match name:
        case "granet" | "granet-st":
            if name == "granet-st":
                options.setdefault("initial_sparsity", min(0.5, sparsity))
            return granet_jax.granet(sparsity, steps, end_step=end, **options)
        case "gmp":
            return granet_jax.gmp(sparsity, end, **options)
        case "rigl":
            return granet_jax.rigl(sparsity, steps, stop=share, **options)
        case "set":
            # SET drops as many weights in its last update as in its first: an end
            # before the end of training lets the network recover from it.
            return granet_jax.set_(sparsity, end, **options)
        case "snfs":
            return granet_jax.snfs(sparsity, steps, **options)
        case "static":
            return granet_jax.static(sparsity, **options)
        case "cyclical":
            options.setdefault("cycles", 4)
            _check_cycles(steps, options["cycles"])
            return granet_jax.cyclical(sparsity, steps, **options)
        case "acdc":
            return granet_jax.acdc(sparsity, _switches(steps, **options))
        case "sculpt":
            options.setdefault("cycles", 3)
            _check_cycles(steps, options["cycles"] + 1)
            options.setdefault("initial_sparsity", min(0.8, sparsity))
            return granet_jax.sculpt(sparsity, steps, **options)
        case "straight-through":
            return granet_jax.straight_through(sparsity, end, **options)
        case "top-kast":
            # Twice the weights: 0.8 behind 0.9.
            options.setdefault("backward_sparsity", max(0.0, 2 * sparsity - 1))
            return granet_jax.top_kast(sparsity, **options)
        case "greg2":
            return _growing(sparsity, end, options["interval"], weight_decay)
        case _:
            return None


def _check_cycles(steps: int, number: int) -> None:
    if steps % number:
        raise ValueError(
            f"steps must be a multiple of the {number} cycles (masks.cycles, and for "
            f"sculpt the one after the pruning), got {steps}: {steps % number} fewer, "
            "say."
        )


def _switches(steps: int, *, cycles: int = 4) -> list[int]:
    """The ends of phases of equal length, a dense and a sparse one in every cycle."""
    if steps < 2 * cycles:
        raise ValueError(
            f"steps must be at least 2 * masks.cycles, {2 * cycles}, got {steps}: each "
            "cycle has two phases."
        )
    return [phase * steps // (2 * cycles) for phase in range(1, 2 * cycles)]


def _growing(
    sparsity: float, end: int, steps_between: int, weight_decay: float
) -> granet_jax.Method:
    """GReg-2 that prunes at step `end`, a fifth of the way there with a full penalty.

    The penalty of all weights grows for a tenth of the rest: the shares of the authors'
    settings, which take far more steps, of a network trained before.
    """
    increases = end * 4 // (5 * steps_between)
    picking = max(1, increases // 10)
    growing = increases - picking
    if growing < 2:
        raise ValueError(
            "masks.interval must leave time for three increases of the penalty, got "
            f"{steps_between} with pruning at step {end}."
        )
    # The library's increases go on until they exceed the ceiling: the last is at most
    # one beyond.
    ceiling, pick_ceiling = 1.0, 1e-2
    return granet_jax.greg2(
        sparsity,
        interval=steps_between,
        growth=(ceiling - pick_ceiling) / (growing - 1),
        ceiling=ceiling,
        pick_growth=pick_ceiling / picking,
        pick_ceiling=pick_ceiling,
        settle_steps=end - increases * steps_between,
        weight_decay=weight_decay,
    )


def _check_source(masks: MaskConfig, method: granet_jax.Method) -> None:
    for name in ("rounds", "images", "tickets"):
        if getattr(masks, name) is not None and name not in _SOURCES[masks.source]:
            having = [str(s) for s, has in _SOURCES.items() if name in has]
            raise ValueError(
                f"masks.{name} is an option of the sources {', '.join(having)}, and "
                f"masks.source is {masks.source}."
            )
    if masks.source == "tickets" and masks.tickets is None:
        raise ValueError("masks.tickets is missing: the folder with the tickets.")
    if masks.source is not None and method.sparsity(0) == 0:
        raise ValueError(
            f"masks.source is {masks.source}, and {method.name} starts dense: give "
            "masks.initial_sparsity above 0, or another method."
        )
