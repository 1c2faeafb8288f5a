"""Lottery tickets with the trainer: rounds, rewinding, resumption, and their use."""

import dataclasses
import itertools
import signal
from typing import Any

import jax
import numpy as np
import pytest

from experiments import lottery, train
from experiments.config.run import Config, MaskConfig, ToSTConfig
from experiments.lottery import LotteryConfig
from experiments.training import loop, ticket_files
from experiments.training.checkpoints import Checkpoints
from granet_jax import distributions
from tests.helpers.profile import NIGHTLY
from tests.helpers.runs import lines, make, same

# In so few steps, more would empty a layer.
SPARSITIES = (0.3, 0.5, 0.55)
KERNELS = ("hidden_0", "hidden_1", "output")
TOTAL = 64 * 300 + 300 * 100 + 100 * 10
TRAINING = Config(
    model="lenet-300-100",
    method="static",
    sparsity=0.0,
    steps=8,
    eval_every=3,
    seed=1,
    seeds=1,
    progress=False,
    baseline=False,
)


# A search for tickets that go back to the initial weights, and one to those of step 3.
REWINDS = (0, 3) if NIGHTLY else (3,)


@pytest.fixture(scope="module", params=REWINDS, ids=str)
def found(request, tmp_path_factory):
    """A configuration whose tickets have been found."""
    out = tmp_path_factory.mktemp("lottery") / "tickets"
    config = LotteryConfig(SPARSITIES, out, request.param, TRAINING)
    lottery.run(config)
    return config


def on_all_devices(config: Config) -> loop.TrainSetup:
    """A trainer as of `lottery.run`."""
    return make(config, jax.device_count())


def final(config: LotteryConfig, number: int) -> Any:
    """The state at the end of a round's training."""
    each = on_all_devices(config.train)
    folder = config.out / "seed1" / f"round{number}" / "checkpoints"
    checkpoints = Checkpoints(folder, 1)
    state, _ = checkpoints.restore(config.train.steps, each.compiled_step.abstract())
    checkpoints.close()
    return jax.device_get(state)


def ticket(config: LotteryConfig, sparsity: float) -> tuple[Any, Any]:
    state = final(config, 0)
    return ticket_files.read(
        config.out, 1, sparsity, state.params, state.opt_state.masks
    )


def kernels(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(tree[k]["kernel"]).ravel() for k in KERNELS])


def test_each_round_prunes_the_smallest_weights_of_the_last(found):
    before = np.ones(TOTAL, bool)
    for number, sparsity in enumerate(SPARSITIES):
        trained = kernels(final(found, number).params)
        sizes = np.where(before, np.abs(trained), -1.0)
        keep = distributions.total_count(TOTAL, sparsity)
        expected = np.zeros(TOTAL, bool)
        expected[np.argsort(-sizes, kind="stable")[:keep]] = True
        _, masks = ticket(found, sparsity)
        before = kernels(masks)
        assert np.array_equal(before, expected)
        # Trained under these masks.
        assert same(final(found, number + 1).opt_state.masks, masks)


def test_weights_go_back_to_those_of_the_step(found):
    each = on_all_devices(TRAINING)
    state = each.compiled_step.create([1])
    for _ in range(found.rewind_steps):
        state, loss = each.compiled_step.steps(state, each.train_data, 1)
        jax.block_until_ready(loss)
    origin = jax.device_get(each.compiled_step.snapshot(state).params)
    for sparsity in SPARSITIES:
        weights, masks = ticket(found, sparsity)
        for name in KERNELS:
            kernel = np.where(masks[name]["kernel"], origin[name]["kernel"], 0)
            assert np.array_equal(weights[name]["kernel"], kernel)
            assert np.array_equal(weights[name]["bias"], origin[name]["bias"])


def test_rounds_train_from_the_step_that_weights_went_back_to(found):
    for number in range(len(SPARSITIES) + 1):
        steps = [line["step"] for line in lines(found.out / "seed1" / f"round{number}")]
        assert steps == ([0, 3, 6, 8] if found.rewind_steps == 0 else [3, 6, 8])


def test_training_of_a_ticket_is_that_of_its_round(found, tmp_path):
    masks = MaskConfig(source="tickets", tickets=found.out)
    config = dataclasses.replace(TRAINING, sparsity=0.5, masks=masks)
    each = on_all_devices(config)
    _, state = loop.fit(each, [1], tmp_path / "run")
    state = jax.device_get(each.compiled_step.snapshot(state))
    _, bits = ticket(found, 0.5)
    assert same(state.opt_state.masks, bits)
    ended = final(found, 2)
    # From step 0, the round did just the same.
    assert same(state.params, ended.params) == (found.rewind_steps == 0)


def test_seeds_at_once_and_ghosts_start_from_tickets(found, tmp_path):
    masks = MaskConfig(source="tickets", tickets=found.out)
    config = dataclasses.replace(
        TRAINING,
        sparsity=0.55,
        masks=masks,
        seeds=2,
        vmap_seeds=True,
        tost=ToSTConfig(neurons="swish", ghost_fraction=0.5),
    )
    with pytest.raises(FileNotFoundError, match=r"no ticket seed2-0\.55\.npz, only s"):
        loop.fit(make(config), [1, 2], tmp_path / "run")
    weights, bits = ticket(found, 0.55)
    ticket_files.write(found.out, 2, 0.55, jax.tree.map(lambda x: 2 * x, weights), bits)
    try:
        each = make(config)
        state = loop.initial_state.state(each.compiled_step_at(0), [1, 2])
    finally:
        (found.out / "seed2-0.55.npz").unlink()
    params = jax.device_get(each.compiled_step_at(0).snapshot(state).params)
    for lane, factor in enumerate((1, 2)):
        expected = jax.tree.map(lambda x, f=factor: f * x, weights)
        assert same(jax.tree.map(lambda x, i=lane: x[i], params), expected)


def test_goes_on_where_it_was_stopped(found, tmp_path, monkeypatch):
    config = dataclasses.replace(found, out=tmp_path / "other")
    asked = itertools.count()

    def reached(self: Any, step: int) -> int | None:
        del self, step
        return signal.SIGTERM if next(asked) in (4, 13, 22) else None

    monkeypatch.setattr(train.StopSignal, "reached", reached)
    for _ in range(3):
        with pytest.raises(loop.StoppedError) as stopped:
            lottery.run(config)
        assert stopped.value.__notes__ == ["Go on with the same command."]
    lottery.run(config)
    for sparsity in SPARSITIES:
        assert same(ticket(config, sparsity), ticket(found, sparsity))
    for number in range(len(SPARSITIES) + 1):
        assert same(final(config, number), final(found, number))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"sparsities": ()}, "sparsities must not be empty"),
    "falling": ({"sparsities": (0.9, 0.5)}, "and rise, got 0.9, 0.5"),
    "zero": ({"sparsities": (0.0, 0.5)}, r"must lie in \(0, 1\)"),
    "one": ({"sparsities": (0.5, 1.0)}, r"must lie in \(0, 1\)"),
    "rewind": ({"rewind_steps": 8}, "rewind_steps must lie in .*, got 8 of 8"),
    "method": (
        {"train": dataclasses.replace(TRAINING, method="gmp", sparsity=0.5)},
        "train.method is not for lottery tickets",
    ),
    "sparsity": (
        {"train": dataclasses.replace(TRAINING, sparsity=0.5)},
        "train.sparsity is not for lottery tickets",
    ),
    "tost": (
        {"train": dataclasses.replace(TRAINING, tost=ToSTConfig(labels=0.1))},
        "train.tost is not for lottery tickets",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_of_the_configuration(name, tmp_path):
    changes, message = WRONG[name]
    values = {"sparsities": SPARSITIES, "out": tmp_path, "train": TRAINING}
    with pytest.raises(ValueError, match=message):
        LotteryConfig(**(values | changes))


def test_another_lottery_in_the_folder_is_refused(found):
    with pytest.raises(ValueError, match="holds a run with sparsities="):
        lottery.run(dataclasses.replace(found, sparsities=(0.5, 0.9)))


def test_tickets_of_another_network_or_damaged_are_refused(found, tmp_path):
    state = final(found, 0)
    params, masks = state.params, state.opt_state.masks
    weights, bits = ticket(found, 0.3)
    ticket_files.write(tmp_path, 0, 0.5, weights, bits)
    with pytest.raises(ValueError, match="35140 active weights instead of 25100"):
        ticket_files.read(tmp_path, 0, 0.5, params, masks)
    ticket_files.write(tmp_path, 0, 0.3, {"output": weights["output"]}, bits)
    with pytest.raises(ValueError, match=r"not a ticket of this network.*hidden_0"):
        ticket_files.read(tmp_path, 0, 0.3, params, masks)
    wider = jax.tree.map(lambda x: np.concatenate([x, x], -1), weights)
    ticket_files.write(tmp_path, 0, 0.3, wider, bits)
    with pytest.raises(ValueError, match=r"shape \(600,\) instead of \(300,\)"):
        ticket_files.read(tmp_path, 0, 0.3, params, masks)
    file = tmp_path / "seed0-0.3.npz"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"seed0-0\.3\.npz is not a ticket"):
        ticket_files.read(tmp_path, 0, 0.3, params, masks)


def test_the_command_line(tmp_path, capsys):
    out = tmp_path / "tickets"
    command = ["0.5", "--out", str(out), "--train.model", "lenet-300-100"]
    command += ["--train.steps", "2", "--train.seeds", "1", "--train.no-progress"]
    assert lottery.main(command) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "seed 0, 0 sparse",
        "seed 0, 0.5 sparse",
    ]
    assert (out / "seed0-0.5.npz").exists()
    assert lottery.main(["0.5", *command[1:3], "--train.steps", "2"]) == 2
    assert "holds a run with" in capsys.readouterr().err


def test_options_of_tickets_are_checked():
    for masks, message in (
        (MaskConfig(source="tickets"), "masks.tickets is missing"),
        (MaskConfig(source="snip", tickets="x"), "masks.tickets is an option of"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(TRAINING, sparsity=0.9, masks=masks)
