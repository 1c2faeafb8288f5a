"""The configuration of a study of pruning plasticity."""

import dataclasses
from typing import Any, Literal, NamedTuple

from etils import epath

from experiments.buckets import check_folder
from experiments.config.run import CheckpointConfig, Config, MaskConfig
from granet_jax.selection import Scope

# Options of `train` that the study sets itself.
_DECIDED = (
    *("out", "init_from", "eval_every", "vmap_seeds", "checkpoint", "distributed"),
)


class Branch(NamedTuple):
    """A way of pruning.

    Attributes:
      criterion: Criterion of pruning: "magnitude", "gradient" or "random".
      scope: Scope of pruning: "global" or "layer".
      pruning: "one-shot", "gradual", or "revived": prune once and let all pruned
        weights grow again from zero.
      regrow: Fraction of each layer's weights that is exchanged after pruning.
      rate: Fraction of all weights that is pruned.
    """

    criterion: str
    scope: Scope
    pruning: str
    regrow: float
    rate: float

    @property
    def name(self) -> str:
        """Name used in file names."""
        if self == UNPRUNED:
            return "unpruned"
        return "-".join([*self[:3], f"regrow{self.regrow}", f"rate{self.rate}"])

    @property
    def rule(self) -> tuple[str, Scope, float, bool]:
        """The part that determines which weights are pruned and regrown."""
        return self.criterion, self.scope, self.regrow, self.pruning == "revived"

    @property
    def way(self) -> str:
        """Description without criterion, scope and rate."""
        if not self.regrow:
            return self.pruning
        return f"{self.pruning}, regrow {self.regrow:g}"


UNPRUNED = Branch("magnitude", "global", "one-shot", 0.0, 0.0)


class PruningPoint(NamedTuple):
    """A point of the dense training at which copies are pruned.

    Attributes:
      step: Number of completed optimizer steps.
      epoch: The same in epochs.
      learning_rate: Learning rate of the last step before the point, and of the
        training after pruning.
    """

    step: int
    epoch: float
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class Study:
    """Measures pruning plasticity: how a network recovers from pruning.

    Trains a network densely. At several points it prunes copies of the
    network, one for each rate, criterion, scope and way of pruning, and
    trains each copy further at the learning rate of that point.
    Plasticity is the final accuracy minus the accuracy before pruning.

    Writes results.md, results.json and plots to `out`. The same command
    with the same `out` continues where it stopped, also with additional
    rates, criteria, scopes, ways of pruning, or seeds.
    """

    points: int = 8
    """Number of points, evenly spaced, the last one near the end of the
    dense training."""

    rates: tuple[float, ...] = (0.5, 0.8, 0.9, 0.98)
    """Pruning rates: fractions of all weights to prune, in (0, 1)."""

    criteria: tuple[Literal["magnitude", "gradient", "random"], ...] = ("magnitude",)
    """What is pruned first: small weights, weights with a small gradient
    (on one batch), or random weights."""

    scopes: tuple[Literal["global", "layer"], ...] = ("global",)
    """Whether weights compete across all layers or within each layer."""

    pruning: tuple[Literal["one-shot", "gradual", "revived"], ...] = (
        "one-shot",
        "gradual",
    )
    """Prune once, or gradually by a cubic schedule over the first half of
    the training that follows. Or, as the authors' study code regenerates:
    prune once, then let all pruned weights grow again from zero, so that
    the network is dense; without regrow."""

    regrow: tuple[float, ...] = (0.0, 0.5)
    """Neuroregeneration: fraction of each layer's remaining weights that
    every pruning also drops by magnitude and replaces by the same number
    of weights with a large gradient. 0: none."""

    epochs: float = 1.0
    """Epochs of training after pruning."""

    updates: int = 10
    """Number of prunings in gradual pruning."""

    lanes: int = 1
    """Number of pruned networks trained at once, as one vectorised program
    on one device. On a GPU or TPU, as many as fit its memory. Leave it at
    1 on a CPU, where convolutions with separate kernels are several times
    slower."""

    out: epath.Path | None = None
    """Folder for the results; must be new or contain the same study, which
    then continues. By default runs/TIME-plasticity."""

    progress: bool = True
    """Whether to show a progress bar."""

    train: Config = dataclasses.field(
        default_factory=lambda: Config(method="dense", baseline=False)
    )
    """Options of the dense training, as for `experiments.train`."""

    def __post_init__(self) -> None:
        """Raise ValueError for an invalid value."""
        check_folder("out", self.out)
        for name in ("points", "updates", "lanes"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}."
                )
        if self.points > self.train.steps:
            raise ValueError(
                f"points must be at most train.steps, {self.train.steps}, got "
                f"{self.points}."
            )
        if not 0 < self.epochs < float("inf"):
            raise ValueError(f"epochs must lie in (0, inf), got {self.epochs}.")
        for name in ("rates", "criteria", "scopes", "pruning", "regrow"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must have distinct values, got {values}.")
        for rate in self.rates:
            if not 0 < rate < 1:
                raise ValueError(f"rates must lie in (0, 1), got {rate}.")
        for share in self.regrow:
            if not 0 <= share <= 1:
                raise ValueError(f"regrow must lie in [0, 1], got {share}.")
        if self.train.method != "dense":
            raise ValueError(
                f"train.method must be dense, got {self.train.method}: a study prunes "
                "a dense network."
            )
        defaults = Config()
        for name in _DECIDED:
            if getattr(self.train, name) != getattr(defaults, name):
                raise ValueError(
                    f"train.{name} is not for a study, which sets it itself: leave it "
                    "out."
                )
        if self.train.parallel != "jit":
            raise ValueError(
                f"train.parallel must be jit, got {self.train.parallel}: masks are "
                "changed between steps."
            )
        if self.train.ghost_steps:
            raise ValueError(
                "train.tost.neurons and train.tost.skips are not for a study: the "
                "network must be the same at all points."
            )

    @property
    def interval(self) -> int:
        """Steps between points."""
        return self.train.steps // self.points

    @property
    def steps(self) -> list[int]:
        """Steps of the points."""
        return [self.interval * i for i in range(1, self.points + 1)]

    @property
    def branches(self) -> list[Branch]:
        """Branches of every point; the first is not pruned."""
        pruned = [
            Branch(criterion, scope, pruning, share, rate)
            for criterion in self.criteria
            for scope in self.scopes
            for pruning in self.pruning
            for share in ((0.0,) if pruning == "revived" else sorted(self.regrow))
            for rate in self.rates
        ]
        return [UNPRUNED, *pruned]

    @property
    def dense(self) -> Config:
        """Dense training of the study, with a checkpoint at every point."""
        return dataclasses.replace(
            self.train,
            masks=MaskConfig(),
            baseline=False,
            progress=self.progress,
            eval_every=self.interval,
            checkpoint=CheckpointConfig(self.interval, self.points + 1),
        )

    def continued(self, learning_rate: float) -> Config:
        """Return the training of branches: masked, with a constant learning rate."""
        return dataclasses.replace(
            self.dense,
            method="static",
            sparsity=0.0,
            seeds=self.lanes,
            vmap_seeds=self.lanes > 1,
            optimizer=dataclasses.replace(
                self.train.optimizer,
                schedule="constant",
                learning_rate=learning_rate,
                warmup_steps=0,
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the options on which all results depend, as JSON values."""
        own = {name: getattr(self, name) for name in ("points", "epochs", "updates")}
        return own | self.dense.to_dict()
