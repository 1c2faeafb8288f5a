# %% [markdown]
# # Pruning plasticity
#
# [![Open in Colab][badge]][colab]
#
# How well does a network recover from being pruned, and does it matter when? GraNet
# rests on a study of this. Here it is in small: a dense network is pruned at six
# moments of its training, trained on for a while, and compared with what it was.
#
# [badge]: https://colab.research.google.com/assets/colab-badge.svg
# [colab]: https://colab.research.google.com/github/granet-jax/granet_jax/blob/main/notebooks/pruning_plasticity.ipynb

# %%
import os
import sys

if "google.colab" in sys.modules:  # A new machine: fetch and install the repository.
    os.system("git clone -q https://github.com/granet-jax/granet_jax")
    os.system("pip install -q './granet_jax[notebooks]'")
    os.chdir("granet_jax/notebooks")
sys.path.insert(0, "..")  # To `experiments`, which is not installed.

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
ON = STEPS // 10  # Steps of training after a pruning.
MOMENTS = [STEPS * i // 6 for i in range(1, 7)]  # When the network is pruned.
DROP = STEPS * 7 // 12  # When the learning rate drops.
RATES = (0.5, 0.9, 0.98)  # Shares of the weights that are pruned.
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
# ## One optimizer for all
#
# `static(0.0)` prunes nothing: it trains densely, and a network whose masks are put in
# place by hand it trains sparsely. So one compiled step serves the whole study. The
# learning rate is part of the optimizer's state. It drops to a tenth once; a pruned
# network is trained on at the rate that the moment of pruning had, as in the paper.

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
    for key in jax.random.split(jax.random.key(100 + seed), ON):
        params, opt_state = update(params, opt_state, key)
    return params


def train_dense(seed):
    """The network and the optimizer's state at each of the moments."""
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
# ## Prune, train on, compare
#
# `keep_counts` says how many weights stay, `prune` chooses them, and `apply_pruned`
# makes zeros of the others and of their momentum. With `regrow`, the share of the
# weights left with the smallest magnitude is dropped too, and as many are grown where
# the gradient is largest: the regeneration of GraNet.


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


found = {}
for seed in range(SEEDS):
    for step, (params, opt_state) in train_dense(seed).items():
        before = float(accuracy(params))
        unpruned = float(accuracy(train_on(params, opt_state, seed)))
        for case in [*((rate, 0.0) for rate in RATES), (0.98, 0.1), (0.98, 0.5)]:
            start, state = prune(params, opt_state, *case)
            after = float(accuracy(train_on(start, state, seed)))
            found[(*case, step, seed)] = analysis.Recovery(
                before, float(accuracy(start)), after, unpruned
            )
for step in MOMENTS:
    recovery = found[0.98, 0.0, step, 0]
    print(
        f"step {step:3}: {recovery.before:6.1%}, pruned by 98% {recovery.pruned:6.1%}, "
        f"trained on {recovery.after:6.1%}, not pruned {recovery.unpruned:6.1%}"
    )


# %% [markdown]
# ## When pruning hurts
#
# Plasticity, as the paper has it, is the accuracy after training on, less the accuracy
# before pruning. Early in training it also counts what the network would have learned
# in that time anyway; `relative` compares with a network that was trained on without
# being pruned. The dashed line is where the learning rate drops.


# %%
def draw(axes, cases, number):
    looks = (("#0072B2", "o-"), ("#E69F00", "s--"), ("#D55E00", "^-."))
    for (label, case), (colour, look) in zip(cases.items(), looks, strict=False):
        points = np.asarray(
            [
                [100 * number(found[(*case, step, seed)]) for seed in range(SEEDS)]
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
# Half of the weights can go at any time, and nothing is lost. Of 90% pruned the network
# recovers all but a point or two. 98% is much, and it matters when: once the learning
# rate has dropped, the steps are too small to mend what pruning broke. Training alone
# does not do that: at one learning rate, the curves are flat or rise. So gradual
# methods, GraNet among them, prune early, while the learning rate is large.
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
# Here regeneration gains nothing, and that of half of the weights costs much: they
# start at zero, and a tenth of the training is short for them. The paper trains on for
# longer, and GraNet regenerates all along the training. The study in full, with gradual
# pruning, other criteria and more data, is `python -m experiments.plasticity`; its
# [results](../experiments/results/README.md) say the same of short training after a
# pruning.
