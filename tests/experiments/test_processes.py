"""Two processes on one machine train as one process with two devices does.

They talk over loopback, by Gloo. A process that hangs ignores SIGTERM, which JAX takes
for the notice of a pre-emption. So all waiting has a limit, after which it is killed.
"""

import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import pytest

from experiments.config.run import CheckpointConfig, Config, MaskConfig
from experiments.training import loop
from tests.helpers import runs

CONFIG = dataclasses.replace(
    runs.CONFIG,
    steps=40,
    eval_every=15,
    masks=MaskConfig(interval=4),
    checkpoint=CheckpointConfig(every=10),
)
RUN = "granet-seed0"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("cache")


def start_pair(
    cache: pathlib.Path, out: pathlib.Path, config: Config = CONFIG
) -> list[subprocess.Popen[str]]:
    """Two processes of one device each, as one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    pair = {"distributed.coordinator": coordinator, "distributed.processes": 2}
    configs = [
        runs.replace_options(config, {"out": out, "distributed.process": i} | pair)
        for i in range(2)
    ]
    return [runs.start(runs.arguments(x), cache=cache) for x in configs]


def end_pair(
    processes: list[subprocess.Popen[str]], seconds: float = 240
) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of each; nothing is left running."""
    limit = time.monotonic() + seconds
    results = []
    try:
        for process in processes:
            left = max(0.1, limit - time.monotonic())
            texts = process.communicate(timeout=left)
            # Gloo says on standard output that it is connected.
            out, err = (
                "".join(x for x in text.splitlines(True) if not x.startswith("[Gloo]"))
                for text in texts
            )
            results.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return results


def assert_trained_alike(
    out: pathlib.Path, tmp_path: pathlib.Path, config: Config
) -> Any:
    """Assert that a run of two processes is that of two devices; the final state."""
    setup = runs.create_setup(config, devices=2)
    _, state = loop.fit(setup, [0], tmp_path / RUN)
    expected = setup.compiled_step.snapshot(state)
    saved = runs.restore_state(setup, out / RUN, setup.config.steps)
    assert int(saved.step) == setup.config.steps
    assert runs.same(saved, expected)
    assert runs.metrics(out / RUN) == runs.metrics(tmp_path / RUN)
    return jax.device_get(expected)


def test_parameters_sharded_over_two_processes_are_read_by_one(cache, tmp_path):
    out = tmp_path / "out"
    config = dataclasses.replace(CONFIG, fsdp=2)
    results = end_pair(start_pair(cache, out, config))
    assert [(status, errors) for status, _, errors in results] == [(0, ""), (0, "")]
    # Only the first process prints and writes metrics.
    assert "Results in" in results[0][1]
    assert results[1][1] == ""
    state = assert_trained_alike(out, tmp_path, config)
    # Each process wrote its half.
    parts = [path.name for path in (out / RUN).rglob("ocdbt.process_*")]
    assert set(parts) == {"ocdbt.process_0", "ocdbt.process_1"}
    alone = runs.restore_state(runs.create_setup(CONFIG), out / RUN, 40)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(alone)} == {1}
    assert runs.same(jax.device_get(alone), state)


def test_a_process_that_cannot_start_stops_the_other(cache, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("words")
    (status, _, error), (other_status, _, other_error) = end_pair(
        start_pair(cache, out), seconds=120
    )
    assert (status, other_status) == (2, 2)
    assert error.startswith(f"error: out: {out} already exists")
    assert other_error == "error: process 0 cannot start: see its message.\n"
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def longer(steps: int) -> Config:
    """A run that has not ended when a signal arrives.

    A call has several steps, so training cannot stop at every step.
    """
    return dataclasses.replace(
        CONFIG,
        steps=steps,
        eval_every=steps * 3 // 8,
        scan_block=5,
        masks=MaskConfig(interval=steps // 10),
        checkpoint=CheckpointConfig(every=steps // 4),
    )


def wait_until(
    processes: list[subprocess.Popen[str]], condition: Callable[[], bool]
) -> None:
    limit = time.monotonic() + 120
    while not condition() and time.monotonic() < limit:
        assert {process.poll() for process in processes} == {None}
        time.sleep(0.005)


@pytest.mark.parametrize(
    "moment", ["training", pytest.param("writing", marks=pytest.mark.slow)]
)
def test_a_process_that_is_killed_ends_the_other_and_they_continue_exactly(
    moment, cache, tmp_path
):
    config, out = longer(800), tmp_path / "out"
    checkpoints = out / RUN / "checkpoints"

    def has_come() -> bool:
        if moment == "writing":
            names = os.listdir(checkpoints) if checkpoints.exists() else []
            return any(name.startswith("200.") for name in names)
        # The next checkpoint is written after 400 steps.
        metrics = out / RUN / "metrics.jsonl"
        return metrics.exists() and '"step": 300' in metrics.read_text()

    processes = start_pair(cache, out, config)
    wait_until(processes, has_come)
    processes[1].kill()
    # JAX gives up on a process that it has missed for 100 seconds.
    (status, printed, errors), (killed, _, _) = end_pair(processes, seconds=150)
    assert (killed, printed) == (-signal.SIGKILL, "")
    # The error of a checkpoint, ours, or JAX's, whichever comes first.
    message = {
        2: "see whether all processes run",
        3: "the connection to the other processes broke",
        -signal.SIGABRT: "another task died",
    }[status]
    assert message in errors
    assert "Traceback" not in errors
    results = end_pair(start_pair(cache, out, config))
    assert [(status, errors) for status, _, errors in results] == [(0, ""), (0, "")]
    assert_trained_alike(out, tmp_path, config)


@pytest.mark.slow
def test_a_pre_emption_stops_both_at_one_step_and_they_continue_exactly(
    cache, tmp_path
):
    config, out = longer(2400), tmp_path / "out"
    processes = start_pair(cache, out, config)
    first = out / RUN / "checkpoints" / "600"
    wait_until(processes, first.exists)
    processes[0].send_signal(signal.SIGTERM)
    results = end_pair(processes)
    last = runs.saved_steps(out / RUN)[-1]
    assert 600 <= last < 2400
    for status, printed, errors in results:
        assert (status, printed) == (143, "")
        # The service that took the signal says so, in process 0.
        assert errors.endswith(
            f"stopped after step {last}, with a checkpoint.\n"
            f"Go on with the same command and --out {out}\n"
        )
        assert "Traceback" not in errors
    assert not (out / "summary.json").exists()
    results = end_pair(start_pair(cache, out, config))
    assert [(status, errors) for status, _, errors in results] == [(0, ""), (0, "")]
    # Each start writes one file of events.
    assert len(list((out / RUN).glob("events.*"))) == 2
    assert (out / "summary.json").exists()
    assert_trained_alike(out, tmp_path, config)
