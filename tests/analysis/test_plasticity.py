"""Pruning plasticity, the library's part: pruning, regeneration, the arithmetic."""

import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax import scores
from granet_jax.analysis import plasticity
from granet_jax.analysis.plasticity import Recovery
from granet_jax.selection import SCOPES
from tests.helpers import trees

PARAMS: Any = trees.parameters()
GRADS: Any = trees.gradients(1)
KEY = jax.random.key(3)
# In the order of the leaves: conv/kernel, dense/kernel.
SIZES = (72, 48)


def full() -> Any:
    return granet_jax.init_masks(granet_jax.static(0.0), PARAMS)


def kernels(tree: Any) -> list[np.ndarray]:
    return [np.asarray(tree[name]["kernel"]) for name in ("conv", "dense")]


# --- the oracle: plain NumPy on flat arrays


def best(score: np.ndarray, among: np.ndarray, number: int) -> np.ndarray:
    """The `number` largest scores among some, ties to the first."""
    order = np.argsort(-score.astype(np.float64), kind="stable")
    chosen = np.zeros(score.size, bool)
    chosen[[i for i in order if among[i]][:number]] = True
    return chosen


def expected(
    weights: list[np.ndarray],
    masks: list[np.ndarray],
    score: list[np.ndarray],
    keep: Any,
    scope: str,
    regrow: float,
    grads: list[np.ndarray],
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Masks after pruning and regeneration, and which weights continue."""
    flat = [m.ravel() for m in masks]
    ranked = [s.ravel() for s in score]
    if scope == "global":
        chosen = best(np.concatenate(ranked), np.concatenate(flat), int(keep))
        kept = np.split(chosen, np.cumsum([m.size for m in flat])[:-1])
    else:
        kept = [best(*row) for row in zip(ranked, flat, map(int, keep), strict=True)]
    new, continuing = [], []
    for mask, weight, grad in zip(kept, weights, grads, strict=True):
        exchanged = math.ceil(regrow * mask.sum())
        left = best(np.abs(weight).ravel(), mask, int(mask.sum()) - exchanged)
        grown = best(np.abs(grad).ravel(), ~left, exchanged)
        new.append((left | grown).reshape(weight.shape))
        # Dropped and grown again: continues. Pruned and grown again: starts at zero.
        continuing.append((mask & (left | grown)).reshape(weight.shape))
    return new, continuing


def score_of(criterion: str) -> list[np.ndarray]:
    weights, grads = kernels(PARAMS), kernels(GRADS)
    if criterion == "magnitude":
        return [np.abs(w) for w in weights]
    if criterion == "gradient":
        return [np.abs(g) for g in grads]
    bits = [
        jax.random.bits(jax.random.fold_in(KEY, i), w.shape, jnp.uint32)
        for i, w in enumerate(weights)
    ]
    return [np.asarray(b) >> 1 for b in bits]


@pytest.mark.parametrize("regrow", [0.0, 0.5])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("criterion", list(plasticity.CRITERIA))
def test_prunes_as_numpy_does(criterion, scope, regrow):
    """Twice, as in gradual pruning: the second time from masks that are sparse."""
    masks = full()
    active = [np.ones(w.shape, bool) for w in kernels(PARAMS)]
    for keep in plasticity.keep_counts(masks, [0.4, 0.8], scope=scope):
        pruned = plasticity.prune(
            PARAMS,
            masks,
            keep,
            criterion=criterion,
            scope=scope,
            regrow=regrow,
            grads=GRADS,
            key=KEY,
        )
        new, continuing = expected(
            kernels(PARAMS),
            active,
            score_of(criterion),
            keep,
            scope,
            regrow,
            kernels(GRADS),
        )
        for got, want in ((pruned.masks, new), (pruned.continuing, continuing)):
            for a, b in zip(kernels(got), want, strict=True):
                np.testing.assert_array_equal(a, b)
        counts = [int(m.sum()) for m in kernels(pruned.masks)]
        if scope == "layer":
            assert counts == keep.tolist()
        assert sum(counts) == keep.sum()
        if not regrow:
            trees.assert_same(pruned.masks, pruned.continuing)
        elif criterion != "gradient":
            # What is grown is new; but where the largest gradients stay, nothing is.
            assert any((n & ~c).any() for n, c in zip(new, continuing, strict=True))
        masks, active = pruned.masks, new


def test_a_criterion_of_ones_own_ranks_the_weights_that_are_left():
    """|w g|, and the weights by name, which are zero where pruned."""

    def saliency(inputs: scores.ScoreInputs) -> jax.Array:
        seen = inputs.weights["dense/kernel"]
        left = jnp.sum(seen != 0) > 0
        assert inputs.grad is not None
        return jnp.where(left, jnp.abs(inputs.param * inputs.grad), 0)

    (keep,) = plasticity.keep_counts(full(), [0.75])
    pruned = plasticity.prune(PARAMS, full(), keep, criterion=saliency, grads=GRADS)
    product = [
        np.abs(w * g) for w, g in zip(kernels(PARAMS), kernels(GRADS), strict=True)
    ]
    want = best(
        np.concatenate([p.ravel() for p in product]), np.ones(sum(SIZES), bool), 30
    )
    got = np.concatenate([m.ravel() for m in kernels(pruned.masks)])
    np.testing.assert_array_equal(got, want)


def test_is_the_same_in_jit_and_vmap_with_numbers_that_are_traced():
    def masks_of(params: Any, keep: Any, grads: Any) -> Any:
        return plasticity.prune(params, full(), keep, regrow=0.25, grads=grads)

    rows = plasticity.keep_counts(full(), [0.5, 0.9])
    each = [masks_of(PARAMS, keep, GRADS) for keep in rows]
    jitted = jax.jit(masks_of)
    for keep, want in zip(rows, each, strict=True):
        trees.assert_same(jitted(PARAMS, keep, GRADS), want)
    assert jitted._cache_size() == 1  # pyright: ignore
    mapped = jax.vmap(masks_of, in_axes=(None, 0, None))(PARAMS, rows, GRADS)
    trees.assert_same(mapped, jax.tree.map(lambda *x: jnp.stack(x), *each))


# --- numbers


@hypothesis.given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1),
    rising=st.lists(st.floats(0, 0.999), min_size=1, max_size=5).map(sorted),
    scope=st.sampled_from(SCOPES),
)
def test_numbers_to_keep_are_exact_and_never_rise(shapes, rising, scope):
    masks = [jax.ShapeDtypeStruct(shape, bool) for shape in shapes]
    sizes = [a * b for a, b in shapes]
    rows = plasticity.keep_counts(masks, rising, scope=scope)
    wanted = [math.floor((1 - s) * sum(sizes) + 0.5) for s in rising]
    if scope == "global":
        assert rows.tolist() == wanted
        return
    assert rows.sum(axis=1).tolist() == wanted
    before = np.asarray(sizes)
    for row, sparsity in zip(rows, rising, strict=True):
        assert (row <= before).all()
        # Largest remainder: within one of the leaf's share, but for what a leaf that
        # may not rise hands on to another.
        assert (np.abs(row - (1 - sparsity) * np.asarray(sizes)) < 2).all()
        before = row


def test_gradual_pruning_follows_the_cubic_schedule():
    assert plasticity.sparsities(0.9) == [0.9]
    found = plasticity.sparsities(0.98, 7)
    np.testing.assert_allclose(
        found, [0.98 * (1 - (1 - j / 7) ** 3) for j in range(1, 8)], rtol=1e-12
    )
    assert found[-1] == 0.98


def test_accuracies_are_compared_as_the_paper_does():
    found = Recovery(
        before=np.array([0.9, 0.8]),
        pruned=np.array([0.1, 0.5]),
        after=np.array([0.85, 0.82]),
        unpruned=np.array([0.91, 0.84]),
    )
    np.testing.assert_allclose(found.plasticity, [-0.05, 0.02])
    np.testing.assert_allclose(found.regained, [0.75, 0.32])
    np.testing.assert_allclose(found.relative, [-0.06, -0.02])
    assert Recovery(0.5, 0.25, 0.75, 0.5).plasticity == 0.25


# --- in a training loop


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_loop_of_ones_own_goes_on_with_the_pruned_network(name):
    """As the module's documentation says, from the moments of the dense training."""
    inner = optax.sgd(0.1, momentum=0.9) if name == "sgd" else optax.adamw(0.01)
    params: Any = PARAMS
    state: Any = inner.init(PARAMS)
    for step in range(3):
        updates, state = inner.update(trees.gradients(step), state, params)
        params = optax.apply_updates(params, updates)
    masks = full()
    (keep,) = plasticity.keep_counts(masks, [0.9])
    pruned = plasticity.prune(params, masks, keep, regrow=0.5, grads=GRADS)
    start, state_then = plasticity.apply_pruned(params, state, pruned)
    continuing = kernels(pruned.continuing)
    before: dict[str, Any] = {"params": params, "moment": state[0]}
    then: dict[str, Any] = {"params": start, "moment": state_then[0]}
    for what in ("params", "moment"):
        old = [x for x in jax.tree.leaves(before[what]) if x.ndim == 2 or x.ndim == 4]
        new = [x for x in jax.tree.leaves(then[what]) if x.ndim == 2 or x.ndim == 4]
        assert len(old) == (4 if (what, name) == ("moment", "adamw") else 2)
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            assert a.shape == continuing[i % 2].shape
            np.testing.assert_array_equal(b, np.where(continuing[i % 2], a, 0))
    np.testing.assert_array_equal(start["dense"]["bias"], params["dense"]["bias"])
    tx = granet_jax.transform(granet_jax.static(0.0), inner, masks=pruned.masks)
    opt_state: Any = granet_jax.get_state(tx.init(start))._replace(
        inner_state=state_then
    )
    params = start
    for step in range(3, 6):
        updates, opt_state = tx.update(trees.gradients(step), opt_state, params)
        params = optax.apply_updates(params, updates)
    trees.assert_same(granet_jax.get_masks(opt_state), pruned.masks)
    # No gradient here is zero: what is active is not, what is pruned is.
    for weight, mask in zip(kernels(params), kernels(pruned.masks), strict=True):
        np.testing.assert_array_equal(weight != 0, mask)
    assert sum(np.count_nonzero(w) for w in kernels(params)) == keep == 12


# --- bad input

ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "criterion": ({"criterion": "size"}, ValueError, "criterion must be one of 'magn"),
    "scope": ({"scope": "all"}, ValueError, "scope must be"),
    "regrow": ({"regrow": 1.5}, ValueError, r"regrow must be in \[0, 1\], got 1.5"),
    "no number": ({"regrow": "half"}, TypeError, "regrow must be a number"),
    "no gradient": ({"criterion": "gradient"}, ValueError, "grads must be given with"),
    "no regrowth": ({"regrow": 0.1}, ValueError, "grads must be given with regrow=0.1"),
    "no key": ({"criterion": "random"}, ValueError, "key must be given"),
    "rows": ({"keep": [1, 2]}, ValueError, r"keep must have shape \(\) with scope 'gl"),
    "row": ({"scope": "layer"}, ValueError, r"keep must have shape \(2,\) .*keep_coun"),
    "masks": ({"masks": {"a": None}}, ValueError, "masks must have the structure"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_pruning_says_what_is_wrong(case):
    options, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        plasticity.prune(PARAMS, **({"masks": full(), "keep": 60} | options))


def test_numbers_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"rising must not fall, got 0.5 after 0.9"):
        plasticity.keep_counts(full(), [0.9, 0.5])
    with pytest.raises(ValueError, match=r"rising\[0\] must be in \[0, 1\), got 1.0"):
        plasticity.keep_counts(full(), [1.0])
    with pytest.raises(ValueError, match="masks holds no mask"):
        plasticity.keep_counts({}, [0.5])
    with pytest.raises(ValueError, match="updates must be at least 1"):
        plasticity.sparsities(0.5, 0)
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got 1"):
        plasticity.sparsities(1)
    pruned = plasticity.prune(PARAMS, full(), 60)
    flat = optax.flatten(optax.adam(0.1)).init(PARAMS)
    with pytest.raises(ValueError, match="one flat vector"):
        plasticity.apply_pruned(PARAMS, flat, pruned)
