"""Sources for pretrained networks, against NumPy versions of the papers' rules."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import granet_jax
from granet_jax import mask_sources as ms
from granet_jax import structures
from granet_jax.structures import Structure

RNG = np.random.default_rng(0)
# Inputs of which some are large, some constant, and all are correlated.
MIX = RNG.normal(size=(16, 16)) * np.exp(RNG.normal(size=16)) + 0.3
DATA = [RNG.normal(size=(60, 16)) @ MIX + 0.5 for _ in range(2)]
BATCHES = [jnp.asarray(x, jnp.float32) for x in DATA]
FIRST, SECOND = RNG.normal(size=(16, 12)), RNG.normal(size=(12, 8))
PARAMS = {
    "a": {"kernel": jnp.asarray(FIRST, jnp.float32), "bias": jnp.zeros((1, 12))},
    "b": {"kernel": jnp.asarray(SECOND, jnp.float32)},
}


def apply(params: Any, x: Any) -> Any:
    hidden = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"])
    return hidden @ params["b"]["kernel"]


STATISTICS = ms.input_statistics(apply, PARAMS, BATCHES, products=True)
X = np.concatenate(DATA)
HIDDEN = np.maximum(X @ FIRST, 0)
# The weights of each layer as (out, in), as in the papers, and its inputs.
LAYERS = {"a": (FIRST.T, X), "b": (SECOND.T, HIDDEN)}


def wanda_scores(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.abs(w) * np.sqrt(np.mean(x**2, 0))


def ria_scores(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    size = np.abs(w)
    relative = size / size.sum(0) + size / size.sum(1, keepdims=True)
    return relative * np.sqrt(np.mean(x**2, 0)) ** 0.5


def largest_in_rows(scores: np.ndarray, k: int) -> np.ndarray:
    order = np.argsort(-scores, axis=1, kind="stable")
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, order[:, :k], True, axis=1)
    return mask


def assert_masks(masks: Any, expected: dict[str, np.ndarray]) -> None:
    assert granet_jax.masking.is_masked_node(masks["a"]["bias"])
    for name, mask in expected.items():
        np.testing.assert_array_equal(masks[name]["kernel"], mask.T, err_msg=name)


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_wanda_keeps_the_best_inputs_of_every_output(sparsity: float) -> None:
    masks = ms.wanda(PARAMS, STATISTICS, sparsity)
    expected = {
        name: largest_in_rows(
            wanda_scores(w, x), int((1 - sparsity) * w.shape[1] + 0.5)
        )
        for name, (w, x) in LAYERS.items()
    }
    assert_masks(masks, expected)


def test_ria_keeps_the_best_weights_of_every_layer() -> None:
    expected = {
        name: largest_in_rows(ria_scores(w, x).reshape(1, -1), w.size // 4).reshape(
            w.shape
        )
        for name, (w, x) in LAYERS.items()
    }
    assert_masks(ms.ria(PARAMS, STATISTICS, 0.75), expected)


def test_two_of_four_and_blocks() -> None:
    masks = ms.wanda(
        PARAMS, STATISTICS, 0.5, scope="layer", structure=structures.n_of_m(2, 4)
    )
    assert_masks(
        masks,
        {
            name: largest_in_rows(wanda_scores(w, x).reshape(-1, 4), 2).reshape(w.shape)
            for name, (w, x) in LAYERS.items()
        },
    )
    blocks = ms.wanda(PARAMS, STATISTICS, 0.75, structure=structures.block(4, 4))
    for name, (w, x) in LAYERS.items():
        rows, columns = w.shape[0] // 4, w.shape[1] // 4
        sums = wanda_scores(w, x).reshape(rows, 4, columns, 4).sum((1, 3))
        count = int(sums.size / 4 + 0.5)
        best = largest_in_rows(sums.reshape(1, -1), count).reshape(sums.shape)
        np.testing.assert_array_equal(
            blocks[name]["kernel"], np.kron(best, np.ones((4, 4), bool)).T
        )


def test_stacked_layers_are_pruned_as_if_apart() -> None:
    layers = [{"w": jnp.asarray(RNG.normal(size=(6, 6)), jnp.float32)} for _ in "abc"]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *layers)

    def step(x: Any, layer: Any) -> tuple[Any, None]:
        return jnp.tanh(x @ layer["w"]), None

    x = [jnp.asarray(RNG.normal(size=(30, 6)), jnp.float32)]
    found = ms.input_statistics(
        lambda p, x: jax.lax.scan(step, x, p)[0], stack, x, products=True
    )
    together = (
        *(ms.wanda(stack, found, 0.5)["w"], ms.ria(stack, found, 0.5)["w"]),
        *(tree["w"] for tree in ms.sparsegpt(stack, found, 0.5, block_size=4)),
    )
    inputs = x
    for i, layer in enumerate(layers):
        found = ms.input_statistics(
            lambda p, x: step(x, p)[0], layer, inputs, products=True
        )
        apart = (
            *(ms.wanda(layer, found, 0.5)["w"], ms.ria(layer, found, 0.5)["w"]),
            *(tree["w"] for tree in ms.sparsegpt(layer, found, 0.5, block_size=4)),
        )
        for a, b in zip(together, apart, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5)
        inputs = [step(x, layer)[0] for x in inputs]


def test_owl_gives_blocks_with_more_outliers_more_weights() -> None:
    shares = {
        name: np.mean(scores > 2 * scores.mean())
        for name, scores in ((k, wanda_scores(*v)) for k, v in LAYERS.items())
    }
    low, high = min(shares.values()), max(shares.values())
    density = {k: (v - low) / (high - low) * 0.16 for k, v in shares.items()}
    sizes = {name: w.size for name, (w, _) in LAYERS.items()}
    mean = sum(density[k] * n for k, n in sizes.items()) / sum(sizes.values())
    found = ms.owl(
        PARAMS, STATISTICS, 0.7, block=lambda name: name.split("/")[0], outlier=2.0
    )
    assert found == pytest.approx(
        {f"{k}/kernel": 0.7 - density[k] + mean for k in density}
    )
    assert high > low
    masks = ms.wanda(PARAMS, STATISTICS, found, scope="layer")
    for name, sparsity in granet_jax.sparsity(masks).leaves.items():
        assert sparsity == pytest.approx(found[name], abs=0.5 / LAYERS[name[0]][0].size)
    together = ms.owl(PARAMS, STATISTICS, 0.7, block=lambda _: "all")
    assert together == dict.fromkeys(found, 0.7)


def sparsegpt_rows(
    w: np.ndarray, x: np.ndarray, sparsity: float, block: int, n: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 of Frantar and Alistarh (2023), in float64."""
    hessian = x.T @ x / len(x)
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    root = np.linalg.cholesky(np.linalg.inv(hessian)).T
    w, mask = w.copy(), np.ones(w.shape, bool)
    kept = 0
    for start in range(0, w.shape[1], block):
        end = min(start + block, w.shape[1])
        scores = (w[:, start:end] / np.diag(root)[start:end]) ** 2
        if n is None:
            total = int((1 - sparsity) * len(w) * end + 0.5)
            best = largest_in_rows(scores.reshape(1, -1), total - kept)
            mask[:, start:end], kept = best.reshape(scores.shape), total
        else:
            mask[:, start:end] = largest_in_rows(scores, n)
        for j in range(start, end):
            error = np.where(mask[:, j], 0, w[:, j]) / root[j, j]
            w[:, j:] -= np.outer(error, root[j, j:])
    return np.where(mask, w, 0), mask


@pytest.mark.parametrize(
    ("structure", "block"),
    [(None, 128), (None, 5), (structures.n_of_m(2, 4), 4)],
)
def test_sparsegpt_is_the_algorithm_of_the_paper(
    structure: Structure | None, block: int
) -> None:
    params, masks = ms.sparsegpt(
        PARAMS, STATISTICS, 0.5, structure=structure, block_size=block
    )
    expected = {
        name: sparsegpt_rows(w, x, 0.5, block, None if structure is None else 2)
        for name, (w, x) in LAYERS.items()
    }
    assert_masks(masks, {name: mask for name, (_, mask) in expected.items()})
    assert granet_jax.sparsity(masks).overall == 0.5
    for name, (w, mask) in expected.items():
        kernel = np.asarray(params[name]["kernel"])
        np.testing.assert_allclose(kernel, w.T, rtol=2e-3, atol=2e-4)
        assert np.all(kernel[~mask.T] == 0)
        # The repair brings the outputs nearer to the dense ones.
        dense, x = LAYERS[name]
        errors = [np.sum((x @ (dense - v).T) ** 2) for v in (kernel.T, dense * mask)]
        assert errors[0] < errors[1]
    assert params["a"]["bias"] is PARAMS["a"]["bias"]


def test_sparsegpt_clears_weights_whose_inputs_are_always_zero() -> None:
    batches = [x.at[:, 3].set(0) for x in BATCHES]
    found = ms.input_statistics(apply, PARAMS, batches, products=True)
    params, masks = ms.sparsegpt(PARAMS, found, 0.25)
    assert np.all(params["a"]["kernel"][3] == 0)
    assert not np.any(masks["a"]["kernel"][3])
    assert np.all(np.isfinite(params["a"]["kernel"]))


def exchanged(
    w: np.ndarray, x: np.ndarray, mask: np.ndarray, swaps: int, group: int | None
) -> np.ndarray:
    """The rule of Zhang et al. (2024), one row after the other."""
    effect = w * x.mean(0)
    growth, scores = effect / x.var(0), wanda_scores(w, x)
    mask = mask.copy()
    for i, row in enumerate(mask):
        error, fixed = effect[i][~row].sum(), set()
        for _ in range(swaps):
            sign = np.sign(error)
            pruned = [j for j in np.flatnonzero(~row) if j not in fixed]
            kept = [j for j in np.flatnonzero(row) if j not in fixed]
            if not pruned or abs(error) <= 0.1:
                break
            new = max(pruned, key=lambda j: sign * growth[i, j])
            kept = [
                j
                for j in kept
                if (
                    sign * effect[i, j] < 0
                    if group is None
                    else j // group == new // group
                )
            ]
            if not kept:
                break
            old = min(kept, key=lambda j: scores[i, j])
            after = error - effect[i, new] + effect[i, old]
            if np.sign(after) != sign:
                break
            row[new], row[old], error = True, False, after
            fixed |= {new, old}
    return mask


@pytest.mark.parametrize("structure", [None, structures.n_of_m(2, 4)])
@pytest.mark.parametrize("swaps", [1, 50])
def test_dsnot_exchanges_weights_by_the_rule_of_the_paper(
    structure: Structure | None, swaps: int
) -> None:
    before = ms.wanda(
        PARAMS,
        STATISTICS,
        0.5,
        scope="layer" if structure else "unit",
        structure=structure,
    )
    after = ms.dsnot(PARAMS, before, STATISTICS, structure=structure, swaps=swaps)
    expected = {
        name: exchanged(
            w, x, np.asarray(before[name]["kernel"]).T, swaps, 4 if structure else None
        )
        for name, (w, x) in LAYERS.items()
    }
    assert_masks(after, expected)
    assert np.any(np.asarray(after["a"]["kernel"] != before["a"]["kernel"]))


def test_blocks_see_the_outputs_of_the_pruned_blocks_before_them() -> None:
    def block(params: Any, x: Any) -> Any:
        return jax.nn.relu(x @ params["kernel"])

    def prune(i: int, block: Any, params: Any, batches: Any) -> tuple[Any, Any]:
        numbers.append(i)
        found = ms.input_statistics(block, params, batches)
        masks = ms.wanda(params, found, 0.5)
        return granet_jax.apply_masks(params, masks), masks

    numbers: list[int] = []
    given = [{"kernel": PARAMS[name]["kernel"]} for name in "ab"]
    params, masks = ms.block_by_block([block, block], given, iter(BATCHES), prune)
    first = largest_in_rows(wanda_scores(FIRST.T, X), 8)
    hidden = np.maximum(X @ (FIRST * first.T), 0)
    second = largest_in_rows(wanda_scores(SECOND.T, hidden), 6)
    for mask, tree, dense, expected in zip(
        masks, params, (FIRST, SECOND), (first.T, second.T), strict=True
    ):
        np.testing.assert_array_equal(mask["kernel"], expected)
        np.testing.assert_allclose(tree["kernel"], dense * expected, rtol=1e-6)
    assert numbers == [0, 1]


def test_training_goes_on_from_the_masks() -> None:
    import optax

    params, masks = ms.sparsegpt(PARAMS, STATISTICS, 0.5)
    tx = granet_jax.transform(granet_jax.static(0.0), optax.adam(0.01), masks=masks)
    state = tx.init(params)
    for x in BATCHES:
        grads = jax.grad(lambda p, x: jnp.mean(apply(p, x) ** 2))(params, x)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for name in "ab":
        assert np.all(params[name]["kernel"][~masks[name]["kernel"]] == 0)


ONLY_SECOND = {
    "a": {"kernel": None, "bias": None},
    "b": {"kernel": jnp.ones((12, 8), bool)},
}
BAD: list[tuple[Any, str]] = [
    (lambda: ms.wanda(PARAMS, STATISTICS, 1.0), "sparsity must be in"),
    (lambda: ms.wanda(PARAMS, STATISTICS, {"a/kernel": 0.5}), "none for 'b/kernel'"),
    (lambda: ms.wanda(PARAMS, STATISTICS, 0.5, scope="global"), "scope must be one of"),
    (
        lambda: ms.wanda({"c": PARAMS["b"]}, STATISTICS, 0.5),
        "statistics has 'a/kernel'",
    ),
    (
        lambda: ms.wanda(PARAMS, STATISTICS, 0.4, structure=structures.n_of_m(2, 4)),
        "sparsity must end at 0.5",
    ),
    (
        lambda: ms.sparsegpt(PARAMS, STATISTICS, 0.5, structure=structures.channel()),
        "structure must be None or n_of_m",
    ),
    (
        lambda: ms.sparsegpt(
            PARAMS, STATISTICS, 0.8, structure=structures.n_of_m(1, 5)
        ),
        "and 'a/kernel' has shape",
    ),
    (
        lambda: ms.sparsegpt(PARAMS, ms.input_statistics(apply, PARAMS, BATCHES), 0.5),
        "products=True",
    ),
    (
        lambda: ms.owl(PARAMS, STATISTICS, 0.0, block=str, limit=1.0, outlier=2.0),
        "choose a smaller limit",
    ),
    (
        lambda: ms.dsnot(PARAMS, ONLY_SECOND, STATISTICS),
        "masks must be of the leaves in statistics",
    ),
    (
        lambda: ms.block_by_block([apply], [], BATCHES, lambda *x: (x, x)),
        "got 0 for 1 blocks",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
