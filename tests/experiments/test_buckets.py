"""Runs in a bucket are those on disk, killed and stopped or not."""

import dataclasses
import signal
import subprocess
from typing import Any

import pytest
from etils import epath

from experiments.config.run import CheckpointConfig, Config, MaskConfig
from experiments.data import preparation
from experiments.training import loop
from tests.helpers import runs
from tests.helpers.bucket import running_bucket

CONFIG = dataclasses.replace(
    runs.CONFIG,
    method="gmp",
    steps=20,
    eval_every=7,
    masks=MaskConfig(interval=3),
    checkpoint=CheckpointConfig(every=6),
)
OUT = "gs://bucket/runs/first"


@pytest.fixture
def bucket(monkeypatch):
    with running_bucket() as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        yield bucket


@pytest.fixture
def start(tmp_path):
    """Starts training with a configuration."""
    return lambda config: runs.start(runs.arguments(config), cache=tmp_path / "cache")


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    """Wait for a process that ends with `status`, and return what it printed."""
    output, errors = process.communicate(timeout=240)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    return output + errors


def test_a_run_that_is_killed_and_stopped_ends_like_one_on_disk(
    bucket, start, tmp_path
):
    config = dataclasses.replace(CONFIG, out=epath.Path(OUT))
    setup = runs.create_setup(config)
    loop.fit(setup, [0], tmp_path / "straight")

    # A checkpoint is about 40 requests.
    for changes in (3, 25, 60):
        process = start(config)
        bucket.call_after(changes, process.kill)
        process.communicate(timeout=240)
        assert process.returncode == -signal.SIGKILL

    process = start(config)
    bucket.call_after(60, process.terminate)
    printed = finish(process, 128 + signal.SIGTERM)
    assert f"Go on with the same command and --out {OUT}" in printed
    assert f"Results in {OUT}" in finish(start(config))

    bucket.get(tmp_path / "bucket")
    out = tmp_path / "bucket" / "runs" / "first"
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "curves.png", "summary.json", "gmp-seed0"}
    both = (out / "gmp-seed0", tmp_path / "straight")
    assert runs.metrics(both[0]) == runs.metrics(both[1])
    assert runs.same(*(runs.restore_state(setup, x, 20) for x in both))
    assert runs.saved_steps(both[0]) == runs.saved_steps(both[1])
    assert list(both[0].glob("events.*"))


def test_a_bucket_that_does_not_exist(bucket, start):
    config = dataclasses.replace(CONFIG, out=epath.Path("gs://other/run"))
    printed = finish(start(config), status=2)
    assert "error: out: gs://other cannot be reached" in printed


def test_data_tickets_and_earlier_results_come_from_a_bucket(
    bucket, start, tmp_path, monkeypatch
):
    folder, _ = preparation.prepare("digits")
    bucket.put(folder.parent, "data/digits")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tensorflow_datasets"))

    def config(**options: Any) -> Config:
        fixed = {"steps": 8, "checkpoint.every": 8, "data.data_dir": "gs://bucket/data"}
        return runs.replace_options(runs.CONFIG, {"method": "static"} | fixed | options)

    tickets, first, second, third = (
        epath.Path(f"gs://bucket/{x}") for x in ("tickets", "first", "second", "third")
    )
    words = ["0.5", "--out", str(tickets)]
    words += runs.arguments(config(sparsity=0), "train.")
    finish(runs.start(words, cache=tmp_path / "cache", command="lottery"))
    source = {"masks.source": "tickets", "masks.tickets": tickets}
    finish(start(config(sparsity=0.5, out=first, **source)))
    finish(start(config(sparsity=0.5, out=second, init_from=first)))

    bucket.get(tmp_path / "bucket")
    before, after = (
        runs.metrics(tmp_path / "bucket" / name / "static-seed0")
        for name in ("first", "second")
    )
    assert before[-1]["test_accuracy"] == after[0]["test_accuracy"]

    # As if a kill had come at the very end of the last checkpoint.
    bucket.delete("first/static-seed0/checkpoints/8/commit_success.txt")
    refused = start(config(sparsity=0.5, out=third, init_from=first))
    assert "static-seed0 is not finished" in finish(refused, status=2)
