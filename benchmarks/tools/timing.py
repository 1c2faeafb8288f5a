"""Timing of several contenders in one run, in turns."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

Rounds = dict[str, list[float]]


def interleaved(
    contenders: Mapping[str, Callable[[], Any]], *, rounds: int, repeats: int = 1
) -> Rounds:
    """Times every contender once a round, so that load on the machine hits all alike.

    Before the first round every contender is called once, untimed, to compile.

    Args:
      contenders: Functions without arguments. Their results are waited for.
      rounds: Number of timings of each contender.
      repeats: Number of calls in one timing.

    Returns:
      Seconds per call of every contender, one number per round.
    """
    for call in contenders.values():
        jax.block_until_ready(call())
    seconds: Rounds = {name: [] for name in contenders}
    for order in turns(list(contenders), rounds):
        for name in order:
            result = None
            start = time.perf_counter()
            for _ in range(repeats):
                result = contenders[name]()
            jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - start) / repeats)
    return seconds


def turns(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """Yields the order of the contenders in each round.

    The orders are random, so that no contender always finds the caches as another one
    left them. They are the same in every run.
    """
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        yield list(rng.permutation(names))


def ratio_of_medians(seconds: Rounds, name: str, baseline: str) -> float:
    """Divides the median of `name` by the median of `baseline`."""
    return statistics.median(seconds[name]) / statistics.median(seconds[baseline])


def median_ratio(seconds: Rounds, name: str, baseline: str) -> float:
    """Divides `name` by `baseline` in each round, and takes the median of these."""
    pairs = zip(seconds[name], seconds[baseline], strict=True)
    return statistics.median(a / b for a, b in pairs)
