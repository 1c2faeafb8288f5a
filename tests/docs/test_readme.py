"""Every Python block of the README runs, and its numbers are as it says."""

from typing import Any

import jax
import numpy as np
import optax
import pytest

import granet_jax
from tests.helpers.blocks import ROOT, python_blocks, run

README = ROOT / "README.md"
BLOCKS = python_blocks(README)


def run_block(marker: str, scope: dict[str, Any] | None = None) -> dict[str, Any]:
    """Runs the one block that contains `marker` and returns its variables."""
    (block,) = [b for b in BLOCKS if marker in b]
    return run(block, {} if scope is None else scope, f"README.md: {marker}")


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return run_block("load_digits")


def test_no_block_is_left_out():
    markers = ("load_digits", "def saliency(", "orbax", "synflow(", "rescale_init(")
    markers += ("cyclical(", "sparse_view(", "two_of_four", "analysis.prune(")
    markers += ("analysis.summary(", "analysis.training_flops(", "plots.densities(")
    markers += ("memory_analysis", "export.save(", "accelerate(")
    assert len(BLOCKS) == len(markers)
    for marker in markers:
        assert sum(marker in b for b in BLOCKS) == 1


def test_example_reaches_its_sparsity_exactly(example: dict[str, Any]):
    masks = granet_jax.get_masks(example["opt_state"])
    kernels = 64 * 128 + 128 * 128 + 128 * 10
    active = sum(int(m.sum()) for m in jax.tree.leaves(masks))
    assert active == (kernels + 5) // 10  # 90% sparsity, rounded to nearest
    nonzero = [np.count_nonzero(p) for p in jax.tree.leaves(example["params"]["w"])]
    assert sum(nonzero) <= active
    for p, m in zip(example["params"]["w"], masks["w"], strict=True):
        assert not np.any(np.asarray(p)[~np.asarray(m)])


def test_example_learns(example: dict[str, Any]):
    # Ten classes: chance is 0.1, and a linear classifier reaches about 0.9.
    assert example["accuracy"] > 0.93


def test_own_method_fits_in_fifteen_lines():
    (block,) = [b for b in BLOCKS if "def saliency(" in b]
    assert len([line for line in block.splitlines() if line.strip()]) < 15


def test_own_method_drops_by_its_own_score():
    scope = run_block("def saliency(")
    method = scope["method"]
    params = {"w": np.asarray([[4.0, 1.0, 2.0, 3.0]], np.float32)}
    grads = {"w": np.asarray([[0.1, 5.0, 1.0, 1.0]], np.float32)}
    tx = granet_jax.transform(method, inner=optax.sgd(0.0))
    opt_state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(method.updates.last):
        _, opt_state = update(grads, opt_state, params)
    # |w g| is 0.4, 5, 2, 3: at half of the weights the second and fourth stay, where
    # magnitude alone would keep the first and fourth.
    masks = granet_jax.get_masks(opt_state)
    np.testing.assert_array_equal(masks["w"], [[False, True, False, True]])


def test_masks_have_the_sparsity_asked_for(example: dict[str, Any]):
    scope = run_block("synflow(", dict(example))
    total = 64 * 128 + 128 * 128 + 128 * 10
    state = scope["tx_static"].init(scope["params"])
    report = granet_jax.sparsity(granet_jax.get_masks(state))
    assert (report.active, report.total) == ((total + 10) // 20, total)
    scope = run_block("rescale_init(", scope)
    for scale in scope["rescaled"].scales["w"]:
        assert float(scale) != 1
    x = np.linspace(-3, 3, 13, dtype=np.float32)
    quarter = scope["STEPS"] // 4
    np.testing.assert_array_equal(scope["soft"](x, quarter), np.maximum(x, 0))
    assert np.any(scope["soft"](x, quarter - 1) != np.maximum(x, 0))


def test_checkpoint_restores_every_bit(example: dict[str, Any]):
    scope = run_block("orbax", dict(example))
    saved = jax.tree.leaves_with_path(example["opt_state"])
    restored = jax.tree.leaves_with_path(scope["restored"])
    assert [path for path, _ in saved] == [path for path, _ in restored]
    for (_, a), (_, b) in zip(saved, restored, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_cyclical_pruning_ends_sparse():
    scope = run_block("cyclical(")
    (block,) = [b for b in BLOCKS if "cyclical(" in b]
    assert "sparsity=0.95, total_steps=steps" in block
    params = {"w": np.ones((20, 10), np.float32)}
    state = granet_jax.get_state(scope["tx"].init(params))
    assert int(state.masks["w"].sum()) == 200


def test_the_view_is_sparse_and_the_weights_are_dense():
    scope = run_block("sparse_view(")
    (mask,) = jax.tree.leaves(granet_jax.get_masks(scope["opt_state"]))
    weights, sparse = scope["params"]["w"], scope["exported"]["w"]
    assert int(mask.sum()) == 32
    np.testing.assert_array_equal(sparse, np.where(mask, weights, 0))
    # The largest of all.
    sizes = np.abs(np.asarray(weights))
    assert sizes[np.asarray(mask)].min() >= sizes[~np.asarray(mask)].max()


def test_structures_have_their_form():
    scope = run_block("two_of_four")
    params = {"w": np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)}
    tx = granet_jax.transform(scope["srigl"], optax.sgd(0.1))
    (mask,) = jax.tree.leaves(granet_jax.get_masks(tx.init(params)))
    # A tenth of sixteen inputs, rounded.
    assert np.asarray(mask).sum(0).tolist() == [2] * 8
    (mask,) = jax.tree.leaves(granet_jax.init_masks(scope["blocks"], params))
    assert np.asarray(mask).all()
    for name in ("two_of_four", "sr_ste"):
        assert scope[name].structure.name == granet_jax.structures.n_of_m(2, 4).name


def test_a_pruned_network_recovers():
    scope = run_block("analysis.prune(")
    (size, active) = (
        sum(m.size for m in jax.tree.leaves(scope["full"])),
        int(scope["keep"]),
    )
    assert active == (size + 5) // 10  # 90% sparsity, rounded to nearest
    for tree in (scope["pruned"].masks, scope["tx"].init(scope["start"]).masks):
        assert sum(int(m.sum()) for m in jax.tree.leaves(tree)) == active
    for name in ("start", "sparse"):
        for p, m in zip(
            *map(jax.tree.leaves, (scope[name], scope["pruned"].masks)), strict=True
        ):
            assert not np.any(np.asarray(p)[~np.asarray(m)])
    found = scope["found"]
    assert found.pruned < found.before
    assert found.regained > 0
    assert found.plasticity == found.after - found.before


def test_tables_and_plots_are_as_said(capsys, tmp_path, monkeypatch):
    scope = run_block("analysis.summary(")
    printed = capsys.readouterr().out
    for line in str(scope["table"]).splitlines():
        assert line in printed
        assert f"    {line}\n" in README.read_text()
    run_block("analysis.training_flops(", scope)
    assert "outputs reached: True" in capsys.readouterr().out
    assert 0 < scope["explored"] < 1
    monkeypatch.chdir(tmp_path)
    run_block("plots.densities(", scope)
    assert (tmp_path / "densities.png").stat().st_size > 1000


def test_an_update_is_compiled_from_shapes(capsys):
    scope = run_block("memory_analysis")
    assert isinstance(scope["params"]["kernel"], jax.ShapeDtypeStruct)
    # A key and two masks a weight.
    assert 0 < int(capsys.readouterr().out) < 9 * 4096**2


def test_files_and_formats_have_the_active_weights():
    scope = run_block("export.save(")
    for name in ("hidden", "out"):
        np.testing.assert_array_equal(
            scope["loaded"][name]["w"], scope["sparse"][name]["w"]
        )
    dense = np.asarray(scope["sparse"]["hidden"]["w"])
    np.testing.assert_array_equal(scope["csr"].toarray(), dense)
    np.testing.assert_array_equal(scope["bcoo"].todense(), dense)
    run_block("accelerate(", scope)
    assert scope["fast"]["hidden"]["w"].values.size == np.count_nonzero(dense)
