"""How large the steps of weights are that a mask update has activated.

    python -m benchmarks.entered_weights

RigL with Adam on random gradients with a mean of 1 or -1 per weight. The table has the
mean of abs(update) / learning rate, of weights that entered with the last mask update
and of those that were active before, for Adam's default b2 and a lower one, without and
with a warm-up. It takes half a minute on a CPU.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import granet_jax

LEARNING_RATE = 1e-3
INTERVAL, UPDATES = 100, 6
CASES = ((0.999, 0), (0.999, 100), (0.95, 0))  # Adam's b2, steps of the warm-up
AGES = (1, 3, 10, 30)  # steps since the update
SHAPE = (512, 512)


def ratios(b2: float, warmup: int) -> dict[int, tuple[float, float]]:
    """Mean abs(update) / learning rate by age: of entered and of other weights."""
    steps = INTERVAL * (UPDATES + 2)
    method = granet_jax.rigl(0.5, steps, interval=INTERVAL, stop=1.0)
    optimizer = optax.adam(LEARNING_RATE, b2=b2)
    tx = granet_jax.transform(method, optimizer, warmup=warmup)
    key = jax.random.key(0)
    params = {"w": jax.random.normal(key, SHAPE)}
    sign = jnp.sign(jax.random.normal(jax.random.fold_in(key, 1), SHAPE))

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any, Any]:
        noise = jax.random.normal(jax.random.fold_in(key, state.count + 2), SHAPE)
        updates, state = tx.update({"w": sign + noise}, state, params)
        return optax.apply_updates(params, updates), state, updates

    state = tx.init(params)
    params = granet_jax.apply_masks(params, granet_jax.get_masks(state))
    found = {}
    for count in range(1, INTERVAL * UPDATES + AGES[-1] + 1):
        params, state, update = step(params, state)
        age = count - INTERVAL * UPDATES
        if age in AGES:
            size = np.abs(update["w"]) / LEARNING_RATE
            entered, masks = state.entered["w"], granet_jax.get_masks(state)["w"]
            found[age] = (size[entered].mean(), size[masks & ~entered].mean())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    summary = (__doc__ or "").split("\n")[0]
    argparse.ArgumentParser(description=summary).parse_args(arguments)
    print("| b2 | warm-up / steps | weights |" + "".join(f" {age} |" for age in AGES))
    print("| ---: | ---: | --- |" + " ---: |" * len(AGES))
    for b2, warmup in CASES:
        found = ratios(b2, warmup)
        for i, name in enumerate(("entered", "others")):
            cells = "".join(f" {found[age][i]:.2f} |" for age in found)
            print(f"| {b2} | {warmup} | {name} |{cells}")


if __name__ == "__main__":
    main()
