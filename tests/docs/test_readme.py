"""The README is one page, its blocks run, and they do what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import granet_jax
from tests.helpers.blocks import ROOT, python_blocks, run

README = ROOT / "README.md"
USE, OWN_METHOD = python_blocks(README)


def test_readme_is_one_page_with_its_commands():
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    for command in (
        "pip install -e '.[experiments]'\n    .venv/bin/python -m experiments.train\n",
        "pip install -e '.[dev]' && .venv/bin/python -m pytest -n 2\n",
    ):
        assert f"    python3 -m venv .venv && .venv/bin/{command}" in text


def test_ten_lines_reach_the_sparsity_exactly():
    x = jax.random.normal(jax.random.key(0), (64, 30))
    params = {"w": jnp.full((30, 7), 0.1), "b": jnp.zeros(7)}
    scope = run(
        USE.replace("1_000, interval=50", "20, interval=2"),
        {
            "params": params,
            "loss": lambda p, x: jnp.mean((x @ p["w"] - x[:, :7]) ** 2),
        },
        "README.md",
    )
    state = scope["opt_state"]
    for _ in range(20):
        params, state = scope["train_step"](params, state, x)
    (mask,) = jax.tree.leaves(granet_jax.get_masks(state))
    report = granet_jax.sparsity(granet_jax.get_masks(state))
    assert (report.active, report.total) == (21, 210)
    assert not np.any(np.asarray(params["w"])[~np.asarray(mask)])


def test_own_method_is_short_and_drops_by_its_own_score():
    assert len([line for line in OWN_METHOD.splitlines() if line.strip()]) < 15
    method = run(OWN_METHOD, {}, "README.md")["method"]
    params = {"w": np.asarray([[4.0, 1.0, 2.0, 3.0]], np.float32)}
    grads = {"w": np.asarray([[0.1, 5.0, 1.0, 1.0]], np.float32)}
    tx = granet_jax.transform(method, inner=optax.sgd(0.0))
    opt_state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(method.updates.last):
        _, opt_state = update(grads, opt_state, params)
    # |w g| is 0.4, 5, 2, 3, so the second and fourth are kept, where
    # magnitude would keep the first and fourth.
    masks = granet_jax.get_masks(opt_state)
    np.testing.assert_array_equal(masks["w"], [[False, True, False, True]])
