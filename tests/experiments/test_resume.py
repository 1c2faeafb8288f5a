"""A run that is stopped, or killed, and gone on with ends as if it had not been.

To the last bit: parameters, batch statistics, optimizer state, masks, moving average,
order of the data, and the metrics written. `GRANET_JAX_KILLS` is the number of kills in
the test that kills (4 by default, to be quick).
"""

import dataclasses
import functools
import os
import pathlib
import random
import signal
import subprocess
import time
from typing import Any

import jax
import numpy as np
import pytest

from experiments import models
from experiments.config.run import CheckpointConfig, Config, MaskConfig, OptimizerConfig
from experiments.training import loop
from experiments.training.checkpoints import Checkpoints, Progress
from tests.helpers import runs
from tests.helpers.profile import NIGHTLY

KILLS = int(os.environ.get("GRANET_JAX_KILLS", "4" if NIGHTLY else "2"))

# An epoch is 18 steps; evaluations, checkpoints and mask updates mostly fall on steps
# of their own.
CONFIG = Config(
    model="lenet-300-100",
    method="granet",
    sparsity=0.8,
    steps=24,
    seeds=1,
    baseline=False,
    progress=False,
    eval_every=7,
    masks=MaskConfig(interval=3),
    checkpoint=CheckpointConfig(every=5),
)
VARIANTS: dict[str, dict[str, Any]] = {
    "granet": {},
    "set": {"method": "set"},
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
    """Networks of any name are small ones."""

    def create(
        name: str, *, classes: int, dtype: Any, axis_name: str | None
    ) -> runs.Small:
        return runs.Small(classes, axis_name)

    monkeypatch.setattr(models, "create", create)


def fit_until(
    maker: loop.TrainSetup, run: pathlib.Path, stop: int
) -> loop.StoppedError:
    """Trains, in a run's folder, up to a step."""

    def stopped(step: int) -> int | None:
        return signal.SIGTERM if step >= stop else None

    with pytest.raises(loop.StoppedError) as caught:
        loop.fit(maker, [3], run, stopped=stopped)
    return caught.value


# --- in one process


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_is_stopped_again_and_again_ends_like_one_that_is_not(
    variant, tmp_path
):
    maker = runs.make(dataclasses.replace(CONFIG, **VARIANTS[variant]))
    records, state = loop.fit(maker, [3], tmp_path / "straight")
    assert [record.step for record in records[0]] == [0, 7, 14, 21, 24]
    run = tmp_path / "stopped"
    # Before, at and after evaluations, checkpoints, updates and the end of the epoch;
    # elsewhere at one of each. In the nightly run after every step.
    stops = (0, 1, 5, 7, 9, 17, 18, 19) if variant == "granet" else (1, 5, 7, 18)
    if NIGHTLY:
        stops = range(24)
    for stop in stops:
        error = fit_until(maker, run, stop)
        assert "with a checkpoint" in str(error)
        assert error.signal == signal.SIGTERM
        assert runs.steps_saved(run)[-1] >= stop
    records_again, state_again = loop.fit(maker, [3], run)
    assert runs.same(state_again, state)
    without_times = [
        [record._replace(seconds=0.0) for record in each[0]]
        for each in (records, records_again)
    ]
    assert without_times[0] == without_times[1]
    assert runs.lines(run) == runs.lines(tmp_path / "straight")
    final = [runs.restored(maker, tmp_path / n, 24) for n in ("straight", "stopped")]
    assert runs.same(*final)
    assert runs.same(final[0], maker.compiled_step.snapshot(state))
    # What the run was compared by is what training changes.
    begun = jax.device_get(maker.compiled_step.create([3]))
    for name in ("step", "order", "params", "statistics", "opt_state", "average"):
        if name != "average" or variant == "snfs":
            assert not runs.same(getattr(begun, name), getattr(state, name))


@pytest.mark.usefixtures("_small")
def test_a_checkpoint_holds_the_losses_since_the_last_evaluation(tmp_path, monkeypatch):
    """And not those of later steps, though it is written while they come in."""
    maker = runs.make(dataclasses.replace(CONFIG, **VARIANTS["dense"]))
    given = {}
    save = Checkpoints.save

    def noting(self: Any, step: int, state: Any, progress: Progress) -> None:
        given[step] = progress
        save(self, step, state, progress)

    monkeypatch.setattr(Checkpoints, "save", noting)
    records, _ = loop.fit(maker, [3], tmp_path)
    assert list(given) == [5, 10, 15, 20, 24]
    for step, progress in given.items():
        (losses,) = progress.losses
        assert len(losses) == (0 if step == 24 else step % 7)
    assert records[0][-1].step == 24


# --- on other devices


FORMS: dict[str, tuple[dict[str, Any], int]] = {
    "jit, 8": ({}, 8),
    "pmap, 8": ({"parallel": "pmap"}, 8),
    "fsdp, 8": ({"fsdp": 4}, 8),
    "jit, 1": ({}, 1),
    "jit, 4": ({}, 4),
    "pmap, 4": ({"parallel": "pmap"}, 4),
    "fsdp, 4": ({"fsdp": 2}, 4),
}


@functools.cache
def form(name: str) -> loop.TrainSetup:
    changes, devices = FORMS[name]
    config = dataclasses.replace(
        CONFIG, steps=8, method="static", masks=MaskConfig(), **changes
    )
    return runs.make(config, devices)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("source", ["jit, 8", "pmap, 8", "fsdp, 8"])
def test_a_checkpoint_of_8_devices_is_gone_on_from_on_1_and_on_4(source, tmp_path):
    maker = form(source)
    fit_until(maker, tmp_path, 5)
    expected = jax.device_get(runs.restored(maker, tmp_path, 5))
    assert int(expected.step) == 5
    for name in FORMS:
        other = form(name).compiled_step
        found = runs.restored(form(name), tmp_path, 5)
        assert runs.same(jax.device_get(found), expected)
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(found)} == {
            FORMS[name][1]
        }
        # And through the form in which it is trained.
        again = other.snapshot(other.restore(found))
        assert runs.same(jax.device_get(again), expected)
    ends = {}
    for name in ("jit, 1", "jit, 4", source):
        records, state = loop.fit(form(name), [3], copied(tmp_path, name))
        assert [record.step for record in records[0]] == [0, 7, 8]
        ends[name] = jax.device_get(form(name).compiled_step.snapshot(state))
    # Sums over devices round differently.
    for name in ("jit, 1", "jit, 4"):
        for found, want in zip(
            jax.tree.leaves(ends[name].params),
            jax.tree.leaves(ends[source].params),
            strict=True,
        ):
            np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
        assert runs.same(ends[name].opt_state.masks, ends[source].opt_state.masks)


def copied(run: pathlib.Path, name: str) -> pathlib.Path:
    target = run.parent / f"{run.name}-{name}"
    subprocess.run(["cp", "-r", run, target], check=True)
    return target


# --- processes of their own

STEPS = 60
ARGUMENTS = [
    *("--model", "lenet-300-100", "--method", "granet", "--seeds", "1"),
    *("--steps", str(STEPS), "--eval-every", "7", "--masks.interval", "3"),
    *("--checkpoint.every", "5", "--no-baseline", "--no-progress"),
]
RUN = "granet-seed0"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[pathlib.Path, float]:
    """A run's folder, and the seconds it took. It compiles all that it runs."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    began = time.monotonic()
    status, errors = runs.end(runs.start([*ARGUMENTS, "--out", str(out)]))
    assert (status, errors) == (0, "")
    return out, time.monotonic() - began


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> pathlib.Path:
    """Where the other processes share what they compile, so as to start quickly."""
    return tmp_path_factory.mktemp("cache")


@functools.cache
def reader() -> loop.TrainSetup:
    """A trainer of the configuration above, to read checkpoints with."""
    return runs.make(
        Config(
            model="lenet-300-100", steps=STEPS, seeds=1, masks=MaskConfig(interval=3)
        )
    )


def assert_same_end(out: pathlib.Path, undisturbed: pathlib.Path) -> None:
    """Asserts that two finished runs are equal to the bit, and nothing lies about."""
    assert runs.lines(out / RUN) == runs.lines(undisturbed / RUN)
    final = [
        runs.restored(reader(), folder / RUN, STEPS) for folder in (out, undisturbed)
    ]
    assert int(final[0].step) == STEPS
    assert runs.same(*final)
    for folder in (out, undisturbed):
        kept = [path.name for path in (folder / RUN / "checkpoints").iterdir()]
        assert {str(STEPS - 5), str(STEPS)} <= set(kept)
        # A kill after the last checkpoint may leave one that was being deleted.
        assert len(kept) == 2 or set(kept) == {"50", "55", "60"}
        assert not list(folder.rglob("*.partial"))
        assert (folder / "summary.json").exists()
        assert (folder / "curves.png").exists()


def test_signals_stop_a_run_with_a_checkpoint(undisturbed, cache, tmp_path):
    out = tmp_path / "out"
    command = [*ARGUMENTS, "--out", str(out)]
    checkpoints = out / RUN / "checkpoints"
    signals = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
    for number, status in signals if NIGHTLY else signals[:1]:
        before = runs.steps_saved(out / RUN) if checkpoints.exists() else []
        process = runs.start(command, cache=cache)
        until(process, lambda b=before: checkpoints.exists() and more(checkpoints, b))
        process.send_signal(number)
        found, errors = runs.end(process)
        last = runs.steps_saved(out / RUN)[-1]
        assert errors == (
            f"stopped after step {last}, with a checkpoint.\n"
            f"Go on with the same command and --out {out}\n"
        )
        assert found == status
        assert 0 < last < STEPS
    assert runs.end(runs.start(command, cache=cache)) == (0, "")
    assert_same_end(out, undisturbed[0])


def test_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not(
    undisturbed, cache, tmp_path
):
    """Half of the kills come at any time, half while a checkpoint is written."""
    rng = random.Random(KILLS)
    kills = {"at any time": 0, "while writing": 0}
    left, ends, seen = 0, 0, []
    while sum(kills.values()) < KILLS:
        out = tmp_path / f"out{ends}"
        command = [*ARGUMENTS, "--out", str(out)]
        checkpoints = out / RUN / "checkpoints"
        while True:
            process = runs.start(command, cache=cache)
            if sum(kills.values()) < KILLS:
                how = min(kills, key=lambda h: kills[h])
                if how == "at any time":
                    time.sleep(rng.uniform(0, 0.8 * undisturbed[1]))
                else:
                    wait_for_writing(process, checkpoints, rng.randrange(4))
                    time.sleep(rng.choice([0, rng.uniform(0, 0.05)]))
                running = process.poll() is None
                process.kill()
                _, errors = process.communicate()
                if running and process.returncode == -signal.SIGKILL:
                    kills[how] += 1
                    left += any(checkpoints.glob("*tmp*"))
                    if checkpoints.exists():
                        seen.append((runs.steps_saved(out / RUN) or [0])[-1])
                    continue
            else:
                _, errors = process.communicate(timeout=300)
            assert (process.returncode, errors) == (0, "")
            break
        assert_same_end(out, undisturbed[0])
        ends += 1
    print(
        f"{kills}, of which {left} left an unfinished checkpoint; {ends} runs; {seen}"
    )
    assert kills["at any time"] + kills["while writing"] == KILLS
    assert left > 0


def more(checkpoints: pathlib.Path, before: list[int]) -> bool:
    return any(int(n) not in before for n in names(checkpoints) if n.isdecimal())


def names(folder: pathlib.Path) -> list[str]:
    return os.listdir(folder) if folder.exists() else []


def wait_for_writing(
    process: subprocess.Popen[str], checkpoints: pathlib.Path, skipped: int
) -> None:
    """Waits until a new checkpoint is being written, after so many others."""
    unfinished = {n for n in names(checkpoints) if not n.isdecimal()}
    number = len(unfinished) + skipped
    until(
        process,
        lambda: (
            unfinished.update(n for n in names(checkpoints) if not n.isdecimal())
            or len(unfinished) > number
        ),
    )


def until(process: subprocess.Popen[str], condition: Any) -> None:
    """Waits for a condition, or the end of the process."""
    while process.poll() is None and not condition():
        time.sleep(0.0005)
