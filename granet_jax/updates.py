"""Prune, drop and regrow: pure functions from masks and scores to masks.

Every function takes pytrees of masks (`optax.MaskedNode()` at dense leaves), and
scores as trees of the same structure, or as anything whose leaves line up with the
masks' leaves. Numbers of weights are integers and are met exactly.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import jaxpr_as_fun

from granet_jax import elementwise, schedules
from granet_jax.activity import (
    CONTINUING,
    DROPPED,
    ENTERED,
    INACTIVE,
    encode,
    is_active,
)
from granet_jax.counting import sum_before
from granet_jax.keys import key_dtype, sort_keys
from granet_jax.programs import Program, is_by_leaf, of_stack, programs_of
from granet_jax.search import PhaseOfSearch, search
from granet_jax.selection import Scope, check_scope, counter_dtype
from granet_jax.stacks import stacked, stacks_of, unstacked

PyTree = Any
Scores = Callable[[list[Array]], Sequence[Array]]


class Phase(NamedTuple):
    """One selection of a mask update.

    Attributes:
      scores: from the present masks to one array of scores per mask; must be the same
        function in phases that rank by the same scores.
      grows: whether it activates the best of the inactive weights, or else keeps the
        best of the active ones.
      number: from (candidates per leaf, number handed on) to (how many to select per
        leaf, number to hand on to the next phase), unsigned vectors. The candidates
        are the active weights, or the inactive ones where it grows.
      scope: whether weights compete across leaves or within.
      forgets: whether what it prunes starts at zero if a later phase activates it
        again, or else continues with its value and moments.
    """

    scores: Scores
    grows: bool
    number: Callable[[Array, Array], tuple[Array, Array]]
    scope: Scope = "layer"
    forgets: bool = False


def run_phases(
    masks: Sequence[Array], phases: Sequence[Phase], *, first: Array | int = 0
) -> list[Array]:
    """Runs the phases of a mask update one after the other.

    All phases go through one compiled selection, in a loop: a selection per phase
    would compile each leaf's counting code again.

    Args:
      masks: boolean arrays.
      phases: at least one.
      first: the phase to begin with; may be traced.

    Returns:
      The codes (`activity`) of all weights: those continue that were active before, and
      not forgotten in between.
    """
    masks = list(masks)
    sizes = [m.size for m in masks]
    wide: Scope = "global" if any(p.scope == "global" for p in phases) else "layer"
    counter = counter_dtype(sizes, wide)
    # Phases that rank the same weights by the same scores share their code.
    ranks = list(dict.fromkeys((p.scores, p.grows) for p in phases))
    trace = functools.partial(jax.make_jaxpr, return_shape=True)
    traced, shapes = zip(*(trace(scores)(masks) for scores, _ in ranks), strict=True)
    width = max(x.dtype.itemsize for x in jax.tree.leaves(shapes))

    # What is cheap is made in every stage of a selection, and never kept.
    cheap, kinds = all(elementwise.is_light(scores.jaxpr) for scores in traced), None
    programs: list[list[Program]] = []
    if cheap:
        programs = [programs_of(scores.jaxpr) for scores in traced]
        cheap = all(map(is_by_leaf, (scores.jaxpr for scores in traced), programs))
    if cheap:
        kinds = [tuple(p.kind for p in parts) for parts in zip(*programs, strict=True)]
    stacks = stacks_of([jax.typeof(m) for m in masks], kinds)

    def by_stack(scores: Any, parts: list[Program]) -> Scores:
        functions = [of_stack(scores, parts, stack) for stack in stacks]
        return lambda present: [f(x) for f, x in zip(functions, present, strict=True)]

    def by_leaf(scores: Any) -> Scores:
        function = jaxpr_as_fun(scores)
        return lambda present: stacked(stacks, function(*unstacked(stacks, present)))

    def maker(scores: Scores, grows: bool) -> Callable[[_Update], list[Array]]:
        def keys(value: _Update) -> list[Array]:
            among = [~m for m in value.present] if grows else value.present
            return sort_keys(scores(value.present), among, width=width)

        return keys

    ranked = map(by_stack, traced, programs) if cheap else map(by_leaf, traced)
    makers = [maker(s, grows) for s, (_, grows) in zip(ranked, ranks, strict=True)]
    together = stacked(stacks, masks)
    value = _Update(
        list(map(encode, together, together)), jnp.zeros((len(masks),), counter)
    )
    # (Of all, so that scores of mixed kinds are refused before a stack mixes them.)
    key_type, *_ = [key_dtype([x.dtype for x in s], width=width) for s in shapes]
    which = [ranks.index((p.scores, p.grows)) for p in phases]

    def phase(index: Array, value: _Update) -> PhaseOfSearch:
        def of_phase(flags: Sequence[Any]) -> Any:
            # Of one phase, or where all are the same, known without looking.
            same = len(set(flags)) == 1
            return flags[0] if same else jnp.asarray(flags)[index]

        grows = of_phase([p.grows for p in phases])
        # (Nothing grows after the last: what it drops is inactive.)
        forgets = of_phase([*(p.forgets for p in phases[:-1]), True])

        def number(candidates: Array) -> tuple[Array, Array]:
            return lax.switch(
                index, [p.number for p in phases], candidates, value.handed
            )

        def finish(value: _Update, chosen: list[Array], candidates: Array) -> _Update:
            pairs = zip(value.weights, chosen, strict=True)
            changed = [_changed(x, c, grows, forgets) for x, c in pairs]
            return _Update(changed, number(candidates)[1])

        return PhaseOfSearch(
            of_phase(which),
            of_phase([p.scope == "global" for p in phases]),
            lambda candidates: number(candidates)[0],
            finish,
        )

    select = functools.partial(
        search, stacks=stacks, key_type=key_type, counter=counter
    )
    if cheap:
        value = select(value, makers, phase, phases=(first, len(phases)))
    else:

        def run(carry: tuple[Array, _Update]) -> tuple[Array, _Update]:
            index, value = carry
            keys = lax.switch(jnp.asarray(which)[index], makers, value)
            now = phase(index, value)._replace(maker=0)
            value = select(value, [lambda _: keys], lambda *_: now, phases=(0, 1))
            return index + 1, value

        start = (jnp.asarray(first, jnp.int32), value)
        end = len(phases)
        value = lax.while_loop(lambda carry: carry[0] < end, run, start)[1]
    # (Not made anew of masks: for some shapes LLVM then takes ten seconds a kernel.)
    return unstacked(stacks, value.weights)


class _Update(NamedTuple):
    """What the phases of an update change.

    Attributes:
      weights: the codes (`activity`) of all weights, one array per stack.
      handed: what one phase hands on to the next.
    """

    weights: list[Array]
    handed: Array

    @property
    def present(self) -> list[Array]:
        """The masks, of every stack."""
        return list(map(is_active, self.weights))


@jax.jit
def _changed(x: Array, chosen: Array, grows: Any, forgets: Any) -> Array:
    """The codes after a phase has chosen what it grows, or what it keeps."""
    grown = jnp.where(x == DROPPED, CONTINUING, ENTERED)
    pruned = jnp.where(x == CONTINUING, DROPPED, INACTIVE)
    after = jnp.where(is_active(x) & ~(chosen | grows), pruned, x)
    after = jnp.where(chosen & ~is_active(x), grown, after)
    return jnp.maximum(after, jnp.where(forgets, INACTIVE, DROPPED))


def _unchanged(number: Array | int | Sequence[int] | np.ndarray) -> Any:
    """A phase's number: as given, however many candidates there are."""
    return lambda candidates, handed: (
        jnp.broadcast_to(
            jnp.asarray(number).astype(candidates.dtype), candidates.shape
        ),
        handed,
    )


@functools.partial(jax.jit, static_argnames="scope")
def prune(
    masks: PyTree, scores: PyTree, keep: Array | int | Sequence[int], *, scope: Scope
) -> PyTree:
    """Keeps the `keep` best-scored of the active weights, and prunes the others.

    Args:
      masks: pytree of masks.
      scores: one array per mask, of its shape; larger is kept.
      keep: number of weights to keep: one integer with scope "global", one per leaf
        with scope "layer". Where fewer are active, all of them stay.
      scope: whether weights compete across leaves ("global") or within ("layer").

    Returns:
      Masks; a subset of `masks`.
    """
    check_scope(scope)
    leaves, treedef = jax.tree.flatten(masks)
    phase = prune_phase(_given(scores), keep, scope=scope)
    return treedef.unflatten(map(is_active, run_phases(leaves, [phase])))


@jax.jit
def regrow(masks: PyTree, scores: PyTree, number: Array | Sequence[int]) -> PyTree:
    """Activates, in every leaf, the `number` best-scored of the inactive weights.

    Args:
      masks: pytree of masks.
      scores: one array per mask, of its shape; larger is activated.
      number: integers, one per leaf.

    Returns:
      Masks; a superset of `masks`.
    """
    leaves, treedef = jax.tree.flatten(masks)
    phase = Phase(_given(scores), True, _unchanged(number))
    return treedef.unflatten(map(is_active, run_phases(leaves, [phase])))


@jax.jit
def prune_and_regrow(
    masks: PyTree,
    drop_scores: PyTree,
    grow_scores: PyTree,
    fraction: Array,
    *,
    layer_weights: Array | None = None,
) -> PyTree:
    """Exchanges a fraction of every leaf's active weights (neuroregeneration).

    In a leaf with a active weights, the ceil(fraction * a) of lowest drop score are
    dropped and as many of highest grow score are activated, among all that are then
    inactive, those just dropped included (the GraNet and ITOP code).

    Args:
      masks: pytree of masks.
      drop_scores: one array per mask; the lowest are dropped.
      grow_scores: one array per mask; the highest are activated.
      fraction: prune fraction as uint32 fixed point, see `schedules.fixed_point`.
      layer_weights: optional float32 vector, one per leaf: the freed weights of all
        leaves together are redistributed in proportion to it (SNFS), see
        `redistribute`. Default: every leaf regrows what it dropped.

    Returns:
      Masks with as many active weights as `masks`; in every leaf, unless
      `layer_weights` is given, else in total.
    """
    leaves, treedef = jax.tree.flatten(masks)
    phases = exchange_phases(
        _given(drop_scores),
        _given(grow_scores),
        jnp.asarray(fraction, jnp.uint32),
        layer_weights=layer_weights,
    )
    return treedef.unflatten(map(is_active, run_phases(leaves, phases)))


def _given(scores: PyTree) -> Callable[[list[Array]], list[Array]]:
    return lambda _: jax.tree.leaves(scores)


def prune_phase(
    scores: Callable[[list[Array]], Sequence[Array]],
    keep: Array | int | Sequence[int],
    *,
    scope: Scope,
) -> Phase:
    """The phase that keeps the `keep` best of the active weights for good.

    A weight that it prunes has lost its value and moments: if the same update grows it
    again, it starts at zero. So in the GraNet code, which multiplies parameters and
    momentum by the mask between its gradual pruning and its regeneration.
    """
    return Phase(scores, False, _unchanged(keep), scope, forgets=True)


def revive_phase(
    scores: Callable[[list[Array]], Sequence[Array]],
    keep: Array | int | Sequence[int],
    *,
    sizes: Sequence[int],
    scope: Scope,
) -> Phase:
    """The phase that activates the best of the inactive weights, up to `keep` active.

    Nothing where as many or more are active. What it activates starts at zero.
    """

    def number(inactive: Array, handed: Array) -> tuple[Array, Array]:
        room = jnp.asarray(sizes, inactive.dtype)
        wanted = jnp.asarray(keep).astype(inactive.dtype)
        if scope == "global":
            room = jnp.sum(room, dtype=room.dtype)
            inactive = jnp.sum(inactive, dtype=room.dtype)
        active = room - inactive
        missing = jnp.where(wanted > active, wanted - active, 0)
        return jnp.broadcast_to(missing, (len(sizes),)), handed

    return Phase(scores, True, number, scope)


def exchange_phases(
    drop: Callable[[list[Array]], Sequence[Array]],
    grow: Callable[[list[Array]], Sequence[Array]],
    fraction: Array,
    *,
    layer_weights: Array | None = None,
) -> list[Phase]:
    """The two phases of an exchange, see `prune_and_regrow`.

    A weight dropped and grown again at once continues, with its value and moments (the
    GraNet and ITOP code).
    """

    def keep(active: Array, handed: Array) -> tuple[Array, Array]:
        del handed
        dropped = schedules.ceil_of(fraction, active)
        return active - dropped, dropped

    def regrown(inactive: Array, dropped: Array) -> tuple[Array, Array]:
        if layer_weights is None:
            return dropped, dropped
        total = jnp.sum(dropped, dtype=dropped.dtype)
        return redistribute(total, layer_weights, inactive), dropped

    return [Phase(drop, False, keep), Phase(grow, True, regrown)]


def redistribute(number: Array, weights: Array, room: Array) -> Array:
    """Splits `number` over leaves in proportion to `weights`, within their `room`.

    What a full leaf cannot take goes to the others, again in proportion; what is left
    by rounding down, fewer than one per leaf, goes to the first leaves with room.
    Leaves without weight are served only when the others are full.

    Args:
      number: unsigned integer, at most the sum of `room`.
      weights: float32, non-negative, one per leaf; what is not finite counts as 0.
      room: unsigned integers, most that each leaf can take.

    Returns:
      Integers of the dtype and shape of `room` that sum to `number` exactly.
    """
    weights = jnp.where(jnp.isfinite(weights), weights, 0.0)
    count_type = room.dtype

    def total(x: Array) -> Array:
        return jnp.sum(x, dtype=count_type)

    def pour(_: int, given: Array) -> Array:
        left = number - total(given)
        space = room - given
        open_weights = jnp.where(space > 0, weights, 0.0)
        mass = jnp.sum(open_weights)
        # Without any weight left, by room.
        open_weights = jnp.where(mass > 0, open_weights, space.astype(jnp.float32))
        mass = jnp.maximum(jnp.sum(open_weights), jnp.finfo(jnp.float32).tiny)
        share = open_weights / mass * left.astype(jnp.float32)
        # In float32 a share may round above what is left: serve in order, within it.
        poured = jnp.minimum(share.astype(count_type), space)
        before = sum_before(poured)
        allowed = jnp.where(left > before, left - before, 0)
        return given + jnp.minimum(poured, allowed)

    # Each round fills at least one leaf or leaves less than one weight per leaf.
    given = lax.fori_loop(0, room.shape[0] + 1, pour, jnp.zeros_like(room))

    def unfinished(given: Array) -> Array:
        # Under `vmap` this also runs, for nothing, on numbers that no room can take.
        return (total(given) < number) & jnp.any(given < room)

    def top_up(given: Array) -> Array:
        open_leaf = (given < room).astype(count_type)
        earlier = sum_before(open_leaf)
        return given + jnp.where(earlier < number - total(given), open_leaf, 0)

    return lax.while_loop(unfinished, top_up, given)


def mean_score(masks: PyTree, scores: PyTree) -> Array:
    """Mean score of the active weights of every leaf, the same under any sharding.

    Sums of floats depend on their order, and so on the number of devices; here every
    score is rounded down to a fraction of the power of two above the largest of all,
    and those integers are summed, in limbs that cannot overflow 32 bits.

    Args:
      masks: pytree of masks.
      scores: one array per mask, non-negative. NaN and infinite ones count as 0.

    Returns:
      float32 vector, one per leaf, up to a common positive factor; 0 for a leaf
      without active weights.
    """
    leaves = jax.tree.leaves(masks)
    values = [
        jnp.where(m & jnp.isfinite(s), s, 0).astype(jnp.float32)
        for m, s in zip(leaves, jax.tree.leaves(scores), strict=True)
    ]
    largest = jnp.max(jnp.stack([jnp.max(v, initial=0.0) for v in values]))
    _, exponent = jnp.frexp(largest)
    means = []
    for mask, value in zip(leaves, values, strict=True):
        bits = max(32 - mask.size.bit_length(), 1)
        limbs = -(-24 // bits)
        fraction = jnp.ldexp(value, -exponent)  # in [0, 1]
        mean = jnp.zeros((), jnp.float32)
        for limb in range(1, limbs + 1):
            fraction = jnp.ldexp(fraction, bits)
            digit = jnp.floor(fraction)
            fraction -= digit
            summed = jnp.sum(digit.astype(jnp.uint32), dtype=jnp.uint32)
            mean += jnp.ldexp(summed.astype(jnp.float32), -bits * limb)
        active = jnp.sum(mask, dtype=jnp.uint32).astype(jnp.float32)
        means.append(mean / jnp.maximum(active, 1.0))
    return jnp.stack(means)
