# %% [markdown]
# # Exploring masks
#
# [![Open in Colab][badge]][colab]
#
# Masks are trees of boolean arrays with the structure of the parameters, so everything
# that works on arrays works on them. This notebook shows how masks move in training,
# which pixels they keep, and how similar the masks of different methods and seeds are.
#
# [badge]: https://colab.research.google.com/assets/colab-badge.svg
# [colab]: https://colab.research.google.com/github/granet-jax/granet_jax/blob/main/notebooks/exploring_masks.ipynb

# %%
import os
import sys

if "google.colab" in sys.modules:  # Fetch and install the repository.
    os.system("git clone -q https://github.com/granet-jax/granet_jax")
    os.system("pip install -q './granet_jax[notebooks]'")
    os.chdir("granet_jax/notebooks")
sys.path.insert(0, "..")  # `experiments` is not installed.

import flax.linen as nn
import ipywidgets
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure

import granet_jax
from experiments import data
from granet_jax import analysis
from granet_jax.analysis import plots

# %matplotlib inline
matplotlib.rcParams["figure.dpi"] = 80
STEPS = int(os.environ.get("NOTEBOOK_STEPS", "400"))
INTERVAL = STEPS // 20  # Steps between mask updates.

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


def accuracy(params):
    return float((logits(params, x_test).argmax(1) == y_test).mean())


# %% [markdown]
# ## A mask is an array
#
# `init_masks` creates the masks that a method starts from. A leaf without a mask, here
# each bias, holds `MaskedNode()`. It has no leaves of its own, so `jax.tree.map` over
# masks skips it.

# %%
params = network.init(jax.random.key(0), x[:1])["params"]
masks = granet_jax.init_masks(granet_jax.static(0.9), params, seed=0)
print(jax.tree.map(lambda m: f"{m.dtype}{list(m.shape)} {int(m.sum())}", masks))

# %%
sparse = granet_jax.apply_masks(params, masks)
packed = granet_jax.pack_masks(masks)  # One bit a weight, to store or send.
size = sum(leaf.nbytes for leaf in jax.tree.leaves(masks))
small = sum(leaf.nbytes for leaf in jax.tree.leaves(packed))
print(f"{size:,} bytes, packed {small:,}")
same = jax.tree.map(jnp.array_equal, granet_jax.unpack_masks(packed), masks)
assert all(jax.tree.leaves(same))

# %% [markdown]
# ## Five trainings
#
# The optimizer's state holds the masks, and `get_masks` returns them. This loop keeps a
# copy of the initial masks and of the masks after each update. The seed determines the
# initial weights, the initial masks and the batches.


# %%
def train(method, seed):
    tx = granet_jax.transform(method, optax.adam(2e-3), seed=seed)

    @jax.jit
    def update(params, opt_state, key):
        batch = jax.random.choice(key, len(x), (128,))
        grads = jax.grad(loss)(params, x[batch], y[batch])
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    keys = jax.random.split(jax.random.key(seed), STEPS + 1)
    params = network.init(keys[0], x[:1])["params"]
    opt_state = tx.init(params)
    params = granet_jax.apply_masks(params, granet_jax.get_masks(opt_state))
    history = {0: jax.device_get(granet_jax.get_masks(opt_state))}
    for step in range(1, STEPS + 1):
        params, opt_state = update(params, opt_state, keys[step])
        if step % INTERVAL == 0:
            history[step] = jax.device_get(granet_jax.get_masks(opt_state))
    return params, history


granet = granet_jax.granet(0.9, STEPS, interval=INTERVAL)
rigl = granet_jax.rigl(0.9, STEPS, interval=INTERVAL)
set_ = granet_jax.set_(0.9, STEPS, interval=INTERVAL)
static = granet_jax.static(0.9)
runs = {
    "GraNet": (granet, 0),
    "GraNet, seed 1": (granet, 1),
    "RigL": (rigl, 0),
    "SET": (set_, 0),
    "static": (static, 0),
}
histories = {}
for name, (method, seed) in runs.items():
    params, histories[name] = train(method, seed)
    active = granet_jax.sparsity(histories[name][STEPS]).active
    assert active == 5_020  # A tenth of 50,200 weights.
    print(f"{name:15} test accuracy {accuracy(params):.1%}, {active:,} active weights")

# %% [markdown]
# (These are single runs on 596 test images, one of which is 0.17%. They do not show
# which method is best.)
#
# ## Which pixels a mask keeps
#
# The first kernel has a row for each pixel, so the number of active weights in a row is
# the number of units that read that pixel. GraNet learns which pixels matter: the
# columns at the far left and right are nearly always white, and they lose their
# weights. A random mask keeps them.

# %%
figure = Figure(figsize=(9, 2.9), layout="constrained")
panels = figure.subplots(1, 3)
panels[0].imshow(x.mean(0).reshape(8, 8), cmap="Greys")
panels[0].set_title("mean of the images", fontsize=11)
for axes, name in zip(panels[1:], ("GraNet", "static"), strict=True):
    kept = histories[name][STEPS]["layer_1"]["kernel"].sum(1).reshape(8, 8)
    image = axes.imshow(kept, cmap="cividis", vmin=0, vmax=130)
    axes.set_title(name, fontsize=11)
figure.colorbar(image, ax=panels[1:], label="active weights of a pixel, of 300")
for axes in panels:
    axes.set_xticks(range(8))
    axes.set_yticks(range(8))
figure

# %% [markdown]
# `plots.inputs` draws this for a single mask.
#
# ## How masks move
#
# Move the slider to see GraNet's input layer over the training. The slider needs a
# running kernel; the figure below it does not.

# %%
history = histories["GraNet"]


def show(step):
    mask = history[step]["layer_1"]["kernel"]
    return plots.inputs(mask, (8, 8), title=f"GraNet, step {step}")


slider = ipywidgets.SelectionSlider(options=[*history], description="step")
explorer = ipywidgets.interactive(show, step=slider)
explorer

# %%
figure = Figure(figsize=(9, 2.0), layout="constrained")
shown = [[*history][i] for i in (0, 2, 4, 7, 10)]
panels = figure.subplots(1, 5)
for axes, step in zip(panels, shown, strict=True):
    kept = history[step]["layer_1"]["kernel"].sum(1).reshape(8, 8)
    image = axes.imshow(kept, cmap="cividis", vmin=0, vmax=300)
    axes.set_title(f"step {step}", fontsize=11)
    axes.set_axis_off()
figure.colorbar(image, ax=panels, label="active weights\nof a pixel, of 300", aspect=12)
figure

# %% [markdown]
# Churn is what one update changed: the share of the active weights that it dropped, and
# the share of the new active weights that it grew. In the first half GraNet drops more
# than it grows, because it prunes. Later it only exchanges, and less and less, by its
# cosine schedule.

# %%
plots.churn(history, title="GraNet: changes by each update")

# %% [markdown]
# The exploration rate is the share of all weights that were active at least once.
# GraNet starts dense, so its rate is 1. A static mask stays at its tenth. SET grows at
# random and explores more and more. RigL grows where gradients are large, and soon
# those weights are mostly ones that it had before.

# %%
explored = {name: histories[name] for name in ("GraNet", "RigL", "SET", "static")}
seen = {name: analysis.exploration(h.values()).total for name, h in explored.items()}
print({name: f"{share:.1%}" for name, share in seen.items()})
assert (seen["GraNet"], seen["static"]) == (1.0, 0.1)
plots.exploration(explored)

# %% [markdown]
# ## How similar are two masks?
#
# Intersection over union, IoU, is 1 for equal masks. Two random masks overlap too:
# `overlap` gives the IoU expected by chance for the number of active weights in each
# layer. The hidden units of networks from different seeds have no common order, so
# their masks can only agree about the pixels.

# %%
pairs = [
    ("GraNet", "GraNet, seed 1"),
    ("GraNet", "RigL"),
    ("GraNet", "SET"),
    ("RigL", "SET"),
    ("RigL", "static"),
    ("SET", "static"),
]
overlaps = [
    analysis.overlap(histories[a][STEPS], histories[b][STEPS]).total for a, b in pairs
]
figure = Figure(figsize=(8, 3.4), layout="constrained")
axes = figure.subplots()
at = np.arange(len(pairs))
axes.barh(at, [o.iou for o in overlaps], 0.6, color="#56B4E9", label="measured")
axes.plot([o.chance for o in overlaps], at, "k|", ms=20, mew=2, label="by chance")
axes.set_yticks(at, [f"{a} and {b}" for a, b in pairs])
axes.invert_yaxis()
axes.set(xlabel="intersection over union of the final masks", xlim=(0, 0.6))
axes.grid(axis="x", alpha=0.3)
axes.set_axisbelow(True)
axes.legend(loc="lower right", frameon=False)
figure

# %% [markdown]
# RigL and SET started from the same random masks as `static`, because the seed is the
# same, and they keep many of those weights. This is the share of the initial weights
# that each still has:

# %%
for name in ("RigL", "SET"):
    kept = 1 - analysis.churn(histories[name][0], histories[name][STEPS]).total.dropped
    print(f"{name:5} {kept:.1%}")
