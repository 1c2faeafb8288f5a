"""Cyclical pruning of sparse linear models: what a pruning schedule can take back.

    python -m experiments.cyclical_linear                      # under two minutes
    python -m experiments.cyclical_linear --out runs/linear --seeds 5

A vector with few non-zeros is to be found from fewer equations than it has entries, by
gradient descent and pruning. A magnitude pruner is bound to prune some of the true
support by mistake, since weights are not yet what they will be; and here it can be
counted how much of it comes back, under each schedule and rule of recovery. All runs of
a method (seeds and correlations) are lanes of one `vmap`.

The set-up is our own (the paper's linear experiment is not described where we could
read it): rows of X from N(0, S) with S_ij = rho^|i - j|; the true vector has k
non-zeros in random places, of random sign, uniform in size over [1, 2]; no noise; full
batches; the step size is 1 / lambda_max(X'X / n); the start is zero; all methods have
the same number of steps.
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
from jax import Array
from matplotlib.figure import Figure

import granet_jax
from experiments import train
from experiments.training.atomic_files import atomic_path, write_json
from granet_jax import schedules

RECOVERIES = ("hard", "projected", "straight_through")
CYCLES = (1, 2, 4, 8)
# Parts of a run at whose ends masks are looked at: so that those of all cycles are.
PARTS = 8
# Colour-blind safe (Okabe & Ito); cycles from light to dark.
COLOURS = ("#56B4E9", "#0072B2", "#E69F00", "#D55E00")
MARKERS = ("o", "s", "D", "^")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sparse linear models under pruning schedules.

    Attributes:
      nonzeros: k, the numbers of non-zeros of the true vector; sparsity is 1 - k / d.
      correlations: rho, of neighbouring features.
      equations: n, rows of X.
      features: d, columns of X.
      steps: of every run, a multiple of 8.
      seeds: random problems for each k and rho.
      out: folder for results.md, results.json and recovery.png.
    """

    nonzeros: tuple[int, ...] = (20, 30, 35)
    correlations: tuple[float, ...] = (0.0, 0.8)
    equations: int = 100
    features: int = 200
    steps: int = 4000
    seeds: int = 20
    out: pathlib.Path = pathlib.Path("runs/cyclical-linear")

    def __post_init__(self) -> None:
        """Raises ValueError for a setting that cannot be run."""
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
    """One linear model, or many along a leading axis.

    Attributes:
      gram: X'X / n, float32 (d, d).
      cross: X'y / n, float32 (d,).
      truth: the true vector, float32 (d,).
      rate: step size, 1 / lambda_max(gram), float32 scalar.
    """

    gram: Any
    cross: Any
    truth: Any
    rate: Any


class Outcome(NamedTuple):
    """Of one run, or many along a leading axis.

    Attributes:
      weights: float32 (d,), those of the sparse model at the end.
      masks: bool (8, d), at the end of each eighth of the run, just before the sparsity
        falls if it does.
    """

    weights: Any
    masks: Any


def draw(config: Config, nonzeros: int, correlation: float, seed: int) -> Problem:
    """A random problem; the same for all methods."""
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
    """The rows of the table, by name: all end at `sparsity` after `steps` steps."""
    every_step = schedules.constant(sparsity)
    rows = {
        # Half of the steps dense, and half with what one pruning leaves.
        "one-shot": granet_jax.gmp(sparsity, steps // 2, interval=steps // 2),
        # Iterative hard thresholding: the largest after every step.
        "IHT": granet_jax.Method(name="iht", sparsity=every_step, weights="projected"),
    }
    for recovery in RECOVERIES:
        for cycles in CYCLES:
            rows[row_name(recovery, cycles)] = granet_jax.cyclical(
                sparsity, steps, cycles=cycles, interval=1, recovery=recovery
            )
    return rows


def row_name(recovery: str, cycles: int) -> str:
    """Gradual pruning is one cycle."""
    rule = recovery.replace("_", "-")
    if cycles == 1:
        return f"gradual, {rule}"
    return f"{cycles} cycles, {rule}"


def trainer(method: granet_jax.Method, steps: int) -> Callable[[Problem], Outcome]:
    """The whole run of one problem: pure, for `vmap` and `jit`."""

    def run(problem: Problem) -> Outcome:
        tx = granet_jax.transform(
            method, optax.sgd(problem.rate), where={"weights": True}
        )

        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, state, _ = carry
            before = state.masks
            weights = granet_jax.sparse_view(params, state)["weights"]
            grads = {"weights": problem.gram @ weights - problem.cross}
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state, before), None

        def part(carry: Any, _: None) -> tuple[Any, Array]:
            carry, _ = jax.lax.scan(step, carry, length=steps // PARTS)
            # Before the last step of it, which may be the restart.
            return carry, carry[2]["weights"]

        params = {"weights": jnp.zeros_like(problem.cross)}
        state: Any = tx.init(params)
        carry = (params, state, state.masks)
        (params, state, _), masks = jax.lax.scan(part, carry, length=PARTS)
        view = granet_jax.sparse_view(params, state)
        # But those of the end are of the end.
        masks = masks.at[-1].set(state.masks["weights"])
        return Outcome(view["weights"], masks)

    return run


def measure(truth: np.ndarray, outcome: Outcome, cycles: int) -> dict[str, Any]:
    """What became of the true support, per run (leading axis: runs).

    Args:
      truth: float32 (runs, d).
      outcome: of these runs.
      cycles: of the method.

    Returns:
      "support": share of the true support kept at the end; "exact": whether all of it;
      "relative_error": |w - w*| / |w*|; "wrong": share of the true support that is
      pruned at the end of the first cycle; "recovered": share of that which is kept at
      the end of the last (None with one cycle); "revived": for each two neighbouring
      cycles, the weights kept at the end of the second that were pruned at the end of
      the first, as a share of k.
    """
    true = truth != 0
    k = true.sum(axis=1)
    # Weights that are there but zero are none.
    kept = outcome.masks[:, -1] & (outcome.weights != 0)
    found = (kept & true).sum(axis=1)
    ends = outcome.masks[:, PARTS // cycles - 1 :: PARTS // cycles]
    wrong = true & ~ends[:, 0]
    recovered = (wrong & ends[:, -1]).sum(axis=1)
    revived = (ends[:, 1:] & ~ends[:, :-1]).sum(axis=2) / k[:, None]
    error = np.linalg.norm(outcome.weights - truth, axis=1)
    total = int(wrong.sum())
    return {
        "support": (found / k).tolist(),
        "exact": (found == k).tolist(),
        "relative_error": (error / np.linalg.norm(truth, axis=1)).tolist(),
        "wrong": (wrong.sum(axis=1) / k).tolist(),
        "recovered": float(recovered.sum() / total) if cycles > 1 and total else None,
        "revived": revived.mean(axis=0).tolist(),
    }


def run(config: Config) -> dict[str, Any]:
    """Runs all methods on all problems.

    Returns:
      By "k=..., rho=...", then by method: the measures, see `measure`.
    """
    results: dict[str, Any] = {}
    jobs: list[tuple[int, str, granet_jax.Method, Problem]] = []
    for k in config.nonzeros:
        problems = [
            draw(config, k, rho, seed)
            for rho in config.correlations
            for seed in range(config.seeds)
        ]
        stacked = jax.tree.map(lambda *parts: np.stack(parts), *problems)
        sparsity = 1 - k / config.features
        for name, method in methods(sparsity, config.steps).items():
            jobs.append((k, name, method, stacked))

    def work(job: tuple[int, str, Any, Problem]) -> dict[float, Any]:
        _, name, method, problems = job
        lanes = jax.jit(jax.vmap(trainer(method, config.steps)))
        outcome = Outcome(*jax.device_get(lanes(problems)))
        cycles = int(name.split()[0]) if "cycles" in name else 1
        by_rho: dict[float, Any] = {}
        for i, rho in enumerate(config.correlations):
            own = slice(i * config.seeds, (i + 1) * config.seeds)
            part = Outcome(outcome.weights[own], outcome.masks[own])
            by_rho[rho] = measure(problems.truth[own], part, cycles)
        return by_rho

    # Compiling takes most of the time, and one core.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for (k, name, _, _), by_rho in zip(jobs, pool.map(work, jobs), strict=True):
            for rho, measures in by_rho.items():
                results.setdefault(setting_name(k, rho), {})[name] = measures
    return results


def setting_name(nonzeros: int, correlation: float) -> str:
    """Of a column of the table."""
    return f"k={nonzeros}, rho={correlation:g}"


def table(results: Mapping[str, Mapping[str, Any]], cell: Callable[[Any], str]) -> str:
    """A line for each method, a column for each setting, as Markdown."""
    names = list(next(iter(results.values())))
    lines: list[list[str]] = [["method", *results], ["---"] + ["---:"] * len(results)]
    lines += [[name, *(cell(of[name]) for of in results.values())] for name in names]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quality(measures: Mapping[str, Any]) -> str:
    """Support with its standard deviation, exact recoveries, relative error."""
    support = measures["support"]
    spread = f" ± {statistics.stdev(support):.3f}" if len(support) > 1 else ""
    exact = statistics.mean(map(float, measures["exact"]))
    error = statistics.mean(measures["relative_error"])
    return f"{statistics.mean(support):.3f}{spread} / {exact:.2f} / {error:.3f}"


def second_chance(measures: Mapping[str, Any]) -> str:
    """Wrongly pruned at first, recovered of these, revived in each cycle."""
    wrong = f"{statistics.mean(measures['wrong']):.3f}"
    if not measures["revived"]:
        return f"{wrong} / - / -"
    recovered = measures["recovered"]
    share = "-" if recovered is None else f"{recovered:.2f}"
    revived = measures["revived"]
    return f"{wrong} / {share} / {revived[0]:.3f} to {revived[-1]:.3f}"


def write(config: Config, results: Mapping[str, Any], seconds: float) -> None:
    """Writes results.md, results.json and recovery.png to `config.out`."""
    config.out.mkdir(parents=True, exist_ok=True)
    written = dataclasses.asdict(config) | {"out": None}
    values = {
        "config": written,
        "seconds": round(seconds, 1),
        "environment": train.environment(),
        "results": results,
    }
    write_json(config.out / "results.json", values)
    text = f"""\
# Sparse linear models: n={config.equations}, d={config.features}

`python -m experiments.cyclical_linear`, {config.steps:,} steps of every method,
{config.seeds} seeds.

Share of the true support found, ± standard deviation over seeds / share of seeds that
found all of it / mean relative error of the weights:

{table(results, quality)}

Share of the true support pruned at the end of the first cycle / share of that kept at
the end of the last / weights revived from one cycle to the next, as a share of k, after
the first and before the last:

{table(results, second_chance)}
"""
    with atomic_path(config.out / "results.md") as partial:
        partial.write_text(text)
    with atomic_path(config.out / "recovery.png") as partial:
        plot(config, results, partial)


def plot(config: Config, results: Mapping[str, Any], path: pathlib.Path) -> None:
    """Support found against k: a panel for each rule and correlation, as a PNG."""
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
                found = [
                    results[setting_name(k, rho)][name]["support"]
                    for k in config.nonzeros
                ]
                axes.errorbar(
                    [k + shift * (i - 2.5) for k in config.nonzeros],
                    [statistics.mean(values) for values in found],
                    # Standard error of the mean.
                    yerr=[_standard_error(values) for values in found],
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
        row[0].set_ylabel("share of the true\nsupport found")
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
    """Runs, writes, and prints the table."""
    start = time.perf_counter()
    results = run(config)
    write(config, results, time.perf_counter() - start)
    print((config.out / "results.md").read_text())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, as `experiments.train.main` does."""

    def command() -> None:
        name = "python -m experiments.cyclical_linear"
        study(tyro.cli(Config, args=arguments, prog=name))

    return train.exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
