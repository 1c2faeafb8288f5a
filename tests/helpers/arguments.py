"""Every public function, each of its arguments, and values that it refuses.

`test_arguments` goes through it, and through the signatures: an argument that is not
here is an error there.
"""

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

# Modules whose public names are promised, and functions of the others that are.
MODULES: tuple[ModuleType, ...] = (
    *(granet_jax, analysis, plots, distributions, export, mask_sources, masking),
    *(penalties, schedules, scores, structures, tost, linen),
)

# What functions return, or hand to a user's own: made by the library, read by users.
RESULTS = {
    *("granet_jax.ScoreInputs", "granet_jax.SparseState", "granet_jax.Sparsity"),
    *("granet_jax.PackedMask", "granet_jax.structures.Structure"),
    *("granet_jax.schedules.ListedSteps", "granet_jax.schedules.UpdateSteps"),
    *("granet_jax.analysis.Churn", "granet_jax.analysis.Connectivity"),
    *("granet_jax.analysis.Flops", "granet_jax.analysis.LeafFlops"),
    *("granet_jax.analysis.Overlap", "granet_jax.analysis.PerLeaf"),
    *("granet_jax.analysis.Pruned", "granet_jax.analysis.Recovery"),
    "granet_jax.analysis.Summary",
    *("granet_jax.mask_sources.Collapse", "granet_jax.mask_sources.Ticket"),
    *("granet_jax.penalties.PenaltyInputs", "granet_jax.tost.Rescaled"),
}
# Steps on the inside of others, given what those have checked: functions of modules
# that docs/api/internals.md speaks of, and tools of structures and plots.
INTERNAL = {
    *(
        f"granet_jax.masking.{name}"
        for name in (
            *("default_where", "flags", "is_explicit", "is_masked_node", "is_packed"),
            *("leaf_name", "map_masked", "maskable_leaves", "placed_like"),
            *("check_arrays", "check_concrete", "given_masks"),
        )
    ),
    *(
        f"granet_jax.structures.{name}"
        for name in (
            *("box_counts", "check_leaves", "check_masks", "check_use", "counts"),
            *("fill", "merge", "merge_mask", "parts", "select", "spread"),
        )
    ),
    *("granet_jax.schedules.ceil_of", "granet_jax.schedules.fixed_point"),
    "granet_jax.distributions.check_distribution",
    # What they are given is made by the library; test_errors has what may be missing.
    *(
        f"granet_jax.scores.{name}"
        for name in ("gradient", "magnitude", "momentum", "random")
    ),
    "granet_jax.schedules.increasing",
    *(
        f"granet_jax.analysis.plots.{name}"
        for name in ("draw_accuracies", "draw_bars", "draw_dense")
    ),
}


class Bad(NamedTuple):
    """A value that is refused, and what the message says beside the argument's name."""

    value: Any
    says: str


class Free(NamedTuple):
    """An argument without a value that is refused."""

    why: str


class Traced(NamedTuple):
    """In place of a value, or a part of it: a tracer of this one."""

    value: Any


class Entry(NamedTuple):
    """A function, arguments it takes, and values of each that it does not.

    Attributes:
      call: with arguments by name.
      good: all arguments that it needs.
      bad: by argument.
      of: the function itself, where `call` is more than that.
    """

    call: Callable[..., Any]
    good: dict[str, Any]
    bad: dict[str, list[Any] | Free]
    of: Callable[..., Any] | None = None


NAN = math.nan
SPARSITY = [-0.1, 1.0, 90, NAN, "0.5", None, True, Traced(0.5)]
SHARE = [-0.1, 1.5, NAN, "0.5", None, Traced(0.5)]
STEPS = [0, -1, 2**31, 10.0, "10", True, Traced(10)]
FROM_ZERO = [-1, 2**31, 10.0, None, Traced(10)]
POSITIVE = [0.0, -1.0, NAN, math.inf, "1", None, Traced(1.0)]
NOT_NEGATIVE = [-1.0, NAN, math.inf, "1", None, Traced(1.0)]
NUMBER = [NAN, math.inf, "1", None, Traced(1.0)]
FLAG = ["no", 1, None, Traced(True)]
NAME = ["other", "", 3, None]
CRITERION = ["other", "", 3]
FUNCTION = [None, "f", 3]
STRUCTURE = ["block", 3, structures.block]
DISTRIBUTION = ["gauss", 3, None]
KEY = [0, "key", Bad(jnp.zeros(3, jnp.uint32), "key(seed)")]
WHERE = [
    Bad("kernel", "bools"),
    Bad({"dense": True}, "bools"),
    Bad(lambda name, leaf: False, "selects none"),
]
NO_LEAVES = [Bad({}, "no leaves"), Bad(None, "no leaves")]
NO_ARRAYS = Bad({"w": "weights"}, "'weights' at 'w'")
PARAMS = [*NO_LEAVES, NO_ARRAYS]


def masks() -> Any:
    return granet_jax.init_masks(granet_jax.static(0.5), parameters())


def with_kernel(kernel: Any) -> Any:
    return {
        "dense": {"kernel": kernel, "bias": None},
        "conv": {"kernel": np.ones((3, 3, 2, 4), bool)},
    }


def bad_masks() -> list[Any]:
    return [
        Bad({"dense": None}, "structure"),
        Bad(with_kernel(np.ones((8, 6), bool)), "shape (8, 6) at 'dense/kernel'"),
        Bad(with_kernel(np.full((6, 8), 0.5)), "other than 0 and 1"),
        Bad(with_kernel(np.full((6, 8), NAN)), "other than 0 and 1"),
        Bad(with_kernel(np.full((6, 8), "1")), "dtype <U1"),
    ]


# Of functions that take masks alone, and so have no shapes to compare with.
ALONE = [
    Bad({"w": "mask"}, "'mask' at 'w'"),
    Bad({"w": np.full((2, 2), 0.5)}, "other than 0 and 1 at 'w'"),
    Bad({"w": np.full((2, 2), NAN)}, "other than 0 and 1 at 'w'"),
    Bad({}, "no mask"),
]
TRACED_MASKS = Traced({"w": np.ones((2, 2), bool)})
STATES = [
    Bad((), "got 0: is transform part"),
    Bad(None, "got 0: is transform part"),
    Bad(optax.EmptyState(), "got 0"),
]
METHOD = [
    Bad(granet_jax.rigl, "granet_jax.granet("),
    Bad("rigl", "'rigl'"),
    Bad(None, "got None"),
]
PATH = [3, None]


def state() -> Any:
    tx = granet_jax.transform(granet_jax.static(0.5), optax.sgd(0.1))
    return tx.init(parameters())


def loss(params: Any, batch: Any) -> Any:
    return sum(jnp.sum(x) for x in jax.tree.leaves(params)) ** 2 * jnp.mean(batch)


def apply(params: Any, x: Any) -> Any:
    return jax.nn.relu(x @ params["w"])


BATCHES = [np.ones(2, np.float32)]
BAD_BATCHES = [
    Bad([], "at least one batch"),
    Bad(np.ones(2), "put it into a list"),
    Bad(3, "iterable, got 3"),
]
WEIGHTS = {"w": np.eye(4, dtype=np.float32)}
FULL = {"w": np.ones((4, 4), bool)}


def source(**more: Any) -> dict[str, Any]:
    """Values that mask sources from a loss refuse."""
    return {
        "loss_fn": FUNCTION,
        "params": PARAMS,
        "batches": BAD_BATCHES,
        "where": WHERE,
        "axis_name": [3],
        **more,
    }


PARTS: dict[str, Any] = {
    "sparsity": SPARSITY,
    "distribution": DISTRIBUTION,
    "structure": STRUCTURE,
}
RANKED: dict[str, Any] = {**PARTS, "scope": NAME}
STEPPED: dict[str, Any] = {"total_steps": STEPS, "interval": STEPS}
GRADUAL: dict[str, Any] = {
    "initial_sparsity": SPARSITY,
    "begin_step": FROM_ZERO,
    "end_step": STEPS,
    "interval": STEPS,
}
GROWING: dict[str, Any] = {
    "interval": STEPS,
    "growth": POSITIVE,
    "ceiling": POSITIVE,
    "settle_steps": FROM_ZERO,
}


def methods() -> Iterator[Entry]:
    steps = {"sparsity": 0.9, "total_steps": 120, "interval": 10}
    yield Entry(
        granet_jax.granet,
        steps,
        {
            **RANKED,
            **GRADUAL,
            "total_steps": STEPS,
            "fraction": SHARE,
            "final_fraction": SHARE,
            "grow": NAME,
        },
    )
    gmp = {"sparsity": 0.9, "end_step": 120, "interval": 10}
    yield Entry(granet_jax.gmp, gmp, {**RANKED, **GRADUAL})
    yield Entry(
        granet_jax.rigl,
        steps,
        {
            **PARTS,
            **STEPPED,
            "fraction": SHARE,
            "stop": [0.0, 1.5, NAN, "1", None, Traced(0.5)],
        },
    )
    yield Entry(granet_jax.set_, steps, {**PARTS, **STEPPED, "fraction": SHARE})
    yield Entry(
        granet_jax.snfs,
        steps,
        {**PARTS, **STEPPED, "fraction": SHARE, "decay": SPARSITY},
    )
    yield Entry(granet_jax.static, {"sparsity": 0.9}, PARTS)
    yield Entry(
        granet_jax.cyclical,
        steps,
        {
            **RANKED,
            **STEPPED,
            "cycles": [*STEPS, Bad(7, "multiple")],
            "initial_sparsity": [*SPARSITY, Bad(0.95, "at most sparsity")],
            "ramp": [0.0, 1.5, NAN, "1", None, Traced(0.5)],
            "recovery": NAME,
        },
    )
    yield Entry(
        granet_jax.acdc,
        {"sparsity": 0.9, "switches": [10, 20, 30]},
        {
            **RANKED,
            "switches": [
                Bad([10, 20], "odd"),
                Bad([], "one or more"),
                Bad([20, 10, 30], "increase"),
                Bad([10.5], "10.5"),
                Bad([Traced(10)], "raced"),
                *(10, None),
            ],
        },
    )
    yield Entry(
        granet_jax.sculpt,
        {"sparsity": 0.9, "total_steps": 120, "cycles": 3},
        {
            **RANKED,
            "total_steps": STEPS,
            "cycles": STEPS,
            "initial_sparsity": [*SPARSITY, Bad(0.95, "at most sparsity")],
        },
    )
    yield Entry(
        granet_jax.straight_through, gmp, {**RANKED, **GRADUAL, "penalty": NOT_NEGATIVE}
    )
    yield Entry(
        granet_jax.top_kast,
        {"sparsity": 0.9, "backward_sparsity": 0.5},
        {
            **RANKED,
            "backward_sparsity": [*SPARSITY, Bad(0.95, "at most sparsity")],
            "interval": STEPS,
            "penalty": NOT_NEGATIVE,
        },
    )
    yield Entry(granet_jax.greg1, {"sparsity": 0.9}, {**RANKED, **GROWING})
    yield Entry(
        granet_jax.greg2,
        {"sparsity": 0.9},
        {
            **RANKED,
            **GROWING,
            "pick_growth": POSITIVE,
            "pick_ceiling": POSITIVE,
            "weight_decay": NOT_NEGATIVE,
        },
    )
    parts = [*FUNCTION]
    optional = ["f", 3]
    when = [3, None, "never", Bad([10, 20], "schedules.listed")]
    yield Entry(
        granet_jax.Method,
        {"name": "mine", "sparsity": schedules.constant(0.5)},
        {
            "name": [3, None, b"mine"],
            "sparsity": [*parts, Bad(lambda step: 1.0, "sparsity(0)")],
            "updates": when,
            "distribution": DISTRIBUTION,
            "scope": NAME,
            "prune": parts,
            "drop": parts,
            "grow": optional,
            "fraction": [*parts, Bad(lambda step: 2.0, "fraction(0)")],
            "redistribute": FLAG,
            "accumulator_decay": [-0.1, 1.0, NAN, "0.5", Traced(0.5)],
            "needs_gradient": FLAG,
            "revive": optional,
            "resets": when,
            "weights": NAME,
            "refresh": STEPS,
            "marked_sparsity": [-0.1, 1.0, NAN, "0.5", Traced(0.5)],
            "marks": when,
            "penalty": optional,
            "structure": STRUCTURE,
        },
    )


def training() -> Iterator[Entry]:
    yield Entry(
        lambda **given: granet_jax.transform(**given).init(parameters()),
        {"method": granet_jax.static(0.5)},
        {
            "method": METHOD,
            "inner": ["sgd", 3, Bad(optax.sgd, "optax optimizer")],
            "where": WHERE,
            "masks": bad_masks(),
            "seed": [0.5, "0", None, True],
            "packed": FLAG,
        },
        of=granet_jax.transform,
    )
    yield Entry(
        granet_jax.init_masks,
        {"method": granet_jax.static(0.5), "params": parameters()},
        {
            "method": METHOD,
            "params": PARAMS,
            "where": WHERE,
            "seed": [0.5, "0", None, True],
        },
    )
    yield Entry(granet_jax.get_state, {}, {"opt_state": STATES})
    yield Entry(granet_jax.get_masks, {}, {"opt_state": STATES})
    yield Entry(
        granet_jax.set_masks,
        {"opt_state": state(), "masks": masks()},
        {"opt_state": STATES, "masks": bad_masks()},
    )
    other = Bad({"w": jnp.ones((2, 2))}, "structure")
    yield Entry(
        granet_jax.sparse_view,
        {"params": parameters(), "opt_state": state()},
        {"params": [other], "opt_state": STATES},
    )
    given = {"params": parameters(), "masks": masks()}
    small = Bad({"w": "weights"}, "structure")
    yield Entry(
        granet_jax.apply_masks, given, {"params": [small], "masks": bad_masks()}
    )
    yield Entry(
        granet_jax.accelerate,
        given,
        {
            "params": [small, Bad(parameters(), "the dense product is faster")],
            "masks": [*bad_masks(), Traced(masks())],
        },
    )
    yield Entry(granet_jax.sparsity, {}, {"masks": [*ALONE[:3], TRACED_MASKS]})
    yield Entry(granet_jax.pack_masks, {}, {"masks": ALONE[:3]})
    yield Entry(
        granet_jax.unpack_masks,
        {},
        {"packed": [Bad({"w": "mask"}, "'mask' at 'w'")]},
    )
    yield Entry(
        masking.maskable,
        {"params": parameters()},
        {"params": PARAMS, "where": WHERE},
    )
    yield Entry(
        masking.check_masks,
        given,
        {
            "params": [small],
            "masks": bad_masks(),
            "argument": Free("the name of another, for messages"),
        },
    )
    yield Entry(masking.active_counts, {}, {"masks": ALONE[:1]})


def parts() -> Iterator[Entry]:
    """Parts of a method of one's own."""
    yield Entry(
        lambda shape, **given: structures.block(*shape, **given),
        {"shape": (2, 2)},
        {
            "shape": [
                Bad((), "positive"),
                Bad((0,), "positive"),
                Bad((1.5,), "1.5"),
                Bad((Traced(2),), "raced"),
            ],
            "norm": NAME,
        },
        of=structures.block,
    )
    yield Entry(structures.channel, {}, {"norm": NAME})
    yield Entry(structures.constant_fan_in, {}, {})
    integers = [1.5, "2", None, True, Traced(2)]
    yield Entry(
        structures.n_of_m,
        {"n": 2, "m": 4},
        {"n": [0, 4, *integers], "m": [2, 0, *integers], "axis": integers},
    )
    wrong = [
        Bad([], "none"),
        Bad([0], "got 0"),
        Bad([2, 1], "(2, 1)"),
        Bad([1.5], "1.5"),
        Bad([Traced(2)], "raced"),
    ]
    yield Entry(schedules.listed, {}, {"steps": [*wrong, 3, None]})
    yield Entry(
        schedules.every,
        {"interval": 2, "last": 10},
        {"interval": STEPS, "begin": FROM_ZERO, "last": FROM_ZERO},
    )
    yield Entry(schedules.constant, {}, {"value": NUMBER})
    yield Entry(
        schedules.cubic,
        {"initial": 0.0, "final": 0.9, "begin": 0, "end": 10, "interval": 2},
        {
            "initial": SPARSITY,
            "final": SPARSITY,
            "begin": FROM_ZERO,
            "end": STEPS,
            "interval": [*STEPS, Bad(11, "between begin and end")],
        },
    )
    yield Entry(
        schedules.cosine,
        {"initial": 0.5, "final": 0.0, "steps": 10},
        {"initial": NUMBER, "final": NUMBER, "steps": POSITIVE},
    )
    yield Entry(
        schedules.repeated,
        {"schedule": schedules.constant(0.5), "period": 10, "cycles": 2},
        {"schedule": FUNCTION, "period": STEPS, "cycles": STEPS},
    )
    yield Entry(
        schedules.restarted,
        {"schedule": schedules.constant(0.5), "period": 10},
        {"schedule": FUNCTION, "period": STEPS},
    )
    yield Entry(
        scores.lookahead,
        {},
        {
            "order": [
                *("a/kernel", [1, 2], 3, None),
                Bad(["a"], "('a',)"),
                Bad(["a", "a"], "('a', 'a')"),
            ]
        },
    )
    yield Entry(penalties.outside, {}, {"size": NOT_NEGATIVE})
    yield Entry(
        penalties.exploration,
        {"size": 1e-4, "density": 0.1},
        {"size": NOT_NEGATIVE, "density": [*POSITIVE, 1.5]},
    )
    yield Entry(
        penalties.growing,
        {"interval": 10, "step": 1e-4, "first": 0, "last": 100},
        {
            "interval": STEPS,
            "step": POSITIVE,
            "first": FROM_ZERO,
            "last": [*STEPS, Bad(0, "0")],
            "start": NOT_NEGATIVE,
            "kept": NUMBER,
        },
    )
    yield Entry(
        penalties.picking,
        {"interval": 10, "step": 1e-4, "last": 100},
        {"interval": STEPS, "step": POSITIVE, "last": STEPS},
    )
    shapes = [
        Bad([(-1, 2)], "-1"),
        Bad([(1.5,)], "1.5"),
        Bad([3], "got 3"),
        Bad([(Traced(2),)], "raced"),
        "ab",
    ]
    limits = [Bad([1], "one for each of the 2 leaves"), Bad([-1, 2], "-1")]
    leaves = [(6, 8), (3, 4)]
    yield Entry(
        distributions.total_count,
        {"size": 10, "sparsity": 0.5},
        {"size": [-1, 1.5, "10", None, Traced(10)], "sparsity": SHARE},
    )
    yield Entry(
        distributions.densities,
        {"shapes": leaves, "sparsity": 0.5},
        {"shapes": shapes, "sparsity": SHARE, "distribution": DISTRIBUTION},
    )
    yield Entry(
        distributions.counts,
        {"shapes": leaves, "sparsity": 0.5},
        {
            "shapes": shapes,
            "sparsity": SHARE,
            "distribution": DISTRIBUTION,
            "caps": [*limits, Bad([1, 1], "hold 2 at most")],
            "floors": [*limits, Bad([48, 12], "keep 60 at least")],
        },
    )


def sources() -> Iterator[Entry]:
    given = {"loss_fn": loss, "params": parameters(), "batches": BATCHES}
    scored = source()
    masked = source(sparsity=SPARSITY, scope=NAME, on_collapse=NAME)
    rounds = [0, -1, 1.5, "2", None, Traced(2)]
    one_shot = Bad(iter(BATCHES), "one-shot")
    yield Entry(mask_sources.snip_scores, given, scored)
    twice = {**scored, "batches": [*BAD_BATCHES, one_shot]}
    yield Entry(mask_sources.grasp_scores, given, twice)
    with_sparsity = {**given, "sparsity": 0.5}
    yield Entry(mask_sources.snip, with_sparsity, {**masked, "rounds": rounds})
    again = {"rounds": rounds, "batches": twice["batches"]}
    yield Entry(mask_sources.force, {**with_sparsity, "rounds": 2}, {**masked, **again})
    yield Entry(
        mask_sources.grasp, with_sparsity, {**masked, "batches": twice["batches"]}
    )
    yield Entry(
        mask_sources.cross_entropy,
        {"apply_fn": apply},
        {"apply_fn": FUNCTION, "temperature": POSITIVE},
    )
    example = jax.ShapeDtypeStruct((1, 4), jnp.float32)
    flow = {"apply_fn": apply, "params": WEIGHTS, "inputs": example}
    bad_inputs = [Bad("x", "'x'"), Bad({}, "no arrays")]
    flowing = {"apply_fn": FUNCTION, "params": PARAMS, "inputs": bad_inputs}
    yield Entry(mask_sources.synflow_scores, flow, {**flowing, "where": WHERE})
    yield Entry(
        mask_sources.synflow,
        {**flow, "sparsity": 0.5, "rounds": 2},
        {
            **flowing,
            "sparsity": SPARSITY,
            "rounds": rounds,
            "scope": NAME,
            "where": WHERE,
            "on_collapse": NAME,
        },
    )
    path = {**flow, "masks": FULL}
    wrong = [
        Bad({"w": np.ones((2, 2), bool)}, "shape (2, 2) at 'w'"),
        Bad({"v": np.ones((4, 4), bool)}, "structure"),
    ]
    yield Entry(
        mask_sources.connected,
        path,
        {**flowing, "params": [small_weights()], "masks": [*wrong, Traced(FULL)]},
    )
    yield Entry(
        mask_sources.collapse,
        path,
        {
            "masks": [*wrong, Traced(FULL), Bad({"w": "mask"}, "'mask' at 'w'")],
            "apply_fn": ["f", 3],
            "params": [small_weights()],
            "inputs": bad_inputs,
        },
    )
    weights = {"params": parameters(), "sparsity": 0.5}
    by_weights = {
        "params": PARAMS,
        "sparsity": SPARSITY,
        "structure": STRUCTURE,
        "where": WHERE,
        "on_collapse": NAME,
    }
    yield Entry(
        mask_sources.from_score,
        {**weights, "score": scores.magnitude},
        {**by_weights, "score": FUNCTION, "scope": NAME, "key": KEY},
    )
    yield Entry(mask_sources.magnitude, weights, {**by_weights, "scope": NAME})
    yield Entry(
        mask_sources.random,
        {**weights, "key": jax.random.key(0)},
        {**by_weights, "key": KEY, "distribution": DISTRIBUTION},
    )
    yield Entry(
        mask_sources.select,
        {"scores": parameters(), "sparsity": 0.5},
        {
            "scores": [
                Bad({}, "no array"),
                Bad({"w": np.full((2, 2), NAN)}, "finite"),
                Bad({"w": "score"}, "'score' at 'w'"),
            ],
            "sparsity": SPARSITY,
            "scope": NAME,
            "structure": STRUCTURE,
        },
    )
    yield Entry(
        mask_sources.shuffle,
        {"masks": FULL, "key": jax.random.key(0)},
        {"masks": ALONE[:1], "key": KEY},
    )
    ticket = mask_sources.Ticket(1, FULL, WEIGHTS, WEIGHTS)
    yield Entry(
        mask_sources.lottery_tickets,
        {
            "train": lambda params, masks, key: params,
            "params": WEIGHTS,
            "rounds": 2,
            "key": jax.random.key(0),
        },
        {
            "train": FUNCTION,
            "params": PARAMS,
            "rounds": [-1, 1.5, "2", None, Traced(2)],
            "fraction": [
                *(0.0, 1.0, NAN, "0.2", None, Traced(0.2)),
                Bad([0.2], "one for each of the 2 rounds"),
            ],
            "scope": NAME,
            "rewind": FLAG,
            "retrain": ["f", 3],
            "key": KEY,
            "where": WHERE,
            "ticket": [
                Bad("ticket", "got str"),
                Bad(ticket._replace(masks={"v": FULL["w"]}), "masks at the leaves"),
                Bad(ticket._replace(trained={"w": np.ones(2)}), "shapes of params"),
            ],
            "on_collapse": NAME,
        },
    )


def small_weights() -> Bad:
    return Bad({"v": np.ones((4, 4), np.float32)}, "structure")


def ghosts() -> Iterator[Entry]:
    x = jnp.ones((2, 4, 4, 3))
    kind, form, decay = {"kind": NAME}, {"form": NAME}, {"decay": NAME}
    beta = {"beta_0": POSITIVE, "beta_1": [*POSITIVE, 0.5]}
    kept = [x for x in STEPS if x is not None]
    yield Entry(tost.Neurons, {}, {**kind, **beta, **form})
    yield Entry(
        tost.Skips,
        {},
        {**kind, **decay, "alpha_0": POSITIVE, "constant_init": FLAG},
    )
    share = [0.0, 1.5, NAN, "1", Traced(0.5)]
    yield Entry(
        tost.Labels, {}, {"alpha": SHARE, "convention": NAME, "fraction": share}
    )
    yield Entry(
        tost.LRsI,
        {},
        {
            "eta": POSITIVE,
            "gamma": [0.0, -1.0, NAN, "1", None, Traced(1.0)],
            "learning_rate": POSITIVE,
            "min_scale": SHARE,
            "iterations": STEPS,
            "clip": [0.0, -1.0, NAN, "1", None, Traced(1.0)],
            "mask_lookahead": FLAG,
        },
    )
    records = [True, "swish", 3]
    yield Entry(
        tost.ToST,
        {},
        {
            **dict.fromkeys(("neurons", "skips", "lrsi", "labels"), records),
            "ghost_fraction": share,
        },
    )
    everything = tost.reproduce()
    config = {"config": everything, "total_steps": 100}
    bad_config = {"config": [None, 3, tost.Neurons()], "total_steps": STEPS}
    yield Entry(tost.ghost_steps, config, bad_config)
    yield Entry(tost.activation, config, bad_config)
    yield Entry(tost.skip_alpha, config, bad_config)
    yield Entry(tost.label_alpha, config, bad_config)
    yield Entry(tost.reproduce, {}, {})
    yield Entry(
        tost.ghost_activation,
        {"ghost_steps": 10},
        {**kind, **beta, **form, "ghost_steps": kept},
    )
    yield Entry(
        tost.soft_relu,
        {"x": x},
        {
            "x": [Bad(jnp.ones(2, jnp.int32), "int32"), 3, None],
            "beta": [0.0, -1.0, NAN, "1", None, Bad(np.ones(2), "scalar")],
            **kind,
        },
    )
    yield Entry(tost.sharpening, {"ghost_steps": 10}, {"ghost_steps": STEPS, **beta})
    yield Entry(
        tost.fading,
        {"ghost_steps": 10},
        {"ghost_steps": kept, "alpha_0": POSITIVE, **decay},
    )
    yield Entry(
        tost.early, {"alpha": 0.1, "steps": 10}, {"alpha": SHARE, "steps": STEPS}
    )
    sizes = [0, -1, 1.5, "2", None, True, Traced(2)]
    yield Entry(
        tost.ghost_skip,
        {"x": x, "features": 3},
        {
            "x": [Bad(jnp.ones(2), "(2,)"), 3],
            "features": sizes,
            "strides": [*sizes, (1, 1, 1), Bad((0, 1), "0")],
        },
    )
    yield Entry(
        tost.drop_ghosts, {}, {"tree": [Bad(Named(1.0), "'ghost_w' in a record")]}
    )
    yield Entry(tost.is_ghost, {}, {"name": [3, None]})
    yield Entry(
        tost.without_ghosts,
        {"name": "w", "leaf": jnp.ones((2, 2))},
        {"name": [3, None], "leaf": ["leaf", 3]},
    )
    labels = jnp.zeros(2, jnp.int32)
    bad_alpha = [-0.1, 1.5, NAN, "0.1", None, Bad(np.ones(2), "(2,)")]
    yield Entry(
        tost.smooth_targets,
        {"labels": labels, "classes": 3, "alpha": 0.1},
        {
            "labels": [
                Bad(jnp.ones(2), "float32"),
                Bad(labels + 3, "3 to 3"),
                Bad("ab", "<U2"),
            ],
            "classes": [1, 1.5, "3", None, Traced(3)],
            "alpha": bad_alpha,
            "convention": NAME,
        },
    )
    yield Entry(
        tost.smoothed_cross_entropy,
        {"logits": jnp.ones((2, 3)), "labels": labels, "alpha": 0.1},
        {
            "logits": [Bad(jnp.ones(()), "()"), Bad(np.ones((2, 3), int), "int"), 3],
            "labels": [Bad(jnp.ones(2), "float32"), Bad(jnp.zeros(3, int), "(3,)")],
            "alpha": bad_alpha,
            "convention": NAME,
        },
    )
    yield Entry(
        tost.rescale_init,
        {
            "loss_fn": loss,
            "params": parameters(),
            "masks": masks(),
            "batches": BATCHES,
            "config": tost.LRsI(iterations=1),
        },
        {
            "loss_fn": FUNCTION,
            "params": PARAMS,
            "masks": bad_masks(),
            "batches": [Bad([], "batch"), Bad(3, "iterable, got 3")],
            "config": ["LRsI", 3],
            "axis_name": [3],
        },
    )
    skip = {"features": 3}
    yield Entry(
        lambda **given: linen.GhostSkip(**given).init(jax.random.key(0), x, True),
        {**skip, "kind": "conv"},
        {
            "features": sizes,
            "strides": [*sizes, (1, 1, 1)],
            "kind": NAME,
            "kernel_init": [None, "zeros"],
            "dtype": ["colour", 3, jnp.int32],
            "axis_name": [3],
            "parent": Free("flax's own"),
            "name": Free("flax's own"),
        },
        of=linen.GhostSkip,
    )
    yield Entry(
        lambda **given: linen.make_skip(**given).init(jax.random.key(0), x, True),
        {**skip, "config": tost.Skips(kind="conv")},
        {
            "config": [None, "conv", tost.ToST()],
            "features": sizes,
            "strides": [*sizes, (1, 1, 1)],
            "dtype": ["colour", 3, jnp.int32],
            "axis_name": [3],
            "name": Free("flax's own"),
        },
        of=linen.make_skip,
    )


class Named(NamedTuple):
    """A record with a ghost."""

    ghost_w: float


def exporting() -> Iterator[Entry]:
    kernel = np.eye(4, dtype=np.float32)
    mask = kernel > 0
    given = {
        "path": "/nonexistent/net.safetensors",
        "params": {"w": kernel},
        "masks": {"w": mask},
    }
    yield Entry(
        export.save,
        given,
        {
            "path": PATH,
            "params": [
                Bad({"w": np.ones((4, 4), np.float32)}, "not exactly 0.0"),
                Bad({"w": "kernel"}, "'w'"),
                Traced({"w": kernel}),
            ],
            "masks": [
                Bad({"w": np.ones((2, 2), bool)}, "shape (2, 2)"),
                Bad({"v": mask}, "structure"),
                Traced({"w": mask}),
            ],
            "metadata": [3, "text", Bad({"a": {1}}, "JSON"), Bad({"a": NAN}, "JSON")],
        },
    )
    yield Entry(
        export.load, {}, {"path": PATH, "like": Free("test_export: another tree")}
    )
    yield Entry(export.read_metadata, {}, {"path": PATH})
    yield Entry(export.mask_entropy, {}, {"masks": [*ALONE[:3], TRACED_MASKS]})
    wrong = {
        "param": [
            Bad(np.ones((4, 4), np.float32), "not exactly 0.0"),
            Bad(np.ones((2, 2), np.float32), "(2, 2)"),
            Bad("kernel", "'kernel'"),
            Traced(kernel),
        ],
        "mask": [
            Bad(np.ones((2, 2), bool), "(2, 2)"),
            Bad(kernel + 0.5, "0 and 1"),
            Bad("mask", "mask"),
            Traced(mask),
        ],
    }
    vector = Bad(np.ones(4, np.float32), "(4,)")
    for function in (export.to_bcoo, export.to_bcsr, export.to_csr):
        bad = {**wrong, "param": [*wrong["param"], vector]}
        if function is export.to_csr:
            bad["param"] = [*bad["param"], Bad(kernel.astype(np.float16), "float16")]
        yield Entry(function, {"param": kernel, "mask": mask}, bad)


def analysing() -> Iterator[Entry]:
    masks_ = {"w": np.eye(4, dtype=bool)}
    other = Bad({"v": masks_["w"]}, "v")
    trees = [*ALONE, other, Traced(masks_)]
    yield Entry(analysis.overlap, {"a": masks_, "b": masks_}, {"a": trees, "b": trees})
    yield Entry(
        analysis.churn,
        {"before": masks_, "after": masks_},
        {"before": trees, "after": trees},
    )
    yield Entry(
        analysis.chance_iou,
        {"size": 10, "first": 5, "second": 5},
        {
            "size": [-1, 1.5, "10", None, Traced(10)],
            "first": [-1, 11, 1.5, "5", None],
            "second": [-1, 11, 1.5, "5", None],
        },
    )
    history = [
        Bad([], "none"),
        Bad([masks_, other.value], "same leaves"),
        Bad(3, "got 3"),
        Bad([{"w": "mask"}], "'mask' at 'w'"),
    ]
    yield Entry(analysis.exploration, {}, {"history": history})
    by_step = [
        Bad({}, "none"),
        Bad({0: masks_, 1: other.value}, "same leaves"),
        Bad({0: {"w": "mask"}}, "'mask' at 'w'"),
        *(3, [masks_]),
    ]
    yield Entry(analysis.exploration_over_time, {}, {"history": by_step})
    yield Entry(
        analysis.sharpness,
        {
            "loss_fn": loss,
            "params": parameters(),
            "masks": masks(),
            "batch": BATCHES[0],
        },
        {
            "loss_fn": FUNCTION,
            "params": PARAMS,
            "masks": bad_masks(),
            "batch": Free("whatever the loss takes"),
            "iterations": STEPS,
            "seed": [0.5, None, True],
        },
    )
    single = [
        Bad(np.ones(3, bool), "(3,)"),
        Bad(np.full((2, 2), 0.5), "0 and 1"),
        Bad("mask", "'mask'"),
        Traced(np.ones((2, 2), bool)),
    ]
    yield Entry(analysis.channel_density, {}, {"mask": single})
    yield Entry(
        analysis.dead_units,
        {"mask": np.ones((4, 4), bool)},
        {
            "mask": single,
            "following": [*single, Bad(np.ones((3, 3), bool), "must follow 4 units")],
        },
    )
    yield Entry(
        analysis.connectivity,
        {},
        {
            "chain": [
                Bad([], "none"),
                Bad([np.ones((4, 4), bool), np.ones((3, 3), bool)], "must follow 4"),
                Bad(3, "got 3"),
                Bad([np.ones(3, bool)], "(3,)"),
            ]
        },
    )
    yield Entry(
        analysis.gradient_flow,
        {"grads": parameters(), "masks": masks()},
        {"grads": [Bad({"w": "g"}, "structure")], "masks": bad_masks()},
    )
    flops = analysis.flops(apply, WEIGHTS, masks_, jnp.ones((1, 4)))
    none = analysis.Flops({}, 0)
    pairs = [Bad({"w": np.ones((2, 2), bool)}, "(2, 2)"), *trees[:2], *trees[4:]]
    weights = [Bad({}, "leaves"), Bad({"w": "weights"}, "'w'")]
    yield Entry(
        lambda apply_fn, params, masks, inputs: analysis.flops(
            apply_fn, params, masks, *inputs
        ),
        {
            "apply_fn": apply,
            "params": WEIGHTS,
            "masks": masks_,
            "inputs": [jnp.ones((1, 4))],
        },
        {
            "apply_fn": FUNCTION,
            "params": weights,
            "masks": pairs,
            "inputs": [Bad(["x"], "'x'"), Bad([None, object()], "object")],
        },
        of=analysis.flops,
    )
    yield Entry(
        analysis.summary,
        {"params": WEIGHTS, "masks": masks_},
        {
            "params": weights,
            "masks": pairs,
            "flops": ["flops", 3, Bad(none, "leaves")],
        },
    )
    yield Entry(
        analysis.training_flops,
        {"method": granet_jax.static(0.5), "total_steps": 10, "flops": flops},
        {
            "method": METHOD,
            "total_steps": STEPS,
            "flops": ["flops", 3, Bad(none, "masked leaves")],
            "distribution": ["gauss", 3],
            "history": [3, Bad({}, "step 0"), Bad({0: "x"}, "granet_jax.sparsity")],
        },
    )
    yield Entry(
        analysis.sparsities,
        {"sparsity": 0.5},
        {"sparsity": SPARSITY, "updates": STEPS},
    )
    yield Entry(
        analysis.keep_counts,
        {"masks": masks_, "rising": [0.5]},
        {
            "masks": [Bad({}, "no mask"), ALONE[0]],
            "rising": [Bad([0.5, 0.4], "0.4"), Bad([1.0], "1.0"), 3, "ab"],
            "scope": NAME,
        },
    )
    yield Entry(
        analysis.prune,
        {"params": parameters(), "masks": masks(), "keep": 10},
        {
            "params": [Bad({"w": "weights"}, "structure")],
            "masks": bad_masks(),
            "keep": [Bad([1, 2], "(2,)"), -1, 1.5, "10", None],
            "criterion": [*CRITERION, Bad("random", "key")],
            "scope": NAME,
            "regrow": [*SHARE, Bad(0.5, "grads")],
            "grads": [Bad({"w": jnp.ones(2)}, "structure")],
            "key": KEY,
        },
    )
    pruned = analysis.Pruned(masks_, masks_)
    yield Entry(
        analysis.apply_pruned,
        {"params": WEIGHTS, "inner_state": (), "pruned": pruned},
        {
            "params": [Bad({"v": WEIGHTS["w"]}, "structure")],
            "inner_state": [Bad({"flat": np.ones(16)}, "flat")],
            "pruned": [None, "masks", Bad(masks_, "analysis.prune")],
        },
    )


def drawing() -> Iterator[Entry]:
    text = Free("any text")
    sparse = granet_jax.sparsity({"w": np.eye(4, dtype=bool)})
    of_others = granet_jax.sparsity({"v": np.eye(4, dtype=bool)})
    two = Bad({"a": sparse, "b": of_others}, "same leaves")
    reports = [3, Bad({}, "none"), two, Bad({"a": "x"}, "granet_jax.sparsity")]
    yield Entry(plots.densities, {}, {"networks": reports})
    over_time = [3, Bad({}, "none"), Bad({0: sparse, 1: of_others}, "same leaves")]
    yield Entry(
        plots.densities_over_time,
        {},
        {"history": [*over_time, Bad({0: "x"}, "granet_jax.sparsity")], "title": text},
    )
    image = [
        Bad(np.ones(3, bool), "(3,)"),
        Bad(np.ones((0, 2), bool), "(0, 2)"),
        Bad(np.full((2, 2), 0.5), "0 and 1"),
        Bad("mask", "'mask'"),
    ]
    yield Entry(plots.mask, {}, {"mask": image, "title": text})
    yield Entry(
        plots.inputs,
        {"mask": np.ones((4, 2), bool), "image_shape": (2, 2)},
        {
            "mask": image,
            "image_shape": [3, (3, 3), (2,), Bad((2.0, 2.0), "2.0"), (1, 1, 2, 2)],
            "title": text,
        },
    )
    one = {"w": np.eye(4, dtype=bool)}
    yield Entry(
        plots.churn,
        {},
        {"history": [3, Bad({0: one}, "got 1"), Bad({0: one, 1: {}}, "no mask")]}
        | {"title": text},
    )
    yield Entry(
        plots.exploration,
        {},
        {
            "histories": [
                *(3, Bad({}, "none"), Bad({"rigl": 3}, "got 3")),
                Bad({"rigl": {}}, "none"),
            ],
            "title": text,
        },
    )
    yield Entry(
        plots.accuracies,
        {"methods": {"rigl": {0.9: [0.5]}}},
        {
            "methods": [
                3,
                Bad({}, "accuracies"),
                Bad({"rigl": {0.9: []}}, "accuracies"),
                Bad({"rigl": {0.9: [NAN, 0.5]}}, "nan"),
                Bad({"rigl": {0.9: [90.0]}}, "90.0"),
                Bad({"rigl": {90.0: [0.5]}}, "90.0"),
            ],
            "dense": [3, Bad([90.0], "90.0"), Bad(["x"], "'x'")],
            "title": text,
        },
    )
    yield Entry(plots.looks, {}, {"labels": [3, None, Bad([3], "got 3")]})
    yield Entry(
        plots.sparsities,
        {"methods": {"rigl": granet_jax.rigl(0.9, 1000)}, "total_steps": 1000},
        {
            "methods": [3, Bad({}, "none"), Bad({"rigl": "rigl"}, "'rigl'")],
            "total_steps": STEPS,
        },
    )


def every() -> dict[str, Entry]:
    """All of them, by the name under which a user has the function."""
    entries = [
        *methods(),
        *training(),
        *parts(),
        *sources(),
        *ghosts(),
        *exporting(),
        *analysing(),
        *drawing(),
    ]
    names = {id(function): name for name, function in public().items()}
    return {names[id(e.of or e.call)]: e for e in entries}


def public() -> dict[str, Callable[..., Any]]:
    """Every public function and class, once, under the first of its names."""
    found: dict[str, Callable[..., Any]] = {}
    known: set[int] = set()
    for module in MODULES:
        package = module.__file__ is not None and module.__file__.endswith("init__.py")
        for name, value in sorted(vars(module).items()):
            own = getattr(value, "__module__", "") or ""
            if name.startswith("_") or not (
                inspect.isfunction(value) or inspect.isclass(value)
            ):
                continue
            # A package's names are those it imports, a module's those it defines.
            if not (
                own.startswith("granet_jax") if package else own == module.__name__
            ):
                continue
            if id(value) not in known:
                known.add(id(value))
                found[f"{module.__name__}.{name}"] = value
    return found
