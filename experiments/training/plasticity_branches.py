"""Branches of a plasticity study: prune states of the dense run and keep training."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import Array

import granet_jax
from experiments.config.plasticity import UNPRUNED, Branch, Study
from experiments.data import Dataset, Stream
from experiments.training import loop
from experiments.training.atomic_files import write_json
from experiments.training.devices import CompiledStep
from experiments.training.step import TrainState, TrainStep
from granet_jax.analysis import plasticity
from granet_jax.selection import Scope

PyTree = Any
# The random criterion has its own random stream; `step` uses streams 0 to 3.
_STREAM = 4


class BranchRun(NamedTuple):
    """One branch to train, for one seed and one point.

    Attributes:
      branch: Way of pruning.
      seed: Seed of the dense run.
      state: State of the dense run at the point.
      before: Number of test examples that this state predicts correctly.
      path: File for the outcome.
    """

    branch: Branch
    seed: int
    state: TrainState
    before: int
    path: epath.Path


class BranchPruner(NamedTuple):
    """Functions that prune one state at a time, for any number of lanes.

    They do not depend on the learning rate, so they are compiled once for all points.

    Attributes:
      start: Function that adds masks to a dense state, with all weights active.
      cutter: Function from the rule of a branch to a compiled function of
        (state, data, keep), which prunes a state down to `keep` weights.
    """

    start: Callable[[TrainState], TrainState]
    cutter: Callable[[str, Scope, float, bool], Callable[..., TrainState]]


def create_pruner(study: Study, dataset: Dataset | Stream) -> BranchPruner:
    """Return the functions that prune states of a study."""
    config = study.continued(study.train.optimizer.learning_rate)
    train_step = TrainStep(config, dataset)

    def start(state: TrainState) -> TrainState:
        opt_state = train_step.optimizer(state.seed).init(state.params)
        assert isinstance(opt_state, granet_jax.SparseState)
        opt_state = opt_state._replace(inner_state=state.opt_state)
        return state._replace(opt_state=opt_state)

    @functools.cache
    def cutter(
        criterion: str, scope: Scope, regrow: float, revive: bool
    ) -> Callable[..., TrainState]:
        rule = (criterion, scope, regrow, revive)
        return jax.jit(functools.partial(_prune, train_step, *rule))

    return BranchPruner(jax.jit(start), cutter)


def _prune(
    train_step: TrainStep,
    criterion: str,
    scope: Scope,
    regrow: float,
    revive: bool,
    state: TrainState,
    data: PyTree,
    keep: Any,
) -> TrainState:
    """Prune a state down to `keep` weights, and exchange the fraction `regrow`.

    With `revive`, the pruned weights and their moments become zero, and no mask keeps
    them there.
    """
    opt_state = state.opt_state
    assert isinstance(opt_state, granet_jax.SparseState)
    key = jax.random.fold_in(jax.random.key(state.seed), _STREAM)
    pruned = plasticity.prune(
        state.params,
        opt_state.masks,
        keep,
        criterion=criterion,
        scope=scope,
        regrow=regrow,
        # The compiler removes the gradient if the criterion does not use it.
        grads=train_step.gradient(state, data),
        key=jax.random.fold_in(key, state.step),
    )
    params, inner_state = plasticity.apply_pruned(
        state.params, opt_state.inner_state, pruned
    )
    average = state.average
    if average != ():
        average = granet_jax.apply_masks(average, pruned.continuing)
    masks = opt_state.masks if revive else pruned.masks
    opt_state = granet_jax.get_state(granet_jax.set_masks(opt_state, masks))
    opt_state = opt_state._replace(inner_state=inner_state)
    return state._replace(params=params, opt_state=opt_state, average=average)


def train_branches(
    study: Study,
    setup: loop.TrainSetup,
    pruner: BranchPruner,
    branch_runs: Sequence[BranchRun],
    steps: int,
    on_step: Callable[[int], object],
    stopped: Callable[[int], int | None],
) -> None:
    """Train one or several branches at once, and write the outcome of each."""
    start = pruner.start(branch_runs[0].state)
    masks = [
        np.empty(mask.shape, bool)
        for mask in jax.tree.leaves(granet_jax.get_masks(start.opt_state))
    ]
    # A smaller last group would need another program, so it is padded with copies.
    padding = [branch_runs[-1]] * (study.lanes - len(branch_runs))
    lanes = [*branch_runs, *padding]
    keeps = [keep_numbers(run.branch, masks, study, steps) for run in lanes]
    state, pruned = _train(setup, pruner, lanes, keeps, steps, on_step, stopped)
    after, loss = loop.evaluate(setup, state, steps)
    inspection = setup.compiled_step.inspect(state)
    total = setup.dataset.test_size
    for i, run in enumerate(branch_runs):
        rows = [*keeps[i].values()]
        dense = not rows or run.branch.pruning == "revived"
        expected = sum(m.size for m in masks) if dense else int(rows[-1].sum())
        active = int(np.asarray(inspection.active)[i].sum())
        if active != expected or inspection.broken[i].any():
            raise RuntimeError(f"{run.path.stem} has not exactly {expected} weights.")
        outcome = {
            "before": run.before / total,
            "pruned": int(pruned[i]) / total,
            "after": int(after[i]) / total,
            "test_loss": float(loss[i]) / total,
            "active_weights": active,
        }
        run.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(run.path, outcome)


def _train(
    setup: loop.TrainSetup,
    pruner: BranchPruner,
    lanes: Sequence[BranchRun],
    keeps: Sequence[dict[int, np.ndarray]],
    steps: int,
    on_step: Callable[[int], object],
    stopped: Callable[[int], int | None],
) -> tuple[PyTree, np.ndarray]:
    """Train one branch per lane and prune it when it is due.

    Returns:
      (the compiled step's state after the last step, the number of test examples that
      each lane predicts correctly right after it was pruned for the last time).
    """
    compiled_step = setup.compiled_step
    cutters = [pruner.cutter(*run.branch.rule) for run in lanes]
    states = [pruner.start(run.state) for run in lanes]
    state = compiled_step.restore(_stack(compiled_step, states))
    pruned = np.asarray([run.before for run in lanes])
    losses = loop.Losses(compiled_step.lanes)
    batches = loop.train_batches(setup, lanes[0].seed, int(lanes[0].state.step))
    ahead, step = loop.steps_ahead(compiled_step), 0
    while step < steps:
        if (signal := stopped(step)) is not None:
            raise loop.StoppedError(step, signal)
        batch = next(batches)
        due = [i for i, keep in enumerate(keeps) if step in keep]
        if due:
            states = _unstack(compiled_step, state)
            for i in due:
                states[i] = cutters[i](states[i], batch, keeps[i][step])
            state = compiled_step.restore(_stack(compiled_step, states))
            last = [i for i in due if step == max(keeps[i])]
            if last:
                pruned[last] = loop.evaluate(setup, state, step)[0][last]
        later = [cut for keep in keeps for cut in keep if cut > step]
        steps_left = min([*later, steps]) - step
        block = setup.config.scan_block
        number = block if steps_left >= block else 1
        state, loss = compiled_step.steps(state, batch, number)
        step += number
        losses.add(loss)
        on_step(losses.wait(ahead))
    on_step(losses.wait(0))
    if losses.diverged:
        names = ", ".join(run.path.stem for run in lanes)
        raise loop.DivergedError(
            f"{names}: a loss is not finite: lower train.optimizer.learning_rate, or "
            "leave out this way of pruning."
        )
    return state, pruned


def keep_numbers(
    branch: Branch, masks: PyTree, study: Study, steps: int
) -> dict[int, np.ndarray]:
    """Return the numbers of weights to keep, by the step at which to prune."""
    if branch == UNPRUNED:
        return {}
    updates = study.updates if branch.pruning == "gradual" else 1
    sparsities = plasticity.sparsities(branch.rate, updates)
    rows = plasticity.keep_counts(masks, sparsities, scope=branch.scope)
    return {i * (steps // 2 // updates): row for i, row in enumerate(rows)}


def _stack(compiled_step: CompiledStep, states: Sequence[TrainState]) -> TrainState:
    """Combine states of one lane into a snapshot. Counters have no lane axis."""

    def stack(like: jax.ShapeDtypeStruct, *leaves: Array) -> Any:
        if len(like.shape) > leaves[0].ndim:
            return jnp.stack(leaves)
        return jax.device_put(leaves[0], like.sharding)

    return jax.tree.map(stack, compiled_step.abstract(), *states)


def _unstack(compiled_step: CompiledStep, state: PyTree) -> list[TrainState]:
    """Return the state of every lane."""
    if compiled_step.lanes == 1:
        return [compiled_step.snapshot(state)]
    one_lane = jax.eval_shape(compiled_step.train_step.create, np.uint32(0))

    def lane(i: int) -> TrainState:
        return jax.tree.map(
            lambda x, like: x[i] if x.ndim > like.ndim else jnp.copy(x), state, one_lane
        )

    return [lane(i) for i in range(compiled_step.lanes)]
