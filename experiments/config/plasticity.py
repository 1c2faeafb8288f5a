"""The configuration of a study of pruning plasticity."""

import dataclasses
import itertools
import pathlib
from typing import Any, Literal, NamedTuple

from experiments.config.run import CheckpointConfig, Config, MaskConfig
from granet_jax.selection import Scope

# Options of `train` that the study itself decides.
_DECIDED = ("out", "eval_every", "vmap_seeds", "checkpoint", "distributed")


class Branch(NamedTuple):
    """A way of pruning.

    Attributes:
      criterion: "magnitude", "gradient" or "random".
      scope: "global" or "layer".
      pruning: "one-shot" or "gradual".
      regrow: share of each layer's weights that are exchanged after pruning.
      rate: share of all weights that are pruned.
    """

    criterion: str
    scope: Scope
    pruning: str
    regrow: float
    rate: float

    @property
    def name(self) -> str:
        """Of its files."""
        if self == UNPRUNED:
            return "unpruned"
        return "-".join([*self[:3], f"regrow{self.regrow}", f"rate{self.rate}"])

    @property
    def ranking(self) -> tuple[str, Scope, float]:
        """What is pruned and regrown, however often."""
        return self.criterion, self.scope, self.regrow

    @property
    def way(self) -> str:
        """In words, without criterion, scope and rate."""
        if not self.regrow:
            return self.pruning
        return f"{self.pruning}, regrow {self.regrow:g}"


UNPRUNED = Branch("magnitude", "global", "one-shot", 0.0, 0.0)


class PruningPoint(NamedTuple):
    """A point in time.

    Attributes:
      step: optimizer steps done.
      epoch: the same in epochs.
      learning_rate: of the last of those steps, and of the training after pruning.
    """

    step: int
    epoch: float
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class Study:
    """Measures pruning plasticity: how a network recovers from pruning.

    Trains a network densely. At several points in time prunes copies of
    it, one for each rate, criterion, scope and way of pruning, and trains
    each on for a while at the learning rate of that moment. Plasticity is
    the accuracy then, less the accuracy before pruning.

    In `out` come results.md, results.json and plots. The same command
    with the same `out` goes on where it stopped; rates, criteria, scopes
    and ways of pruning, and seeds, may be added to it.
    """

    points: int = 8
    """Points in time, evenly over the training, the last one near its
    end."""

    rates: tuple[float, ...] = (0.5, 0.8, 0.9, 0.98)
    """Pruning rates: shares of all weights that are pruned, in (0, 1)."""

    criteria: tuple[Literal["magnitude", "gradient", "random"], ...] = ("magnitude",)
    """What is pruned first: small weights, weights of small gradient (of
    one batch), or any."""

    scopes: tuple[Literal["global", "layer"], ...] = ("global",)
    """Whether weights compete across layers, or within each."""

    pruning: tuple[Literal["one-shot", "gradual"], ...] = ("one-shot", "gradual")
    """All at once; or by a cubic schedule, over the first half of the
    training that follows."""

    regrow: tuple[float, ...] = (0.0, 0.5)
    """Neuroregeneration: the share of each layer's weights left by
    pruning that are dropped too, by magnitude, and replaced by as many
    of large gradient, each time that it prunes. 0: none."""

    epochs: float = 1.0
    """Epochs that each pruned network is trained on."""

    updates: int = 10
    """Times that gradual pruning prunes."""

    lanes: int = 1
    """Pruned networks trained at once, as one vectorised program on one
    device. For a GPU or TPU, as many as fit its memory. Leave it at 1 on
    a CPU, where convolutions with a kernel each run several times
    slower."""

    out: pathlib.Path | None = None
    """Folder for the results; must be new, or of the same study, which
    then goes on. By default runs/TIME-plasticity."""

    progress: bool = True
    """Whether to show a progress bar."""

    train: Config = dataclasses.field(
        default_factory=lambda: Config(method="dense", baseline=False)
    )
    """The dense training, as of `experiments.train`."""

    def __post_init__(self) -> None:
        """Raises ValueError for a value that cannot be used."""
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
                raise ValueError(f"{name} must have values, none twice, got {values}.")
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
                    f"train.{name} is not for a study, which decides it: leave it out."
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
        """Those of the points."""
        return [self.interval * i for i in range(1, self.points + 1)]

    @property
    def branches(self) -> list[Branch]:
        """What is trained on from every point: first, without being pruned."""
        ways = itertools.product(
            self.criteria, self.scopes, self.pruning, sorted(self.regrow)
        )
        found = [
            Branch(*way, rate) for way, rate in itertools.product(ways, self.rates)
        ]
        return [UNPRUNED, *found]

    @property
    def dense(self) -> Config:
        """The training that branches start from: a checkpoint at every point."""
        return dataclasses.replace(
            self.train,
            masks=MaskConfig(),
            baseline=False,
            progress=self.progress,
            eval_every=self.interval,
            checkpoint=CheckpointConfig(self.interval, self.points + 1),
        )

    def continued(self, learning_rate: float) -> Config:
        """The training of branches: masked, at a learning rate that stays."""
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
        """The values that all numbers of a study depend on, as JSON holds them."""
        own = {name: getattr(self, name) for name in ("points", "epochs", "updates")}
        return own | self.dense.to_dict()
