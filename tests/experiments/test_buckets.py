"""Runs in a bucket are those on disk, killed and stopped or not."""

import signal
import subprocess

import pytest

from experiments.config.run import Config, MaskConfig
from experiments.data import preparation
from tests.helpers import runs
from tests.helpers.bucket import running_bucket

ARGUMENTS = [
    *("--model", "lenet-300-100", "--method", "granet", "--seeds", "1"),
    *("--steps", "20", "--eval-every", "7", "--masks.interval", "3"),
    *("--checkpoint.every", "6", "--no-baseline", "--no-progress"),
]
RUN = "granet-seed0"
OUT = "gs://bucket/runs/first"


@pytest.fixture
def bucket(monkeypatch):
    with running_bucket() as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        yield bucket


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    """Wait for a process that ends with `status`, and return what it printed."""
    output, errors = process.communicate(timeout=240)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    return output + errors


def test_a_run_that_is_killed_and_stopped_ends_like_one_on_disk(bucket, tmp_path):
    straight, cache = tmp_path / "straight", tmp_path / "cache"
    finish(runs.start([*ARGUMENTS, "--out", str(straight)], cache=cache))
    command = [*ARGUMENTS, "--out", OUT]

    # A checkpoint is about 40 requests.
    for changes in (3, 25, 60):
        process = runs.start(command, cache=cache)
        bucket.call_after(changes, process.kill)
        process.communicate(timeout=240)
        assert process.returncode == -signal.SIGKILL

    process = runs.start(command, cache=cache)
    bucket.call_after(60, process.terminate)
    printed = finish(process, 128 + signal.SIGTERM)
    assert f"Go on with the same command and --out {OUT}" in printed
    assert f"Results in {OUT}" in finish(runs.start(command, cache=cache))

    bucket.get(tmp_path / "bucket")
    out = tmp_path / "bucket" / "runs" / "first"
    assert runs.metrics(out / RUN) == runs.metrics(straight / RUN)
    setup = runs.create_setup(
        Config(model="lenet-300-100", steps=20, masks=MaskConfig(interval=3))
    )
    final = [runs.restore_state(setup, x / RUN, 20) for x in (out, straight)]
    assert runs.same(*final)
    assert runs.saved_steps(out / RUN) == runs.saved_steps(straight / RUN)
    names = {path.name for path in straight.iterdir()}
    assert {path.name for path in out.iterdir()} == names
    assert list((out / RUN).glob("events.*"))


def test_a_bucket_that_does_not_exist(bucket, tmp_path):
    command = [*ARGUMENTS, "--out", "gs://other/run"]
    printed = finish(runs.start(command, cache=tmp_path / "cache"), status=2)
    assert "error: out: gs://other cannot be reached" in printed


def test_data_tickets_and_earlier_results_come_from_a_bucket(
    bucket, tmp_path, monkeypatch
):
    folder, _ = preparation.prepare("digits")
    bucket.put(folder.parent, "data/digits")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tensorflow_datasets"))
    cache = tmp_path / "cache"
    options = ["--model", "lenet-300-100", "--steps", "8", "--seeds", "1"]
    options += ["--checkpoint.every", "8", "--no-progress"]
    options += ["--data.data-dir", "gs://bucket/data"]

    tickets = [f"--train.{x[2:]}" if x.startswith("--") else x for x in options]
    tickets += ["--out", "gs://bucket/tickets"]
    finish(runs.start(["0.5", *tickets], cache=cache, command="lottery"))

    options += ["--no-baseline", "--method", "static"]
    first = [*options, "--masks.source", "tickets", "--sparsity", "0.5"]
    first += ["--masks.tickets", "gs://bucket/tickets", "--out", "gs://bucket/first"]
    finish(runs.start(first, cache=cache))

    second = [*options, "--init-from", "gs://bucket/first", "--sparsity", "0.5"]
    finish(runs.start([*second, "--out", "gs://bucket/second"], cache=cache))

    bucket.get(tmp_path / "bucket")
    before, after = (
        runs.metrics(tmp_path / "bucket" / name / "static-seed0")
        for name in ("first", "second")
    )
    assert before[-1]["test_accuracy"] == after[0]["test_accuracy"]

    # As if a kill had come at the very end of the last checkpoint.
    bucket.delete("first/static-seed0/checkpoints/8/commit_success.txt")
    refused = runs.start([*second, "--out", "gs://bucket/third"], cache=cache)
    assert "static-seed0 is not finished" in finish(refused, status=2)
