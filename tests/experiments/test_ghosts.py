"""Networks with ghosts: how they train, and that nothing of the ghosts remains."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models
from experiments.config.run import Config, MaskConfig, OptimizerConfig, ToSTConfig
from experiments.training import loop
from granet_jax import distributions, masking, tost
from tests.helpers import runs

CONFIG = dataclasses.replace(
    runs.CONFIG,
    model="cnn-bn-small",
    method="rigl",
    steps=12,
    eval_every=3,
    masks=MaskConfig(interval=2),
    tost=ToSTConfig(neurons="swish", skips="conv", ghost_fraction=0.5),
)
STATIC = dataclasses.replace(CONFIG, method="static", masks=MaskConfig())
LENET = dataclasses.replace(
    STATIC,
    model="lenet-300-100",
    tost=ToSTConfig(neurons="swish", ghost_fraction=0.42),
)
setup = runs.create_setup


def with_ghosts(alpha: Any) -> models.Ghosts:
    skip = models.Skip(tost.Skips(kind="conv"), jnp.float32(alpha))
    return models.Ghosts(lambda x: tost.soft_relu(x, 2.0), skip)


@pytest.mark.parametrize(
    "name", ["cnn", "vgg-16", "resnet-20", "wrn-22-2", "mobilenet-v1", "mobilenet-v2"]
)
def test_ghosts_stand_beside_the_convolutions(name):
    model = models.create(name, classes=10)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    init = functools.partial(model.init, jax.random.key(0), train=False)
    with_ghost = jax.eval_shape(lambda x: init(x, ghosts=with_ghosts(1.0)), x)
    assert tost.drop_ghosts(with_ghost) == jax.eval_shape(init, x)
    leaves = {
        masking.leaf_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(with_ghost["params"])
    }
    ghosts = [name for name in leaves if tost.is_ghost(name)]
    kernels = [name for name in ghosts if name.endswith("kernel")]
    # Beside every 3 x 3 convolution but a stem; in MobileNets beside all of a pair.
    sizes = [leaf.shape[:2] for leaf in leaves.values() if leaf.ndim == 4]
    expected = sizes.count((3, 3)) - name.startswith(("resnet", "wrn"))
    if name.startswith("mobilenet"):
        expected = len(sizes) - len(kernels)
    assert len(kernels) == expected > 2
    assert not any(models.maskable(name, leaves[name]) for name in ghosts)


def test_ghosts_change_no_weight_of_the_network():
    x = jax.random.normal(jax.random.key(0), (2, 12, 12, 3))
    model = models.create("cnn-bn-small", classes=10)

    @jax.jit
    def outputs(key, alpha):
        faint = models.Ghosts(skip=models.Skip(tost.Skips(kind="conv"), alpha))
        plain = model.init(key, x, train=False)
        with_ghost = model.init(key, x, train=False, ghosts=with_ghosts(1.0))
        apply = functools.partial(model.apply, train=False)
        return (
            (plain, with_ghost),
            apply(plain, x),
            apply(with_ghost, x, ghosts=faint),
            apply(with_ghost, x, ghosts=with_ghosts(1.0)),
        )

    (plain, with_ghost), without, none, full = outputs(
        jax.random.key(1), jnp.float32(0)
    )
    assert runs.same(tost.drop_ghosts(with_ghost), plain)
    np.testing.assert_allclose(none, without, rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(full - without)).max() > 0.1


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Any, Any]:
    """The records and the state of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    (records,), state = loop.fit(setup(CONFIG), [0], folder)
    return records, jax.device_get(state)


def assert_plain(config: Config, devices: int, records: Any, state: Any) -> None:
    """Assert that the network with this state is the one without ghosts."""
    each = setup(config, devices)
    plain = setup(dataclasses.replace(config, tost=ToSTConfig()), devices)
    expected = plain.compiled_step.create([0])
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    active = distributions.total_count(sum(each.mask_sizes.values()), 0.9)
    assert [r.sparsity.active for r in records] == 5 * [active]
    # Its function is that of the plain network, bit for bit.
    (batch,) = loop.padded_batches(each.dataset.test, 1024, devices)
    placed = plain.compiled_step.place_test(batch)
    scores = [
        jax.device_get(x.compiled_step.evaluate(state, placed)) for x in (plain, each)
    ]
    assert int(scores[0].correct[0]) == records[-1].test_correct
    assert runs.same(*scores)


def test_after_the_ghosts_the_network_is_the_plain_one(whole):
    assert_plain(CONFIG, 1, *whole)
    each = setup(CONFIG)
    early = each.ghost_step
    assert early is not None
    assert CONFIG.ghost_steps == 6
    with_ghost = [each.compiled_step_at(step) is early for step in (0, 5, 6, 12)]
    assert with_ghost == [True, True, False, False]
    # By hand: six steps with ghosts, their end, six without.
    state = early.create([0])
    for _ in range(6):
        state, _ = early.steps(state, each.train_data, 1)
    assert "ghost_1" in state.params
    state = tost.drop_ghosts(state)
    for _ in range(6):
        state, _ = each.compiled_step.steps(state, each.train_data, 1)
    assert runs.same(whole[1], jax.device_get(state))


@pytest.mark.parametrize(
    ("form", "devices"),
    [
        ({"fsdp": 2, "optimizer": OptimizerConfig(ema=0.9)}, 4),
        pytest.param({"parallel": "pmap"}, 2, marks=pytest.mark.slow),
    ],
)
def test_after_the_ghosts_the_network_is_plain_on_several_devices(
    form, devices, tmp_path
):
    config = dataclasses.replace(LENET, **form)
    (records,), state = loop.fit(setup(config, devices), [0], tmp_path)
    assert_plain(config, devices, records, state)


def test_blocks_of_steps_end_where_the_ghosts_do(tmp_path):
    assert LENET.ghost_steps == 5
    states = [
        loop.fit(setup(config), [0], tmp_path / str(config.scan_block))[1]
        for config in (LENET, dataclasses.replace(LENET, scan_block=4))
    ]
    runs.assert_close(*states, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("stop", [4, 6])
def test_a_run_stopped_in_any_phase_continues_exactly(stop, whole, tmp_path):
    with pytest.raises(loop.StoppedError):
        loop.fit(setup(CONFIG), [0], tmp_path, stopped={stop: 15}.get)
    (records,), rest = loop.fit(setup(CONFIG), [0], tmp_path)
    assert runs.same(whole[1], jax.device_get(rest))
    for a, b in zip(records, whole[0], strict=True):
        assert a._replace(seconds=0.0) == b._replace(seconds=0.0)


def test_ghosts_as_in_the_code_are_kept(tmp_path):
    config = runs.replace_options(
        STATIC, {"tost.as_in_code": True, "tost.ghost_fraction": None}
    )
    each = setup(config)
    (records,), state = loop.fit(each, [0], tmp_path)
    assert each.compiled_step_at(12) is each.ghost_step
    kernel = np.asarray(state.params["ghost_1"]["ghost_conv"]["kernel"])
    assert kernel.shape == (1, 1, 16, 32)
    assert kernel.all()
    # All output channels start equal, and become different.
    start = each.ghost_step.create([0]).params["ghost_1"]["ghost_conv"]["kernel"]
    assert np.array_equal(start, np.full((1, 1, 16, 32), 1e-4, np.float32))
    assert not np.array_equal(kernel, start)
    # They carry no mask and are not counted.
    total = sum(9 * n for n in (16, 16 * 32, 32 * 64)) + 64 * 10
    assert records[-1].sparsity.active == distributions.total_count(total, 0.9)
    assert "ghost_1/ghost_conv/kernel" not in records[-1].sparsity.leaves


def test_refined_labels_are_in_the_loss_of_training_only(monkeypatch):
    runs.use_small_networks(monkeypatch)
    plain = dataclasses.replace(LENET, tost=ToSTConfig())
    refined = dataclasses.replace(plain, tost=ToSTConfig(labels=0.1))
    # In the usual convention the same amount is larger by 10 / 9.
    smoothed = {"optimizer.label_smoothing": 0.1 * 10 / 9}
    losses, scores = [], []
    for config in (refined, runs.replace_options(plain, smoothed), plain):
        each = setup(config)
        state = each.compiled_step.create([0])
        (batch,) = each.test_batches or ()
        scores.append(each.compiled_step.evaluate(state, batch).loss[0])
        _, loss = each.compiled_step.steps(state, each.train_data, 1)
        losses.append(float(loss[0, 0]))
    assert scores[0] == scores[1] == scores[2]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert abs(losses[0] - losses[2]) > 1e-4
