"""The configuration of a training run: dataclasses that tyro turns into options."""

import dataclasses
import difflib
import json
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

from etils import epath

import granet_jax
from experiments import data, models
from experiments.buckets import check_folder
from experiments.config import methods
from experiments.config.methods import OPTIONS, MaskConfig, MethodName
from granet_jax import tost

# Default number of evaluations and of checkpoints in a training run.
_EVALUATIONS = 40
_CHECKPOINTS = 10

# Default augmentation.
_SHIFTS = {
    "digits": 1,
    "mnist": 2,
    "fashion_mnist": 2,
    "cifar10": 4,
    "cifar100": 4,
    "tiny_imagenet": 8,
}
_FLIPPED = frozenset({"fashion_mnist", "cifar10", "cifar100", "tiny_imagenet"})

# Options that may change when a run continues.
_CHANGEABLE = (
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

_MINIMA = {
    "scan_block": 1,
    "eval_every": 1,
    "data.batch_size": 1,
    "data.shift": 0,
    "data.workers": 0,
    "optimizer.cycles": 1,
    "optimizer.warmup_steps": 0,
    "optimizer.accumulate": 1,
    "masks.interval": 1,
    "masks.warmup": 0,
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

# tyro keeps the line breaks of the texts below. Lines of at most 70 characters fit a
# terminal of 80 columns.


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data and their augmentation."""

    dataset: str = "digits"
    """Data set: digits, fashion_mnist, mnist, cifar10, cifar100,
    tiny_imagenet, imagenet2012 (images); python_docs, tiny_shakespeare
    (text, byte by byte). `python -m experiments.prepare NAME` prepares a
    data set. digits and python_docs need no download, nor does
    fashion_mnist if Debian's package dataset-fashion-mnist is
    installed."""

    data_dir: str | None = None
    """Folder of the prepared data sets; by default the folder of
    tensorflow-datasets, ~/tensorflow_datasets. A data set in a bucket
    (gs://...) is copied there first."""

    batch_size: int = 64
    """Examples per step, over all devices. An incomplete batch at the end
    of an epoch is left out."""

    shift: int | None = None
    """Augmentation: shift each training image at random by up to this
    number of pixels in every direction. By default 1 for digits, 2 for
    MNIST and Fashion-MNIST, 4 for CIFAR, 8 for Tiny ImageNet.
    imagenet2012 has random resized crops instead."""

    flip: bool | None = None
    """Augmentation: mirror training images horizontally at random. By
    default for colour images and Fashion-MNIST."""

    workers: int = 0
    """Processes that decode images; used for imagenet2012 only."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its learning rate schedule, and the loss."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Optimizer. `sgd`: stochastic gradient descent with momentum;
    `adamw`: Adam with decoupled weight decay."""

    learning_rate: float = 0.1
    """Highest learning rate of the schedule."""

    schedule: Literal["drops", "cosine", "cyclic", "constant"] = "drops"
    """Learning rate schedule. `drops`: divided by 10 at each of `drops`;
    `cosine`: half a cosine down to zero; `cyclic`: the cosine schedule
    repeated `cycles` times; `constant`."""

    drops: tuple[float, ...] = (0.5, 0.75)
    """Fractions of the steps after which the learning rate drops; the
    default is that of the GraNet paper's CIFAR runs."""

    cycles: int = 4
    """Number of cycles of the schedule `cyclic`, of equal length."""

    warmup_steps: int = 0
    """Steps at the start in which the learning rate rises linearly from
    near zero to its schedule."""

    momentum: float = 0.9
    """Momentum of sgd, or b1 of adamw, in [0, 1)."""

    nesterov: bool = True
    """Whether the momentum of sgd is Nesterov's."""

    weight_decay: float = 5e-4
    """Weight decay of weights (not of biases, norms and embeddings):
    added to the gradient in sgd, decoupled from it in adamw."""

    label_smoothing: float = 0.0
    """Fraction of the target that is spread over all classes, in [0, 1)."""

    accumulate: int = 1
    """Number of parts of a batch, each with its own forward and backward
    pass, to save memory. The gradient is the mean over the parts."""

    ema: float | None = None
    """Decay of a moving average of the weights, in (0, 1). The masked
    average is then evaluated instead of the weights. None: no average."""


@dataclasses.dataclass(frozen=True)
class ToSTConfig:
    """Techniques of ToST (Jaiswal et al. 2022), for sparse or dense training."""

    neurons: Literal["swish", "mish"] | None = None
    """Ghost neurons: this activation, which gradually becomes ReLU. For
    networks with ReLU only."""

    skips: Literal["identity", "conv"] | None = None
    """Ghost skip connections around the convolutions, which fade out:
    without parameters, or 1 x 1 convolutions, which stay dense."""

    lrsi: bool = False
    """Layer-wise rescaled initialisation: learn a scale for every tensor
    of the masked initial parameters, so that the first step lowers the
    loss most."""

    labels: float | None = None
    """Label smoothing as in the authors' code: this fraction of the
    target, in [0, 1], goes to the other classes. The authors use 0.1."""

    ghost_fraction: float | None = None
    """Fraction of the steps with ghosts, in (0, 1]; by default 0.25.
    Afterwards the plain network is trained."""

    as_in_code: bool = False
    """Follow the authors' code instead of the paper: ghosts stay to the
    end and in the result, with swish(2x) / 2 or mish; skips start from
    constant kernels; the look-ahead step includes pruned weights."""

    def build(self) -> tost.ToST:
        """Return the library's record of the techniques.

        Raises:
          ValueError: A value is out of range.
        """
        code = self.as_in_code
        fraction = self.ghost_fraction
        if fraction is None:
            fraction = tost.ToST.ghost_fraction
        # In the authors' code only swish has a sharpness, which is 2.
        beta = 2.0 if code and self.neurons == "swish" else 1.0
        return tost.ToST(
            neurons=self.neurons and tost.Neurons(kind=self.neurons, beta_0=beta),
            skips=self.skips and tost.Skips(kind=self.skips, constant_init=code),
            lrsi=tost.LRsI(mask_lookahead=not code) if self.lrsi else None,
            labels=None if self.labels is None else tost.Labels(alpha=self.labels),
            ghost_fraction=None if code else fraction,
        )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to write checkpoints. Every run writes one at its end."""

    every: int | None = None
    """Steps between checkpoints; by default a tenth of the steps."""

    keep: int = 2
    """Number of last checkpoints to keep."""


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Several processes, on one or more machines, that train together."""

    auto: bool = False
    """Find the other processes from the environment (TPU pod, Slurm, Open
    MPI)."""

    coordinator: str | None = None
    """Instead of auto: address of process 0, as HOST:PORT."""

    processes: int | None = None
    """Number of processes, with coordinator."""

    process: int | None = None
    """Number of this process, from 0, with coordinator."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a sparse network and a dense one of the same budget.

    Each run has a folder in `out` with metrics.jsonl, checkpoints and
    TensorBoard events. curves.png and summary.json are written at the
    end. The same command with the same `out` continues where it stopped.
    """

    method: MethodName = "granet"
    """Sparse-training method. `granet` prunes a dense network gradually
    and regrows weights; `granet-st` does so from half of the weights;
    `gmp` prunes gradually without regrowth. At constant sparsity, `rigl`
    regrows weights by gradient, `set` at random and `snfs` by momentum;
    `mest` drops weights by magnitude and gradient, `dsr` below an
    adaptive threshold; `srigl` gives all units of a layer the same
    number of inputs, and prunes whole units; `static` keeps its random
    masks. `cyclical` prunes gradually in cycles, each from a dense
    network; `acdc` alternates between dense and sparse phases; `sculpt`
    trains fixed masks in cycles and prunes once; `straight-through` and
    `top-kast` also train pruned weights; `greg2` shrinks weights before
    it prunes them. `dense` trains without masks."""

    sparsity: float = 0.9
    """Fraction of the weights that are zero at the end, in [0, 1). Biases,
    norms and embeddings stay dense and are not counted. No effect on
    `dense`."""

    model: str = "cnn"
    """Network: cnn, lenet-300-100, lenet-5, resnet-20, resnet-50-cifar,
    vgg-19, ...; an unknown name lists all."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of activations and their gradients. Parameters are float32."""

    steps: int = 1200
    """Optimizer steps of each training run."""

    seeds: int = 3
    """Number of seeds to train with; the table gives mean and standard
    deviation."""

    seed: int = 0
    """First seed. It determines initial weights, data order, augmentation
    and random masks."""

    vmap_seeds: bool = False
    """Whether to train all seeds at once, as one vectorised program on one
    device. For small networks on a GPU or TPU."""

    baseline: bool = True
    """Whether to train a dense network too, with the same seeds and
    steps; never with init_from."""

    eval_every: int | None = None
    """Steps between evaluations; by default a fortieth of the steps."""

    parallel: Literal["jit", "pmap"] = "jit"
    """How several devices share a step. `jit`: one program over a mesh of
    devices; `pmap`: one program per device, and averaged gradients. Both
    split each batch and compute batch statistics over the whole batch."""

    fsdp: int = 1
    """Number of devices that share one copy of parameters, optimizer state
    and masks (fully-sharded data parallel); must divide the number of
    devices. With 1, each device has its own copy. jit only."""

    scan_block: int = 1
    """Steps per call to the device, in one `lax.scan`; a block ends early
    at an evaluation. Faster on a GPU or TPU. Leave it at 1 on a CPU,
    where convolutions in a scan are about ten times slower (and round
    differently)."""

    init_from: epath.Path | None = None
    """Folder (the --out) of a finished run with the same network. Every
    seed starts from the weights and batch statistics that it ended with
    there, and a method that starts sparse from its masks too, unless
    masks.source is given. Steps and learning rate begin again. Not for
    straight-through and top-kast."""

    out: epath.Path | None = None
    """Folder for the results, on disk or gs://BUCKET/FOLDER; must be new
    or contain a run of the same configuration, which then continues. By
    default runs/TIME-METHOD."""

    progress: bool = True
    """Whether to show a progress bar."""

    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    masks: MaskConfig = dataclasses.field(default_factory=MaskConfig)
    tost: ToSTConfig = ToSTConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    distributed: DistributedConfig = DistributedConfig()

    def __post_init__(self) -> None:
        """Raise ValueError for an invalid value."""
        self._check_values()
        self._check_devices()
        method = build_method(self)
        self._check_start(method)
        self._check_tost()
        if (
            self.tost.lrsi
            and method is not None
            and method.weights == "dense"
            and method.sparsity(0)
        ):
            raise ValueError(
                f"tost.lrsi scales masked weights, and {self.method} starts from dense "
                "ones behind a mask: leave it out."
            )

    def dense(self) -> "Config":
        """Return the configuration of dense training with the same options."""
        return dataclasses.replace(self, method="dense", masks=MaskConfig())

    def _check_values(self) -> None:
        _check_range("sparsity", self.sparsity, "[0, 1)", 0 <= self.sparsity < 1)
        _check_range("steps", self.steps, "[1, 2**31)", 1 <= self.steps < 2**31)
        _check_known("model", self.model, models.NAMES)
        _check_known("data.dataset", self.data.dataset, data.NAMES)
        _check_minimum("seeds", self.seeds, 1)
        last_seed = self.seed + self.seeds - 1
        for name, seed in (("seed", self.seed), ("seed + seeds - 1", last_seed)):
            _check_range(name, seed, "[0, 2**31)", 0 <= seed < 2**31)
        for name, minimum in _MINIMA.items():
            value = operator.attrgetter(name)(self)
            if value is not None:
                _check_minimum(name, value, minimum)
        for name, (interval, contains) in _RANGES.items():
            value = operator.attrgetter(name)(self)
            if value is not None:
                _check_range(name, value, interval, contains(value))
        for fraction in self.optimizer.drops:
            _check_range("optimizer.drops", fraction, "(0, 1)", 0 < fraction < 1)
        warmup = self.optimizer.warmup_steps
        _check_range(
            "optimizer.warmup_steps", warmup, "[0, steps)", warmup < self.steps
        )
        for name in ("out", "init_from", "masks.tickets", "data.data_dir"):
            check_folder(name, operator.attrgetter(name)(self))

    def _check_devices(self) -> None:
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

    def _check_start(self, method: granet_jax.Method | None) -> None:
        if self.init_from is None:
            return
        if method is not None and method.weights == "dense":
            raise ValueError(
                f"init_from is not for {self.method} (got {self.init_from}), whose "
                "pruned weights keep values that a finished run no longer has."
            )
        if self.masks.tickets is not None:
            raise ValueError(
                "init_from and masks.tickets both give the weights at the start: "
                "leave one of them out."
            )

    def _check_tost(self) -> None:
        for name, supported in (
            ("neurons", models.WITH_NEURONS),
            ("skips", models.WITH_SKIPS),
        ):
            if getattr(self.tost, name) is not None and self.model not in supported:
                raise ValueError(
                    f"tost.{name} is not available for model {self.model}, only for "
                    f"{', '.join(supported)}."
                )
        if self.tost.labels is not None and self.optimizer.label_smoothing:
            raise ValueError(
                "tost.labels and optimizer.label_smoothing both smooth the labels: "
                "give one of them."
            )
        ghosts = self.tost.neurons is not None or self.tost.skips is not None
        if not ghosts and (self.tost.as_in_code and not self.tost.lrsi):
            raise ValueError(
                "tost.as_in_code has an effect on neurons, skips and lrsi only: give "
                "one of them, or leave it out."
            )
        if self.tost.ghost_fraction is not None and (
            not ghosts or self.tost.as_in_code
        ):
            raise ValueError(
                "tost.ghost_fraction has no effect without neurons or skips, nor with "
                "as_in_code, which keeps the ghosts to the end: leave it out."
            )
        record = self.tost.build()
        if ghosts:
            try:
                tost.ghost_steps(record, self.steps)
            except ValueError as error:
                raise ValueError(f"tost.{error}") from error

    @property
    def ghost_steps(self) -> int:
        """Number of steps with ghosts; more than `steps` if the result keeps them."""
        if self.tost.neurons is None and self.tost.skips is None:
            return 0
        steps = tost.ghost_steps(self.tost.build(), self.steps)
        # The evaluation after the last step also needs ghosts that are kept.
        return self.steps + 1 if steps is None else steps

    @property
    def masks_from(self) -> str | None:
        """Source of the initial masks, or the folder they come from, if any."""
        if self.init_from is None or self.masks.source is not None:
            return self.masks.source
        method = build_method(self)
        starts_sparse = method is not None and method.sparsity(0) > 0
        return str(self.init_from) if starts_sparse else None

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
        shift = self.data.shift
        return _SHIFTS.get(self.data.dataset, 0) if shift is None else shift

    @property
    def flip(self) -> bool:
        """Whether training images are mirrored at random."""
        flip = self.data.flip
        return self.data.dataset in _FLIPPED if flip is None else flip

    def to_dict(self) -> dict[str, Any]:
        """Return all options as JSON values, with defaults that depend on others."""
        values = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        values["eval_every"] = self.evaluation_interval
        values["checkpoint"]["every"] = self.checkpoint_interval
        values["data"] |= {"shift": self.shift, "flip": self.flip}
        if "interval" in OPTIONS[self.method]:
            values["masks"]["interval"] = self.mask_interval
        return values


def differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Compare two configurations, each from `Config.to_dict`.

    Options that only say where and how to compute are not compared.

    Returns:
      The values in `a` and `b` of every option in which they differ, by the name of the
      option on the command line.
    """
    left, right = _flat(a), _flat(b)
    return {
        name: (left.get(name), right.get(name))
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name) and not name.startswith(_CHANGEABLE)
    }


def check_same(
    old: dict[str, Any], new: dict[str, Any], *, holder: str, this: str, hint: str = ""
) -> None:
    """Check that a run continues with the configuration with which it began.

    Args:
      old: Configuration of the earlier run, from `Config.to_dict`.
      new: Configuration of this run.
      holder: Description of the earlier run, for the message.
      this: Description of this run, for the message.
      hint: Another remedy, for the message.

    Raises:
      ValueError: The configurations differ.
    """
    if changed := differences(old, new):
        name, (old_value, new_value) = next(iter(changed.items()))
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise ValueError(
            f"out: {holder} with {name}={old_value}, and {this} has "
            f"{name}={new_value}{more}. Give the same options to go on with it, or "
            f"another folder.{hint}"
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
    """Return the library's record of the method; None for dense training.

    Raises:
      ValueError: The method does not have an option, or a value is out of range.
    """
    # AdamW's weight decay is not part of the gradient.
    coupled = config.optimizer.weight_decay if config.optimizer.name == "sgd" else 0.0
    return methods.build(
        config.method, config.sparsity, config.steps, config.masks, weight_decay=coupled
    )


def _check_minimum(name: str, value: Any, minimum: int) -> None:
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")


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
