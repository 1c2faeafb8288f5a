"""Parameters, costs, memory and schedules of a configuration, without training.

`python -m experiments.train --recipe NAME --dry-run` prints every parameter, the cost
of a forward pass and of training, and the memory of the state, and plots the schedules.
All numbers follow from shapes. Nothing is computed on a device, and no data are read.
"""

import dataclasses
import itertools
import math
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import granet_jax
from experiments import models
from experiments.buckets import in_bucket
from experiments.config.recipes import Recipe, columns
from experiments.config.run import Config
from experiments.data import Dataset, Split, Stream
from experiments.reports import topologies
from experiments.training.atomic_files import atomic_path
from experiments.training.step import TrainStep
from granet_jax import analysis, distributions, masking
from granet_jax.phases import Exchange

PyTree = Any


class DatasetInfo(NamedTuple):
    """Properties of a data set that are known without reading it.

    Attributes:
      shape: Shape of one example: (height, width, channels), or (length,) for text.
      classes: Number of classes.
      train_size: Number of training examples; None if it depends on the machine.
    """

    shape: tuple[int, ...]
    classes: int
    train_size: int | None


DATASETS = {
    "digits": DatasetInfo((8, 8, 1), 10, 1_201),
    "mnist": DatasetInfo((28, 28, 1), 10, 60_000),
    "fashion_mnist": DatasetInfo((28, 28, 1), 10, 60_000),
    "fashion_mnist_photos": DatasetInfo((32, 32, 3), 10, 60_000),
    "cifar10": DatasetInfo((32, 32, 3), 10, 50_000),
    "cifar100": DatasetInfo((32, 32, 3), 100, 50_000),
    "tiny_imagenet": DatasetInfo((64, 64, 3), 200, 100_000),
    "imagenet2012": DatasetInfo((224, 224, 3), 1000, 1_281_167),
    "tiny_shakespeare": DatasetInfo((128,), 256, 7_842),
    # The text depends on the version of Python.
    "python_docs": DatasetInfo((128,), 256, None),
}

# Methods that do not change the number of active weights in a layer.
_FIXED_METHODS = frozenset({"rigl", "set", "mest", "static", "dense"})


class ParameterInfo(NamedTuple):
    """One array of parameters.

    Attributes:
      name: Name as in the reports, "layer/kernel".
      shape: Shape of the array.
      maskable: Whether its weights can be pruned.
      macs: Multiply-accumulates of one example's dense forward pass.
      start: Exact number of weights active at step 0; None if the masks come from a
        source.
    """

    name: str
    shape: tuple[int, ...]
    maskable: bool
    macs: int
    start: int | None

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class DryRun:
    """Properties of a configuration.

    Attributes:
      config: The configuration.
      dataset_info: Properties of its data set.
      train_step: Pure functions of the configuration.
      leaves: All parameters, from input to output.
      flops: FLOPs of one example's forward pass through the kernels.
      memory: Bytes of every part of the state.
    """

    config: Config
    dataset_info: DatasetInfo
    train_step: TrainStep
    leaves: tuple[ParameterInfo, ...]
    flops: analysis.Flops
    memory: dict[str, int]

    @property
    def method(self) -> granet_jax.Method | None:
        """The library's record of the method; None for dense training."""
        return self.train_step.method

    @property
    def fixed(self) -> bool:
        """Whether the number of active weights is known for every layer."""
        return self.config.method in _FIXED_METHODS and self.config.masks_from is None

    @property
    def masked(self) -> list[ParameterInfo]:
        """Parameters that can be pruned."""
        return [leaf for leaf in self.leaves if leaf.maskable]

    @property
    def maskable(self) -> int:
        """Number of weights that have a mask."""
        return sum(leaf.size for leaf in self.masked)

    @property
    def active(self) -> int:
        """Exact number of weights active at the end."""
        sparsity = 0.0 if self.method is None else self.config.sparsity
        return distributions.total_count(self.maskable, sparsity)

    @property
    def start(self) -> int:
        """Exact number of weights active at step 0."""
        sparsity = 0.0 if self.method is None else self.method.sparsity(0)
        return distributions.total_count(self.maskable, sparsity)

    @property
    def updates(self) -> list[int]:
        """Steps that update the masks."""
        if self.method is None:
            return []
        return [s for s in self.method.updates.steps() if s <= self.config.steps]

    @property
    def prunings(self) -> list[int]:
        """Steps that prune: the sparsity rises."""
        if self.method is None:
            return []
        steps = [0, *self.updates]
        return [
            step
            for previous, step in itertools.pairwise(steps)
            if self.method.sparsity(step) > self.method.sparsity(previous)
        ]

    @property
    def steps_per_epoch(self) -> float | None:
        """Steps of a pass through the data; None if its size is unknown."""
        if self.dataset_info.train_size is None:
            return None
        batch_size = self.config.data.batch_size
        return self.train_step.dataset.steps_per_epoch(batch_size)

    def densities(self, sparsity: float, distribution: str) -> dict[str, float]:
        """Return the density of every maskable leaf under a distribution."""
        shapes = [leaf.shape for leaf in self.masked]
        values = distributions.densities(shapes, sparsity, distribution)
        return {leaf.name: d for leaf, d in zip(self.masked, values, strict=True)}


def analyse(config: Config) -> DryRun:
    """Return the properties of a configuration.

    Raises:
      ValueError: The batch is larger than the data, or the network does not support the
        data.
    """
    dataset_info = DATASETS[config.data.dataset]
    train_size = dataset_info.train_size
    if train_size is not None and config.data.batch_size > train_size:
        raise ValueError(
            f"data.batch_size must be at most the {train_size} training examples "
            f"of {config.data.dataset}, got {config.data.batch_size}."
        )
    train_step = TrainStep(config, _empty_dataset(config, dataset_info))
    state = jax.eval_shape(train_step.create, jnp.uint32(0))
    flops = _flops(train_step, dataset_info, state)
    flags = jax.tree.leaves(masking.maskable(state.params, models.maskable))
    named = [
        (masking.leaf_name(path), tuple(leaf.shape), flag)
        for (path, leaf), flag in zip(
            jax.tree_util.tree_leaves_with_path(state.params), flags, strict=True
        )
    ]
    start = _active(train_step, [shape for _, shape, flag in named if flag])
    leaves, drawn = [], iter(start)
    for name, shape, flag in named:
        active = next(drawn) if flag else math.prod(shape)
        multiplied = flops.leaves[name].dense // 2
        leaves.append(ParameterInfo(name, shape, flag, multiplied, active))
    memory = {
        "parameters": _bytes(state.params),
        "batch statistics": _bytes(state.statistics),
        **_optimizer_memory(train_step, state.opt_state),
        "moving average": _bytes(state.average),
        "order of the data": _bytes(state.order),
    }
    return DryRun(config, dataset_info, train_step, tuple(leaves), flops, memory)


def path_of(config: Config, name: str) -> epath.Path:
    """Return the path of the plot: `out` if it is a PNG file, else next to `out`.

    No plot of a plan is put into a bucket.
    """
    if config.out is None or in_bucket(config.out):
        return epath.Path(f"dry-run-{name}.png")
    if config.out.suffix == ".png":
        return config.out
    # The plot is not put into `out`: training refuses a folder with other files.
    return config.out.with_name(f"{config.out.name}-dry-run.png")


def run(
    config: Config, recipe: Recipe | None = None, topology: str | None = None
) -> epath.Path:
    """Print the properties of a configuration and plot its schedules.

    Args:
      config: The configuration.
      recipe: Recipe of the configuration, if any. Its published accuracy is shown only
        if no option that changes results differs.
      topology: Accelerators for which to compile the step, such as "v5e:4x4"; None for
        none.

    Returns:
      The path of the plot.

    Raises:
      ValueError: The configuration does not fit its data or the accelerators, or the
        topology is unknown.
    """
    accelerators = None if topology is None else topologies.devices_of(topology)
    name = (
        f"{config.method}-{config.data.dataset}-{config.model}"
        if recipe is None
        else recipe.name
    )
    result = analyse(config)
    path = path_of(config, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        plot(result, name, partial)
    print(text(result, name, recipe))
    print(f"\nSchedules: {path}")
    if topology is not None and accelerators is not None:
        dataset = result.train_step.dataset
        print(f"\n{topologies.report(config, dataset, topology, accelerators)}")
    return path


def training_cost(result: DryRun, distribution: str) -> float:
    """Return the training FLOPs relative to dense training, for a distribution.

    The number follows the rules of `analysis.training_flops`. It is exact if the layers
    keep their numbers of weights and `distribution` is the configured one; otherwise it
    is an estimate.
    """
    if result.method is None:
        return 1.0
    return analysis.training_flops(
        result.method, result.config.steps, result.flops, distribution=distribution
    )


def forward_cost(result: DryRun, distribution: str) -> float:
    """Return the multiply-accumulates of one forward pass at the end of training."""
    sparsity = 0.0 if result.method is None else result.config.sparsity
    return result.flops.at(result.densities(sparsity, distribution)) / 2


def text(result: DryRun, name: str, recipe: Recipe | None = None) -> str:
    """Return all properties as text of 80 to 100 columns."""
    config = result.config
    lines = [name]
    if recipe is not None:
        lines += _wrapped([_published(recipe, config)])
    lines += ["", *_settings(result), "", *_table(result), "", *_exact(result)]
    return "\n".join([*lines, "", *_estimates(result)])


def plot(result: DryRun, name: str, path: pathlib.Path) -> None:
    """Plot sparsity, exchanged weights and learning rate over the steps, as a PNG."""
    config, method = result.config, result.method
    steps, updates = config.steps, result.updates
    figure = Figure(figsize=(9, 8), layout="constrained")
    figure.suptitle(f"{name}: {steps:,} steps of {config.data.batch_size}")
    sparsity, fraction, rate = figure.subplots(3, 1, sharex=True)
    blue = "#0072B2"

    times = [0, *updates, steps]
    values = [0.0 if method is None else 100 * method.sparsity(t) for t in times]
    sparsity.step(times, values, where="post", color=blue, linewidth=1.8)
    sparsity.set(
        title="Sparsity of all weights with masks",
        ylabel="sparsity / %",
        ylim=(-4, 104),
    )

    shares = [100 * share for share in _exchange_fractions(method, updates)]
    if shares:
        look: Any = {"color": blue, "linestyle": "none", "marker": ".", "markersize": 5}
        fraction.plot(updates, shares, **look)
        title = f"Exchanged at each of {len(updates):,} mask updates"
    else:
        title = "No exchange of weights"
        fraction.text(0.5, 0.5, "none", ha="center", transform=fraction.transAxes)
    fraction.set(
        title=title,
        ylabel="share of a layer's\nactive weights / %",
        ylim=(-0.04 * max(shares, default=100), 1.08 * max(shares, default=100)),
    )

    grid = np.unique(np.linspace(0, steps - 1, min(steps, 4000)).astype(np.int32))
    rates = np.asarray(jax.vmap(result.train_step.schedule)(grid))
    rate.plot(grid, rates, color=blue, linewidth=1.8)
    if rates.min() > 0:
        rate.set_yscale("log")
    rate.set(title="Learning rate", xlabel="optimizer steps", ylabel="learning rate")
    rate.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    for axes in (sparsity, fraction, rate):
        axes.grid(alpha=0.3)
        axes.margins(x=0.01)
    if (epoch := result.steps_per_epoch) is not None:
        _epochs(sparsity, epoch)
    figure.savefig(path, dpi=150, format="png")


def _exchange_fractions(
    method: granet_jax.Method | None, updates: Sequence[int]
) -> list[float]:
    """Return the fraction of active weights that every update drops and regrows."""
    if method is None:
        return []
    exchanges = [phase for phase in method.phases if isinstance(phase, Exchange)]
    return [phase.fraction(step) for phase in exchanges for step in updates]


def _epochs(axes: Axes, steps: float) -> None:
    def forward(x: Any) -> Any:
        return np.asarray(x) / steps

    def back(x: Any) -> Any:
        return np.asarray(x) * steps

    axes.secondary_xaxis("top", functions=(forward, back)).set_xlabel("epochs")


def _empty_dataset(config: Config, dataset_info: DatasetInfo) -> Dataset | Stream:
    """Return a data set of the right shapes without data."""
    channels = dataset_info.shape[-1] if len(dataset_info.shape) == 3 else 0
    mean, std = (0.0,) * channels, (1.0,) * channels
    if config.data.dataset == "imagenet2012":
        assert dataset_info.train_size is not None
        height, width, depth = dataset_info.shape
        return Stream(
            name=config.data.dataset,
            classes=dataset_info.classes,
            mean=mean,
            std=std,
            image_shape=(height, width, depth),
            train_size=dataset_info.train_size,
            test_size=0,
            train_source=None,
            test_source=None,
        )
    size = dataset_info.train_size or config.data.batch_size
    labels = dataset_info.shape if len(dataset_info.shape) == 1 else ()
    # Views of a single number take no memory.
    split = Split(
        np.broadcast_to(np.uint8(0), (size, *dataset_info.shape)),
        np.broadcast_to(np.int32(0), (size, *labels)),
    )
    return Dataset(config.data.dataset, split, split, dataset_info.classes, mean, std)


def _active(
    train_step: TrainStep, shapes: Sequence[tuple[int, ...]]
) -> Sequence[int | None]:
    method = train_step.method
    if train_step.config.masks_from is not None:
        return [None] * len(shapes)
    if method is None:
        return [math.prod(shape) for shape in shapes]
    return distributions.counts(shapes, method.sparsity(0), method.distribution)


def _optimizer_memory(train_step: TrainStep, opt_state: PyTree) -> dict[str, int]:
    if train_step.method is None:
        return {"optimizer": _bytes(opt_state)}
    # Masks are the only arrays with one byte per element.
    masks = _bytes([x for x in jax.tree.leaves(opt_state) if x.dtype.itemsize == 1])
    return {"masks": masks, "optimizer": _bytes(opt_state) - masks}


def _bytes(tree: PyTree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _flops(
    train_step: TrainStep, dataset_info: DatasetInfo, state: PyTree
) -> analysis.Flops:
    """Return the FLOPs of one forward pass, without products of activations."""

    def forward(params: PyTree, statistics: PyTree, x: jax.Array) -> Any:
        variables = {"params": params, "batch_stats": statistics}
        return train_step.model.apply(variables, x, train=False)

    masks = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            # A view of a single number takes no memory.
            np.broadcast_to(True, leaf.shape)
            if models.maskable(masking.leaf_name(path), leaf)
            else None
        ),
        state.params,
    )
    dtype = jnp.uint8 if len(dataset_info.shape) == 1 else jnp.float32
    x = jax.ShapeDtypeStruct((1, *dataset_info.shape), dtype)
    flops = analysis.flops(forward, state.params, masks, state.statistics, x)
    return dataclasses.replace(flops, other=0)


def _published(recipe: Recipe, config: Config) -> str:
    if changed := recipe.changes(config):
        return f"The recipe except for {', '.join(changed)}: no published accuracy."
    if recipe.ours:
        return "Its settings are ours: those of the paper were not available."
    if recipe.published is None:
        return "No published accuracy is known for it."
    return f"Published accuracy: {recipe.published:.2f} % ({recipe.provenance})."


def _settings(result: DryRun) -> list[str]:
    config, dataset_info = result.config, result.dataset_info
    batch = config.data.batch_size
    epoch = result.steps_per_epoch
    size = "?" if dataset_info.train_size is None else f"{dataset_info.train_size:,}"
    kind = "images" if len(dataset_info.shape) == 3 else "rows of text"
    shape = " x ".join(map(str, dataset_info.shape))
    sparsity = "" if config.method == "dense" else f", sparsity {config.sparsity:.4g}"
    rows = [
        ("method", f"{config.method}{sparsity}"),
        ("model", f"{config.model}, {config.precision}"),
        (
            "data",
            f"{config.data.dataset}: {size} {kind} of {shape}, "
            f"{dataset_info.classes} classes",
        ),
        ("steps", f"{config.steps:,} of {batch} examples"),
    ]
    if epoch is not None:
        rows.append(
            ("epochs", f"{config.steps / epoch:.4g}, of {epoch:,.6g} steps each")
        )
    if config.masks_from is not None:
        rows.append(("masks from", config.masks_from))
    if techniques := _techniques(config):
        rows.append(("ToST", techniques))
    updates, prunings = result.updates, result.prunings
    if updates:
        method = result.method
        assert method is not None
        text = f"{len(updates):,}, every {method.updates.interval:,} steps"
        text += f", from step {updates[0]:,} to {updates[-1]:,}"
        rows.append(("mask updates", text))
    else:
        rows.append(("mask updates", "none"))
    if prunings:
        rows.append(
            ("of these prune", f"{len(prunings):,}, the last one at {prunings[-1]:,}")
        )
    optimizer = config.optimizer
    text = f"{optimizer.name}, learning rate {optimizer.learning_rate:g}"
    text += f" ({optimizer.schedule}"
    if optimizer.schedule == "drops":
        drops = ", ".join(f"{int(config.steps * x):,}" for x in optimizer.drops)
        text += f" at {drops}"
    rows.append(("optimizer", text + ")"))
    if optimizer.warmup_steps:
        rows.append(("warm-up", f"{optimizer.warmup_steps:,} steps"))
    evaluations = math.ceil(config.steps / config.evaluation_interval) + 1
    rows.append(("evaluations", f"{evaluations:,}"))
    rows.append(
        (
            "checkpoints",
            f"every {config.checkpoint_interval:,} steps, the last "
            f"{config.checkpoint.keep} kept",
        )
    )
    seeds = f"{config.seeds}"
    if config.baseline and config.method != "dense":
        seeds += ", and the same number of dense runs"
    rows.append(("seeds", seeds))
    return [f"{key:15}{value}" for key, value in rows]


def _techniques(config: Config) -> str:
    """Describe the techniques of ToST in use."""
    tost = config.tost
    parts = [] if tost.neurons is None else [f"{tost.neurons} neurons"]
    parts += [] if tost.skips is None else [f"{tost.skips} skips"]
    if parts:
        kept = config.ghost_steps > config.steps
        parts[-1] += " throughout" if kept else f" for {config.ghost_steps:,} steps"
    parts += ["LRsI"] if tost.lrsi else []
    parts += [] if tost.labels is None else [f"labels smoothed by {tost.labels:g}"]
    return ", ".join(parts)


def _table(result: DryRun) -> list[str]:
    """Return a row per maskable array, and one for the other arrays of each layer."""
    fixed = result.fixed
    active = "active" if fixed else "at start"
    rows = [("parameter", "shape", "number", "masked", "MACs", active)]
    layers = itertools.groupby(
        result.leaves, lambda leaf: (leaf.name.rpartition("/")[0], leaf.maskable)
    )
    for (layer, maskable), group in layers:
        leaves = list(group)
        if maskable:
            for leaf in leaves:
                cost = f"{leaf.macs:,}" if leaf.macs else "-"
                shape = "x".join(map(str, leaf.shape))
                number = f"{leaf.size:,}"
                start = "?" if leaf.start is None else f"{leaf.start:,}"
                rows.append((leaf.name, shape, number, "yes", cost, start))
            continue
        kinds = ",".join(leaf.name.rpartition("/")[2] for leaf in leaves)
        shapes = ", ".join("x".join(map(str, leaf.shape)) for leaf in leaves)
        number = f"{sum(leaf.size for leaf in leaves):,}"
        kinds = kinds if len(leaves) == 1 else "*"
        name = f"{layer}/{kinds}" if layer else kinds
        rows.append((name, shapes, number, "no", "-", "-"))
    total = (
        "all",
        "",
        f"{sum(leaf.size for leaf in result.leaves):,}",
        f"{result.maskable:,}",
        f"{sum(leaf.macs for leaf in result.leaves):,}",
        f"{result.start:,}",
    )
    if fixed:
        meaning = "Active: weights that are not zero, constant in every layer."
    elif result.config.masks_from is not None:
        meaning = "At start: active weights. The source of the masks splits them."
    else:
        meaning = (
            "At start: active weights. Training decides how many each layer keeps."
        )
    return [
        *columns([*rows, total], "<<>>>>"),
        "",
        "MACs: multiply-accumulates of one example's forward pass, dense, by kernels.",
        meaning,
    ]


def _exact(result: DryRun) -> list[str]:
    memory = {name: number for name, number in result.memory.items() if number}
    total = sum(memory.values())
    parts = "; ".join(f"{name} {_mebibytes(n)}" for name, n in memory.items())
    data = 0
    if (
        isinstance(result.train_step.dataset, Dataset)
        and result.dataset_info.train_size
    ):
        train = result.train_step.dataset.train
        data = sum(x.size * x.dtype.itemsize for x in train)
    dense = sum(leaf.macs for leaf in result.leaves)
    lines = [
        "Exact, since it follows from shapes and configuration:",
        f"- {sum(leaf.size for leaf in result.leaves):,} parameters; "
        f"{result.maskable:,} have masks, and {result.active:,} of these are active at "
        "the end",
        f"- {dense:,} multiply-accumulates in a dense forward pass",
        f"- state: {_mebibytes(total)} ({parts})",
    ]
    if data:
        lines.append(f"- training data, on every device: {_mebibytes(data)}")
    if result.fixed:
        lines += _sparse_costs(result, [_distribution(result)])
    return _wrapped(lines)


def _estimates(result: DryRun) -> list[str]:
    lines = ["Not known in advance:"]
    if not result.fixed:
        lines = [
            "Estimates, since data and training decide how many weights each layer "
            "keeps:"
        ]
        lines += _sparse_costs(result, ["uniform", "erk"])
    lines.append(
        "- total memory: activations, the gradient and the compiler's temporary arrays "
        "add to the state"
    )
    lines.append(
        "- time: masked weights are stored and multiplied as zeros, so a step takes as "
        "long as a dense step; the sparse counts are those of sparse kernels"
    )
    return _wrapped(lines)


def _sparse_costs(result: DryRun, rules: Sequence[str]) -> list[str]:
    dense = sum(leaf.macs for leaf in result.leaves)
    lines = []
    for rule in rules:
        forward = forward_cost(result, rule)
        split = "" if result.fixed else f", layers split by {rule!r}"
        lines.append(
            f"- at the final sparsity{split}: {forward:,.0f} multiply-accumulates in a "
            f"forward pass ({forward / dense:.4f} of dense); training FLOPs "
            f"{training_cost(result, rule):.4f} of dense"
        )
    return lines


def _distribution(result: DryRun) -> str:
    method = result.method
    if method is None:
        return "uniform"
    assert isinstance(method.distribution, str)
    return method.distribution


def _mebibytes(number: int) -> str:
    return f"{number / 2**20:,.2f} MiB"


def _wrapped(lines: Sequence[str]) -> list[str]:
    wrapped: list[str] = []
    for line in lines:
        wrapped += textwrap.wrap(line, 80, subsequent_indent="  ")
    return wrapped
