"""Recipes: named configurations of the rows in the papers' tables, and small twins.

`python -m experiments.train --recipe NAME` trains a recipe and `--list-recipes` prints
all of them. Names are METHOD-DATA-MODEL-SPARSITY, such as granet-st-cifar10-vgg19-95;
dense training has no sparsity. NAME-mini is the small twin: the same recipe with a
small network on Fashion-MNIST, which takes minutes on two cores.

The hyperparameters are those of the GraNet authors' code and scripts, with these
choices where they leave something open:

- An epoch has train size // batch size steps.
- All methods of a setting have the same number of steps and update their masks at the
  same interval, so that they differ only in the method.
- `rigl` is RigL-ITOP (Liu et al., 2021): the common interval, a fraction of 0.5, and
  updates throughout the training. For RigL as in its paper (Evci et al., 2020), add
  `--masks.interval 100 --masks.fraction 0.3 --masks.stop 0.75`.
- `set` exchanges a constant 0.3, as in its paper, until 0.75 of the steps, as RigL
  does.
- `gmp` prunes over the same steps as GraNet.
- Norms and biases have no weight decay. In the authors' code they have.

For ToST (Jaiswal et al., 2022) METHOD is the source of the static masks: random, snip,
grasp or synflow, or tost-SOURCE for training with all techniques. ResNet-18 on CIFAR-10
and CIFAR-100 has the settings of the authors' code, with two differences: all training
images are used (the code holds out 5,000 to choose an epoch), and masks are ranked over
all kernels, including the classifier's. The settings of the paper's other networks and
data sets were not available. Their recipes have the same settings and are marked
"ours". For lottery tickets, use a recipe with `--masks.source tickets`.

The published accuracies are recalled from memory and were not looked up. They are
marked so wherever they are shown.
"""

import dataclasses
import difflib
import functools
from collections.abc import Iterator

from experiments.config.methods import MaskConfig, MethodName, SourceName
from experiments.config.run import (
    CheckpointConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    ToSTConfig,
    differences,
)

METHODS: tuple[MethodName, ...] = (
    "granet",
    "granet-st",
    "gmp",
    "rigl",
    "set",
    "static",
)
UNVERIFIED = "recalled, unverified"
MINI = "-mini"
MINI_EPOCHS = 10

# Numbers of training examples, which convert epochs to steps.
_TRAIN_SIZES = {
    "cifar10": 50_000,
    "cifar100": 50_000,
    "tiny_imagenet": 100_000,
    "imagenet2012": 1_281_167,
}
_FASHION_MNIST_SIZE = 60_000

# The small network of each twin and its learning rate. Networks without batch norm need
# a lower rate than the full networks: lenet-5 diverges at 0.05.
_TWIN_MODELS = {
    "vgg-19": ("cnn", 0.05),
    "resnet-50-cifar": ("lenet-5", 0.01),
    "resnet-50": ("lenet-5", 0.01),
    "resnet-18-cifar": ("cnn-bn-small", 0.1),
    "resnet-32": ("cnn-bn-small", 0.1),
    "vgg-16": ("cnn-bn-small", 0.1),
    "mobilenet-v2": ("cnn-bn-small", 0.1),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A named configuration.

    Attributes:
      name: Name for `--recipe`.
      config: The configuration.
      published: Best test accuracy in a paper, in percent; None if unknown.
      provenance: Source of `published` and how certain it is; "" without one.
      ours: Whether the settings are our own because the paper's are not available.
    """

    name: str
    config: Config
    published: float | None = None
    provenance: str = ""
    ours: bool = False

    def changes(self, config: Config) -> list[str]:
        """Return the options that change results and differ in `config`."""
        return list(differences(self.config.to_dict(), config.to_dict()))


@dataclasses.dataclass(frozen=True)
class _Setting:
    """Settings that all recipes of a data set share."""

    sparsities: tuple[float, ...]
    epochs: int
    pruning_epochs: int
    interval: int
    warmup_epochs: int
    checkpoint_epochs: int
    seeds: int
    optimizer: OptimizerConfig


_BATCH = 128

# The GraNet code's CIFAR runs: SGD with Nesterov momentum and drops at 1/2 and 3/4.
_CIFAR = _Setting(
    sparsities=(0.9, 0.95, 0.98),
    epochs=160,
    pruning_epochs=80,
    interval=1000,
    warmup_epochs=0,
    checkpoint_epochs=10,
    seeds=3,
    optimizer=OptimizerConfig(
        learning_rate=0.1,
        schedule="drops",
        drops=(1 / 2, 3 / 4),
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
    ),
)

# From the GraNet code, except that the drops at epochs 30, 60 and 90 are recalled.
_IMAGENET = _Setting(
    sparsities=(0.8, 0.9, 0.95),
    epochs=100,
    pruning_epochs=30,
    interval=4000,
    warmup_epochs=5,
    checkpoint_epochs=1,
    seeds=1,
    optimizer=OptimizerConfig(
        learning_rate=0.1,
        schedule="drops",
        drops=(0.3, 0.6, 0.9),
        momentum=0.9,
        nesterov=False,
        weight_decay=1e-4,
        label_smoothing=0.1,
    ),
)

# ResNet-18 in the code of ToST.
_TOST = dataclasses.replace(
    _CIFAR,
    epochs=182,
    optimizer=dataclasses.replace(
        _CIFAR.optimizer,
        drops=(90 / 182, 135 / 182),
        nesterov=False,
        weight_decay=2e-4,
    ),
)
_TOST_SOURCES: dict[str, SourceName | None] = {
    "random": None,
    "snip": "snip",
    "grasp": "grasp",
    "synflow": "synflow",
}
_TOST_NETWORKS = {
    ("cifar10", "cifar10"): ("resnet18", "resnet32", "vgg16"),
    ("cifar100", "cifar100"): ("resnet18", "resnet32", "vgg16"),
    ("tiny_imagenet", "tiny"): ("resnet18", "mobilenetv2"),
}
_TOST_MODELS = {
    "resnet18": "resnet-18-cifar",
    "resnet32": "resnet-32",
    "vgg16": "vgg-16",
    "mobilenetv2": "mobilenet-v2",
}
_IN_THE_CODE_OF_TOST = (("cifar10", "resnet18"), ("cifar100", "resnet18"))
_ALL_OF_TOST = ToSTConfig(neurons="swish", skips="identity", lrsi=True, labels=0.1)

# By data set: its name in recipes, its settings, and its models by names in recipes.
_DATA: dict[str, tuple[str, _Setting, dict[str, str]]] = {
    "cifar10": ("cifar10", _CIFAR, {"vgg19": "vgg-19", "resnet50": "resnet-50-cifar"}),
    "cifar100": (
        "cifar100",
        _CIFAR,
        {"vgg19": "vgg-19", "resnet50": "resnet-50-cifar"},
    ),
    "imagenet2012": ("imagenet", _IMAGENET, {"resnet50": "resnet-50"}),
}

# In percent, in the order of the setting's sparsities. All numbers are recalled.
_PUBLISHED: dict[tuple[str, str], dict[str, tuple[float, ...]]] = {
    ("cifar10", "vgg19"): {
        "dense": (93.85,),
        "set": (92.46, 91.73, 89.18),
        "rigl": (93.38, 93.06, 91.98),
        "gmp": (93.59, 93.58, 93.52),
        "granet-st": (93.73, 93.66, 93.38),
        "granet": (93.80, 93.72, 93.63),
    },
    ("cifar10", "resnet50"): {
        "dense": (94.75,),
        "rigl": (94.45, 93.86, 93.26),
        "gmp": (94.34, 94.52, 94.19),
        "granet-st": (94.64, 94.38, 94.01),
        "granet": (94.49, 94.44, 94.34),
    },
    ("cifar100", "vgg19"): {"dense": (73.43,), "set": (72.36, 69.81, 65.94)},
    ("cifar100", "resnet50"): {"dense": (78.23,)},
    ("imagenet2012", "resnet50"): {
        "dense": (76.8,),
        "set": (72.9, 69.6),
        "rigl": (75.1, 73.0),
        "gmp": (75.6, 73.9),
        "granet-st": (76.0, 74.5),
        "granet": (75.8, 74.2),
    },
}
_GRANET_TABLE = f"GraNet paper (Liu et al., 2021), its table; {UNVERIFIED}"
# Numbers from other papers, under other conditions than in these recipes.
_OTHER_TABLES = {
    ("cifar10", "vgg19", "set"): (
        "GraSP paper (Wang et al., 2020), quoted by GraNet's; " + UNVERIFIED
    ),
    ("cifar100", "vgg19", "set"): f"GraSP paper (Wang et al., 2020); {UNVERIFIED}",
    ("imagenet2012", "resnet50", "set"): (
        "RigL paper (Evci et al., 2020), quoted by GraNet's; " + UNVERIFIED
    ),
    ("imagenet2012", "resnet50", "rigl"): (
        "RigL paper (Evci et al., 2020; its own schedule), quoted by GraNet's; "
        + UNVERIFIED
    ),
}


@functools.cache
def recipes() -> dict[str, Recipe]:
    """Return all recipes by name, the twins after the others."""
    full = [*_full(), *_tost()]
    return {recipe.name: recipe for recipe in [*full, *map(_twin, full)]}


def find(name: str) -> Recipe:
    """Return the recipe `name`.

    Raises:
      ValueError: There is no such recipe.
    """
    known = recipes()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 3, cutoff=0.5)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    raise ValueError(
        f"there is no recipe {name!r}.{hint} --list-recipes [TEXT] prints all recipes "
        "(with the text in their name)."
    )


def listing(text: str = "") -> str:
    """Return a table of the recipes with `text` in their name.

    It lists the twins if `text` contains "mini", otherwise the full recipes.

    Raises:
      ValueError: No name contains `text`.
    """
    twins = "mini" in text
    matches = [
        recipe
        for recipe in recipes().values()
        if text in recipe.name and recipe.name.endswith(MINI) == twins
    ]
    if not matches:
        raise ValueError(f"no recipe has {text!r} in its name.")
    rows = [("recipe", "model", "data set", "method", "steps", "paper/%")]
    for recipe in matches:
        config = recipe.config
        rows.append(
            (
                recipe.name,
                config.model,
                config.data.dataset,
                config.method,
                f"{config.steps:,}",
                _mark(recipe),
            )
        )
    lines = columns(rows, "<<<<>>")
    number = f"{len(matches)} recipe" + ("s" if len(matches) > 1 else "")
    if twins:
        lines += [
            "",
            f"{number}: {MINI_EPOCHS} epochs, with the schedules of the full recipe",
            f"(the name without {MINI}) scaled down. No paper has numbers for them.",
        ]
    else:
        lines += [
            "",
            f"{number}. Each has a small twin, NAME{MINI} (--list-recipes mini).",
            f"* Published best test accuracy, {UNVERIFIED};",
            "  --recipe NAME --dry-run names the paper.",
            "ours: our own settings, because the paper's were not available.",
        ]
    return "\n".join(lines)


def _mark(recipe: Recipe) -> str:
    if recipe.published is not None:
        return f"{recipe.published:.2f} *"
    return "ours" if recipe.ours else "-"


def columns(rows: list[tuple[str, ...]], alignment: str) -> list[str]:
    """Format rows as lines of text with aligned columns.

    Args:
      rows: Rows of cells; the first row is the heading.
      alignment: "<" or ">" for every column.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            f"{cell:{align}{width}}"
            for cell, align, width in zip(row, alignment, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _full() -> Iterator[Recipe]:
    for dataset, (data, setting, networks) in _DATA.items():
        for label, model in networks.items():
            yield Recipe(
                f"dense-{data}-{label}",
                _config(setting, dataset, model, "dense", 0.0),
                *_published(dataset, label, "dense", 0),
            )
            for method in METHODS:
                for i, sparsity in enumerate(setting.sparsities):
                    yield Recipe(
                        f"{method}-{data}-{label}-{sparsity * 100:.0f}",
                        _config(setting, dataset, model, method, sparsity),
                        *_published(dataset, label, method, i),
                    )


def _tost() -> Iterator[Recipe]:
    for (dataset, data), networks in _TOST_NETWORKS.items():
        for label in networks:
            plain = _config(_TOST, dataset, _TOST_MODELS[label], "static", 0.0)
            for prefix, tost in (("", ToSTConfig()), ("tost-", _ALL_OF_TOST)):
                for name, source in _TOST_SOURCES.items():
                    masks = dataclasses.replace(plain.masks, source=source)
                    for sparsity in _TOST.sparsities:
                        yield Recipe(
                            f"{prefix}{name}-{data}-{label}-{sparsity * 100:.0f}",
                            dataclasses.replace(
                                plain, sparsity=sparsity, masks=masks, tost=tost
                            ),
                            ours=(dataset, label) not in _IN_THE_CODE_OF_TOST,
                        )


def _published(
    dataset: str, label: str, method: str, index: int
) -> tuple[float | None, str]:
    values = _PUBLISHED[dataset, label].get(method, ())
    if index >= len(values):
        return None, ""
    return values[index], _OTHER_TABLES.get((dataset, label, method), _GRANET_TABLE)


def _config(
    setting: _Setting, dataset: str, model: str, method: MethodName, sparsity: float
) -> Config:
    epoch = _TRAIN_SIZES[dataset] // _BATCH
    return Config(
        method=method,
        sparsity=sparsity,
        model=model,
        steps=setting.epochs * epoch,
        seeds=setting.seeds,
        baseline=False,
        eval_every=epoch,
        data=DataConfig(dataset=dataset, batch_size=_BATCH),
        optimizer=dataclasses.replace(
            setting.optimizer, warmup_steps=setting.warmup_epochs * epoch
        ),
        masks=_masks(method, setting),
        checkpoint=CheckpointConfig(every=setting.checkpoint_epochs * epoch),
    )


def _masks(method: MethodName, setting: _Setting) -> MaskConfig:
    interval = setting.interval
    pruning_end = setting.pruning_epochs / setting.epochs
    match method:
        case "granet":
            return MaskConfig(interval, 0.5, 0.0, pruning_end)
        case "granet-st":
            return MaskConfig(interval, 0.5, 0.5, pruning_end, distribution="erk")
        case "gmp":
            return MaskConfig(interval, None, 0.0, pruning_end)
        case "rigl":
            return MaskConfig(interval, 0.5, stop=1.0, distribution="erk")
        case "set":
            return MaskConfig(interval, 0.3, stop=0.75, distribution="erk")
        case "static":
            return MaskConfig(distribution="erk")
        case _:
            return MaskConfig()


def _twin(recipe: Recipe) -> Recipe:
    """Return the small twin: the same method and scaled schedules on Fashion-MNIST."""
    config = recipe.config
    epoch = _FASHION_MNIST_SIZE // _BATCH
    steps = MINI_EPOCHS * epoch

    def scaled(number: int) -> int:
        return round(number * steps / config.steps)

    model, learning_rate = _TWIN_MODELS[config.model]
    interval = config.masks.interval
    return Recipe(
        recipe.name + MINI,
        dataclasses.replace(
            config,
            model=model,
            steps=steps,
            seeds=1,
            eval_every=epoch,
            data=DataConfig(dataset="fashion_mnist", batch_size=_BATCH),
            optimizer=dataclasses.replace(
                config.optimizer,
                learning_rate=learning_rate,
                warmup_steps=scaled(config.optimizer.warmup_steps),
            ),
            masks=dataclasses.replace(
                config.masks, interval=None if interval is None else scaled(interval)
            ),
            checkpoint=CheckpointConfig(every=epoch),
        ),
    )
