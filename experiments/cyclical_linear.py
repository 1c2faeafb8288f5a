"""Cyclical pruning of sparse linear models: what a pruning schedule can take back.

    python -m experiments.cyclical_linear                      # under two minutes
    python -m experiments.cyclical_linear --out runs/linear --seeds 5

Gradient descent with pruning has to find a vector with few non-zeros from fewer
equations than unknowns. While the weights are still far from their final values, a
magnitude pruner prunes some of the true support by mistake. This study counts how much
of it returns under each schedule and recovery rule. All runs of a method (seeds and
correlations) are lanes of one `vmap`.

The paper's linear experiment was not available to us, so the setting is our own. The
rows of X are drawn from N(0, S) with S_ij = rho^|i - j|. The true vector has k
non-zeros in random places, with random signs and sizes uniform in [1, 2]. There is no
noise. Training uses full batches and the step size 1 / lambda_max(X'X / n), starts from
zero, and has the same number of steps for all methods.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from etils import epath
from jax import Array
from matplotlib.figure import Figure

import granet_jax
from experiments.buckets import check_folder
from experiments.reports import training
from experiments.training.atomic_files import atomic_path, write_json
from experiments.training.exit_status import exit_status
from granet_jax import schedules

DEFAULT_FOLDER = epath.Path("runs/cyclical-linear")
RECOVERIES = ("hard", "projected", "straight_through")
CYCLES = (1, 2, 4, 8)
# Masks are recorded at the end of every part. All cycles end with a part.
PARTS = 8
# Colour-blind safe (Okabe and Ito), in the order of `CYCLES`.
COLOURS = ("#56B4E9", "#0072B2", "#E69F00", "#D55E00")
MARKERS = ("o", "s", "D", "^")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sparse linear models under pruning schedules.

    Attributes:
      nonzeros: Numbers k of non-zeros in the true vector; the sparsity is 1 - k / d.
      correlations: Correlations rho of neighbouring features.
      equations: Number n of rows of X.
      features: Number d of columns of X.
      steps: Steps of every run, a multiple of 8.
      seeds: Number of random problems for each k and rho.
      out: Folder for results.md, results.json and recovery.png.
    """

    nonzeros: tuple[int, ...] = (20, 30, 35)
    correlations: tuple[float, ...] = (0.0, 0.8)
    equations: int = 100
    features: int = 200
    steps: int = 4000
    seeds: int = 20
    out: epath.Path = DEFAULT_FOLDER

    def __post_init__(self) -> None:
        """Raise ValueError for an invalid value."""
        check_folder("out", self.out)
        if self.steps < 8 * PARTS or self.steps % PARTS:
            raise ValueError(
                f"steps must be a multiple of {PARTS}, at least {8 * PARTS}, got "
                f"{self.steps}: runs have up to {CYCLES[-1]} cycles of equal length."
            )
        for name in ("nonzeros", "correlations"):
            if not getattr(self, name):
                raise ValueError(f"{name} must hold one number or more.")
        if not all(0 < k < self.features for k in self.nonzeros):
            raise ValueError(
                f"nonzeros must be between 0 and features={self.features}, got "
                f"{self.nonzeros}."
            )
        if not all(0 <= rho < 1 for rho in self.correlations):
            raise ValueError(
                f"correlations must be in [0, 1), got {self.correlations}."
            )
        if self.seeds < 1 or self.equations < 1:
            raise ValueError(
                f"seeds and equations must be at least 1, got {self.seeds} and "
                f"{self.equations}."
            )


class Problem(NamedTuple):
    """One linear model, or several along a leading axis.

    Attributes:
      gram: X'X / n, float32 (d, d).
      cross: X'y / n, float32 (d,).
      truth: True vector, float32 (d,).
      rate: Step size 1 / lambda_max(gram), float32 scalar.
    """

    gram: Any
    cross: Any
    truth: Any
    rate: Any


class Outcome(NamedTuple):
    """The outcome of one run, or of several along a leading axis.

    Attributes:
      weights: Weights of the sparse model at the end, float32 (d,).
      masks: Masks at the end of each eighth of the run, before a new cycle starts,
        bool (8, d).
    """

    weights: Any
    masks: Any


def draw(config: Config, nonzeros: int, correlation: float, seed: int) -> Problem:
    """Draw a random problem, which is the same for all methods."""
    rng = np.random.default_rng([seed, nonzeros, round(1000 * correlation)])
    n, d = config.equations, config.features
    place = np.arange(d)
    covariance = correlation ** np.abs(place[:, None] - place[None, :])
    x = rng.normal(size=(n, d)) @ np.linalg.cholesky(covariance).T
    truth = np.zeros(d)
    support = rng.choice(d, nonzeros, replace=False)
    truth[support] = rng.choice([-1.0, 1.0], nonzeros) * rng.uniform(1, 2, nonzeros)
    gram = x.T @ x / n
    rate = 1 / np.linalg.eigvalsh(gram)[-1]
    parts = (gram, gram @ truth, truth, rate)
    return Problem(*(np.asarray(part, np.float32) for part in parts))


def methods(sparsity: float, steps: int) -> dict[str, granet_jax.Method]:
    """Return the methods by name. All end at `sparsity` after `steps` steps."""
    every_step = schedules.constant(sparsity)
    rows = {
        # Dense training for half of the steps, then one pruning.
        "one-shot": granet_jax.gmp(sparsity, steps // 2, interval=steps // 2),
        # Iterative hard thresholding: keep the largest weights after every step.
        "IHT": granet_jax.Method(name="iht", sparsity=every_step, weights="projected"),
    }
    for recovery in RECOVERIES:
        for cycles in CYCLES:
            rows[row_name(recovery, cycles)] = granet_jax.cyclical(
                sparsity, steps, cycles=cycles, interval=1, recovery=recovery
            )
    return rows


def row_name(recovery: str, cycles: int) -> str:
    """Return the name of a method with cycles; one cycle is gradual pruning."""
    rule = recovery.replace("_", "-")
    if cycles == 1:
        return f"gradual, {rule}"
    return f"{cycles} cycles, {rule}"


def trainer(method: granet_jax.Method, steps: int) -> Callable[[Problem], Outcome]:
    """Return a pure function that trains on one problem, for `vmap` and `jit`."""

    def run(problem: Problem) -> Outcome:
        tx = granet_jax.transform(
            method, optax.sgd(problem.rate), where={"weights": True}
        )

        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, state, _ = carry
            previous_masks = state.masks
            weights = granet_jax.sparse_view(params, state)["weights"]
            grads = {"weights": problem.gram @ weights - problem.cross}
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state, previous_masks), None

        def part(carry: Any, _: None) -> tuple[Any, Array]:
            carry, _ = jax.lax.scan(step, carry, length=steps // PARTS)
            # The masks before the last step of the part, which may start a new cycle.
            return carry, carry[2]["weights"]

        params = {"weights": jnp.zeros_like(problem.cross)}
        state: Any = tx.init(params)
        carry = (params, state, state.masks)
        (params, state, _), masks = jax.lax.scan(part, carry, length=PARTS)
        view = granet_jax.sparse_view(params, state)
        # At the end of the run, use the masks after the last step.
        masks = masks.at[-1].set(state.masks["weights"])
        return Outcome(view["weights"], masks)

    return run


def measure(truth: np.ndarray, outcome: Outcome, cycles: int) -> dict[str, Any]:
    """Measure what happened to the true support.

    Args:
      truth: True vectors, float32 (runs, d).
      outcome: Outcomes of the runs.
      cycles: Number of cycles of the method.

    Returns:
      A dict with one value per run, except for "recovered" and "revived":
        "support": Fraction of the true support that is kept at the end.
        "exact": Whether all of it is kept.
        "relative_error": |w - w*| / |w*|.
        "wrong": Fraction of the true support that is pruned at the end of the first
          cycle.
        "recovered": Fraction of these weights, over all runs, that is kept at the end
          of the last cycle; None with one cycle.
        "revived": For every two successive cycles, the number of weights that are
          pruned at the end of the first and kept at the end of the second, divided by
          k, averaged over the runs.
    """
    true = truth != 0
    k = true.sum(axis=1)
    # An active weight that is zero does not count as kept.
    kept = outcome.masks[:, -1] & (outcome.weights != 0)
    support = (kept & true).sum(axis=1)
    ends = outcome.masks[:, PARTS // cycles - 1 :: PARTS // cycles]
    wrong = true & ~ends[:, 0]
    recovered = (wrong & ends[:, -1]).sum(axis=1)
    revived = (ends[:, 1:] & ~ends[:, :-1]).sum(axis=2) / k[:, None]
    error = np.linalg.norm(outcome.weights - truth, axis=1)
    total = int(wrong.sum())
    return {
        "support": (support / k).tolist(),
        "exact": (support == k).tolist(),
        "relative_error": (error / np.linalg.norm(truth, axis=1)).tolist(),
        "wrong": (wrong.sum(axis=1) / k).tolist(),
        "recovered": float(recovered.sum() / total) if cycles > 1 and total else None,
        "revived": revived.mean(axis=0).tolist(),
    }


def run(config: Config) -> dict[str, Any]:
    """Run all methods on all problems.

    Returns:
      The results of `measure` by "k=..., rho=..." and by method.
    """
    results: dict[str, Any] = {}
    tasks: list[tuple[int, str, granet_jax.Method, Problem]] = []
    for k in config.nonzeros:
        problems = [
            draw(config, k, rho, seed)
            for rho in config.correlations
            for seed in range(config.seeds)
        ]
        stacked = jax.tree.map(lambda *parts: np.stack(parts), *problems)
        sparsity = 1 - k / config.features
        for name, method in methods(sparsity, config.steps).items():
            tasks.append((k, name, method, stacked))

    def work(task: tuple[int, str, Any, Problem]) -> dict[float, Any]:
        _, name, method, problems = task
        lanes = jax.jit(jax.vmap(trainer(method, config.steps)))
        outcome = Outcome(*jax.device_get(lanes(problems)))
        cycles = int(name.split()[0]) if "cycles" in name else 1
        by_rho: dict[float, Any] = {}
        for i, rho in enumerate(config.correlations):
            own = slice(i * config.seeds, (i + 1) * config.seeds)
            part = Outcome(outcome.weights[own], outcome.masks[own])
            by_rho[rho] = measure(problems.truth[own], part, cycles)
        return by_rho

    # Most of the time is compilation, which uses one core per program.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for (k, name, _, _), by_rho in zip(tasks, pool.map(work, tasks), strict=True):
            for rho, measures in by_rho.items():
                results.setdefault(setting_name(k, rho), {})[name] = measures
    return results


def setting_name(nonzeros: int, correlation: float) -> str:
    """Return the name of a column of the table."""
    return f"k={nonzeros}, rho={correlation:g}"


def table(results: Mapping[str, Mapping[str, Any]], cell: Callable[[Any], str]) -> str:
    """Return a Markdown table with a line per method and a column per setting."""
    names = list(next(iter(results.values())))
    lines: list[list[str]] = [["method", *results], ["---"] + ["---:"] * len(results)]
    lines += [[name, *(cell(of[name]) for of in results.values())] for name in names]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quality(measures: Mapping[str, Any]) -> str:
    """Format support with its standard deviation, exact recoveries, relative error."""
    support = measures["support"]
    spread = f" ± {statistics.stdev(support):.3f}" if len(support) > 1 else ""
    exact = statistics.mean(map(float, measures["exact"]))
    error = statistics.mean(measures["relative_error"])
    return f"{statistics.mean(support):.3f}{spread} / {exact:.2f} / {error:.3f}"


def second_chance(measures: Mapping[str, Any]) -> str:
    """Format the wrongly pruned, recovered and revived fractions."""
    wrong = f"{statistics.mean(measures['wrong']):.3f}"
    if not measures["revived"]:
        return f"{wrong} / - / -"
    recovered = measures["recovered"]
    share = "-" if recovered is None else f"{recovered:.2f}"
    revived = measures["revived"]
    return f"{wrong} / {share} / {revived[0]:.3f} to {revived[-1]:.3f}"


def write(config: Config, results: Mapping[str, Any], seconds: float) -> None:
    """Write results.md, results.json and recovery.png to `config.out`."""
    config.out.mkdir(parents=True, exist_ok=True)
    written = dataclasses.asdict(config) | {"out": None}
    values = {
        "config": written,
        "seconds": round(seconds, 1),
        "environment": training.environment(),
        "results": results,
    }
    write_json(config.out / "results.json", values)
    text = f"""\
# Sparse linear models: n={config.equations}, d={config.features}

`python -m experiments.cyclical_linear`, {config.steps:,} steps of every method,
{config.seeds} seeds.

Fraction of the true support found, ± standard deviation over seeds / fraction of seeds
that found all of it / mean relative error of the weights:

{table(results, quality)}

Fraction of the true support pruned at the end of the first cycle / fraction of these
weights kept at the end of the last cycle / weights revived from one cycle to the next,
relative to k, after the first cycle to before the last:

{table(results, second_chance)}
"""
    with atomic_path(config.out / "results.md") as partial:
        partial.write_text(text)
    with atomic_path(config.out / "recovery.png") as partial:
        plot(config, results, partial)


def plot(config: Config, results: Mapping[str, Any], path: pathlib.Path) -> None:
    """Plot support against k, with a panel per rule and correlation, as a PNG."""
    figure = Figure(figsize=(9, 2.6 + 2.4 * len(config.correlations)))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(
        len(config.correlations), 3, sharex=True, sharey=True, squeeze=False
    )
    shift = 0.012 * (max(config.nonzeros) - min(config.nonzeros))
    for row, rho in zip(panels, config.correlations, strict=True):
        for axes, recovery in zip(row, RECOVERIES, strict=True):
            lines = [
                ("one-shot", "one-shot", "#777777", "X", ":"),
                ("IHT", "IHT (constant)", "#CC79A7", "P", "--"),
                *(
                    (
                        row_name(recovery, n),
                        "gradual (1 cycle)" if n == 1 else f"{n} cycles",
                        colour,
                        marker,
                        "-",
                    )
                    for n, colour, marker in zip(CYCLES, COLOURS, MARKERS, strict=True)
                ),
            ]
            for i, (name, label, colour, marker, style) in enumerate(lines):
                supports = [
                    results[setting_name(k, rho)][name]["support"]
                    for k in config.nonzeros
                ]
                axes.errorbar(
                    [k + shift * (i - 2.5) for k in config.nonzeros],
                    [statistics.mean(values) for values in supports],
                    # Standard error of the mean.
                    yerr=[_standard_error(values) for values in supports],
                    color=colour,
                    marker=marker,
                    linestyle=style,
                    markersize=6,
                    markeredgecolor="white",
                    markeredgewidth=0.5,
                    linewidth=1.5,
                    capsize=2,
                    label=label,
                )
            axes.set_title(f"{recovery.replace('_', '-')}, rho = {rho:g}", fontsize=10)
            axes.set_xticks(config.nonzeros)
            axes.grid(axis="y", alpha=0.3)
        row[0].set_ylabel("fraction of the true\nsupport found")
    for axes in panels[-1]:
        axes.set_xlabel("non-zeros k of the true vector")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=6, frameon=False)
    figure.savefig(path, dpi=150, format="png")


def _standard_error(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    return statistics.stdev(values) / len(values) ** 0.5


def study(config: Config) -> None:
    """Run the study, write the results, and print them."""
    start = time.perf_counter()
    results = run(config)
    write(config, results, time.perf_counter() - start)
    print((config.out / "results.md").read_text())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    name = "python -m experiments.cyclical_linear"
    return exit_status(lambda: study(tyro.cli(Config, args=arguments, prog=name)))


if __name__ == "__main__":
    sys.exit(main())
