"""Short training runs and the files they leave, for the tests of experiments/."""

import contextlib
import dataclasses
import functools
import gc
import json
import math
import os
import pathlib
import resource
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from experiments import data, models
from experiments.config.run import CheckpointConfig, Config
from experiments.training import loop
from experiments.training.checkpoints import Checkpoints

PyTree = Any
ROOT = pathlib.Path(__file__).parents[2]
# Tests replace fields of it.
CONFIG = Config(model="lenet-300-100", seeds=1, baseline=False, progress=False)
# The weights of LeNet-300-100 on 8 x 8 pixels that can be pruned.
TOTAL = 64 * 300 + 300 * 100 + 100 * 10


class Small(nn.Module):
    """A network with batch statistics that compiles quickly."""

    classes: int
    axis_name: str | None
    width: int = 40

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        x = nn.Dense(self.width, use_bias=False, name="hidden")(x)
        x = nn.BatchNorm(not train, momentum=0.9, axis_name=self.axis_name)(x)
        return nn.Dense(self.classes, name="output")(nn.relu(x))


def _create_small(
    name: str, *, classes: int, dtype: Any, axis_name: str | None
) -> Small:
    del dtype
    return Small(classes, axis_name, width=50 if name == "cnn" else 40)


def use_small_networks(patch: pytest.MonkeyPatch) -> None:
    """Put a small network in the place of every network; "cnn" is a wider one."""
    patch.setattr(models, "create", _create_small)


def active_count(sparsity: float) -> int:
    """Number of active weights at an overall sparsity."""
    return math.floor((1 - sparsity) * TOTAL + 0.5)


def replace_options(record: Any, options: Mapping[str, Any]) -> Any:
    """Replace fields of a record and of its nested records, by dotted names."""
    changes: dict[str, Any] = {}
    for name, value in options.items():
        part, _, field = name.partition(".")
        if field:
            changes.setdefault(part, {})[field] = value
        else:
            changes[part] = value
    for part, value in changes.items():
        if dataclasses.is_dataclass(getattr(record, part)) and isinstance(value, dict):
            changes[part] = replace_options(getattr(record, part), value)
    return dataclasses.replace(record, **changes)


@functools.cache
def _compiled(config: Config, devices: int, network: Any) -> loop.TrainSetup:
    del network
    return _CREATE(config, data.load(config.data.dataset), jax.devices()[:devices])


_CREATE = loop.create


def create_setup(config: Config, devices: int = 1) -> loop.TrainSetup:
    """Create a training setup on the first devices of this process.

    Compilation takes nearly all of the time of short runs. So setups share what is
    compiled wherever their configurations differ in nothing that a step depends on.
    """
    shared = dataclasses.replace(
        config,
        out=None,
        init_from=None,
        progress=True,
        baseline=True,
        seeds=config.seeds if config.vmap_seeds else 1,
        eval_every=None,
        checkpoint=CheckpointConfig(),
    )
    # The network has a place in the key because tests put small ones in its place.
    setup = _compiled(shared, devices, models.create)

    def own(step: Any) -> Any:
        return step and dataclasses.replace(
            step, train_step=dataclasses.replace(step.train_step, config=config)
        )

    return setup._replace(
        compiled_step=own(setup.compiled_step), ghost_step=own(setup.ghost_step)
    )


def share_setups(patch: pytest.MonkeyPatch, devices: int = 1) -> None:
    """Let the commands of experiments/ train with shared setups, on these devices."""
    patch.setattr(loop, "create", lambda config, dataset: create_setup(config, devices))


def same(a: PyTree, b: PyTree) -> bool:
    """Whether two pytrees are equal, bit for bit."""
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).dtype == np.asarray(y).dtype
        and np.asarray(x).shape == np.asarray(y).shape
        and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def assert_close(a: PyTree, b: PyTree, rtol: float, atol: float = 0.0) -> None:
    """Assert that two pytrees have the same structure and nearly equal values."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), a, b)


def lenet(params: PyTree, x: Any) -> Any:
    """The logits of LeNet-300-100 for inputs (n, pixels), in NumPy or JAX."""
    for name in ("hidden_0", "hidden_1", "output"):
        x = x @ params[name]["kernel"] + params[name]["bias"]
        x = x * (x > 0) if name != "output" else x
    return x


def saved_steps(run: pathlib.Path) -> list[int]:
    """Steps of the complete checkpoints of a run."""
    folder = run / "checkpoints"
    names = os.listdir(folder) if folder.exists() else []
    return sorted(int(name) for name in names if name.isdecimal())


def restore_state(setup: loop.TrainSetup, run: pathlib.Path, step: int) -> PyTree:
    """Read a checkpoint of a run onto the devices of `setup`."""
    checkpoints = Checkpoints(run / "checkpoints", keep=100)
    try:
        return checkpoints.restore(step, setup.compiled_step.abstract())[0]
    finally:
        checkpoints.close()


def metrics(run: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, without their times."""
    text = (run / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        assert line.pop("seconds") > 0
    return lines


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """All files in a folder, by their paths in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def failure(capfd: Any, command: Callable[[], int], status: int = 2) -> str:
    """Run a command that fails, and return its error, which must be one line.

    Args:
      capfd: Fixture of pytest.
      command: Function that returns an exit status.
      status: Expected exit status.
    """
    capfd.readouterr()
    gc.freeze()
    assert command() == status
    # Orbax reports what it could not finish when it is collected.
    gc.collect()
    gc.unfreeze()
    printed, error = capfd.readouterr()
    assert printed == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert "Traceback" not in error
    return error


@contextlib.contextmanager
def full_disk(size: int) -> Generator[None]:
    """Let no file grow beyond `size` bytes, as on a disk without room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def arguments(config: Any, prefix: str = "") -> list[str]:
    """The options of a command line with this configuration, or a part of one."""
    words, defaults = [], type(config)()
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            words += arguments(value, f"{prefix}{name}.")
        elif value == getattr(defaults, field.name):
            continue
        elif isinstance(value, bool):
            words.append(f"--{prefix}{name}" if value else f"--{prefix}no-{name}")
        else:
            words += [f"--{prefix}{name}", str(value)]
    return words


def environment(cache: pathlib.Path) -> dict[str, str]:
    """Variables with which a process computes the bits that this one does.

    Args:
      cache: Folder for compiled programs, which later processes need not compile.
    """
    quick = jax.config.read("jax_disable_most_optimizations")
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(quick),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(
    arguments: Sequence[str], *, cache: pathlib.Path, command: str = "train"
) -> subprocess.Popen[str]:
    """Start a command of experiments/ in a process of its own, on one device."""
    return subprocess.Popen(
        [sys.executable, "-m", f"experiments.{command}", *arguments],
        cwd=ROOT,
        env=os.environ | environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str], seconds: float = 240) -> tuple[int, str]:
    """Wait for a process, and kill it after `seconds`: (exit status, stderr)."""
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        _, errors = process.communicate()
        raise AssertionError(f"still running after {seconds} s: {errors}") from None
    return process.returncode, errors
