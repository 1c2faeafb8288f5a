"""The library against runs recorded from the authors' PyTorch implementation.

The reference counts differently. At update j of n it keeps the weights *strictly above*
the value of rank int(N d), which are int(N d) - 1, and it stops pruning at j = n - 1.
With these integers our training must reproduce every mask exactly, and the parameters
up to float32 rounding. Our own schedule rounds to nearest and reaches the final
sparsity exactly; that is a decision.
"""

import functools
import math
import pathlib

import jax
import numpy as np
import optax
import pytest

import granet_jax
from granet_jax import distributions, schedules
from tests.helpers.compiler_options import QUICK
from tests.helpers.training import make_step
from tests.methods.records import fraction_of, with_schedules

DATA = pathlib.Path(__file__).parent / "data" / "granet_reference.npz"
RUNS = ("granet_st", "granet", "gmp", "rigl_itop")
MASKED = ("w0", "w1", "w2", "w3")
LEAVES = ("bias", *MASKED)
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4


@functools.cache
def recorded(run):
    with np.load(DATA) as file:
        return {
            key.removeprefix(f"{run}/"): file[key]
            for key in file.files
            if key.startswith(f"{run}/")
        }


@functools.cache
def meta(run):
    names = ["seed", "initial", "final", "interval", "steps", "end", "fraction", "rate"]
    values = dict(zip(names, recorded(run)["meta"].tolist(), strict=True))
    for name in ("interval", "steps", "end"):
        values[name] = int(values[name])
    return values


def tree(run, prefix, leaves=MASKED):
    return {leaf: recorded(run)[f"{prefix}/{leaf}"] for leaf in leaves}


def size_of(run):
    return sum(x.size for x in tree(run, "init").values())


def update_steps(run):
    m = meta(run)
    return range(m["interval"], m["steps"] + 1, m["interval"])


def reference_keep(run, step):
    """The number of weights that the reference keeps at a step, None if all."""
    m = meta(run)
    j, n = step // m["interval"], m["end"] // m["interval"]
    if run == "rigl_itop" or j > n - 1:
        return None
    density = m["final"] + (m["initial"] - m["final"]) * (1 - j / n) ** 3
    return int(size_of(run) * density) - 1


def cosine(run):
    # The ITOP code has GraNet's final fraction of 0.005 as well.
    return schedules.cosine(meta(run)["fraction"], 0.005, steps=meta(run)["steps"])


def our_method(run):
    """Our method with the run's hyperparameters."""
    m = meta(run)
    sparsity, every = 1.0 - m["final"], {"interval": m["interval"]}
    exchange = {"fraction": m["fraction"], **every}
    if run == "rigl_itop":
        return granet_jax.rigl(sparsity, m["steps"], stop=1.0, **exchange)
    start = {"initial_sparsity": 1.0 - m["initial"]}
    if run == "gmp":
        return granet_jax.gmp(sparsity, m["end"], **start, **every)
    end = {"end_step": m["end"], **start}
    return granet_jax.granet(sparsity, m["steps"], **end, **exchange)


@pytest.mark.parametrize("run", RUNS)
def test_transform_reproduces_every_mask(run):
    # The sparsity is the reference's own count; before any pruning, that of the masks.
    masks = {"bias": None, **tree(run, "mask0")}
    first = sum(int(m.sum()) for m in tree(run, "mask0").values())

    def sparsity(step):
        keeps = [reference_keep(run, t) for t in update_steps(run) if t <= step]
        keeps = [first, *(k for k in keeps if k is not None)]
        return 1.0 - keeps[-1] / size_of(run)

    steps = schedules.every(meta(run)["interval"], last=meta(run)["steps"])
    method = with_schedules(
        our_method(run), sparsity=sparsity, updates=steps, fraction=cosine(run)
    )
    params = tree(run, "init", LEAVES)
    tx = granet_jax.transform(
        method,
        optax.chain(
            optax.add_decayed_weights(WEIGHT_DECAY),
            optax.sgd(meta(run)["rate"], momentum=MOMENTUM, nesterov=True),
        ),
        masks=masks,
    )
    state = tx.init(params)
    params = granet_jax.apply_masks(params, granet_jax.get_masks(state))

    train_step = jax.jit(make_step(tx), compiler_options=QUICK)
    for step in range(1, meta(run)["steps"] + 1):
        params, state = train_step(params, state, tree(run, f"g/{step}", LEAVES))
        if step not in update_steps(run):
            continue
        for leaf, expected in tree(run, f"param/{step}", LEAVES).items():
            # 60 steps, each a few float32 roundings, of numbers up to 7: 2.4e-7 each.
            np.testing.assert_allclose(params[leaf], expected, rtol=0, atol=2e-6)
        for leaf, expected in tree(run, f"mask/{step}").items():
            mask = np.asarray(granet_jax.get_masks(state)[leaf])
            np.testing.assert_array_equal(mask, expected, f"{leaf} at step {step}")
            assert not np.asarray(params[leaf])[~mask].any()


@pytest.mark.parametrize("run", ["granet_st", "granet", "rigl_itop"])
def test_prune_fraction(run):
    method = our_method(run)
    fraction = cosine(run) if run == "rigl_itop" else fraction_of(method)
    # Theirs exchanges in the last step too, and ours does not: that is a decision.
    *steps, last = update_steps(run)
    assert list(method.updates.steps()) == steps
    assert last == meta(run)["steps"]
    for step in steps:
        theirs = float(recorded(run)[f"rate/{step}"])
        assert fraction(step) == pytest.approx(theirs, rel=0, abs=1e-15)


@pytest.mark.parametrize("run", ["granet_st", "granet", "gmp"])
def test_our_schedule_differs_from_the_reference_only_where_decided(run):
    method, size = our_method(run), size_of(run)
    m = meta(run)
    assert list(method.updates.steps())[: m["end"] // m["interval"]] == [
        t for t in update_steps(run) if t <= m["end"]
    ]
    before = m["end"] - m["interval"]
    for step in update_steps(run):
        ours = distributions.total_count(size, method.sparsity(step))
        theirs = sum(int(x.sum()) for x in tree(run, f"mask/{step}").values())
        if step <= before:
            density = 1.0 - method.sparsity(step)
            assert theirs == int(size * density) - 1 == reference_keep(run, step)
            # Ours is rounded to nearest; the reference's down, less one.
            assert ours == math.floor(size * density + 0.5)
            assert ours - theirs in (1, 2)
        else:
            # Ours has the final sparsity; the reference keeps that of j = n - 1.
            assert method.sparsity(step) == 1.0 - m["final"]
            assert ours == math.floor(size * m["final"] + 0.5) == 199
            assert theirs == reference_keep(run, before)
    assert (ours, theirs) == (199, 199 if run == "granet_st" else 201)


@pytest.mark.parametrize("run", ["granet_st", "rigl_itop"])
def test_erk_densities(run):
    shapes = [x.shape for x in tree(run, "init").values()]
    ours = distributions.densities(shapes, 1.0 - meta(run)["initial"], "erk")
    # At density 0.5 the last leaf is dense, as in the reference.
    assert (ours[3] == 1.0) == (run == "granet_st")
    for p, mask in zip(ours, tree(run, "mask0").values(), strict=True):
        # One Bernoulli draw per weight.
        deviation = math.sqrt(p * (1.0 - p) * mask.size)
        assert abs(int(mask.sum()) - p * mask.size) <= 3.0 * deviation
