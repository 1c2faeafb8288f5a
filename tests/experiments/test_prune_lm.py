"""The command that prunes a language model, on a network of two small layers."""

import json

import jax
import numpy as np
import pytest

from experiments import prune_lm
from experiments.language import corpus, pruning, smollm2, tokens
from experiments.language.perplexity import perplexity
from granet_jax import export
from tests.helpers.small_language_model import network


@pytest.fixture
def params(monkeypatch):
    """Replace the model and its texts by small random ones."""
    params = network(np.random.default_rng(0), 2, scale=1 / 6)
    monkeypatch.setattr(smollm2, "DEPTH", 2)
    monkeypatch.setattr(smollm2, "load", lambda _: params)
    monkeypatch.setattr(tokens, "tokenizer", lambda _: None)
    monkeypatch.setattr(corpus, "windows", windows)
    return params


def windows(tokenizer, split, length, count, data_dir):
    del tokenizer, data_dir
    rng = np.random.default_rng(corpus.SPLITS.index(split))
    return rng.integers(0, 40, (count, length)).astype(np.int32)


SHORT = ("--length", "12", "--calibration", "8", "--evaluation", "4", "--no-progress")


def test_every_method_prunes_exactly_and_results_go_on(params, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["--out", str(out), *SHORT]
    methods = ["--method", *pruning.METHODS]
    assert prune_lm.main([*command, *methods]) == 0
    results = json.loads((out / "results.json").read_text())
    evaluation = windows(None, "evaluation", 12, 4, None)
    assert results["dense"] == pytest.approx(perplexity(params, evaluation))
    assert list(results["cells"]) == [f"{method} 0.5" for method in pruning.METHODS]
    for cell in results["cells"].values():
        assert cell["sparsity"] == pytest.approx(0.5, abs=1e-3)  # owl rounds by layer.
        assert np.isfinite(cell["perplexity"])
    assert len({cell["perplexity"] for cell in results["cells"].values()}) == 7
    wanda = results["cells"]["wanda 0.5"]["perplexity"]
    table = capsys.readouterr().out.split("\n")
    assert "| method | 0.5 |" in table
    assert f"| wanda | {wanda:.2f} |" in table

    file = tmp_path / "pruned.safetensors"
    more = ["--method", "sparsegpt", "--sparsity", "0.5", "2:4", "--save", str(file)]
    assert prune_lm.main([*command, *more]) == 0
    # What was there is not computed again.
    after = json.loads((out / "results.json").read_text())
    assert {
        k: v for k, v in after["cells"].items() if k in results["cells"]
    } == results["cells"]
    saved, masks = export.load(file)
    assert perplexity(
        jax.tree.map(lambda x: x.astype(np.float32), saved), evaluation
    ) == pytest.approx(after["cells"]["sparsegpt 2:4"]["perplexity"], rel=0.02)
    groups = np.asarray(masks["layer_01"]["down"]["kernel"]).reshape(12, 4, 32)
    assert np.all(groups.sum(1) == 2)

    assert prune_lm.main(["--out", str(out), *SHORT, "--calibration", "9"]) == 2
    assert "calibration=8, and this command has" in capsys.readouterr().err


def test_fine_tuning_keeps_zeros_and_lowers_the_loss(params, tmp_path):
    file = tmp_path / "pruned.safetensors"
    tuned = ["--finetune", "20", "--learning-rate", "0.01", "--save", str(file)]
    out = tmp_path / "out"
    assert prune_lm.main(["--out", str(out), *SHORT, *tuned]) == 0
    (cell,) = json.loads((out / "results.json").read_text())["cells"].values()
    # The tokens are random, so that the best perplexity is that of their frequencies.
    assert cell["finetuned"] < cell["perplexity"]
    saved, masks = export.load(file)
    kernel, mask = (tree["layer_00"]["up"]["kernel"] for tree in (saved, masks))
    assert np.count_nonzero(mask) == mask.size // 2
    assert not np.any(np.asarray(kernel)[~np.asarray(mask)])
    assert cell["megabytes"] == pytest.approx(file.stat().st_size / 1e6, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "wander"], "method must be one of magnitude, magnitude-row,"),
        (["--sparsity", "1.5"], "sparsity must be a number in [0, 1) such as 0.5"),
        (["--sparsity", "4:2"], "sparsity must be a number in [0, 1) such as 0.5"),
        (["--method", "owl", "--sparsity", "2:4"], "take another method"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    assert prune_lm.main(arguments) == 2
    assert message in capsys.readouterr().err
