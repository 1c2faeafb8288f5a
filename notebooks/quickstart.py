# %% [markdown]
# # From a dense optimizer to a sparse network
#
# [![Open in Colab][badge]][colab]
#
# A small network learns to read handwritten digits, first with all of its weights, then
# with GraNet, which prunes nine tenths of them while it trains. What changes in the
# program is two lines.
#
# [badge]: https://colab.research.google.com/assets/colab-badge.svg
# [colab]: https://colab.research.google.com/github/granet-jax/granet_jax/blob/main/notebooks/quickstart.ipynb

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
import optax

import granet_jax
from experiments import data
from granet_jax import analysis
from granet_jax.analysis import plots

# %matplotlib inline
matplotlib.rcParams["figure.dpi"] = 80
STEPS = int(os.environ.get("NOTEBOOK_STEPS", "1200"))

# %% [markdown]
# ## Data, network and loss
#
# 1,797 images of 8 x 8 pixels come with scikit-learn; a third of them is the test set.

# %%
digits = data.load("digits")


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


def accuracy(params):
    return float((logits(params, x_test).argmax(1) == y_test).mean())


# %% [markdown]
# ## A loop as any other
#
# Nothing in it knows of masks. (`look` is called after every step, for the plots
# below.)


# %%
def train(tx, look=lambda step, opt_state: None):
    @jax.jit
    def update(params, opt_state, key):
        batch = jax.random.choice(key, len(x), (128,))
        grads = jax.grad(loss)(params, x[batch], y[batch])
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = network.init(jax.random.key(0), x[:1])["params"]
    opt_state = tx.init(params)
    look(0, opt_state)
    for step in range(1, STEPS + 1):
        params, opt_state = update(params, opt_state, jax.random.key(step))
        look(step, opt_state)
    return params, opt_state


# %% [markdown]
# ## Dense

# %%
dense_tx = optax.adam(2e-3)
dense_params, _ = train(dense_tx)
print(f"dense: test accuracy {accuracy(dense_params):.1%}")

# %% [markdown]
# ## Sparse
#
# These are the two lines. `granet` says what to do: prune to 90% in the first half of
# the training, and exchange some weights at every update of the masks, to the end.
# `transform` makes an optimizer of it that steers yours.

# %%
INTERVAL = STEPS // 60  # Steps from one update of the masks to the next.
method = granet_jax.granet(sparsity=0.9, total_steps=STEPS, interval=INTERVAL)
sparse_tx = granet_jax.transform(method, inner=dense_tx)

# %%
history = {}


def look(step, opt_state):
    if step % INTERVAL == 0:
        history[step] = granet_jax.sparsity(granet_jax.get_masks(opt_state))


params, opt_state = train(sparse_tx, look)
masks = granet_jax.get_masks(opt_state)
print(f"GraNet: test accuracy {accuracy(params):.1%}")
print(f"dense:  test accuracy {accuracy(dense_params):.1%}")

# %% [markdown]
# One image of the test set is 0.17%, and each of these is a single run: read no more
# from them than that a tenth of the weights is enough. Comparisons over several seeds,
# on larger data, are among the results of the repository.
#
# ## What is left
#
# The number of active weights is the one asked for, to the weight, and all others are
# zero: not small, but 0.0.

# %%
report = granet_jax.sparsity(masks)
print(f"{report.active:,} of {report.total:,} weights are active")
assert report.total == 64 * 300 + 300 * 100 + 100 * 10
assert report.active == report.total // 10
for layer in ("layer_1", "layer_2", "layer_3"):
    kernel, mask = params[layer]["kernel"], masks[layer]["kernel"]
    assert bool(jnp.all(kernel[~mask] == 0.0))

# %% [markdown]
# Weights compete across layers: the first keeps a larger share of its own. FLOPs are
# those of one image, two for each multiply-add with an active weight. They say what
# sparse kernels could save; JAX computes with dense arrays here, so that nothing runs
# faster yet.

# %%
flops = analysis.flops(logits, params, masks, x[:1])
print(analysis.summary(params, masks, flops))

# %% [markdown]
# ## How it came about
#
# The density of all weights falls by the cubic schedule of the method until half of the
# training; how it is split over the layers is found on the way. From then on each layer
# keeps its number of weights, and exchanges some of them at every update.

# %%
plots.densities_over_time(history, title="GraNet: density over the training")

# %% [markdown]
# The split that GraNet found, beside the one that the rule ERK gives to a sparse start.

# %%
erk = granet_jax.init_masks(granet_jax.static(0.9, distribution="erk"), params)
plots.densities({"GraNet": report, "ERK": granet_jax.sparsity(erk)})

# %% [markdown]
# ## Next
#
# - [`exploring_masks`](exploring_masks.ipynb): which weights stay, and how masks move.
# - [`pruning_plasticity`](pruning_plasticity.ipynb): when pruning hurts, and when not.
# - [`your_own_method`](your_own_method.ipynb): a score, a schedule, masks of your own.
# - [`any_model`](any_model.ipynb): flax.nnx, equinox, a transformer, several devices.
