# %% [markdown]
# # Any model, any devices
#
# [![Open in Colab][badge]][colab]
#
# `granet_jax` sees a tree of arrays and an optax optimizer, so any library can make the
# tree. Here the same optimizer trains a network in flax.nnx, one in equinox and a small
# transformer in flax linen; then the transformer again on several devices, with a
# checkpoint half way.
#
# [badge]: https://colab.research.google.com/assets/colab-badge.svg
# [colab]: https://colab.research.google.com/github/granet-jax/granet_jax/blob/main/notebooks/any_model.ipynb

# %%
import os
import sys

if "google.colab" in sys.modules:  # Fetch and install the repository.
    os.system("git clone -q https://github.com/granet-jax/granet_jax")
    os.system("pip install -q './granet_jax[notebooks]'")
    os.chdir("granet_jax/notebooks")
sys.path.insert(0, "..")  # `experiments` is not installed.

import tempfile

import equinox as eqx
import flax.linen as nn
import jax
import matplotlib
import numpy as np
import optax
import orbax.checkpoint
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import granet_jax
from experiments import data
from granet_jax import analysis
from granet_jax.analysis import plots

# The last part uses four virtual CPU devices. jax accepts this setting only before the
# first computation.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)

# %matplotlib inline
matplotlib.rcParams["figure.dpi"] = 80
STEPS = int(os.environ.get("NOTEBOOK_STEPS", "300"))

# %% [markdown]
# ## Data, loss and optimizer
#
# Handwritten digits of 8 x 8 pixels. All networks see the same batches, drawn in
# advance.

# %%
digits = data.load("digits")


def flat(images):
    return np.asarray(images, np.float32).reshape(-1, 64) / 255


x, y = flat(digits.train.inputs), np.asarray(digits.train.labels)
x_test, y_test = flat(digits.test.inputs), np.asarray(digits.test.labels)
batches = np.random.default_rng(0).integers(len(x), size=(STEPS, 128))


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def report(logits, masks):
    sparsity = granet_jax.sparsity(masks)
    assert sparsity.active == round(0.1 * sparsity.total)
    accuracy = float((logits.argmax(1) == y_test).mean())
    weights = f"{sparsity.active:,} of {sparsity.total:,} weights"
    print(f"test accuracy {accuracy:.1%}, {weights}")


method = granet_jax.granet(sparsity=0.9, total_steps=STEPS, interval=STEPS // 30)
tx = granet_jax.transform(method, inner=optax.adam(3e-3))

# %% [markdown]
# ## flax.nnx
#
# `nnx.Optimizer` takes `tx` like any other optimizer. Every floating parameter with two
# or more dimensions carries a mask.


# %%
class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 128, rngs=rngs)
        self.last = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


model = Mlp(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def nnx_step(model, optimizer, x, y):
    grads = nnx.grad(lambda model: cross_entropy(model(x), y))(model)
    optimizer.update(model, grads)


for rows in batches:
    nnx_step(model, optimizer, x[rows], y[rows])
report(model(x_test), granet_jax.get_masks(optimizer.opt_state))

# %% [markdown]
# GraNet starts dense. A method that starts sparse, such as RigL, has masks from step 0
# on. Apply them before training with
#
#     params = nnx.as_pure(nnx.state(model, nnx.Param))
#     masks = nnx.as_pure(granet_jax.get_masks(optimizer.opt_state))
#     nnx.update(model, granet_jax.apply_masks(params, masks))
#
# If you forget, the first step does it.
#
# ## equinox
#
# Some leaves of an equinox module are functions and numbers. The optimizer gets its
# arrays.

# %%
model = eqx.nn.MLP(64, 10, width_size=128, depth=1, key=jax.random.key(0))
opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))


@eqx.filter_jit
def eqx_step(model, opt_state, x, y):
    grads = eqx.filter_grad(lambda model: cross_entropy(jax.vmap(model)(x), y))(model)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = tx.update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), opt_state


for rows in batches:
    model, opt_state = eqx_step(model, opt_state, x[rows], y[rows])
report(jax.vmap(model)(x_test), granet_jax.get_masks(opt_state))

# %% [markdown]
# ## A transformer
#
# Each row of an image is a token. The position embedding is a matrix too and would
# carry a mask, so `where` excludes it.


# %%
class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(32, name="embed")(x.reshape(-1, 8, 8))
        x += self.param("position", nn.initializers.normal(0.1), (8, 32))
        h = nn.LayerNorm(name="norm_1")(x)
        x += nn.MultiHeadDotProductAttention(4, name="attention")(h)
        h = nn.LayerNorm(name="norm_2")(x)
        x += nn.Dense(32, name="mlp_2")(nn.gelu(nn.Dense(128, name="mlp_1")(h)))
        return nn.Dense(10, name="head")(x.mean(1))


network = Transformer()
kernels = granet_jax.transform(
    method, inner=optax.adam(3e-3), where=lambda path, leaf: path.endswith("kernel")
)


def loss(params, x, y):
    return cross_entropy(network.apply({"params": params}, x), y)


@jax.jit
def predict(params):
    return network.apply({"params": params}, x_test)


def step(params, opt_state, x, y):
    grads = jax.grad(loss)(params, x, y)
    updates, opt_state = kernels.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


linen_step = jax.jit(step)
dense = jax.jit(network.init)(jax.random.key(0), x[:1])["params"]
params, opt_state = dense, kernels.init(dense)
for rows in batches:
    params, opt_state = linen_step(params, opt_state, x[rows], y[rows])
masks = granet_jax.get_masks(opt_state)
report(predict(params), masks)
assert jax.tree.leaves(masks["position"]) == []
one_device = masks

# %% [markdown]
# ## Several devices
#
# The mesh has two by two devices: batches are split along `data`, and every matrix
# along `model`. The optimizer's state, masks included, takes the layout of the
# parameters, and the step is the same as above. A mask update counts on each device and
# exchanges a few integers. It gathers no tensor.
#
# `out_shardings` keeps the layout of the results equal to that of the inputs. Without
# it, XLA may choose another layout (here it splits the biases), and then the second
# step compiles again. This is so with any optimizer.
#
# When one CPU simulates several devices, wait for each step with `block_until_ready`.
# Otherwise steps that communicate can queue up and wait for each other forever.

# %%
mesh = jax.make_mesh(
    (2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
)


def layout(leaf):
    """Split a matrix along its last axis, and replicate everything else."""
    spec = P(*[None] * (leaf.ndim - 1), "model") if leaf.ndim > 1 else P()
    return NamedSharding(mesh, spec)


def split(*arrays):
    return jax.device_put(arrays, NamedSharding(mesh, P("data")))


layouts = jax.tree.map(layout, jax.eval_shape(lambda: (dense, kernels.init(dense))))
mesh_step = jax.jit(step, out_shardings=layouts)

params, opt_state = jax.device_put((dense, kernels.init(dense)), layouts)
half = STEPS // 2
for rows in batches[:half]:
    params, opt_state = mesh_step(params, opt_state, *split(x[rows], y[rows]))
    jax.block_until_ready(params)

mask = granet_jax.get_masks(opt_state)["mlp_1"]["kernel"]
for shard in mask.addressable_shards:
    print(f"{shard.device}: {list(shard.data.shape)} of {list(mask.shape)}")

# %% [markdown]
# ## Checkpoint
#
# State and masks are arrays in a tree, so orbax saves them directly, and restores them
# to the layout that we name, here that of the mesh. Nothing else needs saving, because
# random masks and random growth depend only on the seed and the step.

# %%
with (
    tempfile.TemporaryDirectory() as folder,
    orbax.checkpoint.StandardCheckpointer() as checkpointer,
):
    checkpointer.save(f"{folder}/half", {"params": params, "opt_state": opt_state})
    checkpointer.wait_until_finished()
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding
        ),
        {"params": params, "opt_state": opt_state},
    )
    restored = checkpointer.restore(f"{folder}/half", like)

pairs = zip(
    jax.tree.leaves((params, opt_state)),
    jax.tree.leaves((restored["params"], restored["opt_state"])),
    strict=True,
)
assert all(np.array_equal(a, b) and a.sharding == b.sharding for a, b in pairs)

# %%
params, opt_state = restored["params"], restored["opt_state"]
for rows in batches[half:]:
    params, opt_state = mesh_step(params, opt_state, *split(x[rows], y[rows]))
    jax.block_until_ready(params)
masks = granet_jax.get_masks(opt_state)
report(predict(params), masks)
print(f"the step was compiled {mesh_step._cache_size()} time(s)")
assert mesh_step._cache_size() == 1

# %% [markdown]
# The number of weights is exactly the same. Their positions may differ from those on
# one device: a split batch is summed in another order, which changes the last bits of
# the gradients, and over a long training the differences add up.

# %%
overlap = analysis.overlap(one_device, masks).total
print(f"intersection over union {overlap.iou:.3f}, by chance {overlap.chance:.3f}")
plots.densities(
    {
        "one device": granet_jax.sparsity(one_device),
        "mesh of 2 x 2": granet_jax.sparsity(masks),
    }
)
