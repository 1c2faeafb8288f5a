# %% [markdown]
# # Pruning plasticity
#
# [![Open in Colab][badge]][colab]
#
# How well does a network recover from pruning, and does it matter when it is pruned?
# The GraNet paper studies this. Here is a small version of the study: prune a dense
# network at six steps of its training, train it further, and compare it with the
# network before.
#
# [badge]: https://colab.research.google.com/assets/colab-badge.svg
# [colab]: https://colab.research.google.com/github/granet-jax/granet_jax/blob/main/notebooks/pruning_plasticity.ipynb

# %%
import os
import sys

if "google.colab" in sys.modules:  # Fetch and install the repository.
    os.system("git clone -q https://github.com/granet-jax/granet_jax")
    os.system("pip install -q './granet_jax[notebooks]'")
    os.chdir("granet_jax/notebooks")
sys.path.insert(0, "..")  # `experiments` is not installed.

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure

import granet_jax
from experiments import data
from granet_jax import analysis

# %matplotlib inline
matplotlib.rcParams["figure.dpi"] = 80
STEPS = int(os.environ.get("NOTEBOOK_STEPS", "600"))
RECOVERY = STEPS // 10  # Steps of training after pruning.
MOMENTS = [STEPS * i // 6 for i in range(1, 7)]  # Steps at which to prune.
DROP = STEPS * 7 // 12  # Step at which the learning rate drops.
RATES = (0.5, 0.9, 0.98)  # Shares of the weights to prune.
SEEDS = 3

# %% [markdown]
# ## Data and network

# %%
digits = data.load("digits")  # 1,797 images of 8 x 8 pixels


def flat(images):
    return jnp.asarray(images, jnp.float32).reshape(-1, 64) / 255


x, y = flat(digits.train.inputs), jnp.asarray(digits.train.labels)
x_test, y_test = flat(digits.test.inputs), jnp.asarray(digits.test.labels)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(300, name="layer_1")(x))
        x = nn.relu(nn.Dense(100, name="layer_2")(x))
        return nn.Dense(10, name="layer_3")(x)


network = Network()


def logits(params, x):
    return network.apply({"params": params}, x)


def loss(params, x, y):
    entropy = optax.softmax_cross_entropy_with_integer_labels
    return entropy(logits(params, x), y).mean()


@jax.jit
def accuracy(params):
    return (logits(params, x_test).argmax(1) == y_test).mean()


# %% [markdown]
# ## One optimizer for the whole study
#
# `static(0.0)` prunes nothing: it trains densely, and it trains sparsely once we put
# masks into its state. So one compiled step serves the whole study. The learning rate
# is part of the optimizer's state and drops to a tenth once. A pruned network trains
# further at the learning rate of the step at which it was pruned, as in the paper.

# %%
inner = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9)
tx = granet_jax.transform(granet_jax.static(0.0), inner)


@jax.jit
def update(params, opt_state, key):
    batch = jax.random.choice(key, len(x), (128,))
    grads = jax.grad(loss)(params, x[batch], y[batch])
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def train_on(params, opt_state, seed):
    for key in jax.random.split(jax.random.key(100 + seed), RECOVERY):
        params, opt_state = update(params, opt_state, key)
    return params


def train_dense(seed):
    """Return the network and the optimizer's state at each of the moments."""
    params = network.init(jax.random.key(seed), x[:1])["params"]
    opt_state = tx.init(params)
    moments = {}
    for step, key in enumerate(jax.random.split(jax.random.key(seed), STEPS), 1):
        if step == DROP:
            slow = jnp.float32(0.01)
            opt_state = optax.tree_utils.tree_set(opt_state, learning_rate=slow)
        params, opt_state = update(params, opt_state, key)
        if step in MOMENTS:
            moments[step] = (params, opt_state)
    return moments


# %% [markdown]
# ## Prune, train further, compare
#
# `keep_counts` computes how many weights to keep, `prune` chooses them, and
# `apply_pruned` sets the other weights and their momentum to zero. `regrow` is the
# share of the remaining weights to exchange: those with the smallest magnitude are
# dropped, and as many grow where the gradient is largest. This is GraNet's
# regeneration.


# %%
def prune(params, opt_state, sparsity, regrow):
    (keep,) = analysis.keep_counts(opt_state.masks, analysis.sparsities(sparsity))
    grads = jax.grad(loss)(params, x, y)
    pruned = analysis.prune(params, opt_state.masks, keep, regrow=regrow, grads=grads)
    params, moments = analysis.apply_pruned(params, opt_state.inner_state, pruned)
    opt_state = opt_state._replace(inner_state=moments)
    opt_state = granet_jax.set_masks(opt_state, pruned.masks)
    report = granet_jax.sparsity(opt_state.masks)
    assert report.active == int(keep) == round((1 - sparsity) * report.total)
    return params, opt_state


recoveries = {}
for seed in range(SEEDS):
    for step, (params, opt_state) in train_dense(seed).items():
        before = float(accuracy(params))
        unpruned = float(accuracy(train_on(params, opt_state, seed)))
        for case in [*((rate, 0.0) for rate in RATES), (0.98, 0.1), (0.98, 0.5)]:
            start, state = prune(params, opt_state, *case)
            after = float(accuracy(train_on(start, state, seed)))
            recoveries[(*case, step, seed)] = analysis.Recovery(
                before, float(accuracy(start)), after, unpruned
            )
for step in MOMENTS:
    recovery = recoveries[0.98, 0.0, step, 0]
    print(
        f"step {step:3}: {recovery.before:6.1%}, pruned by 98% {recovery.pruned:6.1%}, "
        f"recovered {recovery.after:6.1%}, not pruned {recovery.unpruned:6.1%}"
    )


# %% [markdown]
# ## When pruning hurts
#
# Plasticity, as in the paper, is the accuracy after further training minus the accuracy
# before pruning. Early in training it includes what the network would have learned
# anyway; `relative` compares with a network that trained further without pruning. The
# learning rate drops at the dashed line.


# %%
def draw(axes, cases, number):
    looks = (("#0072B2", "o-"), ("#E69F00", "s--"), ("#D55E00", "^-."))
    for (label, case), (colour, look) in zip(cases.items(), looks, strict=False):
        points = np.asarray(
            [
                [100 * number(recoveries[(*case, step, seed)]) for seed in range(SEEDS)]
                for step in MOMENTS
            ]
        )
        axes.errorbar(
            MOMENTS,
            points.mean(1),
            yerr=points.std(1, ddof=1),
            fmt=look,
            color=colour,
            capsize=3,
            label=label,
        )
    axes.axvline(DROP, color="grey", linestyle="--", linewidth=1)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("pruned at step")
    axes.grid(alpha=0.3)


figure = Figure(figsize=(9.5, 3.6), layout="constrained")
left, right = figure.subplots(1, 2)
cases = {f"{rate:.0%} pruned": (rate, 0.0) for rate in RATES}
draw(left, cases, lambda recovery: recovery.plasticity)
draw(right, cases, lambda recovery: recovery.relative)
left.set(title="plasticity: after - before", ylabel="accuracy / points, mean ± std")
right.set(title="relative: after - not pruned")
figure.legend(
    *left.get_legend_handles_labels(), loc="outside right center", frameon=False
)
figure

# %% [markdown]
# Pruning half of the weights costs nothing at any step. After pruning 90%, the network
# recovers all but a point or two. At 98% the step matters: once the learning rate has
# dropped, the steps are too small to repair the damage. Training alone does not have
# this effect: at one learning rate, the curves are flat or rise. So gradual methods
# such as GraNet prune early, while the learning rate is large.
#
# ## Regeneration

# %%
figure = Figure(figsize=(7.5, 3.6), layout="constrained")
axes = figure.subplots()
cases = {
    "98% pruned": (0.98, 0.0),
    "a tenth of the\nrest regenerated": (0.98, 0.1),
    "half of the\nrest regenerated": (0.98, 0.5),
}
draw(axes, cases, lambda recovery: recovery.relative)
axes.set(
    title="With regeneration and without",
    ylabel="after - not pruned\naccuracy / points, mean ± std",
)
figure.legend(loc="outside right center", frameon=False)
figure

# %% [markdown]
# Here regeneration gains nothing, and regenerating half of the weights costs much: they
# start at zero, and a tenth of the training is too short for them. The paper trains
# further for longer, and GraNet regenerates throughout the training. The full study,
# with gradual pruning, other criteria and more data, is `python -m
# experiments.plasticity`; its
# [results](../experiments/results/README.md) agree about short training after pruning.
