# %% [markdown]
# # Your own method
#
# [![Open in Colab][badge]][colab]
#
# A method of `granet_jax` is a record: a sparsity schedule, the steps of its mask
# updates, and phases that turn masks into new masks. To try an idea, replace one of
# them. Here are a score, a schedule, a pair of phases and a source of initial masks, a
# few lines each, and a training with each of them.
#
# [badge]: https://colab.research.google.com/assets/colab-badge.svg
# [colab]: https://colab.research.google.com/github/granet-jax/granet_jax/blob/main/notebooks/your_own_method.ipynb

# %%
import os
import sys

if "google.colab" in sys.modules:  # Fetch and install the repository.
    os.system("git clone -q https://github.com/granet-jax/granet_jax")
    os.system("pip install -q './granet_jax[notebooks]'")
    os.chdir("granet_jax/notebooks")
sys.path.insert(0, "..")  # `experiments` is not installed.

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import optax
from matplotlib.figure import Figure

import granet_jax
from experiments import data
from granet_jax import mask_sources, schedules, scores
from granet_jax.analysis import plots
from granet_jax.phases import Exchange, Prune

# %matplotlib inline
matplotlib.rcParams["figure.dpi"] = 80
STEPS = int(os.environ.get("NOTEBOOK_STEPS", "400"))
INTERVAL = STEPS // 20  # Steps between mask updates.
SPARSITY = 0.95
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


def initial(seed):
    return network.init(jax.random.key(seed), x[:1])["params"]


# %% [markdown]
# ## A score
#
# A score gets `ScoreInputs`, which describes one leaf at an update: its weights, dense
# gradient and mask. It returns one number per weight, and the largest are kept. This
# score is how much the loss would change, to first order, if the weight became zero.
# Gradual magnitude pruning is one phase, `Prune()`; `by` replaces its score. With
# `needs_gradient`, a missing gradient is an error at once.


# %%
def saliency(inputs: granet_jax.ScoreInputs):
    return jnp.abs(inputs.param * inputs.grad)


gmp = granet_jax.gmp(SPARSITY, end_step=STEPS // 2, interval=INTERVAL)
by_saliency = dataclasses.replace(
    gmp, name="by saliency", phases=(Prune(by=saliency),), needs_gradient=True
)

# %% [markdown]
# ## A schedule
#
# A schedule is a function of the step, evaluated before training. This one is a
# staircase: it halves the number of weights four times, and then goes to the final
# sparsity.

# %%
stairs = [STEPS * i // 10 for i in range(1, 6)]


def staircase(step):
    done = sum(step >= stair for stair in stairs)
    return SPARSITY if done == len(stairs) else 1 - 0.5**done


by_stairs = dataclasses.replace(
    gmp, name="in stairs", sparsity=staircase, updates=schedules.listed(stairs)
)
plots.sparsities({"gmp": gmp, "in stairs": by_stairs}, STEPS)

# %% [markdown]
# ## Phases
#
# Phases run one after the other at every update. This method prunes like `gmp`, and
# then replaces a tenth of the remaining weights in every layer by random inactive ones,
# which is GraNet with random growth.

# %%
with_exchange = dataclasses.replace(
    gmp,
    name="with exchange",
    phases=(Prune(), Exchange(schedules.constant(0.1), grow=scores.random)),
)

# %% [markdown]
# A phase of your own is a small class with an `__call__` from masks to masks; the page
# "Custom methods" of the documentation has one that keeps a state.
#
# ## A source of masks
#
# Any method can start from masks that you bring. `from_score` makes masks from a score,
# with exactly the requested number of active weights. This score keeps the largest
# initial weights, and in the first layer prefers pixels that vary much over the
# training images. The comparison is with random masks that have equally many weights in
# each layer.


# %%
def contrast(inputs: granet_jax.ScoreInputs):
    size = jnp.abs(inputs.param)
    return size * x.std(0)[:, None] if inputs.name == "layer_1/kernel" else size


def by_contrast(params, seed):
    del seed
    return mask_sources.from_score(contrast, params, SPARSITY, scope="layer")


def at_random(params, seed):
    key = jax.random.key(seed)
    return mask_sources.random(params, SPARSITY, key=key, distribution="uniform")


static = granet_jax.static(SPARSITY)
print(granet_jax.sparsity(by_contrast(initial(0), seed=0)).leaves)

# %% [markdown]
# ## Train and compare
#
# All methods use the same loop. `set_masks` puts masks into the optimizer's state. (For
# a single run, pass them as `transform(..., masks=masks)`.)


# %%
def train(method, masks_of=None):
    """Return the test accuracy of every seed."""
    tx = granet_jax.transform(method, optax.adam(2e-3))

    @jax.jit
    def update(params, opt_state, key):
        batch = jax.random.choice(key, len(x), (128,))
        grads = jax.grad(loss)(params, x[batch], y[batch])
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    accuracies = []
    for seed in range(SEEDS):
        params = initial(seed)
        opt_state = tx.init(params)
        if masks_of is not None:
            opt_state = granet_jax.set_masks(opt_state, masks_of(params, seed))
        params = granet_jax.apply_masks(params, granet_jax.get_masks(opt_state))
        for key in jax.random.split(jax.random.key(seed), STEPS):
            params, opt_state = update(params, opt_state, key)
        active = granet_jax.sparsity(granet_jax.get_masks(opt_state)).active
        assert active == 2_510  # 5% of 50,200 weights.
        accuracies.append(float((logits(params, x_test).argmax(1) == y_test).mean()))
    return accuracies


results = {
    "gmp": train(gmp),
    "gmp, by saliency": train(by_saliency),
    "gmp, in stairs": train(by_stairs),
    "gmp, with exchange": train(with_exchange),
    "static, random": train(static, at_random),
    "static, by contrast": train(static, by_contrast),
}
for name, accuracies in results.items():
    print(f"{name:20}", *(f"{accuracy:.1%}" for accuracy in accuracies))

# %%
figure = Figure(figsize=(7, 2.8), layout="constrained")
axes = figure.subplots()
for row, accuracies in enumerate(results.values()):
    # Offsets keep equal accuracies visible.
    rows = jnp.linspace(row - 0.15, row + 0.15, SEEDS)
    axes.plot([100 * a for a in accuracies], rows, "o", color="#0072B2")
    mean = 100 * sum(accuracies) / SEEDS
    axes.plot(mean, row, "|", color="#D55E00", markersize=20, markeredgewidth=2)
axes.set_yticks(range(len(results)), list(results))
axes.set_ylim(len(results) - 0.5, -0.5)
axes.set(
    title=f"{SPARSITY:.0%} sparse: {SEEDS} seeds (dots) and their mean (bar)",
    xlabel="test accuracy / %",
)
axes.grid(alpha=0.3)
figure

# %% [markdown]
# One test image is 0.17%, and these are three seeds of a small network, so differences
# of a few images mean nothing. `python -m experiments.sweep` compares methods over more
# data, seeds and sparsities; see [`experiments/`](../experiments/README.md#sweeps).
