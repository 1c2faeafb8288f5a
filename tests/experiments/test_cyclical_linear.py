"""The study of sparse linear models, reduced, against plain loops in NumPy."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from experiments import cyclical_linear as study

CONFIG = study.Config(
    nonzeros=(9,), correlations=(0.0,), equations=30, features=60, steps=400, seeds=6
)
SPARSITY = 1 - 9 / 60


@functools.cache
def problems() -> study.Problem:
    problems_of_seeds = [
        study.draw(CONFIG, 9, 0.0, seed) for seed in range(CONFIG.seeds)
    ]
    return study.Problem(
        *(np.stack(parts) for parts in zip(*problems_of_seeds, strict=True))
    )


@functools.cache
def outcome(recovery: str, cycles: int) -> study.Outcome:
    name = study.row_name(recovery, cycles)
    method = study.methods(SPARSITY, CONFIG.steps)[name]
    run = jax.jit(jax.vmap(study.trainer(method, CONFIG.steps)))
    return study.Outcome(*jax.device_get(run(problems())))


def largest(score: np.ndarray, number: int) -> np.ndarray:
    mask = np.zeros(score.size, bool)
    mask[np.argsort(-score, kind="stable")[:number]] = True
    return mask


def by_loops(seed: int, recovery: str, cycles: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights at the end, and those wrongly pruned at the end of the first cycle."""
    gram, cross, truth, rate = (np.float64(x[seed]) for x in problems())
    period, d = CONFIG.steps // cycles, truth.size

    def number(t: int) -> int:
        share = min((min(t, CONFIG.steps - 1) % period) / (0.75 * period), 1.0)
        return d - round(SPARSITY * (1 - (1 - share) ** 3) * d)

    w, mask, wrong = np.zeros(d), np.ones(d, bool), np.zeros(d, bool)
    for t in range(1, CONFIG.steps + 1):
        if t == period:
            wrong = (truth != 0) & ~mask
        gradient = gram @ np.where(mask, w, 0) - cross
        w = w - rate * (np.where(mask, gradient, 0) if recovery == "hard" else gradient)
        if recovery == "hard" and t % period == 0 and t < CONFIG.steps:
            mask = np.ones(d, bool)
        elif recovery == "hard":
            mask = largest(np.where(mask, abs(w), -1.0), number(t)) & mask
        else:
            mask = largest(abs(w), number(t))
        if recovery != "straight_through":
            w = np.where(mask, w, 0)
    return np.where(mask, w, 0), wrong


@pytest.mark.parametrize(
    ("recovery", "cycles"),
    [("hard", 1), ("hard", 4), ("projected", 4), ("straight_through", 2)],
)
def test_runs_are_those_of_plain_loops(recovery: str, cycles: int) -> None:
    actual = outcome(recovery, cycles)
    loops = [by_loops(seed, recovery, cycles) for seed in range(CONFIG.seeds)]
    same = [
        np.array_equal(f != 0, e != 0) and np.allclose(f, e, rtol=1e-3, atol=1e-3)
        for f, (e, _) in zip(actual.weights, loops, strict=True)
    ]
    # Single and double precision may part where magnitudes all but tie.
    assert sum(same) >= CONFIG.seeds - 1
    measures = study.measure(problems().truth, actual, cycles)
    if cycles > 1:
        shares = [float(wrong.sum()) / 9 for _, wrong in loops]
        np.testing.assert_allclose(measures["wrong"], shares, atol=1.5 / 9)
        assert sum(shares) > 0
        # Some of the true support comes back, as in no plain run.
        assert measures["recovered"] > 0
    if (recovery, cycles) == ("hard", 4):
        once = study.measure(problems().truth, outcome("hard", 1), 1)
        assert np.mean(measures["support"]) > np.mean(once["support"])
        assert np.mean(measures["relative_error"]) < np.mean(once["relative_error"])


def test_measures_by_hand() -> None:
    truth = np.array([[1.0, -1.0, 2.0, 0.0, 0.0, 0.0]], np.float32)
    masks = np.zeros((1, 8, 6), bool)
    masks[:, 3] = [True, False, False, True, True, False]
    masks[:, 7] = [True, True, False, True, False, False]
    weights = np.array([[1.0, -1.0, 0.0, 0.0, 0.0, 0.0]], np.float32)
    actual = study.measure(truth, study.Outcome(weights, masks), cycles=2)
    assert actual.pop("relative_error") == pytest.approx([2 / 6**0.5])
    assert actual == {
        "support": [2 / 3],
        "exact": [False],
        "wrong": [2 / 3],
        "recovered": 0.5,
        "revived": [1 / 3],
    }
    perfect = study.Outcome(truth, masks[:, [7] * 8] | (truth != 0)[:, None])
    actual = study.measure(truth, perfect, cycles=1)
    assert (actual["support"], actual["exact"], actual["recovered"]) == (
        [1],
        [True],
        None,
    )


def test_a_problem_is_what_it_says() -> None:
    config = study.Config(nonzeros=(5,), equations=400, features=20)
    problem = study.draw(config, 5, 0.8, seed=3)
    size = abs(problem.truth[problem.truth != 0])
    assert size.size == 5
    assert 1 <= size.min() <= size.max() <= 2
    np.testing.assert_allclose(problem.cross, problem.gram @ problem.truth, rtol=1e-4)
    eigenvalue = np.linalg.norm(problem.gram, 2)
    assert float(problem.rate) == pytest.approx(1 / eigenvalue, rel=1e-5)
    # Neighbours correlate by 0.8, the next by 0.64; 400 rows give them to about 0.05.
    covariance = [np.mean(np.diag(problem.gram, i)) for i in range(3)]
    assert covariance == pytest.approx([1, 0.8, 0.64], abs=0.12)


def test_results_are_written(tmp_path: pathlib.Path) -> None:
    config = study.Config(nonzeros=(20,), seeds=2, out=tmp_path / "new")
    measures = {
        "support": [0.5, 1.0],
        "exact": [False, True],
        "relative_error": [0.25, 0.0],
        "wrong": [0.5, 0.5],
        "recovered": 0.75,
        "revived": [0.125, 0.0],
    }
    rows = dict.fromkeys(study.methods(0.9, 64), measures)
    results = {study.setting_name(20, rho): rows for rho in config.correlations}
    study.write(config, results, seconds=1.0)
    text = (config.out / "results.md").read_text()
    assert text.count("0.750 ± 0.354 / 0.50 / 0.125") == 14 * len(results)
    written = json.loads((config.out / "results.json").read_text())
    assert written["results"]["k=20, rho=0"]["IHT"] == measures
    assert (config.out / "recovery.png").read_bytes().startswith(b"\x89PNG")
