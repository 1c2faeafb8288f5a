"""A run that is stopped or killed, and continued, ends as if it had not been.

Equal to the last bit: parameters, batch statistics, optimizer state, masks, moving
average, order of the data, and the metrics written.
"""

import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import pytest

from experiments.config.run import CheckpointConfig, MaskConfig, OptimizerConfig
from experiments.training import loop
from experiments.training.checkpoints import Checkpoints, Progress
from tests.helpers import runs

# An epoch is 18 steps. Evaluations, checkpoints and mask updates mostly fall on
# different steps.
CONFIG = dataclasses.replace(
    runs.CONFIG,
    sparsity=0.8,
    steps=24,
    eval_every=7,
    masks=MaskConfig(interval=3),
    checkpoint=CheckpointConfig(every=5),
)
VARIANTS: dict[str, dict[str, Any]] = {
    "granet": {},
    "snfs": {
        "method": "snfs",
        "optimizer": OptimizerConfig(
            name="adamw",
            learning_rate=1e-3,
            schedule="cyclic",
            warmup_steps=3,
            label_smoothing=0.1,
            accumulate=2,
            ema=0.9,
        ),
    },
    "top-kast": {"method": "top-kast"},
    "acdc": {"method": "acdc", "masks": MaskConfig(cycles=2)},
    "dense": {"method": "dense", "masks": MaskConfig(), "scan_block": 3},
}


@pytest.fixture
def _small(monkeypatch):
    runs.use_small_networks(monkeypatch)


def fit_until(setup: loop.TrainSetup, run: pathlib.Path, stop: int) -> None:
    """Train up to the first step from `stop` on at which training can stop."""
    with pytest.raises(loop.StoppedError, match="with a checkpoint") as caught:
        loop.fit(
            setup, [3], run, stopped=lambda s: signal.SIGTERM if s >= stop else None
        )
    assert caught.value.signal == signal.SIGTERM
    assert runs.saved_steps(run)[-1] >= stop


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_is_stopped_ends_like_one_that_is_not(
    variant, tmp_path, monkeypatch
):
    progress_at: dict[int, Progress] = {}
    save = Checkpoints.save

    def save_and_note(self: Any, step: int, state: Any, progress: Progress) -> None:
        progress_at[step] = progress
        save(self, step, state, progress)

    setup = runs.create_setup(dataclasses.replace(CONFIG, **VARIANTS[variant]))
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_note)
        records, state = loop.fit(setup, [3], tmp_path / "straight")
    assert [record.step for record in records[0]] == [0, 7, 14, 21, 24]
    # A checkpoint has the losses since the last evaluation, and none of later steps,
    # though it is written while they come in.
    assert {step: len(x.losses[0]) for step, x in progress_at.items()} == {
        step: 0 if step == 24 else step % 7 for step in (5, 10, 15, 20, 24)
    }
    run = tmp_path / "stopped"
    # Before, at and after evaluations, checkpoints, updates and the end of the epoch;
    # in the other variants at one of each.
    for stop in (0, 1, 5, 7, 9, 17, 18, 19) if variant == "granet" else (1, 5, 7, 18):
        fit_until(setup, run, stop)
    records_again, state_again = loop.fit(setup, [3], run)
    assert runs.same(state_again, state)
    assert [r._replace(seconds=0) for r in records_again[0]] == [
        r._replace(seconds=0) for r in records[0]
    ]
    assert runs.metrics(run) == runs.metrics(tmp_path / "straight")
    final = [
        runs.restore_state(setup, tmp_path / n, 24) for n in ("straight", "stopped")
    ]
    assert runs.same(*final)
    assert runs.same(final[0], setup.compiled_step.snapshot(state))
    # Training changed everything that was compared.
    initial = jax.device_get(setup.compiled_step.create([3]))
    for name in ("step", "order", "params", "statistics", "opt_state", "average"):
        if name != "average" or variant == "snfs":
            assert not runs.same(getattr(initial, name), getattr(state, name))


FORMS: dict[str, tuple[dict[str, Any], int]] = {
    "jit, 8": ({}, 8),
    "pmap, 8": ({"parallel": "pmap"}, 8),
    "fsdp, 8": ({"fsdp": 4}, 8),
    "jit, 1": ({}, 1),
    "pmap, 4": ({"parallel": "pmap"}, 4),
    "fsdp, 4": ({"fsdp": 2}, 4),
}


def form(name: str) -> loop.TrainSetup:
    changes, devices = FORMS[name]
    config = dataclasses.replace(
        CONFIG, steps=8, method="static", masks=MaskConfig(), **changes
    )
    return runs.create_setup(config, devices)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize(
    ("source", "targets"),
    [
        ("fsdp, 8", ("jit, 1", "pmap, 4")),
        pytest.param("pmap, 8", ("fsdp, 4",), marks=pytest.mark.slow),
        pytest.param("jit, 8", ("jit, 1", "fsdp, 4"), marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_of_8_devices_continues_on_fewer(source, targets, tmp_path):
    setup = form(source)
    fit_until(setup, tmp_path / "run", 5)
    expected = jax.device_get(runs.restore_state(setup, tmp_path / "run", 5))
    assert int(expected.step) == 5
    for name in FORMS:
        state = runs.restore_state(form(name), tmp_path / "run", 5)
        assert runs.same(jax.device_get(state), expected)
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {
            FORMS[name][1]
        }
    ends = {}
    for name in (source, *targets):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        step = form(name).compiled_step
        # The form in which the state is trained holds the same numbers.
        state = runs.restore_state(form(name), tmp_path / "run", 5)
        again = step.snapshot(step.restore(state))
        assert runs.same(jax.device_get(again), expected)
        records, state = loop.fit(form(name), [3], tmp_path / name)
        assert [record.step for record in records[0]] == [0, 7, 8]
        ends[name] = jax.device_get(step.snapshot(state))
    # Sums over devices round differently.
    for name in targets:
        runs.assert_close(ends[name].params, ends[source].params, rtol=1e-4, atol=1e-5)
        assert runs.same(ends[name].opt_state.masks, ends[source].opt_state.masks)


STEPS = 60


def until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Wait for a condition, or for the end of the process."""
    while process.poll() is None and not condition():
        time.sleep(0.005)


def unfinished(run: pathlib.Path) -> set[str]:
    folder = run / "checkpoints"
    names = os.listdir(folder) if folder.exists() else []
    return {name for name in names if not name.isdecimal()}


def test_a_process_that_is_killed_and_stopped_ends_like_one_that_is_not(tmp_path):
    straight, out = tmp_path / "straight", tmp_path / "out"
    config = dataclasses.replace(CONFIG, method="gmp", steps=STEPS, out=out)
    setup = runs.create_setup(config)
    loop.fit(setup, [0], straight)
    run = out / "gmp-seed0"

    def start() -> subprocess.Popen[str]:
        return runs.start(runs.arguments(config), cache=tmp_path / "cache")

    process = start()
    until(process, lambda: bool(unfinished(run)))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    # The kill came while a checkpoint was written.
    assert unfinished(run)

    before = runs.saved_steps(run)
    process = start()
    until(process, lambda: runs.saved_steps(run) not in ([], before))
    process.send_signal(signal.SIGTERM)
    status, errors = runs.end(process)
    last = runs.saved_steps(run)[-1]
    assert 0 < last < STEPS
    assert status == 128 + signal.SIGTERM
    assert errors == (
        f"stopped after step {last}, with a checkpoint.\n"
        f"Go on with the same command and --out {out}\n"
    )
    assert runs.end(start()) == (0, "")

    assert runs.metrics(run) == runs.metrics(straight)
    final = [runs.restore_state(setup, x, STEPS) for x in (run, straight)]
    assert int(final[0].step) == STEPS
    assert runs.same(*final)
    for folder in (run, straight):
        assert runs.saved_steps(folder) == [STEPS - 5, STEPS]
        assert not unfinished(folder)
    assert not list(out.rglob("*.partial"))
    assert (out / "summary.json").exists()
    assert (out / "curves.png").exists()
