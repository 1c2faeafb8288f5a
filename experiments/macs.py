"""How much a network computes: multiply-accumulates of kernels, FLOPs of training.

Only what kernels do is counted, which is what pruning saves: no norms, biases and
activations, and no products of activations with each other, as attention has.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from granet_jax import masking

DenseGradients = Literal["never", "updates", "always"]
"""When the gradient of pruned weights is needed: never (static, SET, GMP), at mask
updates (RigL, GraNet), or at every step (SNFS)."""


def multiply_accumulates(
    model: nn.Module, input_shape: tuple[int, ...]
) -> dict[str, int]:
    """Multiply-accumulates of every kernel, in one forward pass of one example.

    A convolution counts output positions times kernel elements, whether or not a tap
    falls on padding; a linear layer, positions times kernel elements.

    Args:
      model: called as `model(x, train)`.
      input_shape: of one example: (height, width, channels), or (length,) for text.

    Returns:
      Counts by name of the kernel ("layer/kernel"), as the library names leaves and in
      their order.

    Raises:
      ValueError: a kernel of another layer than `nn.Conv` and `nn.Dense`.
    """
    dtype = jnp.uint8 if len(input_shape) == 1 else jnp.float32
    counts: dict[str, int] = {}

    def count(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext):
        y = call(*args, **kwargs)
        module = context.module
        if context.method_name == "__call__" and isinstance(module, nn.Conv | nn.Dense):
            name = "/".join((*module.path, "kernel"))
            positions = 1
            for size in y.shape[1:-1]:
                positions *= size
            kernel = module.get_variable("params", "kernel")
            counts[name] = counts.get(name, 0) + positions * kernel.size
        return y

    def forward() -> Any:
        with nn.intercept_methods(count):
            x = jnp.zeros((1, *input_shape), dtype)
            return model.init(jax.random.key(0), x, train=False)

    params = jax.eval_shape(forward)["params"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = [masking.leaf_name(path) for path, _ in leaves]
    kernels = [name for name in names if name.rpartition("/")[2] == "kernel"]
    if unknown := set(kernels) ^ set(counts):
        raise ValueError(
            f"model has kernels that are not counted, {sorted(unknown)}: only those of "
            "nn.Conv and nn.Dense are."
        )
    return {name: counts[name] for name in kernels}


def sparse_forward(macs: Mapping[str, int], densities: Mapping[str, float]) -> float:
    """Multiply-accumulates of a forward pass with pruned kernels.

    Args:
      macs: of every kernel, see `multiply_accumulates`.
      densities: share of the weights that are active, in [0, 1], by kernel; one that
        is not named is dense.

    Raises:
      ValueError: a kernel that `macs` does not have, or a density out of range.
    """
    if unknown := set(densities) - set(macs):
        raise ValueError(
            f"densities names kernels {sorted(unknown)}, which macs does not have: it "
            f"has {', '.join(macs)}."
        )
    for name, density in densities.items():
        if not 0 <= density <= 1:
            raise ValueError(
                f"densities must be in [0, 1], got {density} for {name!r}."
            )
    return sum(number * densities.get(name, 1.0) for name, number in macs.items())


def training_flops(
    macs: Mapping[str, int],
    periods: Iterable[tuple[int, Mapping[str, float]]],
    *,
    dense_gradients: DenseGradients,
    interval: int | None = None,
) -> float:
    """FLOPs of a sparse training, relative to a dense one of as many steps.

    A backward pass costs two forward passes, one by activations and one by weights; a
    dense gradient makes the latter dense. For an example this gives, with f_S and f_D
    multiply-accumulates of the sparse and of the dense forward pass,

        never     3 f_S
        updates   (3 f_S interval + 2 f_S + f_D) / (interval + 1)
        always    2 f_S + f_D

    over 3 f_D for dense training. The means over training of both are compared.

    Args:
      macs: of every kernel, see `multiply_accumulates`.
      periods: (number of steps, densities by kernel during them), in any order.
      dense_gradients: see `DenseGradients`.
      interval: steps between mask updates; given if and only if `dense_gradients` is
        "updates".

    Returns:
      1 for dense training.

    Raises:
      ValueError: no steps, or an argument out of range.

    References:
      Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020,
      appendix on FLOPs.
    """
    if dense_gradients not in ("never", "updates", "always"):
        raise ValueError(
            "dense_gradients must be 'never', 'updates' or 'always', got "
            f"{dense_gradients!r}."
        )
    if (interval is not None) != (dense_gradients == "updates"):
        raise ValueError(
            "interval must be given if and only if dense_gradients is 'updates', got "
            f"interval {interval} with {dense_gradients!r}."
        )
    if interval is not None and interval < 1:
        raise ValueError(f"interval must be at least 1, got {interval}.")
    # Share of the steps whose gradient by weights is dense.
    share = {"never": 0.0, "always": 1.0}.get(dense_gradients)
    if share is None:
        assert interval is not None
        share = 1 / (interval + 1)
    dense = sum(macs.values())
    steps, cost = 0, 0.0
    for number, densities in periods:
        if number < 0:
            raise ValueError(f"periods must not have negative steps, got {number}.")
        sparse = sparse_forward(macs, densities)
        steps += number
        cost += number * (3 * sparse + share * (dense - sparse))
    if not steps or not dense:
        raise ValueError(
            f"periods must have steps and macs kernels, got {steps} steps and "
            f"{len(macs)} kernels."
        )
    return cost / (3 * dense * steps)
