"""Lottery tickets with the trainer: rounds, rewinding, resumption, and their use."""

import dataclasses
import itertools
import signal
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from experiments import lottery
from experiments.config.run import MaskConfig, ToSTConfig
from experiments.lottery import LotteryConfig
from experiments.training import initial_state, loop, stop_signal, ticket_files
from granet_jax import distributions
from tests.helpers import runs

# In so few steps, higher sparsities would empty a layer.
SPARSITIES = (0.3, 0.55)
KERNELS = ("hidden_0", "hidden_1", "output")
TRAINING = dataclasses.replace(
    runs.CONFIG, method="static", sparsity=0.0, steps=8, eval_every=3, seed=1
)


@pytest.fixture(scope="module")
def setup() -> Iterator[loop.TrainSetup]:
    """The setup of every search, on several devices."""
    with pytest.MonkeyPatch.context() as patch:
        runs.share_setups(patch, devices=2)
        yield runs.create_setup(TRAINING, devices=2)


@pytest.fixture(scope="module")
def search_config(setup, tmp_path_factory) -> LotteryConfig:
    """A search for tickets that go back to the weights of step 3."""
    out = tmp_path_factory.mktemp("lottery") / "tickets"
    config = LotteryConfig(SPARSITIES, out, 3, TRAINING)
    lottery.run(config)
    return config


def final(setup: loop.TrainSetup, config: LotteryConfig, number: int) -> Any:
    """The state at the end of a round's training."""
    run = config.out / "seed1" / f"round{number}"
    return jax.device_get(runs.restore_state(setup, run, config.train.steps))


def ticket(setup: loop.TrainSetup, config: LotteryConfig, sparsity: float) -> Any:
    state = final(setup, config, 0)
    return ticket_files.read(
        config.out, 1, sparsity, state.params, state.opt_state.masks
    )


def kernels(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(tree[k]["kernel"]).ravel() for k in KERNELS])


def test_rounds_prune_the_smallest_weights_and_the_others_go_back(setup, search_config):
    step = setup.compiled_step
    state = step.create([1])
    for _ in range(3):
        state, loss = step.steps(state, setup.train_data, 1)
        jax.block_until_ready(loss)
    origin = jax.device_get(step.snapshot(state).params)
    before = np.ones(runs.TOTAL, bool)
    for number, sparsity in enumerate((0.0, *SPARSITIES)):
        run = search_config.out / "seed1" / f"round{number}"
        # Rounds train from the step that the weights went back to.
        assert [line["step"] for line in runs.metrics(run)] == [3, 6, 8]
        final_state = final(setup, search_config, number)
        assert np.array_equal(kernels(final_state.opt_state.masks), before)
        if sparsity == SPARSITIES[-1]:
            return
        # The smallest weights are pruned.
        sizes = np.where(before, np.abs(kernels(final_state.params)), -1.0)
        following = SPARSITIES[number]
        keep = distributions.total_count(runs.TOTAL, following)
        before = np.zeros(runs.TOTAL, bool)
        before[np.argsort(-sizes, kind="stable")[:keep]] = True
        weights, masks = ticket(setup, search_config, following)
        assert np.array_equal(kernels(masks), before)
        # The others go back to their values of that step.
        assert np.array_equal(kernels(weights), np.where(before, kernels(origin), 0))
        for name in KERNELS:
            assert np.array_equal(weights[name]["bias"], origin[name]["bias"])


def test_training_starts_from_tickets(setup, search_config):
    """Several seeds at once, and networks with ghosts too."""
    weights, bits = ticket(setup, search_config, 0.55)
    masks = MaskConfig(source="tickets", tickets=search_config.out)
    config = dataclasses.replace(
        TRAINING,
        sparsity=0.55,
        masks=masks,
        seeds=2,
        vmap_seeds=True,
        tost=ToSTConfig(neurons="swish", ghost_fraction=0.5),
    )
    step = runs.create_setup(config).compiled_step_at(0)
    with pytest.raises(FileNotFoundError, match=r"no ticket seed2-0\.55\.npz, only s"):
        initial_state.state(step, [1, 2])
    other = jax.tree.map(lambda x: 2 * x, weights)
    ticket_files.write(search_config.out, 2, 0.55, other, bits)
    try:
        state = jax.device_get(step.snapshot(initial_state.state(step, [1, 2])))
    finally:
        (search_config.out / "seed2-0.55.npz").unlink()
    for lane, expected in enumerate((weights, other)):
        held = (state.params, state.opt_state.masks)
        assert runs.same(jax.tree.map(lambda x, i=lane: x[i], held), (expected, bits))


def test_a_search_continues_where_it_was_stopped(
    setup, search_config, tmp_path, monkeypatch
):
    config = dataclasses.replace(search_config, out=tmp_path / "other")
    questions = itertools.count()

    def reached(self: Any, step: int) -> int | None:
        del self, step
        return signal.SIGTERM if next(questions) in (4, 13) else None

    monkeypatch.setattr(stop_signal.StopSignal, "reached", reached)
    for _ in range(2):
        with pytest.raises(loop.StoppedError) as stopped:
            lottery.run(config)
        assert stopped.value.__notes__ == ["Go on with the same command."]
    lottery.run(config)
    for sparsity in SPARSITIES:
        assert runs.same(
            ticket(setup, config, sparsity), ticket(setup, search_config, sparsity)
        )
    last = len(SPARSITIES)
    assert runs.same(final(setup, config, last), final(setup, search_config, last))


def test_tickets_that_do_not_fit_are_refused(setup, search_config, tmp_path):
    with pytest.raises(ValueError, match="holds a run with sparsities="):
        lottery.run(dataclasses.replace(search_config, sparsities=(0.5, 0.9)))
    state = final(setup, search_config, 0)
    weights, bits = ticket(setup, search_config, 0.3)
    wider = jax.tree.map(lambda x: np.concatenate([x, x], -1), weights)

    def refused(sparsity: float, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ticket_files.read(
                tmp_path, 0, sparsity, state.params, state.opt_state.masks
            )

    ticket_files.write(tmp_path, 0, 0.5, weights, bits)
    refused(0.5, "35140 active weights instead of 25100")
    ticket_files.write(tmp_path, 0, 0.3, {"output": weights["output"]}, bits)
    refused(0.3, r"not a ticket of this network.*hidden_0")
    ticket_files.write(tmp_path, 0, 0.3, wider, bits)
    refused(0.3, r"shape \(600,\) instead of \(300,\)")
    file = tmp_path / "seed0-0.3.npz"
    file.write_bytes(file.read_bytes()[:1000])
    refused(0.3, r"seed0-0\.3\.npz is not a ticket")


def test_the_command_line_reports_every_round(search_config, capsys):
    options = ["--train.model", "lenet-300-100", "--train.steps", "8"]
    options += ["--train.seeds", "1", "--train.seed", "1", "--train.no-progress"]
    options += ["--train.eval-every", "3", "--rewind-steps", "3"]
    command = [*map(str, SPARSITIES), "--out", str(search_config.out), *options]
    # The search is finished, so that nothing trains again.
    assert lottery.main(command) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"seed 1, {sparsity:g} sparse" for sparsity in (0, *SPARSITIES)
    ]
    assert (search_config.out / "seed1-0.55.npz").exists()
    assert lottery.main([*command[:-1], "2"]) == 2
    assert "holds a run with" in capsys.readouterr().err
