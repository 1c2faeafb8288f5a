"""Training runs and what they leave behind, for the tests of stopping and going on."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from experiments import data
from experiments.config.run import Config
from experiments.training import loop
from experiments.training.checkpoints import Checkpoints

PyTree = Any
ROOT = pathlib.Path(__file__).parents[2]
_LIMITED = """
import resource, runpy, sys
size = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)
"""


class Small(nn.Module):
    """A network with batch statistics that compiles quickly."""

    classes: int
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dense(40, use_bias=False, name="hidden")(x.reshape(x.shape[0], -1))
        x = nn.BatchNorm(not train, momentum=0.9, axis_name=self.axis_name)(x)
        return nn.Dense(self.classes, name="output")(nn.relu(x))


def same(a: PyTree, b: PyTree) -> bool:
    """Whether two pytrees are equal, bit for bit."""
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).dtype == np.asarray(y).dtype
        and np.asarray(x).shape == np.asarray(y).shape
        and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def make(config: Config, devices: int = 1) -> loop.TrainSetup:
    """A trainer on the first devices of this process."""
    return loop.create(config, data.load(config.data.dataset), jax.devices()[:devices])


def steps_saved(run: pathlib.Path) -> list[int]:
    """Steps of the checkpoints of a run that have their name."""
    names = [path.name for path in (run / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdecimal())


def restored(maker: loop.TrainSetup, run: pathlib.Path, step: int) -> PyTree:
    """A checkpoint of a run, as the trainer of that many devices reads it."""
    checkpoints = Checkpoints(run / "checkpoints", keep=100)
    try:
        return checkpoints.restore(step, maker.compiled_step.abstract())[0]
    finally:
        checkpoints.close()


def lines(run: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, without their times."""
    text = (run / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    for line in found:
        assert line.pop("seconds") > 0
    return found


def start(
    arguments: Sequence[str],
    *,
    cache: pathlib.Path | None = None,
    devices: int = 1,
    largest: int | None = None,
) -> subprocess.Popen[str]:
    """Starts `python -m experiments.train` in a process of its own.

    Args:
      arguments: of the command line.
      cache: folder for compiled programs, which later processes then need not compile.
      devices: number of CPU devices it has.
      largest: number of bytes that a file it writes may have: a disk that is full.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_ENABLE_COMPILATION_CACHE": "false" if cache is None else "true",
    }
    if cache is not None:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    command = [sys.executable, "-m", "experiments.train", *arguments]
    if largest is not None:
        command[1:3] = ["-c", _LIMITED, str(largest)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str]:
    """Waits for a process, which is killed after so long: (exit status, stderr)."""
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        _, errors = process.communicate()
        raise AssertionError(f"still running after {seconds} s: {errors}") from None
    return process.returncode, errors
