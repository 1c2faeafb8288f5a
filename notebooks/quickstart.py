# %% [markdown]
# # From a dense optimizer to a sparse network
#
# [![Open in Colab][badge]][colab]
#
# A small network learns to read handwritten digits: first with all of its weights, then
# with GraNet, which prunes nine tenths of them during training. Two lines of the
# program change.
#
# [badge]: https://colab.research.google.com/assets/colab-badge.svg
# [colab]: https://colab.research.google.com/github/granet-jax/granet_jax/blob/main/notebooks/quickstart.ipynb

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
# scikit-learn has 1,797 images of 8 x 8 pixels. A third of them is the test set.

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
# ## An ordinary training loop
#
# The loop does not mention masks. It calls `look` after every step, for the plots
# below.


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
# These are the two lines. `granet` is the method: prune to 90% in the first half of the
# training, and exchange some weights at every mask update until the end. `transform`
# makes an optimizer that applies the method to yours.

# %%
INTERVAL = STEPS // 60  # Steps between mask updates.
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
# One test image is 0.17%, and each number is from a single run. They only show that a
# tenth of the weights is enough. The results of the repository compare methods over
# several seeds and on larger data.
#
# ## The sparse network
#
# Exactly the requested number of weights is active. All others are exactly 0.0.

# %%
report = granet_jax.sparsity(masks)
print(f"{report.active:,} of {report.total:,} weights are active")
assert report.total == 64 * 300 + 300 * 100 + 100 * 10
assert report.active == report.total // 10
for layer in ("layer_1", "layer_2", "layer_3"):
    kernel, mask = params[layer]["kernel"], masks[layer]["kernel"]
    assert bool(jnp.all(kernel[~mask] == 0.0))

# %% [markdown]
# Weights compete across layers, so the layers end with different densities. FLOPs are
# for one image, two for each multiply-add with an active weight. They are what sparse
# kernels could reach. JAX computes with dense arrays here, so nothing runs faster yet.

# %%
flops = analysis.flops(logits, params, masks, x[:1])
print(analysis.summary(params, masks, flops))

# %% [markdown]
# ## Density over the training
#
# The overall density falls by the cubic schedule of the method until half of the
# training, and pruning by magnitude decides how the layers share it. After that, each
# layer keeps its number of weights and exchanges some of them at every update.

# %%
plots.densities_over_time(history, title="GraNet: density over the training")

# %% [markdown]
# The density of each layer, by GraNet and by the rule ERK for methods that start
# sparse.

# %%
erk = granet_jax.init_masks(granet_jax.static(0.9, distribution="erk"), params)
plots.densities({"GraNet": report, "ERK": granet_jax.sparsity(erk)})

# %% [markdown]
# ## Next
#
# - [`exploring_masks`](exploring_masks.ipynb): which weights remain, and how masks
#   move.
# - [`pruning_plasticity`](pruning_plasticity.ipynb): when pruning hurts.
# - [`your_own_method`](your_own_method.ipynb): your own score, schedule, phase and
#   masks.
# - [`any_model`](any_model.ipynb): flax.nnx, equinox, a transformer, several devices.
