"""The methods and their options, by their names on the command line."""

import dataclasses
import math
from typing import Any, Literal

from etils import epath

import granet_jax
from granet_jax import structures

MethodName = Literal[
    "granet",
    "granet-st",
    "gmp",
    "rigl",
    "set",
    "mest",
    "dsr",
    "snfs",
    "srigl",
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
# The options among `rounds`, `images` and `tickets` that each source has.
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

# The options of MaskConfig that each method has.
_START = frozenset({"distribution", "source", "rounds", "images", "tickets"})
_GRADUAL = frozenset({"interval", "initial_sparsity", "pruning_end"})
_GROWING = frozenset({"interval", "fraction", "warmup"})
_LEAST = frozenset({"least_inputs"})
OPTIONS: dict[str, frozenset[str]] = {
    "granet": _START | _GRADUAL | _GROWING | _LEAST,
    "granet-st": _START | _GRADUAL | _GROWING | _LEAST,
    "gmp": _START | _GRADUAL | _LEAST,
    "rigl": _START | _GROWING | _LEAST | {"stop"},
    "set": _START | _GROWING | _LEAST | {"stop"},
    "mest": _START | _GROWING | _LEAST,
    "dsr": _START | _GROWING | {"stop"},
    "snfs": _START | _GROWING,
    "srigl": _GROWING | {"stop", "distribution"},
    "static": _START | _LEAST,
    "cyclical": frozenset(
        {"interval", "initial_sparsity", "cycles", "recovery", "warmup"}
    ),
    "acdc": frozenset({"cycles", "warmup"}),
    "sculpt": _START | {"initial_sparsity", "cycles"},
    "straight-through": _GRADUAL,
    "top-kast": frozenset({"interval", "backward_sparsity"}),
    "greg2": frozenset({"interval", "pruning_end"}),
    "dense": frozenset(),
}

# Default number of mask updates in a training run. The GraNet code has 80 on CIFAR:
# every 1,000 of 80,000 steps.
_UPDATES = 80


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    """When and how the masks change; None means the default.

    An option that the method does not have is an error.
    """

    interval: int | None = None
    """Steps between mask updates; by default an eightieth of the steps.
    All methods but static, acdc, sculpt and dense."""

    fraction: float | None = None
    """Fraction of each layer's active weights that the first update drops
    and regrows, in [0, 1]; by default 0.5, and 0.3 for rigl, set, mest
    and srigl. For dsr, the fraction of all active weights that each update
    should move; by default 0.01. granet, granet-st, rigl, set, mest, dsr,
    snfs, srigl."""

    initial_sparsity: float | None = None
    """Sparsity at the start, in [0, sparsity]; by default 0, 0.5 for
    granet-st and 0.8 for sculpt. granet, granet-st, gmp, cyclical,
    sculpt, straight-through."""

    pruning_end: float | None = None
    """Fraction of the steps after which gradual pruning has reached the
    final sparsity, in (0, 1]; by default 0.5. granet, granet-st, gmp,
    straight-through, greg2."""

    stop: float | None = None
    """Fraction of the steps after which the masks no longer change, in
    (0, 1]; by default 0.75. rigl, set, dsr, srigl."""

    warmup: int | None = None
    """Steps over which the updates of weights that entered in a mask update
    grow to their full size; by default 0. A warm-up ends with the next
    mask update. granet, granet-st, rigl, set, mest, dsr, snfs, srigl,
    cyclical, acdc."""

    distribution: Literal["uniform", "er", "erk"] | None = None
    """How the layers share the sparsity of the initial masks; by default
    erk, and uniform for gmp, dsr and snfs. All methods up to static, and
    sculpt."""

    least_inputs: int | None = None
    """Number of inputs that every unit of every layer keeps at least; by
    default units may lose all. granet, granet-st, gmp, rigl, set, mest,
    static."""

    cycles: int | None = None
    """Number of cycles; by default 4, and 3 for sculpt, which has one more
    after the pruning. The steps must be a multiple of it. cyclical, acdc,
    sculpt."""

    recovery: Literal["hard", "projected", "straight_through"] | None = None
    """How pruned weights return in the next cycle; by default hard: from
    zero. cyclical."""

    backward_sparsity: float | None = None
    """Fraction of the weights that the gradient does not change, in [0,
    sparsity]; by default it changes twice the number of active weights.
    top-kast."""

    source: SourceName | None = None
    """Source of the initial masks instead of random masks: scores of the
    initial weights by magnitude, snip, iterative-snip, grasp, force or
    synflow, ranked over all layers; or lottery tickets. All methods that
    start sparse."""

    rounds: int | None = None
    """Number of pruning rounds of the source; by default 100 for synflow,
    and 60 for iterative-snip and force."""

    images: int | None = None
    """Number of training examples for the source, without augmentation; by
    default ten per class. snip, iterative-snip, grasp, force."""

    tickets: epath.Path | None = None
    """Folder written by `python -m experiments.lottery`. Training starts
    from the weights of the ticket. tickets."""


def interval(masks: MaskConfig, steps: int) -> int:
    """Return the number of steps between mask updates."""
    return masks.interval or max(1, steps // _UPDATES)


def build(
    name: str, sparsity: float, steps: int, masks: MaskConfig, *, weight_decay: float
) -> granet_jax.Method | None:
    """Return the library's record of a method; None for dense training.

    Args:
      name: One of `MethodName`.
      sparsity: Final sparsity, in [0, 1).
      steps: Number of training steps.
      masks: Options of the method.
      weight_decay: Weight decay that the optimizer adds to the gradient.

    Raises:
      ValueError: The method does not have an option, or a value is out of range.
    """
    options = {
        option: value
        for option, value in dataclasses.asdict(masks).items()
        if value is not None
    }
    for option in options:
        if option not in OPTIONS[name]:
            methods = [m for m, options_ in OPTIONS.items() if option in options_]
            raise ValueError(
                f"masks.{option} is not an option of method {name!r}, only of "
                f"{', '.join(methods)}."
            )
    for option in ("warmup", "source", "rounds", "images", "tickets"):
        options.pop(option, None)
    if "least_inputs" in options:
        options["structure"] = structures.at_least(options.pop("least_inputs"))
    if "interval" in OPTIONS[name]:
        options["interval"] = interval(masks, steps)
    method = _create(name, sparsity, steps, options, weight_decay)
    if method is not None:
        _check_source(masks, method)
    return method


def _create(
    name: str,
    sparsity: float,
    steps: int,
    options: dict[str, Any],
    weight_decay: float,
) -> granet_jax.Method | None:
    """Create the record from the options that are set."""
    fraction_of_steps = 1.0
    if "pruning_end" in OPTIONS[name]:
        fraction_of_steps = options.pop("pruning_end", 0.5)
    elif "stop" in OPTIONS[name]:
        fraction_of_steps = options.pop("stop", 0.75)
    end = math.floor(fraction_of_steps * steps)
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
            return granet_jax.rigl(sparsity, steps, stop=fraction_of_steps, **options)
        case "set":
            return granet_jax.set_(sparsity, steps, stop=fraction_of_steps, **options)
        case "mest":
            return granet_jax.mest(sparsity, steps, **options)
        case "dsr":
            return granet_jax.dsr(sparsity, steps, stop=fraction_of_steps, **options)
        case "snfs":
            return granet_jax.snfs(sparsity, steps, **options)
        case "srigl":
            # The units of the last layer are the classes.
            options.update(keep_units="(^|/)output/", stop=fraction_of_steps)
            return granet_jax.srigl(sparsity, steps, **options)
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
            # Twice the number of weights: for sparsity 0.9, backward sparsity 0.8.
            options.setdefault("backward_sparsity", max(0.0, 2 * sparsity - 1))
            return granet_jax.top_kast(sparsity, **options)
        case "greg2":
            return _greg2(sparsity, end, options["interval"], weight_decay)
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
    """Return the ends of equally long phases: a dense and a sparse one per cycle."""
    if steps < 2 * cycles:
        raise ValueError(
            f"steps must be at least 2 * masks.cycles, {2 * cycles}, got {steps}: each "
            "cycle has two phases."
        )
    return [phase * steps // (2 * cycles) for phase in range(1, 2 * cycles)]


def _greg2(
    sparsity: float, end: int, steps_between: int, weight_decay: float
) -> granet_jax.Method:
    """Return GReg-2 that prunes at step `end`.

    The penalty grows for four fifths of these steps: for a tenth of them on all
    weights, then on the weights to prune. In the last fifth it is constant. These are
    the fractions in the authors' settings, which take far more steps and start from a
    trained network.
    """
    increases = end * 4 // (5 * steps_between)
    pick_increases = max(1, increases // 10)
    grow_increases = increases - pick_increases
    if grow_increases < 2:
        raise ValueError(
            "masks.interval must leave time for three increases of the penalty, got "
            f"{steps_between} with pruning at step {end}."
        )
    # The library increases the penalty until it exceeds the ceiling, by at most one
    # increase.
    ceiling, pick_ceiling = 1.0, 1e-2
    return granet_jax.greg2(
        sparsity,
        interval=steps_between,
        growth=(ceiling - pick_ceiling) / (grow_increases - 1),
        ceiling=ceiling,
        pick_growth=pick_ceiling / pick_increases,
        pick_ceiling=pick_ceiling,
        settle_steps=end - increases * steps_between,
        weight_decay=weight_decay,
    )


def _check_source(masks: MaskConfig, method: granet_jax.Method) -> None:
    for name in ("rounds", "images", "tickets"):
        if getattr(masks, name) is not None and name not in _SOURCES[masks.source]:
            sources = [str(s) for s, options in _SOURCES.items() if name in options]
            raise ValueError(
                f"masks.{name} is an option of the sources {', '.join(sources)}, and "
                f"masks.source is {masks.source}."
            )
    if masks.source == "tickets" and masks.tickets is None:
        raise ValueError("masks.tickets is missing: the folder with the tickets.")
    if masks.source is not None and method.sparsity(0) == 0:
        raise ValueError(
            f"masks.source is {masks.source}, and {method.name} starts dense: give "
            "masks.initial_sparsity above 0, or another method."
        )
