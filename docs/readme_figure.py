"""Draw the first figure of the README: what GraNet's masks keep of the input.

    python -m experiments.prepare fashion_mnist
    python docs/readme_figure.py

The program trains LeNet-300-100 on Fashion-MNIST for 12 epochs with GraNet, about a
minute on a CPU, and writes `docs/images/granet_masks.png`.
"""

import itertools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import granet_jax  # noqa: E402
from experiments import data  # noqa: E402

SIZES = (28 * 28, 300, 100, 10)
EPOCHS, BATCH, INTERVAL, SPARSITY = 12, 128, 70, 0.95
SHARES = (0, 0.1, 0.2, 0.3, 0.5, 1)  # of the training, for the panels


def _initial_params(key: jax.Array) -> list[dict[str, jax.Array]]:
    he = jax.nn.initializers.he_normal()
    shapes = list(itertools.pairwise(SIZES))
    keys = jax.random.split(key, len(shapes))
    return [
        {"kernel": he(k, shape), "bias": jnp.zeros(shape[1])}
        for k, shape in zip(keys, shapes, strict=True)
    ]


def _logits(params: Any, x: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def _loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    entropy = optax.softmax_cross_entropy_with_integer_labels
    return entropy(_logits(params, x), y).mean()


def main() -> None:
    """Train the network and draw its masks."""
    dataset = data.load("fashion_mnist")
    assert isinstance(dataset, data.Dataset)
    x = jnp.asarray(dataset.train.inputs, jnp.float32).reshape(-1, SIZES[0]) / 255
    y = jnp.asarray(dataset.train.labels)

    steps = EPOCHS * (len(x) // BATCH)
    tx = granet_jax.transform(
        granet_jax.granet(SPARSITY, steps, interval=INTERVAL),
        inner=optax.sgd(optax.cosine_decay_schedule(0.05, steps), momentum=0.9),
    )

    @jax.jit
    def step(params: Any, opt_state: Any, key: jax.Array) -> Any:
        batch = jax.random.randint(key, (BATCH,), 0, len(x))
        grads = jax.grad(_loss)(params, x[batch], y[batch])
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = _initial_params(jax.random.key(0))
    opt_state = tx.init(params)
    shown = [INTERVAL * round(share * steps / INTERVAL) for share in SHARES]
    panels = {}
    for number in range(steps + 1):
        if number in shown:
            masks = granet_jax.get_masks(opt_state)
            panels[number] = masks[0]["kernel"], granet_jax.sparsity(masks)
        params, opt_state = step(params, opt_state, jax.random.key(number))
    _draw(np.asarray(x).mean(0), panels, steps)


def _draw(mean_image: np.ndarray, panels: dict[int, Any], steps: int) -> None:
    """Draw one image per mask: the share of the 300 units that read each pixel."""
    figure = Figure(figsize=(12, 2.3), layout="constrained")
    axes = figure.subplots(1, len(panels) + 1)
    axes[0].imshow(mean_image.reshape(28, 28), cmap="Greys")
    axes[0].set_title("mean of the\ntraining images", fontsize=11)
    # The square root keeps small shares visible.
    norm = PowerNorm(0.5, vmin=0, vmax=1)
    for panel, (step, (mask, report)) in zip(axes[1:], panels.items(), strict=True):
        share = np.asarray(mask).mean(1).reshape(28, 28)
        panel.imshow(share, cmap="viridis", norm=norm)
        epoch, active = step / steps * EPOCHS, 1 - report.overall
        panel.set_title(f"epoch {epoch:.2g}\n{active:.0%} active", fontsize=11)
    bar = figure.colorbar(
        ScalarMappable(norm, "viridis"),
        ax=axes,
        label="units that\nread the pixel",
        aspect=9,
        pad=0.01,
    )
    bar.set_ticks([0, 0.05, 0.25, 0.5, 1], labels=["0", "5%", "25%", "50%", "100%"])
    for panel in axes:
        panel.set_xticks([])
        panel.set_yticks([])
    path = HERE / "images" / "granet_masks.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
