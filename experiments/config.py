"""The configuration of a training run: frozen records that tyro turns into a CLI."""

import dataclasses
import json
import math
import pathlib
from typing import Any, Literal

import granet_jax

MethodName = Literal[
    "granet", "granet-st", "gmp", "rigl", "set", "snfs", "static", "dense"
]

# Which of the options in MaskConfig each method has.
_OPTIONS: dict[str, frozenset[str]] = {
    "granet": frozenset(
        {"interval", "fraction", "initial_sparsity", "pruning_end", "distribution"}
    ),
    "gmp": frozenset({"interval", "initial_sparsity", "pruning_end", "distribution"}),
    "rigl": frozenset({"interval", "fraction", "stop", "distribution"}),
    "set": frozenset({"interval", "fraction", "stop", "distribution"}),
    "snfs": frozenset({"interval", "fraction", "distribution"}),
    "static": frozenset({"distribution"}),
    "dense": frozenset(),
}
_OPTIONS["granet-st"] = _OPTIONS["granet"]

# Mask updates in a training run where no interval is given. The GraNet code makes 80 on
# CIFAR: every 1,000 of 80,000 steps.
_UPDATES = 80
# Evaluations in a training run where no interval is given.
_EVALUATIONS = 40

# tyro shows the texts below with the line breaks they have here: at most 70 characters
# a line fill a terminal of 80 columns.


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data, and how batches are made of it."""

    dataset: str = "digits"
    """Data set to train on. `digits`: 1,797 handwritten digits of 8 x 8
    pixels, bundled with scikit-learn; every third image of each class
    is test data."""

    batch_size: int = 64
    """Images a step. The images left over at the end of an epoch wait
    for another one."""

    shift: int = 1
    """Augmentation: move each training image by up to this many pixels
    up, down, left and right, at random. 0 for none."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Stochastic gradient descent."""

    learning_rate: float = 0.1
    """Learning rate before its schedule lowers it."""

    schedule: Literal["drops", "cosine", "constant"] = "drops"
    """Learning rate over time. `drops`: divided by 10 after half and
    after three quarters of the steps, as in the GraNet paper's CIFAR
    runs; `cosine`: half a cosine down to zero; `constant`."""

    momentum: float = 0.9
    """Momentum, in [0, 1)."""

    nesterov: bool = True
    """Whether the momentum is Nesterov's."""

    weight_decay: float = 5e-4
    """Weight decay, added to the gradient of weights (not of biases)."""


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    """When and how the masks change; None for the default.

    An option that the method does not have is an error.
    """

    interval: int | None = None
    """Steps between mask updates; by default an eightieth of the steps.
    All methods but static and dense."""

    fraction: float | None = None
    """Share of each layer's active weights that the first update drops
    and regrows, in [0, 1]; by default 0.5, and 0.3 for rigl and set.
    granet, granet-st, rigl, set, snfs."""

    initial_sparsity: float | None = None
    """Sparsity at the start, in [0, sparsity]; by default 0, and 0.5 for
    granet-st. granet, granet-st, gmp."""

    pruning_end: float | None = None
    """Share of the steps after which gradual pruning has reached the
    final sparsity, in (0, 1]; by default 0.5. granet, granet-st, gmp."""

    stop: float | None = None
    """Share of the steps after which the masks no longer change, in
    (0, 1]; by default 0.75. rigl, set."""

    distribution: Literal["uniform", "er", "erk"] | None = None
    """How the sparsity of the initial masks is split over the layers; by
    default erk, and uniform for gmp and snfs. All methods but dense."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a network sparsely, beside a dense one of the same budget.

    Writes config.json, metrics.jsonl, curves.png and summary.json into a new folder.
    The last is written last: a folder without it is of a run that did not end.
    """

    method: MethodName = "granet"
    """Sparse-training method. `granet` prunes gradually from a dense
    network and regrows; `granet-st` is the same from half of the
    weights; `gmp` prunes gradually without regrowing; `rigl`, `set` and
    `snfs` drop and regrow at constant sparsity, by gradient, at random
    and by momentum; `static` keeps its random masks; `dense` trains
    without masks."""

    sparsity: float = 0.9
    """Share of the weights that are zero at the end, in [0, 1). Biases
    stay dense, and are not counted. Of no effect on `dense`."""

    model: Literal["cnn", "mlp"] = "cnn"
    """Network. `cnn`: three convolutions of 16, 32 and 64 channels and a
    linear classifier; `mlp`: LeNet-300-100, hidden layers of 300 and 100
    units."""

    steps: int = 1200
    """Optimizer steps of each training run."""

    seeds: int = 3
    """Number of seeds to train with; the table gives mean and standard
    deviation."""

    seed: int = 0
    """First seed: of initial weights, order of the data, augmentation,
    random masks."""

    baseline: bool = True
    """Whether to train the dense network too, with the same seeds and
    steps."""

    eval_every: int | None = None
    """Steps between evaluations; by default a fortieth of the steps."""

    scan_block: int = 1
    """Steps in one call to the device, as one `lax.scan`; a block ends
    early at an evaluation. Worth its while on a GPU or TPU. Leave it at
    1 on a CPU, where convolutions in a scan run about ten times slower
    (and round differently)."""

    out: pathlib.Path | None = None
    """Folder for the results; must be new or empty. By default
    runs/TIME-METHOD."""

    progress: bool = True
    """Whether to show a progress bar."""

    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    masks: MaskConfig = MaskConfig()

    def __post_init__(self) -> None:
        """Raises ValueError for a value that cannot be used."""
        _check_range("sparsity", self.sparsity, "[0, 1)", 0 <= self.sparsity < 1)
        _check_range("steps", self.steps, "[1, 2**31)", 1 <= self.steps < 2**31)
        _check_least("seeds", self.seeds, 1)
        last_seed = self.seed + self.seeds - 1
        for name, seed in (("seed", self.seed), ("seed + seeds - 1", last_seed)):
            _check_range(name, seed, "[0, 2**31)", 0 <= seed < 2**31)
        _check_least("scan_block", self.scan_block, 1)
        _check_least("data.batch_size", self.data.batch_size, 1)
        _check_least("data.shift", self.data.shift, 0)
        if self.eval_every is not None:
            _check_least("eval_every", self.eval_every, 1)
        rate = self.optimizer.learning_rate
        _check_range("optimizer.learning_rate", rate, "(0, inf)", 0 < rate < math.inf)
        momentum = self.optimizer.momentum
        _check_range("optimizer.momentum", momentum, "[0, 1)", 0 <= momentum < 1)
        decay = self.optimizer.weight_decay
        _check_range("optimizer.weight_decay", decay, "[0, inf)", 0 <= decay < math.inf)
        if self.masks.interval is not None:
            _check_least("masks.interval", self.masks.interval, 1)
        for option in ("pruning_end", "stop"):
            share = getattr(self.masks, option)
            if share is not None:
                _check_range(f"masks.{option}", share, "(0, 1]", 0 < share <= 1)
        build_method(self)

    @property
    def evaluation_interval(self) -> int:
        """Steps between evaluations."""
        return self.eval_every or max(1, self.steps // _EVALUATIONS)

    @property
    def mask_interval(self) -> int:
        """Steps between mask updates."""
        if self.masks.interval is not None:
            return self.masks.interval
        return max(1, self.steps // _UPDATES)

    def to_json(self) -> str:
        """All values as JSON, those that follow from others filled in."""
        values = dataclasses.asdict(self)
        values["eval_every"] = self.evaluation_interval
        if "interval" in _OPTIONS[self.method]:
            values["masks"]["interval"] = self.mask_interval
        return json.dumps(values, indent=2, default=str) + "\n"


def build_method(config: Config) -> granet_jax.Method | None:
    """The library's record of the configured method; None for dense training.

    Raises:
      ValueError: an option that the method does not have, or a value out of range.
    """
    options = {
        name: value
        for name, value in dataclasses.asdict(config.masks).items()
        if value is not None
    }
    for name in options:
        if name not in _OPTIONS[config.method]:
            having = [m for m, has in _OPTIONS.items() if name in has]
            raise ValueError(
                f"masks.{name} is not an option of method {config.method!r}, only of "
                f"{', '.join(having)}."
            )
    pruning_end = math.floor(options.pop("pruning_end", 0.5) * config.steps)
    stop = options.pop("stop", 0.75)
    last = {
        "granet": pruning_end,
        "granet-st": pruning_end,
        "gmp": pruning_end,
        "rigl": math.floor(stop * config.steps),
        "set": math.floor(stop * config.steps),
        "snfs": config.steps,
    }.get(config.method)
    if last is not None:
        options["interval"] = config.mask_interval
        if last < config.mask_interval:
            raise ValueError(
                f"steps must leave time for a mask update: {config.method} needs one "
                f"in the first {last} of {config.steps} steps, and masks.interval is "
                f"{config.mask_interval}."
            )
    match config.method:
        case "granet":
            return granet_jax.granet(
                config.sparsity, config.steps, end_step=pruning_end, **options
            )
        case "granet-st":
            options.setdefault("initial_sparsity", min(0.5, config.sparsity))
            return granet_jax.granet(
                config.sparsity, config.steps, end_step=pruning_end, **options
            )
        case "gmp":
            return granet_jax.gmp(config.sparsity, pruning_end, **options)
        case "rigl":
            return granet_jax.rigl(config.sparsity, config.steps, stop=stop, **options)
        case "set":
            # SET drops as many weights in its last update as in its first: an end
            # before the end of training lets the network recover from it.
            total = math.floor(stop * config.steps)
            return granet_jax.set_(config.sparsity, total, **options)
        case "snfs":
            return granet_jax.snfs(config.sparsity, config.steps, **options)
        case "static":
            return granet_jax.static(config.sparsity, **options)
        case "dense":
            return None


def _check_least(name: str, value: Any, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def _check_range(name: str, value: Any, interval: str, inside: bool) -> None:
    if not inside:
        raise ValueError(f"{name} must lie in {interval}, got {value}.")
