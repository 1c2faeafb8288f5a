"""Every public function, with arguments it accepts and values it must refuse.

An argument's name means the same in most functions, so `GOOD` and `BAD` hold its values
by name; `special_entries` lists functions for which some differ. `test_arguments`
compares the entries with the signatures: an argument without bad values fails, and so
does a function that cannot be called with its good values.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import granet_jax
from granet_jax import (
    analysis,
    distributions,
    export,
    mask_sources,
    masking,
    penalties,
    schedules,
    scores,
    structures,
    tost,
)
from granet_jax.analysis import plots
from granet_jax.tost import linen
from tests.helpers.trees import parameters

# The modules whose public names users may rely on.
MODULES: tuple[ModuleType, ...] = (
    *(granet_jax, analysis, plots, distributions, export, mask_sources, masking),
    *(penalties, schedules, scores, structures, tost, linen),
)


def names(module: str, *members: str) -> set[str]:
    return {f"granet_jax.{module}{member}" for member in members}


# Classes that the library fills and users read.
RESULTS = {
    *names("", "ScoreInputs", "SparseState", "Sparsity", "PackedMask"),
    *names("structures.", "Structure"),
    *names("schedules.", "ListedSteps", "UpdateSteps"),
    *names("analysis.", "Churn", "Connectivity", "Flops", "LeafFlops", "Overlap"),
    *names("analysis.", "PerLeaf", "Pruned", "Recovery", "Summary"),
    *names("mask_sources.", "Collapse", "InputStatistics", "Ticket"),
    *names("penalties.", "PenaltyInputs"),
    *names("tost.", "Rescaled"),
}
# Functions that receive arguments which other functions have checked.
INTERNAL = {
    *names("masking.", "default_where", "flags", "is_masked_node", "leaf_name"),
    *names("masking.", "map_masked", "maskable_leaves", "placed_like", "stacks_of"),
    *names("masking.", "check_arrays", "check_concrete", "given_masks"),
    *names("structures.", "check_leaves", "check_use", "counts", "parts"),
    *names("structures.", "check_least", "has_equal_boxes", "has_least"),
    *names("structures.", "least_counts"),
    *names("schedules.", "ceil_of", "fixed_point", "increasing"),
    *names("distributions.", "check_distribution"),
    *names("penalties.", "penalised"),
    *names("scores.", "gradient", "magnitude", "momentum", "random"),
    *names("analysis.plots.", "draw_accuracies", "draw_bars", "draw_dense"),
}


class Bad(NamedTuple):
    """A value to refuse, and text that the message contains besides the name."""

    value: Any
    says: str


class Free(NamedTuple):
    """An argument for which no value is refused, and the reason."""

    why: str


class Traced(NamedTuple):
    """Stands for a tracer of this value."""

    value: Any


class Entry(NamedTuple):
    """A function, arguments it accepts, and for each argument values it refuses."""

    call: Callable[..., Any]
    good: dict[str, Any]
    bad: dict[str, list[Any] | Free]


class Record(NamedTuple):
    """A record with a ghost in it."""

    ghost_w: float


def loss(params: Any, batch: Any) -> Any:
    return sum(jnp.sum(x) for x in jax.tree.leaves(params)) ** 2 * jnp.mean(batch)


def apply(params: Any, x: Any) -> Any:
    return jax.nn.relu(x @ params["w"])


def state() -> Any:
    tx = granet_jax.transform(granet_jax.static(0.5), optax.sgd(0.1))
    return tx.init(parameters())


def masks() -> Any:
    return granet_jax.init_masks(granet_jax.static(0.5), parameters())


def with_kernel(kernel: Any) -> Any:
    """Masks of `parameters()` in which one mask is replaced."""
    return {
        "dense": {"kernel": kernel, "bias": None},
        "conv": {"kernel": np.ones((3, 3, 2, 4), bool)},
    }


# --- Values by kind ---------------------------------------------------------------

NAN, INF = math.nan, math.inf
SPARSITY = [-0.1, 1.0, 90, NAN, "0.5", None, True, Traced(0.5)]
START = [*SPARSITY, Bad(0.95, "at most sparsity")]
SHARE = [-0.1, 1.5, NAN, "0.5", None, Traced(0.5)]
POSITIVE_SHARE = [0.0, 1.5, NAN, "1", None, Traced(0.5)]
OPTIONAL_SHARE = [x for x in POSITIVE_SHARE if x is not None]
OPTIONAL_DECAY = [-0.1, 1.0, NAN, "0.5", Traced(0.5)]
STEPS = [0, -1, 2**31, 10.0, "10", True, Traced(10)]
FROM_ZERO = [-1, 2**31, 10.0, None, Traced(10)]
COUNT = [0, -1, 1.5, "2", None, Traced(2)]
SIZE = [*COUNT, True]
INTEGER = [1.5, "2", None, True, Traced(2)]
POSITIVE = [0.0, -1.0, NAN, INF, "1", None, Traced(1.0)]
MAY_BE_INFINITE = [x for x in POSITIVE if x is not INF]
NOT_NEGATIVE = [-1.0, NAN, INF, "1", None, Traced(1.0)]
NUMBER = [NAN, INF, "1", None, Traced(1.0)]
FLAG = ["no", 1, None, Traced(True)]
CHOICE = ["other", "", 3, None]
FUNCTION = [None, "f", 3]
OPTIONAL_FUNCTION = ["f", 3]
WEIGHTS = {"w": np.eye(4, dtype=np.float32)}
EYE = {"w": np.eye(4, dtype=bool)}
FULL = {"w": np.ones((4, 4), bool)}
SMALL = np.ones((2, 2), bool)
OTHER = {"v": EYE["w"]}
ONES = np.ones((4, 4), np.float32)
NOT_A_MASK = Bad({"w": "mask"}, "'mask' at 'w'")
NO_MASK = Bad({}, "no mask")
NOT_BINARY = [
    Bad({"w": np.full((2, 2), x)}, "other than 0 and 1 at 'w'") for x in (0.5, NAN)
]
MASKS_ALONE = [NOT_A_MASK, *NOT_BINARY]
TWO_MASKS = [*MASKS_ALONE, NO_MASK, Bad(OTHER, "v"), Traced(EYE)]
TRACED_SMALL = Traced({"w": SMALL})
OTHER_TREE = Bad({"w": "weights"}, "structure")
OTHER_WEIGHTS = Bad({"v": WEIGHTS["w"]}, "structure")
NONE = Bad({}, "none")
VECTOR_MASK = Bad(np.ones(3, bool), "(3,)")
MATRIX = [
    *(VECTOR_MASK, Bad(np.full((2, 2), 0.5), "0 and 1"), Bad("mask", "'mask'")),
    Traced(SMALL),
]
IMAGE = [*MATRIX[:3], Bad(np.ones((0, 2), bool), "(0, 2)")]
LIMITS = [Bad([1], "one for each of the 2 leaves"), Bad([-1, 2], "-1")]
BATCHES = [np.ones(2, np.float32)]
LABELS = jnp.zeros(2, jnp.int32)
FLOAT_LABELS = Bad(jnp.ones(2), "float32")
PIXELS = jnp.ones((2, 4, 4, 3))
REPORT = granet_jax.sparsity(EYE)
OTHER_REPORT = granet_jax.sparsity(OTHER)
NO_REPORT = "granet_jax.sparsity"
TICKET = mask_sources.Ticket(1, FULL, WEIGHTS, WEIGHTS)

# --- Values by name ---------------------------------------------------------------


def by_name(table: dict[str, Any]) -> dict[str, Any]:
    """A table whose keys may be several names, apart from each other by spaces."""
    return {name: x for names, x in table.items() for name in names.split()}


# Required arguments.
GOOD: dict[str, Any] = by_name(
    {
        "a after b before": EYE,
        "apply_fn": apply,
        "batch": BATCHES[0],
        "batches": BATCHES,
        "chain": [EYE["w"], EYE["w"]],
        "config": tost.reproduce(),
        "final": 0.9,
        "flops": analysis.flops(apply, WEIGHTS, EYE, jnp.ones((1, 4))),
        "gradient_weight": 0.01,
        "histories": {"a": {0: EYE}},
        "image_shape": (2, 2),
        "initial": 0.0,
        "inner_state": (),
        "inputs": jax.ShapeDtypeStruct((1, 4), jnp.float32),
        "key": jax.random.key(0),
        "kind": "conv",
        "labels": LABELS,
        "last": 100,
        "leaf": jnp.ones((2, 2)),
        "logits": jnp.ones((2, 3)),
        "loss_fn": loss,
        "m": 4,
        "mask": EYE["w"],
        "masks": masks(),
        "method": granet_jax.static(0.5),
        "name": "w",
        "networks": {"a": REPORT},
        "opt_state": state(),
        "order": ["a", "b"],
        "param": WEIGHTS["w"],
        "path": "/nonexistent/net.safetensors",
        "pruned": analysis.Pruned(EYE, EYE),
        "rising": [0.5],
        "schedule": schedules.constant(0.5),
        "score": scores.magnitude,
        "shapes": [(6, 8), (3, 4)],
        "stacked": {"w": 0},
        "switches": [10, 20, 30],
        "train": lambda params, masks, key: params,
        "tree": {"a": {"ghost_w": EYE["w"]}, **EYE},
        "x": PIXELS,
        "alpha density": 0.1,
        "begin first": 0,
        "classes features": 3,
        "cycles interval n rounds": 2,
        "end ghost_steps keep period steps": 10,
        "end_step total_steps": 12_000,
        "backward_sparsity sparsity value": 0.5,
        "size step": 1e-4,
        "grads params scores": parameters(),
    }
)
# Values to refuse.
BAD: dict[str, list[Any] | Free] = by_name(
    {
        "alpha_0 beta_0 ceiling eta growth learning_rate pick_ceiling": POSITIVE,
        "pick_growth step temperature threshold": POSITIVE,
        "apply_fn loss_fn schedule score train": FUNCTION,
        "backward_sparsity initial_sparsity": START,
        "begin begin_step first settle_steps": FROM_ZERO,
        "constant_init mask_lookahead packed rewind": FLAG,
        "convention decay form grow kind norm on_collapse recovery scope": CHOICE,
        "cycles end end_step ghost_steps interval iterations period steps": STEPS,
        "total_steps updates": STEPS,
        "final initial sparsity": SPARSITY,
        "final_fraction floor fraction min_scale": SHARE,
        "gradient_weight penalty size start weight_decay": NOT_NEGATIVE,
        "kept value": NUMBER,
        "ramp stop": POSITIVE_SHARE,
        "a after b before": TWO_MASKS,
        "alpha": [-0.1, 1.5, NAN, "0.1", None, Bad(np.ones(2), "(2,)")],
        "argument": Free("the name of another argument, for messages"),
        "axis": INTEGER,
        "axis_name": [3, ("data", 3)],
        "batch": Free("the loss decides"),
        "batches": [
            *(Bad([], "at least one batch"), Bad(np.ones(2), "put it into a list")),
            Bad(3, "iterable, got 3"),
        ],
        "beta": [0.0, -1.0, NAN, "1", None, Bad(np.ones(2), "scalar")],
        "beta_1": [*POSITIVE, 0.5],
        "caps": [*LIMITS, Bad([1, 1], "hold 2 at most")],
        "chain": [
            *(Bad([], "none"), Bad(3, "got 3"), Bad([VECTOR_MASK.value], "(3,)")),
            Bad([FULL["w"], np.ones((3, 3), bool)], "must follow 4"),
        ],
        "classes": [1, 1.5, "3", None, Traced(3)],
        "clip": [x for x in MAY_BE_INFINITE if x is not None],
        "config": [None, 3, tost.Neurons()],
        "criterion": ["other", "", 3, Bad("random", "key")],
        "dense": [3, Bad([90.0], "90.0"), Bad(["x"], "'x'")],
        "density": [*POSITIVE, 1.5],
        "distribution": ["gauss", 3, None],
        "dtype": ["colour", 3, jnp.int32],
        "features": SIZE,
        "floors": [*LIMITS, Bad([48, 12], "keep 60 at least")],
        "flops": ["flops", 3, Bad(analysis.Flops({}, 0), "leaves")],
        "following": [*MATRIX, Bad(np.ones((3, 3), bool), "must follow 4 units")],
        "gamma": MAY_BE_INFINITE,
        "ghost_fraction": OPTIONAL_SHARE,
        "grads": [Bad({"w": jnp.ones(2)}, "structure")],
        "histories": [*(3, NONE, Bad({"rigl": 3}, "got 3"), Bad({"rigl": {}}, "none"))],
        "image_shape": [3, (3, 3), (2,), Bad((2.0, 2.0), "2.0"), (1, 1, 2, 2)],
        "inner": [
            *("sgd", 3),
            *(
                Bad(x, "optax optimizer")
                for x in (optax.sgd, {"lr": 0.1}, linen.GhostSkip(4))
            ),
        ],
        "inner_state": [Bad({"flat": np.ones(16)}, "flat")],
        "inputs": [Bad("x", "'x'"), Bad({}, "no arrays")],
        "keep": [Bad([1, 2], "(2,)"), -1, 1.5, "10", None],
        "kernel_init": [None, "zeros"],
        "key": [
            *(0, "key"),
            *(
                Bad(x, "key(seed)")
                for x in (
                    *(jnp.zeros(3, jnp.uint32), jnp.uint32(0), jnp.ones(2)),
                    jax.random.split(jax.random.key(0)),
                )
            ),
        ],
        "last": [*STEPS, Bad(0, "0")],
        "leaf": ["leaf", 3],
        "like": Free("test_export loads onto another tree"),
        "logits": [Bad(jnp.ones(()), "()"), Bad(np.ones((2, 3), int), "int"), 3],
        "lrsi": [True, "swish", 3],
        "m": [2, 0, *INTEGER],
        "mask": MATRIX,
        "masks": [
            Bad({"dense": None}, "structure"),
            Bad(with_kernel(np.ones((8, 6), bool)), "shape (8, 6) at 'dense/kernel'"),
            Bad(with_kernel(np.full((6, 8), 0.5)), "other than 0 and 1"),
            Bad(with_kernel(np.full((6, 8), NAN)), "other than 0 and 1"),
            Bad(with_kernel(np.full((6, 8), "1")), "dtype <U1"),
        ],
        "metadata": [3, "text", Bad({"a": {1}}, "JSON"), Bad({"a": NAN}, "JSON")],
        "method": [
            *(Bad(granet_jax.rigl, "granet_jax.granet("), Bad("rigl", "'rigl'")),
            Bad(None, "got None"),
        ],
        "n": [0, 4, *INTEGER],
        "name": Free("checked by flax"),
        "networks": [
            *(3, NONE, Bad({"a": "x"}, NO_REPORT)),
            Bad({"a": REPORT, "b": OTHER_REPORT}, "same leaves"),
        ],
        "neurons": [True, "swish", 3],
        "opt_state": [
            *(
                Bad((), "got 0: is transform part"),
                Bad(None, "got 0: is transform part"),
            ),
            Bad(optax.EmptyState(), "got 0"),
        ],
        "order": [
            *("a/kernel", [1, 2], 3, None, Bad(["a"], "('a',)")),
            Bad(["a", "a"], "('a', 'a')"),
        ],
        "warmup": [-1, *INTEGER],
        "param": [
            *(Bad(ONES, "not exactly 0.0"), Bad(np.ones((2, 2), np.float32), "(2, 2)")),
            *(Bad("kernel", "'kernel'"), Bad(np.ones(4, np.float32), "(4,)")),
            Traced(WEIGHTS["w"]),
        ],
        "params": [
            *(Bad({}, "no leaves"), Bad(None, "no leaves")),
            Bad({"w": "weights"}, "'weights' at 'w'"),
        ],
        "parent": Free("checked by flax"),
        "path": [3, None],
        "pruned": [None, "masks", Bad(EYE, "analysis.prune")],
        "regrow": [*SHARE, Bad(0.5, "grads")],
        "retrain": OPTIONAL_FUNCTION,
        "rising": [Bad([0.5, 0.4], "0.4"), Bad([1.0], "1.0"), 3, "ab"],
        "rounds": COUNT,
        "scores": [
            *(Bad({}, "no array"), Bad({"w": np.full((2, 2), NAN)}, "finite")),
            Bad({"w": "score"}, "'score' at 'w'"),
        ],
        "seed": [
            *(0.5, "0", None, True),
            *(Bad(jnp.ones(()), "float32"), Bad(jnp.zeros(2, int), "[0, 0]")),
        ],
        "shapes": [
            *(Bad([(-1, 2)], "-1"), Bad([(1.5,)], "1.5"), Bad([3], "got 3"), "ab"),
            *(3, Bad([(Traced(2),)], "raced")),
        ],
        "skips": [True, "swish", 3],
        "stacked": [
            *(3, "layers", Bad({"(": 0}, "'('"), Bad({3: 0}, "got 3")),
            Bad(lambda name, leaf: 9, "gives 9"),
            *(Bad({"": axis}, f"gives {axis!r}") for axis in (True, 0.5, "0", -9)),
        ],
        "strides": [*SIZE, (1, 1, 1)],
        "structure": ["block", 3, structures.block],
        "switches": [
            *(10, None, Bad([10, 20], "odd"), Bad([], "one or more")),
            *(Bad([20, 10, 30], "increase"), Bad([10.5], "10.5")),
            Bad([Traced(10)], "raced"),
        ],
        "ticket": [
            Bad("ticket", "got str"),
            Bad(TICKET._replace(masks={"v": FULL["w"]}), "masks at the leaves"),
            Bad(TICKET._replace(trained={"w": np.ones(2)}), "shapes of params"),
        ],
        "title": Free("any text"),
        "tree": [Bad(Record(1.0), "'ghost_w' in a record")],
        "where": [
            *(
                Bad("no such leaf", "selects none"),
                Bad("(", "must be a regular expression"),
            ),
            *(Bad(3, "bools"), Bad({"dense": True}, "bools")),
            Bad(lambda name, leaf: False, "selects none"),
        ],
        "x": [Bad(jnp.ones(2), "(2,)"), 3],
    }
)


# --- Entries ----------------------------------------------------------------------

Entries = Iterator[tuple[Callable[..., Any], Entry]]


def entry(
    function: Callable[..., Any],
    good: dict[str, Any] | None = None,
    call: Callable[..., Any] | None = None,
    **bad: list[Any] | Free,
) -> tuple[Callable[..., Any], Entry]:
    """A function's entry; `call` runs the function where plain keywords cannot."""
    signature = inspect.signature(function).parameters
    needed = [n for n, p in signature.items() if p.default is p.empty and n in GOOD]
    return function, Entry(
        call or function,
        {name: GOOD[name] for name in needed} | (good or {}),
        {name: BAD[name] for name in signature if name in BAD} | bad,
    )


def special_entries() -> Entries:
    yield from special_methods()
    yield from special_parts()
    yield from special_sources()
    yield from special_pretrained()
    yield from special_ghosts()
    yield from special_analyses()
    yield from special_plots()


def special_methods() -> Entries:
    yield entry(granet_jax.snfs, decay=SPARSITY)
    yield entry(
        granet_jax.srigl,
        {"keep_units": "output"},
        keep_units=[3, None, "("],
        min_salient=SHARE,
    )
    yield entry(granet_jax.cyclical, cycles=[*STEPS, Bad(7, "multiple")])
    yield entry(granet_jax.sculpt, {"sparsity": 0.9, "cycles": 3})
    when = [3, None, "never", Bad([10, 20], "schedules.listed")]
    yield entry(
        granet_jax.Method,
        {"sparsity": GOOD["schedule"]},
        name=[3, None, b"mine"],
        sparsity=[*FUNCTION, Bad(lambda step: 1.0, "sparsity(0)")],
        phases=[3, Bad([], "[]"), Bad((3,), "3")],
        rank=FUNCTION,
        weights=CHOICE,
        refresh=STEPS,
        penalty=OPTIONAL_FUNCTION,
        needs_gradient=FLAG,
        **dict.fromkeys(("updates", "resets", "marks"), when),
        **dict.fromkeys(("average_decay", "marked_sparsity"), OPTIONAL_DECAY),
    )
    yield entry(
        granet_jax.transform,
        call=lambda **given: granet_jax.transform(**given).init(parameters()),
    )
    yield entry(
        granet_jax.sparse_view, params=[Bad({"w": jnp.ones((2, 2))}, "structure")]
    )
    yield entry(granet_jax.apply_masks, params=[OTHER_TREE])
    for by_layer in (analysis.by_layer, masking.by_layer):
        yield entry(by_layer, tree=[Bad({"w": "mask"}, "'mask' at 'w'")])
    integers = Free("a constant of the caller")
    yield entry(masking.check_masks, params=[OTHER_TREE], integers=integers)
    yield entry(
        granet_jax.accelerate,
        params=[OTHER_TREE, Bad(parameters(), "the dense product is faster")],
        masks=[*BAD["masks"], Traced(masks())],
    )
    yield entry(granet_jax.sparsity, masks=[*MASKS_ALONE, TRACED_SMALL])
    yield entry(granet_jax.pack_masks, masks=MASKS_ALONE)
    packed = {"packed": granet_jax.pack_masks(masks())}
    yield entry(granet_jax.unpack_masks, packed, packed=[NOT_A_MASK])
    yield entry(masking.active_counts, masks=[NOT_A_MASK])


def special_parts() -> Entries:
    yield entry(
        structures.block,
        {"shape": (2, 2)},
        lambda shape, **given: structures.block(*shape, **given),
        shape=[
            *(Bad((), "positive"), Bad((0,), "positive"), Bad((1.5,), "1.5")),
            Bad((Traced(2),), "raced"),
        ],
    )
    yield entry(
        schedules.listed,
        {"steps": [1, 2]},
        steps=[
            *(3, None, Bad([], "none"), Bad([0], "got 0"), Bad([2, 1], "(2, 1)")),
            *(Bad([1.5], "1.5"), Bad([Traced(2)], "raced")),
        ],
    )
    yield entry(schedules.every, last=FROM_ZERO)
    yield entry(schedules.cubic, interval=[*STEPS, Bad(11, "between begin and end")])
    yield entry(schedules.cosine, initial=NUMBER, final=NUMBER, steps=POSITIVE)
    yield entry(
        distributions.total_count,
        {"size": 10},
        size=[-1, 1.5, "10", None, Traced(10)],
        sparsity=SHARE,
    )
    yield entry(distributions.densities, sparsity=SHARE)
    yield entry(distributions.counts, sparsity=SHARE)


def special_sources() -> Entries:
    twice = [*BAD["batches"], Bad(iter(BATCHES), "one-shot")]
    yield entry(mask_sources.grasp_scores, batches=twice)
    yield entry(mask_sources.force, batches=twice)
    yield entry(mask_sources.grasp, batches=twice)
    yield entry(mask_sources.synflow_scores, {"params": WEIGHTS})
    yield entry(mask_sources.synflow, {"params": WEIGHTS})
    path = {"params": WEIGHTS, "masks": FULL}
    wrong = [Bad({"w": SMALL}, "shape (2, 2) at 'w'"), Bad(OTHER, "structure")]
    wrong.append(Traced(FULL))
    yield entry(mask_sources.connected, path, params=[OTHER_WEIGHTS], masks=wrong)
    yield entry(
        mask_sources.collapse,
        {**path, "apply_fn": apply, "inputs": GOOD["inputs"]},
        apply_fn=OPTIONAL_FUNCTION,
        params=[OTHER_WEIGHTS],
        masks=[*wrong, NOT_A_MASK],
    )
    yield entry(mask_sources.shuffle, {"masks": FULL}, masks=[NOT_A_MASK])
    fractions = [0.0, 1.0, NAN, "0.2", None, Traced(0.2)]
    yield entry(
        mask_sources.lottery_tickets,
        {"params": WEIGHTS},
        rounds=[-1, *COUNT[2:]],
        fraction=[*fractions, Bad([0.2], "one for each of the 2 rounds")],
    )
    network = {"params": WEIGHTS, "masks": EYE}
    yield entry(
        export.save,
        network,
        params=[
            *(Bad({"w": ONES}, "not exactly 0.0"), Bad({"w": "kernel"}, "'w'")),
            Traced(WEIGHTS),
        ],
        masks=[Bad({"w": SMALL}, "shape (2, 2)"), Bad(OTHER, "structure"), Traced(EYE)],
    )
    yield entry(export.mask_entropy, {"masks": EYE}, masks=[*MASKS_ALONE, TRACED_SMALL])
    mask = [
        *(Bad(SMALL, "(2, 2)"), Bad(EYE["w"] + 0.5, "0 and 1"), Bad("mask", "mask")),
        Traced(EYE["w"]),
    ]
    half = Bad(WEIGHTS["w"].astype(np.float16), "float16")
    yield entry(export.to_bcoo, mask=mask)
    yield entry(export.to_bcsr, mask=mask)
    yield entry(export.to_csr, mask=mask, param=[*BAD["param"], half])


def special_pretrained() -> Entries:
    found = mask_sources.input_statistics(
        apply, WEIGHTS, [jnp.ones((2, 4))], products=True
    )
    given = {"params": WEIGHTS, "statistics": found}
    wrong: dict[str, Any] = {
        "params": [Bad({"v": ONES}, "'v'"), Bad({"w": ONES[0]}, "'w'")],
        "statistics": [3, None, "statistics"],
        "sparsity": [*SPARSITY, Bad({}, "'w'"), Bad({"w": 2.0}, "2.0")],
    }
    yield entry(mask_sources.wanda, given, **wrong)
    yield entry(mask_sources.ria, given, **wrong, power=NOT_NEGATIVE)
    yield entry(
        mask_sources.owl,
        {**given, "block": lambda name: name},
        **{**wrong, "sparsity": SPARSITY},
        block=FUNCTION,
        outlier=POSITIVE,
        limit=SHARE,
    )
    alone = mask_sources.input_statistics(apply, WEIGHTS, [jnp.ones((2, 4))])
    yield entry(
        mask_sources.sparsegpt,
        given,
        **{**wrong, "statistics": [3, None, Bad(alone, "products=True")]},
        block_size=COUNT,
        damping=POSITIVE,
    )
    yield entry(
        mask_sources.dsnot,
        {**given, "masks": EYE},
        params=wrong["params"],
        statistics=wrong["statistics"],
        masks=[Bad({"w": SMALL}, "(2, 2)"), Bad(OTHER, "structure")],
        swaps=[-1, 1.5, "2", None, Traced(2)],
        tolerance=NOT_NEGATIVE,
    )
    yield entry(
        mask_sources.input_statistics,
        {"params": WEIGHTS, "batches": [jnp.ones((2, 4))]},
        products=FLAG,
    )
    block = {"blocks": [apply], "params": [WEIGHTS], "batches": [jnp.ones((2, 4))]}
    yield entry(
        mask_sources.block_by_block,
        {**block, "prune": lambda i, block, params, batches: (params, FULL)},
        blocks=[3, None, [3]],
        params=[Bad([], "got 0"), Bad([1, 2], "got 2")],
        prune=FUNCTION,
    )
    yield entry(structures.at_least, {"number": 2}, number=COUNT)
    yield entry(
        granet_jax.hyperbolic,
        {"inner": optax.sgd(0.1), "learning_rate": 0.1},
        learning_rate=[-1.0, NAN, INF, "1", None],
        alpha=NOT_NEGATIVE,
        beta=NOT_NEGATIVE,
    )


def special_ghosts() -> Entries:
    yield entry(tost.Labels, alpha=SHARE, fraction=OPTIONAL_SHARE)
    yield entry(tost.ToST, labels=[True, "swish", 3])
    yield entry(tost.early, alpha=SHARE)
    yield entry(tost.soft_relu, x=[Bad(jnp.ones(2, jnp.int32), "int32"), 3, None])
    yield entry(tost.ghost_skip, strides=[*BAD["strides"], Bad((0, 1), "0")])
    yield entry(tost.is_ghost, name=[3, None])
    yield entry(tost.without_ghosts, name=[3, None])
    classes = Bad(LABELS + 3, "3 to 3")
    yield entry(tost.smooth_targets, labels=[FLOAT_LABELS, classes, Bad("ab", "<U2")])
    lengths = Bad(jnp.zeros(3, int), "(3,)")
    yield entry(tost.smoothed_cross_entropy, labels=[FLOAT_LABELS, lengths])
    yield entry(
        tost.rescale_init,
        {"config": tost.LRsI(iterations=1)},
        batches=[Bad([], "batch"), Bad(3, "iterable, got 3")],
        config=["LRsI", 3],
    )
    key = jax.random.key(0)
    yield entry(
        linen.GhostSkip,
        {"kind": "conv"},
        lambda **given: linen.GhostSkip(**given).init(key, PIXELS, True),
    )
    yield entry(
        linen.make_skip,
        {"config": tost.Skips(kind="conv")},
        lambda **given: linen.make_skip(**given).init(key, PIXELS, True),
        config=[None, "conv", tost.ToST()],
    )


def special_analyses() -> Entries:
    part = [-1, 11, 1.5, "5", None]
    yield entry(
        analysis.chance_iou,
        {"size": 10, "first": 5, "second": 5},
        size=[-1, 1.5, "10", None, Traced(10)],
        first=part,
        second=part,
    )
    no_mask = NOT_A_MASK.value
    yield entry(
        analysis.exploration,
        {"history": [EYE, FULL]},
        history=[
            *(3, Bad([], "none"), Bad([EYE, OTHER], "same leaves")),
            Bad([no_mask], "'mask' at 'w'"),
        ],
    )
    yield entry(
        analysis.exploration_over_time,
        {"history": {0: EYE}},
        history=[
            *(3, [EYE], NONE, Bad({0: EYE, 1: OTHER}, "same leaves")),
            Bad({0: no_mask}, "'mask' at 'w'"),
        ],
    )
    yield entry(analysis.gradient_flow, grads=[Bad({"w": "g"}, "structure")])
    network = {"params": WEIGHTS, "masks": EYE}
    small = Bad({"w": SMALL}, "(2, 2)")
    wrong = {
        "params": [Bad({}, "leaves"), Bad({"w": "weights"}, "'w'")],
        "masks": [small, NOT_A_MASK, NOT_BINARY[0], Bad(OTHER, "v"), Traced(EYE)],
    }
    yield entry(
        analysis.flops,
        {**network, "inputs": [jnp.ones((1, 4))]},
        lambda apply_fn, params, masks, inputs: analysis.flops(
            apply_fn, params, masks, *inputs
        ),
        **wrong,
        inputs=[Bad(["x"], "'x'"), Bad([None, object()], "object")],
    )
    yield entry(analysis.summary, network, **wrong)
    yield entry(
        analysis.training_flops,
        distribution=["gauss", 3],
        history=[3, Bad({}, "step 0"), Bad({0: "x"}, NO_REPORT)],
    )
    yield entry(analysis.keep_counts, {"masks": EYE}, masks=[NO_MASK, NOT_A_MASK])
    yield entry(analysis.prune, params=[OTHER_TREE])
    yield entry(
        analysis.batch_statistics,
        {
            "forward": lambda stats, x: 0.5 * stats + 0.5 * x,
            "batch_stats": np.zeros(2),
            "batches": [np.ones(2)],
        },
        forward=[*FUNCTION, Bad(lambda stats, x: stats, "training mode")],
        batch_stats=Free("any pytree of arrays"),
        batches=[Bad([], "one or more")],
    )
    yield entry(analysis.apply_pruned, {"params": WEIGHTS}, params=[OTHER_WEIGHTS])


def special_plots() -> Entries:
    yield entry(
        plots.densities_over_time,
        {"history": {0: REPORT}},
        history=[
            *(3, NONE, Bad({0: "x"}, NO_REPORT)),
            Bad({0: REPORT, 1: OTHER_REPORT}, "same leaves"),
        ],
    )
    yield entry(plots.mask, mask=IMAGE)
    yield entry(plots.inputs, mask=IMAGE)
    yield entry(
        plots.churn,
        {"history": {0: EYE, 1: EYE}},
        history=[3, Bad({0: EYE}, "got 1"), Bad({0: EYE, 1: {}}, "no mask")],
    )
    yield entry(
        plots.accuracies,
        {"methods": {"rigl": {0.9: [0.5]}}},
        methods=[
            *(3, Bad({}, "accuracies"), Bad({"rigl": {0.9: []}}, "accuracies")),
            *(Bad({"rigl": {0.9: [x, 0.5]}}, str(x)) for x in (NAN, 90.0)),
            Bad({"rigl": {90.0: [0.5]}}, "90.0"),
        ],
    )
    names = ["rigl", "mine"]
    yield entry(plots.looks, {"labels": names}, labels=[3, None, Bad([3], "got 3")])
    yield entry(
        plots.sparsities,
        {"methods": {"rigl": granet_jax.rigl(0.9, 1000)}, "total_steps": 1000},
        methods=[3, NONE, Bad({"rigl": "rigl"}, "'rigl'")],
    )


@functools.cache
def every() -> dict[str, Entry]:
    """All entries, by the name under which users import the function."""
    special = {id(function): found for function, found in special_entries()}
    known = {id(value) for value in public().values()}
    assert special.keys() <= known
    return {
        name: special.get(id(value)) or entry(value)[1]
        for name, value in public().items()
        if name not in RESULTS | INTERNAL
    }


@functools.cache
def public() -> dict[str, Callable[..., Any]]:
    """Every public function and class, once, under the first of its names."""
    found: dict[int, tuple[str, Callable[..., Any]]] = {}
    for module in MODULES:
        package = module.__file__ is not None and module.__file__.endswith("init__.py")
        for name, value in sorted(vars(module).items()):
            own = getattr(value, "__module__", "") or ""
            # A package offers the names it imports, a module those it defines.
            here = own.startswith("granet_jax") if package else own == module.__name__
            kind = inspect.isfunction(value) or inspect.isclass(value)
            if kind and here and not name.startswith("_"):
                found.setdefault(id(value), (f"{module.__name__}.{name}", value))
    return dict(found.values())
