"""Trains the branches of a study: prunes states of a dense run, and goes on."""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
# A random criterion draws from a stream of its own, apart from those of `step`.
_STREAM = 4


class BranchRun(NamedTuple):
    """A branch to train, of one seed, from one point.

    Attributes:
      branch: how it is pruned.
      seed: of the dense run.
      state: of the dense run at that point.
      before: its number of test examples predicted correctly.
      path: of the file for the outcome.
    """

    branch: Branch
    seed: int
    state: TrainState
    before: int
    path: pathlib.Path


class BranchPruner(NamedTuple):
    """What prunes states, one at a time, however many lanes there are.

    Compiled once for all points: nothing in it depends on the learning rate.

    Attributes:
      start: from a dense state to the same with masks, all active.
      cutter: from (criterion, scope, regrow) to a function of (state, data, keep) that
        prunes a state down to `keep`.
    """

    start: Callable[[TrainState], TrainState]
    cutter: Callable[[str, Scope, float], Callable[..., TrainState]]


def create_pruner(study: Study, dataset: Dataset | Stream) -> BranchPruner:
    config = study.continued(study.train.optimizer.learning_rate)
    train_step = TrainStep(config, dataset)

    def start(state: TrainState) -> TrainState:
        opt_state = train_step.optimizer(state.seed).init(state.params)
        assert isinstance(opt_state, granet_jax.SparseState)
        opt_state = opt_state._replace(inner_state=state.opt_state)
        return state._replace(opt_state=opt_state)

    @functools.cache
    def cutter(
        criterion: str, scope: Scope, regrow: float
    ) -> Callable[..., TrainState]:
        return jax.jit(functools.partial(_cut, train_step, criterion, scope, regrow))

    return BranchPruner(jax.jit(start), cutter)


def _cut(
    train_step: TrainStep,
    criterion: str,
    scope: Scope,
    regrow: float,
    state: TrainState,
    data: PyTree,
    keep: Any,
) -> TrainState:
    """A state pruned down to so many weights, `regrow` of them exchanged."""
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
        # Compiled only if it is of use.
        grads=train_step.gradient(state, data),
        key=jax.random.fold_in(key, state.step),
    )
    params, inner_state = plasticity.apply_pruned(
        state.params, opt_state.inner_state, pruned
    )
    average = state.average
    if average != ():
        average = granet_jax.apply_masks(average, pruned.continuing)
    opt_state = granet_jax.get_state(granet_jax.set_masks(opt_state, pruned.masks))
    opt_state = opt_state._replace(inner_state=inner_state)
    return state._replace(params=params, opt_state=opt_state, average=average)


def train_branches(
    study: Study,
    each: loop.TrainSetup,
    pruner: BranchPruner,
    jobs: Sequence[BranchRun],
    steps: int,
    on_step: Callable[[int], object],
    stopped: Callable[[int], int | None],
) -> None:
    """Trains one branch, or several at once, and writes the outcome of each."""
    shapes = [x.shape for x in _masks(pruner.start(jobs[0].state))]
    masks = [np.empty(shape, bool) for shape in shapes]
    # A last group that is smaller would be another program: it is filled up.
    lanes = [*jobs, *[jobs[-1]] * (study.lanes - len(jobs))]
    keeps = [keep_numbers(job.branch, masks, study, steps) for job in lanes]
    state, pruned = _trained(each, pruner, lanes, keeps, steps, on_step, stopped)
    after, loss = loop.evaluate(each, state, steps)
    seen = each.compiled_step.inspect(state)
    total = each.dataset.test_size
    for i, job in enumerate(jobs):
        rows = [*keeps[i].values()]
        active = int(rows[-1].sum()) if rows else sum(m.size for m in masks)
        if int(np.asarray(seen.active)[i].sum()) != active or seen.broken[i].any():
            raise RuntimeError(f"{job.path.stem} has not exactly {active} weights.")
        outcome = {
            "before": job.before / total,
            "pruned": int(pruned[i]) / total,
            "after": int(after[i]) / total,
            "test_loss": float(loss[i]) / total,
            "active_weights": active,
        }
        job.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(job.path, outcome)


def _trained(
    each: loop.TrainSetup,
    pruner: BranchPruner,
    jobs: Sequence[BranchRun],
    keeps: Sequence[dict[int, np.ndarray]],
    steps: int,
    on_step: Callable[[int], object],
    stopped: Callable[[int], int | None],
) -> tuple[PyTree, np.ndarray]:
    """Trains a branch a lane, pruning each when it is due.

    Returns:
      (the program's state after the last step, the number of test examples that each
      lane predicts correctly just after it is pruned for the last time).
    """
    compiled_step = each.compiled_step
    cuts = [pruner.cutter(*job.branch.ranking) for job in jobs]
    states = [pruner.start(job.state) for job in jobs]
    state = compiled_step.restore(_stacked(compiled_step, states))
    pruned = np.asarray([job.before for job in jobs])
    losses = loop.Losses(compiled_step.lanes)
    data = loop.train_batches(each, jobs[0].seed, int(jobs[0].state.step))
    ahead, done = loop.steps_ahead(compiled_step), 0
    while done < steps:
        if (wish := stopped(done)) is not None:
            raise loop.StoppedError(done, wish)
        batch = next(data)
        due = [i for i, keep in enumerate(keeps) if done in keep]
        if due:
            states = _unstacked(compiled_step, state)
            for i in due:
                states[i] = cuts[i](states[i], batch, keeps[i][done])
            state = compiled_step.restore(_stacked(compiled_step, states))
            last = [i for i in due if done == max(keeps[i])]
            if last:
                pruned[last] = loop.evaluate(each, state, done)[0][last]
        later = [at for keep in keeps for at in keep if at > done]
        left = min([*later, steps]) - done
        number = each.config.scan_block if left >= each.config.scan_block else 1
        state, loss = compiled_step.steps(state, batch, number)
        done += number
        losses.add(loss)
        on_step(losses.wait(ahead))
    on_step(losses.wait(0))
    if losses.diverged:
        names = ", ".join(job.path.stem for job in jobs)
        raise loop.DivergedError(
            f"{names}: a loss is not finite: lower train.optimizer.learning_rate, or "
            "leave out this way of pruning."
        )
    return state, pruned


def keep_numbers(
    branch: Branch, masks: PyTree, study: Study, steps: int
) -> dict[int, np.ndarray]:
    """The numbers of weights that a branch keeps, by the steps done before it does."""
    if branch == UNPRUNED:
        return {}
    updates = study.updates if branch.pruning == "gradual" else 1
    rising = plasticity.sparsities(branch.rate, updates)
    rows = plasticity.keep_counts(masks, rising, scope=branch.scope)
    return {i * (steps // 2 // updates): row for i, row in enumerate(rows)}


def _masks(state: TrainState) -> list[Array]:
    return jax.tree.leaves(granet_jax.get_masks(state.opt_state))


def _stacked(compiled_step: CompiledStep, states: Sequence[TrainState]) -> TrainState:
    """Of states of one lane a snapshot of the program's; counters have no lanes."""

    def stack(like: jax.ShapeDtypeStruct, *leaves: Array) -> Any:
        if len(like.shape) > leaves[0].ndim:
            return jnp.stack(leaves)
        return jax.device_put(leaves[0], like.sharding)

    return jax.tree.map(stack, compiled_step.abstract(), *states)


def _unstacked(compiled_step: CompiledStep, state: PyTree) -> list[TrainState]:
    """The states of the lanes."""
    if compiled_step.lanes == 1:
        return [compiled_step.snapshot(state)]
    one = jax.eval_shape(compiled_step.train_step.create, np.uint32(0))

    def lane(i: int) -> TrainState:
        return jax.tree.map(
            lambda x, like: x[i] if x.ndim > like.ndim else jnp.copy(x), state, one
        )

    return [lane(i) for i in range(compiled_step.lanes)]
