"""Pruning plasticity: pruning and regeneration against NumPy, and its arithmetic."""

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
from tests.helpers import trees
from tests.helpers.numpy_reference import best, best_across, best_per_leaf
from tests.helpers.training import make_step

PARAMS: Any = trees.parameters()
GRADS: Any = trees.gradients(1)
KEY = jax.random.key(3)


def full() -> Any:
    return granet_jax.init_masks(granet_jax.static(0.0), PARAMS)


def kernels(tree: Any) -> list[np.ndarray]:
    return [np.asarray(tree[name]["kernel"]) for name in ("conv", "dense")]


# --- The oracle


def prune_by_numpy(
    masks: list[np.ndarray],
    score: list[np.ndarray],
    keep: Any,
    scope: str,
    regrow: float,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the masks after pruning and regrowth, and the weights that continue."""
    choose = best_across if scope == "global" else best_per_leaf
    kept = choose(score, masks, keep)
    number = [math.ceil(regrow * m.sum()) for m in kept]
    sizes, grads = ([np.abs(x) for x in kernels(tree)] for tree in (PARAMS, GRADS))
    stay = [int(m.sum()) - n for m, n in zip(kept, number, strict=True)]
    left = best_per_leaf(sizes, kept, stay)
    grown = best_per_leaf(grads, [~m for m in left], number)
    new = [m | g for m, g in zip(left, grown, strict=True)]
    # A weight that is dropped and grown continues; one that is pruned does not.
    return new, [k & n for k, n in zip(kept, new, strict=True)]


def scores_by_numpy(criterion: str) -> list[np.ndarray]:
    if criterion == "random":
        rows = enumerate(kernels(PARAMS))
        keys = [(jax.random.fold_in(KEY, i), w.shape) for i, w in rows]
        return [np.asarray(jax.random.bits(*row, jnp.uint32)) >> 1 for row in keys]
    return [np.abs(x) for x in kernels(PARAMS if criterion == "magnitude" else GRADS)]


@pytest.mark.parametrize(
    ("criterion", "scope", "regrow"),
    [
        *(("magnitude", "global", 0.5), ("magnitude", "layer", 0.0)),
        *(("gradient", "layer", 0.5), ("random", "global", 0.0)),
    ],
)
def test_prunes_as_numpy_does(criterion, scope, regrow):
    """Prune twice, so that the second time starts from sparse masks."""
    masks = full()
    active = [np.ones(w.shape, bool) for w in kernels(PARAMS)]
    options = {"criterion": criterion, "scope": scope, "regrow": regrow}
    for keep in plasticity.keep_counts(masks, [0.4, 0.8], scope=scope):
        pruned = plasticity.prune(PARAMS, masks, keep, grads=GRADS, key=KEY, **options)
        new, continuing = prune_by_numpy(
            active, scores_by_numpy(criterion), keep, scope, regrow
        )
        for got, want in ((pruned.masks, new), (pruned.continuing, continuing)):
            for a, b in zip(kernels(got), want, strict=True):
                np.testing.assert_array_equal(a, b)
        assert sum(int(m.sum()) for m in kernels(pruned.masks)) == keep.sum()
        if regrow and criterion != "gradient":
            # Regrowth adds new weights, unless the largest gradients stay anyway.
            assert any((n & ~c).any() for n, c in zip(new, continuing, strict=True))
        masks, active = pruned.masks, new


def test_a_user_criterion_sees_the_weights_that_are_left():
    """Rank by |w g|, but only if the weights by name are not all zero."""

    def saliency(inputs: scores.ScoreInputs) -> jax.Array:
        left = jnp.sum(inputs.weights["dense/kernel"] != 0) > 0
        assert inputs.grad is not None
        return jnp.where(left, jnp.abs(inputs.param * inputs.grad), 0)

    pruned = plasticity.prune(PARAMS, full(), 30, criterion=saliency, grads=GRADS)
    pairs = zip(kernels(PARAMS), kernels(GRADS), strict=True)
    product = np.concatenate([np.abs(w * g).ravel() for w, g in pairs])
    masks = np.concatenate([m.ravel() for m in kernels(pruned.masks)])
    np.testing.assert_array_equal(masks, best(product, np.ones(product.size, bool), 30))


def test_jit_and_vmap_with_traced_numbers():
    def prune(params: Any, keep: Any, grads: Any) -> Any:
        return plasticity.prune(params, full(), keep, regrow=0.5, grads=grads)

    rows = plasticity.keep_counts(full(), [0.5, 0.9])
    expected = [prune(PARAMS, keep, GRADS) for keep in rows]
    jitted = jax.jit(prune)
    for keep, want in zip(rows, expected, strict=True):
        trees.assert_same(jitted(PARAMS, keep, GRADS), want)
    assert jitted._cache_size() <= 1  # pyright: ignore
    mapped = jax.vmap(prune, in_axes=(None, 0, None))(PARAMS, rows, GRADS)
    trees.assert_same(mapped, jax.tree.map(lambda *x: jnp.stack(x), *expected))


# --- Numbers


@hypothesis.given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1),
    rising=st.lists(st.floats(0, 0.999), min_size=1, max_size=5).map(sorted),
)
def test_numbers_to_keep_are_exact_and_never_rise(shapes, rising):
    masks = [jax.ShapeDtypeStruct(shape, bool) for shape in shapes]
    sizes = np.asarray([a * b for a, b in shapes])
    totals = [math.floor((1 - s) * sizes.sum() + 0.5) for s in rising]
    assert plasticity.keep_counts(masks, rising).tolist() == totals
    rows = plasticity.keep_counts(masks, rising, scope="layer")
    assert rows.sum(axis=1).tolist() == totals
    assert (np.diff(np.asarray([sizes, *rows], int), axis=0) <= 0).all()
    # Largest remainder keeps each leaf within one of its share. A leaf whose number may
    # not rise can pass one more on to the next leaf.
    shares = (1 - np.asarray(rising))[:, None] * sizes
    assert (np.abs(rows - shares) < 2).all()


def test_gradual_pruning_follows_the_cubic_schedule():
    assert plasticity.sparsities(0.9) == [0.9]
    rising = plasticity.sparsities(0.98, 7)
    expected = [0.98 * (1 - (1 - j / 7) ** 3) for j in range(1, 8)]
    np.testing.assert_allclose(rising, expected, rtol=1e-12)
    assert rising[-1] == 0.98


def test_accuracies_are_compared_as_in_the_paper():
    recovery = Recovery(
        before=np.array([0.9, 0.8]),
        pruned=np.array([0.1, 0.5]),
        after=np.array([0.85, 0.82]),
        unpruned=np.array([0.91, 0.84]),
    )
    np.testing.assert_allclose(recovery.plasticity, [-0.05, 0.02])
    np.testing.assert_allclose(recovery.regained, [0.75, 0.32])
    np.testing.assert_allclose(recovery.relative, [-0.06, -0.02])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_training_loop_continues_with_the_pruned_network(name):
    """Follow the documentation of the module, from the moments of dense training."""
    inner = optax.sgd(0.1, momentum=0.9) if name == "sgd" else optax.adamw(0.01)
    params, state = PARAMS, inner.init(PARAMS)
    for step in range(3):
        params, state = make_step(inner)(params, state, trees.gradients(step))
    pruned = plasticity.prune(params, full(), 12, regrow=0.5, grads=GRADS)
    start, moments = plasticity.apply_pruned(params, state, pruned)
    continuing = {m.shape: m for m in kernels(pruned.continuing)}
    changed = 0
    after = jax.tree.leaves((start, moments))
    for old, new in zip(jax.tree.leaves((params, state)), after, strict=True):
        mask = continuing.get(old.shape, True)
        np.testing.assert_array_equal(new, np.where(mask, old, 0))
        changed += mask is not True
    assert changed == (4 if name == "sgd" else 6)
    tx = granet_jax.transform(granet_jax.static(0.0), inner, masks=pruned.masks)
    opt_state: Any = granet_jax.get_state(tx.init(start))._replace(inner_state=moments)
    params = start
    for step in range(3, 6):
        params, opt_state = make_step(tx)(params, opt_state, trees.gradients(step))
    trees.assert_same(granet_jax.get_masks(opt_state), pruned.masks)
    # No gradient here is zero, so exactly the pruned weights are zero.
    for weight, mask in zip(kernels(params), kernels(pruned.masks), strict=True):
        np.testing.assert_array_equal(weight != 0, mask)
    assert sum(np.count_nonzero(w) for w in kernels(params)) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "gradient"}, "grads must be given with criterion 'gradient'"),
        ({"regrow": 0.1}, "grads must be given with regrow=0.1"),
        ({"scope": "layer"}, r"keep must have shape \(2,\) .*keep_counts"),
    ],
)
def test_missing_gradients_and_wrong_numbers_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        plasticity.prune(PARAMS, full(), 60, **options)
