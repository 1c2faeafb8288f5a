"""What a finished run ended with: weights, batch statistics and masks."""

from typing import Any, NamedTuple

import jax
from etils import epath

import granet_jax
from experiments.buckets import check_reachable
from experiments.training.atomic_files import read_json
from experiments.training.checkpoints import Checkpoints, differences, is_complete
from experiments.training.run_folders import seeds_of

PyTree = Any


class Result(NamedTuple):
    """The result of a run, as arrays on the host.

    Attributes:
      params: Parameters. Pruned weights are zero.
      statistics: Batch statistics.
      masks: Masks; None of a dense run.
    """

    params: PyTree
    statistics: PyTree
    masks: PyTree | None


def read(
    folder: epath.Path, seed: int, params: PyTree, statistics: PyTree, masks: PyTree
) -> Result:
    """Read the result of a seed.

    Args:
      folder: Folder of a finished command, its --out.
      seed: The seed.
      params: Parameters of the network, for their structure and shapes.
      statistics: Batch statistics of the network, likewise.
      masks: Masks of the network, likewise.

    Raises:
      FileNotFoundError: The folder is not that of a run, or has no finished run of
        the seed.
      ValueError: The run is of another network.
      CheckpointError: The checkpoint is damaged or has another format version.
    """
    run = _find(folder, seed)
    checkpoints = Checkpoints(run.folder / "checkpoints", keep=run.steps)
    try:
        state = checkpoints.restore_on_host(run.steps)
    finally:
        checkpoints.close()

    def like(expected: PyTree, saved: PyTree) -> PyTree:
        if len(run.seeds) > 1:
            lane = run.seeds.index(seed)
            saved = jax.tree.map(lambda x: x[lane], saved)
        if mismatches := differences(saved, expected):
            raise ValueError(
                f"init_from: {run.folder} is of another network: {mismatches[0]}. Give "
                "the model and the data it was trained with."
            )
        return jax.tree.unflatten(jax.tree.structure(expected), jax.tree.leaves(saved))

    weights = like(params, state["params"])
    statistics = like(statistics, state["statistics"])
    if run.method == "dense":
        return Result(weights, statistics, None)
    held = like(masks, state["opt_state"]["masks"])
    # Methods with dense weights keep values at pruned weights.
    weights = jax.device_get(granet_jax.apply_masks(weights, held))
    return Result(weights, statistics, held)


class _Run(NamedTuple):
    """A finished run: its folder, method, number of steps, and seeds."""

    folder: epath.Path
    method: str
    steps: int
    seeds: range


def _find(folder: epath.Path, seed: int) -> _Run:
    check_reachable("init_from", folder)
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"init_from: {folder} has no config.json: give the --out of a finished run."
        )
    config = read_json(path)
    method, steps = config["method"], config["steps"]
    for run in sorted(folder.iterdir()):
        seeds = seeds_of(run, method)
        if seeds is None or seed not in seeds:
            continue
        if not is_complete(run, steps):
            raise FileNotFoundError(
                f"init_from: {run} is not finished: it has no checkpoint of its last "
                f"step, {steps}. Run its command again to go on with it."
            )
        return _Run(run, method, steps, seeds)
    raise FileNotFoundError(
        f"init_from: {folder} has no run of method {method} and seed {seed}: give seed "
        "and seeds that it has."
    )
