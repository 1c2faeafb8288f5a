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

FIRST = Config(
    model="lenet-300-100",
    method="granet",
    sparsity=0.8,
    steps=8,
    eval_every=4,
    seed=1,
    seeds=2,
    masks=MaskConfig(interval=2),
    baseline=False,
    progress=False,
)


@pytest.fixture(autouse=True, scope="module")
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        runs.use_small_networks(patch)
        runs.share_setups(patch)
        yield


@pytest.fixture(scope="module", params=[False, True], ids=["apart", "vmap"])
def first(request, tmp_path_factory) -> Config:
    """A finished run of two seeds."""
    out = tmp_path_factory.mktemp("first") / "run"
    config = dataclasses.replace(FIRST, out=out, vmap_seeds=request.param)
    train.run(config)
    return config


def result(config: Config, seed: int) -> TrainState:
    """The last state of a seed of a finished run."""
    assert config.out is not None
    lanes = "seeds1-2" if config.vmap_seeds else f"seed{seed}"
    run = config.out / f"{config.method}-{lanes}"
    setup = runs.create_setup(config)
    state = jax.device_get(runs.restore_state(setup, run, config.steps))
    if config.vmap_seeds:
        pick = (state.params, state.statistics, state.opt_state.masks)
        params, statistics, masks = jax.tree.map(lambda x: x[seed - 1], pick)
        opt_state = state.opt_state._replace(masks=masks)
        return state._replace(params=params, statistics=statistics, opt_state=opt_state)
    return state


def start(config: Config, first: Config, seeds: list[int]) -> TrainState:
    config = dataclasses.replace(config, init_from=first.out)
    step = runs.create_setup(config).compiled_step
    return jax.device_get(step.snapshot(initial_state.state(step, seeds)))


@pytest.mark.parametrize("method", ["static", "rigl"])
def test_a_run_starts_from_the_weights_statistics_and_masks(first, method):
    second = dataclasses.replace(FIRST, method=method, masks=MaskConfig())
    for seed in (1, 2):
        state, expected = start(second, first, [seed]), result(first, seed)
        assert runs.same(
            (state.params, state.statistics, state.opt_state.masks),
            (expected.params, expected.statistics, expected.opt_state.masks),
        )
        # It is a new training: step 0, and fresh moments.
        assert (state.step, state.opt_state.count) == (0, 0)
        assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state.inner_state))


def test_several_seeds_at_once_start_from_their_own_results(first):
    second = dataclasses.replace(FIRST, method="static", masks=MaskConfig())
    state = start(dataclasses.replace(second, vmap_seeds=True), first, [1, 2])
    for lane in (0, 1):
        held = (state.params, state.statistics, state.opt_state.masks)
        expected = result(first, lane + 1)
        assert runs.same(
            jax.tree.map(lambda x, i=lane: x[i], held),
            (expected.params, expected.statistics, expected.opt_state.masks),
        )


def test_training_goes_on_with_the_masks(first, tmp_path):
    """Further with the same masks, and further pruned; no dense run comes along."""
    further = MaskConfig(interval=2, initial_sparsity=0.8)
    for method, sparsity, masks in (("static", 0.8, None), ("gmp", 0.9, further)):
        second = dataclasses.replace(
            FIRST,
            method=method,
            sparsity=sparsity,
            masks=masks or MaskConfig(),
            steps=12,
            seeds=1,
            baseline=True,
            init_from=first.out,
            out=tmp_path / method,
        )
        (own,) = train.run(second)
        assert own.last[0].step == 12
        assert own.last[0].sparsity.overall == pytest.approx(sparsity, abs=1e-3)
        before, after = result(first, 1), result(second, 1)
        for old, new in zip(
            jax.tree.leaves(before.opt_state.masks),
            jax.tree.leaves(after.opt_state.masks),
            strict=True,
        ):
            assert not np.any(new & ~old)
        assert not runs.same(before.params, after.params)


def test_a_dense_run_is_pruned_at_once_or_gradually(tmp_path):
    dense = dataclasses.replace(
        FIRST, method="dense", masks=MaskConfig(), seeds=1, out=tmp_path / "dense"
    )
    train.run(dense)
    params = result(dense, 1).params
    gradual = dataclasses.replace(FIRST, method="gmp")
    assert runs.same(start(gradual, dense, [1]).params, params)
    once = dataclasses.replace(FIRST, method="static", masks=MaskConfig())
    with pytest.raises(ValueError, match=r"trained densely, and static starts .* 0.8:"):
        start(once, dense, [1])
    once = dataclasses.replace(once, masks=MaskConfig(source="magnitude"))
    state = start(once, dense, [1])
    masks = granet_jax.mask_sources.magnitude(params, 0.8)
    assert runs.same(state.opt_state.masks, jax.device_get(masks))
    pruned = granet_jax.apply_masks(params, masks)
    assert runs.same(state.params, jax.device_get(pruned))


def test_results_that_do_not_fit_are_refused(first, tmp_path):
    static = dataclasses.replace(FIRST, method="static", masks=MaskConfig())

    def refused(message: str, seed: int = 1, run: Any = first, **changes: Any) -> None:
        with pytest.raises((ValueError, OSError), match=message):
            start(dataclasses.replace(static, **changes), run, [seed])

    refused("ended at sparsity 0.8, and static starts at 0.9", sparsity=0.9)
    refused("has no run of method granet and seed 3", seed=3)
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
