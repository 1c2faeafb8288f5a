"""Prune a pretrained language model: `python -m experiments.prune_lm`."""

import dataclasses
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tqdm
import tyro
from etils import epath

import granet_jax
from experiments.buckets import check_folder
from experiments.config.run import check_same
from experiments.language import corpus, pruning, smollm2, tokens
from experiments.language.finetuning import finetune
from experiments.language.perplexity import perplexity
from experiments.training.atomic_files import read_json, write_json
from experiments.training.exit_status import exit_status
from granet_jax import export


@dataclasses.dataclass(frozen=True)
class Config:
    """Prunes SmolLM2-135M in one go, and reports its perplexity before and after.

    Every method is applied at every sparsity. The model and the texts come from
    `python -m experiments.prepare smollm2`.

    Attributes:
      method: Methods: magnitude (in each layer), magnitude-row (in each row of a
        kernel), wanda, ria, owl (its layer densities with wanda), sparsegpt, dsnot
        (swaps after wanda).
      sparsity: Sparsities of the layers, such as 0.5, or patterns such as 2:4. The
        embedding stays dense.
      calibration: Windows of text from which the methods see inputs.
      evaluation: Windows of another text, on which the perplexity is measured.
      length: Tokens of a window.
      finetune: Steps of training after pruning, with fixed masks; 0 for none.
      learning_rate: Highest learning rate of that training.
      batch_size: Windows of a step of that training.
      out: Folder of results.json and results.md. The same command goes on where it
        stopped, and more methods and sparsities may be added.
      save: File for the last pruned model, as granet_jax.export writes it, in bfloat16.
      data_dir: Folder of prepared data sets.
      progress: Whether to show progress bars.
    """

    method: tuple[str, ...] = ("wanda",)
    sparsity: tuple[str, ...] = ("0.5",)
    calibration: int = 32
    evaluation: int = 32
    length: int = 512
    finetune: int = 0
    learning_rate: float = 1e-4
    batch_size: int = 2
    out: str | None = None
    save: str | None = None
    data_dir: str | None = None
    progress: bool = True


def run(config: Config) -> dict[str, Any]:
    """Prune by every method at every sparsity, and return the results.

    Raises:
      ValueError: A setting is not valid, or differs from those of the results in `out`.
      FileNotFoundError: The model is not prepared.
    """
    cells = list(itertools.product(config.method, config.sparsity))
    for method, text in cells:
        pruning.check_method(method, pruning.parse_sparsity(text)[1])
    results = _open(config)
    params = smollm2.load(config.data_dir)
    tokenizer = tokens.tokenizer(config.data_dir)

    def windows(split: str, count: int) -> Any:
        return corpus.windows(tokenizer, split, config.length, count, config.data_dir)

    batches = [
        jnp.asarray(x) for x in windows("calibration", config.calibration)[:, None]
    ]
    evaluation = windows("evaluation", config.evaluation)

    def measure(params: dict[str, Any], what: str) -> float:
        print(f"perplexity of {what} ...", file=sys.stderr, flush=True)
        return perplexity(params, evaluation, progress=config.progress)

    if "dense" not in results:
        results["dense"] = measure(params, "the dense model")
        _write(config, results)
    for method, text in cells:
        name = f"{method} {text}"
        if name in results["cells"]:
            continue
        sparsity, structure = pruning.parse_sparsity(text)
        start = time.monotonic()
        with tqdm.tqdm(
            total=smollm2.DEPTH, desc=name, unit="layer", disable=not config.progress
        ) as bar:
            pruned, masks = pruning.prune(
                method, params, batches, sparsity, structure, bar.update
            )
            jax.block_until_ready(pruned)
        cell = {
            "sparsity": granet_jax.sparsity(masks).overall,
            "seconds": round(time.monotonic() - start, 1),
            "perplexity": measure(pruned, name),
        }
        if config.finetune:
            pruned = finetune(
                pruned,
                masks,
                windows("calibration", min(200, config.finetune * config.batch_size)),
                steps=config.finetune,
                batch_size=config.batch_size,
                learning_rate=config.learning_rate,
                progress=config.progress,
            )
            cell["finetuned"] = measure(pruned, f"{name}, fine-tuned")
        if config.save is not None:
            small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), pruned)
            export.save(config.save, small, masks)
            cell["megabytes"] = round(epath.Path(config.save).stat().length / 1e6, 1)
        results["cells"][name] = cell
        _write(config, results)
    print(_table(results))
    return results


def _settings(config: Config) -> dict[str, Any]:
    """The settings that all cells of a folder share."""
    names = ("calibration", "evaluation", "length", "finetune", "learning_rate")
    return {name: getattr(config, name) for name in (*names, "batch_size")}


def _open(config: Config) -> dict[str, Any]:
    """Return the results in the folder, without any in a new folder."""
    new = {"settings": _settings(config), "cells": {}}
    if config.out is None:
        return new
    folder = epath.Path(config.out)
    check_folder("out", folder)
    if not (folder / "results.json").exists():
        return new
    results = read_json(folder / "results.json")
    check_same(
        results["settings"], new["settings"], holder=str(folder), this="this command"
    )
    return results


def _write(config: Config, results: Mapping[str, Any]) -> None:
    if config.out is None:
        return
    folder = epath.Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    (folder / "results.md").write_text(_table(results))


def _table(results: Mapping[str, Any]) -> str:
    """The perplexities in Markdown: methods by sparsities."""
    cells = {tuple(name.split()): cell for name, cell in results["cells"].items()}
    methods = [x for x in pruning.METHODS if any(x == name for name, _ in cells)]
    sparsities = sorted({text for _, text in cells}, key=lambda x: (":" in x, x))

    def shown(method: str, text: str) -> str:
        cell = cells.get((method, text))
        if cell is None:
            return ""
        tuned = f", then {cell['finetuned']:.2f}" if "finetuned" in cell else ""
        return f"{cell['perplexity']:.2f}{tuned}"

    lines = [
        f"Perplexity, and after fine-tuning if any. Dense: {results['dense']:.2f}",
        "",
        f"| method | {' | '.join(sparsities)} |",
        f"| --- |{' ---: |' * len(sparsities)}",
    ]
    for method in methods:
        row = " | ".join(shown(method, text) for text in sparsities)
        lines.append(f"| {method} | {row} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    return exit_status(
        lambda: run(
            tyro.cli(Config, args=arguments, prog="python -m experiments.prune_lm")
        )
    )


if __name__ == "__main__":
    sys.exit(main())
