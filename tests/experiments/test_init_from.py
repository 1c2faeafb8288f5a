"""Runs that start from the result of a finished one."""

import dataclasses
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

import granet_jax
from experiments import train
from experiments.config.run import Config, MaskConfig
from experiments.training import initial_state
from experiments.training.step import TrainState
from tests.helpers import runs

FIRST = dataclasses.replace(
    runs.CONFIG,
    method="gmp",
    sparsity=0.8,
    steps=8,
    eval_every=4,
    seed=1,
    seeds=2,
    masks=MaskConfig(interval=2),
)
STATIC = dataclasses.replace(FIRST, method="static", masks=MaskConfig())


@pytest.fixture(autouse=True, scope="module")
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        runs.use_small_networks(patch)
        runs.share_setups(patch)
        yield


def finished(out: pathlib.Path, **changes: Any) -> Config:
    config = dataclasses.replace(FIRST, out=out, **changes)
    train.run(config)
    return config


@pytest.fixture(scope="module")
def first(_small, tmp_path_factory) -> Config:
    """A finished run of two seeds."""
    return finished(tmp_path_factory.mktemp("first") / "run")


def result(config: Config, seed: int) -> tuple[Any, Any, Any]:
    """The last parameters, statistics and masks of a seed of a finished run."""
    assert config.out is not None
    lanes = "seeds1-2" if config.vmap_seeds else f"seed{seed}"
    run = config.out / f"{config.method}-{lanes}"
    state = runs.restore_state(runs.create_setup(config), run, config.steps)
    return held(state, seed - 1 if config.vmap_seeds else None)


def held(state: TrainState, lane: int | None = None) -> tuple[Any, Any, Any]:
    parts = (state.params, state.statistics, getattr(state.opt_state, "masks", None))
    return jax.tree.map(lambda x: np.asarray(x if lane is None else x[lane]), parts)


def start(config: Config, first: Config, seeds: list[int]) -> TrainState:
    config = dataclasses.replace(config, init_from=first.out)
    step = runs.create_setup(config).compiled_step
    return jax.device_get(step.snapshot(initial_state.state(step, seeds)))


def test_runs_start_from_the_weights_statistics_and_masks_of_their_seeds(
    first, tmp_path
):
    at_once = finished(tmp_path / "at_once", vmap_seeds=True)
    assert not runs.same(result(first, 1), result(first, 2))
    rigl = dataclasses.replace(STATIC, method="rigl")
    for source, config in ((first, rigl), (at_once, STATIC)):
        state = start(config, source, [2])
        assert runs.same(held(state), result(source, 2))
        # It is a new training: step 0, and fresh moments.
        assert (state.step, state.opt_state.count) == (0, 0)
        assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state.inner_state))
        both = start(dataclasses.replace(STATIC, vmap_seeds=True), source, [1, 2])
        for lane in (0, 1):
            assert runs.same(held(both, lane), result(source, lane + 1))


def test_training_goes_on_with_the_masks(first, tmp_path):
    """Further with the same masks, and further pruned; no dense run comes along."""
    further = MaskConfig(interval=2, initial_sparsity=0.8)
    for method, sparsity, masks in (("static", 0.8, None), ("gmp", 0.9, further)):
        second = dataclasses.replace(
            FIRST,
            method=method,
            sparsity=sparsity,
            masks=masks or MaskConfig(),
            seeds=1,
            baseline=True,
            init_from=first.out,
            out=tmp_path / method,
        )
        (own,) = train.run(second)
        assert own.last[0].step == 8
        assert own.last[0].sparsity.overall == pytest.approx(sparsity, abs=1e-3)
        before, after = result(first, 1), result(second, 1)
        for old, new in zip(*map(jax.tree.leaves, (before[2], after[2])), strict=True):
            assert not np.any(new & ~old)
        assert not runs.same(before[0], after[0])


def test_a_dense_run_is_pruned_at_once_or_gradually(tmp_path):
    dense = finished(tmp_path / "run", method="dense", masks=MaskConfig(), seeds=1)
    params = result(dense, 1)[0]
    assert runs.same(start(FIRST, dense, [1]).params, params)
    with pytest.raises(ValueError, match=r"trained densely, and static starts .* 0.8:"):
        start(STATIC, dense, [1])
    once = dataclasses.replace(STATIC, masks=MaskConfig(source="magnitude"))
    masks = granet_jax.mask_sources.magnitude(params, 0.8)
    pruned = granet_jax.apply_masks(params, masks)
    weights, _, used = held(start(once, dense, [1]))
    assert runs.same((weights, used), jax.device_get((pruned, masks)))


def test_results_that_do_not_fit_are_refused(first, tmp_path):
    def refused(message: str, seed: int = 1, run: Any = first, **changes: Any) -> None:
        with pytest.raises((ValueError, OSError), match=message):
            start(dataclasses.replace(STATIC, **changes), run, [seed])

    refused("ended at sparsity 0.8, and static starts at 0.9", sparsity=0.9)
    refused("has no run of method gmp and seed 3", seed=3)
    refused("is of another network: BatchNorm_0/bias is", model="cnn")
    assert first.out is not None
    copy = pathlib.Path(shutil.copytree(first.out, tmp_path / "copy"))
    for last in copy.glob("*/checkpoints/8"):
        shutil.rmtree(last)
    unfinished = dataclasses.replace(first, out=copy)
    refused("is not finished: it has no checkpoint of its last step, 8", run=unfinished)
    refused(
        "has no config.json: give the --out",
        run=dataclasses.replace(first, out=tmp_path),
    )
