"""Training steps that the tests of the core share."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

import granet_jax

PyTree = Any
Step = Callable[[PyTree, Any, PyTree], tuple[PyTree, Any]]


def make_step(tx: Any) -> Step:
    """One step of training: parameters, state and gradients to parameters and state."""

    def step(params: PyTree, state: Any, grads: PyTree) -> tuple[PyTree, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def compiled_step(tx: Any) -> Step:
    return jax.jit(make_step(tx))


def start(tx: Any, params: PyTree) -> tuple[PyTree, Any]:
    """Masked parameters, and the initial state."""
    state = tx.init(params)
    return granet_jax.apply_masks(params, granet_jax.get_masks(state)), state


def at(stacked: PyTree, index: int) -> PyTree:
    return jax.tree.map(lambda x: x[index], stacked)


def stack(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def arrays(tree: PyTree) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def mask_list(masks: PyTree) -> list[np.ndarray | None]:
    """A mask for each parameter, None where there is none."""
    leaves = jax.tree.leaves(masks, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    return [None if isinstance(m, optax.MaskedNode) else np.asarray(m) for m in leaves]


def differ(a: PyTree, b: PyTree) -> bool:
    """Whether any entry of two trees differs."""
    return any(np.any(x != y) for x, y in zip(arrays(a), arrays(b), strict=True))


def changes(masks: Sequence[PyTree]) -> int:
    """How often masks differ from the masks before them."""
    return sum(itertools.starmap(differ, itertools.pairwise(masks)))
