"""The configuration of a training run: frozen records that tyro turns into a CLI."""

import dataclasses
import difflib
import json
import math
import operator
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import granet_jax
from experiments import data, models
from experiments.config import methods
from experiments.config.methods import OPTIONS, MaskConfig, MethodName
from granet_jax import tost

# Evaluations and checkpoints in a training run where no interval is given.
_EVALUATIONS = 40
_CHECKPOINTS = 10

# Augmentation where none is configured.
_SHIFTS = {
    "digits": 1,
    "mnist": 2,
    "fashion_mnist": 2,
    "cifar10": 4,
    "cifar100": 4,
    "tiny_imagenet": 8,
}
_FLIPPED = frozenset({"fashion_mnist", "cifar10", "cifar100", "tiny_imagenet"})

# Options that may differ between a run and its continuation.
_FREE = (
    "out",
    "progress",
    "parallel",
    "fsdp",
    "distributed.",
    "data.data_dir",
    "data.workers",
    "checkpoint.",
    "seeds",
    "baseline",
)

_LEAST = {
    "scan_block": 1,
    "eval_every": 1,
    "data.batch_size": 1,
    "data.shift": 0,
    "data.workers": 0,
    "optimizer.cycles": 1,
    "optimizer.warmup_steps": 0,
    "optimizer.accumulate": 1,
    "masks.interval": 1,
    "masks.cycles": 1,
    "masks.rounds": 1,
    "masks.images": 1,
    "fsdp": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
}
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "optimizer.learning_rate": ("(0, inf)", lambda x: 0 < x < math.inf),
    "optimizer.momentum": ("[0, 1)", lambda x: 0 <= x < 1),
    "optimizer.weight_decay": ("[0, inf)", lambda x: 0 <= x < math.inf),
    "optimizer.label_smoothing": ("[0, 1)", lambda x: 0 <= x < 1),
    "optimizer.ema": ("(0, 1)", lambda x: 0 < x < 1),
    "masks.pruning_end": ("(0, 1]", lambda x: 0 < x <= 1),
    "masks.stop": ("(0, 1]", lambda x: 0 < x <= 1),
}

# tyro shows the texts below with the line breaks they have here: at most 70 characters
# a line fill a terminal of 80 columns.


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data, and how batches are made of it."""

    dataset: str = "digits"
    """Data set to train on: digits, fashion_mnist, mnist, cifar10,
    cifar100, tiny_imagenet, imagenet2012 (images); python_docs,
    tiny_shakespeare (text, byte by byte). `python -m
    experiments.prepare NAME` makes one ready; digits and python_docs
    need no download, nor does fashion_mnist where Debian's package
    dataset-fashion-mnist is installed."""

    data_dir: str | None = None
    """Folder of the prepared data sets; by default tensorflow-datasets'
    own, ~/tensorflow_datasets."""

    batch_size: int = 64
    """Examples a step, over all devices. What is left over at the end of
    an epoch waits for another one."""

    shift: int | None = None
    """Augmentation: move each training image by up to this many pixels
    up, down, left and right, at random. By default 1 for digits, 2 for
    MNIST and Fashion-MNIST, 4 for CIFAR, 8 for Tiny ImageNet.
    imagenet2012 has random resized crops instead."""

    flip: bool | None = None
    """Augmentation: mirror training images, left to right, at random. By
    default for colour images and for Fashion-MNIST."""

    workers: int = 0
    """Processes that decode images; of use for imagenet2012 only."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its schedule, and what it minimises."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Optimizer. `sgd`: stochastic gradient descent with momentum;
    `adamw`: Adam with decoupled weight decay."""

    learning_rate: float = 0.1
    """Learning rate before its schedule lowers it."""

    schedule: Literal["drops", "cosine", "cyclic", "constant"] = "drops"
    """Learning rate over time. `drops`: divided by 10 at each of
    `drops`; `cosine`: half a cosine down to zero; `cyclic`: that,
    `cycles` times; `constant`."""

    drops: tuple[float, ...] = (0.5, 0.75)
    """Shares of the steps after which the learning rate drops; by default
    as in the GraNet paper's CIFAR runs."""

    cycles: int = 4
    """Cycles of the schedule `cyclic`, of equal length."""

    warmup_steps: int = 0
    """Steps in which the learning rate rises linearly from near zero,
    before it follows its schedule."""

    momentum: float = 0.9
    """Momentum of sgd, or b1 of adamw, in [0, 1)."""

    nesterov: bool = True
    """Whether the momentum of sgd is Nesterov's."""

    weight_decay: float = 5e-4
    """Weight decay on weights (not on biases, norms and embeddings):
    added to the gradient by sgd, decoupled from it by adamw."""

    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes, in [0, 1)."""

    accumulate: int = 1
    """Parts that a batch is cut into, one forward and backward pass
    each, to save memory. The gradient is their mean."""

    ema: float | None = None
    """Decay of a moving average of the weights, in (0, 1), which is then
    evaluated instead of them, masked. None for none."""


@dataclasses.dataclass(frozen=True)
class ToSTConfig:
    """Techniques of ToST (Jaiswal et al. 2022), for any masks or none."""

    neurons: Literal["swish", "mish"] | None = None
    """Ghost neurons: this activation, sharpened step by step until it is
    ReLU. Networks with ReLU only."""

    skips: Literal["identity", "conv"] | None = None
    """Ghost skip connections beside the convolutions, fading out:
    without parameters, or 1 x 1 convolutions, which stay dense."""

    lrsi: bool = False
    """Layer-wise re-scaled initialisation: a scale for every tensor of
    the masked initial parameters, learned so that the first step lowers
    the loss most."""

    labels: float | None = None
    """Label smoothing as in the authors' code: this share of the target,
    in [0, 1], goes to the other classes. (They have 0.1.)"""

    ghost_fraction: float | None = None
    """Share of the steps in which there are ghosts, in (0, 1]; by default
    0.25. After them the network is the plain one."""

    as_in_code: bool = False
    """The authors' code instead of the paper's idea: the ghosts are kept
    to the end and in the result; swish(2x) / 2, or mish; skips from
    constant kernels; a look-ahead step over pruned weights too."""

    def build(self) -> tost.ToST:
        """The library's record.

        Raises:
          ValueError: a value out of range.
        """
        code = self.as_in_code
        given = self.ghost_fraction
        share = tost.ToST.ghost_fraction if given is None else given
        # Only their swish has a sharpness, of 2.
        beta = 2.0 if code and self.neurons == "swish" else 1.0
        return tost.ToST(
            neurons=self.neurons and tost.Neurons(kind=self.neurons, beta_0=beta),
            skips=self.skips and tost.Skips(kind=self.skips, constant_init=code),
            lrsi=tost.LRsI(mask_lookahead=not code) if self.lrsi else None,
            labels=None if self.labels is None else tost.Labels(alpha=self.labels),
            ghost_fraction=None if code else share,
        )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to write checkpoints. Each run has one at its end, whatever this says."""

    every: int | None = None
    """Steps between checkpoints; by default a tenth of the steps."""

    keep: int = 2
    """Number of checkpoints to keep, the last ones."""


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Several processes, on one machine or many, as one run."""

    auto: bool = False
    """Find the other processes by the environment (TPU pod, Slurm, Open
    MPI)."""

    coordinator: str | None = None
    """Or else: address of process 0, as HOST:PORT."""

    processes: int | None = None
    """Number of processes, with coordinator."""

    process: int | None = None
    """Number of this one, from 0, with coordinator."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a network sparsely, beside a dense one of the same budget.

    Each run has a folder in `out`, with metrics.jsonl, checkpoints and
    TensorBoard events. At the end come curves.png and summary.json. The
    same command with the same `out` goes on where it stopped.
    """

    method: MethodName = "granet"
    """Sparse-training method. `granet` prunes gradually from a dense
    network and regrows; `granet-st` is the same from half of the
    weights; `gmp` prunes gradually without regrowing; `rigl`, `set` and
    `snfs` drop and regrow at constant sparsity, by gradient, at random
    and by momentum; `static` keeps its random masks. `cyclical` prunes
    gradually in cycles, each from a dense network; `acdc` alternates
    between dense and sparse phases; `sculpt` trains fixed masks in
    cycles and prunes once; `straight-through` and `top-kast` keep
    pruned weights alive, and move them too; `greg2` shrinks weights
    before it prunes them. `dense` trains without masks."""

    sparsity: float = 0.9
    """Share of the weights that are zero at the end, in [0, 1). Biases,
    norms and embeddings stay dense, and are not counted. Of no effect
    on `dense`."""

    model: str = "cnn"
    """Network: cnn, lenet-300-100, lenet-5, resnet-20, resnet-50-cifar,
    vgg-19, ...; an unknown name lists all."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Of activations and their gradients. Parameters are float32."""

    steps: int = 1200
    """Optimizer steps of each training run."""

    seeds: int = 3
    """Number of seeds to train with; the table gives mean and standard
    deviation."""

    seed: int = 0
    """First seed: of initial weights, order of the data, augmentation,
    random masks."""

    vmap_seeds: bool = False
    """Whether to train all seeds at once, as one vectorised program on
    one device. For small networks on a GPU or TPU."""

    baseline: bool = True
    """Whether to train the dense network too, with the same seeds and
    steps."""

    eval_every: int | None = None
    """Steps between evaluations; by default a fortieth of the steps."""

    parallel: Literal["jit", "pmap"] = "jit"
    """How a step is spread over several devices. `jit`: one program over
    a mesh of them; `pmap`: one program a device, gradients averaged.
    Both split each batch, and take batch statistics over the whole."""

    fsdp: int = 1
    """Devices that share one copy of parameters, optimizer state and
    masks (fully-sharded data parallel); must divide their number. With
    1, each has its own copy. jit only."""

    scan_block: int = 1
    """Steps in one call to the device, as one `lax.scan`; a block ends
    early at an evaluation. Worth its while on a GPU or TPU. Leave it at
    1 on a CPU, where convolutions in a scan run about ten times slower
    (and round differently)."""

    out: pathlib.Path | None = None
    """Folder for the results; must be new, or of the same configuration,
    which then goes on. By default runs/TIME-METHOD."""

    progress: bool = True
    """Whether to show a progress bar."""

    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    masks: MaskConfig = dataclasses.field(default_factory=MaskConfig)
    tost: ToSTConfig = ToSTConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    distributed: DistributedConfig = DistributedConfig()

    def __post_init__(self) -> None:
        """Raises ValueError for a value that cannot be used."""
        _check_range("sparsity", self.sparsity, "[0, 1)", 0 <= self.sparsity < 1)
        _check_range("steps", self.steps, "[1, 2**31)", 1 <= self.steps < 2**31)
        _check_known("model", self.model, models.NAMES)
        _check_known("data.dataset", self.data.dataset, data.NAMES)
        _check_least("seeds", self.seeds, 1)
        last_seed = self.seed + self.seeds - 1
        for name, seed in (("seed", self.seed), ("seed + seeds - 1", last_seed)):
            _check_range(name, seed, "[0, 2**31)", 0 <= seed < 2**31)
        for name, least in _LEAST.items():
            value = operator.attrgetter(name)(self)
            if value is not None:
                _check_least(name, value, least)
        for name, (interval, inside) in _RANGES.items():
            value = operator.attrgetter(name)(self)
            if value is not None:
                _check_range(name, value, interval, inside(value))
        for share in self.optimizer.drops:
            _check_range("optimizer.drops", share, "(0, 1)", 0 < share < 1)
        warmup = self.optimizer.warmup_steps
        _check_range(
            "optimizer.warmup_steps", warmup, "[0, steps)", warmup < self.steps
        )
        if self.data.batch_size % self.optimizer.accumulate:
            raise ValueError(
                "optimizer.accumulate must divide data.batch_size, "
                f"{self.data.batch_size}, got {self.optimizer.accumulate}."
            )
        if self.parallel == "pmap" and self.fsdp > 1:
            raise ValueError(
                f"fsdp must be 1 with pmap, got {self.fsdp}: to shard parameters, use "
                "--parallel jit."
            )
        if self.vmap_seeds and self.optimizer.accumulate > 1:
            raise ValueError("optimizer.accumulate must be 1 with vmap_seeds.")
        if self.out is not None and re.match(r"\w{2,}:/", str(self.out)):
            raise ValueError(
                f"out must be a folder of the file system, got {self.out}: mount the "
                "bucket (gcsfuse) and give the folder it is mounted at."
            )
        method = build_method(self)
        self._check_tost()
        lives_on = method is not None and method.weights == "dense"
        if self.tost.lrsi and method is not None and lives_on and method.sparsity(0):
            raise ValueError(
                f"tost.lrsi scales masked weights, and {self.method} starts from dense "
                "ones behind a mask: leave it out."
            )

    def _check_tost(self) -> None:
        for name, having in (
            ("neurons", models.WITH_NEURONS),
            ("skips", models.WITH_SKIPS),
        ):
            if getattr(self.tost, name) is not None and self.model not in having:
                raise ValueError(
                    f"tost.{name} has no place in model {self.model}, only in "
                    f"{', '.join(having)}."
                )
        if self.tost.labels is not None and self.optimizer.label_smoothing:
            raise ValueError(
                "tost.labels and optimizer.label_smoothing both smooth the labels: "
                "give one of them."
            )
        ghosts = self.tost.neurons is not None or self.tost.skips is not None
        if not ghosts and (self.tost.as_in_code and not self.tost.lrsi):
            raise ValueError(
                "tost.as_in_code is of effect on neurons, skips and lrsi only: give "
                "one of them, or leave it out."
            )
        if self.tost.ghost_fraction is not None and (
            not ghosts or self.tost.as_in_code
        ):
            raise ValueError(
                "tost.ghost_fraction is of no effect without neurons or skips, or with "
                "as_in_code, which keeps them: leave it out."
            )
        record = self.tost.build()
        if ghosts:
            try:
                tost.ghost_steps(record, self.steps)
            except ValueError as error:
                raise ValueError(f"tost.{error}") from error

    @property
    def ghost_steps(self) -> int:
        """Steps at the start with ghosts in the network; all of them if kept."""
        if self.tost.neurons is None and self.tost.skips is None:
            return 0
        steps = tost.ghost_steps(self.tost.build(), self.steps)
        # Kept ghosts are there after the last step too.
        return self.steps + 1 if steps is None else steps

    @property
    def evaluation_interval(self) -> int:
        """Steps between evaluations."""
        return self.eval_every or max(1, self.steps // _EVALUATIONS)

    @property
    def checkpoint_interval(self) -> int:
        """Steps between checkpoints."""
        return self.checkpoint.every or max(1, self.steps // _CHECKPOINTS)

    @property
    def mask_interval(self) -> int:
        """Steps between mask updates."""
        return methods.interval(self.masks, self.steps)

    @property
    def shift(self) -> int:
        """Largest shift of the augmentation, in pixels."""
        given = self.data.shift
        return _SHIFTS.get(self.data.dataset, 0) if given is None else given

    @property
    def flip(self) -> bool:
        """Whether training images are mirrored at random."""
        given = self.data.flip
        return self.data.dataset in _FLIPPED if given is None else given

    def to_dict(self) -> dict[str, Any]:
        """All values, as JSON holds them, those that follow from others filled in."""
        values = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        values["eval_every"] = self.evaluation_interval
        values["checkpoint"]["every"] = self.checkpoint_interval
        values["data"] |= {"shift": self.shift, "flip": self.flip}
        if "interval" in OPTIONS[self.method]:
            values["masks"]["interval"] = self.mask_interval
        return values


def differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Where two configurations, as of `Config.to_dict`, lead to different results.

    Returns:
      The values in `a` and `b` of every option (named as on the command line) in which
      they differ, save those that only say where and how to compute.
    """
    left, right = _flat(a), _flat(b)
    return {
        name: (left.get(name), right.get(name))
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name) and not name.startswith(_FREE)
    }


def check_same(
    before: dict[str, Any], now: dict[str, Any], *, holder: str, this: str
) -> None:
    """Refuses to go on with what was configured otherwise, see `differences`.

    Args:
      before: as of `Config.to_dict`.
      now: the same of what is to go on.
      holder: what has `before`, for the message.
      this: what has `now`.

    Raises:
      ValueError: they differ.
    """
    if found := differences(before, now):
        name, (old, new) = next(iter(found.items()))
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ValueError(
            f"out: {holder} with {name}={old}, and {this} has {name}={new}{more}. Give "
            "the same options to go on with it, or another folder."
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def build_method(config: Config) -> granet_jax.Method | None:
    """The library's record of the configured method; None for dense training.

    Raises:
      ValueError: an option that the method does not have, or a value out of range.
    """
    # Decoupled weight decay is none of the gradient's.
    coupled = config.optimizer.weight_decay if config.optimizer.name == "sgd" else 0.0
    return methods.build(
        config.method, config.sparsity, config.steps, config.masks, weight_decay=coupled
    )


def _check_least(name: str, value: Any, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def _check_range(name: str, value: Any, interval: str, inside: bool) -> None:
    if not inside:
        raise ValueError(f"{name} must lie in {interval}, got {value}.")


def _check_known(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, known, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{name} must be one of {', '.join(known)}; got {value!r}.{hint}"
        )
